"""3BASiL: sparse plus low rank by ADMM with three blocks (Makni et al., NeurIPS 2025, algorithm 1).

In coordinates in which every input has norm one: B solves the damped least squares for W minus the low-rank part,
pulled towards D. The low-rank part is the best one for W - B. D is the projection of B plus the multiplier on the
pattern.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import low_rank, ops

CARD = {
    "title": "3BASiL",
    "paper": "3BASiL: An Algorithmic Framework for Sparse plus Low-Rank Compression of LLMs",
    "code": "https://github.com/mazumder-lab/3BASiL",
    "patterns": ["row", "layer", "n:m"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "sums": True,
    "cost": {"weights": 24.0, "grams": 9.5, "products": 7000.0, "products_per": {"iterations": 3.5}},
    "look": {"colour": "#CC79A7", "marker": "D"},
    "checks": {"defaults": {"iterations": 60}, "variants": [{"iterations": 10, "rho": 1.0}]},
    "parameters": {
        "rho": {"$ref": "penalty", "description": "First penalty on B - D."},
        "iterations": {"type": "integer", "minimum": 1, "description": "Largest number of updates of B."},
        "damping": {
            "$ref": "damping",
            "description": "Added to the Gram's diagonal twice: as a share of its mean, and as a share of each entry.",
        },
    },
}
LOOK = 10  # iterations between two checks of the support
GROWTH = ((0.1, 1.1), (0.005, 1.05), (0.0, 1.02))  # (share of the support that changes, growth factor of the penalty)


@dataclass(frozen=True)
class ThreeBASiL(Method):
    """The projection of the last B, and the low-rank part for the previous B, as in the released code.

    The truncated SVDs are exact here. They are randomised in the released code, whose results differ by up to 9%
    between seeds. layer: the published choice. No preconditions: the damping makes any finite Gram positive definite.
    """

    rho: float = 0.1
    iterations: int = 2000
    damping: float = 0.005

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        (weight, gram), rank = ops.in_float64(layer), target.rank_of(*layer.weight.shape)
        mean = float(gram.diagonal().mean()) or 1.0
        damped = gram / mean + torch.diag(self.damping * (1 + gram.diagonal() / mean))
        norm = damped.diagonal().sqrt()  # [in]
        damped = damped / norm / norm[:, None]
        values, vectors = layer.gram.once(("3basil", self.damping), lambda: torch.linalg.eigh(damped))
        dense, unit = weight * norm, float(weight.abs().max()) or 1.0
        dense = dense / unit

        mask = seen = ops.prune_mask(dense.abs(), target.rest)
        kept, rho, moved = int(mask.sum()), self.rho, False
        start = split = dense * mask
        dual, current = torch.zeros_like(dense), dense
        inverse, root = vectors / (values + rho) @ vectors.T, vectors * values.clamp(min=0).sqrt()
        left, right = correction(dense - split, root, rank)
        for iteration in range(1, self.iterations + 1):
            current = ((dense - left @ right) @ damped - dual + rho * split) @ inverse
            left, right = correction(dense - current, root, rank)
            split = current + dual / rho
            mask = ops.prune_mask(split.abs(), target.rest)
            split = split * mask
            dual = dual + rho * (current - split)
            if iteration % LOOK:
                continue
            changed, seen = int((mask != seen).sum()), mask
            if changed:
                moved = True
                rho *= next(factor for share, factor in GROWTH if changed > share * kept)
            elif moved:
                break
            else:  # the penalty freezes the initial support: restart with a smaller penalty
                rho, split, dual = rho / 5, start, torch.zeros_like(dense)
            inverse = vectors / (values + rho) @ vectors.T
        mask = ops.prune_mask(current.abs(), target.rest)
        part = Compressed((torch.where(mask, current / norm, 0.0) * unit).float(), mask)
        return low_rank.of_parts(left, right / norm * unit, part, {"damping": self.damping})


def correction(missing: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors [out, r], [r, in] of the missing part [out, in], for the Gram L L^T with a root L [in, in]."""
    left = low_rank.leading(missing @ root, rank)
    return left, left.T @ missing
