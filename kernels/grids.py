"""Min-max grids of runs of weights, and rounding to them (methods.ops.Grid), in float32 as torch computes them."""

import numpy as np
from torch import Tensor, from_numpy

from kernels.rows import array, by_rows, compiled, empty

LANES = 16


@compiled()
def _range(run):
    """Smallest and largest of the entries and 0; both NaN where an entry is."""
    low, high, bad = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    whole = len(run) // LANES * LANES
    for start in range(0, whole, LANES):
        for lane in range(LANES):
            entry = run[start + lane]
            low[lane] = entry if entry < low[lane] else low[lane]
            high[lane] = entry if entry > high[lane] else high[lane]
            bad[lane] += entry - entry
    for entry in run[whole:]:
        low[0], high[0] = min(low[0], entry), max(high[0], entry)
        bad[0] += entry - entry
    return low.min() + bad.sum(), high.max() + bad.sum()


@compiled()
def _grid_of(low, high, most, symmetric):
    """Scale and zero of the range, as methods.ops._scale_and_zero."""
    scale = np.float32((high - low) / most)
    if not scale > 0 and scale == scale:
        scale = np.float32(1)
    return scale, (most + np.float32(1)) / np.float32(2) if symmetric else np.rint(-low / scale)


@compiled()
def _fit(run, most, symmetric):
    low, high = _range(run)
    if symmetric:
        high = max(abs(low), high)
        if low < 0:
            low = -high
    if low == 0 and high == 0:
        low, high = np.float32(-1), np.float32(1)
    return _grid_of(low, high, most, symmetric)


@compiled()
def _round(run, scale, zero, most, codes, values):
    for i in range(len(run)):
        code = min(max(np.rint(run[i] / scale) + zero, np.float32(0)), most)
        codes[i] = np.uint8(code)
        values[i] = scale * (code - zero)


@compiled(["(f4[:, ::1], i8, i8, i8, f4, b1, f4[:, ::1], f4[:, ::1], i8, i8)"])
def _fit_rows(weight, start, end, length, most, symmetric, scales, zeros, first, last):
    for row in range(first, last):
        for group, place in enumerate(range(start, end, length)):
            run = weight[row, place : min(place + length, end)]
            scales[row, group], zeros[row, group] = _fit(run, most, symmetric)


@compiled(["(f4[:, ::1], i8, f4, b1, f4[:, ::1], f4[:, ::1], u1[:, ::1], f4[:, ::1], i8, i8)"])
def _fit_and_round(weight, length, most, symmetric, scales, zeros, codes, values, first, last):
    inputs = weight.shape[1]
    for row in range(first, last):
        for group, start in enumerate(range(0, inputs, length)):
            end = min(start + length, inputs)
            run = weight[row, start:end]
            scale, zero = _fit(run, most, symmetric)
            scales[row, group], zeros[row, group] = scale, zero
            _round(run, scale, zero, most, codes[row, start:end], values[row, start:end])


def fit(weight: Tensor, length: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros [out, groups] of runs of `length` columns of weight [out, in]."""
    out, inputs = weight.shape
    scales, zeros = (np.empty((out, -(-inputs // length)), np.float32) for _ in range(2))
    by_rows(_fit_rows, weight.shape, array(weight), 0, inputs, length, 2**bits - 1, symmetric, scales, zeros)
    return from_numpy(scales), from_numpy(zeros)


def fit_and_round(weight: Tensor, length: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales and zeros [out, groups], codes and values [out, in] of weight on its grid."""
    out, inputs = weight.shape
    scales, zeros = (np.empty((out, -(-inputs // length)), np.float32) for _ in range(2))
    codes, values = empty(weight.shape, np.uint8), empty(weight.shape, np.float32)
    by_rows(
        _fit_and_round, weight.shape, array(weight), length, 2**bits - 1, symmetric, scales, zeros, codes, values
    )
    return from_numpy(scales), from_numpy(zeros), from_numpy(codes), from_numpy(values)
