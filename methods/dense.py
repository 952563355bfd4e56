"""The dense model, a control: every other row is read against it."""

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
    "parameters": {},
}


@dataclass(frozen=True)
class Dense(Method):
    """Returns the weight as it is. No preconditions."""

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        return Compressed(layer.weight.clone())
