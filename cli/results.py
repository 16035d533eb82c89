"""Files of results: JSON lists of rows, one for each measurement, which --json adds to."""

import json
from pathlib import Path

from checkpoint.files import require_writable, write_whole


def require_rows(path, key):
    """The rows of a file that results will be added to, none if there is no file yet.

    Raises ValueError for a file that cannot be written, and for one of another kind, whose rows
    do not hold `key`: before any measurement.
    """
    require_writable(path, "--json")
    if not Path(path).exists():
        return []
    try:
        rows = json.loads(Path(path).read_text())
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and key in row for row in rows):
        raise ValueError(f"{path} holds no results with {key}; name another file")
    return rows


def write_rows(path, rows):
    """Write the file, whole or not at all."""
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")


def replaced(rows, new, identity):
    """Rows, then the new ones. A row that agrees with a new one in all keys of `identity` is the
    same measurement, and is left out."""
    def measured(row):
        return [row.get(key) for key in identity]

    return [row for row in rows if measured(row) not in map(measured, new)] + new
