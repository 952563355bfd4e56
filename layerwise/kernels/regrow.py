"""DSnoT's cycles row by row: which pruned weight comes back and which kept one goes, each list read from its ends.

A row takes few of its entries, so that lists are not sorted: the next one is the smallest of the blocks' smallest.
"""

import numpy as np
from torch import Tensor

from layerwise.kernels.rows import array, by_rows, compiled

BLOCK = 64
TAKEN = np.iinfo(np.int64).max
LAST = TAKEN - 1  # the key of nan


@compiled()
def _ordered(x):
    """Integer in the order of the floats: both zeros are one, nan is the largest."""
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
        least[block] = _smallest(keys[block * BLOCK : (block + 1) * BLOCK])


@compiled()
def _next(keys, least, before):
    """Place of the first of the smallest keys, which is taken out; `before` where all are."""
    smallest = _smallest(least)
    if smallest == TAKEN:
        return before
    block = 0
    while least[block] != smallest:
        block += 1
    place = block * BLOCK
    while keys[place] != smallest:
        place += 1
    keys[place] = TAKEN
    least[block] = _smallest(keys[block * BLOCK : (block + 1) * BLOCK])
    return place


@compiled()
def _order_grown(share, spread, kept, exact, right, keys):
    """Keys of what may come back, by lost share per spread; from the right all in reverse."""
    inputs = len(share)
    keys[inputs:] = TAKEN
    for j in range(inputs):
        value = (0.0 if kept[j] else share[j]) / spread[j]
        key = np.int64(0) if exact and value != value else _ordered(value)
        if right:
            keys[inputs - 1 - j] = ~key
        else:
            keys[j] = key


@compiled()
def _order_dropped(share, scores, kept, right, keys):
    """Keys of what may go: negative shares by rising score, zeros, positive ones by falling score; what is pruned last.

    From the right the reverse, and nothing of what is pruned.
    """
    ranks = scores.view(np.int32)  # in order, as no score is negative
    keys[len(share) :] = TAKEN
    for j in range(len(share)):
        rank = (np.int64(ranks[j]) << 24) | j
        key = rank if share[j] < 0 else (np.int64(2**58) - rank if share[j] > 0 else np.int64(2**56) + j)
        if right:
            keys[j] = -key if kept[j] else TAKEN
        else:
            keys[j] = key if kept[j] else np.int64(2**59) + j


@compiled()
def _lowest_of_group(scores, droppable, member, of):
    """The first of the smallest scores in the member's group; what must not go counts as infinite."""
    start = member - member % of
    lowest, place = np.float32(np.inf), start
    for j in range(start, min(start + of, len(scores))):
        if droppable[j] and scores[j] < lowest:
            lowest, place = scores[j], j
    return place


@compiled(["Tuple((f8[::1], i8))(f4[:, ::1], f8[::1], f8[::1], f4[::1], i8, i8, f8, f8, b1, b1[:, ::1], i8, i8)"])
def _refine(weight, mean, spread, norm, of, cycles, threshold, official, exact, mask, first, last):
    inputs = weight.shape[1]
    blocks = -(-inputs // BLOCK)
    share, scores = np.empty(inputs), np.empty(inputs, np.float32)
    grow, drop = np.empty((2, blocks * BLOCK), np.int64), np.empty((2, blocks * BLOCK), np.int64)
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
        limit = threshold * (np.sqrt(size) if exact else official)
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
                _order_grown(share, spread, start, exact, side == 1, grow[side])
                _begin(grow[side], grow_least[side])
                if of == 0:
                    _order_dropped(share, scores, start, side == 0, drop[side])
                    _begin(drop[side], drop_least[side])
                began[side] = True
            grown[side] = _next(grow[side], grow_least[side], grown[side])
            back = inputs - 1 - grown[side] if side == 1 else grown[side]
            if of:
                gone = _lowest_of_group(scores, droppable, back, of)
            else:
                gone = dropped[side] = _next(drop[side], drop_least[side], dropped[side])
            after = error + share[gone] - share[back]
            if kept[back] or not kept[gone] or (of > 0 and (after == 0 or (after > 0) != positive)):
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


def refine(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    spread: Tensor,
    norm: Tensor,
    of: int,
    cycles: int,
    threshold: float,
    official: float | None,
) -> tuple[Tensor, list[float]]:
    """Mask [out, in] after up to `cycles` swaps per row, and the sum of the rows' squared errors after each cycle.

    weight: [out, in] float32. mask: [out, in] of the start. mean, spread: [in] float64, of each input its mean and what
    its lost share is divided by. norm: [in] float32, sqrt(G_jj). of: m of n:m, 0 of row. threshold: of the |error|, in
    units of `official` or, where that is None, of the norm of the row's shares; None also returns the best state.
    """
    result = mask.clone()
    runs = by_rows(
        _refine,
        weight.shape,
        *(array(tensor) for tensor in (weight, mean, spread, norm)),
        of,
        cycles,
        threshold,
        official or 0.0,
        official is None,
        array(result),
    )
    longest = max(last for _, last in runs)
    return result, sum(objectives for objectives, _ in runs)[: longest + 1].tolist()
