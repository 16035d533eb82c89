"""A conversation at the terminal: lines in, answers out, and a few commands.

The whole conversation is given to the session every time. The session computes only what its KV
cache does not hold yet. When the context gets too short, the oldest turns are dropped. A line that
starts with a slash and a word is a command, which the program answers and the model never sees.
"""

import argparse
import contextlib
import re
import sys

from checkpoint.files import read_input
from checkpoint.tokenizer import TokenizerError
from cli.command_line import SHARE, explain
from cli.report import say
from tensor_parallel import from_first, rank, world_size

HELP = """\
/clear        forget the conversation
/system TEXT  say how the model should behave; without TEXT, remove it
/sparsity S   skip the share S of the blocks' weights, 0 to 0.95
/stats        numbers of the last answer, and of all answers per sparsity
/exit         leave, like Ctrl-D
Ctrl-C stops an answer; before its first word, it also takes the message back. At the prompt it
clears the line, and twice in a row it leaves.
Several pasted lines are one message."""


class Chat:
    """A conversation.

    session:      the `Session` that answers
    respond:      a function of a list of ids and a sparsity that prints the answer, and returns it
    thresholds:   a function of a sparsity that returns its thresholds for `Session`
    describe:     a function of `Stats` and a sparsity that returns a line of numbers
    sparsity:     that of the session
    answer_room:  tokens to keep free for an answer
    thinking:     see `Tokenizer.chat`
    """

    def __init__(self, session, tokenizer, respond, thresholds, describe, *, sparsity, system,
                 answer_room, thinking=None):
        self.session, self.tokenizer, self.respond = session, tokenizer, respond
        self.thresholds, self.describe = thresholds, describe
        self.sparsity, self.system, self.thinking = sparsity, system, thinking
        context = session.cache.context
        self.longest = context - min(answer_room, context // 4)  # prompt, in tokens
        self.messages = []
        self.used = {}  # sparsity -> Stats of all answers with it
        self.last = None  # Stats of the last answer, and its sparsity

    # ---- answers -------------------------------------------------------------------------------

    def ask(self, question):
        """Answer a question, as part of the conversation."""
        self.messages.append({"role": "user", "content": question})
        before, answered = self.session.measured(), False
        with excused("this message is left out", TokenizerError):
            answer = self.respond(self.prompt(), self.sparsity)
            if not answer and self.session.ended == "interrupted":
                raise KeyboardInterrupt
            answered = True
        if not answered:
            self.messages.pop()
            return
        self.messages.append({"role": "assistant", "content": answer})
        stats = self.session.measured() - before
        self.last = stats, self.sparsity
        self.used[self.sparsity] = stats + self.used.get(self.sparsity, type(stats)())

    def prompt(self):
        """The ids of the conversation, the oldest turns dropped if there is no room for them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages, dropped = list(self.messages), 0
        while len(ids := self.tokenizer.chat(system + messages,
                                             thinking=self.thinking)) > self.longest:
            if len(messages) == 1:
                raise TokenizerError(
                    f"the message has {len(ids)} tokens, but the context has room for "
                    f"{self.longest} and an answer")
            del messages[:2]
            dropped += 1
        self.messages = messages
        if dropped:
            say(f"the context of {self.session.cache.context} tokens is full; the oldest "
                f"{'turn is' if dropped == 1 else f'{dropped} turns are'} forgotten")
        return ids

    # ---- commands ------------------------------------------------------------------------------

    def command(self, name, text):
        """Do what a command line says; returns whether the conversation goes on."""
        if name == "help":
            say(HELP)
        elif name == "clear":
            self.messages = []
            say("the conversation is forgotten")
        elif name == "system":
            self.system = text
            say("from now on with this system prompt" if text else "no system prompt any more")
        elif name == "sparsity":
            self.set_sparsity(text)
        elif name == "stats":
            self.say_stats()
        elif name != "exit":
            say(f"there is no command /{name}; /help lists them")
        return name != "exit"

    def set_sparsity(self, text):
        """The command /sparsity: calibrates the model if need be."""
        try:
            sparsity = SHARE(text)
        except argparse.ArgumentTypeError as error:
            say(f"{error}; write, for example, /sparsity 0.4 (it is {self.sparsity:g} now)")
            return
        before = self.session.thresholds
        with excused(f"the sparsity stays {self.sparsity:g}", ValueError):
            try:
                self.session.set_thresholds(self.thresholds(sparsity))
            except BaseException:  # Ctrl-C may come while a GPU's step is captured for them
                self.session.set_thresholds(before)
                raise
            self.sparsity = sparsity
            say(f"sparsity {sparsity:g} from now on")

    def say_stats(self):
        """The command /stats."""
        if self.last is None:
            say("there is no answer yet")
            return
        say("last answer: " + self.describe(*self.last))
        for sparsity, stats in self.used.items():
            say(f"all at {sparsity:g}: " + self.describe(stats, sparsity))

    # ---- the loop ------------------------------------------------------------------------------

    def run(self, question=None):
        """Answer `question`, if not None, then line after line of standard input to its end."""
        while True:
            if question is None:
                question = from_first(read_line() if rank() == 0 else None)
                if question is None:
                    return
            if found := re.fullmatch(r"/(\w+)(?:\s+(.*))?", question.strip(), re.DOTALL):
                if not self.command(found[1], (found[2] or "").strip()):
                    return
            elif question.strip():
                self.ask(question)
            question = None


@contextlib.contextmanager
def excused(consequence, shared):
    """Report an error of one answer or command in a sentence, and go on with the conversation.

    consequence: what it means, the end of that sentence
    shared:      under torchrun, the exceptions that all ranks raise together; from others they
                 would not find together again
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped; {consequence}")
    except Exception as error:
        message = explain(error)
        if message is None or isinstance(error, BrokenPipeError) or not (
                world_size() == 1 or isinstance(error, shared)):
            raise
        say(f"{message}; {consequence}")


def read_line():
    """The next line, or pasted lines, of standard input; None if there is no more to come."""
    terminal = sys.stdin.isatty()
    try:
        try:
            return read_input(lambda: input("> " if terminal else ""))
        except KeyboardInterrupt:  # clears the line
            if not terminal:
                return None
            print()
            say("Ctrl-C again or Ctrl-D leaves")
            return read_input(lambda: input("> "))
    except (EOFError, KeyboardInterrupt):
        if terminal:
            print()
        return None


def edit_lines():
    """Give `input` a history, line editing, and pastes of several lines as one text."""
    try:
        import readline
    except ImportError:  # some builds of Python lack it
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
