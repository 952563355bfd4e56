"""The settings for the checks of methods: targets, and sets of parameters from their cards.

A card's `checks` gives the parameters for the checks if the defaults take minutes or choose one of several paths
through the code. Without it the checks use the defaults, and each value of a parameter that is an enum or a boolean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerwise.contract.method_file import Entry
from layerwise.contract.target import Target

TARGETS = [
    Target(),
    Target(0.5),
    Target(0.7),  # of 64 entries, 44.8 are pruned
    Target(0.5, "layer"),
    Target(pattern="2:4"),
    Target(pattern="3:8"),  # more are pruned than kept
    Target(0.5, "1x16"),
    Target(bits=4, group=128),
    Target(bits=4, group=16),
    Target(bits=3, group=16),
    Target(bits=4, symmetric=True),
    Target(format="nvfp4"),
    Target(format="mxfp4"),
    Target(pattern="2:4", bits=4),
    Target(0.5, bits=4, group=16),
    Target(0.5, "1x16", bits=4, group=16),
    Target(rank=0.5),
    Target(0.5, rank=0.2),
    Target(pattern="2:4", rank=0.2),
    Target(bits=4, group=16, rank=0.2),
    Target(rank=0.5, factor_bits=4, factor_group=16),
    Target(0.5, rank=0.2, factor_bits=3, factor_group=16),
    Target(bits=4, group=16, rank=0.2, factor_bits=4),
]
# One target of each kind, by label: variants of a method are tried here at every change, and `quick` has only these.
ONE_OF_EACH = (
    *("50% row", "50% layer", "2:4", "4b g16", "2:4 4b", "50% 1x16 4b g16"),
    *("rank 50%", "50% row rank 20%", "4b g16 rank 20%"),
    *("rank 50% 4b g16", "4b g16 rank 20% 4b"),
)


def defaults(entry: Entry) -> dict[str, Any]:
    """Changes to the method's defaults for the check of the defaults, such as fewer iterations."""
    return dict(_checks(entry).get("defaults", {}))


def parameter_sets(entry: Entry) -> list[dict[str, Any]]:
    """The changes to the method's defaults for each variant that is tried; `defaults` come first."""
    usual = defaults(entry)
    variants = _checks(entry).get("variants", _listed_values(entry))
    return [usual, *({**changed, **usual, **changed} for changed in variants)]


def _listed_values(entry: Entry) -> list[dict[str, Any]]:
    """Each value that the card lists for a parameter, except its default."""
    found = []
    for key, schema in entry.card["parameters"].items():
        values = schema.get("enum", [False, True] if schema.get("type") == "boolean" else [])
        found += [{key: value} for value in values if value != entry.defaults[key]]
    return found


def has_reference(entry: Entry) -> bool:
    """Whether the method has compiled code whose reference in plain torch must keep the promises too."""
    return bool(_checks(entry).get("reference"))


def no_descent(entry: Entry, params: Mapping[str, Any]) -> str | None:
    """Why the objective of the trace may grow with these parameters, or None."""
    return _checks(entry).get("no_descent") if params == defaults(entry) else None


def known_failure(check: str, entry: Entry, params: Mapping[str, Any], target: Target) -> str | None:
    """Why a check is known to fail for the method, or None. The claims of cards are tested too."""
    known = _checks(entry).get("known_failures", {}).get(check)
    if known is None or params != defaults(entry):
        return None
    return known["reason"] if target.label in known["targets"] else None


def _checks(entry: Entry) -> Mapping[str, Any]:
    return entry.card.get("checks", {})


def more_targets(entry: Entry) -> list[Target]:
    """Targets with widths that the card lists but no target of the battery has."""
    usual = {target.width for target in TARGETS}
    found = []
    for bits in entry.card["bits"]:
        if bits not in usual:
            found += [Target(bits=bits, group=16), Target(pattern="2:4", bits=bits)]
            found += [Target(0.5, pattern, bits=bits, group=16) for pattern in ("row", "layer", "1x16")]
    return [target for target in found if not entry.refusal(target)]
