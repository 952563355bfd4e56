"""SparseSwaps on a CPU: one compiled loop per row, so that the row's data stay in cache.

Pairs are compared, checked and swapped with the same operations in the same order as in the reference,
`numerics/swap_search.py`, and ties go to the lowest u, then the lowest p. So the swaps are identical; only the number
of pairs examined differs. Let s_j = |w_j| sqrt(G_jj), and let r_u be the largest |correlation| of u with another input.
Then 2 w_u w_p G_up is at most slope_u s_p, with slope_u = 2 r_u s_u. The search skips each kept u whose cost_u + min_p
gain_p - slope_u max_p s_p exceeds a known pair. For each remaining u it skips each p whose gain_p - slope_u s_p is too
large. Rounding is monotone, so a bound computed in the same order of operations as the change holds to the last bit.
The other bounds have slack. In n:m groups the pairs are few, and all are examined.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import boolean, float32, float64, int64

from layerwise.kernels import scans, simd
from layerwise.kernels.rows import compiled, named

ROUND_UP = np.float32(1 + 1e-5)  # covers the rounding of a bound's own products
RELATIVE_SLACK = 1e-6  # share of the terms of a limit on gains, above their rounding
FEW = 16  # up to this many kept weights, a better bound does not pay
PAIRS_AT_ONCE = 64  # pairs whose Gram entries are fetched from memory together
SEGMENTS = 8  # number of chords below f(t) = min_p gain_p - t s_p
TINY = np.float32(1e-30)  # represents the root of a dead input
HUGE = np.finfo(np.float32).max  # represents infinity in subtractions of `simd`


class GramArrays(NamedTuple):
    """Arrays shared by all rows: Gram [in, in], diagonal, root and steepness [in], Grams within groups, padding.

    blocks: [m, m, groups], or empty for whole rows. outside: places that represent no input, int64.
    """

    gram: np.ndarray
    diagonal: np.ndarray
    root: np.ndarray
    steepness: np.ndarray
    blocks: np.ndarray
    outside: np.ndarray


class RowArrays(NamedTuple):
    """Weight, mask and coupling [rows, in], loss [rows] and whether a row may still improve [rows], see SwapState."""

    weight: np.ndarray
    mask: np.ndarray
    coupling: np.ndarray
    loss: np.ndarray
    active: np.ndarray


FLOATS = float32[:, ::1]
GRAM_TYPE = named(GramArrays, FLOATS, float32[::1], float32[::1], float32[::1], float32[:, :, ::1], int64[::1])
ROWS_TYPE = named(RowArrays, FLOATS, boolean[:, ::1], float64[:, ::1], float64[::1], boolean[::1])


@compiled()
def _move(coupling, pruned, restored, weight_u, weight_p):
    """Coupling after the swap; pruned, restored: rows of the Gram."""
    for i in range(len(coupling)):
        coupling[i] += weight_u * np.float64(pruned[i]) - weight_p * np.float64(restored[i])


@compiled()
def _costs(weight, diagonal, coupling, mask, cost, gain):
    """Write the cost of pruning each kept weight and the gain of restoring each pruned one, in float32; inf
    elsewhere."""
    infinite = np.float32(np.inf)
    for i in range(len(weight)):
        w = np.float64(weight[i])
        alone = w * w * np.float64(diagonal[i])
        both = 2 * w * coupling[i]
        cost[i] = np.float32(alone + both) if mask[i] else infinite
        gain[i] = infinite if mask[i] else np.float32(alone - both)


@compiled()
def _bounds(cost, slope, largest, least_gain, bound):
    """Write a lower bound on the change of the loss by any pair with each kept weight."""
    for i in range(len(slope)):
        bound[i] = (least_gain - slope[i] * largest) + cost[i]


@compiled()
def _change(u, p, gram, weight, cost, gain):
    return (gram[u, p] * weight[p]) * (np.float32(-2) * weight[u]) + gain[p] + cost[u]


@compiled()
def _changes(gram, weight_u, weight_p, cost, gain, change):
    """The same for as many pairs as there are entries."""
    for k in range(len(change)):
        change[k] = (gram[k] * weight_p[k]) * (np.float32(-2) * weight_u[k]) + gain[k] + cost[k]


@compiled()
def _better(change, u, p, best, best_u, best_p):
    """Whether a pair is smaller, or equal and earlier in the order of pairs."""
    return change < best or (change == best and (u < best_u or (u == best_u and p < best_p)))


@compiled()
def _best_in_groups(blocks, weight, cost, gain, change):
    """u and p in the same group with the smallest change below zero, or -1 and -1.

    For each two places in a group, all groups are handled at once: blocks [m, m, groups] is the Gram within groups, and
    the other arrays are laid out as [m, groups]. change: scratch memory.
    """
    length, _, groups = blocks.shape
    change = change[:groups]
    best, best_u, best_p = np.float32(0), -1, -1
    for i in range(length):
        for j in range(length):
            if i == j:
                continue
            kept, restored = slice(i * groups, (i + 1) * groups), slice(j * groups, (j + 1) * groups)
            _changes(blocks[i, j], weight[kept], weight[restored], cost[kept], gain[restored], change)
            least = scans.minimum(change)
            if least <= best:
                k = scans.first_at_most(change, least)
                # In the order of the inputs, a group is contiguous.
                if _better(least, k * length + i, k * length + j, best, best_u, best_p):
                    best, best_u, best_p = least, k * length + i, k * length + j
    if best_u < 0:
        return best_u, best_p
    return best_u % length * groups + best_u // length, best_p % length * groups + best_p // length


class SearchTerms(NamedTuple):
    """Terms of a row's inputs: size s_j, slope, the largest s_p, the least gain, and the bound of each kept u."""

    size: np.ndarray
    slope: np.ndarray
    largest: np.float32
    least_gain: np.float32
    bound: np.ndarray


class SearchScratch(NamedTuple):
    """Scratch memory for the search in a row: kept weights tried, partners with gains and sizes, pending pairs."""

    tried: np.ndarray
    partners: np.ndarray
    pairs: np.ndarray
    gains: np.ndarray
    sizes: np.ndarray


@compiled()
def _best_in_row(gram, weight, cost, gain, terms, first, scratch):
    """u and p of the smallest change below zero, or -1 and -1. first: the pair to begin with."""
    best = np.float32(0), -1, -1  # change, u, p
    change = _change(first[0], first[1], gram, weight, cost, gain)
    if change < best[0]:
        best = change, first[0], first[1]
    count = scans.places_at_most(terms.bound, best[0], scratch.tried)
    if count == 0:
        return best[1], best[2]
    widest, steepest, likely = _reach(best[0], cost, terms, scratch.tried[:count])
    filled = _partners(gain, terms.size, widest, scratch)
    if filled == 0:
        return best[1], best[2]
    if count > FEW:
        count = _below_chords(best[0], cost, terms, steepest, count, filled, scratch)

    waiting = 0
    for k in range(-1, count):
        u = scratch.tried[k] if k >= 0 else likely  # the most promising weight first
        if terms.bound[u] <= best[0] and (k < 0 or u != likely):
            limit = _limit(best[0], cost[u], terms.least_gain, terms.slope[u] * terms.largest)
            waiting = _add_pairs(u, terms.slope[u], limit, filled, waiting, scratch)
        if waiting > PAIRS_AT_ONCE or k < 1 or k == count - 1:
            best = _best_of_pairs(gram, weight, cost, gain, scratch.pairs[:waiting], best)
            waiting = 0
    return best[1], best[2]


@compiled()
def _reach(best, cost, terms, tried):
    """The largest gain and the steepest slope of any pair with a weight in `tried`, and the most promising weight.

    gain_p is at most limit_u + slope_u max_p s_p.
    """
    widest, steepest, likely = np.float32(-np.inf), TINY, tried[0]
    for u in tried:
        most = terms.slope[u] * terms.largest
        widest = max(widest, _limit(best, cost[u], terms.least_gain, most) + most)
        steepest = max(steepest, terms.slope[u])
        if terms.bound[u] < terms.bound[likely]:
            likely = u
    return widest, steepest, likely


@compiled()
def _partners(gain, size, widest, scratch):
    """Write the pruned weights whose gain is at most `widest`, with gains and sizes; returns their number, padded to a
    multiple of 16."""
    partners, gains, sizes = scratch.partners, scratch.gains, scratch.sizes
    found = scans.places_at_most(gain, widest, partners)
    filled = -(-found // simd.LANES) * simd.LANES
    for k in range(found):
        gains[k], sizes[k] = gain[partners[k]], size[partners[k]]
    gains[found:filled], sizes[found:filled] = HUGE, np.float32(0)
    return filled


@compiled()
def _below_chords(best, cost, terms, steepest, count, filled, scratch):
    """Remove more kept weights from `tried`; returns how many remain. f is concave, so its chords lie below it."""
    tried, gains, sizes = scratch.tried, scratch.gains[:filled], scratch.sizes[:filled]
    width = steepest / np.float32(SEGMENTS)
    corner = np.empty(SEGMENTS + 2, np.float32)
    for k in range(SEGMENTS + 1):
        corner[k] = scans.minimum_below(gains, sizes, np.float32(k) * width)
    corner[SEGMENTS + 1] = corner[SEGMENTS]
    left = 0
    for k in range(count):
        u = tried[k]
        share = terms.slope[u] / width
        segment = int(share)
        share -= np.float32(segment)
        chord = corner[segment] + share * (corner[segment + 1] - corner[segment])
        tried[left] = u
        left += chord <= _limit(best, cost[u], terms.least_gain, terms.slope[u] * terms.largest)
    return left


@compiled()
def _add_pairs(u, slope, limit, filled, waiting, scratch):
    """Append the pairs of the kept weight u with gain_p - slope_u s_p <= `limit`; returns the number of pending
    pairs."""
    pairs, partners, gains, sizes = scratch.pairs, scratch.partners, scratch.gains, scratch.sizes
    limits, slopes = simd.splat(limit), simd.splat(slope)
    for start in range(0, filled, simd.LANES):
        below = simd.sub(simd.load(gains, start), simd.mul(slopes, simd.load(sizes, start)))
        bits = simd.le_mask(below, limits)
        while bits:
            pairs[waiting, 0], pairs[waiting, 1] = u, partners[start + simd.lowest_bit(bits)]
            waiting += 1
            bits &= bits - np.uint32(1)
    return waiting


@compiled()
def _best_of_pairs(gram, weight, cost, gain, pairs, best):
    """(change, u, p) of the best among these pairs and the best one so far."""
    least, best_u, best_p = best
    for j in range(len(pairs)):
        u, p = pairs[j]
        change = _change(u, p, gram, weight, cost, gain)
        if _better(change, u, p, least, best_u, best_p):
            least, best_u, best_p = change, u, p
    return least, best_u, best_p


@compiled()
def _limit(best, cost, least_gain, largest_term):
    """Limit of gain_p - slope_u s_p above which no pair with this kept weight is as good as `best`, despite
    rounding."""
    slack = np.float32(RELATIVE_SLACK) * (abs(best) + abs(cost) + abs(least_gain) + largest_term)
    return (best - cost) + slack


@compiled()
def _pruned(weight, diagonal, mask):
    """Sum of w_j^2 G_jj over the pruned entries."""
    total = 0.0
    for i in range(len(weight)):
        w = np.float64(weight[i])
        total += 0.0 if mask[i] else w * w * np.float64(diagonal[i])
    return total


class RowTerms(NamedTuple):
    """Terms of a row's inputs: cost and gain of a swap, bound, size, slope, and minus the size of pruned entries."""

    cost: np.ndarray
    gain: np.ndarray
    bound: np.ndarray
    size: np.ndarray
    slope: np.ndarray
    minus_pruned: np.ndarray


@compiled()
def _enter(gram_arrays, weight, mask, terms):
    """Write size, slope and minus_pruned of a row; returns its sum of w_j^2 G_jj."""
    everything = 0.0
    for i in range(len(gram_arrays.root)):
        w = abs(weight[i])
        terms.size[i] = w * gram_arrays.root[i]
        terms.minus_pruned[i] = np.float32(0) if mask[i] else -terms.size[i]
        terms.slope[i] = np.float32(2) * ROUND_UP * (w * gram_arrays.steepness[i])
        everything += np.float64(w) * np.float64(w) * np.float64(gram_arrays.diagonal[i])
    return everything


@compiled()
def _best_pair(gram_arrays, rows, row, terms, scratch):
    """u and p of the row's best swap, or -1 and -1."""
    weight, cost, gain, bound = rows.weight[row], terms.cost, terms.gain, terms.bound
    _costs(weight, gram_arrays.diagonal, rows.coupling[row], rows.mask[row], cost, gain)
    cost[gram_arrays.outside] = np.float32(np.inf)
    least_gain, least_cost = scans.minimum(gain), scans.minimum(cost)
    if not (np.isfinite(least_gain) and np.isfinite(least_cost)):
        return -1, -1
    if len(gram_arrays.blocks):
        return _best_in_groups(gram_arrays.blocks, weight, cost, gain, bound)
    largest = max(-scans.minimum(terms.minus_pruned), TINY)
    _bounds(cost, terms.slope, largest, least_gain, bound)
    search = SearchTerms(terms.size, terms.slope, largest, least_gain, bound)
    first = (scans.first_at_most(cost, least_cost), scans.first_at_most(gain, least_gain))
    return _best_in_row(gram_arrays.gram, weight, cost, gain, search, first, scratch)


@compiled()
def _swap(gram_arrays, rows, row, terms, u, p, tolerance, everything):
    """Prune u and restore p if that is an improvement; returns the change of the row's loss, or 0."""
    gram, diagonal = gram_arrays.gram, gram_arrays.diagonal
    weight, mask, coupling = rows.weight[row], rows.mask[row], rows.coupling[row]
    w, v = np.float64(weight[u]), np.float64(weight[p])
    alone_u, alone_p = w * w * np.float64(diagonal[u]), v * v * np.float64(diagonal[p])
    change = (alone_u + 2 * w * coupling[u]) + (alone_p - 2 * v * coupling[p])
    change -= 2 * w * v * np.float64(gram[u, p])
    # Almost every swap lowers the loss by more than this share of `everything`, which includes the pruned part.
    if not (change < -tolerance * everything or change < -tolerance * _pruned(weight, diagonal, mask)):
        return 0.0
    mask[u], mask[p] = False, True
    terms.minus_pruned[u], terms.minus_pruned[p] = -terms.size[u], np.float32(0)
    _move(coupling, gram[u], gram[p], w, v)
    return change


@compiled([(GRAM_TYPE, ROWS_TYPE, float64[:, :], boolean[:, :], float64)])
def advance(gram_arrays, rows, losses_after, made, tolerance):
    """Make up to len(losses_after) swaps in each row; write each row's loss, and whether the swap was made.

    losses_after, made: [swaps, rows].
    """
    inputs = len(gram_arrays.root)
    padded = -(-inputs // simd.LANES) * simd.LANES
    terms = RowTerms(
        np.full(padded, np.float32(np.inf)),
        np.full(padded, np.float32(np.inf)),
        np.full(padded, np.float32(np.inf)),
        np.empty(inputs, np.float32),
        np.empty(inputs, np.float32),
        np.zeros(padded, np.float32),
    )
    scratch = SearchScratch(
        np.empty(padded, np.int64),
        np.empty(padded, np.int64),
        np.empty((padded + PAIRS_AT_ONCE, 2), np.int64),
        np.empty(padded, np.float32),
        np.empty(padded, np.float32),
    )
    for row in range(len(rows.weight)):
        everything = _enter(gram_arrays, rows.weight[row], rows.mask[row], terms)
        for step in range(len(losses_after)):
            if rows.active[row]:
                u, p = _best_pair(gram_arrays, rows, row, terms, scratch)
                change = _swap(gram_arrays, rows, row, terms, u, p, tolerance, everything) if u >= 0 else 0.0
                made[step, row] = rows.active[row] = change < 0
                rows.loss[row] += change
            losses_after[step, row] = rows.loss[row]
