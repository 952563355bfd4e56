"""The protocol shared by the cells of a table, and marks for cells with other code or versions."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from layerwise.storage.frames import column, distinct, distinct_values, missing, select, tuples

# (what is identified, its key columns in `cells`, columns that must have one value per key)
SAME: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("model", ("model",), ("model_sha256", "dtype", "compute_dtype")),
    (
        "calibration",
        ("model", "calibration"),
        (
            *("calibration_sha256", "calibration_samples", "calibration_length", "calibration_sampling"),
            *("calibration_dtype", "calibration_compute_dtype"),
        ),
    ),
    ("calibration", ("model", "calibration", "seed"), ("calibration_seed",)),
    ("text", ("model", "text"), ("eval_sha256", "eval_length", "eval_windows")),
    ("task_set", ("task_set",), ("lm_eval",)),
    ("task", ("task_set", "task"), ("task_version", "fewshot", "items", "eval_sha256")),
]
VERSIONS = ("python", "torch", "transformers", "numpy", "snakemake", "platform", "device")
MARK = "†"


class Protocol:
    """The protocol of the cells seen so far, with which every further row must agree."""

    def __init__(self) -> None:
        self._first: dict[tuple[Any, ...], tuple[Any, Mapping[str, Any]]] = {}

    def difference(self, row: Mapping[str, Any]) -> str | None:
        """One sentence if a row of `cells` has another protocol than an earlier row, otherwise None."""
        for what, names, columns in SAME:
            key = tuple(row.get(name) for name in names)
            if any(missing(part) for part in key):
                continue
            for name in columns:
                value = row.get(name)
                if missing(value):
                    continue
                known, first = self._first.setdefault((name, *key), (value, row))
                if known != value:
                    return (
                        f"the {what} {row[what]} must have one protocol. {cell_title(first)} and {cell_title(row)} "
                        f"differ in {name} ({known} and {value}): delete the results of one of them, and run again"
                    )
        return None


def cell_title(row: Mapping[str, Any]) -> str:
    """A cell's name in sentences."""
    return " ".join(str(row[name]) for name in ("label", "target", "mode", "cell"))


def provenance_marks(cells: pd.DataFrame) -> tuple[set[tuple[str, str]], list[str]]:
    """The (mode, cell) pairs of a table whose numbers are marked, and the sentences that explain the marks.

    A mark means that the cell was computed by uncommitted code, or with other versions, platform or device than most
    cells. Different commits alone are not marked: a study may be computed over time, and affected cells are recomputed.
    """
    computed = distinct(select(cells, column(cells, "python").notna()), ["mode", "cell"])
    dirty = column(computed, "dirty").eq(True).fillna(False)
    strange = [("computed by code with changes that are in no commit", select(computed, dirty))]
    for name in VERSIONS:
        counts: dict[Any, int] = column(computed, name).value_counts().to_dict()
        usual = max(counts, key=counts.__getitem__, default=None)
        others = [value for value in counts if value != usual]
        strange += [
            (f"with {name} {value}, the others {usual}", select(computed, column(computed, name) == value))
            for value in others
        ]
    marked = {cell for _, rows in strange for cell in tuples(rows, ["mode", "cell"])}
    notes = [f"{MARK} {why}: {', '.join(distinct_values(rows, 'label'))}." for why, rows in strange if len(rows)]
    commits = column(computed, "commit").nunique()
    return marked, notes + ([f"Computed at {commits} commits."] if commits > 1 else [])
