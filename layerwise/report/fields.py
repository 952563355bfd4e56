"""Values as the report page shows them: JSON's, short, as text, and as the fields of an HTML table."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from layerwise.results import main_table

DIGITS = 6  # of a number in the drill-down; the table has all of them


def plain(value: Any) -> Any:
    """A table's value as JSON has it: None where it is empty, an integer for a number that is whole."""
    if value is None or value is pd.NA or value != value:
        return None
    if hasattr(value, "item"):
        value = value.item()
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def short(value: Any) -> Any:
    """A value with the digits of the drill-down."""
    value = plain(value)
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def shown(value: Any, metric: str | None = None) -> str:
    """A value as text: four digits, perplexities as in the main table, nothing where it is empty."""
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return main_table.number(value, metric) if metric == "perplexity" else f"{value:.4g}"
    return json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)


class Field(dict):
    """A cell of an HTML table: text, and where it is a number its value to sort by; link: address within the page."""

    def __init__(self, value: Any, metric: str | None = None, link: str | None = None) -> None:
        value = plain(value)
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
        text = shown(value, metric)
        super().__init__(text=text, number=number, link=link, long=len(text) > 60 and " " in text)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """A table for the template: header, and rows of Fields; rows may hold values or Fields."""
    fields = [[value if isinstance(value, Field) else Field(value) for value in row] for row in rows]
    return {"header": list(header), "rows": fields}


def entries(named: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """A table of config entries: a row each, a column per key that any has."""
    keys = list(dict.fromkeys(key for entry in named.values() for key in entry))
    return table([name, *keys], [[label, *(entry.get(key) for key in keys)] for label, entry in named.items()])
