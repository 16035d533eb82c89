"""Builds a tokenizer from the vocabulary in a GGUF file's metadata.

There are two kinds. Byte-level BPE ("gpt2" in the file) merges pairs in a listed order.
SentencePiece's BPE ("llama") lists a score for each piece. Files leave much out, and type tokens
wrongly. What a token's name tells is therefore believed before its type: `complete` does what
llama.cpp does while loading. Whatever is wrong is a ValueError, or an Exception of the tokenizers
package.
"""

import re
import sys

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from checkpoint.tokenizer import CONTROL as CONTROL_NAME
from checkpoint.tokenizer import END_OF_TURN, Tokenizer, template_text

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
BRACKETS = re.compile(r"\[/?[A-Z_]{3,}\]")  # Mistral's control tokens
# Vocabularies known without tokenizer.ggml.pre: how an architecture begins, a token, the value
KNOWN = (("", "<|begin_of_text|>", "llama-bpe"), ("qwen", "<|endoftext|>", "qwen2"),
         ("llama", "<repo_name>", "smollm"), ("granite", "<fim_prefix>", "refact"),
         ("olmo2", "<|endofprompt|>", "dbrx"), ("phi3", "<|im_sep|>", "dbrx"),
         ("", "[AVAILABLE_TOOLS]", "tekken"))


def words(letters, digits, ends=""):
    """A regular expression that cuts text into words.

    letters, digits: expressions of a word and of a number; ends: characters that, like newlines,
    stay with the punctuation before them
    """
    return (rf"{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{ends}]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def by_case(suffix):
    """An expression of a word, cut where a capital letter follows a small one."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"


CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ANY_CASE = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
# Values of tokenizer.ggml.pre: how text is cut into words before pairs are merged. GPT-2's way is
# part of `tokenizers`; some cut numbers into digits before that.
GPT2, DIGITS = ("gpt-2", "default", "olmo"), ("smollm", "refact", "starcoder")
LLAMA3, QWEN2 = ("llama-bpe", "llama3", "llama-v3"), ("qwen2", "deepseek-r1-qwen")
REGEX = {
    **dict.fromkeys((*LLAMA3, "smaug-bpe", "dbrx"), words(ANY_CASE, r"\p{N}{1,3}")),
    **dict.fromkeys(QWEN2, words(ANY_CASE, r"\p{N}")),
    "gpt-4o": words(by_case(CONTRACTION + "?"), r"\p{N}{1,3}", "/"),
    "tekken": words(by_case(""), r"\p{N}", "/"),
}
WHOLE_WORDS = (*LLAMA3, "smaug-bpe", "tekken")  # a word of the vocabulary needs no merges


def open_gguf_tokenizer(metadata, vocab_size, eos):
    """A GGUF file's metadata, a model's vocabulary size, ids that end a turn -> Tokenizer."""
    given = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    equal = complete(given, vocab_size)
    special = {f"{role}_token": given[name] for role, name in ROLES.items()}
    return Tokenizer(build_tokenizer(given), vocab_size, special, [eos],
                     given.get("tokenizer.chat_template"), equal=equal)


def complete(given, vocab_size):
    """Check a vocabulary and put what it leaves out into `given`: "tokens", "token_type", "pre" and
    the texts of the tokens "bos", "eos", "unknown" and "padding", None where it has none.

    Returns {id of a token whose text another one has: that one's id; id of an empty token: None}.
    """
    kind, tokens = given.get("model"), given.get("tokens")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"its tokenizer.ggml.model is {kind!r}; supported are 'gpt2' and "
                         "'llama'")
    types = np.array(given.get("token_type", [NORMAL] * len(tokens or ())))
    if (not isinstance(tokens, list) or types.shape != (len(tokens),)
            or types.dtype.kind not in "iu"):
        raise ValueError("its tokenizer.ggml.tokens and tokenizer.ggml.token_type are missing or "
                         "differ in length")
    if len(tokens) > vocab_size:
        raise ValueError(f"its vocabulary has {len(tokens)} tokens, but tensor token_embd.weight "
                         f"only {vocab_size} rows")
    tokens, equal = [*tokens], {}
    vocab = dict(zip(reversed(tokens), reversed(range(len(tokens)))))  # of equal ones the first
    if len(vocab) < len(tokens) or "" in vocab:
        if len(vocab) < len(tokens) / 2:
            raise ValueError("its vocabulary holds the same token twice, and most of them so")
        equal = {i: vocab[token] if token else None for i, token in enumerate(tokens)
                 if not token or vocab[token] != i}
        vocab.pop("", None)
        for i in equal:  # what no text can become
            while (name := f"[{i}{tokens[i]}]") in vocab:
                tokens[i] += "_"
            tokens[i], types[i], vocab[name] = name, UNUSED, i
    pre = given.get("pre", "")
    if kind == "gpt2" and pre in ("", "default"):  # "default" is what a converter did not know
        arch = str(given.get("general.architecture"))
        pre = next((value for family, token, value in KNOWN
                    if arch.startswith(family) and token in vocab), "")
        if not pre:
            pre = "default"
            print("the file does not say how its vocabulary cuts text into words "
                  "(tokenizer.ggml.pre); text may be cut wrongly", file=sys.stderr)
    if kind == "llama":  # SentencePiece's own order
        ids = {"unknown": 0, "bos": 1, "eos": 2}
    else:
        begin = {**dict.fromkeys(LLAMA3, "<|begin_of_text|>"), "tekken": "<s>"}
        ids = {"bos": vocab.get(begin.get(pre))}
    for name in ROLES.values():
        i = given.get(f"{name}_token_id", ids.get(name))
        given[name] = tokens[i] if isinstance(i, int) and 0 <= i < len(tokens) else None
    if "token_type" not in given:
        types[[i for token, i in vocab.items() if re.fullmatch("<0x..>", token)]] = BYTE
        for name in ROLES.values():
            if given[name] is not None:
                types[vocab[given[name]]] = UNKNOWN if name == "unknown" else CONTROL
    types[find_control(vocab, types, given)] = CONTROL
    given |= {"tokens": tokens, "token_type": types, "pre": pre}
    return equal


def find_control(vocab, types, given):
    """Ids of tokens that are control tokens by their names, but not by their types."""
    literals = template_text(str(given.get("tokenizer.chat_template", "")))
    names = [token for token in vocab if token[:1] == "<" and CONTROL_NAME.fullmatch(token)
             or token[:1] == "[" and BRACKETS.fullmatch(token) and token in literals]
    names = [token for token in {*names, *(vocab.keys() & {*END_OF_TURN})}
             if types[vocab[token]] in (NORMAL, USER_DEFINED)]
    merges = given.get("merges") if given["model"] == "gpt2" and names else None
    if isinstance(merges, list):  # what one of them makes is text
        made = {merge.replace(" ", "", 1) for merge in merges if isinstance(merge, str)}
        names = [token for token in names if token not in made]
    return [vocab[token] for token in names]


def build_tokenizer(given):
    """A vocabulary that is complete -> `tokenizers.Tokenizer`."""
    kind, tokens, types = given["model"], given["tokens"], given["token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = (byte_level_bpe if kind == "gpt2" else sentencepiece_bpe)(given, vocab)
    # Phi-3 strips white space after most of its special tokens; its files do not say so.
    name = f"{given.get('general.architecture')} {given.get('general.name')}".lower()
    strips = kind == "llama" and ("phi3" in name or "phi-3" in name)
    kept = ("<unk>", "<s>", "<|endoftext|>")

    def added(mask):
        return [AddedToken(tokens[i], normalized=False, rstrip=strips and tokens[i] not in kept)
                for i in np.flatnonzero(mask)]

    tokenizer.add_special_tokens(added((types == CONTROL) | (types == UNKNOWN)))
    tokenizer.add_tokens(added(types == USER_DEFINED))
    if given.get("add_bos_token", kind == "llama" or given["pre"] in (*LLAMA3, "tekken")):
        bos = given["bos"]
        if bos is None:
            raise ValueError("its vocabulary has no token tokenizer.ggml.bos_token_id, which "
                             "should begin a text")
        # Called "bos" in the template, where its own name could mean something else ("$A").
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            special_tokens=[{"id": "bos", "ids": [vocab[bos]], "tokens": [bos]}])
    return tokenizer


def byte_level_bpe(given, vocab):
    """GPT-2's kind: text as bytes, each written as a visible character, merged in a listed
    order."""
    pre, merges = given["pre"], given.get("merges")
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in REGEX)
    if pre in REGEX:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(REGEX[pre]), "isolated"), cut])
    elif pre in DIGITS:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cut])
    elif pre not in GPT2:
        raise ValueError(f"its tokenizer.ggml.pre is {pre!r}; supported are "
                         f"{', '.join((*GPT2, *DIGITS, *REGEX))}")
    merges = [tuple(m.split(" ")) for m in merges] if isinstance(merges, list) else None
    if merges is None or any(len(pair) != 2 for pair in merges):
        raise ValueError("its tokenizer.ggml.merges is not a list of pairs of tokens")
    tokenizer = tokenizers.Tokenizer(models.BPE(
        vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    if pre in QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(given, vocab):
    """Llama-2's kind: "▁" for a space, unknown characters as byte tokens <0xNN>.

    The file lists scores and no merges. So every way to cut a piece into two pieces is a merge,
    and the merge that makes the piece of the best score comes first.
    """
    scores, tokens = given.get("scores"), given["tokens"]
    pieces = {tokens[i] for i in np.flatnonzero(given["token_type"] == NORMAL)}
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),):
        raise ValueError("its tokenizer.ggml.scores is missing or not as long as its vocabulary")
    if sum(map(len, pieces)) > 1 << 22 or max(map(len, pieces), default=0) > 256:
        raise ValueError("its vocabulary holds pieces of absurd length")
    merges = []
    for i in np.argsort(-scores, kind="stable"):
        if (piece := tokens[i]) in pieces:
            pairs = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
            merges += [(a, b) for a, b in pairs if a in pieces and b in pieces]
    if given["unknown"] is None:
        raise ValueError("its vocabulary has no token tokenizer.ggml.unknown_token_id")
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True,
                                                unk_token=given["unknown"], byte_fallback=True))
    normalize = [normalizers.Replace(" ", "▁")]
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if given.get("add_space_prefix", True):
        normalize = [normalizers.Prepend("▁"), *normalize]
        decode = [*decode, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(normalize)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer
