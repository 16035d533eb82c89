"""Text to token ids and back, by the tokenizer that a checkpoint brings along.

The `tokenizers` package does the work. `Tokenizer` adds what a model needs: which ids end a turn,
and how a conversation is written (chat_template.py). `TextStream` turns ids into text while they
are still coming. The file is a stranger's, and the package is written in Rust: a bad file may end
it in a panic. Whatever goes wrong becomes a TokenizerError of one sentence.
"""

import itertools
import re

from tokenizers import AddedToken
from tokenizers.decoders import DecodeStream

from checkpoint.chat_template import render

# Names of tokens that end a turn or a text, whatever a file says of them.
END_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|endoftext|>", "</s>", "<|end|>",
    "<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>",
    "<｜end▁of▁sentence｜>")
# The shape of control tokens (DeepSeek's have wide bars), and that of tags, which a model writes
CONTROL = re.compile(r"<[|｜][^<>|｜]+[|｜]>")
TAG = re.compile(r"</?\w+>")  # for its reader: <think> ... </think>


class TokenizerError(ValueError):
    """One sentence: what is wrong with a tokenizer."""


class Tokenizer:
    """Text to token ids and back. Every method raises TokenizerError if the checkpoint is bad.

    eos_ids: frozenset of the ids that end a turn
    bos_id: the id that `encode` puts first, or None
    has_chat_template: whether `chat` works
    can_think: whether the chat template can switch thinking on and off
    sampling: what the checkpoint recommends of temperature, top_k, top_p, min_p and
        repetition_penalty
    """

    def __init__(self, tokenizer, vocab_size, special, eos, template, generation=None, equal=None):
        """
        tokenizer: a `tokenizers.Tokenizer`
        vocab_size: of the model
        special: {"bos_token": text or None, ...}, values unchecked
        eos: ids that end a turn, or lists of them, unchecked
        template: a chat template or None, unchecked
        generation: the values of generation_config.json, unchecked
        equal: {id: the id of another token with the same text, or None for none}, as GGUF files
            have them: no text becomes such a token, but the model may choose one
        """
        self.sampling, self.equal = recommended(generation or {}), equal or {}
        self.tokenizer, self.vocab_size, self.template = tokenizer, vocab_size, template
        tokenizer.no_truncation()  # a file may ask for both
        tokenizer.no_padding()
        self.has_chat_template = isinstance(template, str)
        self.can_think = self.has_chat_template and "enable_thinking" in template
        self.special = {role: text for role, text in special.items() if isinstance(text, str)}
        eos = [i for ids in eos for i in (ids if isinstance(ids, list) else [ids])]
        wrong = [i for i in eos if not (i is None or type(i) is int)]
        if wrong:
            raise TokenizerError(f"eos_token_id is {str(wrong[0])[:80]!r}; expected ids of tokens")
        added = guard("not a sound tokenizer", tokenizer.get_added_tokens_decoder)
        ends = {*END_OF_TURN, self.special.get("eos_token")}
        eos += [i for i, token in added.items() if token.content in ends]
        eos += [i for i, first in self.equal.items() if first in eos]
        self.eos_ids = frozenset(i for i in eos if i is not None and 0 <= i < vocab_size)
        self.find_control(added)
        nothing, some = (guard("not a sound tokenizer", tokenizer.encode, text).ids
                         for text in ("", "a"))
        begins = nothing and nothing[0] < vocab_size and some[:1] == nothing[:1]
        self.bos_id = nothing[0] if begins else None  # what comes first, not an end after it

    def find_control(self, added):
        """Tell control tokens from text, by their flags and where these fail by what they are.

        `control` are the ids that text of strangers must not give, `skipped` those that `decode`
        leaves out: not tags, which are for the reader.
        """
        names = {*END_OF_TURN, *self.special.values()}
        literals = template_text(self.template) if self.has_chat_template else ""
        self.skipped, self.control = set(), set()
        for i, token in added.items():
            text = token.content
            known = token.special or text in names or CONTROL.fullmatch(text)
            written = text in literals and not text.isspace()
            if known or written and not (TAG.fullmatch(text) or text.isalnum()):
                self.skipped.add(i)
            if (known or written) and text != getattr(self.tokenizer.model, "unk_token", None):
                self.control.add(i)
        unmarked = [AddedToken(t.content, single_word=t.single_word, lstrip=t.lstrip,
                               rstrip=t.rstrip, normalized=t.normalized)
                    for t in map(added.get, sorted(self.control)) if not t.special]
        self.tokenizer.add_special_tokens(unmarked)  # so that `encode` can leave them out

    def encode(self, text, bos=True, special=True):
        """str -> list of ids, `bos_id` first if there is one and `bos` is true.

        special: whether "<|im_end|>" and its like in the text become the control tokens of that
            name. False reads them as plain text, for text of strangers: no token that the chat
            template writes can come of it.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is not text
        self.tokenizer.encode_special_tokens = not special
        ids = guard("the checkpoint's tokenizer cannot encode this text",
                    self.tokenizer.encode, text, add_special_tokens=bos).ids
        if not special:  # a vocabulary may hold a control token as a word, too
            begins = ids[:1] if bos and ids[:1] == [self.bos_id] else []
            ids = begins + [part for id in ids[len(begins):] for part in (
                self.spell(id) if id in self.control else [id])]
        if ids and max(ids) >= self.vocab_size:
            raise TokenizerError(
                f"the tokenizer gives token {max(ids)}, but the model's vocabulary is "
                f"{self.vocab_size}; they do not belong together")
        return ids

    def spell(self, id):
        """The ids of a token's characters, or of their bytes."""
        known = self.tokenizer.token_to_id
        parts = [[known(c)] if known(c) is not None else
                 [known(f"<0x{byte:02X}>") for byte in c.encode()]
                 for c in self.tokenizer.id_to_token(id)]
        return [i for part in parts for i in part if i is not None]

    def decode(self, ids):
        """Ids -> str without control tokens. Bytes that are not UTF-8 become U+FFFD."""
        return guard("the checkpoint's tokenizer cannot decode these tokens", self.tokenizer.decode,
                     self.visible(ids), skip_special_tokens=False)

    def visible(self, ids):
        """The ids whose text `decode` shows."""
        ids = (self.equal.get(id, id) for id in ids)
        return [id for id in ids if id is not None and id not in self.skipped]

    def chat(self, messages, add_generation_prompt=True, thinking=None):
        """[{"role": "user", "content": str}, ...] -> ids, written as the model is used to.

        thinking: whether the model thinks before it answers, if it `can_think`; None leaves that
            to its template
        """
        if not self.has_chat_template:
            raise TokenizerError("this checkpoint has no chat template; give it plain text to "
                                 "continue instead")
        switch = {} if thinking is None else {"enable_thinking": thinking}
        try:
            text = render(
                self.template, messages=messages, tools=None, documents=None,
                add_generation_prompt=add_generation_prompt, **self.special, **switch)
        except ValueError as error:
            raise TokenizerError(str(error)) from None
        return self.encode(text, bos=False)


def recommended(generation):
    """What a generation_config.json recommends -> {"temperature": ..., ...}, as transformers takes
    it: temperature 0 and do_sample false are greedy, top_k 0 and -1 are off. What is out of range,
    or of another type, is no recommendation."""
    limits = {"temperature": (0, 100, int, float), "top_k": (-1, 1 << 31, int),
              "top_p": (0, 1, int, float), "min_p": (0, 1, int, float),
              "repetition_penalty": (1e-6, 100, int, float)}
    found = {}
    for name, (least, most, *types) in limits.items():
        value = generation.get(name)
        if type(value) in types and least <= value <= most:
            found[name] = max(0, value)
    return found | ({"temperature": 0} if generation.get("do_sample") is False else {})


def template_text(template):
    """The text in a chat template, and that in quotes in its code."""
    pieces = []
    for part in re.split("[%}#]}", template[:1 << 17]):
        text, *code = re.split("{[%{#]", part, maxsplit=1)
        pieces += [text, *(quoted[1:-1] for c in code
                           for quoted in re.findall(r"'[^']*'|\"[^\"]*\"", c))]
    return "\n".join(pieces)


class TextStream:
    """Decodes ids one by one. All that `push` returns, then `flush`, is `decode` of all ids, but
    for a character at the end whose last bytes have not come: `flush` leaves it out.

    prompt: ids of a text that the others continue. So their first word keeps its space, which
        SentencePiece's decoder takes from the beginning of a text.

    `DecodeStream` holds a character back until its last byte has come, broken ones forever. And
    it fails at SentencePiece's byte tokens, <0xNN>: whether they are text depends on the whole run
    of them, so a run is held back until another token ends it.
    """

    def __init__(self, tokenizer, prompt=()):
        self.tokenizer = tokenizer
        self.stream = DecodeStream(skip_special_tokens=False)
        self.ids, self.pending = [], []  # all, and those that the stream has not seen
        self.length = self.ahead = 0  # characters given out by the stream; beyond it, by `flush`
        prompt = tokenizer.visible(prompt)
        start = max(0, len(prompt) - 8)
        while start and self.is_byte(prompt[start]):
            start -= 1
        for id in prompt[start:]:
            self.push(id)
        self.flush()

    def is_byte(self, id):
        """Whether a token is one of SentencePiece's bytes."""
        return re.fullmatch("<0x..>", self.tokenizer.tokenizer.id_to_token(id) or "") is not None

    def push(self, id):
        """One more id -> the text (str, often a word, sometimes empty) that it completes."""
        id = next(iter(self.tokenizer.visible([id])), None)
        if id is None or self.tokenizer.tokenizer.id_to_token(id) is None:
            return ""
        self.ids.append(id)
        self.pending.append(id)
        if self.is_byte(id):
            return ""
        text = guard("the checkpoint's tokenizer cannot decode these tokens",
                     self.stream.step, self.tokenizer.tokenizer, self.pending) or ""
        self.pending = []
        self.length += len(text)
        text, self.ahead = text[self.ahead:], max(0, self.ahead - len(text))
        return text

    def flush(self):
        """The rest of the text, after the last id. If more ids follow, `push` continues."""
        decode, name = self.tokenizer.decode, self.tokenizer.tokenizer.token_to_id
        text = decode(self.ids)
        if text.endswith("\ufffd"):
            # Of a character that has only begun, more bytes make a whole one; of broken bytes not.
            a, b, c = (name(f"<0x{byte:X}>") or name(chr(byte + 162))  # as GPT-2 writes bytes
                       for byte in (0x80, 0x90, 0xA0))
            trials = [decode(self.ids + [first, a, a][:n]) for first in (a, b, c) if first and a
                      for n in (1, 2, 3)]
            text = next((trial[:-1] for trial in trials if not trial.endswith("\ufffd")), text)
        given, self.ahead = self.length + self.ahead, max(0, len(text) - self.length)
        return text[given:]


def text_pieces(ids, tokenizer, stop=(), prompt=()):
    """A generator of the text of token ids, in pieces, while they come.

    prompt: see `TextStream`; without it, the ids are a text of their own, such as an answer
    It ends where one of the texts `stop` begins. What may be the beginning of one is held back.
    """
    stream, held = TextStream(tokenizer, prompt), ""
    for piece in itertools.chain(map(stream.push, ids), map(lambda end: stream.flush(), [None])):
        held += piece
        found = [held.index(text) for text in stop if text in held]
        if found:
            yield held[:min(found)]
            return
        begun = max((n for text in stop for n in range(1, len(text)) if held.endswith(text[:n])),
                    default=0)
        if len(held) > begun:
            yield held[:len(held) - begun]
            held = held[len(held) - begun:]
    if held:
        yield held


def guard(complaint, function, *arguments, **options):
    """Call a function of the tokenizers package; its errors become a TokenizerError."""
    try:
        return function(*arguments, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is not even an Exception
        raise TokenizerError(f"{complaint} ({str(error)[:200]!r})") from None
