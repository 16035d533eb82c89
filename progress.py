"""Shows that long work goes on: a bar on a terminal, without one a line every 30 seconds."""

import sys
import time

from tqdm import tqdm

EVERY = 30  # seconds between two lines


class Progress:
    """Progress of one piece of work, on standard error.

    label: what is being done
    total: how much there is to do, in any unit
    delay: seconds in which the bar does not show, since most work is done by then
    """

    def __init__(self, label, total, delay=0):
        self.label, self.done, self.total = label, 0, total
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=label, delay=delay, leave=False, disable=not terminal,
                        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
        self.start = self.told = time.monotonic()

    def update(self, amount):
        """So much more is done."""
        self.done += amount
        self.bar.update(amount)
        now = time.monotonic()
        if self.bar.disable and sys.stderr is not None and now - self.told >= EVERY:
            self.told = now
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f"{self.label}: {self.done / self.total:.0%}, about {left:.0f} s left",
                  file=sys.stderr, flush=True)

    def close(self):
        """Take the bar away."""
        self.bar.close()
