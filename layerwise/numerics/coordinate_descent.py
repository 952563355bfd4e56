"""Cyclic coordinate descent on the layer's error, column by column (QuantEase, Behdin et al.)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from layerwise.kernels import coordinate_descent as kernel
from layerwise.kernels.obs import NO_BOOK, GridArrays
from layerwise.kernels.rows import array
from layerwise.numerics import dispatch
from layerwise.numerics.obs import ColumnGrid

COLUMNS = 128  # columns per block: columns before and after it are multiplied at once


def ratios_of(gram: Tensor) -> Tensor:
    """[in, in] float32 G_ij / G_jj, zero on the diagonal and in the columns of dead inputs."""
    exact = gram.double()
    diagonal = exact.diagonal().clone()
    ratios = (exact / torch.where(diagonal > 0, diagonal, torch.inf)).float()
    return ratios.fill_diagonal_(0.0)


@dataclass(frozen=True)
class Descent:
    """Passes over the columns of an iterate V [out, in] that starts at the weight W.

    In a pass each column in turn becomes w_j + sum over i != j of (w_i - v_i) G_ij / G_jj, which minimises the error
    with the other columns fixed. It is then rounded to the grid, if the pass rounds. A column of a dead input becomes
    w_j, and a weight stays zero where `keep` is False. Computed in float32: each block of columns multiplies the
    current W - V, so that no rounding accumulates from pass to pass.

    weight: [out, in] float32. ratios: `ratios_of` the Gram. keep: [out, in] bool. grid: the codes are written to it.
    """

    weight: Tensor
    ratios: Tensor
    keep: Tensor
    grid: ColumnGrid

    def run(self, rounded: list[bool]) -> Tensor:
        """V [out, in] after one pass for each entry of `rounded`, which says whether the pass rounds."""
        values = self.weight.clone(memory_format=torch.contiguous_format)
        step = self._compiled if dispatch.use_compiled(self.weight) else self._reference
        for rounds in rounded:
            for start in range(0, len(self.ratios), COLUMNS):
                columns = slice(start, start + COLUMNS)
                shifts = (self.weight - values) @ self.ratios[:, columns]
                step(values, shifts, start, self.ratios[columns, columns], rounds)
        return values

    def _compiled(self, values: Tensor, shifts: Tensor, start: int, ratios: Tensor, rounds: bool) -> None:
        """As _reference, compiled, with bit-identical results."""
        grid = self.grid.grid
        scales, zeros, group_of = map(array, (grid.scales, grid.zeros, self.grid.group_of))
        largest_code = np.float32(grid.largest_code)
        grid_arrays = GridArrays(scales, zeros, group_of, self.grid.codes.numpy(), largest_code, NO_BOOK)
        kernel.descend(self.weight, values, self.keep, shifts, start, ratios, grid_arrays, rounds)

    def _reference(self, values: Tensor, shifts: Tensor, start: int, ratios: Tensor, rounds: bool) -> None:
        for i in range(len(ratios)):
            j = start + i
            best = torch.where(self.keep[:, j], self.weight[:, j] + shifts[:, i], 0.0)
            if rounds:
                group, codes = self.grid.group_of[j : j + 1], self.grid.codes
                codes[:, j] = self.grid.grid.codes(best[:, None], group)[:, 0]
                best = self.grid.grid.values(codes[:, j : j + 1], group)[:, 0]
            change = best - values[:, j]
            values[:, j] = best
            shifts[:, i + 1 :] -= torch.outer(change, ratios[i, i + 1 :])
