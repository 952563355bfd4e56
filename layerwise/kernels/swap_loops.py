"""SparseSwaps on a CPU: each row's swaps in one compiled loop, so that the row's data stay in cache.

Pairs are compared, checked and swapped in the arithmetic of the reference in `numerics/swap_search.py`, operation by
operation, and of equal pairs the one of the lowest u, then p, is taken: the swaps are the same. Only how many pairs
are looked at differs. With s_j = |w_j| sqrt(G_jj) and r_u the largest |correlation| of u with another input, 2 w_u
w_p G_up is at most slope_u s_p, slope_u = 2 r_u s_u. Left out are the kept u whose cost_u + min_p gain_p - slope_u
max_p s_p is above a pair that is known; then, for each u that is left, the p whose gain_p - slope_u s_p is too large.
Rounding is monotone: a bound that is computed in the order of a change's own operations holds to the last bit. The
others are given slack. Within the groups of n:m all pairs are few enough.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import boolean, float32, float64, int64

from layerwise.kernels import scans, simd
from layerwise.kernels.rows import compiled, named

ROUND_UP = np.float32(1 + 1e-5)  # over the rounding of a bound's own products
RELATIVE_SLACK = 1e-6  # of the terms of a limit on gains, over their rounding
FEW = 16  # kept weights for so few of which a better bound does not pay
PAIRS_AT_ONCE = 64  # pairs whose entries of the Gram are fetched from memory at the same time
SEGMENTS = 8  # of the chords below f(t) = min_p gain_p - t s_p
TINY = np.float32(1e-30)  # represents the root of a dead input
HUGE = np.finfo(np.float32).max  # represents infinity where `simd` subtracts


class GramArrays(NamedTuple):
    """The arrays that all rows share: Gram [in, in], diagonal, root and steepness [in], Grams within groups, padding.

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
    """Of pruning each kept and restoring each pruned weight, rounded to float32; inf elsewhere."""
    infinite = np.float32(np.inf)
    for i in range(len(weight)):
        w = np.float64(weight[i])
        alone = w * w * np.float64(diagonal[i])
        both = 2 * w * coupling[i]
        cost[i] = np.float32(alone + both) if mask[i] else infinite
        gain[i] = infinite if mask[i] else np.float32(alone - both)


@compiled()
def _bounds(cost, slope, largest, least_gain, bound):
    """No pair of each kept weight changes the loss by less."""
    for i in range(len(slope)):
        bound[i] = (least_gain - slope[i] * largest) + cost[i]


@compiled()
def _change(u, p, gram, weight, cost, gain):
    return (gram[u, p] * weight[p]) * (np.float32(-2) * weight[u]) + gain[p] + cost[u]


@compiled()
def _changes(gram, weight_u, weight_p, cost, gain, change):
    """The same of as many pairs as there are entries."""
    for k in range(len(change)):
        change[k] = (gram[k] * weight_p[k]) * (np.float32(-2) * weight_u[k]) + gain[k] + cost[k]


@compiled()
def _better(change, u, p, best, best_u, best_p):
    """Smaller, or equal and before it in the order of pairs."""
    return change < best or (change == best and (u < best_u or (u == best_u and p < best_p)))


@compiled()
def _best_in_groups(blocks, weight, cost, gain, change):
    """u and p of the smallest change below zero of which both lie in the same group, or -1 and -1.

    Of each two places in a group all groups at a time: blocks [m, m, groups] is the Gram within groups, and the other
    arrays are laid out as [m, groups]. change: memory to work in.
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
                # In the order of the inputs, a group comes whole.
                if _better(least, k * length + i, k * length + j, best, best_u, best_p):
                    best, best_u, best_p = least, k * length + i, k * length + j
    if best_u < 0:
        return best_u, best_p
    return best_u % length * groups + best_u // length, best_p % length * groups + best_p // length


class SearchTerms(NamedTuple):
    """Of the inputs of a row: size s_j, slope, the largest s_p, the least gain, and the bound of each kept u."""

    size: np.ndarray
    slope: np.ndarray
    largest: np.float32
    least_gain: np.float32
    bound: np.ndarray


class SearchScratch(NamedTuple):
    """Memory for the search of a row: kept weights tried, partners with their gains and sizes, pairs waiting."""

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
        u = scratch.tried[k] if k >= 0 else likely  # the most promising one first
        if terms.bound[u] <= best[0] and (k < 0 or u != likely):
            limit = _limit(best[0], cost[u], terms.least_gain, terms.slope[u] * terms.largest)
            waiting = _add_pairs(u, terms.slope[u], limit, filled, waiting, scratch)
        if waiting > PAIRS_AT_ONCE or k < 1 or k == count - 1:
            best = _best_of_pairs(gram, weight, cost, gain, scratch.pairs[:waiting], best)
            waiting = 0
    return best[1], best[2]


@compiled()
def _reach(best, cost, terms, tried):
    """The largest gain and the steepest slope that a pair of one of `tried` may have, and the most promising of these.

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
    """Write the pruned weights whose gain is at most `widest`, with gains and sizes; how many, as a multiple of 16."""
    partners, gains, sizes = scratch.partners, scratch.gains, scratch.sizes
    found = scans.places_at_most(gain, widest, partners)
    filled = -(-found // simd.LANES) * simd.LANES
    for k in range(found):
        gains[k], sizes[k] = gain[partners[k]], size[partners[k]]
    gains[found:filled], sizes[found:filled] = HUGE, np.float32(0)
    return filled


@compiled()
def _below_chords(best, cost, terms, steepest, count, filled, scratch):
    """Leave more kept weights out of `tried`; how many are left. f is concave: its chords lie below it."""
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
    """Append the pairs of the kept weight u whose gain_p - slope_u s_p is at most `limit`; how many are waiting."""
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
    """Change, u and p of the best of these pairs and the best one so far."""
    least, best_u, best_p = best
    for j in range(len(pairs)):
        u, p = pairs[j]
        change = _change(u, p, gram, weight, cost, gain)
        if _better(change, u, p, least, best_u, best_p):
            least, best_u, best_p = change, u, p
    return least, best_u, best_p


@compiled()
def _limit(best, cost, least_gain, largest_term):
    """Of gain_p - slope_u s_p, above which no pair of this kept weight is as good as `best`, whatever the rounding."""
    slack = np.float32(RELATIVE_SLACK) * (abs(best) + abs(cost) + abs(least_gain) + largest_term)
    return (best - cost) + slack


@compiled()
def _pruned(weight, diagonal, mask):
    """Sum of w_j^2 G_jj over what is pruned."""
    total = 0.0
    for i in range(len(weight)):
        w = np.float64(weight[i])
        total += 0.0 if mask[i] else w * w * np.float64(diagonal[i])
    return total


class RowTerms(NamedTuple):
    """Of the inputs of a row: cost and gain of a swap, bound, size, slope, and the size of what is pruned, negative."""

    cost: np.ndarray
    gain: np.ndarray
    bound: np.ndarray
    size: np.ndarray
    slope: np.ndarray
    minus_pruned: np.ndarray


@compiled()
def _enter(gram_arrays, weight, mask, terms):
    """Write size, slope and minus_pruned of a row; its sum of w_j^2 G_jj."""
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
    """Prune u and restore p if that is an improvement; by how much the row's loss changes, 0 where nothing is done."""
    gram, diagonal = gram_arrays.gram, gram_arrays.diagonal
    weight, mask, coupling = rows.weight[row], rows.mask[row], rows.coupling[row]
    w, v = np.float64(weight[u]), np.float64(weight[p])
    alone_u, alone_p = w * w * np.float64(diagonal[u]), v * v * np.float64(diagonal[p])
    change = (alone_u + 2 * w * coupling[u]) + (alone_p - 2 * v * coupling[p])
    change -= 2 * w * v * np.float64(gram[u, p])
    # Nearly every swap lowers the loss by more than the share of everything, of which that of what is pruned is a part.
    if not (change < -tolerance * everything or change < -tolerance * _pruned(weight, diagonal, mask)):
        return 0.0
    mask[u], mask[p] = False, True
    terms.minus_pruned[u], terms.minus_pruned[p] = -terms.size[u], np.float32(0)
    _move(coupling, gram[u], gram[p], w, v)
    return change


@compiled([(GRAM_TYPE, ROWS_TYPE, float64[:, :], boolean[:, :], float64)])
def advance(gram_arrays, rows, losses_after, made, tolerance):
    """Up to len(losses_after) swaps in each row; losses_after: of each row after each swap; made: whether it was made.

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
