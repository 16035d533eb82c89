"""Progress: when it speaks, and what it says."""

import io
import sys

import pytest
import torch

import session
from cli import progress
from cli.progress import Progress
from conftest import CONFIGS, random_model
from session import Session


class Clock:
    """A clock that the test moves on."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_lines_without_a_terminal(clock, capsys):
    """The expected time first, then a line every 30 seconds, and nothing at the end."""
    with Progress("waiting", 100) as bar:
        for _ in range(100):
            clock.now += 1
            bar.update(1)
    assert capsys.readouterr().err.splitlines() == [
        "waiting: takes about 99 s", "waiting: 31%, about 69 s left",
        "waiting: 61%, about 39 s left", "waiting: 91%, about 9 s left"]


def test_a_terminal_has_a_bar_instead_of_lines(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("waiting", 100) as bar:
        for _ in range(100):
            clock.now += 1
            bar.update(1)
    assert "waiting: takes about 99 s\n" in sys.stderr.getvalue()
    assert " left\n" not in sys.stderr.getvalue()


def test_short_work_is_silent(clock, capsys):
    with Progress("waiting", 20) as bar:
        for _ in range(20):
            clock.now += 1
            bar.update(1)
    assert capsys.readouterr().err == ""


def test_what_is_done_is_not_announced(clock, capsys):
    with Progress("waiting", 61) as bar:
        for _ in range(61):
            clock.now += 1
            bar.update(1)
    assert capsys.readouterr().err.splitlines()[1:] == ["waiting: 51%, about 30 s left"]


def test_ctrl_c(clock, capsys):
    with pytest.raises(KeyboardInterrupt), Progress("waiting", 4) as bar:
        bar.update(1)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "waiting: stopped at 25%, and nothing of it is kept\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("seconds, shown", [(0.0, False), (0.2, True)])
def test_a_long_prompt_shows_a_bar(monkeypatch, seconds, shown):
    """On a terminal, reading a prompt shows a bar once it takes longer than the delay, 2 s."""
    delays = []

    def bar(*arguments, real=progress.tqdm, **options):
        delays.append(options["delay"])
        return real(*arguments, **options | {"delay": 0.5, "mininterval": 0})

    monkeypatch.setattr(progress, "tqdm", type("Bar", (), {
        "__new__": lambda cls, *a, **k: bar(*a, **k), "write": progress.tqdm.write}))
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(session, "PREFILL_CHUNK", {"cpu": 8, "cuda": 8})
    model = random_model(CONFIGS["llama"])

    def slow(*arguments, real=model.forward, **options):
        progress.time.sleep(seconds)
        return real(*arguments, **options)

    monkeypatch.setattr(model, "forward", slow)
    list(Session(model).generate(torch.randint(0, 101, (64,)).tolist(), 1))
    assert ("reading the prompt: " in sys.stderr.getvalue()) == shown and delays == [2]
