"""GPTQ: round column by column, each time moving the rest of the row to make up for the rounding.

Frantar et al., algorithm 1, with the grids of the released code: a group is fitted when its first column comes, to the
weights as the blocks before it have left them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops
from layerwise.numerics.obs import ColumnGrid, Columns, ColumnSweep

CARD = {
    "title": "GPTQ",
    "paper": "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "arxiv": "2210.17323",
    "code": "https://github.com/IST-DASLab/gptq",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4"],
    "updates_weights": True,
    "needs": ["gram"],
    "keeps_zeros": True,
    "cost": {"weights": 9.6, "grams": 4.4, "products": 3.5},
    "look": {"colour": "#D55E00", "marker": "h"},
    "checks": {
        "reference": True,
        "variants": [{"blocksize": 16}, {"act_order": True}, {"act_order": True, "static_groups": True, "mse": True}],
    },
    "parameters": {
        "blocksize": {"type": "integer", "minimum": 1, "description": "Columns after which the others are updated."},
        "damping": {"$ref": "damping"},
        "act_order": {
            "type": "boolean",
            "description": "Columns in the order of falling diagonal of the Gram; groups are runs of that order.",
        },
        "static_groups": {
            "type": "boolean",
            "description": "Groups are runs of consecutive inputs, all fitted to the weight as it was; always so in "
            "nvfp4 and mxfp4.",
        },
        "mse": {"$ref": "mse"},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: dead inputs come last in act_order and count as zero, results are free of the "
            "activations' scale. official: they count as 1, as in the released code.",
        },
    },
}


@dataclass(frozen=True)
class GPTQ(Method):
    """One-shot rounding with weight update. A row's grid without groups is fitted to its dense weight beforehand.

    Preconditions: a finite Gram; one that is not positive definite is damped until it is (`info["damping"]`).
    """

    blocksize: int = 128
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    mse: bool = False
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        assert target.bits is not None  # the card lists no other target
        gram, inputs = layer.gram, layer.weight.shape[1]
        length = layer.statistics.length if layer.statistics else 1
        dead_diagonal = 1 / (2 * length) if self.convention == "official" else None  # its H is 2 length G
        weight = torch.where(gram.dead, 0.0, layer.weight) if gram.dead.any() else layer.weight  # [out, in]
        # Length of the groups that are fitted on the way. Those of a format share the divisor of the weight as it was.
        refitted = None if self.static_groups or target.format else target.group
        if refitted:
            scales, zeros = weight.new_empty(2, len(weight), -(-inputs // refitted))
            grid = ops.Grid(scales, zeros, target.bits)
        else:
            grid = ops.fit_grid(weight if target.group else layer.weight, target, self.mse)
        group_of = ops.groups_of(inputs, target.group, weight.device)  # [in], of the columns in their order

        order = torch.arange(inputs, device=weight.device)
        if self.act_order:
            order, gram = gram.descending(dead_diagonal)
            weight = weight[:, order]
            group_of = group_of if refitted else group_of[order]
        keep = torch.ones_like(weight, dtype=torch.bool) if layer.keep is None else layer.keep[:, order].contiguous()
        factor, damping = gram.factor(self.damping, dead_diagonal)
        codes = torch.zeros_like(keep, dtype=torch.uint8)

        def fit(start: int, end: int, now: Columns, diagonal: Tensor) -> None:
            # Columns of a group's own block are as they were when the block began, as in the released code.
            if refitted and (first := -(-start // refitted)) * refitted < end:
                until = min(-(-end // refitted) * refitted, inputs)
                columns, groups = slice(first * refitted, until), slice(first, -(-end // refitted))
                block = now(until)[:, first * refitted - start :]
                fitted = ops.fit_grid(torch.where(keep[:, columns], block, 0.0), target, self.mse)
                grid.scales[:, groups], grid.zeros[:, groups] = fitted.scales, fitted.zeros

        weight = ColumnSweep(weight, factor, keep, self.blocksize, None, ColumnGrid(grid, group_of, codes)).run(fit)
        if self.act_order:
            back = order.argsort()
            weight, codes, group_of = weight[:, back], codes[:, back], group_of[back]
        moved = group_of if self.act_order and refitted else None
        return Compressed(weight, quantised=grid.quantised(codes, moved), info={"damping": damping})
