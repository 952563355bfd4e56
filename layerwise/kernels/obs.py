"""The compiled column loop of SparseGPT and GPTQ within a block: sixteen rows at a time, all columns in cache."""

from typing import NamedTuple

import numpy as np
from numba import boolean, float32, int64, uint8
from torch import Tensor, from_numpy

from layerwise.kernels import simd
from layerwise.kernels.rows import array, by_rows, compiled, empty, named

TILE_ROWS = simd.LANES
COLUMNS_AT_ONCE = 4  # columns whose errors are subtracted from the later columns in one pass
MOST_RANKED = 16  # up to this group size, all pairs of columns are compared; in larger groups the threshold is searched
INFINITE = 0x7F800000  # the bits of infinity


class SweepMatrices(NamedTuple):
    """The matrices [out, in] of a sweep. It writes a block of columns of the last three."""

    original: np.ndarray  # float32
    weight: np.ndarray  # float32, input and output
    errors: np.ndarray  # float32, original - weight
    mask: np.ndarray  # bool


class BlockBudget(NamedTuple):
    """In each row, `n_pruned` of every `group_size` consecutive entries become zero. group_size 0: the mask is
    given."""

    group_size: int
    n_pruned: int


class GridArrays(NamedTuple):
    """The grid to which columns are rounded; a largest code of 0 means no grid.

    book: [3, levels] float32, for codes that do not represent integers: levels in increasing order, their codes, and
    the smallest number that is rounded to each level (the first entry is unused). [3, 0] for integers.
    """

    scales: np.ndarray  # [out, groups] float32
    zeros: np.ndarray  # [out, groups] float32
    group_of: np.ndarray  # [in] int64
    codes: np.ndarray  # [out, in] uint8, written
    largest_code: np.float32
    book: np.ndarray


class CorrectionArrays(NamedTuple):
    """The corrections that columns pass on besides errors (layerwise.numerics.obs.Correction); empty without any."""

    passed: np.ndarray  # [columns, columns] float32, P of the block
    dense: np.ndarray  # [out, in] float32, the weight towards which columns are pulled
    unrounded: np.ndarray  # [out, in] float32, output: each weight before rounding
    pull: np.float32


NO_SCALES, NO_BOOK = np.empty((0, 0), np.float32), np.empty((3, 0), np.float32)
NO_GRID = GridArrays(NO_SCALES, NO_SCALES, np.empty(0, np.int64), np.empty((0, 0), np.uint8), np.float32(0), NO_BOOK)
NO_CORRECTION = CorrectionArrays(NO_SCALES, NO_SCALES, NO_SCALES, np.float32(0))
FLOATS, BOOLS, CODES = float32[:, ::1], boolean[:, ::1], uint8[:, ::1]
MATRICES_TYPE = named(SweepMatrices, FLOATS, FLOATS, FLOATS, BOOLS)
BUDGET_TYPE = named(BlockBudget, int64, int64)
GRID_TYPE = named(GridArrays, FLOATS, FLOATS, int64[::1], CODES, float32, FLOATS)
CORRECTION_TYPE = named(CorrectionArrays, FLOATS, FLOATS, FLOATS, float32)


@compiled()
def _choose(entries, factor, i, group_size, n_pruned, scores, keep):
    """Write keep [columns * rows] from column i on: 0 at the `n_pruned` smallest |w / U_jj| of a group, else 1."""
    size = min(group_size, len(factor) - i)
    n_pruned -= group_size - size  # entries that pad the last group are pruned first
    for e in range(size):
        own = simd.splat(factor[i + e, i + e])
        simd.store(scores, e * TILE_ROWS, simd.absolute(simd.div(simd.load(entries, (i + e) * TILE_ROWS), own)))
    if size <= MOST_RANKED:
        _rank(scores, size, np.float32(n_pruned), keep, i)
    else:
        _search(scores, size, np.float32(n_pruned), keep, i)


@compiled()
def _rank(scores, size, n_pruned, keep, i):
    one, nothing = simd.splat(np.float32(1)), simd.zeros()
    for e in range(size):
        score, rank = simd.load(scores, e * TILE_ROWS), simd.zeros()
        for f in range(e):
            rank = simd.add(rank, simd.select(simd.le_mask(simd.load(scores, f * TILE_ROWS), score), one, nothing))
        for f in range(e + 1, size):
            rank = simd.add(rank, simd.select(simd.le_mask(score, simd.load(scores, f * TILE_ROWS)), nothing, one))
        simd.store(keep, (i + e) * TILE_ROWS, simd.select(simd.le_mask(simd.splat(n_pruned), rank), one, nothing))


@compiled()
def _search(scores, size, n_pruned, keep, i):
    """Bisection in each row; nonnegative floats have the order of their bits."""
    one, nothing = simd.splat(np.float32(1)), simd.zeros()
    low, high = (
        np.full(TILE_ROWS, -1, np.int32),
        np.full(TILE_ROWS, INFINITE, np.int32),
    )
    middle, counted = np.empty(TILE_ROWS, np.int32), np.empty(TILE_ROWS, np.float32)
    bounds = middle.view(np.float32)
    for _ in range(31):
        for r in range(TILE_ROWS):
            middle[r] = (low[r] + high[r]) >> 1
        bound, count = simd.load(bounds, 0), simd.zeros()
        for e in range(size):
            count = simd.add(count, simd.select(simd.le_mask(simd.load(scores, e * TILE_ROWS), bound), one, nothing))
        simd.store(counted, 0, count)
        for r in range(TILE_ROWS):
            if counted[r] >= n_pruned:
                high[r] = middle[r]
            else:
                low[r] = middle[r]
    bound, spare = simd.load(high.view(np.float32), 0), simd.splat(max(n_pruned, np.float32(0)))
    for e in range(size):
        spare = simd.sub(spare, simd.select(simd.le_mask(bound, simd.load(scores, e * TILE_ROWS)), nothing, one))
    for e in range(size):  # among entries equal to the threshold the first are pruned
        score = simd.load(scores, e * TILE_ROWS)
        below, above = simd.le_mask(score, bound), simd.le_mask(bound, score)
        tied = below & above
        simd.store(keep, (i + e) * TILE_ROWS, simd.select(below & ~(tied & simd.le_mask(spare, nothing)), nothing, one))
        spare = simd.sub(spare, simd.select(tied, one, nothing))


@compiled()
def _transpose_tile(source, target, height, width):
    """Write the first height x width entries of source [., .] as columns of the target; both are multiples of 16."""
    step, stride = source.shape[1], target.shape[1]
    before, after = source.reshape(-1), target.reshape(-1)
    for r in range(0, height, simd.LANES):
        for i in range(0, width, simd.LANES):
            simd.transpose(before, r * step + i, step, after, i * stride + r, stride)


@compiled()
def _subtract_errors(entries, losses, factor, i, end):
    """Subtract the errors of columns i to end, one or four of them, from all columns from `end` on, in order."""
    if end == i + 1:
        error = simd.load(losses, i * TILE_ROWS)
        for k in range(end, len(factor)):
            simd.store(
                entries, k * TILE_ROWS, simd.sub_mul(simd.load(entries, k * TILE_ROWS), error, simd.splat(factor[i, k]))
            )
    elif end < len(factor):
        first, second = simd.load(losses, i * TILE_ROWS), simd.load(losses, (i + 1) * TILE_ROWS)
        third, fourth = simd.load(losses, (i + 2) * TILE_ROWS), simd.load(losses, (i + 3) * TILE_ROWS)
        for k in range(end, len(factor)):
            left = simd.sub_mul(simd.load(entries, k * TILE_ROWS), first, simd.splat(factor[i, k]))
            left = simd.sub_mul(left, second, simd.splat(factor[i + 1, k]))
            left = simd.sub_mul(left, third, simd.splat(factor[i + 2, k]))
            simd.store(entries, k * TILE_ROWS, simd.sub_mul(left, fourth, simd.splat(factor[i + 3, k])))


@compiled()
def _load_block(source, start, top, height, columns, rows, lane):
    """Fill a lane with a tile of a block of columns of source [out, in]."""
    wide = rows.shape[1]
    rows[height:] = 0
    rows[:height, :columns] = source[top : top + height, start : start + columns]
    _transpose_tile(rows, lane.reshape(wide, TILE_ROWS), TILE_ROWS, wide)


@compiled()
def _store_block(target, start, top, height, columns, rows, lane):
    """Write a lane as a tile of a block of columns of target [out, in]."""
    wide = rows.shape[1]
    _transpose_tile(lane.reshape(wide, TILE_ROWS), rows, wide, TILE_ROWS)
    target[top : top + height, start : start + columns] = rows[:height, :columns]


@compiled()
def _load_tile(matrices, start, top, height, columns, given_mask, rows, lanes):
    """Fill a tile's entries, and its mask if the mask is given. rows: scratch memory, see `_sweep`."""
    wide = rows.shape[1]
    if given_mask:
        for r in range(height):
            for i in range(columns):
                rows[r, i] = np.float32(matrices.mask[top + r, start + i])
        _transpose_tile(rows, lanes[2].reshape(wide, TILE_ROWS), TILE_ROWS, wide)
    _load_block(matrices.weight, start, top, height, columns, rows, lanes[0])


@compiled()
def _store_tile(matrices, grid, start, top, height, columns, given_mask, rows, lanes):
    """Write a tile's weight and errors, its mask unless it was given, and its codes if there is a grid."""
    original, weight, errors, mask = matrices
    wide = rows.shape[1]
    _store_block(weight, start, top, height, columns, rows, lanes[0])
    for r in range(height):
        for i in range(columns):
            errors[top + r, start + i] = original[top + r, start + i] - rows[r, i]
    if not given_mask:
        _transpose_tile(lanes[2].reshape(wide, TILE_ROWS), rows, wide, TILE_ROWS)
        for r in range(height):
            for i in range(columns):
                mask[top + r, start + i] = rows[r, i] != 0
    if grid.largest_code:
        _transpose_tile(lanes[3].reshape(wide, TILE_ROWS), rows, wide, TILE_ROWS)
        for r in range(height):
            for i in range(columns):
                grid.codes[top + r, start + i] = np.uint8(rows[r, i])


@compiled()
def _load_grid(grid, top, height, column, tile_grid):
    """Scale and zero of each row of a tile, for the group of a column [in]."""
    group = grid.group_of[column]
    for r in range(height):
        tile_grid[0, r], tile_grid[1, r] = grid.scales[top + r, group], grid.zeros[top + r, group]


@compiled()
def _round_to_book(final, steps, book, codes, i):
    """The values of a column's lanes on the levels of a book, and their codes."""
    number = simd.div(final, steps)
    level, code = simd.splat(book[0, 0]), simd.splat(book[1, 0])
    for k in range(1, book.shape[1]):
        reached = simd.le_mask(simd.splat(book[2, k]), number)
        level = simd.select(reached, simd.splat(book[0, k]), level)
        code = simd.select(reached, simd.splat(book[1, k]), code)
    simd.store(codes, i * TILE_ROWS, code)
    return simd.mul(steps, level)


@compiled()
def _prune_and_round(lanes, i, pivot, tile_grid, largest_code, book):
    """Prune or round column i of a tile, and write its error divided by `pivot`, U_ii."""
    entries, losses, keep, codes = lanes
    one, minus_one = simd.splat(np.float32(1)), simd.splat(np.float32(-1))
    entry = simd.load(entries, i * TILE_ROWS)
    final = simd.select(simd.le_mask(one, simd.load(keep, i * TILE_ROWS)), entry, simd.zeros())
    if book.shape[1]:
        final = _round_to_book(final, simd.load(tile_grid[0], 0), book, codes, i)
    elif largest_code:  # products and sums as sub_mul has them: rounded one by one
        steps, origin, largest = simd.load(tile_grid[0], 0), simd.load(tile_grid[1], 0), simd.splat(largest_code)
        rounded_codes = simd.clamp(simd.sub_mul(simd.rint(simd.div(final, steps)), minus_one, origin), largest)
        simd.store(codes, i * TILE_ROWS, rounded_codes)
        final = simd.mul(steps, simd.sub_mul(rounded_codes, one, origin))
    simd.store(losses, i * TILE_ROWS, simd.div(simd.sub_mul(entry, one, final), simd.splat(pivot)))
    simd.store(entries, i * TILE_ROWS, final)


@compiled()
def _pass_on(entries, losses, factor, i, stride):
    """Let later columns absorb the error of column i: columns in its run of `stride` at once, others after the run."""
    stop = min(i // stride * stride + stride, len(factor))
    error = simd.load(losses, i * TILE_ROWS)
    for k in range(i + 1, stop):
        left = simd.sub_mul(simd.load(entries, k * TILE_ROWS), error, simd.splat(factor[i, k]))
        simd.store(entries, k * TILE_ROWS, left)
    if i + 1 == stop:
        _subtract_errors(entries, losses, factor, i + 1 - stride, stop)


@compiled()
def _pull(entries, unrounded, dense, i, pull):
    """Pull column i of a tile, unless it is the block's first, towards the dense weight, and record it before
    rounding."""
    entry = simd.load(entries, i * TILE_ROWS)
    if i:
        moved = simd.sub_mul(entry, simd.splat(np.float32(1)), simd.load(dense, i * TILE_ROWS))
        entry = simd.sub_mul(entry, simd.splat(pull), moved)
        simd.store(entries, i * TILE_ROWS, entry)
    simd.store(unrounded, i * TILE_ROWS, entry)


@compiled()
def _pass_on_corrected(lanes, unrounded, dense, factor, passed, i, pull):
    """Subtract the pull's part from the error of column i; let later columns absorb the rest and add w P."""
    entries, losses = lanes[0], lanes[1]
    weight = simd.load(unrounded, i * TILE_ROWS)
    moved = simd.sub_mul(weight, simd.splat(np.float32(1)), simd.load(dense, i * TILE_ROWS))
    share = simd.div(moved, simd.splat(factor[i, i]))
    error = simd.sub_mul(simd.load(losses, i * TILE_ROWS), simd.splat(pull), share)
    for k in range(i + 1, len(factor)):
        left = simd.sub_mul(simd.load(entries, k * TILE_ROWS), error, simd.splat(factor[i, k]))
        if len(passed):
            left = simd.sub_mul(left, weight, simd.splat(-passed[i, k]))
        simd.store(entries, k * TILE_ROWS, left)


@compiled([(MATRICES_TYPE, int64, FLOATS, BUDGET_TYPE, GRID_TYPE, CORRECTION_TYPE, int64, int64)])
def _sweep(matrices, start, factor, budget, grid, correction, first, last):
    group_size, n_pruned = budget
    given_mask = group_size == 0
    columns = len(factor)
    wide = -(-columns // simd.LANES) * simd.LANES
    rows = np.zeros((TILE_ROWS, wide), np.float32)  # a tile as in the weight
    # entries, losses, keep, codes: the rows of a column are contiguous
    lanes = np.zeros((4, wide * TILE_ROWS), np.float32)
    tile_grid = np.ones((2, TILE_ROWS), np.float32)
    scores = np.empty(group_size * TILE_ROWS, np.float32)
    corrected = len(correction.unrounded) > 0
    more = np.zeros((2, wide * TILE_ROWS if corrected else 0), np.float32)  # dense and unrounded entries
    # The choice of a mask needs up-to-date columns.
    stride = COLUMNS_AT_ONCE if group_size % COLUMNS_AT_ONCE == 0 or group_size >= columns else 1
    for top in range(first, last, TILE_ROWS):
        height = min(TILE_ROWS, last - top)
        _load_tile(matrices, start, top, height, columns, given_mask, rows, lanes)
        if corrected:
            _load_block(correction.dense, start, top, height, columns, rows, more[0])
        for i in range(columns):
            if not given_mask and i % group_size == 0:
                _choose(lanes[0], factor, i, group_size, n_pruned, scores, lanes[2])
            if grid.largest_code and (i == 0 or grid.group_of[start + i] != grid.group_of[start + i - 1]):
                _load_grid(grid, top, height, start + i, tile_grid)
            if corrected:
                _pull(lanes[0], more[1], more[0], i, correction.pull)
            _prune_and_round(lanes, i, factor[i, i], tile_grid, grid.largest_code, grid.book)
            if corrected:
                _pass_on_corrected(lanes, more[1], more[0], factor, correction.passed, i, correction.pull)
            else:
                _pass_on(lanes[0], lanes[1], factor, i, stride)
        _store_tile(matrices, grid, start, top, height, columns, given_mask, rows, lanes)
        if corrected:
            _store_block(correction.unrounded, start, top, height, columns, rows, more[1])


def memory(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised float32 tensor."""
    return from_numpy(empty(shape, np.float32))


def sweep_columns(
    original: Tensor,
    weight: Tensor,
    errors: Tensor,
    mask: Tensor,
    start: int,
    factor: Tensor,
    budget: BlockBudget,
    grid: GridArrays | None,
    correction: CorrectionArrays | None = None,
) -> None:
    """Sweep the columns of a block from `start` on: prune or round each, and let later columns absorb the error.

    original, weight, errors, mask: [out, in], contiguous, see `SweepMatrices`; the last three are written in place.
    factor: [columns, columns] upper U of the block (layerwise.numerics.obs is the reference).
    """
    matrices = SweepMatrices(array(original), weight.numpy(), errors.numpy(), mask.numpy())
    more = (grid or NO_GRID, correction or NO_CORRECTION)
    by_rows(_sweep, (len(weight), len(factor)), matrices, start, array(factor), budget, *more)
