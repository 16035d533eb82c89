"""Shows the progress of long work: a bar on a terminal, elsewhere a line every 30 seconds."""

import sys
import time

from tqdm import tqdm

EVERY = 30  # seconds between two lines


class Progress:
    """Progress of one piece of work, on standard error; a context manager.

    Once the first part is done, it says how long the whole will take, if that is long. After
    Ctrl-C it says how far the work was, and if nothing of it is `kept`.

    label: what is being done
    total: how much there is to do, in any unit
    delay: seconds in which the bar does not show, since most work is done by then
    """

    def __init__(self, label, total, delay=0, kept=False):
        self.label, self.done, self.total, self.kept = label, 0, total, kept
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=label, delay=delay, leave=False, disable=not terminal,
                        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
        self.start = self.told = time.monotonic()

    def __enter__(self):
        return self

    def update(self, amount):
        """Count this much more as done."""
        first = self.done == 0
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        left = (now - self.start) / self.done * (self.total - self.done)
        if first and left >= EVERY:
            self.told = now
            self.say(f"takes about {left:.0f} s")
        elif self.bar.disable and left >= 1 and now - self.told >= EVERY:
            self.told = now
            self.say(f"{self.done / self.total:.0%}, about {left:.0f} s left")

    def say(self, text):
        """Print a line above the bar."""
        if sys.stderr is not None:
            tqdm.write(f"{self.label}: {text}", file=sys.stderr)
            sys.stderr.flush()

    def __exit__(self, kind, *_):
        """Remove the bar."""
        self.bar.close()
        if kind is KeyboardInterrupt:
            lost = "" if self.kept else ", and nothing of it is kept"
            self.say(f"stopped at {self.done / self.total:.0%}{lost}")
