"""Compiled coordinate descent on a block of columns: sixteen rows at a time, with all columns in cache."""

from typing import NamedTuple

import numpy as np
from numba import boolean, int64
from torch import Tensor

from layerwise.kernels import simd
from layerwise.kernels.obs import FLOATS, GRID_TYPE, TILE_ROWS, GridArrays, _load_grid, _transpose_tile
from layerwise.kernels.rows import array, by_rows, compiled, named


class DescentMatrices(NamedTuple):
    """The matrices [out, in] of a pass. It writes a block of columns of the values, and their codes if it rounds."""

    weight: np.ndarray  # float32
    values: np.ndarray  # float32, the iterate
    keep: np.ndarray  # bool, False where the iterate stays zero


BOOLS = boolean[:, ::1]
MATRICES_TYPE = named(DescentMatrices, FLOATS, FLOATS, BOOLS)


@compiled()
def _load_lanes(rows, lanes):
    """Write a tile [16, wide] to lanes [wide * 16], in which the rows of a column are contiguous."""
    wide = rows.shape[1]
    _transpose_tile(rows, lanes.reshape(wide, TILE_ROWS), TILE_ROWS, wide)


@compiled()
def _load(matrices, shifts, start, top, height, rows, lanes):
    """Fill a tile's weights, values, shifts and mask. rows: scratch memory."""
    columns = shifts.shape[1]
    rows[height:] = 0
    rows[:height, :columns] = matrices.weight[top : top + height, start : start + columns]
    _load_lanes(rows, lanes[0])
    rows[:height, :columns] = matrices.values[top : top + height, start : start + columns]
    _load_lanes(rows, lanes[1])
    rows[:height, :columns] = shifts[top : top + height]
    _load_lanes(rows, lanes[2])
    for r in range(height):
        for i in range(columns):
            rows[r, i] = np.float32(matrices.keep[top + r, start + i])
    _load_lanes(rows, lanes[3])


@compiled()
def _store(matrices, grid, columns, start, top, height, rounds, rows, lanes):
    """Write a tile's values, and its codes if the pass rounds."""
    wide = rows.shape[1]
    _transpose_tile(lanes[1].reshape(wide, TILE_ROWS), rows, wide, TILE_ROWS)
    matrices.values[top : top + height, start : start + columns] = rows[:height, :columns]
    if rounds:
        _transpose_tile(lanes[4].reshape(wide, TILE_ROWS), rows, wide, TILE_ROWS)
        for r in range(height):
            for i in range(columns):
                grid.codes[top + r, start + i] = np.uint8(rows[r, i])


@compiled()
def _set_column(lanes, i, tile_grid, largest_code, rounds):
    """Set column i of a tile to its best value, rounded or not; returns the increase."""
    weights, values, shifts, keep, codes = lanes
    one, minus_one = simd.splat(np.float32(1)), simd.splat(np.float32(-1))
    before = simd.load(values, i * TILE_ROWS)
    best = simd.sub_mul(simd.load(weights, i * TILE_ROWS), minus_one, simd.load(shifts, i * TILE_ROWS))
    best = simd.select(simd.le_mask(one, simd.load(keep, i * TILE_ROWS)), best, simd.zeros())
    if rounds:  # products and sums are rounded separately, as in sub_mul
        steps, origin, largest = simd.load(tile_grid[0], 0), simd.load(tile_grid[1], 0), simd.splat(largest_code)
        rounded = simd.clamp(simd.sub_mul(simd.rint(simd.div(best, steps)), minus_one, origin), largest)
        simd.store(codes, i * TILE_ROWS, rounded)
        best = simd.mul(steps, simd.sub_mul(rounded, one, origin))
    simd.store(values, i * TILE_ROWS, best)
    return simd.sub_mul(best, one, before)


@compiled([(MATRICES_TYPE, FLOATS, int64, FLOATS, GRID_TYPE, boolean, int64, int64)])
def _descend(matrices, shifts, start, ratios, grid, rounds, first, last):
    columns = len(ratios)
    wide = -(-columns // simd.LANES) * simd.LANES
    rows = np.zeros((TILE_ROWS, wide), np.float32)  # a tile in the weight's layout
    lanes = np.zeros((5, wide * TILE_ROWS), np.float32)  # weights, values, shifts, keep, codes
    tile_grid = np.ones((2, TILE_ROWS), np.float32)
    for top in range(first, last, TILE_ROWS):
        height = min(TILE_ROWS, last - top)
        _load(matrices, shifts, start, top, height, rows, lanes)
        for i in range(columns):
            if i == 0 or grid.group_of[start + i] != grid.group_of[start + i - 1]:
                _load_grid(grid, top, height, start + i, tile_grid)
            change = _set_column(lanes, i, tile_grid, grid.largest_code, rounds)
            for k in range(i + 1, columns):
                left = simd.sub_mul(simd.load(lanes[2], k * TILE_ROWS), change, simd.splat(ratios[i, k]))
                simd.store(lanes[2], k * TILE_ROWS, left)
        _store(matrices, grid, columns, start, top, height, rounds, rows, lanes)


def descend(
    weight: Tensor,
    values: Tensor,
    keep: Tensor,
    shifts: Tensor,
    start: int,
    ratios: Tensor,
    grid: GridArrays,
    rounds: bool,
) -> None:
    """Set a block of columns of the values [out, in] from `start` on, one after another, each to its best value.

    weight, values, keep: [out, in], contiguous; values, and the grid's codes if `rounds`, are written in place. shifts:
    [out, columns] best values minus the weight when the block begins. ratios: [columns, columns], see
    layerwise.numerics.coordinate_descent, which is the reference.
    """
    matrices = DescentMatrices(array(weight), values.numpy(), array(keep))
    by_rows(_descend, (len(weight), len(ratios)), matrices, array(shifts), start, array(ratios), grid, rounds)
