"""JSON lines: files with one JSON object a line. A process that is killed leaves whole lines and at most one torn one.

Nothing here needs a package: the wrappers' `test/result.py` reads such files too.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def finite(value: Any) -> Any:
    """A value in which each number that is not finite is None.

    >>> finite({"loss": math.nan, "bleu": [1.5, math.inf]})
    {'loss': None, 'bleu': [1.5, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def as_line(entry: Entry) -> bytes:
    r"""An object as a line of strict JSON.

    >>> as_line({"loss": math.nan})
    b'{"loss": null}\n'
    """
    return (json.dumps(finite(entry), allow_nan=False) + "\n").encode()


def read(path: Path) -> list[Entry]:
    """The objects of a file's whole lines. What is torn ends it. There are none without a file that can be read."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # behind the last end of a line nothing is whole
    except OSError:
        return []
    entries = []
    with contextlib.suppress(ValueError):
        for line in lines:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                break
            entries.append(entry)
    return entries
