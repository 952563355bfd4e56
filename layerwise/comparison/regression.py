"""Compare today's numbers with accepted ones, layer by layer; folders.py compares two result folders.

layerwise regression: exit status 1 when a number moved by more than the tolerance, for better or worse, or is gone. New
ones are listed. layerwise accept writes what it compares with.
"""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from layerwise.comparison.folders import ALLOCATED, TOLERANCE, check_tolerance, hold
from layerwise.results.seeds import with_seed_names
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import write_atomic
from layerwise.runtime.project import ROOT
from layerwise.storage.frames import column, columns_of, matching, renamed, select, tuples
from layerwise.storage.table_schema import first_line, read_table
from layerwise.study.config_file import study_file, study_name

CELL = ["model", "calibration", "mode", "label", "target", *ALLOCATED, "params"]
PARAMETERS = {"params": "label", "allocation_params": "allocator"}  # column of parameters -> whose they are
# file: (columns that name a number, the number)
NUMBERS = {
    "layers": ([*CELL, "layer"], "output_error"),
    "cells": ([*CELL, "text"], "perplexity"),
    "divergences": ([*CELL, "text"], "kl"),
}
LATER = ("divergences",)  # files that numbers accepted by an earlier version lack


def folder_of(study: str | Path) -> Path:
    """Where `accept` writes a study's numbers. study: its name or its file. Raises InputError where there is none."""
    return Path("results/accepted", study_name(study))


def accepted_folder(study: str | Path) -> Path:
    """Where a study's accepted numbers are: as `folder_of`, or, while nothing is accepted there, those that ship.

    study: its name or its file. Numbers ship only for studies that ship. Raises InputError where there is no study.
    """
    folder = folder_of(study)
    ships = study_file(study).resolve().is_relative_to(ROOT / "config") and (ROOT / folder).is_dir()
    return ROOT / folder if ships and not folder.is_dir() else folder


def numbers(tables: Path, table: str) -> pd.DataFrame:
    """The key columns and the number of a file of NUMBERS, from a folder that collect wrote; rows without a value are
    left out."""
    key, value = NUMBERS[table]
    data = read_table(tables, "layers" if table == "layers" else "cells")
    if table != "layers":
        data = renamed(matching(data, metric=value), {"value": value})
    data = with_seed_names(data)
    return columns_of(select(data, column(data, value).notna()), [*key, value]).reset_index(drop=True)


def accepted_numbers(folder: Path, table: str) -> pd.DataFrame:
    """The accepted numbers; without ALLOCATED if an earlier version, which did not know these columns, wrote them.

    Raises InputError when the file is absent or of another layout.
    """
    key, value = NUMBERS[table]
    path = folder / f"{table}.csv"
    if not path.is_file():
        raise InputError(f"Accepted numbers must be in {path}. There is no such file: `layerwise accept` writes it.")
    try:
        types: Any = dict.fromkeys(key, "string") | {value: "float64"}
        data = pd.read_csv(path, dtype=types, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None
    earlier = [name for name in key if name not in ALLOCATED]
    if list(data.columns) not in ([*key, value], [*earlier, value]):
        wanted, got = ", ".join([*key, value]), ", ".join(map(str, data.columns))
        raise InputError(f"{path} must have the columns {wanted}. Got {got} instead.")
    return data


def extends(new: Any, old: Any) -> bool:
    """Whether parameters are the older ones, apart from keys that were added at any depth."""
    if isinstance(new, dict) and isinstance(old, dict):
        return all(name in new and extends(new[name], value) for name, value in old.items())
    if isinstance(new, list) and isinstance(old, list):
        return len(new) == len(old) and all(map(extends, new, old))
    return new == old


def with_new_parameters(accepted: pd.DataFrame, now: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Accepted numbers under today's parameters if these only add some, and the names of such methods and allocators.

    A method that gains an option would otherwise lose all its accepted numbers. Whether the option's default changes a
    number is then seen in the number.
    """
    given = [name for name in PARAMETERS if name in accepted]
    cell = [name for name in CELL if name in accepted and name not in given]
    of_today = dict(zip(tuples(now, cell), tuples(now, given), strict=True))
    params, names = [], []
    for key, old in zip(tuples(accepted, cell), tuples(accepted, given), strict=True):
        new = of_today.get(key, old)
        gained = [name for name, a, b in zip(given, new, old, strict=True) if a != b]
        if not all(extends(_parsed(str(a)), _parsed(str(b))) for a, b in zip(new, old, strict=True)):
            new, gained = old, []
        params.append(new)
        names += [str(key[cell.index(PARAMETERS[name])]) for name in gained]
    frame = pd.DataFrame(params, columns=given, index=accepted.index, dtype="string")
    return accepted.assign(**{name: frame[name] for name in given}), list(dict.fromkeys(names))


def _parsed(params: str) -> Any:
    try:
        return json.loads(params)
    except ValueError:  # a file that was edited by hand: the numbers are gone, as the report says
        return params


def accepted_csv(data: pd.DataFrame) -> str:
    """The numbers as the text of an accepted file: sorted, six digits, so that a diff shows what moved and no more."""
    *key, _ = data.columns
    return data.sort_values(key).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def check(tables: Path, accepted: Path, tolerance: float = TOLERANCE) -> bool:
    """Print how the numbers of a folder of tables differ from accepted ones. Returns whether all agree.

    accepted: folder that `accept` wrote. tolerance: relative. Raises InputError when either cannot be read.
    """
    check_tolerance(tolerance)
    absent = [table for table in LATER if not (accepted / f"{table}.csv").is_file()]
    known = {table: accepted_numbers(accepted, table) for table in NUMBERS if table not in absent}
    now = {table: numbers(tables, table) for table in NUMBERS}
    gained: dict[str, None] = {}
    for table, data in known.items():
        now[table] = columns_of(now[table], list(data.columns))
        known[table], names = with_new_parameters(data, now[table])
        gained |= dict.fromkeys(names)
    agree = hold(now, known, tolerance)
    if gained:
        print(f"Methods or allocators with more parameters than when they were accepted: {', '.join(gained)}.")
    for table in absent:
        print(f"{NUMBERS[table][1]} ({table}): none accepted yet; {len(now[table])} not compared.")
    return agree


def accept(tables: Path, accepted: Path) -> list[str]:
    """Write the numbers of a folder of tables as those that `check` compares with. Returns a line for each file."""
    texts = {accepted / f"{table}.csv": accepted_csv(numbers(tables, table)) for table in NUMBERS}
    for path, text in texts.items():
        write_atomic(path, text)
    return [f"accepted {len(text.splitlines()) - 1} numbers -> {path}" for path, text in texts.items()]
