"""Hold today's numbers against accepted ones, layer by layer, or one study's tables against another's.

check: exit status 1 when a number moved by more than the tolerance, for better or worse, or is gone. New ones are said.
accept: write what check compares with. compare A B: the same for two tables, A in the place of the accepted ones.
"""

# pandas' own annotations lose whether a selection is a column or a frame.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from workflow.scripts.runtime import InputError, report_errors, write_atomic
from workflow.scripts.table_schema import first_line, read_table

CELL = ["model", "calibration", "mode", "label", "target", "params"]
# table: (columns that name a number, the number)
NUMBERS = {"layers": ([*CELL, "layer"], "output_error"), "cells": ([*CELL, "text"], "perplexity")}
TOLERANCE = 0.02
LEAST = 1e-12  # differences below are rounding, of errors that should be zero


def numbers(tables: Path, table: str) -> pd.DataFrame:
    """The key columns and the number of a table in a folder that collect wrote; rows without a value are left out."""
    data = read_table(tables, table)
    key, value = NUMBERS[table]
    if table == "cells":
        data = data[data["metric"] == "perplexity"].rename(columns={"value": value})
    if (data.groupby(["model", "calibration"])["seed"].nunique() > 1).any():
        data = data.assign(calibration=data["calibration"] + " seed " + data["seed"].astype("string"))
    return data.loc[data[value].notna(), [*key, value]].reset_index(drop=True)


def accepted_numbers(folder: Path, table: str) -> pd.DataFrame:
    """What `accept` wrote. Raises InputError when it is not there or of another layout."""
    key, value = NUMBERS[table]
    path = folder / f"{table}.csv"
    if not path.is_file():
        raise InputError(f"Expected accepted numbers at {path}, which does not exist: `make accept` accepts today's.")
    try:
        data = pd.read_csv(path, dtype={column: "string" for column in key} | {value: "float64"}, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None
    if list(data.columns) != [*key, value]:
        wanted, got = ", ".join([*key, value]), ", ".join(map(str, data.columns))
        raise InputError(f"{path} must have the columns {wanted}. Got {got} instead.")
    return data


def compare(now: pd.DataFrame, accepted: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """The numbers that differ: key columns, accepted, now, change (relative to accepted) and status.

    now, accepted: key columns and, last, the number. status: moved when |now - accepted| > tolerance * |accepted|,
    added when only now has it, gone when only accepted has it. Empty when all agree. Raises InputError when a key
    names two numbers.
    """
    *key, value = now.columns
    for side, frame in (("today's", now), ("accepted", accepted)):
        twice = frame[frame.duplicated(key)].to_dict("records")
        if twice:
            raise InputError(
                f"Expected one number per {', '.join(key)} among {side}, two are of {_name(twice[0], key)}."
            )
    placed = now.assign(place=range(len(now)))  # in today's order, that of the plan; what is gone comes last
    both = accepted.merge(placed, on=key, how="outer", suffixes=("_accepted", "_now"), indicator="status")
    both = both.sort_values("place", kind="stable")
    both = both.rename(columns={f"{value}_accepted": "accepted", f"{value}_now": "now"})
    both["status"] = both["status"].astype(str).map({"left_only": "gone", "right_only": "added", "both": "moved"})
    difference = both["now"] - both["accepted"]
    within = difference.abs() <= (tolerance * both["accepted"].abs()).clip(lower=LEAST)
    both["change"] = (difference / both["accepted"]).where(both["accepted"] != 0, math.inf)
    both.loc[both["status"] != "moved", "change"] = math.nan
    return both.loc[(both["status"] != "moved") | ~within, [*key, "accepted", "now", "change", "status"]]


def _name(row: Mapping[str, Any], key: Sequence[str]) -> str:
    return " ".join(str(row[column]) for column in key)


def report(changes: pd.DataFrame, compared: int, what: str, tolerance: float) -> str:
    """The changes as an aligned table and their counts, or one line when there are none."""
    counts = changes["status"].value_counts()
    if changes.empty:
        return f"{what}: all {compared} agree within {100 * tolerance:g} %."
    key = list(changes.columns[:-4])
    last = key[-1]
    # A sweep's labels tell its entries apart: the parameters are shown only where the rest of the key does not.
    names = [column for column in key if column not in ("params", last)]
    if changes.drop_duplicates(key).duplicated([*names, last]).any():
        names.append("params")
    header = ["cell", last, "accepted", "now", "change"]
    rows = [
        [_name(row, names), str(row[last]), _digits(row["accepted"]), _digits(row["now"]), _percent(row)]
        for row in changes.to_dict("records")
    ]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, ["-" * width for width in widths], *rows]
    ]
    summary = ", ".join(f"{counts.get(status, 0)} {status}" for status in ("moved", "added", "gone"))
    return "\n".join([*lines, f"{what}: {summary}; {compared} compared, tolerance {100 * tolerance:g} %."])


def _digits(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.6g}"


def _percent(row: Mapping[str, Any]) -> str:
    if row["status"] != "moved":
        return str(row["status"])
    return "from zero" if math.isinf(row["change"]) else f"{100 * row['change']:+.2f} %"


def accepted_csv(data: pd.DataFrame) -> str:
    """The numbers as the text of an accepted file: sorted, six digits, so that a diff shows what moved and no more."""
    *key, _ = data.columns
    return data.sort_values(key).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def hold(now: dict[str, pd.DataFrame], accepted: dict[str, pd.DataFrame], tolerance: float) -> None:
    """Print how the numbers of every table differ; exit status 1 when any moved or is gone."""
    failed = False
    for table, (_, value) in NUMBERS.items():
        changes = compare(now[table], accepted[table], tolerance)
        print(report(changes, len(accepted[table]), f"{value} ({table})", tolerance))
        failed |= bool(changes["status"].isin(["moved", "gone"]).any())
    if failed:
        raise SystemExit(1)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="regression", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "accept"):
        command = commands.add_parser(name)
        command.add_argument("--tables", type=Path, default=Path("results/tables"), help="folder of today's tables")
        command.add_argument(
            "--accepted", type=Path, default=Path("results/accepted/embedded"), help="what check compares with"
        )
    comparison = commands.add_parser("compare", help="two folders of tables; the first is the older")
    comparison.add_argument("a", type=Path)
    comparison.add_argument("b", type=Path)
    for name in ("check", "compare"):
        commands.choices[name].add_argument("--tolerance", type=float, default=TOLERANCE, help="relative, such as 0.02")
    args = parser.parse_args(argv)
    if args.command == "accept":
        texts = {table: accepted_csv(numbers(args.tables, table)) for table in NUMBERS}
        for table, text in texts.items():
            write_atomic(args.accepted / f"{table}.csv", text)
            print(f"accepted {len(text.splitlines()) - 1} numbers -> {args.accepted / f'{table}.csv'}")
    elif args.command == "check":
        accepted = {table: accepted_numbers(args.accepted, table) for table in NUMBERS}
        hold({table: numbers(args.tables, table) for table in NUMBERS}, accepted, args.tolerance)
    else:
        before, after = ({table: numbers(folder, table) for table in NUMBERS} for folder in (args.a, args.b))
        hold(after, before, args.tolerance)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
