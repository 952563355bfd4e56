"""Thanos: prune columns block by block, and remove all weights that a row loses in a block at once.

Ilin and Richtarik: before each block, Wanda's scores on the updated weights choose the mask among all remaining
columns. A k x k system for every row then updates the rest of the row so that the loss from its k removed weights is
minimal.
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
            "description": "Number of columns whose weights are removed at once (n:m: rounded down to a multiple of "
            "m). The released script uses 512, its routine 128.",
        },
        "damping": {"$ref": "damping"},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: results are independent of the activations' scale. official: a dead input counts as "
            "1 on the diagonal, as in the released code.",
        },
    },
}


@dataclass(frozen=True)
class Thanos(Method):
    """One-shot pruning with weight update; the weight of a dead input becomes zero.

    layer: the published choice; all weights of the layer compete, and the losers in the block are pruned. row (the
    project's own): the weights of each row compete. Computed in float64, except for the factor. Preconditions: a finite
    Gram; one that is not positive definite is damped until it is (`info["damping"]`).
    """

    blocksize: int = 512
    damping: float = 0.01
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        length = layer.statistics.length if layer.statistics else 1
        # the released code's H is 2 length G
        dead_diagonal = 1 / (2 * length) if self.convention == "official" else None
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
            # Rows of the inverse of the remaining damped Gram; its factor is the rest of the whole factor.
            inverse = factor[block, block].double().T @ factor[block, start:].double()
            weight[:, start:] -= multipliers(weight[:, block], gone[:, block], inverse[:, : end - start]) @ inverse
            weight[:, block].masked_fill_(gone[:, block], 0.0)
        return Compressed(weight.float(), ~gone, info={"damping": damping})


def losers(score: Tensor, gone: Tensor, target: Target) -> Tensor:
    """[out, left] bool: among the remaining columns, the lowest scores of each group, as many as the target prunes.

    gone: [out, done] bool, the entries pruned in earlier columns. Among equal scores the lower index is pruned.
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
