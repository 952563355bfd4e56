"""A matrix X as a dense factor times a sparse one, X ~ U V, as in ROCKET: entries of V, the best U, steps on both."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwise.numerics import ops
from layerwise.numerics.adam import Adam

RIDGE = 1e-3  # of the least squares, as a share of the mean eigenvalue of V V^T
RATE = 1e-3  # of Adam, as released: about the change of an entry in one step


def kept_entries(values: Tensor, size: Tensor, in_column: int, count: int) -> Tensor:
    """[r, out] bool: `count` entries of V `values` [r, out], of which each column has `in_column` or more.

    First the largest |V| sqrt(size) of each column, size [r] >= 0; then, of all others, the largest |V| size.
    """
    rank, out = values.shape
    if rank == 0:
        return values.bool()
    importance = values.abs() * size.sqrt()[:, None]
    kept = ops.keep_largest(importance.T, rank - in_column).T
    back = torch.where(kept, -1.0, values.abs() * size[:, None]).flatten()
    more = count - in_column * out
    return kept | ~ops.keep_largest(-back, more).view_as(kept) if more else kept


def fitted(aim: Tensor, right: Tensor) -> Tensor:
    """U [in, r] of the least ||X - U V||^2, with a ridge, for X `aim` [in, out] and V `right` [r, out], all float64."""
    square = right @ right.T
    ridge = RIDGE * float(square.diagonal().mean()) if square.any() else 1.0
    return torch.linalg.solve(square + ridge * torch.eye(len(square)).to(square), right @ aim.T).T


def refined(
    aim: Tensor, left: Tensor, right: Tensor, kept: Tensor, steps: int, unit: float | None = None
) -> tuple[Tensor, Tensor]:
    """U [in, r] and V [r, out] with the least ||X - U V|| among the given ones and so many steps of Adam from them.

    Each step lowers ||X - U V||^2 / ||X||^2 by both factors. Their entries move by about RATE, whatever their size, and
    `unit` multiplies V and X before. None: the kept entries of V become as large as those of U. kept: [r, out] bool,
    False where V is 0 and stays so.
    """
    best, least = (left, right), math.inf
    if not right.any():
        return best
    unit = unit or float(left.square().mean().sqrt() / right[kept].square().mean().sqrt())
    aim, left, right = unit * aim, left.clone(), unit * right
    adam, total = Adam([left, right]), float(aim.norm()) ** 2
    for step in range(steps + 1):
        missed = aim - left @ right
        error = float(missed.norm())  # its square would take another matrix
        if error < least:
            best, least = (left.clone(), right / unit), error
        if step < steps:
            slope = missed.mul_(-2 / total)
            adam.update((slope @ right.T, torch.where(kept, left.T @ slope, 0.0)), RATE)
    return best
