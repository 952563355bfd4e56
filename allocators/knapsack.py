"""Knapsack: the levels with the exact minimum of the sum of measured errors."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

from layerwise.allocation.knapsack import DOWN, NEAREST, UP, choose
from layerwise.allocation.pairs import pairs_of
from layerwise.allocation.shares import levels_of
from layerwise.contract.allocator import Allocator, Candidate, Part, Proposal, Target, Trials
from layerwise.contract.layer import Method
from layerwise.contract.target import JOINT, LOW_RANK
from layerwise.storage.target_bits import bits_of

CARD = {
    "title": "knapsack",
    "needs": ["weight", "gram", "errors"],
    "needs_where": {"errors": {"divergence": ["trials"]}},
    "budgets": ["row", "layer", "n:m", "bits", "pruned and quantised", "low rank", "sum of parts"],
    "passes": [["layers", "windows"]],
    "passes_where": {"divergences": {"levels": [["layers", "levels", "windows"]]}},
    "splits_equals": "the optimum of two equal layers may be two different levels if the errors are not convex",
    "parameters": {
        "probe": {
            "format": "method",
            "asked": "pruning",
            "description": "Method whose errors are measured at every level, if the target prunes.",
        },
        "quantiser": {"format": "method", "asked": "bits", "description": "The same for a target with bits."},
        "joint": {
            "format": "method",
            "asked": "both",
            "description": "The same for a target that prunes and quantises.",
        },
        "factors": {"format": "method", "asked": "low rank", "description": "The same for a target with factors."},
        "sums": {
            "format": "method",
            "asked": "sums",
            "description": "The same for a target with factors and another part.",
        },
        "levels": {
            "type": ["array", "null"],
            "format": "levels",
            "items": {"type": "number", "minimum": 0, "maximum": 0.99},
            "minItems": 1,
            "maxItems": 200,
            "uniqueItems": True,
            "description": "Shares of zeros that a layer may get besides the budget, some below it and some above; n:m "
            "patterns and bits use all levels. null: 30 to 90% in steps of 5%, also 0 to 25% for budgets below 45%, "
            "and 95 and 99% for budgets above 80%.",
        },
        "pairs": {
            "type": ["array", "null"],
            "format": "targets",
            "items": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": False,
                "properties": {
                    "sparsity": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                    "pattern": {"type": "string"},
                    "bits": {"type": "integer", "minimum": 2, "maximum": 8},
                    "group": {"type": "integer", "minimum": 1},
                    "symmetric": {"type": "boolean"},
                    "rank": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
                },
            },
            "minItems": 1,
            "maxItems": 200,
            "description": "Targets that a layer may get besides the budget's, if that prunes and quantises or has a "
            "rank. A pair inherits pattern, group, symmetric and rank from the budget unless it gives its own. null: "
            "if the target prunes, 30 to 80% in steps of 10%, or all counts of an n:m pattern; if it quantises, 2, 3, "
            "4, 6 and 8 bits; and 0.4 to 1.6 times a rank in steps of 0.2.",
        },
        "errors": {
            "enum": ["relative", "absolute", "divergence"],
            "description": "relative: output_error. absolute: its numerator, in squared units of the output. "
            "divergence: KL from the dense model on calibration text, with each layer compressed alone.",
        },
        "divergences": {
            "enum": ["budget", "levels"],
            "description": "Levels at which KL is measured. budget: only at the budget; other levels are scaled by the "
            "absolute error. levels: at every level.",
        },
        "windows": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of calibration sequences over which KL is averaged.",
        },
        "weights": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "number", "minimum": 0},
            "description": "Factor for the errors of layers whose names match a pattern such as '*.down_proj'. The "
            "longest matching pattern counts; layers without a match have factor 1, and a pattern must match a layer.",
        },
        "resolution": {
            "type": "integer",
            "minimum": 1000,
            "description": "Largest number of distinct sums of weights; models with few layer sizes need fewer.",
        },
    },
}
MILLION = 1_000_000  # shares of zeros are counted in millionths


@dataclass(frozen=True)
class Knapsack(Allocator):
    """Solves every layer at every level by a cheap method, then picks one level per layer by dynamic programming.

    Equal levels are one of the choices, so the sum of errors is never above theirs.
    """

    probe: Method | str = "wanda"
    quantiser: Method | str = "rtn"
    joint: Method | str = "chain"
    factors: Method | str = "svd_llm"
    sums: Method | str = "oats"
    levels: Any = None
    pairs: Any = None
    errors: str = "absolute"
    divergences: str = "budget"
    windows: int = 8
    weights: Mapping[str, float] | None = None
    resolution: int = 200_000

    def candidates(self, target: Target) -> tuple[Method, Sequence[Candidate]]:
        if target.paired:
            method = {JOINT: self.joint, LOW_RANK: self.factors}.get(target.budget, self.sums)
            return cast(Method, method), pairs_of(self.pairs, target)
        method = self.quantiser if target.budget == "bits" else self.probe
        return cast(Method, method), levels_of(self.levels, target)

    def allocate(self, parts: Sequence[Part], target: Target) -> Proposal:
        which = ("absolute", "relative").index(self.errors)
        tables = [{option: own[which] for option, own in errors_of(part).items()} for part in parts]
        return self._choose(parts, target, tables)

    def search(self, parts: Sequence[Part], target: Target, trials: Trials) -> Proposal:
        """As `allocate`, but a layer's error is the divergence that results when it is compressed alone.

        Options whose divergence is infinite are left out, and stderr says so. Raises ValueError if it is at the budget.
        """
        equal = budget_of(target)

        def alone(place: int, option: Candidate) -> float:
            return trials.divergence([option if i == place else None for i in range(len(parts))], self.windows)

        tables = list[Mapping[Candidate, float]]()
        for place, part in enumerate(parts):
            errors = {option: absolute for option, (absolute, _) in errors_of(part).items()}
            caused = 0.0 if self.divergences == "levels" else alone(place, equal)
            if caused > 0 and errors[equal] > 0:
                found = {option: caused / errors[equal] * error for option, error in errors.items()}
            else:  # a budget without an error gives no proportion
                found = {option: alone(place, option) for option in errors}
            if not math.isfinite(found[equal]):
                raise ValueError(
                    f"the divergence of {part.name} at the budget must be finite. Got {found[equal]} instead"
                )
            for option in (own for own, error in found.items() if not math.isfinite(error)):
                print(
                    f"{part.name} does not get {target_of(option, target).label}: infinite divergence", file=sys.stderr
                )
            tables.append({option: error for option, error in found.items() if math.isfinite(error)})
        return self._choose(parts, target, tables)

    def _choose(self, parts: Sequence[Part], target: Target, errors: Sequence[Mapping[Candidate, float]]) -> Proposal:
        """errors: the error of each part at each of its options. Raises ValueError for weights of no layer."""
        for pattern in self.weights or {}:
            if not any(fnmatchcase(part.name, pattern) for part in parts):
                raise ValueError(f"weights must match names of layers such as {parts[0].name}. Got {pattern!r} instead")
        options, equal = [list(own) for own in errors], budget_of(target)
        factors = [self.factor(part.name) for part in parts]
        tables = [[factor * error for error in own.values()] for factor, own in zip(factors, errors, strict=True)]
        excess = [excess_of(part, own, target) for part, own in zip(parts, options, strict=True)]
        # With coarse sums, bits and n:m counts never exceed the budget; shares are shifted to it afterwards.
        rounding = UP if target.budget == "bits" else DOWN if target.n_of_m else NEAREST
        choice = choose(tables, excess, self.resolution, target.paired, rounding)
        picked = [own[pick] for own, pick in zip(options, choice.picks, strict=True)]
        scores = tuple(own[pick] for own, pick in zip(tables, choice.picks, strict=True))
        uniform = math.fsum(own[names.index(equal)] for own, names in zip(tables, options, strict=True))
        pairs = tuple(own for own in picked if isinstance(own, Target))
        levels = tuple(own for own in picked if not isinstance(own, Target))
        return Proposal(
            levels, scores, pairs=pairs or None, error=choice.error, uniform_error=uniform, bound=choice.bound
        )

    def factor(self, name: str) -> float:
        """The factor for a layer's errors."""
        # Not the first match: the order of a config's keys is not part of a cell's identity.
        given = self.weights or {}
        matching = [pattern for pattern in given if fnmatchcase(name, pattern)]
        return given[max(matching, key=lambda pattern: (len(pattern), pattern))] if matching else 1.0


def errors_of(part: Part) -> Mapping[Candidate, tuple[float, float]]:
    """The errors of each option, in the order of the options."""
    assert part.errors is not None
    return part.errors


def budget_of(target: Target) -> Candidate:
    """The option that gives a layer's share of the budget."""
    return target if target.paired else target.level


def target_of(option: Candidate, target: Target) -> Target:
    """The target that a layer gets by an option."""
    return option if isinstance(option, Target) else target.at(option)


def excess_of(part: Part, options: Sequence[Candidate], target: Target) -> list[int]:
    """The amount by which each option exceeds the layer's share: weights in some unit, or stored bits."""
    unit = target.n_of_m[1] if target.n_of_m else 1 if target.budget == "bits" else MILLION
    share, shape = round(target.level * unit), (part.out, part.inputs)
    found = []
    for option in options:
        if isinstance(option, Target):
            found.append(bits_of(option, *shape) - bits_of(target, *shape))
        else:
            found.append(0 if option == target.level else part.size * (round(option * unit) - share))
    return found
