"""Minima of float32 arrays and their positions, sixteen entries at a time. Lengths are multiples of sixteen."""

import numpy as np

from layerwise.kernels import simd
from layerwise.kernels.rows import compiled


@compiled()
def minimum(values):
    """Minimum of values [a multiple of 16] without NaN."""
    least = simd.load(values, 0)
    for start in range(simd.LANES, len(values), simd.LANES):
        least = simd.minimum(least, simd.load(values, start))
    return simd.reduce_min(least)


@compiled()
def minimum_below(values, slopes, t):
    """Minimum of values - t * slopes [a multiple of 16] without NaN."""
    times = simd.splat(t)
    least = simd.load(values, 0)
    for start in range(0, len(values), simd.LANES):
        below = simd.sub(simd.load(values, start), simd.mul(times, simd.load(slopes, start)))
        least = simd.minimum(least, below)
    return simd.reduce_min(least)


@compiled()
def places_at_most(values, limit, found):
    """Write the indices of values [a multiple of 16] of at most `limit` to `found`, in order; returns their number."""
    count = 0
    limits = simd.splat(limit)
    for start in range(0, len(values), simd.LANES):
        bits = simd.le_mask(simd.load(values, start), limits)
        while bits:
            found[count] = start + simd.lowest_bit(bits)
            count += 1
            bits &= bits - np.uint32(1)
    return count


@compiled()
def first_at_most(values, limit):
    """The first index at which values [a multiple of 16] are at most `limit`; there must be one."""
    limits = simd.splat(limit)
    for start in range(0, len(values), simd.LANES):
        bits = simd.le_mask(simd.load(values, start), limits)
        if bits:
            return start + simd.lowest_bit(bits)
    return 0
