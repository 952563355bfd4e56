"""Read the table of published numbers, and say how far ours may lie from each."""

import csv
import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from layerwise.contract.target import Target
from layerwise.results.cell_results import ACCURACIES
from layerwise.runtime.errors import InputError
from layerwise.runtime.project import ROOT
from layerwise.runtime.sentences import brief, schema_fault

FILE = ROOT / "resources/published.csv"
SCHEMA = ROOT / "workflow/schemas/published.schema.yaml"
# Shares of the published value. Papers that run one method on one model under one protocol agree within 0.5% for the
# dense model, mostly within 2% at half the weights or at 4 bits, and within 5 % beyond (docs/evaluation.md).
DENSE, NEAR, FAR = 0.005, 0.02, 0.05
ERRORS = 2  # standard errors of ours within which two accuracies count as one
PRINTED = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
Row = Mapping[str, Any]


def read_published(path: Path = FILE) -> list[dict[str, Any]]:
    """Rows of published.csv, typed. Raises InputError naming the first row that its schema refuses."""
    schema = yaml.safe_load(SCHEMA.read_text("utf-8"))
    kinds = {name: column.get("type", "string") for name, column in schema["properties"].items()}
    validator = jsonschema.Draft202012Validator(schema)
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a mark before the text
            reader = csv.DictReader(file, strict=True)
            header, records = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}, the table of published numbers, cannot be read: {error}.") from None
    absent = [name for name in kinds if header.count(name) != 1]
    if absent:
        raise InputError(
            f"{path} must have each column of {SCHEMA.name} once. Got none or two of {brief(', '.join(absent))}."
        )
    rows = []
    for number, record in enumerate(records, 2):
        row = {str(name): _typed(value, kinds.get(name, "string")) for name, value in record.items()}
        for error in validator.iter_errors(row):
            column = ".".join(map(str, error.path))
            raise InputError(f"{path}, row {number}: {column or 'the row'} {schema_fault(error)}.")
        if fault := _fault(row):
            raise InputError(f"{path}, row {number}: {fault}.")
        rows.append(row)
    return rows


def _fault(row: Row) -> str | None:
    """The fault in a row to be compared that a schema cannot express, or None."""
    strange = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if strange:
        return f"{strange[0]} is wrong: {row[strange[0]]} is not finite"
    if row["not_joined"] is not None:
        return None
    try:
        params = json.loads(row["our_params"] or "{}")
    except (ValueError, RecursionError):
        params = None
    if not isinstance(params, dict):
        return f"our_params is wrong: {brief(repr(row['our_params']))} is not a JSON object"
    try:
        spread = json.loads(row["our_allocation"] or "{}")
    except (ValueError, RecursionError):
        spread = None
    if not isinstance(spread, dict) or len(spread) > 1 or not all(isinstance(own, dict) for own in spread.values()):
        return f"our_allocation is wrong: {brief(repr(row['our_allocation']))} is not a JSON object with one allocator"
    try:
        target_of(row)
    except ValueError as error:
        return f"its target is wrong: {str(error).rstrip('.')}"
    # The last digit that is printed says how far it is rounded.
    return None if PRINTED.fullmatch(row["value"]) else f"value is wrong: {brief(repr(row['value']))} is not a number"


def _typed(text: str | None, kinds: str | list[str]) -> Any:
    if not text:
        return None
    if "integer" in kinds or "number" in kinds or "boolean" in kinds:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text  # the schema says what it should have been
    return text


def target_of(row: Row) -> Target:
    return Target(row["sparsity"], row["pattern"], row["bits"], row["group"], bool(row["symmetric"]))


def tolerance(row: Row, stderr: float | None = None) -> float:
    """Largest difference, in units of the printed number, that counts as the same result.

    stderr: of our accuracy, in percent: the items of a task are few, and two models differ on some of them by chance.
    """
    if row["our_metric"] in ACCURACIES:
        return max(ERRORS * (stderr or 0.0), ERRORS * (row["deviation"] or 0.0), _rounding(row["value"]))
    low_bits = row["bits"] is not None and row["bits"] <= 3
    share = DENSE if row["our_method"] == "dense" else FAR if row["sparsity"] > 0.5 or low_bits else NEAR
    return max(share * row["number"], 2 * (row["deviation"] or 0.0), _rounding(row["value"]))


def _rounding(printed: str) -> float:
    """Half a unit of the last printed digit: 0.05 for 6.1, 500 for 1.7e4."""
    return 0.5 * 10.0 ** int(Decimal(printed).as_tuple().exponent)
