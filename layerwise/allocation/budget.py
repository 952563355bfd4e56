"""Levels that meet a budget: the one function that every allocator's proposal passes through.

The mean of the levels, weighted by the number of weights in each layer, equals the target's level. For shares of zeros
it agrees to within one weight. For n:m patterns and bits, one number is added to all proposals before rounding, and the
mean is the nearest that such whole numbers can reach.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from layerwise.contract.allocator_card import MOST
from layerwise.contract.target import Target

BITS = (2, 8)
FARTHEST = 1000.0  # proposals are clipped to this size, which is beyond every limit
Floats = NDArray[np.float64]


def held(proposed: Sequence[float], sizes: Sequence[int], target: Target) -> list[float]:
    """The levels for layers of these sizes (numbers of weights), computed from the proposed levels.

    Levels that meet the budget and lie within the limits are returned unchanged. Otherwise one number is added to all
    of them and the sums are clipped to the limits, so that equal proposals stay equal. Raises ValueError for a proposal
    that is not one finite number per layer, and for a budget that no levels can meet.
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
    """Number of weights (or bits, for a target with bits alone) by which the levels exceed the budget."""
    whole = zip(levels, sizes, strict=True)
    return math.fsum(size * level for level, size in whole) - target.level * sum(sizes)


def _shares(levels: Floats, sizes: Floats, budget: float) -> Floats:
    wanted = budget * sizes.sum()
    cut = np.clip(levels, 0.0, MOST)
    if abs(cut @ sizes - wanted) <= 1.0:
        return cut
    levels = np.clip(levels, -FARTHEST, FARTHEST)
    low, high = -FARTHEST - 1, FARTHEST + 1
    for _ in range(200):  # the sum rises with the shift: bisect until two neighbouring floats remain
        middle = (low + high) / 2
        below = np.clip(levels + middle, 0.0, MOST) @ sizes < wanted
        low, high = (middle, high) if below else (low, middle)
    return np.clip(levels + high, 0.0, MOST)


def _whole(levels: Floats, sizes: Sequence[int], budget: int, limits: tuple[int, int]) -> NDArray[np.int64]:
    """Whole numbers within the limits: floor(level + t + 1/2), with the t that brings the mean nearest the budget."""
    least, most = limits
    levels = np.clip(levels, least - FARTHEST, most + FARTHEST)
    steps = np.arange(least + 1, most + 1)
    shifts = steps[None, :] - 0.5 - levels[:, None]  # [layers, steps] smallest t at which a layer takes the step
    order = np.argsort(shifts, axis=None, kind="stable")
    ascending = shifts.flat[order]
    weights = np.repeat(np.array(sizes, dtype=np.int64), len(steps))[order]
    sums = least * int(sum(sizes)) + np.concatenate([[0], np.cumsum(weights)])
    # A sum is reachable where the next step has a larger t.
    reached = np.concatenate([[True], ascending[1:] > ascending[:-1], [True]])
    distance = np.where(reached, np.abs(sums - budget * int(sum(sizes))), np.iinfo(np.int64).max)
    best = np.flatnonzero(distance == distance.min())
    ends = [ascending[index - 1] if index else ascending[0] for index in best]
    index = int(best[int(np.argmin(np.abs(ends)))])
    taken = shifts <= ascending[index - 1] if index else np.zeros_like(shifts, dtype=bool)
    return least + taken.sum(axis=1)
