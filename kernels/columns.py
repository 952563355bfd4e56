"""The column loop of SparseGPT and GPTQ within one block, compiled: sixteen rows at a time, all columns in cache."""

import numpy as np
from torch import Tensor

from kernels.lanes import LANES, less_product, load, spread, store, transpose
from kernels.rows import array, by_rows, compiled

ROWS = LANES
TOGETHER = 4  # columns whose errors are taken off the columns after them in one go
RANKED = 16  # of up to so many columns each is compared with each, of more the cut is searched
LARGEST = 2**31 - 2
NO_SCALES, NO_GROUPS, NO_CODES = np.empty((0, 0), np.float32), np.empty(0, np.int64), np.empty((0, 0), np.uint8)


@compiled()
def _choose(block, factor, i, of, pruned, scores, keep):
    """keep [columns, rows] of columns i to i + of: 0 at the `pruned` of the smallest |w / U_jj| in each row, else 1."""
    size = min(of, len(factor) - i)
    pruned -= of - size  # what fills up the last group goes first
    for e in range(size):
        for r in range(ROWS):
            scores[e, r] = abs(block[i + e, r] / factor[i + e, i + e])
    if size <= RANKED:
        _rank(scores[:size], pruned, keep[i : i + size])
    else:
        _search(scores[:size].view(np.int32), pruned, keep[i : i + size])


@compiled()
def _rank(scores, pruned, keep):
    ranks = np.empty(ROWS, np.int32)
    for e in range(len(scores)):
        ranks[:] = pruned
        for f in range(len(scores)):
            if f < e:
                for r in range(ROWS):
                    ranks[r] -= scores[f, r] <= scores[e, r]
            else:
                for r in range(ROWS):
                    ranks[r] -= scores[f, r] < scores[e, r]
        for r in range(ROWS):
            keep[e, r] = np.float32(ranks[r] <= 0)


@compiled()
def _search(keys, pruned, keep):
    """By bisection, each row its own; floats that are not negative are ordered as their bits are."""
    low, high = np.full(ROWS, -1, np.int32), np.full(ROWS, LARGEST, np.int32)  # at most low: < pruned keys, high: not
    middle, count = np.empty(ROWS, np.int32), np.empty(ROWS, np.int32)
    spare = np.full(ROWS, max(pruned, 0), np.int32)  # of the keys equal to the cut, how many go
    if pruned <= 0:
        high[:] = -1
    for _ in range(31):
        for r in range(ROWS):
            middle[r] = low[r] + (high[r] - low[r]) // np.int32(2)
            count[r] = 0
        for e in range(len(keys)):
            for r in range(ROWS):
                count[r] += np.int32(keys[e, r] <= middle[r])
        for r in range(ROWS):
            enough = count[r] >= pruned
            high[r] = middle[r] if enough else high[r]
            low[r] = low[r] if enough else middle[r]
    for e in range(len(keys)):
        for r in range(ROWS):
            spare[r] -= np.int32(keys[e, r] < high[r])
    for e in range(len(keys)):
        for r in range(ROWS):
            tie = np.int32(keys[e, r] == high[r])
            keep[e, r] = np.float32((keys[e, r] > high[r]) | ((tie == 1) & (spare[r] <= 0)))
            spare[r] -= tie


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
    block, lost = np.zeros((wide, ROWS), np.float32), np.zeros((wide, ROWS), np.float32)
    keep, code = np.zeros((wide, ROWS), np.float32), np.zeros((wide, ROWS), np.float32)
    entries, losses = block.reshape(-1), lost.reshape(-1)
    scale, zero = np.ones(ROWS, np.float32), np.zeros(ROWS, np.float32)
    scores, settled = np.empty((of, ROWS), np.float32), np.empty(ROWS, np.float32)
    together = TOGETHER if of % TOGETHER == 0 or of >= columns else 1  # a choice needs its columns up to date
    for top in range(first, last, ROWS):
        height = min(ROWS, last - top)
        if not of:
            for r in range(height):
                for i in range(columns):
                    rows[r, i] = np.float32(mask[top + r, start + i])
            _turn(rows, keep, ROWS, wide)
        rows[height:] = 0
        rows[:height, :columns] = weight[top : top + height, start:end]
        _turn(rows, block, ROWS, wide)
        for i in range(columns):
            if of and i % of == 0:
                _choose(block, factor, i, of, pruned, scores, keep)
            if most and (i == 0 or group_of[start + i] != group_of[start + i - 1]):
                for r in range(height):
                    scale[r], zero[r] = scales[top + r, group_of[start + i]], zeros[top + r, group_of[start + i]]
            for r in range(ROWS):
                settled[r] = block[i, r] if keep[i, r] else np.float32(0)
            if most:
                for r in range(ROWS):
                    code[i, r] = min(max(np.rint(settled[r] / scale[r]) + zero[r], np.float32(0)), most)
                    settled[r] = scale[r] * (code[i, r] - zero[r])
            for r in range(ROWS):
                lost[i, r] = (block[i, r] - settled[r]) / factor[i, i]
                block[i, r] = settled[r]
            through = min(i // together * together + together, columns)
            error = load(losses, i * ROWS)
            for k in range(i + 1, through):
                store(entries, k * ROWS, less_product(load(entries, k * ROWS), error, spread(factor[i, k])))
            if i + 1 == through:
                _take_off(entries, losses, factor, i + 1 - together if together > 1 else i, through)
        _turn(block, rows, wide, ROWS)
        weight[top : top + height, start:end] = rows[:height, :columns]
        for r in range(height):
            for i in range(columns):
                errors[top + r, start + i] = original[top + r, start + i] - rows[r, i]
        if of:
            _turn(keep, rows, wide, ROWS)
            for r in range(height):
                for i in range(columns):
                    mask[top + r, start + i] = rows[r, i] != 0
        if most:
            _turn(code, rows, wide, ROWS)
            for r in range(height):
                for i in range(columns):
                    codes[top + r, start + i] = np.uint8(rows[r, i])


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
    """Settles the columns of weight [out, in] from `start` on (methods.surgeon); errors: the original less they.

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
