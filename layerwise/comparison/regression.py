"""Hold today's numbers against accepted ones, layer by layer; compare.py holds two result folders against each other.

check: exit status 1 when a number moved by more than the tolerance, for better or worse, or is gone. New ones are said.
accept: write what check compares with.
"""

# pandas' own annotations lose whether a selection is a column or a frame.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

import argparse
import sys
from pathlib import Path

import pandas as pd

from layerwise.comparison.folders import TOLERANCE, hold
from layerwise.results.seeds import told_apart
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import write_atomic
from layerwise.storage.table_schema import first_line, read_table

CELL = ["model", "calibration", "mode", "label", "target", "params"]
# table: (columns that name a number, the number)
NUMBERS = {"layers": ([*CELL, "layer"], "output_error"), "cells": ([*CELL, "text"], "perplexity")}


def numbers(tables: Path, table: str) -> pd.DataFrame:
    """The key columns and the number of a table in a folder that collect wrote; rows without a value are left out."""
    data = read_table(tables, table)
    key, value = NUMBERS[table]
    if table == "cells":
        data = data[data["metric"] == "perplexity"].rename(columns={"value": value})
    data = told_apart(data)
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


def accepted_csv(data: pd.DataFrame) -> str:
    """The numbers as the text of an accepted file: sorted, six digits, so that a diff shows what moved and no more."""
    *key, _ = data.columns
    return data.sort_values(key).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="regression", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("check", "accept"):
        command = commands.add_parser(name)
        command.add_argument("--tables", type=Path, default=Path("results/tables"), help="folder of today's tables")
        command.add_argument(
            "--accepted", type=Path, default=Path("results/accepted/embedded"), help="what check compares with"
        )
    commands.choices["check"].add_argument("--tolerance", type=float, default=TOLERANCE, help="relative, such as 0.02")
    args = parser.parse_args(argv)
    if args.command == "accept":
        texts = {table: accepted_csv(numbers(args.tables, table)) for table in NUMBERS}
        for table, text in texts.items():
            write_atomic(args.accepted / f"{table}.csv", text)
            print(f"accepted {len(text.splitlines()) - 1} numbers -> {args.accepted / f'{table}.csv'}")
    else:
        accepted = {table: accepted_numbers(args.accepted, table) for table in NUMBERS}
        hold({table: numbers(args.tables, table) for table in NUMBERS}, accepted, args.tolerance)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
