"""Pairwise steps on relaxed masks: mass moves between two entries of a comparison group, by the optimal amount.

Let p = (w o (1 - m)) G for a row. A step raises entry u and lowers entry v. It takes the group with the greatest
difference between the largest w_j p_j of an entry that can be raised and the smallest of one that can be lowered. u has
that largest value, and v is the entry of the group that reduces the error most. The unused part of a group's sum counts
as an entry of weight zero. All sums are float64.

Rows are stored by place: for n:m the first entries of all groups, then the second entries, and so on. A row that is a
single group is stored in STRIPES columns.
"""

from typing import NamedTuple

import numpy as np
from numba import boolean, float32, float64, int64

from layerwise.kernels.rows import compiled, named

STRIPES = 64
FIXED = 2.0  # value in a relaxed mask: fixed at one, or padding at the end
UNUSED = -1  # index of the entry of weight zero: the unused part of a group's sum
FASTMATH = {"contract", "nnan", "nsz"}


@compiled(fastmath=FASTMATH)
def _shift(product, one, a, other, b):
    """product [in] += a * one + b * other, rows of the Gram."""
    for j in range(len(product)):
        product[j] += a * one[j] + b * other[j]


@compiled(fastmath=FASTMATH)
def _extremes(weight, relaxed, product, highest, lowest):
    """Per lane, the largest w_j p_j of entries that can be raised and the smallest of entries that can be lowered."""
    lanes = len(highest)
    highest[:], lowest[:] = -np.inf, np.inf
    for begin in range(0, len(weight), lanes):
        w, m, p = weight[begin : begin + lanes], relaxed[begin : begin + lanes], product[begin : begin + lanes]
        for g in range(lanes):
            score = w[g] * p[g]
            highest[g] = max(highest[g], score if m[g] < 1 else -np.inf)
            lowest[g] = min(lowest[g], score if (m[g] > 0) & (m[g] <= 1) else np.inf)


@compiled()
def _raised(weight, relaxed, product, value, lane, lanes):
    """The first entry of the lane that can be raised and has w_j p_j = value; UNUSED if the value is below zero."""
    if value >= 0:
        for j in range(lane, len(weight), lanes):
            if relaxed[j] < 1 and weight[j] * product[j] == value:
                return j
    return UNUSED


@compiled()
def _lowered(u, top, spare, weight, product, gram, candidates, count):
    """(place in candidates, or UNUSED, or -2 for none; w_v p_v; curvature) of the entry best lowered for u."""
    alone = 0.0 if u == UNUSED else np.float64(weight[u]) * weight[u] * gram[u, u]
    most, place, bottom, curvature = 0.0, -2, 0.0, 1.0
    if spare > 0 and top > 0:
        most, place, curvature = (top * top / alone if alone > 0 else np.inf), UNUSED, alone
    for i in range(count):
        v = candidates[i]
        fall = top - weight[v] * product[v]
        if fall <= 0:
            continue
        w = np.float64(weight[v])
        bend = alone + w * w * gram[v, v]
        if u != UNUSED:
            bend -= 2 * weight[u] * w * gram[u, v]
        gain = fall * fall / bend if bend > 0 else np.inf
        if gain > most:
            most, place, bottom, curvature = gain, i, weight[v] * product[v], bend
    return place, bottom, curvature


@compiled()
def _size(slope, curvature, most):
    return min(slope / curvature, most) if curvature > 0 else most


@compiled()
def _supported(relaxed, first, step, found):
    """Write those of the entries first, first + step, ... that can be lowered to `found`; returns their number."""
    count = 0
    for j in range(first, len(relaxed), step):
        if 0 < relaxed[j] <= 1:
            found[count] = j
            count += 1
    return count


class ExchangeState(NamedTuple):
    """Weight [out, in] and Gram [in, in] (float32), relaxed mask and product [out, in] (float64), place by place."""

    weight: np.ndarray
    gram: np.ndarray
    relaxed: np.ndarray
    product: np.ndarray


FLOATS, DOUBLES = float32[:, ::1], float64[:, ::1]
STATE_TYPE = named(ExchangeState, FLOATS, FLOATS, DOUBLES, DOUBLES)


@compiled([(STATE_TYPE, DOUBLES, boolean[::1], int64, int64, int64)])
def exchange_rows(state, spare, active, steps, first, last):
    """Make up to `steps` exchanges in each active row, in place.

    spare: [out, groups], the limit of each group's mask sum minus the sum.
    """
    weight, gram, relaxed, product = state
    groups = spare.shape[1]
    lanes = STRIPES if groups == 1 else groups
    highest, lowest = np.empty(lanes), np.empty(lanes)
    candidates = np.empty(weight.shape[1] + 1, np.int64)
    nothing = np.zeros(weight.shape[1], np.float32)
    for row in range(first, last):
        if not active[row]:
            continue
        w, m, p, left = weight[row], relaxed[row], product[row], spare[row]
        count = _supported(m, 0, 1, candidates) if groups == 1 else 0
        for _ in range(steps):
            _extremes(w, m, p, highest, lowest)
            if groups == 1:
                lane, group = np.argmax(highest), 0
            else:
                widest, group = 0.0, 0
                for g in range(groups):
                    low = min(lowest[g], 0.0) if left[g] > 0 else lowest[g]
                    if max(highest[g], 0.0) - low > widest:
                        widest, group = max(highest[g], 0.0) - low, g
                lane = group
                count = _supported(m, group, groups, candidates)
            top = max(highest[lane], 0.0)
            u = _raised(w, m, p, highest[lane], lane, lanes)
            place, bottom, curvature = _lowered(u, top, left[group], w, p, gram, candidates, count)
            if place < UNUSED:
                break
            v = candidates[place] if place >= 0 else UNUSED
            most = min(1 - m[u] if u >= 0 else np.inf, m[v] if v >= 0 else left[group])
            size = _size(top - bottom, curvature, most)
            one, other, a, b = nothing, nothing, 0.0, 0.0
            if u >= 0:
                if groups == 1 and m[u] == 0:
                    candidates[count] = u
                    count += 1
                one, a = gram[u], -size * w[u]
                m[u] = 1.0 if size == 1 - m[u] else m[u] + size
            else:
                left[group] += size
            if v >= 0:
                other, b = gram[v], size * w[v]
                m[v] -= size
                if groups == 1 and m[v] == 0:
                    count -= 1
                    candidates[place] = candidates[count]
            else:
                left[group] -= size
            _shift(p, one, a, other, b)


@compiled()
def _ends(weight, relaxed, product, highest, lowest):
    """(u, w_u p_u, v, w_v p_v) of the best entries of a row to raise and to lower; -inf and inf if there is none."""
    _extremes(weight, relaxed, product, highest, lowest)
    lane = np.argmax(highest)
    high = highest[lane]
    u = lane
    for j in range(lane, len(weight), len(highest)):
        if relaxed[j] < 1 and weight[j] * product[j] == high:
            u = j
            break
    lane = np.argmin(lowest)
    low = lowest[lane]
    v = lane
    for j in range(lane, len(weight), len(highest)):
        if 0 < relaxed[j] <= 1 and weight[j] * product[j] == low:
            v = j
            break
    return u, high, v, low


@compiled([float64(STATE_TYPE, float64, int64)])
def exchange_layer(state, spare, steps):
    """Make up to `steps` exchanges in a layer that is one group, in place; returns the unused part of its sum
    afterwards.

    In rows other than u's, only the entry with the smallest w_j p_j may be lowered.
    """
    weight, gram, relaxed, product = state
    rows, inputs = weight.shape
    highest, lowest = np.empty(STRIPES), np.empty(STRIPES)
    candidates = np.empty(inputs, np.int64)
    raised, lowered = np.empty(rows, np.int64), np.empty(rows, np.int64)
    tops, bottoms, bends = np.empty(rows), np.empty(rows), np.empty(rows)
    for row in range(rows):
        raised[row], tops[row], lowered[row], bottoms[row] = _ends(
            weight[row], relaxed[row], product[row], highest, lowest
        )
        bends[row] = np.float64(weight[row, lowered[row]]) ** 2 * gram[lowered[row], lowered[row]]
    for _ in range(steps):
        r = np.argmax(tops)
        top = max(tops[r], 0.0)
        u = raised[r] if tops[r] >= 0 else UNUSED
        w, m, p = weight[r], relaxed[r], product[r]
        count = _supported(m, 0, 1, candidates)
        place, bottom, curvature = _lowered(u, top, spare, w, p, gram, candidates, count)
        gain = 0.0
        if place >= UNUSED:
            gain = (top - bottom) ** 2 / curvature if curvature > 0 else np.inf
        alone = np.float64(w[u]) ** 2 * gram[u, u] if u >= 0 else 0.0
        s = r
        for q in range(rows):
            if q != r and bottoms[q] < top:
                bend = alone + bends[q]
                other = (top - bottoms[q]) ** 2 / bend if bend > 0 else np.inf
                if other > gain:
                    gain, s, bottom, curvature = other, q, bottoms[q], bend
        if gain == 0:
            break
        v = lowered[s] if s != r else (candidates[place] if place >= 0 else UNUSED)
        most = min(1 - m[u] if u >= 0 else np.inf, relaxed[s, v] if v >= 0 else spare)
        size = _size(top - bottom, curvature, most)
        if u >= 0:
            m[u] = 1.0 if size == 1 - m[u] else m[u] + size
            _shift(p, gram[u], -size * w[u], gram[u], 0.0)
        else:
            spare += size
        if v >= 0:
            relaxed[s, v] -= size
            _shift(product[s], gram[v], size * weight[s, v], gram[v], 0.0)
        else:
            spare -= size
        for q in (r, s):
            raised[q], tops[q], lowered[q], bottoms[q] = _ends(weight[q], relaxed[q], product[q], highest, lowest)
            bends[q] = np.float64(weight[q, lowered[q]]) ** 2 * gram[lowered[q], lowered[q]]
    return spare
