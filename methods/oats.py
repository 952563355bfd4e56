"""OATS: alternate a sparse and a low-rank part on the weight scaled by its inputs (Zhang and Papyan, algorithm 1).

With A = W D, D = diag(sqrt(mean x_j^2)): the low-rank part is the truncated SVD of A - S; then S holds the largest
entries of A minus that part. At the end both are divided by D.
"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import low_rank, ops

CARD = {
    "title": "OATS",
    "paper": "OATS: Outlier-Aware Pruning Through Sparse and Low Rank Decomposition",
    "arxiv": "2409.13652",
    "code": "https://github.com/stephenqz/OATS",
    "patterns": ["row", "n:m"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "sums": True,
    "cost": {"weights": 16.0, "grams": 0.0, "products": 1100.0, "products_per": {"iterations": 13.7}},
    "look": {"colour": "#009E73", "marker": "D"},
    "checks": {"defaults": {"iterations": 8}, "variants": [{"iterations": 80}]},
    "parameters": {
        "iterations": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of alternations between the low-rank and the sparse part.",
        },
    },
}


@dataclass(frozen=True)
class OATS(Method):
    """The last of `iterations` pairs, in float64. Only the Gram's diagonal is used.

    The paper's sparsity s and rank ratio rho are the target {sparsity: 1 - (1 - rho)(1 - s), rank: rho (1 - s)}. A dead
    input, for which the released code divides zero by zero, has no part in the factors; S keeps its weight.
    Precondition: a finite Gram.
    """

    iterations: int = 80

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        weight, gram = ops.in_float64(layer)
        scale = gram.diagonal().clamp(min=0).sqrt()  # [in]
        scaled, rank = weight * scale, target.rank_of(*weight.shape)
        sparse = mask = left = right = torch.zeros_like(weight)
        for _ in range(self.iterations):
            left, right = low_rank.best_factors(scaled - sparse, rank)
            missing = scaled - left @ right
            mask = ops.prune_mask(missing.abs(), target.rest)
            sparse = torch.where(mask, missing, 0.0)
        alive = scale > 0
        divisor = torch.where(alive, scale, 1.0)
        part = torch.where(alive, sparse / divisor, torch.where(mask, weight, 0.0))
        right = torch.where(alive, right / divisor, 0.0)
        return low_rank.of_parts(left, right, Compressed(part.float(), mask))
