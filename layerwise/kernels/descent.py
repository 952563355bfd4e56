"""A gradient step and its projection on rows or n:m, in one pass over the rows; the sums of a step in another."""

import numpy as np
from torch import Tensor, from_numpy

from layerwise.kernels.rows import array, by_rows, compiled, empty
from layerwise.kernels.select import _cut, _mark, _mark_groups


@compiled(
    [
        "(f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4, f4, i8, i8, f4[:, ::1], b1[:, ::1],"
        " f4[:, ::1], i8, i8)"
    ]
)
def _descend(
    weight, theta, gradient, theta_before, gradient_before, beta, step, pruned, of, values, mask, missing, first, last
):
    inputs = weight.shape[1]
    groups = -(-inputs // of) if of else 0
    moved, kept = np.empty(inputs, np.float32), np.empty(max(groups * of, inputs), np.bool_)
    scores = np.empty(len(kept), np.float32)
    keys = scores.view(np.int32)  # which need no reflection: no score is negative
    by_place, ranks = np.empty((of, groups), np.int32), np.empty(groups, np.int32)
    for row in range(first, last):
        for j in range(inputs):
            moved[j] = theta[row, j] + step * gradient[row, j]
        if beta > 0:
            for j in range(inputs):
                moved[j] += beta * (theta[row, j] - theta_before[row, j])
                moved[j] += beta * step * (gradient[row, j] - gradient_before[row, j])
        for j in range(inputs):
            scores[j] = abs(moved[j])
        if of:
            keys[inputs:] = -1  # what fills up the last group goes first
            _mark_groups(keys, of, pruned, by_place, ranks, kept)
        else:
            key, ties = _cut(keys, pruned)
            _mark(keys, key, ties, kept)
        for j in range(inputs):
            mask[row, j] = kept[j]
            values[row, j] = moved[j] if kept[j] else np.float32(0)
            missing[row, j] = weight[row, j] - values[row, j]


@compiled(["(f4[:, ::1], f4[:, ::1], f8[::1], f8[::1], i8, i8)"], fastmath={"contract", "reassoc", "nsz"})
def _sums(gradient, missing, objectives, squares, first, last):
    for row in range(first, last):
        objective = square = 0.0
        for j in range(gradient.shape[1]):
            g = np.float64(gradient[row, j])
            objective += g * missing[row, j]
            square += g * g
        objectives[row], squares[row] = objective, square


def descend(
    weight: Tensor, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], beta: float, step: float, pruned, of
) -> tuple[Tensor, Tensor, Tensor]:
    """Theta, its mask and weight - theta, [out, in] each, after a step from `now` and a projection.

    now, before: (theta, gradient) of the last iterate and the one before it; beta: the momentum. pruned: entries of a
    row, or of each `of` consecutive ones.
    """
    values, missing = empty(weight.shape, np.float32), empty(weight.shape, np.float32)
    mask = empty(weight.shape, np.bool_)
    arrays = map(array, (weight, *now, *before))
    by_rows(_descend, weight.shape, *arrays, beta, step, pruned, of, values, mask, missing)
    return from_numpy(values), from_numpy(mask), from_numpy(missing)


def sums(gradient: Tensor, missing: Tensor) -> tuple[float, float]:
    """The sum of gradient * missing and the norm of the gradient, summed in float64."""
    found = np.empty((2, len(gradient)))
    by_rows(_sums, gradient.shape, array(gradient), array(missing), *found)
    return float(found[0].sum()), float(found[1].sum() ** 0.5)
