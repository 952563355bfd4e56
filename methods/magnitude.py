"""Magnitude pruning: prune the smallest |W|."""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

CARD = {
    "title": "Magnitude",
    "paper": "Learning both Weights and Connections for Efficient Neural Networks",
    "arxiv": "1506.02626",
    "patterns": ["row", "layer", "n:m", "1xb"],
    "bits": [],
    "updates_weights": False,
    "needs": [],
    "cost": {"weights": 5.9, "grams": 3.4, "products": 0.2},
    "look": {"colour": "#E69F00", "marker": "o"},
    "checks": {"reference": True, "variants": []},  # official thresholds break promise 2
    "parameters": {"convention": {"$ref": "layer_convention"}},
}


@dataclass(frozen=True)
class Magnitude(Method):
    """Keeps the largest |W| of each comparison group. No preconditions."""

    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        if self.convention == "official" and target.structure == "layer":
            return ops.masked(layer, ops.official_layer_mask(layer.weight.abs(), target.sparsity), target)
        return ops.pruned_by_norm(layer, torch.ones_like(layer.weight[0]), target)
