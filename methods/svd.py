"""SVD: the nearest matrix of a rank, of any inputs; what the data-aware factorisations are measured against."""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import low_rank

CARD = {
    "title": "SVD",
    "patterns": ["low rank"],
    "bits": [],
    "updates_weights": True,
    "needs": [],
    "cost": {"weights": 8.0, "grams": 0.0, "products": 15.0},
    "look": {"colour": "#999933", "marker": "s"},
    "parameters": {},
}


@dataclass(frozen=True)
class SVD(Method):
    """SVD_r(W) in float64, as U and U^T W. No preconditions."""

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        rank = target.rank_of(*layer.weight.shape)
        return low_rank.of_parts(*low_rank.best_factors(layer.weight.double(), rank))
