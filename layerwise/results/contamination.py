"""Whether a cell's calibration has seen its evaluation text, judged by the texts' origins and contents."""

import json
from pathlib import Path
from typing import Any

from layerwise.storage.table_schema import unusable


def contamination(origin: str | None, path: Path) -> dict[str, Any]:
    """The columns `contaminated`, `contamination` and `overlap` of a perplexity.

    origin: the file or data set from which both texts are drawn, if any. path: the file that sources/overlap.py wrote
    about their tokens. If it is absent, as in tables of a failed run, its values are unknown and empty. Raises
    InputError when it is broken.
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
