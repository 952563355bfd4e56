"""DSnoT: prune and regrow, one swap per row and cycle, until a row's mean output is what it was (Zhang et al., 2023).

The expected error of a row is the sum of W_ij * sum_t(x_tj) over its pruned weights. Each cycle regrows the pruned one
that reduces it most per unit of variance, and prunes the kept weight of smallest Wanda score whose loss reduces it too.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops
from layerwise.numerics.regrowing import Rule, refine

CARD = {
    "title": "DSnoT",
    "paper": "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
    "arxiv": "2310.08915",
    "code": "https://github.com/zyxxmu/DSnoT",
    "patterns": ["row", "n:m"],
    "bits": [],
    "updates_weights": False,
    "needs": ["gram", "mean", "sequence_variance"],
    "criterion": "own",
    "cost": {"weights": 5.9, "grams": 1.7, "products": 0.5},
    "look": {"colour": "#332288", "marker": "D"},
    "checks": {"reference": True, "variants": [{"warm_start": "sparsegpt", "cycles": 5}]},
    "parameters": {
        "warm_start": {"$ref": "mask_warm_start"},
        "cycles": {"type": "integer", "minimum": 0, "description": "Largest number of swaps per row."},
        "threshold": {"type": "number", "minimum": 0, "description": "|expected error| at which a row is done."},
        "power": {"type": "number", "minimum": 0, "description": "Exponent of the variance in the regrowing score."},
        "skip": {"type": "string", "description": "Layers with this in the name keep the warm start's mask; '': none."},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: threshold in norms of the row's W_ij mean_j, best state. official: absolute, last.",
        },
    },
}


@dataclass(frozen=True)
class DSnoT(Method):
    """Refines the mask of `warm_start`, n:m within its groups. Precondition: `layer.statistics`.

    trace: the loss on the mean activation alone, ||(W - W_hat) mean||^2. In the released code a row that is done still
    moves its pointers and resets what they meet, which can break the pattern; here it, or one out of swaps, rests.
    """

    warm_start: Any = "wanda"
    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    skip: str = "mlp"
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        if layer.statistics is None:
            raise ValueError(f"dsnot needs mean and sequence_variance, but {layer.name} has no statistics.")
        began = time.perf_counter()
        warm = self.warm_start.compress(layer, target, rng)
        start, info = warm.mask, ops.damping_of(warm)
        if self.skip and self.skip in layer.name:
            return replace(ops.masked(layer, start, target), info=info)
        group_size = target.n_of_m[1] if target.n_of_m else 0
        rule = Rule(self.cycles, self.threshold, self.power, self.convention == "exact", group_size)
        mask, trace = refine(layer, layer.statistics, start, rule)
        trace = tuple((t, at - began, loss) for t, at, loss in trace)
        return replace(ops.masked(layer, mask, target), trace=trace, info=info)
