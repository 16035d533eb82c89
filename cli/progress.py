"""The progress of long work: a bar on a terminal, elsewhere a line every 30 seconds."""

import sys

from tqdm import tqdm

EVERY = 30  # seconds between two lines


def progress(label, total, delay=0, of=None):
    """A tqdm bar on standard error; iterate over it, or, `with` it, call update(how much is done).

    label: what is being done
    total: how much there is to do, in any unit
    delay: seconds before a terminal's bar shows
    of:    the iterable of `total` things whose progress it is, if there is one
    """
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(of, total=total, desc=label, delay=delay, leave=False,
                    bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
    return tqdm(of, total=total, desc=label, delay=EVERY, mininterval=EVERY, maxinterval=EVERY,
                file=Lines, leave=False, disable=sys.stderr is None,
                bar_format="{desc}: {percentage:.0f}%, {remaining} left")


class Lines:
    """A file for tqdm in which every state of a bar becomes a line of standard error."""

    @staticmethod
    def write(text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
