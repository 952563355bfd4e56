"""Rounding column by column, shared by GPTQ, GPTAQ, FOEM and Qronos: grids, column order and sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.gram import Gram
from layerwise.contract.layer import Compressed, Layer, Target
from layerwise.numerics import ops
from layerwise.numerics.obs import ColumnGrid, Columns, ColumnSweep, Correction

Correct = Callable[[Gram], Correction | None]


@dataclass(frozen=True)
class ColumnRounding:
    """Rounds the columns of a layer from left to right; the rest of a row compensates for each rounding.

    blocksize, damping, act_order, static_groups, mse: as on GPTQ's card.
    dead_diagonal: value of a dead input in the mean of the diagonal and in act_order; None counts it as zero.
    signed: whether a symmetric grid has the step max |w| / (2^(bits - 1) - 1).
    """

    blocksize: int = 128
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    mse: bool = False
    dead_diagonal: float | None = None
    signed: bool = False

    def ordered(self, gram: Gram) -> tuple[Tensor, Gram]:
        """Order [in] in which the inputs' columns are rounded, and the Gram of the inputs in that order."""
        if self.act_order:
            return gram.descending(self.dead_diagonal)
        return torch.arange(len(gram.matrix), device=gram.matrix.device), gram

    def round(
        self,
        layer: Layer,
        target: Target,
        correct: Correct | None = None,
        grid: ops.Grid | None = None,
        dead_stay: bool = False,
    ) -> Compressed:
        """The layer on a grid.

        correct: returns the correction of the sweep, from the Gram of the inputs in column order. grid: a grid fitted
        beforehand, with the target's groups. dead_stay: whether weights of dead inputs are rounded; otherwise they
        become zero.
        """
        assert target.bits is not None  # cards list only targets with bits
        gram, inputs = layer.gram, layer.weight.shape[1]
        weight = layer.weight if dead_stay or not gram.dead.any() else torch.where(gram.dead, 0.0, layer.weight)
        # Length of groups that are fitted during the sweep. Groups of a format share the divisor of the original
        # weight.
        refitted = None if self.static_groups or grid or target.format else target.group
        if refitted:
            scales, zeros = weight.new_empty(2, len(weight), -(-inputs // refitted))
            grid = ops.Grid(scales, zeros, target.bits)
        else:
            grid = grid or self.fitted(weight if target.group else layer.weight, target)
        group_of = ops.groups_of(inputs, target.group, weight.device)  # [in], for the columns in their order

        order, gram = self.ordered(gram)
        if self.act_order:
            weight = weight[:, order]
            group_of = group_of if refitted else group_of[order]
        keep = torch.ones_like(weight, dtype=torch.bool) if layer.keep is None else layer.keep[:, order].contiguous()
        factor, damping = gram.factor(self.damping, self.dead_diagonal)
        codes = torch.zeros_like(keep, dtype=torch.uint8)
        correction = correct(gram) if correct else None

        def fit(start: int, end: int, now: Columns, diagonal: Tensor) -> None:
            # Columns of the group's own block have their values from the start of the block, as in the released code.
            if refitted and (first := -(-start // refitted)) * refitted < end:
                until = min(-(-end // refitted) * refitted, inputs)
                columns, groups = slice(first * refitted, until), slice(first, -(-end // refitted))
                block = now(until)[:, first * refitted - start :]
                kept = block if layer.keep is None else torch.where(keep[:, columns], block, 0.0)
                fitted = self.fitted(kept, target)
                grid.scales[:, groups], grid.zeros[:, groups] = fitted.scales, fitted.zeros

        column_grid = ColumnGrid(grid, group_of, codes)
        weight = ColumnSweep(weight, factor, keep, self.blocksize, None, column_grid, correction).run(fit)
        if self.act_order:
            back = order.argsort()
            weight, codes, group_of = weight[:, back], codes[:, back], group_of[back]
        moved = group_of if self.act_order and refitted else None
        return Compressed(weight, quantised=grid.quantised(codes, moved), info={"damping": damping})

    def fitted(self, weight: Tensor, target: Target) -> ops.Grid:
        """The grid of weight [out, in]."""
        return (ops.fit_signed_grid if self.signed and target.symmetric else ops.fit_grid)(weight, target, self.mse)


@dataclass(frozen=True)
class DriftCorrection:
    """GPTAQ's correction times alpha, with FOEM's pull, for a Gram whose inputs are in column order.

    damping, dead_diagonal: for the Gram, as in `ColumnRounding`. unrounded: as in `Correction`.
    """

    alpha: float
    pull: float
    damping: float
    dead_diagonal: float | None
    unrounded: bool = False

    def __call__(self, gram: Gram) -> Correction | None:
        """The correction, or None without drift. Raises ValueError if the cross-Gram is needed and not known."""
        drifted = bool(self.alpha) and (gram.apart or not gram.knows_dense)
        passed = self.alpha * self.passed_on(gram) if drifted else None
        return Correction(passed, self.pull, self.unrounded) if drifted or self.pull else None

    def passed_on(self, gram: Gram) -> Tensor:
        """P [in, in] strictly upper: triu((C - G) U^T, 1) U, with U upper and U^T U the inverse of the damped Gram.

        C and G are undamped. Computed once for all layers that see these inputs.
        """

        def product() -> Tensor:
            inverse, _ = gram.inverse_factor(self.damping, self.dead_diagonal)
            drift = gram.cross - gram.matrix  # rows: dense input minus actual input; columns: actual input
            return (drift @ inverse.T).triu_(1) @ inverse

        return gram.once(("drift passed on", self.damping, self.dead_diagonal), product)
