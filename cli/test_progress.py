"""Progress: when it speaks, and what it says."""

import io
import re
import sys
import time

import pytest

from cli import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("every, lines", [(0.0, 4), (30, 0)])
def test_lines_without_a_terminal(every, lines, monkeypatch, capsys):
    """Each with the time left; short work is silent."""
    monkeypatch.setattr(progress, "EVERY", every + 1e-9)
    with progress.progress("waiting", 2.0) as bar:
        for _ in range(4):
            time.sleep(0.01)
            bar.update(0.5)
    assert bar.mininterval == bar.delay == progress.EVERY
    told = capsys.readouterr().err.splitlines()
    assert len(told) == lines
    assert all(re.fullmatch(r"waiting: (25|50|75|100)%, 00:00 left", line) for line in told), told


@pytest.mark.parametrize("delay, shown", [(0, True), (2, False)])
def test_a_terminal_has_a_bar(delay, shown, monkeypatch):
    """Once it takes longer than the delay; nothing of it remains."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.progress("waiting", 3, delay, of="abc")) == ["a", "b", "c"]
    assert ("waiting:   0%|" in sys.stderr.getvalue()) == shown
    assert not sys.stderr.getvalue().rpartition("\r")[2]


def test_a_closed_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress.progress("waiting", 1, of="a")) == ["a"]
