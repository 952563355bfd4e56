"""ALPS: ADMM whose penalty rises until the support settles, then conjugate gradients on it (Meng et al., NeurIPS 2024).

In coordinates in which inputs have norm one, B solves the damped least squares pulled towards D, D is its projection on
the pattern, and V the multiplier (section 3.2). Then the kept weights are refined on their support (section 3.3).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops
from layerwise.numerics.splitting import Splitting, resolvent_of

CARD = {
    "title": "ALPS",
    "paper": "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
    "arxiv": "2406.07831",
    "code": "https://github.com/mazumder-lab/ALPS",
    "patterns": ["row", "layer", "n:m"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "criterion": "error",
    "cost": {"weights": 22.8, "grams": 8.8, "products": 110.0},
    "look": {"colour": "#009E73", "marker": "s"},
    "checks": {"variants": [{"iterations": 4, "refinements": 0}]},
    "parameters": {
        "rho": {"$ref": "penalty", "description": "First penalty on B - D."},
        "iterations": {"type": "integer", "minimum": 1, "description": "Largest number of updates of B."},
        "refinements": {"type": "integer", "minimum": 0, "description": "Conjugate gradient steps on the support."},
        "damping": {"$ref": "damping"},
    },
}
LOOK = 3  # iterations between two checks of the support
PATIENCE = 30  # number of iterations after which a support that changes by less than SETTLED counts as settled
SETTLED = 0.0003
LARGEST_RHO = 1e6
SHORT = 20  # number of conjugate gradient steps up to which float32 keeps directions conjugate


@dataclass(frozen=True)
class ALPS(Method):
    """Prunes and updates weights together; returns the best sparse iterate, W on its largest |W_ij| norm_j included.

    layer: the published choice; the whole layer competes. The penalty's schedule has the released code's constants. No
    preconditions: the damping makes any finite Gram positive definite. trace: loss of the best iterate so far.
    """

    rho: float = 0.1
    iterations: int = 300
    refinements: int = 10
    damping: float = 0.01

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        mean = float(layer.gram.diagonal.double().mean()) or 1.0
        gram = layer.gram.matrix.to(torch.float64, copy=True).div_(mean)  # [in, in]
        damping = self.damping if gram.any() else 1.0
        norm = (gram.diagonal() + damping).sqrt()  # [in]
        gram.div_(norm).div_(norm[:, None])
        dense, unit = ops.normalised(layer.weight)
        dense = dense.double().mul_(norm)  # [out, in]
        best = ops.Best(dense.float(), gram, norm, unit, mean)
        gram.diagonal().add_(damping / norm.square())
        self._search(layer, target, dense, gram, best)
        del gram, dense
        return best.compressed(layer, damping)

    def _search(self, layer: Layer, target: Target, dense: Tensor, damped: Tensor, best: ops.Best) -> None:
        """Offer every third D, and then the refined B, to `best`."""
        eigenvalues, vectors = layer.gram.once(("alps", self.damping), lambda: torch.linalg.eigh(damped))
        seen = first = ops.prune_mask(dense.abs(), target)
        best.offer(0, best.dense * first, first)
        split = Splitting(dense, best.dense * first, first, self.rho, partial(resolvent_of, eigenvalues, vectors))
        kept, rho, moved, iteration = int(first.sum()), self.rho, False, 0
        for iteration in range(1, self.iterations + 1):
            split.step()
            split.mask = ops.prune_mask(split.both.abs(), target)
            if iteration % LOOK:
                continue
            best.offer(iteration, split.sparse, split.mask)
            changed, seen = int((split.mask != seen).sum()), split.mask
            if changed > 0.005 * kept:
                moved, rho = True, rho * (1.3 if changed > 0.1 * kept else 1.2)
            elif moved and not changed:
                break
            elif moved:
                rho *= 1.1
            else:  # the penalty freezes the initial support: restart with a smaller penalty
                rho /= 5
                if changed:
                    split.restart(best.dense * first, first)
            if iteration > PATIENCE and changed < SETTLED * kept:
                break
            rho = min(rho, LARGEST_RHO)
            split.set_penalty(rho)
        weight, mask = split.weight, ops.prune_mask(split.weight.abs(), target)
        del split, vectors
        best.offer(iteration + 1, refine(weight * mask, mask, damped, dense, self.refinements), mask)


def refine(weight: Tensor, mask: Tensor, gram: Tensor, dense: Tensor, steps: int) -> Tensor:
    """Weight [out, in] float64 after conjugate gradient steps on (dense - weight) @ gram = 0, each row on its support.

    gram, dense: float64, as is the first residual. A few steps of a correction are in float32, more are in float64.
    """
    dtype = torch.float32 if steps <= SHORT else torch.float64
    residual = ((dense - weight) @ gram).mul_(mask).to(dtype)
    direction, size, gram = residual.clone(), residual.square().sum(1, keepdim=True), gram.to(dtype)
    correction, least = torch.zeros_like(residual), size * torch.finfo(dtype).eps ** 2
    for _ in range(steps):
        image = direction @ gram
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where((curvature > 0) & (size > least), size / curvature, 0.0)
        residual.sub_(image.mul_(length)).mul_(mask)
        correction.add_(torch.mul(direction, length, out=image))
        before, size = size, residual.square().sum(1, keepdim=True)
        direction.mul_(torch.where(before > least, size / before, 0.0)).add_(residual)
    return correction.double().add_(weight)
