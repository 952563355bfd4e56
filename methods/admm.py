"""ADMM pruning: alternate least squares and projection on the pattern, with a fixed penalty (Boza, TMLR 2024).

In coordinates in which every input has norm one: B solves the damped least squares near Z - U, Z is B + U on the mask,
and U accumulates B - Z. The mask is recomputed in each of the first `refresh` iterations and then fixed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

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
    "cost": {"weights": 31.2, "grams": 14.6, "products": 140.0, "products_per": {"iterations": 7.0}},
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


@dataclass(frozen=True)
class ADMM(Method):
    """Prunes and updates weights together; returns the best masked iterate, where W on its largest |W_ij| norm_j counts
    too.

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
        gram = layer.gram.matrix.double() / mean / mean / norm / norm[:, None]
        damped = gram + self.damping * (float(gram.diagonal().mean()) or 1.0) * torch.eye(len(gram)).to(gram)
        shifted = damped + self.rho * torch.eye(len(gram)).to(gram)
        inverse = layer.gram.once(
            ("admm", self.damping, self.rho), lambda: torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        )

        weight, unit = ops.normalised(layer.weight)
        dense = weight.double() * norm  # [out, in]
        best = ops.Best(dense, gram, norm, unit, mean**2)
        aim, weight, dual = dense @ damped, dense, torch.zeros_like(dense)
        mask = ops.prune_mask(dense.abs(), target)
        best.offer(0, dense * mask, mask)
        refresh = min(self.refresh, self.iterations)
        for iteration in range(1, self.iterations + 1):
            if iteration <= refresh:
                mask = scheduled_mask((weight + dual).abs(), target, iteration / refresh)
            split = (weight + dual) * mask
            if iteration > 1 and (iteration >= refresh or target.pattern == "layer"):  # otherwise not sparse enough yet
                best.offer(iteration - 1, split, mask)
            dual = dual + weight - split
            weight = (aim + self.rho * (split - dual)) @ inverse
        best.offer(self.iterations, (weight + dual) * mask, mask)
        return best.compressed(layer, self.damping)


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
