"""Rotated: any quantiser on the layer in rotated coordinates, W X = (W Q)(Q^T X), Q random signs and block Hadamard.

The quantiser sees W Q, Q^T G Q and, if it needs the cross-Gram, Q^T C Q. Outlier inputs are spread over a block
(QuaRot; QuIP; MR-GPTQ). The stored form is its codes, with the seed and block of Q. The error refers to the layer in
its own coordinates.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Rotation, Target, UnsupportedTarget
from layerwise.numerics import ops, rotations

CARD = {
    "title": "Rotated",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4"],
    "updates_weights": True,
    "needs": ["gram"],
    "own_grid": True,
    "cost": {"weights": 22.2, "grams": 3.6, "products": 18.0},
    "look": {"colour": "#882255", "marker": "h"},
    "checks": {"reference": True, "variants": [{"block": 16, "rotation_seed": 5}]},
    "parameters": {
        "under": {
            "format": "method",
            "gives": ["gram", "cross_gram"],
            "description": "Quantiser that sees the rotated layer; it may need only the Gram of the inputs and, for "
            "drift, the cross-Gram.",
        },
        "block": {
            "type": ["integer", "null"],
            "minimum": 2,
            "description": "Longest block: the block is the largest power of two up to this that divides the number of "
            "inputs. null: no limit.",
        },
        "rotation_seed": {
            "type": "integer",
            "minimum": 0,
            "maximum": 2147483647,
            "description": "Seed of the signs. Layers with the same number of inputs share the signs, and so the "
            "rotated Gram.",
        },
    },
}


@dataclass(frozen=True)
class Rotated(Method):
    """The quantiser's result in the layer's own coordinates. Preconditions: those of the quantiser."""

    under: Any = "gptq"
    block: int | None = None
    rotation_seed: int = 0

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        rotation = Rotation(self.rotation_seed, rotations.block_of(layer.weight.shape[1], self.block))
        weight = rotations.rotate(layer.weight, rotation).float()
        statistics, none = layer.statistics, torch.empty(0)  # of the unrotated inputs, so not usable here
        if statistics is not None:
            unknown = {"mean": none, "absmean": none, "sequence_variance": none, "sample": none, "first_tokens": None}
            statistics = replace(statistics, **unknown)
        turned = Layer(layer.name, weight, rotations.rotated_gram(layer.gram, rotation), statistics)
        result = self.under.compress(turned, target, rng)
        if result.quantised.own_grid:
            raise UnsupportedTarget("rotated's under must give integer codes. Got a grid of its own instead.")
        quantised = replace(result.quantised, rotation=rotation)
        values = ops.quantised_values(quantised, target)
        return replace(result, weight=values, quantised=quantised, trace=(), info=ops.damping_of(result))
