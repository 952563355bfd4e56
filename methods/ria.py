"""RIA: a weight's share of its row and of its column, times a power of its input's norm (Zhang et al., ICLR 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

CARD = {
    "title": "RIA",
    "paper": "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    "code": "https://github.com/biomedical-cybernetics/Relative-importance-and-activation-pruning",
    "patterns": ["row", "layer", "n:m", "1xb"],
    "bits": [],
    "updates_weights": False,
    "needs": ["gram"],
    "cost": {"weights": 10.2, "grams": 1.5, "products": 0.9},
    "look": {"colour": "#56B4E9", "marker": "^"},
    "checks": {
        "variants": [],  # official thresholds break promise 2
        "known_failures": {
            "9 brute force": {
                "targets": ["50% row", "70% row", "2:4", "3:8"],
                "reason": "RIA's score is relative to row and column and is not a loss, even if G is diagonal",
            },
        },
    },
    "parameters": {
        "a": {"type": "number", "minimum": 0, "description": "Exponent of the input's norm."},
        "convention": {"$ref": "layer_convention"},
    },
}


@dataclass(frozen=True)
class RIA(Method):
    """Keeps the largest (|W_ij| / column sum + |W_ij| / row sum) * sqrt(G_jj)^a of each comparison group.

    layer is the published comparison group; row is the released code's --per_outneuron. No preconditions; a row or
    column of zeros scores zero.
    """

    a: float = 0.5
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        # In float64, sums of float32 weights do not depend on their order, so ties stay ties.
        magnitude = layer.weight.abs().double()
        score = relative(magnitude, 0)
        score += relative(magnitude, 1)
        del magnitude
        score *= layer.gram.diagonal.double() ** (self.a / 2)
        if self.convention == "official" and target.structure == "layer":
            return ops.masked(layer, ops.official_layer_mask(score, target.sparsity), target)
        return ops.pruned(layer, score, target)


def relative(magnitude: Tensor, dimension: int) -> Tensor:
    """[out, in] share of each entry in its column's (0) or row's (1) sum, zero if that sum is zero."""
    total = magnitude.sum(dimension, keepdim=True)
    return magnitude / torch.where(total > 0, total, 1.0)
