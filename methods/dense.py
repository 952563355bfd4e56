"""The dense model, a control with which all other rows are compared."""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target

CARD = {
    "title": "Dense",
    "patterns": [],
    "bits": [],
    "updates_weights": False,
    "needs": [],
    "control": True,
    "cost": {"weights": 3.0, "grams": 1.5, "products": 0.0},  # guessed
    "look": {"colour": "#000000", "marker": "_"},
    "parameters": {},
}


@dataclass(frozen=True)
class Dense(Method):
    """Returns the weight unchanged. No preconditions."""

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        return Compressed(layer.weight.clone())
