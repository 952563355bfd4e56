"""Random pruning, a control: the cost of a pattern if nothing is known about the weights."""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

CARD = {
    "title": "Random",
    "patterns": ["row", "layer", "n:m", "1xb"],
    "bits": [],
    "updates_weights": False,
    "needs": [],
    "control": True,
    "random": True,
    "cost": {"weights": 6.5, "grams": 2.8, "products": 0.5},
    "look": {"colour": "#8c8c8c", "marker": "x"},
    "parameters": {},
}


@dataclass(frozen=True)
class Random(Method):
    """Keeps uniformly random weights of each comparison group. No preconditions."""

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        score = torch.rand(layer.weight.shape, generator=rng, device=rng.device).to(layer.weight.device)
        return ops.pruned(layer, score, target)
