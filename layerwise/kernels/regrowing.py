"""DSnoT's cycles row by row: choose the pruned weight to regrow and the kept one to prune, from the ends of lists.

Lists are not sorted, because a row takes few of its entries: the next one is the smallest of the blocks' minima.
"""

from typing import NamedTuple

import numpy as np
from numba import boolean, float32, float64, int64
from torch import Tensor, contiguous_format

from layerwise.kernels.rows import array, by_rows, compiled, named

KEYS_PER_BLOCK = 64
TAKEN = np.iinfo(np.int64).max
LAST = TAKEN - 1  # the key of NaN


@compiled()
def _ordered(x):
    """Integer that preserves the order of floats; both zeros are equal, NaN is the largest."""
    if x != x:
        return LAST
    bits = np.float64(x).view(np.int64)
    return bits if bits >= 0 else np.int64(-(2**63)) - bits


@compiled()
def _smallest(keys):
    least = keys[0]
    for i in range(1, len(keys)):
        least = min(least, keys[i])
    return least


@compiled()
def _begin(keys, least):
    for block in range(len(least)):
        least[block] = _smallest(keys[block * KEYS_PER_BLOCK : (block + 1) * KEYS_PER_BLOCK])


@compiled()
def _next(keys, least, before):
    """Index of the first smallest key, which is removed; `before` if all are removed."""
    smallest = _smallest(least)
    if smallest == TAKEN:
        return before
    block = 0
    while least[block] != smallest:
        block += 1
    place = block * KEYS_PER_BLOCK
    while keys[place] != smallest:
        place += 1
    keys[place] = TAKEN
    least[block] = _smallest(keys[block * KEYS_PER_BLOCK : (block + 1) * KEYS_PER_BLOCK])
    return place


@compiled()
def _order_grown(share, divisor, kept, exact, right, keys):
    """Keys of the entries that may be regrown, by lost share per divisor; from the right in reverse."""
    inputs = len(share)
    keys[inputs:] = TAKEN
    for j in range(inputs):
        value = (0.0 if kept[j] else share[j]) / divisor[j]
        key = np.int64(0) if exact and value != value else _ordered(value)
        if right:
            keys[inputs - 1 - j] = ~key
        else:
            keys[j] = key


@compiled()
def _order_dropped(share, scores, kept, right, keys):
    """Keys of the entries that may be pruned: negative shares by rising score, zeros, positive shares by falling score.
    Pruned entries are last.

    From the right the order is reversed and pruned entries are left out.
    """
    ranks = scores.view(np.int32)  # bits are ordered like scores, because no score is negative
    keys[len(share) :] = TAKEN
    for j in range(len(share)):
        rank = (np.int64(ranks[j]) << 24) | j
        key = rank if share[j] < 0 else (np.int64(2**58) - rank if share[j] > 0 else np.int64(2**56) + j)
        if right:
            keys[j] = -key if kept[j] else TAKEN
        else:
            keys[j] = key if kept[j] else np.int64(2**59) + j


@compiled()
def _lowest_of_group(scores, droppable, member, group_size):
    """Index of the first smallest score in the member's group; entries that must not be pruned count as infinite."""
    start = member - member % group_size
    lowest, place = np.float32(np.inf), start
    for j in range(start, min(start + group_size, len(scores))):
        if droppable[j] and scores[j] < lowest:
            lowest, place = scores[j], j
    return place


class InputStatistics(NamedTuple):
    """For each input, [in]: its mean, the divisor of its lost share (float64), and sqrt(G_jj) (float32)."""

    mean: np.ndarray
    divisor: np.ndarray
    norm: np.ndarray


class CycleRule(NamedTuple):
    """The rule for a row's cycles and their end.

    group_size: m of n:m, 0 of row. cycles: largest number of swaps per row. threshold: the |error| at which a row is
    done, in units of `unit` or, if `exact`, of the norm of the row's shares. exact: return the best state, not the
    last.
    """

    group_size: int
    cycles: int
    threshold: float
    unit: float
    exact: bool


STATISTICS_TYPE = named(InputStatistics, float64[::1], float64[::1], float32[::1])
RULE_TYPE = named(CycleRule, int64, int64, float64, float64, boolean)


@compiled([(float32[:, ::1], STATISTICS_TYPE, RULE_TYPE, boolean[:, ::1], int64, int64)])
def _refine(weight, statistics, rule, mask, first, last):
    mean, divisor, norm = statistics
    group_size, cycles, threshold, unit, exact = rule
    inputs = weight.shape[1]
    blocks = -(-inputs // KEYS_PER_BLOCK)
    share, scores = np.empty(inputs), np.empty(inputs, np.float32)
    grow, drop = np.empty((2, blocks * KEYS_PER_BLOCK), np.int64), np.empty((2, blocks * KEYS_PER_BLOCK), np.int64)
    grow_least, drop_least = np.empty((2, blocks), np.int64), np.empty((2, blocks), np.int64)
    start, kept, droppable = np.empty(inputs, np.bool_), np.empty(inputs, np.bool_), np.empty(inputs, np.bool_)
    began, grown, dropped = np.empty(2, np.bool_), np.empty(2, np.int64), np.empty(2, np.int64)
    objectives, longest = np.zeros(cycles + 1), 0
    for row in range(first, last):
        error, size = 0.0, 0.0
        for j in range(inputs):
            share[j] = np.float64(weight[row, j]) * mean[j]
            size += share[j] * share[j]
            error += 0.0 if mask[row, j] else share[j]
        limit = threshold * (np.sqrt(size) if exact else unit)
        least, positive, cycle = error, error > 0, 0
        objectives[0] += least * least
        if abs(error) > limit:
            for j in range(inputs):
                scores[j] = abs(weight[row, j]) * norm[j]
                start[j] = kept[j] = droppable[j] = mask[row, j]
            began[:] = False
        while cycle < cycles and abs(error) > limit:
            side = np.int64(error > 0)
            if not began[side]:
                _order_grown(share, divisor, start, exact, side == 1, grow[side])
                _begin(grow[side], grow_least[side])
                if group_size == 0:
                    _order_dropped(share, scores, start, side == 0, drop[side])
                    _begin(drop[side], drop_least[side])
                began[side] = True
            grown[side] = _next(grow[side], grow_least[side], grown[side])
            back = inputs - 1 - grown[side] if side == 1 else grown[side]
            if group_size:
                gone = _lowest_of_group(scores, droppable, back, group_size)
            else:
                gone = dropped[side] = _next(drop[side], drop_least[side], dropped[side])
            after = error + share[gone] - share[back]
            if kept[back] or not kept[gone] or (group_size > 0 and (after == 0 or (after > 0) != positive)):
                break
            kept[gone], kept[back], droppable[gone] = False, True, False
            error = after
            cycle += 1
            if not exact or abs(error) < abs(least):
                least = error
                mask[row] = kept
            objectives[cycle] += least * least
        longest = max(longest, cycle)
        objectives[cycle + 1 :] += least * least
    return objectives, longest


def refine(weight: Tensor, mask: Tensor, statistics: InputStatistics, rule: CycleRule) -> tuple[Tensor, list[float]]:
    """Mask [out, in] after up to `rule.cycles` swaps per row, and the sum of squared row errors after each cycle.

    weight: [out, in] float32. mask: [out, in] bool, the initial mask; not changed.
    """
    result = mask.clone(memory_format=contiguous_format)
    runs = by_rows(_refine, weight.shape, array(weight), statistics, rule, result.numpy())
    longest = max(last for _, last in runs)
    return result, np.sum([objectives for objectives, _ in runs], 0)[: longest + 1].tolist()
