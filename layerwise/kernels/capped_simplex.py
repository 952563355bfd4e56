"""Compiled projection on the capped simplex: entries in [0, 1] that sum to a count, group by group."""

import numpy as np
from numba import float64, int64

from layerwise.kernels.rows import compiled

NEWTON_STEPS = 60
ENOUGH = 1e-10  # error of a group's sum, per entry of the group
FASTMATH = {"contract", "reassoc", "nnan", "nsz"}
DOUBLES = float64[:, ::1]


@compiled(fastmath=FASTMATH)
def _range(point, curvature):
    """The price at which every entry is at least 1, and the price at which none is above 0."""
    low, high = np.inf, -np.inf
    for j in range(len(point)):
        low = min(low, (point[j] - 1) * curvature[j])
        high = max(high, point[j] * curvature[j])
    return low, high


@compiled(fastmath=FASTMATH)
def _sum_at(price, point, inverse):
    """The sum of clip(point - price * inverse, 0, 1), and minus its derivative by the price."""
    total, slope = 0.0, 0.0
    for j in range(len(point)):
        free = point[j] - price * inverse[j]
        total += min(max(free, 0.0), 1.0)
        slope += inverse[j] if (free > 0) & (free < 1) else 0.0
    return total, slope


@compiled()
def _price(start, wanted, point, curvature, inverse):
    """The price at which a group's entries sum to `wanted`: Newton's method, or bisection if that leaves the range."""
    low, high = _range(point, curvature)
    price = min(max(start, low), high)
    for _ in range(NEWTON_STEPS):
        total, slope = _sum_at(price, point, inverse)
        excess = total - wanted
        if abs(excess) <= ENOUGH * len(point):
            break
        if excess > 0:
            low = price
        else:
            high = price
        newton = price + excess / slope if slope > 0 else low
        price = newton if low < newton < high else (low + high) / 2
    return price


@compiled([(DOUBLES, DOUBLES, DOUBLES, DOUBLES, int64[::1], int64, int64, int64)])
def project_rows(point, curvature, inverse, price, pruned, size, first, last):
    """Replace rows of point by their projection in the metric of curvature > 0, and the prices by the groups' prices.

    inverse: 1 / curvature. price: [rows, groups], in: a starting value. pruned: sum of each group of `size` consecutive
    entries.
    """
    inputs = point.shape[1]
    for row in range(first, last):
        for group in range(len(pruned)):
            begin, end = group * size, min((group + 1) * size, inputs)
            p, c, i = point[row, begin:end], curvature[row, begin:end], inverse[row, begin:end]
            t = _price(price[row, group], float(pruned[group]), p, c, i)
            price[row, group] = t
            for j in range(end - begin):
                p[j] = min(max(p[j] - t * i[j], 0.0), 1.0)
