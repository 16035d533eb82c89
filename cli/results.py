"""Files of results: JSON lists of rows, one for each measurement, which --json adds to."""

import json
from pathlib import Path

from checkpoint.files import require_writable, write_whole


def read_rows(path, key):
    """The rows of a file, each of which holds `key`. Raises OSError, and ValueError for a file that
    holds anything else."""
    try:
        rows = json.loads(Path(path).read_text())
    except ValueError:
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and key in row for row in rows):
        raise ValueError(f"{path} holds no results with {key}; name another file")
    return rows


def require_rows(path, key):
    """Raise ValueError unless `path` can be written and holds such rows, if it exists: before the
    measurement, whose results would be lost."""
    require_writable(path, "--json")
    return read_rows(path, key) if Path(path).exists() else []


def write_rows(path, rows):
    """Write the file, whole or not at all."""
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")


def replaced(rows, new, identity):
    """Rows with the new ones behind them, without those that measured the same: they agree with a
    new one in all keys of `identity`."""
    def measured(row):
        return [row.get(key) for key in identity]

    return [row for row in rows if measured(row) not in map(measured, new)] + new
