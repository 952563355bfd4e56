"""SparseGPT: prune column by column, and update the rest of the row each time to compensate for the loss.

Frantar and Alistarh, algorithm 1. The optimal brain surgeon's update is applied to the remaining columns; the mask is
chosen block by block from the weights as updated so far.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Quantised, Target
from layerwise.numerics import ops
from layerwise.numerics.obs import ColumnGrid, Columns, ColumnSweep, saliency

CARD = {
    "title": "SparseGPT",
    "paper": "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    "arxiv": "2301.00774",
    "patterns": ["row", "layer", "n:m"],
    "bits": [2, 3, 4, 5, 6, 7, 8],
    "updates_weights": True,
    "needs": ["gram"],
    "cost": {"weights": 7.8, "grams": 3.8, "products": 3.1},
    "look": {"colour": "#D55E00", "marker": "o"},
    "checks": {"reference": True, "variants": [{"blocksize": 16}]},
    "parameters": {
        "blocksize": {
            "$ref": "blocksize",
            "description": "Number of columns whose mask is chosen at once (n:m: rounded down to a multiple of m).",
        },
        "damping": {"$ref": "damping"},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: floor(n p) zeros; results are independent of the activations' scale. official: the "
            "released code's threshold, which prunes floor(n p) + 1 entries and ties of a block (layer pattern; breaks "
            "promise 2), and its 1 on the diagonal of dead inputs.",
        },
    },
}


@dataclass(frozen=True)
class SparseGPT(Method):
    """One-shot pruning with weight update, optionally on the grid of `target.bits`, fixed from the dense weight.

    layer: the published choice; all rows of a block of 128 columns compete. row: each row of a block loses its share.
    Preconditions: a finite Gram; one that is not positive definite is damped until it is (`info["damping"]`).
    """

    blocksize: int = 128
    damping: float = 0.01
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        official = self.convention == "official"
        length = layer.statistics.length if layer.statistics else 1
        factor, damping = layer.gram.factor(self.damping, 1 / (2 * length) if official else None)
        grid = ops.fit_grid(layer.weight, target) if target.bits else None

        original = torch.where(layer.gram.dead, 0.0, layer.weight) if layer.gram.dead.any() else layer.weight
        mask = torch.ones_like(original, dtype=torch.bool, memory_format=torch.contiguous_format)
        codes = torch.zeros_like(mask, dtype=torch.uint8)
        group_of = ops.groups_of(len(factor), target.group, original.device)
        column_grid = ColumnGrid(grid, group_of, codes) if grid else None
        multiple = target.n_of_m[1] if target.n_of_m else 1
        blocksize = max(self.blocksize // multiple, 1) * multiple

        def choose(start: int, end: int, now: Columns, diagonal: Tensor) -> None:
            score = saliency(now(end), diagonal)
            mask[:, start:end] = self._block_mask(score, target, start)

        def block_budget(start: int, end: int) -> tuple[int, int]:
            if target.n_of_m:
                n_kept, group_size = target.n_of_m
                return group_size, group_size - n_kept
            return end - start, int(target.sparsity * end) - int(target.sparsity * start)

        competing = target.pattern == "layer"  # whether the rows of a block compete
        budget = None if competing else block_budget
        sweep = ColumnSweep(original, factor, mask, blocksize, budget, column_grid)
        weight = sweep.run(choose) if competing else sweep.run()
        if grid is None:
            return Compressed(weight, mask, info={"damping": damping})
        weight = torch.where(mask, weight, 0.0)  # it may be -0 there
        return Compressed(weight, mask, Quantised(codes, grid.scales, grid.zeros), info={"damping": damping})

    def _block_mask(self, score: Tensor, target: Target, start: int) -> Tensor:
        """Mask [out, columns] of a block in which all entries compete; the blocks' counts add up to the target's."""
        if self.convention == "official":
            return ops.official_layer_mask(score**2, target.sparsity)
        rows, columns = score.shape
        count = int(target.sparsity * (start + columns) * rows) - int(target.sparsity * start * rows)
        return ops.keep_largest(score.flatten(), count).view_as(score)
