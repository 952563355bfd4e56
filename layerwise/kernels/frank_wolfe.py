"""Frank-Wolfe steps on relaxed masks, row by row: only the Gram's rows of what enters or leaves a vertex are read.

With product = (W o (1 - M)) G and that of the vertex, (W o (1 - V)) G, a step is a mean of the two: the product of M
needs no multiplication, and that of V changes by the rows of the entries that changed. All sums are float64.
"""

import numpy as np

from layerwise.kernels.rows import compiled
from layerwise.kernels.select import _cut, _mark, _mark_groups, _to_order

SUMS = {"contract", "reassoc", "nsz"}  # sums in any order, and fused multiply-add


@compiled(fastmath=SUMS)
def add_rows(total, gram, chosen, factors, count):
    """total [in] += the sum of factors[i] * gram[chosen[i]] over the first `count`, eight of them at a time."""
    factors[count : count + 7], chosen[count : count + 7] = 0, 0
    for i in range(0, count, 8):
        a, b, c, d = gram[chosen[i]], gram[chosen[i + 1]], gram[chosen[i + 2]], gram[chosen[i + 3]]
        e, f, g, h = gram[chosen[i + 4]], gram[chosen[i + 5]], gram[chosen[i + 6]], gram[chosen[i + 7]]
        s, t, u, v = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        w, x, y, z = factors[i + 4], factors[i + 5], factors[i + 6], factors[i + 7]
        for j in range(len(total)):
            total[j] += (s * a[j] + t * b[j] + u * c[j] + v * d[j]) + (w * e[j] + x * f[j] + y * g[j] + z * h[j])


@compiled()
def _follow(weight, gram, vertex, before, product, chosen, factors):
    """product = (w o (1 - before)) G becomes (w o (1 - vertex)) G, and `before` becomes `vertex`."""
    count = 0
    for j in range(len(weight)):
        if before[j] != vertex[j]:
            chosen[count], factors[count] = j, weight[j] if before[j] else -weight[j]
            count += 1
            before[j] = vertex[j]
    add_rows(product, gram, chosen, factors, count)


@compiled()
def choose(weight, fixed, product, pruned, of, descent, vertex, by_place, ranks):
    """vertex [in]: what is fixed and, as far as it is positive, the largest of w o product; of: m of n:m, or 0."""
    inputs = len(weight)
    keys = descent.view(np.int64)
    for j in range(inputs):
        descent[j] = np.inf if fixed[j] else weight[j] * product[j]
    _to_order(keys[:inputs])
    if of:
        keys[inputs:] = -(2**63 - 1)  # what fills up the last group goes first
        _mark_groups(keys, of, pruned, by_place, ranks, vertex)
    else:
        key, ties = _cut(keys, pruned)
        _mark(keys, key, ties, vertex)
    for j in range(inputs):
        vertex[j] &= keys[j] > 0


@compiled()
def buffers(inputs, of):
    """descent, vertex, by_place and ranks of `choose`."""
    groups = -(-inputs // of) if of else 0
    padded = groups * of if of else inputs
    places = np.empty((of, groups), np.int64)
    return np.empty(padded), np.empty(padded, np.bool_), places, np.empty(groups, np.int32)


@compiled(fastmath=SUMS)
def _slope(weight, relaxed, product, vertex):
    """Half the gap: the sum of w o product over what the vertex has more than m."""
    total = 0.0
    for j in range(len(weight)):
        total += product[j] * (weight[j] * (vertex[j] - relaxed[j]))
    return total


@compiled(fastmath=SUMS)
def _objective(weight, relaxed, product):
    total = 0.0
    for j in range(len(weight)):
        total += product[j] * (weight[j] * (1 - relaxed[j]))
    return total


@compiled()
def _moved(relaxed, product, vertex, vertex_product, size):
    for j in range(len(relaxed)):
        relaxed[j] += size * (vertex[j] - relaxed[j])
        product[j] += size * (vertex_product[j] - product[j])


@compiled()
def _best(slope, curvature):
    """Minimiser over [0, 1] of f - 2 slope t + curvature t^2."""
    if curvature > 0:
        return min(max(slope / curvature, 0.0), 1.0)
    return 1.0 if slope > 0 else 0.0


STATE = "f4[:, ::1], f4[:, ::1], b1[:, ::1], f8[:, ::1], f8[:, ::1], b1[:, ::1], f8[:, ::1]"


@compiled([f"({STATE}, i8, i8, b1, i8, i8, i8, i8)"])
def steps(weight, gram, fixed, relaxed, product, vertex, vertex_product, pruned, of, search, begin, end, first, last):
    inputs = weight.shape[1]
    descent, chosen, by_place, ranks = buffers(inputs, of)
    entries, factors = np.empty(inputs + 7, np.int64), np.empty(inputs + 7)
    for row in range(first, last):
        w, m, p, v, q = weight[row], relaxed[row], product[row], vertex[row], vertex_product[row]
        for t in range(begin, end):
            choose(w, fixed[row], p, pruned, of, descent, chosen, by_place, ranks)
            _follow(w, gram, chosen, v, q, entries, factors)
            size = 2 / (t + 2)
            if search:
                slope = _slope(w, m, p, v)
                size = _best(slope, slope - _slope(w, m, q, v))
            _moved(m, p, v, q, size)


@compiled([f"({STATE}, b1[:, ::1], f8[::1], f8[::1], i8, i8)"])
def approach(weight, gram, fixed, relaxed, product, vertex, vertex_product, chosen, slopes, curvatures, first, last):
    entries, factors = np.empty(weight.shape[1] + 7, np.int64), np.empty(weight.shape[1] + 7)
    for row in range(first, last):
        _follow(weight[row], gram, chosen[row], vertex[row], vertex_product[row], entries, factors)
        slopes[row] = _slope(weight[row], relaxed[row], product[row], vertex[row])
        curvatures[row] = slopes[row] - _slope(weight[row], relaxed[row], vertex_product[row], vertex[row])


@compiled(["(f8[:, ::1], f8[:, ::1], b1[:, ::1], f8[:, ::1], f8, i8, i8)"])
def move(relaxed, product, vertex, vertex_product, size, first, last):
    for row in range(first, last):
        _moved(relaxed[row], product[row], vertex[row], vertex_product[row], size)


@compiled(["(f4[:, ::1], b1[:, ::1], f8[:, ::1], f8[:, ::1], i8, i8, f8[::1], f8[::1], i8, i8)"])
def measure(weight, fixed, relaxed, product, pruned, of, objectives, gaps, first, last):
    descent, vertex, by_place, ranks = buffers(weight.shape[1], of)
    for row in range(first, last):
        choose(weight[row], fixed[row], product[row], pruned, of, descent, vertex, by_place, ranks)
        objectives[row] = _objective(weight[row], relaxed[row], product[row])
        gaps[row] = 2 * _slope(weight[row], relaxed[row], product[row], vertex)
