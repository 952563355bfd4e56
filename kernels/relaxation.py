"""Masks relaxed to [0, 1], row by row: Frank-Wolfe steps whose products follow what changed, and pairwise exchanges.

With p = (w o (1 - m)) G of a row, minus half the gradient of the row's error is w o p. All sums are float64.
"""

import numpy as np

from kernels.rows import compiled
from kernels.select import _cut, _mark, _mark_groups, _to_order

LANES = 64  # of a row that is one comparison group: how many running maxima there are
FIXED = 2.0  # stands in the relaxed mask for what is fixed at one, and for what fills up a row
FAST = {"contract", "nnan", "nsz"}


@compiled(fastmath=FAST)
def _add_rows(total, gram, chosen, factors, count):
    """total [in] += the sum of factors[i] * gram[chosen[i]] over the first `count`, eight rows of the Gram at a time."""
    factors[count : count + 8], chosen[count : count + 8] = 0, 0
    for i in range(0, count, 8):
        a, b, c, d = gram[chosen[i]], gram[chosen[i + 1]], gram[chosen[i + 2]], gram[chosen[i + 3]]
        e, f, g, h = gram[chosen[i + 4]], gram[chosen[i + 5]], gram[chosen[i + 6]], gram[chosen[i + 7]]
        s, t, u, v = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        w, x, y, z = factors[i + 4], factors[i + 5], factors[i + 6], factors[i + 7]
        for j in range(len(total)):
            total[j] += (s * a[j] + t * b[j] + u * c[j] + v * d[j]) + (w * e[j] + x * f[j] + y * g[j] + z * h[j])


@compiled()
def _follow(weight, gram, before, vertex, product, chosen, factors):
    """product = (w o (1 - before)) G becomes (w o (1 - vertex)) G, and `before` becomes `vertex`."""
    count = 0
    for j in range(len(weight)):
        if before[j] != vertex[j]:
            chosen[count], factors[count] = j, weight[j] if before[j] else -weight[j]
            count += 1
            before[j] = vertex[j]
    _add_rows(product, gram, chosen, factors, count)


@compiled()
def _choose(weight, product, fixed, pruned, of, descent, vertex, by_place, ranks):
    """vertex [in]: what is fixed and, as far as it is positive, the largest of w o p; of: m of n:m, or 0."""
    inputs = len(weight)
    keys = descent.view(np.int64)
    for j in range(inputs):
        descent[j] = np.inf if fixed[j] else weight[j] * product[j]
    _to_order(keys[:inputs])
    if of:
        keys[inputs:] = -(2**62) * 2 + 1  # what fills up the last group goes first
        _mark_groups(keys, of, pruned, by_place, ranks, vertex)
    else:
        key, ties = _cut(keys, pruned)
        _mark(keys, key, ties, vertex)
    for j in range(inputs):
        vertex[j] = vertex[j] & (keys[j] > 0)


@compiled(fastmath=FAST | {"reassoc"})
def _sums(weight, relaxed, product, target):
    """Objective, slope and curvature of a row on the way from m to the vertex whose product is `target`."""
    objective, towards, curvature = 0.0, 0.0, 0.0
    for j in range(len(weight)):
        objective += weight[j] * (1 - relaxed[j]) * product[j]
    return objective


@compiled(
    ["(f4[:, ::1], f4[:, ::1], b1[:, ::1], f8[:, ::1], f8[:, ::1], f8[:, ::1], b1[:, ::1], i8, i8, b1, i8, i8, i8, i8)"]
)
def _unused(
    weight, gram, fixed, relaxed, product, vertex_product, vertex, pruned, of, search, start, stop, first, last
):
    return
