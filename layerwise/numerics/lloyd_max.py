"""The scalar quantiser of least mean squared error for a normal variable (Lloyd; Max)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ROUNDS = 100  # limit on Newton steps; about a dozen are needed


@cache
def normal_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels of N(0, 1), in increasing order: each is the mean of the values nearest to it.

    Raises ValueError for bits outside 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8. Got {bits} instead.")
    half = 2 ** (bits - 1)  # the levels are symmetric, so only the positive ones are computed
    spread = (torch.arange(half, dtype=torch.float64) + 0.5) / (2 * half) + 0.5
    levels = 3**0.5 * torch.special.ndtri(spread)  # quantiles of the cube root of the density: nearly optimal
    for _ in range(ROUNDS):
        lost, slopes = _equations(levels)
        step = torch.linalg.solve(slopes, lost)
        levels = levels - step
        if float(step.abs().max()) < 1e-14:
            break
    return tuple([*(-levels.flip(0)).tolist(), *levels.tolist()])


def _equations(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Level minus the mean of its cell, [levels], and the derivatives by the levels, for positive increasing levels."""
    bounds = torch.cat([torch.zeros(1, dtype=torch.float64), (levels[1:] + levels[:-1]) / 2])
    density = torch.cat([torch.exp(-bounds.square() / 2) / (2 * torch.pi) ** 0.5, torch.zeros(1, dtype=torch.float64)])
    above = torch.cat([torch.special.erfc(bounds / 2**0.5) / 2, torch.zeros(1, dtype=torch.float64)])
    mass, mean = above[:-1] - above[1:], (density[:-1] - density[1:]) / (above[:-1] - above[1:])
    slopes = torch.eye(len(levels), dtype=torch.float64)
    lower = density[1:-1] * (mean[1:] - bounds[1:]) / mass[1:]  # derivative of each mean by its lower bound
    upper = density[1:-1] * (bounds[1:] - mean[:-1]) / mass[:-1]  # and by its upper bound
    places = torch.arange(len(levels) - 1)
    for row, own in ((places + 1, lower), (places, upper)):
        slopes[row, places] -= own / 2
        slopes[row, places + 1] -= own / 2
    return levels - mean, slopes
