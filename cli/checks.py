"""Checks of what the Python API is given: numbers within limits, and lists of token ids."""

import math
import operator
from numbers import Integral, Real


def require(name, value, low, high, kind=Real):
    """Raise ValueError unless an option of this name is a number of this kind from low to high."""
    if not isinstance(value, kind) or not low <= value <= high:  # "not", so that NaN is refused
        end = f"to {high}" if high < math.inf else "on"
        raise ValueError(f"{name} is {value!r}; expected a {'whole ' * (kind is Integral)}number "
                         f"from {low} {end}")


def token_ids(ids, vocab_size):
    """A list, tuple or tensor [T] of token ids as a list. Raises ValueError for anything else."""
    try:
        if isinstance(ids, (bytes, set, dict)):  # they hold whole numbers, too
            raise TypeError
        ids = [operator.index(id) for id in ids]
    except TypeError:
        raise ValueError(f"the prompt is a {type(ids).__name__} and not a list of whole numbers; "
                         "give token ids, such as those of a tokenizer") from None
    for id in ids:
        if not 0 <= id < vocab_size:
            raise ValueError(f"the prompt holds token {id}; the model's tokens are 0 to "
                             f"{vocab_size - 1}")
    return ids
