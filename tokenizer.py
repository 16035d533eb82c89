"""Text to token ids and back, by a tokenizer that is part of a stranger's checkpoint.

The `tokenizers` package does the work; here is what a model needs besides. `Tokenizer` knows which ids end a turn and
how a conversation is written (`chat_template.py`), `TextStream` turns ids into text while they are still coming. And a
fence: a tokenizer.json is a list of steps, and a hostile one can hold steps that make a text longer and longer, or
that crash the package, which is Rust. Whatever is wrong is a ValueError of one sentence.
"""

import contextlib
import math
import os
import re
import sys
import threading

import tokenizers

import chat_template

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|endoftext|>", "</s>")
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")  # the keys of a tokenizer.json that hold them
GROWTH = 256  # times that they may lengthen a text
PANIC = re.compile(rb"\n?thread '[^\n]* panicked at ")  # how the lines that Rust prints begin
ONE_AT_A_TIME = threading.Lock()


class TokenizerError(ValueError):
    """One sentence: what is wrong with a tokenizer."""


class Tokenizer:
    """Text to token ids and back. Every method raises TokenizerError if the checkpoint does not allow it.

    `eos_ids`: frozenset of the ids that end a turn; `bos_id`: the id that `encode` puts first, or None;
    `has_chat_template`: whether `chat` works.
    """

    def __init__(self, tokenizer, vocab_size, special, eos, template):
        """From a `tokenizers.Tokenizer`, the model's vocabulary size, {"bos_token": text or None, ...},
        a list of end-of-turn ids or lists of them, and a chat template or None, the last three unchecked."""
        self.tokenizer, self.vocab_size, self.template = tokenizer, vocab_size, template
        tokenizer.no_truncation()  # the file may ask for both
        tokenizer.no_padding()
        self.has_chat_template = isinstance(template, str)
        self.special = {role: token for role, token in special.items() if isinstance(token, str)}
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        self.skipped = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        eos = [i for ids in eos for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
        eos += [added[token] for token in (*END_OF_TURN, self.special.get("eos_token")) if token in added]
        self.eos_ids = frozenset(i for i in eos if 0 <= i < vocab_size)
        with without_panic_lines():  # some mistakes show only in use
            nothing = guard("not a sound tokenizer", tokenizer.encode, "")
        self.bos_id = next((i for i in nothing.ids if i < vocab_size), None)

    def encode(self, text, bos=True):
        """str -> list of ids, with `bos_id` first if there is one and `bos` is true. Special tokens are recognised."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is not text
        ids = guard("the checkpoint's tokenizer cannot encode this text",
                    self.tokenizer.encode, text, add_special_tokens=bos).ids
        if ids and max(ids) >= self.vocab_size:
            raise TokenizerError(f"the tokenizer gives token {max(ids)}, but the model's vocabulary is "
                                 f"{self.vocab_size}; they do not belong together")
        return ids

    def decode(self, ids):
        """Ids -> str, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return guard("the checkpoint's tokenizer cannot decode these tokens",
                     self.tokenizer.decode, list(ids), skip_special_tokens=True)

    def chat(self, messages, add_generation_prompt=True):
        """[{"role": "user", "content": str}, ...] -> ids of the conversation in the model's own format.

        The checkpoint may have no chat template, or one that fails or runs away.
        """
        if not self.has_chat_template:
            raise TokenizerError("this checkpoint has no chat template; give it plain text to continue instead")
        try:
            text = chat_template.render(self.template, messages=messages, tools=None, documents=None,
                                        add_generation_prompt=add_generation_prompt, **self.special)
        except ValueError as error:
            raise TokenizerError(str(error)) from None
        return self.encode(text, bos=False)


class TextStream:
    """Decodes ids one by one: everything `push` returns, then `flush`, is exactly `tokenizer.decode` of all ids.

    A token's text depends on its neighbours: a character's bytes may be spread over tokens, and the first space of a
    text may be dropped. So decode the last few tokens with and without the new one, and the difference is new text.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.context = []  # the last tokens whose text is out; 4 hold the start of any unfinished character
        self.pending = []  # tokens whose text is not

    def push(self, id):
        """One more id -> the text (str, often one word, sometimes empty) that it completes."""
        token = self.tokenizer.tokenizer.id_to_token(id)
        if token is None or id in self.tokenizer.skipped:
            return ""
        self.pending.append(id)
        # SentencePiece's byte tokens are text or not as a run, which goes on until another token ends it.
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return ""
        return self.advance(complete)

    def flush(self):
        """The rest of the text, after the last id."""
        return self.advance(str)

    def advance(self, end):
        """The text that the pending tokens add, where `end` cuts off what is not final."""
        before = complete(self.tokenizer.decode(self.context))
        tokens = self.context + self.pending
        self.context, self.pending = tokens[-4:], []
        return end(self.tokenizer.decode(tokens))[len(before):]


def complete(text):
    """Text without a U+FFFD at its end, which may be a character whose last bytes are still to come."""
    return text.removesuffix("\ufffd")


# ---------------------------------------------------------------- the fence

def read_tokenizer(file, content):
    """A tokenizer.json, and the dictionary that it holds -> `tokenizers.Tokenizer`. Raises TokenizerError."""
    if growth([content.get(step) for step in STEPS]) > GROWTH:
        raise TokenizerError(f"not a sound tokenizer (its steps can make a text {GROWTH} times as long, or more)")
    with without_panic_lines():
        return guard("not a sound tokenizer", tokenizers.Tokenizer.from_file, str(file))


def growth(steps):
    """How many times longer the steps of a tokenizer.json can make a text, roughly; in a hostile one they multiply."""
    if isinstance(steps, list):
        return math.prod(map(growth, steps))
    if not isinstance(steps, dict):
        return 1
    added = {"Replace": steps.get("content"), "Prepend": steps.get("prepend"), "ByteLevel": "xx"}
    text = added.get(str(steps.get("type")))
    times = max(1, len(text)) if isinstance(text, str) else 1
    return times * growth(list(steps.values()))


def guard(complaint, function, *arguments, **options):
    """Call a function of the tokenizers package; whatever it raises becomes a TokenizerError that begins so."""
    try:
        return function(*arguments, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it raises plain Exception, and where it panics not even that
        raise TokenizerError(f"{complaint} ({str(error)[:300]!r})") from None  # quoted, for it may quote the file


@contextlib.contextmanager
def without_panic_lines():
    """Where Rust panics, it prints some lines before Python sees an exception: those lines vanish.

    Rust writes to file descriptor 2, so that leads into memory meanwhile. Anything else that arrives there, from
    other threads perhaps, is printed in the end.
    """
    if sys.stderr is None or not hasattr(os, "memfd_create"):  # the descriptor was closed, and may be any file now
        yield
        return
    with ONE_AT_A_TIME, open(os.memfd_create("stderr"), "r+b", buffering=0) as memory:
        stderr = os.dup(2)
        os.dup2(memory.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            memory.seek(0)
            os.write(2, PANIC.split(memory.read())[0])
