"""Frank-Wolfe steps on relaxed masks, row by row; only the Gram's rows of entries that change in the vertex are read.

A step averages product = (W o (1 - M)) G and the vertex's product (W o (1 - V)) G. So the product of M needs no matrix
multiplication, and the product of V changes only by the rows of changed entries. All sums are float64.
"""

from typing import NamedTuple

import numpy as np
from numba import boolean, float32, float64, int64

from layerwise.kernels.rows import compiled, named
from layerwise.kernels.selection import _cut, _mark, _mark_groups, _to_order

REORDERED_SUMS = {"contract", "reassoc", "nsz"}  # sums in any order, and fused multiply-add


@compiled(fastmath=REORDERED_SUMS)
def add_rows(row, gram, chosen, factors, count):
    """Add factors[i] * gram[chosen[i]] for i < count to row [in], eight of them at a time."""
    factors[count : count + 7], chosen[count : count + 7] = 0, 0
    for i in range(0, count, 8):
        a, b, c, d = gram[chosen[i]], gram[chosen[i + 1]], gram[chosen[i + 2]], gram[chosen[i + 3]]
        e, f, g, h = gram[chosen[i + 4]], gram[chosen[i + 5]], gram[chosen[i + 6]], gram[chosen[i + 7]]
        s, t, u, v = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        w, x, y, z = factors[i + 4], factors[i + 5], factors[i + 6], factors[i + 7]
        for j in range(len(row)):
            row[j] += (s * a[j] + t * b[j] + u * c[j] + v * d[j]) + (w * e[j] + x * f[j] + y * g[j] + z * h[j])


@compiled()
def _follow(weight, gram, vertex, before, product, chosen, factors):
    """Update product = (w o (1 - before)) G to (w o (1 - vertex)) G, and `before` to `vertex`."""
    count = 0
    for j in range(len(weight)):
        if before[j] != vertex[j]:
            chosen[count], factors[count] = j, weight[j] if before[j] else -weight[j]
            count += 1
            before[j] = vertex[j]
    add_rows(product, gram, chosen, factors, count)


class PruneCount(NamedTuple):
    """Number of entries pruned in each row (group_size 0), or in each `group_size` consecutive entries of a row."""

    n_pruned: int
    group_size: int


class VertexScratch(NamedTuple):
    """Memory for `choose_vertex`: scores, the vertex found [in, padded to whole groups], and the groups' ranks."""

    descent: np.ndarray
    vertex: np.ndarray
    by_place: np.ndarray
    ranks: np.ndarray


@compiled()
def choose_vertex(weight, fixed, product, count, scratch):
    """Write the vertex [in]: the fixed entries and the largest positive entries of w o product."""
    n_pruned, group_size = count
    descent, vertex, by_place, ranks = scratch
    inputs = len(weight)
    keys = descent.view(np.int64)
    for j in range(inputs):
        descent[j] = np.inf if fixed[j] else weight[j] * product[j]
    _to_order(keys[:inputs])
    if group_size:
        keys[inputs:] = -(2**63 - 1)  # entries that pad the last group are pruned first
        _mark_groups(keys, group_size, n_pruned, by_place, ranks, vertex)
    else:
        key, ties = _cut(keys, n_pruned)
        _mark(keys, key, ties, vertex)
    for j in range(inputs):
        vertex[j] &= keys[j] > 0


@compiled()
def vertex_scratch(inputs, group_size):
    """Uninitialised memory for rows of `inputs` entries."""
    groups = -(-inputs // group_size) if group_size else 0
    padded = groups * group_size if group_size else inputs
    places = np.empty((group_size, groups), np.int64)
    return VertexScratch(np.empty(padded), np.empty(padded, np.bool_), places, np.empty(groups, np.int32))


@compiled(fastmath=REORDERED_SUMS)
def _slope(weight, relaxed, product, vertex):
    """Half the gap: the sum of w o product o (vertex - m)."""
    total = 0.0
    for j in range(len(weight)):
        total += product[j] * (weight[j] * (vertex[j] - relaxed[j]))
    return total


@compiled(fastmath=REORDERED_SUMS)
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


class MaskState(NamedTuple):
    """Matrices [out, in]: weight (float32), entries fixed at one (bool), the relaxed mask and its product (float64)."""

    weight: np.ndarray
    fixed: np.ndarray
    relaxed: np.ndarray
    product: np.ndarray


class VertexState(NamedTuple):
    """The last vertex [out, in] (bool), its product (W o (1 - V)) G [out, in] (float64), and G [in, in] (float32)."""

    vertex: np.ndarray
    product: np.ndarray
    gram: np.ndarray


FLOATS, BOOLS, DOUBLES = float32[:, ::1], boolean[:, ::1], float64[:, ::1]
MASK_TYPE = named(MaskState, FLOATS, BOOLS, DOUBLES, DOUBLES)
VERTEX_TYPE = named(VertexState, BOOLS, DOUBLES, FLOATS)
COUNT_TYPE = named(PruneCount, int64, int64)


@compiled([(MASK_TYPE, VERTEX_TYPE, COUNT_TYPE, boolean, int64, int64, int64, int64)])
def steps(state, vertices, count, search, begin, end, first, last):
    """Make steps begin + 1 to end in each row, in place: by 2 / (t + 2), or with `search` by the optimal amount."""
    inputs = state.weight.shape[1]
    scratch = vertex_scratch(inputs, count.group_size)
    entries, factors = np.empty(inputs + 7, np.int64), np.empty(inputs + 7)
    for row in range(first, last):
        w, m, p = state.weight[row], state.relaxed[row], state.product[row]
        v, q = vertices.vertex[row], vertices.product[row]
        for t in range(begin, end):
            choose_vertex(w, state.fixed[row], p, count, scratch)
            _follow(w, vertices.gram, scratch.vertex, v, q, entries, factors)
            size = 2 / (t + 2)
            if search:
                slope = _slope(w, m, p, v)
                size = _best(slope, slope - _slope(w, m, q, v))
            _moved(m, p, v, q, size)


@compiled([(MASK_TYPE, VERTEX_TYPE, BOOLS, float64[::1], float64[::1], int64, int64)])
def follow_vertex(state, vertices, chosen, slopes, curvatures, first, last):
    """Set the vertex to `chosen` [out, in], and write the slope and curvature [out] of the path to it."""
    inputs = state.weight.shape[1]
    entries, factors = np.empty(inputs + 7, np.int64), np.empty(inputs + 7)
    for row in range(first, last):
        w, m, v, q = state.weight[row], state.relaxed[row], vertices.vertex[row], vertices.product[row]
        _follow(w, vertices.gram, chosen[row], v, q, entries, factors)
        slopes[row] = _slope(w, m, state.product[row], v)
        curvatures[row] = slopes[row] - _slope(w, m, q, v)


@compiled([(MASK_TYPE, VERTEX_TYPE, float64, int64, int64)])
def move(state, vertices, size, first, last):
    """Move the relaxed masks towards the vertices by the share `size`, in place."""
    for row in range(first, last):
        _moved(state.relaxed[row], state.product[row], vertices.vertex[row], vertices.product[row], size)


@compiled([(MASK_TYPE, COUNT_TYPE, float64[::1], float64[::1], int64, int64)])
def measure(state, count, objectives, gaps, first, last):
    """Write the objective and the duality gap of each row, [out] each."""
    scratch = vertex_scratch(state.weight.shape[1], count.group_size)
    for row in range(first, last):
        w, m, p = state.weight[row], state.relaxed[row], state.product[row]
        choose_vertex(w, state.fixed[row], p, count, scratch)
        objectives[row] = _objective(w, m, p)
        gaps[row] = 2 * _slope(w, m, p, scratch.vertex)
