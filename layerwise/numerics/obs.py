"""The optimal brain surgeon column by column, which SparseGPT and GPTQ share (Frantar and Alistarh)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.cholesky import inverse_of_lower
from layerwise.kernels import columns
from layerwise.numerics import dispatch, ops

Columns = Callable[[int], Tensor]


SPAN = 512  # columns that the errors of all columns before them are multiplied to at once


@dataclass(frozen=True)
class Settling:
    """The columns of a weight [out, in] settled in order, those to the right made up for what has changed.

    With G = Mt M, M lower, the loss of errors E is |E Mt|^2: whatever the settled columns S lost, the others F lose
    nothing more at E_F = -E_S M_FS^t M_FF^-t. So a block of columns is brought up to date when its turn comes, from all
    errors before it, where the official codes multiply the inverse's factor to all columns after a block. The inverse
    is needed within blocks alone. M is in float32: at the methods' damping, .01 and .02, weights agree with float64 to
    1e-7, at 1e-4 to 1e-6; with less, on Grams without full rank, both paths lose digits.

    factor: M [in, in]. mask: [out, in] bool, in place; a column becomes zero where it is False, then is rounded to the
    grid, if there is one, with its codes [out, in] uint8; group_of [in].
    choice(start, end): (of, pruned) of a block: when the first of each `of` columns comes, the mask is chosen that lets
    the `pruned` smallest |w / U_jj| of them go; of divides the block size or is all of it.
    """

    original: Tensor
    factor: Tensor
    mask: Tensor
    blocksize: int
    choice: Callable[[int, int], tuple[int, int]] | None = None
    grid: ops.Grid | None = None
    group_of: Tensor | None = None
    codes: Tensor | None = None

    def run(self, prepare: Callable[[int, int, Columns, Tensor], None] = lambda *_: None) -> Tensor:
        """The settled weight [out, in].

        prepare(start, end, now, diagonal) may fill in mask and grid of a block of columns: now(end) are the columns
        from start to end, or to one after it, as the blocks before have left them, and diagonal is U_jj of the block.
        """
        factor, inputs = self.factor, len(self.factor)
        shape = (2, *self.original.shape)
        weight, errors = columns.memory(shape) if dispatch.compiled(self.original) else self.original.new_empty(shape)
        span = self.blocksize * max(SPAN // self.blocksize, 1)
        for first in range(0, inputs, span):
            missing = errors[:, :first] @ factor[first : first + span, :first].T
            for start in range(first, min(first + span, inputs), self.blocksize):
                end = min(start + self.blocksize, first + span, inputs)
                lost = missing[:, start - first : end - first]
                lost.addmm_(errors[:, first:start], factor[start:end, first:start].T)
                inverse = inverse_of_lower(factor[start:end, start:end]).T.contiguous()
                block = weight[:, start:end]
                torch.addmm(self.original[:, start:end], lost, inverse, out=block)

                def now(until: int, start: int = start, end: int = end, block: Tensor = block) -> Tensor:
                    return block if until == end else self._now(errors, start, until)

                prepare(start, end, now, inverse.diagonal())
                settle = self._block if dispatch.compiled(weight) else self._block_plainly
                settle(weight, errors, start, inverse)
        return weight

    def _now(self, errors: Tensor, start: int, end: int) -> Tensor:
        lost = errors[:, :start] @ self.factor[start:end, :start].T
        return self.original[:, start:end] + lost @ inverse_of_lower(self.factor[start:end, start:end]).T

    def _block(self, weight: Tensor, errors: Tensor, start: int, inverse: Tensor) -> None:
        """What _block_plainly does, compiled: the same to the last bit."""
        columns.settle_block(
            self.original,
            weight,
            errors,
            start,
            inverse,
            self.mask,
            self.choice(start, start + len(inverse)) if self.choice else (0, 0),
            (self.grid.scales, self.grid.zeros, self.group_of, self.codes, self.grid.bits) if self.grid else None,
        )

    def _block_plainly(self, weight: Tensor, errors: Tensor, start: int, inverse: Tensor) -> None:
        """Settles a block of columns of the weight; what they lost of the original goes to the errors.

        inverse: [columns, columns] upper U of the block, Ut U the inverse of the Gram of these and all later columns,
        as far as it is theirs.
        """
        end = start + len(inverse)
        block = weight[:, start:end].clone()
        of, pruned = self.choice(start, end) if self.choice else (0, 0)
        for i, j in enumerate(range(start, end)):
            if of and i % of == 0:
                score = saliency(block[:, i : i + of], inverse.diagonal()[i : i + of])
                self.mask[:, j : min(j + of, end)] = ops.keep_of_groups(score, of, pruned)
            settled = torch.where(self.mask[:, j], block[:, i], 0.0)
            if self.grid:
                group = self.group_of[j : j + 1]
                self.codes[:, j] = self.grid.codes(settled[:, None], group)[:, 0]
                settled = self.grid.values(self.codes[:, j : j + 1], group)[:, 0]
            error = (block[:, i] - settled) / inverse[i, i]
            block[:, i:] -= torch.outer(error, inverse[i, i:])
            block[:, i] = settled
        weight[:, start:end] = block
        errors[:, start:end] = self.original[:, start:end] - block


def saliency(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Root of the loss of removing each entry of weight [out, columns] alone, |w / U_jj|; diagonal: U_jj [columns].

    Not squared: the order is the same, and tiny weights do not underflow.
    """
    return (weight / diagonal).abs()
