"""A conversation: in a pseudo-terminal as a person would use it, through pipes, and its parts."""

import json
import os
import pty
import re
import select
import shutil
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import generate
from calibrate import calibrate
from checkpoint import load
from checkpoint.tokenizer import TokenizerError
from cli.chat import Chat
from conftest import CONFIGS, random_model, start
from session import Session


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *arguments):
        self.keyboard, side = pty.openpty()
        self.process = start(generate.main, "--chat", "--temperature", 0, *arguments,
                             streams=[os.ttyname(side)] * 3, TERM="xterm")
        self.side = side  # open until the program has opened it, too
        self.screen = ""

    def type(self, text):
        os.write(self.keyboard, text.encode())

    def type_ctrl_c(self):
        """Ctrl-C, once the program sleeps. Of one that comes between the prompt and the wait for
        keys, Python's readline learns only with the next key."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        self.type("\x03")

    def wait_for(self, pattern, timeout=120):
        """What is printed up to a pattern that begins after what was read before."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.screen, re.DOTALL)):
            ready, _, _ = select.select([self.keyboard], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.screen!r}"
            try:
                self.screen += os.read(self.keyboard, 4096).decode("utf-8", "replace")
            except OSError:  # the program has ended
                raise AssertionError(f"{pattern!r} did not come: {self.screen!r}") from None
        text, self.screen = self.screen[:found.end()], self.screen[found.end():]
        if self.side is not None:
            os.close(self.side)
            self.side = None
        return text

    def say(self, line, answer):
        """Type a line, and wait for its answer and the prompt that follows."""
        self.type(line + "\n")
        self.wait_for(answer)
        self.wait_for(PROMPT)

    def exit_code(self):
        """Read what is left until the program ends; returns its exit code and that text."""
        text = self.screen
        try:
            while piece := os.read(self.keyboard, 4096):
                text += piece.decode("utf-8", "replace")
        except OSError:
            pass
        os.close(self.keyboard)
        self.process.join(120)
        return self.process.exitcode, text


PROMPT = r"\n(\x1b\[\?2004h)?> "


def test_a_conversation_at_a_terminal(tiny):
    """Commands, pasted lines, the history, and Ctrl-C at the prompt."""
    chat = Terminal("--model", tiny, "--max-new-tokens", 5)
    banner = chat.wait_for(PROMPT)
    assert "sparsity 0, context 64 tokens" in banner and banner.count("\n") == 2
    for line, answer in (
            ("/help", "/sparsity S"), ("/stats", "there is no answer yet"),
            ("/sparsity", "'' is not a number from 0 to 0.95"),
            ("/sparsity 2", "'2' is not a number from 0 to 0.95"),
            ("/nonsense 1", "there is no command /nonsense"),
            ("/system Be brief.", "from now on"), ("/system", "no system prompt"),
            ("/clear", "forgotten"), ("hi", r"\(cut at 5 tokens"),
            ("/stats", r"last answer: prompt 4 tokens.*new 5 tokens.*all at 0: prompt 4 tokens"),
            ("/clear", "forgotten"),
            ("\x1b[200~one\ntwo\nthree\nfour\nfive\x1b[201~", "cut at 5 tokens"),
            # with the template's brackets, of which the cache holds the first
            ("/stats", "last answer: prompt 24 tokens"), ("/clear", "forgotten"),
            ("\x1b[A\x1b[A\x1b[A", "cut at 5 tokens"),  # three lines up is the paste
            ("/stats", "last answer: prompt 1 tokens"), ("/clear", "forgotten")):
        chat.say(line, answer)
    chat.type("half a line")
    chat.wait_for("half a line")
    chat.type_ctrl_c()
    chat.wait_for("Ctrl-C again or Ctrl-D leaves")
    chat.wait_for(PROMPT)
    chat.say("hi", "cut at 5 tokens")  # the line was cleared
    chat.say("/stats", "last answer: prompt 3 tokens")
    chat.type_ctrl_c()
    chat.wait_for("again")
    chat.wait_for(PROMPT)
    chat.type_ctrl_c()
    code, text = chat.exit_code()
    assert code == 0 and "new 20 tokens" in text and "Traceback" not in text


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": None, "max_position_embeddings": 200_000}
    (folder / "config.json").write_text(json.dumps(config))
    chat = Terminal("--model", folder, "--max-new-tokens", 100_000)
    chat.wait_for(PROMPT)
    chat.type("Write a long story.\n")
    chat.wait_for(r"2004l.{20}")  # the terminal's answer to a line, then the model's
    chat.type("\x03")
    chat.wait_for(PROMPT)
    chat.type("\x04")
    code, text = chat.exit_code()
    assert code == 0 and "MB read per token" in text and "Traceback" not in text


def test_piped_lines(run, tiny, tmp_path):
    """Every line is answered, also after an error; the numbers are those of each sparsity."""
    calibration = calibrate(load(tiny)[0], torch.arange(256).flip(0), 64, "uniform")
    calibration.save(tmp_path / "c")
    words = ["--model", tiny, "--chat", "--max-new-tokens", 6, "--temperature", 0, "--calibration"]
    done = run(generate.main, *words, tmp_path / "c",
               stdin="Hi\n\n/sparsity 0.5\nHo\n/sparsity 0\nHe\n/exit\nHu\n")
    assert done.code == 0, done.err
    dense, sparse = done.err.splitlines()[-2:]
    assert "new 12 tokens" in dense and "unread" not in dense and "asked" not in dense
    assert "new 6 tokens" in sparse and "of the blocks' 0.0 MB unread (50% asked)" in sparse
    share = float(re.search(r"([\d.]+)% of the blocks", sparse)[1])
    assert 20 < share < 80
    done = run(generate.main, *words, "no-such-file", stdin="Hi\n/sparsity 0.5\nHo\n")
    assert done.code == 0 and "new 12 tokens" in done.err
    assert "cannot read calibration no-such-file (No such file" in done.err
    assert "; the sparsity stays 0\n" in done.err


# ---- the conversation, without a model that means anything -------------------------------------


class Letters:
    """A tokenizer whose ids are code points below 100, with a template that may refuse."""

    def chat(self, messages, thinking=None):
        if any("refuse" in message["content"] for message in messages):
            raise TokenizerError("the template refuses")
        text = "".join(f"<{message['role'][0]}:{message['content']}>" for message in messages)
        return [ord(letter) % 101 for letter in text]


def conversation(context=64, thresholds=lambda sparsity: None, respond=None, **options):
    """A Chat over a small random model, and the list of the prompts that it gives."""
    session, prompts = Session(random_model(next(iter(CONFIGS.values()))), context=context), []

    def answer(ids, sparsity):
        prompts.append(ids)
        return f"{len(list(session.generate(ids, 4)))} tokens"

    options = {"sparsity": 0, "system": None, "answer_room": 8} | options
    chat = Chat(session, Letters(), respond or answer, thresholds,
                lambda stats, sparsity: f"{stats.new_tokens} new at {sparsity:g}", **options)
    return chat, prompts


def test_answers_are_part_of_the_conversation():
    chat, prompts = conversation(system="S")
    chat.ask("one")
    chat.ask("two")
    conversations = [chat.messages[:1], chat.messages[:3]]
    assert chat.messages[1] == {"role": "assistant", "content": "4 tokens"}
    for text in ("T", ""):  # the system prompt changes
        chat.command("system", text)
        chat.command("clear", "")
        chat.ask("one")
        conversations.append(chat.messages[:1])
    assert prompts == [
        Letters().chat([{"role": "system", "content": system}, *messages] if system else messages)
        for system, messages in zip(("S", "S", "T", ""), conversations)]


def test_thresholds_that_are_set_halfway_are_taken_back(monkeypatch):
    chat, _ = conversation(thresholds=lambda sparsity: torch.full((2, 7), sparsity))
    real, before = chat.session.decoder.set_thresholds, chat.session.thresholds
    tables = []

    def halfway(table):
        tables.append(table)
        if len(tables) == 1:
            raise KeyboardInterrupt
        real(table)
    monkeypatch.setattr(chat.session.decoder, "set_thresholds", halfway)
    chat.command("sparsity", "0.5")
    assert chat.sparsity == 0 and torch.equal(tables[-1], before)


@pytest.mark.parametrize("error, words", [
    (ValueError("a logit is NaN"), "a logit is NaN"), (KeyboardInterrupt(), "stopped"),
    (FileNotFoundError(2, "gone", "text.txt"), "gone: 'text.txt'"),
    (MemoryError(), "out of memory")])
def test_no_error_ends_a_conversation(capsys, error, words):
    """Of the template, an answer or a command; what it would have changed stays."""
    chat, prompts = conversation(thresholds=mock.Mock(side_effect=error))
    answer, before = chat.respond, chat.session.thresholds
    chat.ask("one")
    chat.ask("refuse")
    for chat.respond in mock.Mock(side_effect=error), answer:
        chat.ask("two")
    chat.command("sparsity", "0.5")
    assert len(prompts) == 2 and len(chat.messages) == 4 and chat.sparsity == 0
    assert torch.equal(chat.session.thresholds, before)
    refused, *lines = capsys.readouterr().err.splitlines()
    assert refused == "the template refuses; this message is left out"
    for line, consequence in zip(lines, ("this message is left out", "the sparsity stays 0"),
                                 strict=True):
        assert words in line and line.endswith(consequence)


@pytest.mark.parametrize("error, n_ranks", [
    (RuntimeError("a bug"), 1), (BrokenPipeError(), 1), (MemoryError(), 2),
    (ValueError("NaN on one rank"), 2)])
def test_bugs_and_readers_that_leave_end_it(error, n_ranks, monkeypatch):
    """And errors of one rank: the others would wait for it."""
    monkeypatch.setattr("cli.chat.world_size", lambda: n_ranks)
    fails = mock.Mock(side_effect=error)
    chat, _ = conversation(thresholds=fails, respond=fails)
    with pytest.raises(type(error)):
        chat.ask("one")
    if n_ranks == 1:
        with pytest.raises(type(error)):
            chat.command("sparsity", "0.5")


def test_an_answer_stopped_before_its_first_word_is_no_turn(capsys):
    """A longer one is; so is one that the model ends at once."""
    for text, ended, n_messages in (
            ("", "interrupted", 0), ("so", "interrupted", 2), ("", "stop", 2)):
        chat, _ = conversation()
        chat.respond = lambda ids, sparsity: text
        chat.session.ended = ended
        chat.ask("one")
        assert len(chat.messages) == n_messages
        assert ("this message is left out" in capsys.readouterr().err) == (n_messages == 0)


@pytest.mark.parametrize("line, message", [
    ("/ foo", True), ("/", True), ("/usr/bin is what?", True), ("/system a\nb", False),
    ("/stats", False), ("/foo", False)])
def test_what_is_a_command(line, message, monkeypatch):
    chat, prompts = conversation()
    monkeypatch.setattr("cli.chat.read_line", lambda: None)
    chat.run(line)
    assert len(prompts) == message


def test_a_full_context_drops_the_oldest_turns(capsys):
    chat, prompts = conversation(context=64)
    for question in ("first question", "second question", "third question"):
        chat.ask(question)
    error = capsys.readouterr().err
    assert "the context of 64 tokens is full; the oldest turn is forgotten" in error
    assert len(prompts) == 3 and all(len(ids) <= 56 for ids in prompts)
    assert [m["content"] for m in chat.messages[2:]] == ["third question", "4 tokens"]
    chat.ask("x" * 100)
    assert "the message has 104 tokens, but the context has room for 56" in capsys.readouterr().err
    assert chat.messages[-1]["content"] == "4 tokens"  # no turn is forgotten for it
    chat.command("clear", "")
    chat.ask("short")
    assert len(prompts) == 4 and len(chat.messages) == 2
    for room, longest in (8, 56), (16, 48), (1000, 48):  # an answer may take a quarter
        assert conversation(context=64, answer_room=room)[0].longest == longest


def test_sparsity_is_that_of_the_steps_from_then_on(capsys):
    chat, _ = conversation(thresholds=lambda sparsity: torch.full((2, 7), 100 * sparsity - 1))
    shares = []
    for sparsity in ("0", "0.5", "2"):
        chat.command("sparsity", sparsity)
        chat.ask("one")
        shares.append(chat.session.sparsity(chat.last[0]))
    assert shares == [0, 1, 1] and chat.sparsity == 0.5  # "2" changes nothing
    chat.command("stats", "")
    lines = capsys.readouterr().err.splitlines()
    assert "it is 0.5 now" in lines[-4] and lines[-3:] == [
        "last answer: 4 new at 0.5", "all at 0: 4 new at 0", "all at 0.5: 8 new at 0.5"]
