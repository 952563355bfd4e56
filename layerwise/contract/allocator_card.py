"""Faults of an allocator's card that its schema cannot find. Does not import torch."""

from collections.abc import Mapping, Set
from typing import Any

TRIED = ("windows", "screen")  # parameters of allocators that try the model, in sequences of calibration text
MOST = 0.99  # largest share of zeros in a layer
NUMBERS = {"number", "integer"}


def card_fault(card: Mapping[str, Any], class_name: str, defined: Set[str], inherits: bool) -> str | None:
    """The first fault of an allocator's card and class, as a sentence that begins with the part; None if there is none.

    defined: names that the class defines. inherits: whether it has another base, which may define the rest.
    """
    return (
        _unknown(card)
        or _wrong_values(card)
        or _wrong_kind(card)
        or (None if inherits else _missing(card, class_name, defined))
    )


def _unknown(card: Mapping[str, Any]) -> str | None:
    """A key of the card that names no parameter."""
    known = card["parameters"].keys()
    if unknown := sorted(_in_passes(card) - {"layers", *known}):
        return f"CARD['passes'] must name parameters, or layers. Got {unknown[0]!r} instead."
    compared = card.get("at_most", {})
    named = {"at_most": {*compared, *compared.values()}}
    named |= {key: set(card.get(key, {})) for key in ("needs_where", "passes_where")}
    for key, names in named.items():
        if unknown := sorted(map(str, names - known)):
            return f"CARD[{key!r}] must name parameters. Got {unknown[0]!r} instead."
    return None


def _in_passes(card: Mapping[str, Any]) -> set[str]:
    sums = [card.get("passes", []), *(own for where in card.get("passes_where", {}).values() for own in where.values())]
    return {name for terms in sums for term in terms for name in term}


def _wrong_values(card: Mapping[str, Any]) -> str | None:
    """A value under needs_where or passes_where that its parameter cannot have."""
    for key in ("needs_where", "passes_where"):
        for name, where in card.get(key, {}).items():
            schema = card["parameters"][name]
            values = ["True", "False"] if schema.get("type") == "boolean" else list(map(str, schema.get("enum", [])))
            if not values:
                return f"CARD[{key!r}] must name parameters with an enum, or booleans. Got {name!r} instead."
            for value in where:
                if value not in values:
                    return f"CARD[{key!r}][{name!r}] must have keys among {', '.join(values)}. Got {value!r} instead."
    return None


def _wrong_kind(card: Mapping[str, Any]) -> str | None:
    """A parameter that is used as a number, or as a list, without being one."""
    schemas = card["parameters"]
    for pair in card.get("at_most", {}).items():
        for name in pair:
            if not _kinds(schemas[name]) or _kinds(schemas[name]) - NUMBERS:
                return f"CARD['at_most'] must name parameters that are numbers. Got {name!r} instead."
    for name in sorted(_in_passes(card) - {"layers"}):
        if not _kinds(schemas[name]) or _kinds(schemas[name]) - {*NUMBERS, "array", "null"}:
            return f"CARD['passes'] must name parameters that are numbers or lists. Got {name!r} instead."
    for name, schema in schemas.items():
        if "trials" in _needs(card) and name in TRIED and _kinds(schema) != {"integer"}:
            return f"CARD['parameters'][{name!r}] must be of type integer: it is a number of sequences."
        of = schema.get("format")
        if of in ("levels", "targets") and ("array" not in _kinds(schema) or _kinds(schema) - {"array", "null"}):
            return f"CARD['parameters'][{name!r}] must be of type array: it has the format {of}."
        items = schema.get("items", {})
        if of == "levels" and not (
            _kinds(items)
            and _kinds(items) <= NUMBERS
            and items.get("minimum", -1) >= 0
            and items.get("maximum", 2) <= MOST
        ):
            return f"CARD['parameters'][{name!r}] must have items that are numbers from 0 to {MOST}."
        if of == "targets" and _kinds(items) != {"object"}:
            return f"CARD['parameters'][{name!r}] must have items of type object, each a target."
    return None


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types of a parameter's values, as far as its schema says."""
    kinds = schema.get("type", [])
    return {kinds} if isinstance(kinds, str) else set(kinds)


def _needs(card: Mapping[str, Any]) -> set[str]:
    """Everything that the allocator needs with some parameters."""
    where = card.get("needs_where", {}).values()
    return {*card["needs"], *(name for values in where for names in values.values() for name in names)}


def _missing(card: Mapping[str, Any], class_name: str, defined: Set[str]) -> str | None:
    """A call that the needs demand and the class does not define."""
    needs = _needs(card)
    calls = [
        ("search(parts, target, trials)", "needs trials", "trials" in needs),
        ("candidates(target)", "needs errors or trials", bool(needs & {"errors", "trials"})),
        ("allocate(parts, target)", "may be without trials", "trials" not in card["needs"]),
    ]
    for call, reason, wanted in calls:
        if wanted and call.partition("(")[0] not in defined:
            return f"{class_name} must define {call}: it {reason}."
    return None
