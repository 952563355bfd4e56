"""A gradient step and its projection on rows or n:m in one pass over the rows; a step's sums in a second pass."""

from typing import NamedTuple

import numpy as np
from numba import boolean, float32, int64
from torch import Tensor, from_numpy

from layerwise.kernels.rows import array, by_rows, compiled, empty, named
from layerwise.kernels.selection import _cut, _mark, _mark_groups


class Iterate(NamedTuple):
    """An iterate [out, in] and minus half the gradient there, [out, in]; both float32."""

    theta: np.ndarray
    gradient: np.ndarray


class StepParameters(NamedTuple):
    """Momentum, step size, and the number of entries pruned in each row (group_size 0) or in each group of a row."""

    momentum: np.float32
    step: np.float32
    n_pruned: int
    group_size: int


class Projected(NamedTuple):
    """The projected iterate, its mask, and weight - iterate, [out, in] each."""

    values: np.ndarray
    mask: np.ndarray
    missing: np.ndarray


FLOATS, BOOLS = float32[:, ::1], boolean[:, ::1]
ITERATE_TYPE = named(Iterate, FLOATS, FLOATS)
PARAMETERS_TYPE = named(StepParameters, float32, float32, int64, int64)
PROJECTED_TYPE = named(Projected, FLOATS, BOOLS, FLOATS)


@compiled([(FLOATS, ITERATE_TYPE, ITERATE_TYPE, PARAMETERS_TYPE, PROJECTED_TYPE, int64, int64)])
def _descend(weight, now, before, parameters, projected, first, last):
    theta, gradient = now
    theta_before, gradient_before = before
    beta, step, n_pruned, group_size = parameters
    values, mask, missing = projected
    inputs = weight.shape[1]
    groups = -(-inputs // group_size) if group_size else 0
    moved, kept = np.empty(inputs, np.float32), np.empty(max(groups * group_size, inputs), np.bool_)
    scores = np.empty(len(kept), np.float32)
    keys = scores.view(np.int32)  # no score is negative, so bits are ordered like scores
    by_place, ranks = np.empty((group_size, groups), np.int32), np.empty(groups, np.int32)
    for row in range(first, last):
        for j in range(inputs):
            moved[j] = theta[row, j] + step * gradient[row, j]
        if beta > 0:
            for j in range(inputs):
                moved[j] += beta * (theta[row, j] - theta_before[row, j])
                moved[j] += beta * step * (gradient[row, j] - gradient_before[row, j])
        for j in range(inputs):
            scores[j] = abs(moved[j])
        if group_size:
            keys[inputs:] = -1  # entries that pad the last group are pruned first
            _mark_groups(keys, group_size, n_pruned, by_place, ranks, kept)
        else:
            key, ties = _cut(keys, n_pruned)
            _mark(keys, key, ties, kept)
        for j in range(inputs):
            mask[row, j] = kept[j]
            values[row, j] = moved[j] if kept[j] else np.float32(0)
            missing[row, j] = weight[row, j] - values[row, j]


@compiled(["(f4[:, ::1], f4[:, ::1], f8[::1], f8[::1], i8, i8)"], fastmath={"contract", "reassoc", "nsz"})
def _objective_and_squares(gradient, missing, objectives, squares, first, last):
    for row in range(first, last):
        objective = square = 0.0
        for j in range(gradient.shape[1]):
            g = np.float64(gradient[row, j])
            objective += g * missing[row, j]
            square += g * g
        objectives[row], squares[row] = objective, square


def descend(
    weight: Tensor,
    now: tuple[Tensor, Tensor],
    before: tuple[Tensor, Tensor],
    momentum: float,
    step: float,
    n_pruned: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The theta, mask and weight - theta, [out, in] each, after a step from `now` and a projection.

    now, before: (theta, gradient), [out, in] float32 each, of the last iterate and the one before it. n_pruned: number
    of entries pruned in each row, or in each `group_size` consecutive ones if that is not 0.
    """
    shape = tuple(weight.shape)
    projected = Projected(empty(shape, np.float32), empty(shape, np.bool_), empty(shape, np.float32))
    iterates = (Iterate(array(theta), array(gradient)) for theta, gradient in (now, before))
    parameters = StepParameters(np.float32(momentum), np.float32(step), n_pruned, group_size)
    by_rows(_descend, shape, array(weight), *iterates, parameters, projected)
    values, mask, missing = map(from_numpy, projected)
    return values, mask, missing


def objective_and_norm(gradient: Tensor, missing: Tensor) -> tuple[float, float]:
    """The sum of gradient * missing, both [out, in], and the norm of the gradient; sums in float64."""
    sums = np.empty((2, len(gradient)))
    by_rows(_objective_and_squares, gradient.shape, array(gradient), array(missing), *sums)
    return float(sums[0].sum()), float(sums[1].sum() ** 0.5)
