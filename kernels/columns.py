"""The column loop of SparseGPT and GPTQ within one block, compiled: sixteen rows at a time, all columns in cache."""

import numpy as np
from torch import Tensor, from_numpy

from kernels.rows import array, by_rows, compiled, empty

ROWS = 16  # one register of float32
NO_SCALES, NO_GROUPS, NO_CODES = np.empty((0, 0), np.float32), np.empty(0, np.int64), np.empty((0, 0), np.uint8)


@compiled()
def _choose(block, factor, i, of, pruned, scores, keep):
    """keep [columns, rows] of columns i to i + of, without the `pruned` of the smallest |w / U_jj| in each row."""
    size = min(of, len(block) - i)
    for e in range(size):
        for r in range(ROWS):
            scores[e, r] = abs(block[i + e, r] / factor[i + e, i + e])
    ranks = np.empty(ROWS, np.int32)
    for e in range(size):
        ranks[:] = pruned - (of - size)  # what fills up the last group goes first
        for f in range(size):
            if f < e:
                for r in range(ROWS):
                    ranks[r] -= scores[f, r] <= scores[e, r]
            else:
                for r in range(ROWS):
                    ranks[r] -= scores[f, r] < scores[e, r]
        for r in range(ROWS):
            keep[i + e, r] = ranks[r] <= 0


@compiled(
    [
        "(f4[:, ::1], i8, f4[:, ::1], f4[:, ::1], b1[:, ::1], i8, i8, u1[:, ::1], f4[:, ::1], f4[:, ::1], i8[::1], f4,"
        " i8, i8)"
    ]
)
def _settle(weight, start, factor, errors, mask, of, pruned, codes, scales, zeros, group_of, most, first, last):
    columns = len(factor)
    block, lost = np.empty((columns, ROWS), np.float32), np.empty((columns, ROWS), np.float32)
    code, keep = np.zeros((columns, ROWS), np.float32), np.ones((columns, ROWS), np.bool_)
    scale, zero = np.ones(ROWS, np.float32), np.zeros(ROWS, np.float32)
    scores, settled = np.empty((of, ROWS), np.float32), np.empty(ROWS, np.float32)
    for top in range(first, last, ROWS):
        height = min(ROWS, last - top)
        block[:, height:] = 0
        for r in range(height):
            for i in range(columns):
                block[i, r] = weight[top + r, start + i]
                keep[i, r] = mask[top + r, start + i]
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
            for k in range(i + 1, columns):
                for r in range(ROWS):
                    block[k, r] -= lost[i, r] * factor[i, k]
        for r in range(height):
            for i in range(columns):
                weight[top + r, start + i] = block[i, r]
                errors[top + r, i] = lost[i, r]
                mask[top + r, start + i] = keep[i, r]
            if most:
                for i in range(columns):
                    codes[top + r, start + i] = np.uint8(code[i, r])


def settle_block(
    weight: Tensor,
    start: int,
    factor: Tensor,
    mask: Tensor,
    n_of_m: tuple[int, int] | None,
    grid: tuple[Tensor, Tensor, Tensor, Tensor, int] | None,
) -> Tensor:
    """Settles the columns of weight [out, in] from `start` on (methods.surgeon); returns errors [out, columns].

    factor: [columns, columns] of the block. grid: scales and zeros [out, groups], group_of [in], codes [out, in], bits.
    weight, mask and codes, written to, must be contiguous.
    """
    kept, of = n_of_m or (0, 0)
    errors = empty((len(weight), len(factor)), np.float32)
    if grid:
        scales, zeros, group_of, codes, most = *map(array, grid[:4]), 2 ** grid[4] - 1
    else:
        scales = zeros = NO_SCALES
        group_of, codes, most = NO_GROUPS, NO_CODES, 0
    places = (weight.numpy(), start, array(factor), errors, mask.numpy())
    by_rows(_settle, errors.shape, *places, of, of - kept, codes, scales, zeros, group_of, most)
    return from_numpy(errors)
