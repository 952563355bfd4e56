"""Thanos: prune block by block of columns, all weights that a row loses in a block at once.

Ilin and Richtarik: before each block Wanda's scores choose the mask among all columns that are left, with the weights
as updated so far, and a k x k system for every row moves the rest of it so that the loss of its k weights is least.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops
from layerwise.numerics.joint_removal import multipliers

CARD = {
    "title": "Thanos",
    "paper": "Thanos: A Block-wise Pruning Algorithm for Efficient Large Language Model Compression",
    "arxiv": "2504.05346",
    "code": "https://github.com/vectozavr/thanos",
    "patterns": ["row", "layer", "n:m"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "cost": {"weights": 15.4, "grams": 4.0, "products": 130.0},
    "look": {"colour": "#56B4E9", "marker": "d"},
    "checks": {"reference": True, "variants": [{"blocksize": 16}]},
    "parameters": {
        "blocksize": {
            "$ref": "blocksize",
            "description": "Columns whose weights are removed at once (n:m: rounded down to a multiple of m). The "
            "released script has 512, its routine 128.",
        },
        "damping": {"$ref": "damping"},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: results are free of the activations' scale. official: a dead input counts as 1 on "
            "the diagonal, as in the released code.",
        },
    },
}


@dataclass(frozen=True)
class Thanos(Method):
    """One-shot pruning with weight update; the weight of a dead input becomes zero.

    layer: the published choice, all weights of the layer compete, and those of the block that lose go. row, the
    project's own: the weights of each row compete. In float64 but for the factor. Preconditions: a finite Gram; one
    that is not positive definite is damped until it is (`info["damping"]`).
    """

    blocksize: int = 512
    damping: float = 0.01
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        length = layer.statistics.length if layer.statistics else 1
        dead_diagonal = 1 / (2 * length) if self.convention == "official" else None  # its H is 2 length G
        factor, damping = layer.gram.inverse_factor(self.damping, dead_diagonal)
        weight = torch.where(layer.gram.dead, 0.0, layer.weight).double()
        norm = layer.gram.diagonal.double().sqrt()
        gone = torch.zeros_like(weight, dtype=torch.bool)
        multiple = target.n_of_m[1] if target.n_of_m else 1
        blocksize = max(self.blocksize // multiple, 1) * multiple
        for start in range(0, weight.shape[1], blocksize):
            end = min(start + blocksize, weight.shape[1])
            block = slice(start, end)
            score = weight[:, start:].abs() * norm[start:]
            gone[:, block] = losers(score, gone[:, :start], target)[:, : end - start]
            # Rows of the inverse of what is left of the damped Gram, whose factor is the rest of the whole one's.
            inverse = factor[block, block].double().T @ factor[block, start:].double()
            weight[:, start:] -= multipliers(weight[:, block], gone[:, block], inverse[:, : end - start]) @ inverse
            weight[:, block].masked_fill_(gone[:, block], 0.0)
        return Compressed(weight.float(), ~gone, info={"damping": damping})


def losers(score: Tensor, gone: Tensor, target: Target) -> Tensor:
    """[out, left] bool: of the columns that are left, the lowest scores of each group that prune to the target.

    gone: [out, done] bool, what has been pruned in the columns before. Of equal scores those of lower index go.
    """
    if target.n_of_m:
        n_kept, group_size = target.n_of_m
        return ~ops.keep_top_per_group(score, group_size, group_size - n_kept)
    inputs = gone.shape[1] + score.shape[1]
    if target.pattern == "layer":
        count = int(target.sparsity * len(score) * inputs) - int(gone.sum())
        return ~ops.keep_largest(score.flatten(), count).view_as(score)
    counts = int(target.sparsity * inputs) - gone.sum(1, keepdim=True)  # [out, 1]
    return score.argsort(dim=1, stable=True).argsort(dim=1) < counts
