"""Builds a tokenizer from the vocabulary in a GGUF file's metadata.

There are two kinds. Byte-level BPE ("gpt2" in the file) merges pairs in a listed order.
SentencePiece's BPE ("llama") lists a score for each piece. Whatever is wrong is a ValueError, or
an Exception of the tokenizers package.
"""

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type

def words(letters, digits, ends=""):
    """A regular expression that cuts text into words.

    letters, digits: expressions of a word and of a number; ends: characters that, like newlines,
    stay with the punctuation in front of them
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


def build_tokenizer(metadata, vocab_size):
    """A GGUF file's metadata, a model's vocabulary size -> `tokenizers.Tokenizer`."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"its tokenizer.ggml.model is {kind!r}; supported are 'gpt2' and "
                         "'llama'")
    tokens = metadata.get("tokenizer.ggml.tokens")
    types = np.asarray(metadata.get("tokenizer.ggml.token_type", ()))
    if (not isinstance(tokens, list) or types.shape != (len(tokens),)
            or types.dtype.kind not in "iu"):
        raise ValueError("its tokenizer.ggml.tokens and tokenizer.ggml.token_type are missing or "
                         "differ in length")
    if len(tokens) > vocab_size:
        raise ValueError(f"its vocabulary has {len(tokens)} tokens, but tensor token_embd.weight "
                         f"only {vocab_size} rows")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError("its vocabulary holds the same token twice")
    if kind == "gpt2":
        tokenizer = byte_level_bpe(metadata, vocab)
    else:
        pieces = {tokens[i] for i in np.flatnonzero(types == NORMAL)}
        tokenizer = sentencepiece_bpe(metadata, tokens, pieces, vocab)

    def added(mask):
        return [AddedToken(tokens[i], normalized=False) for i in np.flatnonzero(mask)]

    tokenizer.add_special_tokens(added((types == CONTROL) | (types == UNKNOWN)))
    tokenizer.add_tokens(added(types == USER_DEFINED))
    add_bos = kind == "llama" or metadata.get("tokenizer.ggml.pre") in (*LLAMA3, "tekken")
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos):
        bos = special_token(metadata, "bos")
        if bos is None:
            raise ValueError("its vocabulary has no token tokenizer.ggml.bos_token_id, which "
                             "should begin a text")
        # Called "bos" in the template, where its own name could mean something else ("$A").
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            special_tokens=[{"id": "bos", "ids": [vocab[bos]], "tokens": [bos]}])
    return tokenizer


def special_token(metadata, role):
    """The text of the "bos", "eos", "unknown" or "padding" token; None if the file names none."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    i = metadata.get(f"tokenizer.ggml.{role}_token_id")
    known = isinstance(tokens, list) and isinstance(i, int) and 0 <= i < len(tokens)
    return tokens[i] if known else None


def byte_level_bpe(metadata, vocab):
    """GPT-2's kind: text as bytes, each written as a visible character, merged in a listed
    order."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in REGEX)
    if pre in REGEX:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(REGEX[pre]), "isolated"), cut])
    elif pre in DIGITS:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cut])
    elif pre not in GPT2:
        raise ValueError(f"its tokenizer.ggml.pre is {pre!r}; supported are "
                         f"{', '.join((*GPT2, *DIGITS, *REGEX))}")
    merges = metadata.get("tokenizer.ggml.merges")
    merges = [tuple(m.split(" ")) for m in merges] if isinstance(merges, list) else None
    if merges is None or any(len(pair) != 2 for pair in merges):
        raise ValueError("its tokenizer.ggml.merges is not a list of pairs of tokens")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_WORDS))
    if pre in QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(metadata, tokens, pieces, vocab):
    """Llama-2's kind: "▁" for a space, unknown characters as byte tokens <0xNN>.

    The file lists scores and no merges. So every way to cut a piece into two pieces is a merge,
    and the merge that makes the piece of the best score comes first.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),):
        raise ValueError("its tokenizer.ggml.scores is missing or not as long as its vocabulary")
    if sum(map(len, pieces)) > 1 << 22 or max(map(len, pieces), default=0) > 256:
        raise ValueError("its vocabulary holds pieces of absurd length")
    merges = []
    for i in np.argsort(-scores, kind="stable"):
        if (piece := tokens[i]) in pieces:
            pairs = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
            merges += [(a, b) for a, b in pairs if a in pieces and b in pieces]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise ValueError(f"its tokenizer.ggml.unknown_token_id is {unknown!r}")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown],
                                     fuse_unk=True, byte_fallback=True))
    normalize = [normalizers.Replace(" ", "▁")]
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalize = [normalizers.Prepend("▁"), *normalize]
        decode = [*decode, decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(normalize)
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer
