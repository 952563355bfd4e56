"""TurboQuant on weights: rotate randomly, then round each coordinate to the best levels for a normal variable.

This is Zandieh et al.'s quantiser for the mean squared error. A coordinate of a rotated unit vector of d entries has a
Beta distribution, which is close to N(0, 1/d); the levels are the Lloyd-Max levels of the normal distribution. On
weights it is the scalar case of HIGGS (Malinovskii et al., 2411.17525), without the allocation. It uses no data.
"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Quantised, Rotation, Target
from layerwise.numerics import ops, rotations
from layerwise.numerics.code_books import CodeBook
from layerwise.numerics.lloyd_max import normal_levels

CARD = {
    "title": "TurboQuant",
    "paper": "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate",
    "arxiv": "2504.19874",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8],
    "updates_weights": True,
    "needs": [],
    "own_grid": True,
    "cost": {"weights": 16.0, "grams": 0.8, "products": 6.4},
    "look": {"colour": "#332288", "marker": "^"},
    "checks": {"variants": [{"block": 16, "norm_correction": False}]},
    "parameters": {
        "block": {
            "type": ["integer", "null"],
            "minimum": 2,
            "description": "Longest block of the rotation, as in `rotated`.",
        },
        "rotation_seed": {
            "type": "integer",
            "minimum": 0,
            "maximum": 2147483647,
            "description": "Seed of the rotation's signs.",
        },
        "norm_correction": {
            "type": "boolean",
            "description": "Scale each group so that its norm is preserved; otherwise scale by its norm alone.",
        },
    },
}


@dataclass(frozen=True)
class TurboQuant(Method):
    """Codes of the rotated weight on Lloyd-Max levels, a scale for the norm of each group. No preconditions."""

    block: int | None = 128
    rotation_seed: int = 0
    norm_correction: bool = True

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        assert target.bits is not None  # the card lists only targets with bits
        rotation = Rotation(self.rotation_seed, rotations.block_of(layer.weight.shape[1], self.block))
        weight = rotations.rotate(layer.weight, rotation)
        levels = torch.tensor(normal_levels(target.bits), dtype=torch.float32)
        book, codes, scales = CodeBook(levels), [], []
        for piece in weight.split(target.group or weight.shape[1], 1):
            norm = piece.norm(dim=1, keepdim=True)  # [out, 1]
            unit = torch.where(norm > 0, norm, 1.0)
            codes.append(book.nearest((piece / unit * piece.shape[1] ** 0.5).float()))
            reconstructed = book.values(codes[-1]).double().norm(dim=1, keepdim=True)
            scales.append(norm / (reconstructed if self.norm_correction else piece.shape[1] ** 0.5))
        scale = torch.cat(scales, 1).float()
        levels, zeros = levels.to(weight.device), torch.zeros_like(scale)
        quantised = Quantised(torch.cat(codes, 1), scale, zeros, levels=levels, rotation=rotation)
        return Compressed(ops.quantised_values(quantised, target), quantised=quantised)
