"""Chain: two methods in sequence; one prunes and the other quantises, in either order."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

CARD = {
    "title": "Chain",
    "patterns": ["row", "layer", "n:m", "1xb"],
    "bits": [2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4"],
    "updates_weights": True,
    "needs": ["gram", "mean", "absmean", "sequence_variance", "sample"],
    "joint_only": True,
    "named_by": "chain",
    "cost": {"weights": 10.0, "grams": 3.0, "products": 0.0},  # estimated
    "look": {"colour": "#6699CC", "marker": ">"},
    "checks": {
        "variants": [
            {"chain": ["rtn", "wanda"]},
            {"chain": ["wanda", {"awp": {"rounding": "gradual", "iterations": 20}}]},
        ]
    },
    "parameters": {
        "chain": {
            "type": "array",
            "items": {"format": "method"},
            "minItems": 2,
            "maxItems": 2,
            "description": "Two methods: [wanda, rtn] prunes first, [rtn, wanda] quantises first.",
        },
    },
}


@dataclass(frozen=True)
class Chain(Method):
    """The second method works on what the first returns, and keeps its zeros or its grid exactly.

    Pruned first: the second method sees the pruned weight and its mask (`Layer.keep`), so it minimises the error of
    quantising the pruned layer. Quantised first: the second method chooses the mask on the quantised weight, and the
    codes of pruned weights become the zero point. Preconditions: those of the two methods, and a grid with an exact
    zero.
    Raises ValueError when a pruned weight is not zero on the grid.
    """

    chain: Any = ("wanda", "rtn")

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        first, second = self.chain
        second_quantises = second.refusal(target.grid) is None
        if second_quantises:
            pruned = first.compress(layer, target.pruning, rng)
            result = second.compress(replace(layer, weight=pruned.weight, keep=pruned.mask), target.grid, rng)
        else:
            result = first.compress(layer, target.grid, rng)
            pruned = second.compress(replace(layer, weight=result.weight), target.pruning, rng)
        mask, quantised = pruned.mask, result.quantised
        if not second_quantises:
            zeros = quantised.zeros[:, ops.grouping(quantised, target)].to(torch.uint8)  # [out, in]
            quantised = replace(quantised, codes=torch.where(mask, quantised.codes, zeros))
        weight = ops.quantised_values(quantised, target)
        if bool((weight[~mask] != 0).any()):
            raise ValueError("A chain must keep its zeros on the grid. Got pruned weights that are not zero instead.")
        info = {**pruned.info, **result.info, **ops.damping_of(pruned, result)}
        return replace(result, weight=weight, mask=mask, quantised=quantised, trace=(), info=info)
