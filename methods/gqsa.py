"""GQSA, the one-shot part: prune whole blocks of a row by Hessian saliency, and quantise the rest per group.

Zeng et al. The two optimisation stages, BQPO and E2E-OQP, work on blocks and models: see `tune` in the config.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Gram, Layer, Method, Quantised, Target
from layerwise.numerics import ops

CARD = {
    "title": "GQSA",
    "paper": "GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference",
    "arxiv": "2412.17560",
    "patterns": ["1xb"],
    "bits": [2, 3, 4, 5, 6, 7, 8],
    "updates_weights": False,
    "needs": ["gram"],
    "cost": {"weights": 12.9, "grams": 3.7, "products": 2.2},
    "look": {"colour": "#009E73", "marker": "p"},
    "checks": {"variants": [{"damping": 1.0}]},
    "parameters": {
        "damping": {"$ref": "damping"},
    },
}

ROWS = 128  # rows scored at once


@dataclass(frozen=True)
class GQSA(Method):
    """Keeps the blocks with the largest mean of w_ij^2 / [H^-1]_jj^2, the same number in every row, on a min-max grid.

    The paper's grid is asymmetric and has a scale and zero per block, `group` = b of 1xb. A group may also be shorter
    or longer than a block, or a whole row (no group): its grid is fitted to its kept weights. H is the damped Gram; the
    weight of a dead input has no saliency. Precondition: a finite Gram.
    """

    damping: float = 0.01

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        inverse_diagonal, damping = diagonal_of_inverse(layer.gram, self.damping)
        pieces = layer.weight.split(ROWS)  # the scores of a piece stay in cache; blocks compete only within rows
        mask = torch.cat([ops.prune_mask(saliency(rows, inverse_diagonal), target) for rows in pieces])
        kept = torch.where(mask, layer.weight, 0.0)
        if target.bits is None:
            return Compressed(kept, mask, info={"damping": damping})
        # Every range includes zero: pruned weights do not widen it.
        grid, codes, values = ops.fit_and_round(kept, target)
        weight = torch.where(mask, values, 0.0)
        return Compressed(weight, mask, Quantised(codes, grid.scales, grid.zeros), info={"damping": damping})


def diagonal_of_inverse(gram: Gram, damping: float) -> tuple[Tensor, float]:
    """[in] float64 [H^-1]_jj, infinite for dead inputs, and the damping used."""
    factor, used = gram.inverse_factor(damping)
    sums = [rows.double().square_().sum(1) for rows in factor.T.split(ROWS)]  # H^-1 = Ut U
    return torch.cat(sums).masked_fill_(gram.dead, float("inf")), used


def saliency(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """[out, in] float64 w_ij^2 / [H^-1]_jj^2, 0 for dead inputs; float32 would overflow."""
    return weight.double().div_(inverse_diagonal).square_()
