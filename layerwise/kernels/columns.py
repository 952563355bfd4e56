"""The column loop of SparseGPT and GPTQ within one block, compiled: sixteen rows at a time, all columns in cache."""

import numpy as np
from torch import Tensor, from_numpy

from layerwise.kernels.rows import array, by_rows, compiled, empty
from layerwise.kernels.simd import (
    LANES,
    absolute,
    at_most,
    less_product,
    load,
    minus,
    none,
    over,
    plus,
    select,
    spread,
    store,
    times,
    to_whole,
    transpose,
    within,
)

ROWS = LANES
TOGETHER = 4  # columns whose errors are taken off the columns after them in one go
RANKED = 16  # of up to so many columns each is compared with each, of more the cut is searched
INFINITE = 0x7F800000  # the bits of infinity
NO_SCALES, NO_GROUPS, NO_CODES = np.empty((0, 0), np.float32), np.empty(0, np.int64), np.empty((0, 0), np.uint8)


@compiled()
def _choose(entries, factor, i, of, pruned, scores, keep):
    """keep [columns * rows] from column i on: 0 at the `pruned` smallest |w / U_jj| of `of` in each row, else 1."""
    size = min(of, len(factor) - i)
    pruned -= of - size  # what fills up the last group goes first
    for e in range(size):
        own = spread(factor[i + e, i + e])
        store(scores, e * ROWS, absolute(over(load(entries, (i + e) * ROWS), own)))
    if size <= RANKED:
        _rank(scores, size, np.float32(pruned), keep, i)
    else:
        _search(scores, size, np.float32(pruned), keep, i)


@compiled()
def _rank(scores, size, pruned, keep, i):
    one, nothing = spread(np.float32(1)), none()
    for e in range(size):
        score, rank = load(scores, e * ROWS), none()
        for f in range(e):
            rank = plus(rank, select(at_most(load(scores, f * ROWS), score), one, nothing))
        for f in range(e + 1, size):
            rank = plus(rank, select(at_most(score, load(scores, f * ROWS)), nothing, one))
        store(keep, (i + e) * ROWS, select(at_most(spread(pruned), rank), one, nothing))


@compiled()
def _search(scores, size, pruned, keep, i):
    """By bisection, each row its own; floats that are not negative are ordered as their bits are."""
    one, nothing = spread(np.float32(1)), none()
    low, high = np.full(ROWS, -1, np.int32), np.full(ROWS, INFINITE, np.int32)  # at low: < pruned scores, at high: not
    middle, counted = np.empty(ROWS, np.int32), np.empty(ROWS, np.float32)
    bounds = middle.view(np.float32)
    for _ in range(31):
        for r in range(ROWS):
            middle[r] = (low[r] + high[r]) >> 1
        bound, count = load(bounds, 0), none()
        for e in range(size):
            count = plus(count, select(at_most(load(scores, e * ROWS), bound), one, nothing))
        store(counted, 0, count)
        for r in range(ROWS):
            if counted[r] >= pruned:
                high[r] = middle[r]
            else:
                low[r] = middle[r]
    bound, spare = load(high.view(np.float32), 0), spread(max(pruned, np.float32(0)))
    for e in range(size):
        spare = minus(spare, select(at_most(bound, load(scores, e * ROWS)), nothing, one))
    for e in range(size):  # of those equal to the cut the first go
        score = load(scores, e * ROWS)
        below, above = at_most(score, bound), at_most(bound, score)
        tied = below & above
        store(keep, (i + e) * ROWS, select(below & ~(tied & at_most(spare, nothing)), nothing, one))
        spare = minus(spare, select(tied, one, nothing))


@compiled()
def _turn(source, target, height, width):
    """The first height x width entries of source [., .] as columns of the target; both are multiples of 16."""
    step, stride = source.shape[1], target.shape[1]
    before, after = source.reshape(-1), target.reshape(-1)
    for r in range(0, height, LANES):
        for i in range(0, width, LANES):
            transpose(before, r * step + i, step, after, i * stride + r, stride)


@compiled()
def _take_off(entries, losses, factor, i, end):
    """The errors of columns i to end, one or four of them, off all columns from `end` on, each in turn."""
    if end == i + 1:
        error = load(losses, i * ROWS)
        for k in range(end, len(factor)):
            store(entries, k * ROWS, less_product(load(entries, k * ROWS), error, spread(factor[i, k])))
    elif end < len(factor):
        first, second = load(losses, i * ROWS), load(losses, (i + 1) * ROWS)
        third, fourth = load(losses, (i + 2) * ROWS), load(losses, (i + 3) * ROWS)
        for k in range(end, len(factor)):
            left = less_product(load(entries, k * ROWS), first, spread(factor[i, k]))
            left = less_product(left, second, spread(factor[i + 1, k]))
            left = less_product(left, third, spread(factor[i + 2, k]))
            store(entries, k * ROWS, less_product(left, fourth, spread(factor[i + 3, k])))


@compiled(
    [
        "(f4[:, ::1], f4[:, ::1], f4[:, ::1], i8, f4[:, ::1], b1[:, ::1], i8, i8, u1[:, ::1], f4[:, ::1], f4[:, ::1],"
        " i8[::1], f4, i8, i8)"
    ]
)
def _settle(
    original, weight, errors, start, factor, mask, of, pruned, codes, scales, zeros, group_of, most, first, last
):
    columns = len(factor)
    end, wide = start + columns, -(-columns // LANES) * LANES
    rows = np.zeros((ROWS, wide), np.float32)  # a tile as it lies in the weight; the others have its rows as lanes
    tiles = np.zeros((4, wide, ROWS), np.float32)
    entries, losses, keep, code = tiles.reshape(4, -1)
    grid = np.ones((2, ROWS), np.float32)
    scale, zero = grid[0], grid[1]
    scores = np.empty(of * ROWS, np.float32)
    one, minus_one, largest = spread(np.float32(1)), spread(np.float32(-1)), spread(most)
    together = TOGETHER if of % TOGETHER == 0 or of >= columns else 1  # a choice needs its columns up to date
    for top in range(first, last, ROWS):
        height = min(ROWS, last - top)
        if not of:
            for r in range(height):
                for i in range(columns):
                    rows[r, i] = np.float32(mask[top + r, start + i])
            _turn(rows, tiles[2], ROWS, wide)
        rows[height:] = 0
        rows[:height, :columns] = weight[top : top + height, start:end]
        _turn(rows, tiles[0], ROWS, wide)
        for i in range(columns):
            if of and i % of == 0:
                _choose(entries, factor, i, of, pruned, scores, keep)
            if most and (i == 0 or group_of[start + i] != group_of[start + i - 1]):
                for r in range(height):
                    scale[r], zero[r] = scales[top + r, group_of[start + i]], zeros[top + r, group_of[start + i]]
            entry = load(entries, i * ROWS)
            settled = select(at_most(one, load(keep, i * ROWS)), entry, none())
            if most:  # products and sums as less_product has them: rounded one by one
                steps, origin = load(scale, 0), load(zero, 0)
                found = within(less_product(to_whole(over(settled, steps)), minus_one, origin), largest)
                store(code, i * ROWS, found)
                settled = times(steps, less_product(found, one, origin))
            error = over(less_product(entry, one, settled), spread(factor[i, i]))
            store(losses, i * ROWS, error)
            store(entries, i * ROWS, settled)
            through = min(i // together * together + together, columns)
            for k in range(i + 1, through):
                store(entries, k * ROWS, less_product(load(entries, k * ROWS), error, spread(factor[i, k])))
            if i + 1 == through:
                _take_off(entries, losses, factor, i + 1 - together if together > 1 else i, through)
        _turn(tiles[0], rows, wide, ROWS)
        weight[top : top + height, start:end] = rows[:height, :columns]
        for r in range(height):
            for i in range(columns):
                errors[top + r, start + i] = original[top + r, start + i] - rows[r, i]
        if of:
            _turn(tiles[2], rows, wide, ROWS)
            for r in range(height):
                for i in range(columns):
                    mask[top + r, start + i] = rows[r, i] != 0
        if most:
            _turn(tiles[3], rows, wide, ROWS)
            for r in range(height):
                for i in range(columns):
                    codes[top + r, start + i] = np.uint8(rows[r, i])


def memory(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised float32."""
    return from_numpy(empty(shape, np.float32))


def settle_block(
    original: Tensor,
    weight: Tensor,
    errors: Tensor,
    start: int,
    factor: Tensor,
    mask: Tensor,
    choice: tuple[int, int],
    grid: tuple[Tensor, Tensor, Tensor, Tensor, int] | None,
) -> None:
    """Settles the columns of weight [out, in] from `start` on (layerwise.numerics.obs); errors: the original less they.

    factor: [columns, columns] upper U of the block. choice: (of, pruned), or zeros where the mask is given. grid:
    scales and zeros [out, groups], group_of [in], codes [out, in], bits. All matrices must be contiguous.
    """
    if grid:
        scales, zeros, group_of, codes, most = *map(array, grid[:4]), 2 ** grid[4] - 1
    else:
        scales = zeros = NO_SCALES
        group_of, codes, most = NO_GROUPS, NO_CODES, 0
    places = (array(original), weight.numpy(), errors.numpy(), start, array(factor), mask.numpy(), *choice)
    by_rows(_settle, (len(weight), len(factor)), *places, codes, scales, zeros, group_of, most)
