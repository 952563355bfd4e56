"""Min-max grids of runs of weights, and rounding to them (numerics.grids.Grid), in float32 as torch does."""

import math
from typing import NamedTuple

import numpy as np
from numba import boolean, float32, int64, uint8
from torch import Tensor, from_numpy

from layerwise.kernels.rows import array, by_rows, compiled, empty, named

PARTIAL_SUMS = 16
RANGES = 80  # number of ranges tried by `mse`
FIFTH = 0x4C2C49BA  # the bits of x^(-1/5) are approximately this minus a fifth of the bits of x
EXPONENT = 0x7F800000  # exponent bits of a float32, all set if it is not finite


@compiled(fastmath={"nnan", "nsz"})  # finds minima sixteen at a time; NaN is checked separately
def _extremes(run):
    low, high = np.float32(0), np.float32(0)
    for entry in run:
        low, high = min(low, entry), max(high, entry)
    return low, high


@compiled()
def _range(run):
    """Smallest and largest of the entries and 0; both NaN if an entry is not finite."""
    bits, faults = run.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        faults = np.int32(faults + np.int32((bits[i] & EXPONENT) == EXPONENT))
    if faults:
        return np.float32(np.nan), np.float32(np.nan)
    return _extremes(run)


@compiled()
def _grid_of(low, high, most, symmetric):
    """Scale and zero of the range, as layerwise.numerics.grids._scale_and_zero."""
    scale = np.float32((high - low) / most)
    if not scale > 0 and scale == scale:
        scale = np.float32(1)
    return scale, (most + np.float32(1)) / np.float32(2) if symmetric else np.rint(-low / scale)


@compiled()
def _power(x, root):
    """x^2.4 = (x x^(-1/5))^3 of the entries x >= 0, in place, to 1e-6. root: scratch memory of the same length.

    The root comes from Newton's method, started from a fifth of the exponent.
    """
    bits, start = root.view(np.int32), x.view(np.int32)
    for i in range(len(x)):
        bits[i] = np.int32(FIFTH - np.int32(np.float32(start[i]) * np.float32(0.2)))
    for i in range(len(x)):
        z = root[i]
        for _ in range(3):
            square = z * z
            z *= np.float32(1.2) - np.float32(0.2) * (x[i] * z) * (square * square)
        z *= x[i]
        x[i] = z * z * z


@compiled()
def _error(run, scale, zero, most, unit, lost, root, partial):
    """Sum of (|error| * unit)^2.4 of the entries on the grid. unit: a power of two, as the product of two factors."""
    first, second = unit[0], unit[1]
    for i in range(len(run)):
        code = min(max(np.rint(run[i] / scale) + zero, np.float32(0)), most)
        lost[i] = abs(scale * (code - zero) - run[i]) * first * second
    _power(lost, root)
    partial[:] = 0
    whole = len(run) // PARTIAL_SUMS * PARTIAL_SUMS
    for start in range(0, whole, PARTIAL_SUMS):
        for lane in range(PARTIAL_SUMS):
            partial[lane] += lost[start + lane]
    for i in range(whole, len(run)):
        partial[0] += lost[i]
    return partial.sum()


@compiled()
def _shrink(run, low, high, most, symmetric):
    """Scale and zero of the range with the smallest error among 80, each shrunk by another hundredth; ties go to the
    first.

    Errors are in units of the range, because those of tiny weights would underflow.
    """
    best, least = _grid_of(low, high, most, symmetric), np.float32(np.inf)
    lost, root = np.empty(len(run), np.float32), np.empty(len(run), np.float32)
    partial, unit = np.empty(PARTIAL_SUMS, np.float32), np.empty(2, np.float32)
    exponent = -math.frexp(high - low)[1]
    unit[0], unit[1] = 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)
    for step in range(RANGES):
        share = np.float32(1 - step / 100)
        scale, zero = _grid_of(share * low, share * high, most, symmetric)
        error = _error(run, scale, zero, most, unit, lost, root, partial)
        if error < least:
            best, least = (scale, zero), error
    return best


@compiled()
def _fit(run, most, symmetric, mse):
    low, high = _range(run)
    if symmetric:
        high = max(abs(low), high)
        if low < 0:
            low = -high
    if low == 0 and high == 0:
        low, high = np.float32(-1), np.float32(1)
    return _shrink(run, low, high, most, symmetric) if mse else _grid_of(low, high, most, symmetric)


@compiled()
def _round(run, scale, zero, most, codes, values):
    for i in range(len(run)):
        code = min(max(np.rint(run[i] / scale) + zero, np.float32(0)), most)
        codes[i] = np.uint8(code)
        values[i] = scale * (code - zero)


class GridSettings(NamedTuple):
    """Settings of the fit: runs of `length` columns, codes from 0 to `largest_code`."""

    length: int
    largest_code: np.float32
    symmetric: bool
    mse: bool


FLOATS, CODES = float32[:, ::1], uint8[:, ::1]
SETTINGS_TYPE = named(GridSettings, int64, float32, boolean, boolean)


@compiled([(FLOATS, SETTINGS_TYPE, FLOATS, FLOATS, int64, int64)])
def _fit_rows(weight, settings, scales, zeros, first, last):
    length, most, symmetric, mse = settings
    for row in range(first, last):
        for group in range(scales.shape[1]):
            run = weight[row, group * length : (group + 1) * length]
            scales[row, group], zeros[row, group] = _fit(run, most, symmetric, mse)


@compiled([(FLOATS, SETTINGS_TYPE, FLOATS, FLOATS, CODES, FLOATS, int64, int64)])
def _fit_and_round(weight, settings, scales, zeros, codes, values, first, last):
    length, most, symmetric, mse = settings
    for row in range(first, last):
        for group in range(scales.shape[1]):
            start, end = group * length, min((group + 1) * length, weight.shape[1])
            run = weight[row, start:end]
            scale, zero = _fit(run, most, symmetric, mse)
            scales[row, group], zeros[row, group] = scale, zero
            _round(run, scale, zero, most, codes[row, start:end], values[row, start:end])


def fit(weight: Tensor, length: int, bits: int, symmetric: bool, mse: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros [out, groups] of runs of `length` columns of weight [out, in] float32."""
    scales, zeros = _grids(weight, length)
    settings = GridSettings(length, np.float32(2**bits - 1), symmetric, mse)
    by_rows(_fit_rows, weight.shape, array(weight), settings, scales, zeros)
    return from_numpy(scales), from_numpy(zeros)


def fit_and_round(
    weight: Tensor, length: int, bits: int, symmetric: bool, mse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales and zeros [out, groups] as `fit`, and the weight's codes and values [out, in], in one pass."""
    scales, zeros = _grids(weight, length)
    codes, values = empty(weight.shape, np.uint8), empty(weight.shape, np.float32)
    settings = GridSettings(length, np.float32(2**bits - 1), symmetric, mse)
    by_rows(_fit_and_round, weight.shape, array(weight), settings, scales, zeros, codes, values)
    return from_numpy(scales), from_numpy(zeros), from_numpy(codes), from_numpy(values)


def _grids(weight: Tensor, length: int) -> tuple[np.ndarray, np.ndarray]:
    shape = (len(weight), -(-weight.shape[1] // length))
    return np.empty(shape, np.float32), np.empty(shape, np.float32)
