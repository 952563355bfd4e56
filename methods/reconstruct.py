"""Reconstruct: the best weights for another method's mask; this separates the effect of the mask from the update's.

For each row with kept inputs S: minimise (w - W) G (w - W)t + damping |w - W|^2 with w zero outside S. The solution is
W_S + (G_SS + damping I)^-1 (G W')_S, where W' is the pruned part. Damping pulls towards W, not towards zero, so it
makes no row worse.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from layerwise.contract.cholesky import cholesky_in_place
from layerwise.contract.gram import DAMPING_GROWTH, LARGEST_DAMPING
from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

CARD = {
    "title": "Reconstruct",
    "patterns": ["row", "layer", "n:m", "1xb"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "cost": {"weights": 18.0, "grams": 10.2, "products": 16.0},
    "look": {"colour": "#999933", "marker": "v"},
    "checks": {"variants": [{"mask_from": "ria", "damping": 0.01}]},
    "parameters": {
        "mask_from": {"format": "method", "description": "Method that gives the mask."},
        "damping": {"$ref": "damping"},
    },
}
CHUNK = 2**18  # entries of the matrices factorised at once, 2 MB in float64: more would leave the cache


@dataclass(frozen=True)
class Reconstruct(Method):
    """Least squares on the kept inputs in float64; each row takes the best of this solution, W, and `mask_from`'s
    weights.

    Rows with the same support share a factor. The cost is one Cholesky factor per distinct support, which takes minutes
    for 4096 x 4096 on a CPU. Precondition: a finite Gram; one that cannot be factorised is damped more
    (`info["damping"]`).
    """

    mask_from: Any = "wanda"
    damping: float = 1e-4

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        given = self.mask_from.compress(layer, target, rng)
        weight, unit = ops.normalised(layer.weight)
        gram, _ = ops.normalised(layer.gram.matrix)
        weight, gram, damping = weight.double(), gram.double(), self.damping
        while (solved := least_squares(weight, given.mask, gram, damping)) is None:
            damping = damping * DAMPING_GROWTH
            if damping > LARGEST_DAMPING:
                raise ValueError(f"reconstruct found no damping up to {LARGEST_DAMPING:g} that factorises the Gram.")
        best = torch.where(given.mask, layer.weight, 0.0)
        least = torch.full_like(weight[:, 0], float("inf"))
        candidates = [best, (solved * unit).float()]
        if not torch.equal(best, given.weight):
            candidates.insert(1, given.weight)
        for candidate in candidates:
            lost = weight - candidate.double() / unit
            loss = ((lost @ gram) * lost).sum(1)
            best = torch.where((loss < least)[:, None], candidate, best)
            least = torch.minimum(loss, least)
        return Compressed(best, given.mask, info={"damping": damping})


def least_squares(weight: Tensor, mask: Tensor, gram: Tensor, damping: float) -> Tensor | None:
    """[out, in] float64 damped optimum of each row on its support, or None when a factorisation fails."""
    damped = gram.clone()
    damped.diagonal().add_(damping * (float(gram.diagonal().mean()) or 1.0))
    aim = torch.where(mask, 0.0, weight) @ gram  # [out, in]
    solved = torch.where(mask, weight, 0.0)
    for inputs, used, rows, real in supports(mask):
        if len(inputs) == 1:
            matrix = damped.index_select(0, inputs[0]).index_select(1, inputs[0])[None]
        else:
            matrix = damped[inputs[:, :, None], inputs[:, None]]  # [u, kept, kept]
        if not used.all():
            matrix.mul_(used[:, :, None] & used[:, None])
            matrix.diagonal(dim1=1, dim2=2).add_((~used).double())  # the padding is an identity
        if not cholesky_in_place(matrix):
            return None
        at, valid = (rows[:, :, None], inputs[:, None]), real[:, :, None] & used[:, None]  # [u, rows, kept]
        half = torch.linalg.solve_triangular(matrix, (aim[at] * valid).mT, upper=False)
        update = torch.linalg.solve_triangular(matrix.mT, half, upper=True).mT * valid
        solved.index_put_(at, update, accumulate=True)
    return solved


def supports(mask: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The distinct supports in chunks of u: inputs [u, kept] with a mask of used ones, rows [u, rows] with a mask of
    real ones."""
    distinct, which, times = torch.unique(mask, dim=0, return_inverse=True, return_counts=True)
    members = which.argsort(stable=True).split(times.tolist())  # rows of each support
    kept = distinct.sum(1)
    order = (kept * (len(mask) + 1) + times).argsort(stable=True)  # neighbours have similar sizes, so padding is small
    most = max(int(kept.max()), 1)
    for chunk in order.split(max(CHUNK // most**2, 1)):
        inputs = distinct[chunk].long().argsort(dim=1, descending=True, stable=True)[:, : int(kept[chunk].max())]
        rows = pad_sequence([members[i] for i in chunk.tolist()], batch_first=True, padding_value=-1)
        yield inputs, distinct[chunk].gather(1, inputs), rows.clamp(min=0), rows >= 0
