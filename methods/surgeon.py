"""The optimal brain surgeon column by column, which SparseGPT and GPTQ share (Frantar and Alistarh)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import columns
from methods import ops, paths


@dataclass(frozen=True)
class Settling:
    """The columns of weight [out, in] settled in order, in place, those to the right made up for each change.

    factor: [in, in] upper U with Ut U = inverse of the damped Gram. mask: [out, in] bool, in place; a column becomes
    zero where it is False, then is rounded to the grid, if there is one, with its codes [out, in] uint8; group_of [in].
    n_of_m: the mask of m columns is chosen when the first comes, by |w / U_jj|; blocksize is a multiple of m.
    """

    weight: Tensor
    factor: Tensor
    mask: Tensor
    blocksize: int
    n_of_m: tuple[int, int] | None = None
    grid: ops.Grid | None = None
    group_of: Tensor | None = None
    codes: Tensor | None = None

    def run(self, prepare: Callable[[int, int], None] = lambda start, end: None) -> None:
        """prepare(start, end) may fill in mask and grid of a block of columns, given the weight as it is by then.

        A block is brought up to date column by column, weight itself only when a block ends (GPTQ, lazy batch updates).
        """
        inputs = self.weight.shape[1]
        for start in range(0, inputs, self.blocksize):
            end = min(start + self.blocksize, inputs)
            prepare(start, end)
            errors = (self._block if paths.compiled(self.weight) else self._block_plainly)(start, end)
            self.weight[:, end:].addmm_(errors, self.factor[start:end, end:], alpha=-1)

    def _block(self, start: int, end: int) -> Tensor:
        """What _block_plainly does, compiled: the same to the last bit."""
        return columns.settle_block(
            self.weight,
            start,
            self.factor[start:end, start:end],
            self.mask,
            self.n_of_m,
            (self.grid.scales, self.grid.zeros, self.group_of, self.codes, self.grid.bits) if self.grid else None,
        )

    def _block_plainly(self, start: int, end: int) -> Tensor:
        """Settles a block of columns; returns their errors [out, columns], (w - settled) / U_jj."""
        factor, block = self.factor[start:end, start:end], self.weight[:, start:end].clone()
        errors = torch.empty_like(block)
        for i, j in enumerate(range(start, end)):
            if self.n_of_m and i % self.n_of_m[1] == 0:
                kept, of = self.n_of_m
                score = saliency(block[:, i : i + of], factor.diagonal()[i : i + of])
                self.mask[:, j : j + of] = ops.keep_of_groups(score, of, of - kept)
            settled = torch.where(self.mask[:, j], block[:, i], 0.0)
            if self.grid:
                group = self.group_of[j : j + 1]
                self.codes[:, j] = self.grid.codes(settled[:, None], group)[:, 0]
                settled = self.grid.values(self.codes[:, j : j + 1], group)[:, 0]
            errors[:, i] = (block[:, i] - settled) / factor[i, i]
            block[:, i:] -= torch.outer(errors[:, i], factor[i, i:])
            block[:, i] = settled
        self.weight[:, start:end] = block
        return errors


def saliency(weight: Tensor, diagonal: Tensor) -> Tensor:
    """Root of the loss of removing each entry of weight [out, columns] alone, |w / U_jj|; diagonal: U_jj [columns].

    Not squared: the order is the same, and tiny weights do not underflow.
    """
    return (weight / diagonal).abs()
