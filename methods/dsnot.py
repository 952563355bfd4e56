"""DSnoT: prune and regrow, one swap per row and cycle, until a row's mean output is restored (Zhang et al., 2023).

The expected error of a row is the sum of W_ij * sum_t(x_tj) over its pruned weights. Each cycle regrows the pruned
weight that reduces this error most per unit of variance. It then prunes the kept weight with the smallest Wanda score
whose removal also reduces the error.
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
        "skip": {
            "type": "string",
            "description": "Layers whose names contain this keep the warm start's mask; '': none.",
        },
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: threshold in units of the norm of the row's W_ij mean_j; returns the best state. "
            "official: absolute threshold; returns the last state.",
        },
    },
}


@dataclass(frozen=True)
class DSnoT(Method):
    """Refines the mask of `warm_start`; n:m masks within their groups. Precondition: `layer.statistics`.

    trace: the loss on the mean activation alone, ||(W - W_hat) mean||^2. In the released code a finished row still
    moves its pointers and resets the entries that they reach, which can break the pattern. Here a row that is finished
    or out of swaps stops.
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
