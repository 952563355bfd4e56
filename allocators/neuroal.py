"""NeuroAL: prune more with depth, by the width that changes activations least (Cunegatti et al.)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from layerwise.allocation.budget import held
from layerwise.contract.allocator import Allocator, Candidate, Part, Proposal, Target, Trials
from layerwise.contract.layer import Method

CARD = {
    "title": "NeuroAL",
    "paper": "Zeroth-Order Adaptive Neuron Alignment Based Pruning without Re-Training",
    "arxiv": "2411.07066",
    "code": "https://github.com/eliacunegatti/NeuroAL",
    "needs": ["trials"],
    "budgets": ["row", "layer"],
    "passes": [["windows"], ["widths", "windows"]],
    "parameters": {
        "probe": {
            "format": "method",
            "asked": "pruning",
            "description": "Method that prunes the model for every width, on the dense Grams.",
        },
        "widths": {
            "type": ["array", "null"],
            "items": {"type": "number", "minimum": 0, "maximum": 0.5},
            "minItems": 1,
            "uniqueItems": True,
            "description": "Values of lambda. The last block's level is 2 lambda above the first's. null: the paper's "
            "values: 0.01 to 0.1 in steps of 0.01, 0.12, 0.15, 0.2, and below 80% also 0.25.",
        },
        "windows": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of calibration sequences for the activations.",
        },
    },
}
WIDTHS = (*(number / 100 for number in range(1, 11)), 0.12, 0.15, 0.2)
WIDEST, BELOW = 0.25, 0.8  # the widest lambda, and the budget below which the paper tries it
LIMITS = (0.01, 0.99)


@dataclass(frozen=True)
class NeuroAL(Allocator):
    """Prunes the model by schedules that rise with depth, and takes the one that changes the activations least.

    It compares the norms of every layer's inputs, as shares of their sum, in the dense and the pruned model. Only the
    paper's block stage is implemented, because a layer has one level for all rows.
    """

    probe: Method | str = "wanda"
    widths: tuple[float, ...] | None = None
    windows: int = 8

    def candidates(self, target: Target) -> tuple[Method, Sequence[Candidate]]:
        return cast(Method, self.probe), ()

    def search(self, parts: Sequence[Part], target: Target, trials: Trials) -> Proposal:
        sizes, dense = [part.size for part in parts], trials.profiles([None] * len(parts), self.windows)
        best: tuple[float, list[float], list[float]] | None = None
        usual = (*WIDTHS, WIDEST) if target.level < BELOW else WIDTHS
        for width in usual if self.widths is None else self.widths:
            levels = held(self.schedule(parts, target, width), sizes, target)
            pruned = trials.profiles(levels, self.windows)
            apart = [distance(*pair) for pair in zip(dense, pruned, strict=True)]
            if math.isfinite(sum(apart)) and (best is None or sum(apart) < best[0]):
                best = sum(apart), levels, apart
        if best is None:
            raise ValueError("no width gives finite activations")
        return Proposal(tuple(best[1]), tuple(best[2]))

    def schedule(self, parts: Sequence[Part], target: Target, width: float) -> list[float]:
        """The level of each layer: a line over the blocks around the budget."""
        blocks = sorted({part.block for part in parts})
        line = np.linspace(-width, width, len(blocks)) if len(blocks) > 1 else np.zeros(1)
        of_block = dict(zip(blocks, np.clip(target.level + line, *LIMITS).tolist(), strict=True))
        return [of_block[part.block] for part in parts]


def distance(dense: NDArray[np.float64], pruned: NDArray[np.float64]) -> float:
    """Norm of the difference of two profiles of norms [in], each divided by its sum unless it is zero."""
    one, other = (own / (own.sum() or 1.0) for own in (dense, pruned))
    return float(np.linalg.norm(one - other))
