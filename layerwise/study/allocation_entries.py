"""The entries of a config's `allocations`: allocators, their parameters and possible targets. Does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.allocation.pairs import pairs_of
from layerwise.allocation.shares import WIDTHS, levels_of
from layerwise.contract.allocator_card import MOST, TRIED
from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.method_file import CatalogueError, Entry
from layerwise.contract.target import JOINT, LOW_RANK, SUM, Target
from layerwise.runtime.errors import InputError
from layerwise.storage.bits_per_weight import bits_per_weight
from layerwise.study.method_entries import MethodEntry, in_config

UNIFORM = "uniform"  # the default allocation and its allocator
NOMINAL = 4096  # rows and inputs of a layer for which the bits of pairs are compared
USUALLY_TRIED = 14  # levels at which an allocator solves each layer, if its card does not tell
ASKED = {
    "bits": "bits",
    JOINT: "both",
    LOW_RANK: "low rank",
    SUM: "sums",
}  # budget -> `asked` of its method; or pruning


@dataclass(frozen=True)
class AllocationEntry:
    """An entry of the config's `allocations`, with complete parameters."""

    name: str
    allocator: str
    params: Mapping[str, Any]


def read_allocations(full: Mapping[str, Any], methods: Catalogue) -> tuple[Catalogue, list[AllocationEntry]]:
    """The allocators that the config may name, and its entries; without entries, only that of equal levels.

    Raises InputError for an unknown allocator or parameter.
    """
    given = full.get("allocations") or {UNIFORM: None}
    try:
        catalogue = Catalogue([Path(folder) for folder in full.get("allocator_paths", [])], ALLOCATOR, methods)
        entries = [_entry(catalogue, name, raw or {}) for name, raw in given.items()]
    except CatalogueError as error:
        raise in_config(error) from None
    for entry in entries:
        if "trials" in catalogue[entry.allocator].needs(entry.params):
            _check_windows(entry, full["calibration"])
    return catalogue, entries


def _check_windows(entry: AllocationEntry, calibrations: Mapping[str, Any]) -> None:
    """Raise InputError if an allocator tries the model on more sequences than a calibration set has."""
    for key in TRIED:
        for name, calibration in calibrations.items():
            if entry.params.get(key, 0) > calibration["samples"]:
                raise InputError(
                    f"allocations.{entry.name}.{key} must be at most the {calibration['samples']} samples of "
                    f"calibration.{name}. Got {entry.params[key]} instead."
                )


def _entry(catalogue: Catalogue, name: str, raw: Mapping[str, Any]) -> AllocationEntry:
    where, allocator = f"allocations.{name}", raw.get("allocator", name)
    params = catalogue.complete(allocator, {key: own for key, own in raw.items() if key != "allocator"}, where)
    if (allocator == UNIFORM) != (name == UNIFORM):
        raise CatalogueError(f"{where}: the allocation {UNIFORM} must use the allocator {UNIFORM}.")
    for key, other in catalogue[allocator].card.get("at_most", {}).items():
        if params[key] > params[other]:
            raise CatalogueError(
                f"{where}.{key} must be at most its {other}, {params[other]}. Got {params[key]} instead."
            )
    return AllocationEntry(name, allocator, params)


def asked_params(entry: Entry, params: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """An allocator's complete parameters without the methods that this target does not ask for.

    They decide no level, so they enter neither the identity nor the code nor the cost of an allocation.
    """
    asked = ASKED.get(target.budget, "pruning")
    schemas = entry.card["parameters"]
    unused = {key for key in (*entry.warm_starts, *entry.chains) if schemas[key].get("asked", asked) != asked}
    return {key: value for key, value in params.items() if key not in unused}


def options_tried(entry: Entry, params: Mapping[str, Any], target: Target) -> int:
    """Number of targets or levels at which an allocator solves each layer, the budget's included."""
    formats = {schema.get("format"): key for key, schema in entry.card["parameters"].items()}
    if target.paired:
        return len(pairs_of(params[formats["targets"]], target)) if "targets" in formats else USUALLY_TRIED
    return len(levels_of(params[formats["levels"]], target)) if "levels" in formats else USUALLY_TRIED


def spread_refusal(
    allocators: Catalogue, methods: Catalogue, allocation: AllocationEntry, entry: MethodEntry, target: Target
) -> str | None:
    """Why an allocation's levels cannot be used for a method's layers at a target, or None."""
    if allocation.name == UNIFORM:
        return None
    card, budget = allocators[allocation.allocator].card, target.budget
    if budget not in card["budgets"]:
        return f"{allocation.allocator} spreads a budget of {', '.join(card['budgets'])}, not of {budget}"
    if target.sparsity > MOST:
        return f"a budget of zeros must be at most {MOST:.0%}"
    if _at_limit(target):
        return f"only equal levels meet {target.label}, the limit of every layer"
    if target.format and target.sparsity:
        return f"{allocation.allocator} spreads pairs of sparsity and bits, not those of {target.format}"
    if entry.tune:
        return "tuning needs one target for all layers"
    if budget == "bits":
        reasons = [methods.refusal(entry.method, entry.params, target.at(bits)) for bits in WIDTHS]
        if reason := next(filter(None, reasons), None):
            return f"{allocation.allocator} may ask for any width from 2 to 8: {reason}"
    allocator = allocators[allocation.allocator]
    probes = allocator.inner(asked_params(allocator, allocation.params, target))
    for key, name, params in probes:
        if "fisher" in methods.needs(name, params):
            return f"its {key} cannot be used: {name} needs the fisher of the dense model, which no allocation collects"
        for own in [target.at(bits) for bits in WIDTHS] if budget == "bits" else [target]:
            if reason := methods.refusal(name, params, own):
                return f"its {key} cannot be used: {reason}"
    if target.paired:
        return _pairs_refusal(allocators, methods, allocation, entry, target, probes)
    return _levels_refusal(allocator, allocation, target)


def _at_limit(target: Target) -> bool:
    """Whether no layer can give what another one gets: the budget is the least or the most that any layer may have."""
    if target.paired:
        return False
    if target.budget == "bits":
        return target.bits in (WIDTHS[0], WIDTHS[-1])
    return target.n_of_m[0] == 1 if target.n_of_m else target.sparsity == MOST


def _levels_refusal(allocator: Entry, allocation: AllocationEntry, target: Target) -> str | None:
    """Why only equal levels would meet the budget, or None: no layer can give what another one gets."""
    for key, schema in allocator.card["parameters"].items():
        if schema.get("format") == "levels":
            levels = levels_of(allocation.params[key], target)
            if levels[0] == target.level or levels[-1] == target.level:
                side = "below" if levels[0] == target.level else "above"
                return f"{allocation.allocator} must try levels below and above {target.label}, and has none {side} it"
    return None


def _pairs_refusal(
    allocators: Catalogue,
    methods: Catalogue,
    allocation: AllocationEntry,
    entry: MethodEntry,
    target: Target,
    probes: Sequence[tuple[str, str, Mapping[str, Any]]],
) -> str | None:
    """Why a layer cannot get one of the pairs that an allocation may choose, or None."""
    for key, schema in allocators[allocation.allocator].card["parameters"].items():
        if schema.get("format") != "targets":
            continue
        try:
            pairs = pairs_of(allocation.params[key], target)
        except ValueError as error:
            return str(error).rstrip(".")
        for pair in pairs:
            if reason := methods.refusal(entry.method, entry.params, pair):
                return f"{allocation.allocator} may ask for {pair.label}: {reason}"
            for probe, name, params in probes:
                if reason := methods.refusal(name, params, pair):
                    return f"its {probe} cannot reach {pair.label}: {reason}"
        own, *bits = [bits_per_weight(pair, 1 - pair.sparsity, NOMINAL, NOMINAL) for pair in pairs]
        if not any(one < own for one in bits) or not any(one > own for one in bits):
            side = "more" if any(one < own for one in bits) else "fewer"
            return (
                f"its {key} must have some of fewer bits than {target.label} and some of more, and have none of {side}"
            )
    return None
