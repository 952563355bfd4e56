"""Round to nearest on a min-max grid, per row or per group of inputs (the baseline of the GPTQ paper)."""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

CARD = {
    "title": "RTN",
    "paper": "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "arxiv": "2210.17323",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4"],
    "updates_weights": True,
    "needs": [],
    "keeps_zeros": True,
    "cost": {"weights": 9.6, "grams": 1.6, "products": 0.2},
    "look": {"colour": "#E69F00", "marker": "X"},
    "checks": {"reference": True},
    "parameters": {"mse": {"$ref": "mse"}},
}


@dataclass(frozen=True)
class RTN(Method):
    """Rounds each weight to its group's grid. No preconditions."""

    mse: bool = False

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        return ops.round_to_nearest(layer.weight, target, self.mse)
