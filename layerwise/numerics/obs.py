"""The optimal brain surgeon (OBS) column by column, shared by SparseGPT and GPTQ (Frantar and Alistarh)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerwise.contract.cholesky import inverse_of_lower
from layerwise.kernels import obs as kernel
from layerwise.kernels.rows import array
from layerwise.numerics import dispatch, ops

Columns = Callable[[int], Tensor]


SPAN = 512  # columns per span; the errors of all earlier columns are multiplied at once for a span


@dataclass(frozen=True)
class ColumnGrid:
    """The grid to which a sweep rounds columns: group_of [in] int64, and the codes [out, in] uint8 that it writes."""

    grid: ops.Grid
    group_of: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Correction:
    """The correction that a column passes on in addition to its error.

    passed: P [in, in] float32, strictly upper: a later column k gets w_j P_jk. Within a block of columns w_j is the
    weight before rounding. For columns after the block it is the rounded weight, as in GPTAQ's released code, unless
    `unrounded` is set. None: no correction.
    pull: FOEM's beta, below 1. Before rounding, a column (except the first of a block) moves back to the original
    weight by this share, and its error omits this share of its distance to the original.
    """

    passed: Tensor | None
    pull: float = 0.0
    unrounded: bool = False


class _Carried:
    """The columns of one sweep with a correction: their values before rounding, and their corrections."""

    def __init__(self, original: Tensor, correction: Correction) -> None:
        self.original, self.correction = original, correction
        self.unrounded, self.sent = original.new_empty(2, *original.shape)

    def passed_within(self, start: int, columns: int) -> Tensor | None:
        """P [columns, columns] of a block."""
        passed, block = self.correction.passed, slice(start, start + columns)
        return None if passed is None else passed[block, block]

    def aims(self, start: int, stop: int) -> Tensor:
        """[out, stop - start] the weight of these columns after the corrections of the blocks before them."""
        own, passed = self.original[:, start:stop], self.correction.passed
        return own if passed is None else torch.addmm(own, self.sent[:, :start], passed[:start, start:stop])

    def moved(self, j: int) -> Tensor:
        """[out] distance of column j, before rounding, from the original weight."""
        return self.unrounded[:, j] - self.original[:, j]

    def arrive(self, block: Tensor, start: int, i: int) -> None:
        """Pull column i of a block, unless it is the first, and record its value before rounding."""
        if i:
            block[:, i] -= self.correction.pull * (block[:, i] - self.original[:, start + i])
        self.unrounded[:, start + i] = block[:, i]

    def finish(self, aims: Tensor, weight: Tensor, errors: Tensor, start: int, end: int) -> None:
        """Write the errors of a block that later columns compensate, and record its corrections for them.

        aims: the block's aims at its start.
        """
        block, pull, passed = slice(start, end), self.correction.pull, self.correction.passed
        torch.sub(aims, weight[:, block], out=errors[:, block])
        moved = pull * (self.unrounded[:, block] - self.original[:, block])
        if passed is not None:  # corrections within the block
            errors[:, block].addmm_(self.unrounded[:, block], passed[block, block])
        if pull:
            errors[:, block] -= moved
            errors[:, start + 1 : end] -= moved[:, 1:] / (1 - pull)  # the amount of the pull
        self.sent[:, block] = self.unrounded[:, block] if self.correction.unrounded else weight[:, block] + moved


@dataclass(frozen=True)
class ColumnSweep:
    """Prune or round the columns of a weight [out, in] from left to right; those to the right absorb the error.

    With G = M^T M, M lower, the loss of errors E is |E M^T|^2. For any errors of the finished columns S, the other
    columns F add no loss at E_F = -E_S M_FS^T M_FF^-T. So each block of columns is updated once, when its turn comes,
    from all errors before it. (The official codes apply the inverse's factor to all columns after each block.) The
    inverse is needed only within blocks. M is float32. At the methods' damping, 0.01 and 0.02, weights agree with
    float64 to 1e-7; at a damping of 1e-4 they agree to 1e-6. With less damping, on Grams without full rank, both paths
    lose digits.

    factor: M [in, in]. mask: [out, in] bool, written in place. A column becomes zero where the mask is False, and is
    then rounded to the grid, if there is one. block_budget(start, end): (group_size, n_pruned) of a block. At the first
    of each `group_size` columns the sweep chooses the mask that prunes the `n_pruned` smallest |w / U_jj| of them.
    group_size divides the block size.
    correction: a correction that columns pass on in addition to errors. Errors then refer to the corrected weight
    (`_Carried`).
    """

    original: Tensor
    factor: Tensor
    mask: Tensor
    blocksize: int
    block_budget: Callable[[int, int], tuple[int, int]] | None = None
    grid: ColumnGrid | None = None
    correction: Correction | None = None

    def run(self, prepare: Callable[[int, int, Columns, Tensor], None] = lambda *_: None) -> Tensor:
        """The weight [out, in] after the sweep.

        prepare(start, end, now, diagonal) may fill in the mask and grid of a block of columns. now(stop) returns the
        columns from start to stop after the updates of the blocks before, where stop is `end` or later. diagonal is
        U_jj of the block.
        """
        factor, inputs = self.factor, len(self.factor)
        shape = (2, *self.original.shape)
        use_compiled = dispatch.use_compiled(self.original)
        weight, errors = kernel.memory(shape) if use_compiled else self.original.new_empty(shape)
        carried = _Carried(self.original, self.correction) if self.correction else None
        span = self.blocksize * max(SPAN // self.blocksize, 1)
        for first in range(0, inputs, span):
            missing = errors[:, :first] @ factor[first : first + span, :first].T
            for start in range(first, min(first + span, inputs), self.blocksize):
                end = min(start + self.blocksize, first + span, inputs)
                lost = missing[:, start - first : end - first]
                lost.addmm_(errors[:, first:start], factor[start:end, first:start].T)
                inverse = inverse_of_lower(factor[start:end, start:end]).T.contiguous()
                block = weight[:, start:end]
                aims = carried.aims(start, end) if carried else self.original[:, start:end]
                torch.addmm(aims, lost, inverse, out=block)

                def now(stop: int, start: int = start, end: int = end, block: Tensor = block) -> Tensor:
                    return block if stop == end else self._now(errors, carried, start, stop)

                prepare(start, end, now, inverse.diagonal())
                sweep = self._sweep_compiled if use_compiled else self._sweep_reference
                sweep(weight, errors, carried, start, inverse)
                if carried:
                    carried.finish(aims, weight, errors, start, end)
        return weight

    def _now(self, errors: Tensor, carried: _Carried | None, start: int, end: int) -> Tensor:
        lost = errors[:, :start] @ self.factor[start:end, :start].T
        aims = carried.aims(start, end) if carried else self.original[:, start:end]
        return aims + lost @ inverse_of_lower(self.factor[start:end, start:end]).T

    def _budget(self, start: int, end: int) -> kernel.BlockBudget:
        return kernel.BlockBudget(*(self.block_budget(start, end) if self.block_budget else (0, 0)))

    def _sweep_compiled(
        self, weight: Tensor, errors: Tensor, carried: _Carried | None, start: int, inverse: Tensor
    ) -> None:
        """As _sweep_reference, compiled, with bit-identical results."""
        grid = None
        if self.grid:
            largest_code = np.float32(self.grid.grid.largest_code)
            scales, zeros, group_of = map(array, (self.grid.grid.steps, self.grid.grid.zeros, self.grid.group_of))
            book = kernel.NO_BOOK if self.grid.grid.book is None else array(self.grid.grid.book.table)
            grid = kernel.GridArrays(scales, zeros, group_of, self.grid.codes.numpy(), largest_code, book)
        budget, correction = self._budget(start, start + len(inverse)), None
        if carried:
            passed = carried.passed_within(start, len(inverse))
            arrays = (kernel.NO_SCALES if passed is None else array(passed), array(self.original))
            pull = np.float32(carried.correction.pull)
            correction = kernel.CorrectionArrays(*arrays, carried.unrounded.numpy(), pull)
        kernel.sweep_columns(self.original, weight, errors, self.mask, start, inverse, budget, grid, correction)

    def _sweep_reference(
        self, weight: Tensor, errors: Tensor, carried: _Carried | None, start: int, inverse: Tensor
    ) -> None:
        """Sweep a block of columns of the weight; write the difference from the original to the errors.

        inverse: [columns, columns] upper U of the block, where U^T U is this block's part of the inverse Gram of these
        and all later columns.
        """
        end = start + len(inverse)
        block = weight[:, start:end].clone()
        group_size, n_pruned = self._budget(start, end)
        passed = carried.passed_within(start, len(inverse)) if carried else None
        for i, j in enumerate(range(start, end)):
            if group_size and i % group_size == 0:
                score = saliency(block[:, i : i + group_size], inverse.diagonal()[i : i + group_size])
                chosen = ops.keep_top_per_group(score, group_size, n_pruned)
                self.mask[:, j : min(j + group_size, end)] = chosen
            if carried:
                carried.arrive(block, start, i)
            final = torch.where(self.mask[:, j], block[:, i], 0.0)
            if self.grid:
                group, codes = self.grid.group_of[j : j + 1], self.grid.codes
                codes[:, j] = self.grid.grid.codes(final[:, None], group)[:, 0]
                final = self.grid.grid.values(codes[:, j : j + 1], group)[:, 0]
            error = (block[:, i] - final) / inverse[i, i]
            if carried:
                error -= carried.correction.pull * (carried.moved(j) / inverse[i, i])
            block[:, i:] -= torch.outer(error, inverse[i, i:])
            if passed is not None and carried:
                block[:, i:] -= torch.outer(carried.unrounded[:, j], -passed[i, i:])
            block[:, i] = final
        weight[:, start:end] = block
        errors[:, start:end] = self.original[:, start:end] - block


def saliency(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Root of the loss of removing each entry of weight [out, columns] alone, |w / U_jj|; diagonal: U_jj [columns].

    It is not squared: the order is the same, and tiny weights do not underflow.
    """
    return (weight / diagonal).abs()
