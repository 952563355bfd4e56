"""QuantEase: cyclic coordinate descent over the columns, in which some passes do not round.

Behdin et al.; passes, order and grids are those of the released code. An unrounded pass lets the descent leave a point
at which no single column would change.
"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Quantised, Target
from layerwise.numerics import ops
from layerwise.numerics.coordinate_descent import Descent, ratios_of
from layerwise.numerics.obs import ColumnGrid

CARD = {
    "title": "QuantEase",
    "paper": "QuantEase: Optimization-based Quantization for Language Models",
    "arxiv": "2309.01885",
    "code": "https://github.com/linkedin/QuantEase",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8],
    "updates_weights": True,
    "needs": ["gram"],
    "keeps_zeros": True,
    "cost": {"weights": 9.8, "grams": 5.6, "products": 71.0, "products_per": {"passes": 2.3}},
    "look": {"colour": "#882255", "marker": "d"},
    "checks": {
        "reference": True,
        "variants": [{"passes": 3}, {"act_order": True}, {"act_order": True, "static_groups": True, "mse": True}],
    },
    "parameters": {
        "passes": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of passes over the columns; the last one rounds.",
        },
        "act_order": {"$ref": "act_order"},
        "static_groups": {
            "$ref": "static_groups",
            "description": "Groups are runs of consecutive inputs for any order of the columns.",
        },
        "mse": {"$ref": "mse"},
    },
}
PERIOD, LAST_UNROUNDED = 3, 25  # as in the released code: passes 1, 4, ..., 25, counted from 0, do not round


@dataclass(frozen=True)
class QuantEase(Method):
    """W_hat starts at W; grids are fitted to W once, beforehand. Nothing is damped or inverted.

    Precondition: a finite Gram. A dead input's weights are rounded to nearest.
    """

    passes: int = 30
    act_order: bool = False
    static_groups: bool = False
    mse: bool = False

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        assert target.bits is not None  # the card lists only targets with bits
        gram, weight, inputs = layer.gram, layer.weight, layer.weight.shape[1]
        keep = torch.ones_like(weight, dtype=torch.bool) if layer.keep is None else layer.keep
        group_of = ops.groups_of(inputs, target.group, weight.device)  # [in], for the columns in their order
        order, grid = torch.arange(inputs, device=weight.device), None
        if self.static_groups:
            grid = ops.fit_grid(weight, target, self.mse)
        if self.act_order:
            order, gram = gram.descending()
            weight, keep = weight[:, order], keep[:, order]
            group_of = group_of[order] if self.static_groups else group_of
        if grid is None:
            grid = ops.fit_grid(weight, target, self.mse)

        normal, unit = ops.normalised(weight)  # the grid is scaled with it
        matrix, _ = ops.normalised(gram.matrix)
        codes = torch.zeros_like(keep, dtype=torch.uint8, memory_format=torch.contiguous_format)
        scaled = ops.Grid(ops.scaled(grid.scales, 1 / unit), grid.zeros, target.bits)
        descent = Descent(normal.contiguous(), ratios_of(matrix), keep, ColumnGrid(scaled, group_of, codes))
        descent.run([self._rounds(number) for number in range(self.passes)])

        moved = group_of if self.act_order and not self.static_groups else None
        if self.act_order:
            back = order.argsort()
            codes, moved = codes[:, back], moved if moved is None else moved[back]
        quantised = Quantised(codes, grid.scales, grid.zeros, moved)
        return Compressed(ops.quantised_values(quantised, target), quantised=quantised)

    def _rounds(self, number: int) -> bool:
        """Whether pass `number`, counted from 0, rounds."""
        return number % PERIOD != 1 or number > LAST_UNROUNDED or number == self.passes - 1
