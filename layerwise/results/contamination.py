"""Whether the calibration of a cell has seen what it is evaluated on: by where texts come from, and what they hold."""

import json
from pathlib import Path
from typing import Any

from layerwise.storage.table_schema import unusable


def contamination(origin: str | None, path: Path) -> dict[str, Any]:
    """The columns `contaminated`, `contamination` and `overlap` of a perplexity.

    origin: the file or data set that both texts are drawn from, if any; path: what sources/overlap.py wrote of their
    tokens. Where it is absent, as in the tables of what a failed run has done, what it says is unknown and empty.
    Raises InputError when it is broken.
    """
    known = path.is_file()
    found: dict[str, Any] = {"overlap": None, "contamination": None}
    if known:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = {key: record[key] for key in found}
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise unusable(path, error) from None
    what = f"draw from {origin}" if origin else found["contamination"]
    return {
        "contaminated": True if what else False if known else None,
        "contamination": what,
        "overlap": found["overlap"],
    }
