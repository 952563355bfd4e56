"""Levels that hold a budget: the one function that every allocator's proposal goes through.

The mean of the levels, weighted by the layers' weights, is the target's own level: to within one weight for shares of
zeros, and, for n:m patterns and bits, as near as whole numbers come that one number added to all proposals gives.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from layerwise.contract.target import Target

MOST = 0.99  # share of zeros of a layer
BITS = (2, 8)
FARTHEST = 1000.0  # a proposal beyond this is as far from every level as it can be
Floats = NDArray[np.float64]


def held(proposed: Sequence[float], sizes: Sequence[int], target: Target) -> list[float]:
    """The levels that layers of these sizes (weights) get, from what was proposed for them.

    Levels that hold the budget and lie within the limits are returned as they are. Others are all moved by one number,
    then cut off at the limits, so that what was proposed alike stays alike. Raises ValueError for a proposal that is
    not one finite number for each layer, and for a budget that no levels hold.
    """
    levels = np.array([float(level) for level in proposed])
    if len(levels) != len(sizes) or not np.isfinite(levels).all():
        raise ValueError(f"levels must be {len(sizes)} finite numbers. Got {list(proposed)[:8]} instead")
    if target.n_of_m:
        n, m = target.n_of_m
        return [float(Fraction(int(count), m)) for count in _whole(levels * m, sizes, m - n, (0, m - 1))]
    if target.budget == "bits":
        assert target.bits is not None
        return [float(bits) for bits in _whole(levels, sizes, target.bits, BITS)]
    if target.level > MOST:
        raise ValueError(f"a budget must be at most {MOST:g}. Got {target.level:g} instead")
    return _shares(levels, np.array(sizes, dtype=np.float64), target.level).tolist()


def excess(levels: Sequence[float], sizes: Sequence[int], target: Target) -> float:
    """Weights that levels give beyond the budget; of a target with bits alone, bits."""
    whole = zip(levels, sizes, strict=True)
    return math.fsum(size * level for level, size in whole) - target.level * sum(sizes)


def _shares(levels: Floats, sizes: Floats, budget: float) -> Floats:
    wanted = budget * sizes.sum()
    cut = np.clip(levels, 0.0, MOST)
    if abs(cut @ sizes - wanted) <= 1.0:
        return cut
    levels = np.clip(levels, -FARTHEST, FARTHEST)
    low, high = -FARTHEST - 1, FARTHEST + 1
    for _ in range(200):  # the sum rises with the shift: halved until two neighbouring numbers are left
        middle = (low + high) / 2
        below = np.clip(levels + middle, 0.0, MOST) @ sizes < wanted
        low, high = (middle, high) if below else (low, middle)
    return np.clip(levels + high, 0.0, MOST)


def _whole(levels: Floats, sizes: Sequence[int], budget: int, limits: tuple[int, int]) -> NDArray[np.int64]:
    """Whole numbers within the limits, floor(level + t + 1/2) for the t whose weighted mean is nearest the budget."""
    least, most = limits
    levels = np.clip(levels, least - FARTHEST, most + FARTHEST)
    steps = np.arange(least + 1, most + 1)
    shifts = steps[None, :] - 0.5 - levels[:, None]  # [layers, steps] from which t on a layer takes the step
    order = np.argsort(shifts, axis=None, kind="stable")
    ascending = shifts.flat[order]
    weights = np.repeat(np.array(sizes, dtype=np.int64), len(steps))[order]
    sums = least * int(sum(sizes)) + np.concatenate([[0], np.cumsum(weights)])
    # A sum is reached where the next step is a later one.
    reached = np.concatenate([[True], ascending[1:] > ascending[:-1], [True]])
    distance = np.where(reached, np.abs(sums - budget * int(sum(sizes))), np.iinfo(np.int64).max)
    best = np.flatnonzero(distance == distance.min())
    ends = [ascending[index - 1] if index else ascending[0] for index in best]
    index = int(best[int(np.argmin(np.abs(ends)))])
    taken = shifts <= ascending[index - 1] if index else np.zeros_like(shifts, dtype=bool)
    return least + taken.sum(axis=1)
