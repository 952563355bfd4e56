"""Knapsack: the levels with the least sum of measured errors, exactly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from layerwise.allocation.knapsack import choose
from layerwise.contract.allocator import Allocator, Part, Proposal, Target
from layerwise.contract.layer import Method

CARD = {
    "title": "knapsack",
    "needs": ["weight", "gram", "errors"],
    "budgets": ["row", "layer", "n:m", "bits"],
    "splits_equals": "the optimum of two equal layers may be two levels, where the errors are not convex",
    "parameters": {
        "probe": {
            "format": "method",
            "asked": "pruning",
            "description": "Method whose errors are measured at every level, where it prunes.",
        },
        "quantiser": {"format": "method", "asked": "bits", "description": "The same of a target of bits."},
        "levels": {
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 0.99},
            "minItems": 1,
            "uniqueItems": True,
            "description": "Shares of zeros that a layer may get, beside the budget; n:m and bits take all.",
        },
        "errors": {
            "enum": ["relative", "absolute"],
            "description": "relative: output_error. absolute: its numerator, in squared units of the output.",
        },
        "weights": {
            "type": ["object", "null"],
            "additionalProperties": {"type": "number", "minimum": 0},
            "description": "Factor of the errors of layers whose names match a pattern such as '*.down_proj'; the first"
            " that matches counts, others have 1.",
        },
        "resolution": {
            "type": "integer",
            "minimum": 1000,
            "description": "Sums of weights that are told apart at most; models of few sizes of layers need fewer.",
        },
    },
}
MILLION = 1_000_000  # shares of zeros are counted in millionths


@dataclass(frozen=True)
class Knapsack(Allocator):
    """Solves every layer at every level by a cheap method, then picks one level for each by dynamic programming.

    Equal levels are among the choices, so that the sum of errors is never above theirs.
    """

    probe: Method | str = "wanda"
    quantiser: Method | str = "rtn"
    levels: tuple[float, ...] = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
    errors: str = "absolute"
    weights: Mapping[str, float] | None = None
    resolution: int = 200_000

    def candidates(self, target: Target) -> tuple[Method, Sequence[float]]:
        if target.budget == "bits":
            return cast(Method, self.quantiser), [float(bits) for bits in range(2, 9)]
        if target.n_of_m:
            kept, of = target.n_of_m
            return cast(Method, self.probe), [target.level if count == of - kept else count / of for count in range(of)]
        return cast(Method, self.probe), sorted({*map(float, self.levels), target.level})

    def allocate(self, parts: Sequence[Part], target: Target) -> Proposal:
        which = ("absolute", "relative").index(self.errors)
        options = [sorted(part.errors or {}) for part in parts]
        tables = []
        for part, levels in zip(parts, options, strict=True):
            assert part.errors is not None
            factor = self.factor(part.name)
            tables.append([factor * part.errors[level][which] for level in levels])
        unit = target.n_of_m[1] if target.n_of_m else 1 if target.budget == "bits" else MILLION
        share = round(target.level * unit)
        excess = [
            [0 if level == target.level else part.size * (round(level * unit) - share) for level in levels]
            for part, levels in zip(parts, options, strict=True)
        ]
        choice = choose(tables, excess, self.resolution)
        picked = [levels[pick] for levels, pick in zip(options, choice.picks, strict=True)]
        scores = [own[pick] for own, pick in zip(tables, choice.picks, strict=True)]
        equal = math.fsum(own[levels.index(target.level)] for own, levels in zip(tables, options, strict=True))
        return Proposal(tuple(picked), tuple(scores), error=choice.error, uniform_error=equal, bound=choice.bound)

    def factor(self, name: str) -> float:
        """That of the errors of a layer."""
        return next((factor for pattern, factor in (self.weights or {}).items() if fnmatchcase(name, pattern)), 1.0)
