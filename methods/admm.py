"""ADMM pruning: alternate least squares and projection on the pattern, with a fixed penalty (Boza, TMLR 2024).

In coordinates in which every input has norm one: B solves the damped least squares near Z - U, Z is B + U on the mask,
and U accumulates B - Z. The mask is recomputed in each of the first `refresh` iterations and then fixed.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops
from layerwise.numerics.splitting import Splitting, precision

CARD = {
    "title": "ADMM",
    "paper": "Fast and Effective Weight Update for Pruned Large Language Models",
    "arxiv": "2401.02938",
    "code": "https://github.com/fmfi-compbio/admm-pruning",
    "patterns": ["row", "layer", "n:m"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "criterion": "error",
    "cost": {"weights": 18.2, "grams": 5.4, "products": 70.0, "products_per": {"iterations": 3.5}},
    "look": {"colour": "#882255", "marker": "^"},
    "checks": {"variants": [{"iterations": 3, "refresh": 0}]},
    "parameters": {
        "rho": {"$ref": "penalty"},
        "iterations": {"type": "integer", "minimum": 1, "description": "Number of updates of B."},
        "refresh": {
            "type": "integer",
            "minimum": 0,
            "description": "Number of first iterations in which the mask is chosen.",
        },
        "damping": {
            "$ref": "damping",
            "description": "Added to the normalised Gram's diagonal, as a share of its mean.",
        },
    },
}
# norm of a dead input, as a share of the mean norm: its weights are pruned first, and division stays finite
DEAD_NORM = 1e-8
LOOK = 5  # number of iterations between two iterates that are candidates for the result


@dataclass(frozen=True)
class ADMM(Method):
    """Prunes and updates weights together; returns the best of every fifth masked iterate and the last, where W on its
    largest |W_ij| norm_j counts too.

    layer: the default of the released code, with the full sparsity from the first iteration on. row (per_out in the
    released code) and n:m: the sparsity rises along a cubic, and the n largest entries of an n:m group are never
    pruned. No preconditions. trace: loss of the best masked iterate so far.
    """

    rho: float = 1.0
    iterations: int = 20
    refresh: int = 15
    damping: float = 0.1

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        norm = layer.gram.diagonal.double().sqrt()  # [in]
        mean = float(norm.mean()) or 1.0
        norm = torch.where(layer.gram.dead, DEAD_NORM if norm.any() else 1.0, norm / mean)
        gram = layer.gram.matrix.to(torch.float64, copy=True)
        gram.div_(mean).div_(mean).div_(norm).div_(norm[:, None])
        matrix = layer.gram.once(("admm", self.damping, self.rho), partial(resolvent, gram, self.damping, self.rho))
        weight, unit = ops.normalised(layer.weight)
        dense = weight.double().mul_(norm)  # [out, in]
        best = ops.Best(dense.float(), gram, norm, unit, mean**2)
        del gram, weight
        mask = ops.prune_mask(dense.abs(), target)
        best.offer(0, best.dense * mask, mask)
        split = Splitting(dense, dense, mask, self.rho, lambda *_: matrix)
        refresh = min(self.refresh, self.iterations)
        for iteration in range(1, self.iterations + 1):
            if iteration <= refresh:
                split.mask = scheduled_mask(split.both.abs(), target, iteration / refresh)
            sparse = iteration > refresh or target.pattern == "layer"  # enough for the target
            if sparse and iteration > 1 and iteration % LOOK == 1:
                best.offer(iteration - 1, split.sparse, split.mask)
            split.step()
        best.offer(self.iterations, split.sparse, split.mask)
        del split, dense
        return best.compressed(layer, self.damping)


def resolvent(gram: Tensor, damping: float, rho: float) -> Tensor:
    """rho (A + rho I)^-1 [in, in], where A is the damped Gram."""
    shifted = gram.clone()
    shifted.diagonal().add_(damping * (float(gram.diagonal().mean()) or 1.0) + rho)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    return inverse.mul_(rho).to(precision(rho))


def scheduled_mask(score: Tensor, target: Target, progress: float) -> Tensor:
    """Mask [out, in] of the largest scores after a share `progress`, up to 1, of the iterations that choose masks."""
    if progress == 1 or target.pattern == "layer":
        return ops.prune_mask(score, target)
    sparsity = target.sparsity * (1 - (1 - progress) ** 3)
    if target.pattern == "row":
        return ops.keep_largest(score, int(sparsity * score.shape[1]))
    protected = ops.prune_mask(score, target)
    others = score.masked_fill(protected, float("inf")).flatten()
    return ops.keep_largest(others, int(sparsity * score.numel())).view_as(score) | protected
