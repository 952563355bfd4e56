"""Typed tables: the columns, types and limits of workflow/schemas/tables.schema.yaml, applied to whole columns.

The schema describes one row. Checking row by row takes minutes for a large study, so the same limits are checked column
by column. A test compares this check with a JSON Schema validator.
"""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import yaml

from layerwise.runtime.errors import InputError
from layerwise.runtime.files import set_aside
from layerwise.runtime.project import ROOT

pc: Any = pyarrow.compute  # its functions are created on import, so type checkers do not see them
SCHEMA = ROOT / "workflow/schemas/tables.schema.yaml"
ARROW = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}
PANDAS = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype(), pa.string(): pd.StringDtype(na_value=pd.NA)}


@cache
def document() -> dict[str, Any]:
    """The schema file's content."""
    return yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))


COMPARISONS: tuple[str, ...] = tuple(document()["$defs"]["comparison"]["enum"])  # in the order of tables and legends


@cache
def columns(table: str) -> dict[str, dict[str, Any]]:
    """{column: its JSON Schema} of a table, in the order of the columns."""
    definitions = document()["$defs"]
    properties = document()["tables"][table]["properties"]
    return {name: definitions[reference["$ref"].rsplit("/", 1)[1]] for name, reference in properties.items()}


@cache
def arrow_schema(table: str) -> pa.Schema:
    """Arrow types of a table; a column whose schema admits null is nullable."""
    fields = []
    for name, column in columns(table).items():
        types = column["type"] if isinstance(column["type"], list) else [column["type"]]
        fields.append(pa.field(name, ARROW[types[0]], nullable="null" in types))
    return pa.schema(fields)


def typed(data: pa.Table, table: str, where: str, only: Sequence[str] | None = None) -> pa.Table:
    """The rows with columns in the schema's order and types. Raises InputError when the data does not satisfy it.

    NaN counts as empty, because pandas writes it for a missing number. where: the file that an error names. only: the
    columns present, if not all.
    """
    wanted = arrow_schema(table)
    wanted = wanted if only is None else pa.schema([wanted.field(name) for name in only])
    if set(data.column_names) != set(wanted.names) or len(data.column_names) != len(wanted.names):
        absent = [name for name in wanted.names if name not in data.column_names]
        unknown = [name for name in data.column_names if name not in wanted.names]
        raise InputError(
            f"{where} must have the columns of the {table} table in {SCHEMA.name}. "
            f"Lacking: {', '.join(absent) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
        )
    arrays = []
    for field in wanted:
        array = data.column(field.name)
        if pa.types.is_floating(array.type):
            array = _compute("if_else", _compute("is_nan", array), pa.scalar(None, array.type), array)
        if not _converts(array.type, field.type):
            raise InputError(f"{where}: column {field.name!r} must be {field.type}. Got {array.type} instead.")
        try:
            array = array.cast(field.type)
        except pa.ArrowInvalid as error:  # for example, 0.5 for an integer
            raise InputError(f"{where}: column {field.name!r} must be {field.type} ({first_line(error)}).") from None
        if fault := _fault(array, field, columns(table)[field.name]):
            raise InputError(f"{where}: column {field.name!r} {fault}")
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=wanted)


def _compute(function: str, *arguments: Any) -> Any:
    """The result of a pyarrow.compute function, given by name, because type checkers do not see it as an attribute."""
    return pc.call_function(function, list(arguments))


def _converts(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of one type can be used as another without a change of meaning; 1 is not text."""
    if pa.types.is_dictionary(given):
        given = given.value_type
    if pa.types.is_null(given):
        return True
    if pa.types.is_string(wanted):
        return pa.types.is_string(given) or pa.types.is_large_string(given)
    if pa.types.is_boolean(wanted):
        return pa.types.is_boolean(given)
    return pa.types.is_integer(given) or pa.types.is_floating(given)


def _fault(array: pa.ChunkedArray, field: pa.Field, limits: dict[str, Any]) -> str | None:
    """The fault of a column of the right type, as the end of a sentence, or None."""
    if array.null_count and not field.nullable:
        return f"must have a value in every row. Got {array.null_count} empty of {len(array)} instead."
    if (
        pa.types.is_floating(array.type)
        and not _compute("all", _compute("is_finite", array)).as_py()
        and len(array) > array.null_count
    ):
        return "must be finite. Got inf instead."
    if enum := limits.get("enum"):
        strange = [value for value in array.unique().to_pylist() if value not in enum and value is not None]
        if strange:
            return f"must be one of {', '.join(enum)}. Got {strange[0]!r} instead."
    if "minimum" in limits or "maximum" in limits:
        extremes = _compute("min_max", array).as_py()
        least, most = extremes["min"], extremes["max"]
        if least is not None and least < limits.get("minimum", least):
            return f"must be at least {limits['minimum']}. Got {least:g} instead."
        if most is not None and most > limits.get("maximum", most):
            return f"must be at most {limits['maximum']}. Got {most:g} instead."
    return None


def from_rows(rows: list[dict[str, Any]], table: str, where: str) -> pa.Table:
    """A typed table from rows given as dicts. An absent key is empty; an unknown key or NaN raises InputError."""
    wanted = arrow_schema(table)
    unknown = sorted({key for row in rows for key in row} - set(wanted.names))
    if unknown:
        raise InputError(
            f"{where}: a column must be one of the {table} table in {SCHEMA.name}. Got {', '.join(unknown)} instead."
        )
    arrays = []
    for field in wanted:
        if any(isinstance(row.get(field.name), float) and math.isnan(row[field.name]) for row in rows):
            raise InputError(f"{where}: column {field.name!r} must be finite. Got NaN instead.")
        try:
            # Use the values' own type: with an integer type, arrow would silently convert 0.5 to 0.
            arrays.append(pa.chunked_array([pa.array([row.get(field.name) for row in rows])]))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            message = first_line(error)
            raise InputError(f"{where}: column {field.name!r} must be {field.type} ({message}).") from None
    return typed(pa.Table.from_arrays(arrays, names=wanted.names), table, where)


def holds(array: pa.ChunkedArray, part: str) -> bool:
    """Whether any of the strings contains the part."""
    return bool(pc.any(pc.match_substring(array, part)).as_py())


def to_frame(data: pa.Table) -> pd.DataFrame:
    """DataFrame in which nullable integers, booleans and strings have pandas' nullable types."""
    return data.to_pandas(types_mapper=PANDAS.get)


def write_parquet(data: pa.Table, path: Path) -> None:
    """Write a table with checksums, by which `read_parquet` detects damage."""
    pq.write_table(data, path, write_page_checksum=True)


def read_parquet(path: Path, only: Sequence[str] | None = None) -> pa.Table:
    """A table as it was written, or only some of its columns.

    Raises pyarrow's ArrowInvalid, or OSError without a number, for a file that is damaged or not parquet.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns=only)


def unusable(path: Path, error: Exception) -> InputError:
    """The error for a result that cannot be used. A damaged one is set aside, so that the next run makes it again.

    error: from `read_parquet`, from reading JSON, or from a check of the content, which does not count as damage.
    """
    text = f"it lacks {error.args[0]!r}." if isinstance(error, KeyError) else first_line(error)
    damaged = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, pa.ArrowInvalid)) or (
        isinstance(error, OSError) and error.errno is None
    )
    if damaged:
        text = f"{text.rstrip('.')}; {set_aside(path)}."
    return InputError(f"{path} cannot be used: {text}")


def read_table(folder: Path, table: str, only: Sequence[str] | None = None) -> pd.DataFrame:
    """A table of a study, or only some of its columns, checked.

    Raises InputError when it is absent, broken or of another layout.
    """
    path = Path(folder) / f"{table}.parquet"
    if not path.is_file():
        raise InputError(f"The {table} table {path} does not exist: run the study first.")
    try:
        data = read_parquet(path, only)
    except (pa.ArrowInvalid, OSError) as error:
        said = first_line(error).rstrip(".")
        raise InputError(f"{path} cannot be read as parquet: {said}. Delete it, and run again.") from None
    return to_frame(typed(data, table, str(path), only))


def first_line(error: object) -> str:
    """The first line of a message, for a sentence or a table cell."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__
