"""The optimal brain surgeon (OBS) column by column, which SparseGPT and GPTQ share (Frantar and Alistarh)."""

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


SPAN = 512  # columns for which the errors of all columns before them are multiplied at once


@dataclass(frozen=True)
class ColumnGrid:
    """The grid that a sweep rounds columns to: group_of [in] int64, and the codes [out, in] uint8 that it writes."""

    grid: ops.Grid
    group_of: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Correction:
    """The correction that a column passes on besides its error.

    passed: P [in, in] float32, strictly upper: a later column k gets w_j P_jk, with w_j the weight before rounding
    within a block of columns, and the rounded one for the columns after the block, as in GPTAQ's released code, unless
    `unrounded` says that it is the same everywhere. None: nothing.
    pull: share by which a column goes back to the original weight before it is rounded, but for the first of a block,
    and the share of its distance to the original that its error leaves out (FOEM's beta, below 1).
    """

    passed: Tensor | None
    pull: float = 0.0
    unrounded: bool = False


class _Carried:
    """The columns of one sweep with a correction: what they were before rounding, and what they pass on."""

    def __init__(self, original: Tensor, correction: Correction) -> None:
        self.original, self.correction = original, correction
        self.unrounded, self.sent = original.new_empty(2, *original.shape)

    def passed_within(self, start: int, columns: int) -> Tensor | None:
        """P [columns, columns] of a block."""
        passed, block = self.correction.passed, slice(start, start + columns)
        return None if passed is None else passed[block, block]

    def aims(self, start: int, stop: int) -> Tensor:
        """[out, stop - start] the weight that the columns represent, once the blocks before have passed on theirs."""
        own, passed = self.original[:, start:stop], self.correction.passed
        return own if passed is None else torch.addmm(own, self.sent[:, :start], passed[:start, start:stop])

    def moved(self, j: int) -> Tensor:
        """[out] how far column j, before it was rounded, was from the original weight."""
        return self.unrounded[:, j] - self.original[:, j]

    def arrive(self, block: Tensor, start: int, i: int) -> None:
        """Pull column i of a block, unless it is the first, and note it as it is before rounding."""
        if i:
            block[:, i] -= self.correction.pull * (block[:, i] - self.original[:, start + i])
        self.unrounded[:, start + i] = block[:, i]

    def finish(self, aims: Tensor, weight: Tensor, errors: Tensor, start: int, end: int) -> None:
        """Write the errors of a block that later columns are to make up for, and note what it passes on to them.

        aims: of the block, as it began.
        """
        block, pull, passed = slice(start, end), self.correction.pull, self.correction.passed
        torch.sub(aims, weight[:, block], out=errors[:, block])
        moved = pull * (self.unrounded[:, block] - self.original[:, block])
        if passed is not None:  # the corrections within the block
            errors[:, block].addmm_(self.unrounded[:, block], passed[block, block])
        if pull:
            errors[:, block] -= moved
            errors[:, start + 1 : end] -= moved[:, 1:] / (1 - pull)  # by which they were pulled
        self.sent[:, block] = self.unrounded[:, block] if self.correction.unrounded else weight[:, block] + moved


@dataclass(frozen=True)
class ColumnSweep:
    """Prune or round the columns of a weight [out, in] from left to right; those to the right absorb the error.

    With G = M^T M, M lower, the loss of errors E is |E M^T|^2. Whatever the finished columns S lost, the others F lose
    nothing more at E_F = -E_S M_FS^T M_FF^-T. So a block of columns is brought up to date when its turn comes, from all
    errors before it, where the official codes apply the inverse's factor to all columns after a block. The inverse is
    needed within blocks only. M is in float32: at the methods' damping, .01 and .02, weights agree with float64 to
    1e-7, at 1e-4 to 1e-6; with less, on Grams without full rank, both paths lose digits.

    factor: M [in, in]. mask: [out, in] bool, written in place; a column becomes zero where it is False, and is then
    rounded to the grid, if there is one.
    block_budget(start, end): (group_size, n_pruned) of a block. At the first of each `group_size` columns the mask is
    chosen that prunes the `n_pruned` smallest |w / U_jj| of them; group_size divides the block size or equals it.
    correction: what columns pass on besides their errors; with it the errors are taken from the weight that the passed
    parts have moved (`_Carried`).
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

        prepare(start, end, now, diagonal) may fill in mask and grid of a block of columns: now(stop) are the columns
        from start to stop as the blocks before have left them, where stop is `end` or later, and diagonal is U_jj of
        the block.
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
        """As _sweep_reference, compiled: the same to the last bit."""
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
        """Sweep a block of columns of the weight; what they lose of the original is written to the errors.

        inverse: [columns, columns] upper U of the block, where U^T U is this block's part of the inverse of the Gram of
        these and all later columns.
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

    Not squared: the order is the same, and tiny weights do not underflow.
    """
    return (weight / diagonal).abs()
