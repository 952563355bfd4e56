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

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numba import boolean, float32, float64, int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from layerwise.kernels import simd
from layerwise.kernels.rows import array, compiled, named
from layerwise.kernels.swap_state import TOLERANCE, SwapState

ROUNDS = 32  # between two looks at the clock
TASK_ROWS = 8  # of a thread's task: rows differ in how long they take
ROUND_UP = np.float32(1 + 1e-5)  # over the rounding of a bound's own products
RELATIVE_SLACK = 1e-6  # of the terms of a limit on gains, over their rounding
FEW = 16  # kept weights for so few of which a better bound does not pay
PAIRS_AT_ONCE = 64  # pairs whose entries of the Gram are fetched from memory at the same time
SEGMENTS = 8  # of the chords below f(t) = min_p gain_p - t s_p
TINY = np.float32(1e-30)  # stands for the root of a dead input
HUGE = np.finfo(np.float32).max  # stands for infinity where `simd` subtracts


class GramArrays(NamedTuple):
    """What all rows share: Gram [in, in], its diagonal, root and steepness [in], the Grams within groups, padding.

    blocks: [m, m, groups], or empty for whole rows. outside: places that stand for no input, int64.
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


def swap_rounds(rows: SwapState, swaps: int | None) -> Iterator[tuple[float, float, int]]:
    """As `numerics.swap_search.swap_rounds`. Between two looks at the clock every swap is taken to last equally long.

    The clock is read every ROUNDS rounds. Runs on torch.get_num_threads() threads, each of which takes a few rows at a
    time.
    """
    start = time.perf_counter()
    inputs = rows.weight.shape[1]
    origin = origins(inputs, rows.length) if rows.length else torch.arange(inputs)
    layout = by_place(rows, origin) if rows.length else rows
    blocks = group_blocks(rows.gram, rows.length) if rows.length else torch.empty(0, 0, 0)
    outside = (origin == inputs).nonzero().flatten()
    root = layout.gram.diagonal().clamp(min=0).sqrt().clamp(min=float(TINY))
    slope = root if rows.length else (layout.gram.abs() / root).fill_diagonal_(0.0).amax(1)
    gram = GramArrays(*map(array, (layout.gram, layout.gram.diagonal(), root, slope, blocks, outside)))
    matrices = [x.numpy() for x in (layout.weight, layout.mask, layout.coupling, layout.loss)]
    active = np.ones(len(rows.mask), np.bool_)

    def advance(losses: NDArray[np.float64], made: NDArray[np.bool_], first: int) -> None:
        part = slice(first, first + TASK_ROWS)
        rows_of_task = RowArrays(*(x[part] for x in (*matrices, active)))
        _advance(gram, rows_of_task, losses[:, part], made[:, part], TOLERANCE)

    done, began = 0, 0.0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while active.any() and (swaps is None or done < swaps):
            count = ROUNDS if swaps is None else min(ROUNDS, swaps - done)
            losses, made = np.empty((count, len(active))), np.zeros((count, len(active)), np.bool_)
            list(pool.map(partial(advance, losses, made), range(0, len(active), TASK_ROWS)))
            ended = time.perf_counter() - start
            swapped = made.sum(1)
            until = began + (ended - began) * swapped.cumsum() / max(swapped.sum(), 1)
            for seconds, loss, number in zip(until, losses, swapped, strict=True):
                if number:
                    yield float(seconds), float(torch.from_numpy(loss).sum()), int(number)
            done, began = done + count, ended
    if rows.length:
        rows.mask[:, origin[origin < inputs]] = layout.mask[:, origin < inputs]


def origins(inputs: int, length: int) -> Tensor:
    """[m * groups] int64, the input at each place; `inputs` stands for padding; groups: a multiple of 16.

    The first inputs of all groups come first, then the second ones, and so on.
    """
    groups = -(-inputs // (length * simd.LANES)) * simd.LANES
    place = torch.arange(length * groups)
    return (place % groups * length + place // groups).clamp(max=inputs)


def by_place(rows: SwapState, origin: Tensor) -> SwapState:
    """The rows with their inputs in the order `origin`; padding is a kept weight of zero."""
    weight, coupling = (pad(x, (0, 1))[:, origin] for x in (rows.weight, rows.coupling))
    gram = pad(rows.gram, (0, 1, 0, 1))[origin][:, origin]
    mask = pad(rows.mask, (0, 1), value=True)[:, origin]
    return SwapState(weight, gram, mask, coupling, rows.loss, rows.length)


def group_blocks(gram: Tensor, length: int) -> Tensor:
    """[m, m, groups] the Gram within each group; groups: a multiple of 16, those at the end zero."""
    missing = -len(gram) % (length * simd.LANES)
    padded = pad(gram, (0, missing, 0, missing))
    return padded.unflatten(0, (-1, length)).unflatten(2, (-1, length)).diagonal(dim1=0, dim2=2)


@compiled()
def _least(values):
    """Minimum of values [a multiple of 16], none of them nan."""
    least = simd.load(values, 0)
    for start in range(simd.LANES, len(values), simd.LANES):
        least = simd.minimum(least, simd.load(values, start))
    return simd.reduce_min(least)


@compiled()
def _least_below(values, slopes, t):
    """Minimum of values - t * slopes [a multiple of 16], none of them nan."""
    times = simd.splat(t)
    least = simd.load(values, 0)
    for start in range(0, len(values), simd.LANES):
        below = simd.sub(simd.load(values, start), simd.mul(times, simd.load(slopes, start)))
        least = simd.minimum(least, below)
    return simd.reduce_min(least)


@compiled()
def _places(values, limit, found):
    """Write the places where values [a multiple of 16] are at most `limit` to `found`, in order; how many they are."""
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
def _place(values, limit):
    """The first place where values [a multiple of 16] are at most `limit`; there must be one."""
    limits = simd.splat(limit)
    for start in range(0, len(values), simd.LANES):
        bits = simd.le_mask(simd.load(values, start), limits)
        if bits:
            return start + simd.lowest_bit(bits)
    return 0


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
            least = _least(change)
            if least <= best:
                k = _place(change, least)
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
    size, slope, largest, least_gain, bound = terms
    tried, partners, pairs, gains, sizes = scratch
    best, best_u, best_p = np.float32(0), -1, -1
    change = _change(first[0], first[1], gram, weight, cost, gain)
    if change < best:
        best, best_u, best_p = change, first[0], first[1]
    count = _places(bound, best, tried)
    if count == 0:
        return best_u, best_p

    # The partners that any u that is left can have: gain_p is at most limit_u + slope_u max_p s_p.
    widest, steepest, likely = np.float32(-np.inf), TINY, tried[0]
    for k in range(count):
        u = tried[k]
        most = slope[u] * largest
        widest = max(widest, _limit(best, cost[u], least_gain, most) + most)
        steepest = max(steepest, slope[u])
        if bound[u] < bound[likely]:
            likely = u
    found = _places(gain, widest, partners)
    if found == 0:
        return best_u, best_p
    filled = -(-found // simd.LANES) * simd.LANES
    for k in range(found):
        gains[k], sizes[k] = gain[partners[k]], size[partners[k]]
    gains[found:filled], sizes[found:filled] = HUGE, np.float32(0)

    if count > FEW:  # f is concave: its chords lie below it, and leave more kept weights out
        width = steepest / np.float32(SEGMENTS)
        corner = np.empty(SEGMENTS + 2, np.float32)
        for k in range(SEGMENTS + 1):
            corner[k] = _least_below(gains[:filled], sizes[:filled], np.float32(k) * width)
        corner[SEGMENTS + 1] = corner[SEGMENTS]
        left = 0
        for k in range(count):
            u = tried[k]
            share = slope[u] / width
            segment = int(share)
            share -= np.float32(segment)
            chord = corner[segment] + share * (corner[segment + 1] - corner[segment])
            tried[left] = u
            left += chord <= _limit(best, cost[u], least_gain, slope[u] * largest)
        count = left

    waiting = 0
    for k in range(-1, count):
        u = tried[k] if k >= 0 else likely  # the most promising one first
        if bound[u] <= best and (k < 0 or u != likely):
            limits = simd.splat(_limit(best, cost[u], least_gain, slope[u] * largest))
            slopes = simd.splat(slope[u])
            for start in range(0, filled, simd.LANES):
                below = simd.sub(simd.load(gains, start), simd.mul(slopes, simd.load(sizes, start)))
                bits = simd.le_mask(below, limits)
                while bits:
                    pairs[waiting, 0], pairs[waiting, 1] = u, partners[start + simd.lowest_bit(bits)]
                    waiting += 1
                    bits &= bits - np.uint32(1)
        if waiting > PAIRS_AT_ONCE or k < 1 or k == count - 1:
            for j in range(waiting):
                u, p = pairs[j]
                change = _change(u, p, gram, weight, cost, gain)
                if _better(change, u, p, best, best_u, best_p):
                    best, best_u, best_p = change, u, p
            waiting = 0
    return best_u, best_p


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


@compiled([(GRAM_TYPE, ROWS_TYPE, float64[:, :], boolean[:, :], float64)])
def _advance(gram_arrays, rows, losses_after, made, tolerance):
    """Up to len(losses_after) swaps in each row; losses_after: of each row after each swap; made: whether it was made.

    losses_after, made: [swaps, rows].
    """
    gram, diagonal, root, steepness, blocks, outside = gram_arrays
    weights, masks, couplings, losses, active = rows
    inputs = len(root)
    padded = -(-inputs // simd.LANES) * simd.LANES
    cost = np.full(padded, np.float32(np.inf))
    gain, bound = cost.copy(), cost.copy()
    size, slope = np.empty(inputs, np.float32), np.empty(inputs, np.float32)
    minus_pruned = np.zeros(padded, np.float32)  # size of what is pruned, negative
    scratch = SearchScratch(
        np.empty(padded, np.int64),
        np.empty(padded, np.int64),
        np.empty((padded + PAIRS_AT_ONCE, 2), np.int64),
        np.empty(padded, np.float32),
        np.empty(padded, np.float32),
    )
    least_gain, least_cost = np.float32(np.inf), np.float32(np.inf)
    for row in range(len(weights)):
        weight, mask, coupling = weights[row], masks[row], couplings[row]
        everything = 0.0
        for i in range(inputs):
            w = abs(weight[i])
            size[i] = w * root[i]
            minus_pruned[i] = np.float32(0) if mask[i] else -size[i]
            slope[i] = np.float32(2) * ROUND_UP * (w * steepness[i])
            everything += np.float64(w) * np.float64(w) * np.float64(diagonal[i])
        for step in range(len(losses_after)):
            if active[row]:
                _costs(weight, diagonal, coupling, mask, cost, gain)
                cost[outside] = np.float32(np.inf)
                least_gain, least_cost = _least(gain), _least(cost)
                active[row] = np.isfinite(least_gain) and np.isfinite(least_cost)
            if active[row]:
                if len(blocks):
                    u, p = _best_in_groups(blocks, weight, cost, gain, bound)
                else:
                    largest = max(-_least(minus_pruned), TINY)
                    _bounds(cost, slope, largest, least_gain, bound)
                    terms = SearchTerms(size, slope, largest, least_gain, bound)
                    first = (_place(cost, least_cost), _place(gain, least_gain))
                    u, p = _best_in_row(gram, weight, cost, gain, terms, first, scratch)
                if u < 0:
                    active[row] = False
                else:
                    w, v = np.float64(weight[u]), np.float64(weight[p])
                    alone_u, alone_p = w * w * np.float64(diagonal[u]), v * v * np.float64(diagonal[p])
                    change = (alone_u + 2 * w * coupling[u]) + (alone_p - 2 * v * coupling[p])
                    change -= 2 * w * v * np.float64(gram[u, p])
                    # Nearly every swap lowers the loss by more than the share of everything, of which that of what is
                    # pruned is a part.
                    if change < -tolerance * everything or change < -tolerance * _pruned(weight, diagonal, mask):
                        mask[u], mask[p] = False, True
                        minus_pruned[u], minus_pruned[p] = -size[u], np.float32(0)
                        _move(coupling, gram[u], gram[p], w, v)
                        losses[row] += change
                        made[step, row] = True
                    else:
                        active[row] = False
            losses_after[step, row] = losses[row]
