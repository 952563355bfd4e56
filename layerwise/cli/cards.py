"""The cards of methods as text: one line per method, or a whole card."""

import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerwise.contract.catalogue import Catalogue
from layerwise.contract.method_file import CatalogueError, Entry
from layerwise.contract.method_table import widths
from layerwise.runtime.errors import InputError
from layerwise.runtime.text_table import aligned

WIDTH = 100  # characters per line
HEADER = ("method", "title", "prunes by", "bits", "updates weights", "needs")


def catalogue(folders: Iterable[Path] = ()) -> Catalogue:
    """The shipped methods and those of further folders. Raises InputError for a file that is not a method."""
    try:
        return Catalogue(list(folders))
    except CatalogueError as error:
        raise InputError(str(error)) from None


def find(known: Catalogue, name: str) -> Entry:
    """The entry of a method. Raises InputError for a name that no method has."""
    try:
        return known.find(name, known.kind.word)
    except CatalogueError as error:
        raise InputError(str(error)) from None


def table(entries: Mapping[str, Entry]) -> str:
    """A line per method: its title, its targets and the statistics that it needs."""
    rows = [HEADER, *(_row(entry) for entry in entries.values())]
    lines = aligned(rows)
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _row(entry: Entry) -> tuple[str, ...]:
    card = entry.card
    patterns = [pattern for pattern in card["patterns"] if pattern != "dense"]
    updates = "yes" if card["updates_weights"] else "no"
    return (
        *(entry.name, card["title"], ", ".join(patterns) or "-", widths(card["bits"]) or "-"),
        *("-" if entry.control else updates, ", ".join(card["needs"]) or "-"),
    )


def card(entry: Entry) -> str:
    """A whole card: the method's title, its file, and every parameter with its default and meaning."""
    lines = [f"{entry.name}: {entry.card['title']}", f"  file: {entry.path}"]
    said = {key: value for key, value in entry.card.items() if key not in ("title", "parameters", "checks")}
    lines += [f"  {key}: {as_text(value)}" for key, value in said.items()]
    parameters = entry.card["parameters"]
    lines += ["", "parameters:" if parameters else "It has no parameters."]
    for name, schema in parameters.items():
        lines.append(f"  {name}: {type_of(schema)}, default {as_text(entry.defaults[name])}")
        lines += textwrap.wrap(schema.get("description", ""), WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def type_of(schema: Mapping[str, Any]) -> str:
    """The allowed values of a parameter as text."""
    if "enum" in schema:
        return "one of " + ", ".join(map(as_text, schema["enum"]))
    if schema.get("format") == "method":
        return "a method or none" if schema.get("optional") else "a method"
    kinds = schema.get("type", "any value")
    words = kinds if isinstance(kinds, str) else " or ".join(kinds)
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    return " ".join([words, *(f"{word} {schema[key]}" for key, word in limits.items() if key in schema)])


def as_text(value: Any) -> str:
    """A card's value as readable text: yes, no and none, and JSON for nested values."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, (str, int)) for item in value):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):  # not `in`, for which 1.0 equals True and 0 equals False
        return {True: "yes", False: "no", None: "none"}[value]
    return json.dumps(value)
