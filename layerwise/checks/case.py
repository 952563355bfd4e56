"""A method at a target, as the contract's checks see it, and the exception that a failed check raises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerwise.checks import settings
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.contract.method_file import Entry
from layerwise.numerics import dispatch


class Finding(AssertionError):
    """A broken promise: the layer that shows it, the expected result and the actual one."""

    def __init__(self, layer: str, expected: str, came: object) -> None:
        super().__init__(f"{layer}: {expected}. Got {came} instead.")
        self.layer = layer
        self.expected = expected
        self.came = str(came)


class NothingToCheck(Exception):
    """Raised with the reason why a check does not apply to a case."""


def demand(holds: object, layer: str, expected: str, came: object) -> None:
    """Raise a Finding unless it holds. expected: "X must be Y", without the full stop."""
    if not holds:
        raise Finding(layer, expected, came)


@dataclass(frozen=True)
class Case:
    """A method, constructed, at a target."""

    entry: Entry
    method: Method
    target: Target
    params: Mapping[str, Any]  # changes to the defaults
    plain: bool = False  # whether to run plain torch instead of compiled code

    @property
    def variant(self) -> bool:
        """Whether it differs from the defaults that a study uses."""
        return self.plain or self.params != settings.defaults(self.entry)

    @property
    def refusal(self) -> str | None:
        """One sentence saying why the method, or its warm start, cannot reach the target, or None."""
        return self.entry.refusal(self.target) or _refusal_inside(self.method, self.entry.card, self.target)

    @property
    def label(self) -> str:
        changed = ",".join(f"{key}={value}" for key, value in self.params.items())
        name = f"{self.entry.name}({changed})" if changed else self.entry.name
        return f"{name} in torch" if self.plain else name

    def compress(self, layer: Layer, seed: int = 0) -> Compressed:
        with dispatch.reference() if self.plain else contextlib.nullcontext():
            result = self.method.compress(layer, self.target, torch.Generator().manual_seed(seed))
        came = type(result).__name__
        demand(isinstance(result, Compressed), layer.name, "a method's result must be a Compressed", came)
        return result


def _refusal_inside(method: Method, card: Mapping[str, Any], target: Target) -> str | None:
    """Why a warm start of the method, or one inside that, cannot reach its part of the target, or None."""
    for key, schema in card["parameters"].items():
        start, asked = getattr(method, key), schema.get("asked")
        # an optional warm start may be None
        if schema.get("format") != "method" or not start or asked not in (None, "rest", "unrounded"):
            continue
        part = target if asked is None else getattr(target, asked)
        if reason := start.refusal(part) or _refusal_inside(start, start._card, part):
            return f"its {key} cannot be used: {reason}"
    return None


def cases(catalogue: Catalogue) -> Iterator[Case]:
    """Cases for every method of the catalogue, with every set of parameters, at every target."""
    for name in catalogue:
        yield from cases_of(catalogue, name, settings.parameter_sets(catalogue[name]), settings.TARGETS)


def cases_of(
    catalogue: Catalogue, name: str, variants: Sequence[Mapping[str, Any]], targets: Sequence[Target]
) -> Iterator[Case]:
    """A method of the catalogue with each of these sets of parameters at each target."""
    entry = catalogue[name]
    for params in variants:
        method = catalogue.build(name, catalogue.complete(name, params, "the contract tests"))
        both = settings.has_reference(entry) and params == settings.defaults(entry)
        for target in targets:
            case = Case(entry, method, target, params)
            yield case
            if both and not case.refusal:
                yield replace(case, plain=True)
