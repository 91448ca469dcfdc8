"""Files of rows, a line of JSON each: ``stats.jsonl``, and what a monitor has seen."""

import json
import math
from pathlib import Path

# every run has this file; the other loggers are ``train.loggers``
STATS = "stats.jsonl"


def read_rows(path: Path) -> list[dict]:
    """The rows of a file up to the first that is none: a crash may cut the last one short."""
    rows = []
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                break
        except (ValueError, LookupError, TypeError):
            break
        rows.append({name: math.nan if item is None else item for name, item in row.items()})
    return rows


def line_of(row: dict) -> str:
    """A row as it stands in its file, with the end of the line."""
    return json.dumps(_finite(row)) + "\n"


def _finite(value):
    """JSON has no NaN: null stands for what is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
