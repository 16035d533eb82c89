"""Text to token ids and back, by the tokenizer that a checkpoint brings along.

The `tokenizers` package does the work. `Tokenizer` adds what a model needs: which ids end a turn,
and how a conversation is written (chat_template.py). `TextStream` turns ids into text while they
are still coming. The file is a stranger's, and the package is written in Rust: a bad file may end
it in a panic. Whatever goes wrong becomes a TokenizerError of one sentence.
"""

import itertools

from tokenizers.decoders import DecodeStream

from checkpoint.chat_template import render

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|endoftext|>",
               "</s>")


class TokenizerError(ValueError):
    """One sentence: what is wrong with a tokenizer."""


class Tokenizer:
    """Text to token ids and back. Every method raises TokenizerError if the checkpoint is bad.

    eos_ids: frozenset of the ids that end a turn
    bos_id: the id that `encode` puts first, or None
    has_chat_template: whether `chat` works
    can_think: whether the chat template can switch thinking on and off
    sampling: what the checkpoint recommends of temperature, top_k, top_p, repetition_penalty
    """

    def __init__(self, tokenizer, vocab_size, special, eos, template, generation=None):
        """
        tokenizer: a `tokenizers.Tokenizer`
        vocab_size: of the model
        special: {"bos_token": text or None, ...}, values unchecked
        eos: ids that end a turn, or lists of them, unchecked
        template: a chat template or None, unchecked
        generation: the values of generation_config.json, unchecked
        """
        kinds = {"temperature": (100, int, float), "top_k": (vocab_size, int),
                 "top_p": (1, int, float), "repetition_penalty": (100, int, float)}
        self.sampling = {}
        for name, (most, *types) in kinds.items():
            value = (generation or {}).get(name)
            if type(value) in types and 1e-6 <= value <= most:
                self.sampling[name] = value
        self.tokenizer, self.vocab_size, self.template = tokenizer, vocab_size, template
        tokenizer.no_truncation()  # a file may ask for both
        tokenizer.no_padding()
        self.has_chat_template = isinstance(template, str)
        self.can_think = self.has_chat_template and "enable_thinking" in template
        self.special = {role: text for role, text in special.items() if isinstance(text, str)}
        added = tokenizer.get_added_tokens_decoder()
        self.skipped = {i for i, token in added.items() if token.special}  # by `decode`
        ends = {*END_OF_TURN, self.special.get("eos_token")}
        eos = [i for ids in eos for i in (ids if isinstance(ids, list) else [ids])]
        eos += [i for i, token in added.items() if token.content in ends]
        self.eos_ids = frozenset(i for i in eos if type(i) is int and 0 <= i < vocab_size)
        nothing = guard("not a sound tokenizer", tokenizer.encode, "").ids  # some errors need use
        self.bos_id = next((i for i in nothing if i < vocab_size), None)

    def encode(self, text, bos=True, special=True):
        """str -> list of ids, `bos_id` first if there is one and `bos` is true.

        special: whether "<|im_end|>" and its like in the text become the control tokens of that
        name. False reads them as plain text, for text of strangers.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is not text
        self.tokenizer.encode_special_tokens = not special
        ids = guard("the checkpoint's tokenizer cannot encode this text",
                    self.tokenizer.encode, text, add_special_tokens=bos).ids
        if ids and max(ids) >= self.vocab_size:
            raise TokenizerError(
                f"the tokenizer gives token {max(ids)}, but the model's vocabulary is "
                f"{self.vocab_size}; they do not belong together")
        return ids

    def decode(self, ids):
        """Ids -> str without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return guard("the checkpoint's tokenizer cannot decode these tokens",
                     self.tokenizer.decode, list(ids), skip_special_tokens=True)

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


class TextStream:
    """Decodes ids one by one. All that `push` returns, then `flush`, is `decode` of all ids, but
    for a character at the end whose last bytes have not come: `flush` leaves it out.

    `DecodeStream` holds a character back until its last byte has come, broken ones for ever. And
    it fails at SentencePiece's byte tokens, <0xNN>: whether they are text depends on the whole run
    of them, so a run is held back until another token ends it.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.stream = DecodeStream(skip_special_tokens=True)
        self.ids, self.pending = [], []  # all, and those that the stream has not seen
        self.length = self.ahead = 0  # characters given out by the stream; beyond it, by `flush`

    def push(self, id):
        """One more id -> the text (str, often a word, sometimes empty) that it completes."""
        token = self.tokenizer.tokenizer.id_to_token(id)
        if token is None or id in self.tokenizer.skipped:
            return ""
        self.ids.append(id)
        self.pending.append(id)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return ""
        text = guard("the checkpoint's tokenizer cannot decode these tokens",
                     self.stream.step, self.tokenizer.tokenizer, self.pending) or ""
        self.pending = []
        self.length += len(text)
        text, self.ahead = text[self.ahead:], max(0, self.ahead - len(text))
        return text

    def flush(self):
        """The rest of the text, after the last id. If more ids follow, `push` goes on behind it."""
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


def text_pieces(ids, tokenizer, stop=()):
    """A generator of the text of token ids, in pieces, while they come.

    It ends where one of the texts `stop` begins. What may be the beginning of one is held back.
    """
    stream, held = TextStream(tokenizer), ""
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
