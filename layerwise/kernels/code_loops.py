"""Changes of codes on a CPU: one compiled loop per row, so that the row's data stay in cache.

Changes are compared, checked and made with the same operations in the same order as in the reference,
`numerics/code_search.py`. Ties go to the first change, so the changes are identical. A move is a step of one code up or
down. All moves up come first, then those down. A pair of moves changes the loss by cost_u + cost_p + 2 v_u v_p G_up, as
in SparseSwaps with the opposite sign, and the search skips pairs by the same bounds (swap_loops).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import boolean, float32, float64, int64, uint8

from layerwise.kernels import scans, simd
from layerwise.kernels.rows import compiled, named
from layerwise.kernels.swap_loops import (
    FEW,
    FLOATS,
    PAIRS_AT_ONCE,
    ROUND_UP,
    SearchScratch,
    SearchTerms,
    _add_pairs,
    _below_chords,
    _better,
    _bounds,
    _limit,
    _partners,
    _reach,
)


class LayerArrays(NamedTuple):
    """Arrays shared by all rows: Gram [in, in], its diagonal, root and steepness, input_scale and group_of [in]."""

    gram: np.ndarray
    diagonal: np.ndarray
    root: np.ndarray
    steepness: np.ndarray
    input_scale: np.ndarray
    group_of: np.ndarray


class CodeRows(NamedTuple):
    """Codes, scales, zeros, movable, coupling, loss as in CodeState, and whether a row may still improve [rows]."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    movable: np.ndarray
    coupling: np.ndarray
    loss: np.ndarray
    active: np.ndarray


LAYER_TYPE = named(LayerArrays, FLOATS, *[float32[::1]] * 4, int64[::1])
ROWS_TYPE = named(CodeRows, uint8[:, ::1], FLOATS, FLOATS, boolean[:, ::1], float64[:, ::1], float64[::1], boolean[::1])


class RowTerms(NamedTuple):
    """Terms of a row: its steps, the loss added by one step alone, 1 / (step G_jj) or 0 for fixed codes, all [in]
    float64, and changes. Terms of its moves, [2 * places] float32: signed steps, costs, sizes, slopes, bounds and
    changes."""

    step: np.ndarray
    alone: np.ndarray
    inverse: np.ndarray
    change: np.ndarray
    move: np.ndarray
    cost: np.ndarray
    size: np.ndarray
    slope: np.ndarray
    bound: np.ndarray
    paired: np.ndarray


@compiled()
def _value(code, scale, zero, input_scale):
    """Value of a code in float32, as in `numerics.grids.dequantise`."""
    return scale * (np.float32(code) - zero) / input_scale


@compiled()
def _delta(layer, rows, row, j, by):
    """Change of the value of entry j when its code changes, float64."""
    group, code = layer.group_of[j], np.int64(rows.codes[row, j])
    scale, zero, input_scale = rows.scales[row, group], rows.zeros[row, group], layer.input_scale[j]
    after = np.float64(_value(code + by, scale, zero, input_scale))
    return after - np.float64(_value(code, scale, zero, input_scale))


@compiled()
def _enter(layer, rows, row, terms):
    """Write the terms that stay constant while the row's codes change."""
    inputs, places = len(layer.root), len(terms.move) // 2
    for j in range(inputs):
        group = layer.group_of[j]
        step = np.float64(rows.scales[row, group]) / np.float64(layer.input_scale[j])
        diagonal = np.float64(layer.diagonal[j])
        terms.step[j] = step
        terms.alone[j] = step * step * diagonal
        terms.inverse[j] = 1 / (step * diagonal) if rows.movable[row, j] and terms.alone[j] > 0 else 0.0
        single = np.float32(step)
        terms.move[j], terms.move[places + j] = single, -single
        terms.size[j] = terms.size[places + j] = single * layer.root[j]
        terms.slope[j] = terms.slope[places + j] = np.float32(2) * ROUND_UP * (single * layer.steepness[j])


@compiled()
def _singles(codes, coupling, terms, most):
    """Write the change of the row's loss by the best change of each single code."""
    change, step, alone, inverse = terms.change, terms.step, terms.alone, terms.inverse
    for j in range(len(coupling)):
        code = np.float64(codes[j])
        by = min(max(np.rint(-coupling[j] * inverse[j]), -code), most - code)
        change[j] = by * (2 * step[j] * coupling[j] + by * alone[j])


@compiled()
def _smallest(values):
    """Index of the first smallest value."""
    least = values[0]
    for value in values:
        least = min(least, value)
    for j in range(len(values)):
        if values[j] == least:
            return j
    return 0


@compiled()
def _add(coupling, line, by):
    for i in range(len(coupling)):
        coupling[i] += by * np.float64(line[i])


@compiled()
def _add_both(coupling, first, by, second, and_by):
    for i in range(len(coupling)):
        coupling[i] += by * np.float64(first[i]) + and_by * np.float64(second[i])


@compiled()
def _change_one(layer, rows, row, terms, most, tolerance):
    """Make the best change of one code if it is an improvement; returns whether it was made."""
    coupling = rows.coupling[row]
    _singles(rows.codes[row], coupling, terms, np.float64(most))
    j = _smallest(terms.change)
    if not terms.change[j] < 0:
        return False
    code = np.float64(rows.codes[row, j])
    by = np.int64(min(max(np.rint(-coupling[j] * terms.inverse[j]), -code), most - code))
    delta, diagonal = _delta(layer, rows, row, j, by), np.float64(layer.diagonal[j])
    own = delta * delta * diagonal
    change = 2 * delta * coupling[j] + own
    if not (change < -tolerance * own and rows.loss[row] + change < rows.loss[row]):
        return False
    rows.codes[row, j] = np.uint8(np.int64(rows.codes[row, j]) + by)
    rows.loss[row] += change
    _add(coupling, layer.gram[j], delta)
    return True


@compiled()
def _costs(codes, coupling, terms, most):
    """The change of the row's loss by each move, rounded to float32; inf where there is no move."""
    infinite, places = np.float32(np.inf), len(terms.cost) // 2
    for j in range(len(coupling)):
        both = 2 * terms.step[j] * coupling[j]
        free = terms.inverse[j] > 0
        terms.cost[j] = np.float32(terms.alone[j] + both) if free and codes[j] < most else infinite
        terms.cost[places + j] = np.float32(terms.alone[j] - both) if free and codes[j] > 0 else infinite


@compiled()
def _pair_change(u, p, gram, move, cost):
    """Change of the loss by two moves; two moves of the same input count as uncorrelated."""
    places = len(move) // 2
    i, k = u % places, p % places
    entry = np.float32(0) if i == k else gram[i, k]
    return (entry * move[p]) * (np.float32(2) * move[u]) + cost[p] + cost[u]


@compiled()
def _changes_beside(line, factor, move, cost, own, change):
    """The same for one move with the moves of all inputs in one direction."""
    for k in range(len(line)):
        change[k] = (line[k] * move[k]) * factor + cost[k] + own


@compiled()
def _best_beside(u, gram, terms):
    """(change, u, p) of the best pair with the move u."""
    inputs, places = len(gram), len(terms.move) // 2
    i, factor, own = u % places, np.float32(2) * terms.move[u], terms.cost[u]
    for start in (0, places):
        part = slice(start, start + inputs)
        _changes_beside(gram[i], factor, terms.move[part], terms.cost[part], own, terms.paired[part])
        terms.paired[start + i] = terms.cost[start + i] + own
    least = scans.minimum(terms.paired)
    if least < 0:
        return least, u, scans.first_at_most(terms.paired, least)
    return np.float32(0), -1, -1


@compiled()
def _best_of_pairs(gram, terms, pairs, best):
    """(change, u, p) of the best among these pairs and the best one so far."""
    least, best_u, best_p = best
    for j in range(len(pairs)):
        u, p = pairs[j]
        change = _pair_change(u, p, gram, terms.move, terms.cost)
        if _better(change, u, p, least, best_u, best_p):
            least, best_u, best_p = change, u, p
    return least, best_u, best_p


@compiled()
def _best_pair(layer, terms, largest, scratch):
    """u and p of the pair of moves with the smallest change below zero, or -1 and -1."""
    cost = terms.cost
    least_cost = scans.minimum(cost)
    if not np.isfinite(least_cost):
        return -1, -1
    best = _best_beside(scans.first_at_most(cost, least_cost), layer.gram, terms)
    _bounds(cost, terms.slope, largest, least_cost, terms.bound)
    search = SearchTerms(terms.size, terms.slope, largest, least_cost, terms.bound)
    count = scans.places_at_most(terms.bound, best[0], scratch.tried)
    if count == 0:
        return best[1], best[2]
    widest, steepest, likely = _reach(best[0], cost, search, scratch.tried[:count])
    filled = _partners(cost, terms.size, widest, scratch)
    if filled == 0:
        return best[1], best[2]
    if count > FEW:
        count = _below_chords(best[0], cost, search, steepest, count, filled, scratch)
    waiting = 0
    for k in range(-1, count):
        u = scratch.tried[k] if k >= 0 else likely  # the most promising move first
        if terms.bound[u] <= best[0] and (k < 0 or u != likely):
            limit = _limit(best[0], cost[u], least_cost, terms.slope[u] * largest)
            waiting = _add_pairs(u, terms.slope[u], limit, filled, waiting, scratch)
        if waiting > PAIRS_AT_ONCE or k < 1 or k == count - 1:
            best = _best_of_pairs(layer.gram, terms, scratch.pairs[:waiting], best)
            waiting = 0
    return best[1], best[2]


@compiled()
def _change_two(layer, rows, row, terms, largest, scratch, most, tolerance):
    """Make the best change of two codes by one step each if it is an improvement; returns whether it was made."""
    codes, coupling, places = rows.codes[row], rows.coupling[row], len(terms.cost) // 2
    _costs(codes, coupling, terms, most)
    u, p = _best_pair(layer, terms, largest, scratch)
    if u < 0 or u % places == p % places:
        return False
    i, up = u % places, 1 if u < places else -1
    k, and_up = p % places, 1 if p < places else -1
    one, other = _delta(layer, rows, row, i, up), _delta(layer, rows, row, k, and_up)
    own_one = one * one * np.float64(layer.diagonal[i])
    own_other = other * other * np.float64(layer.diagonal[k])
    change = (2 * one * coupling[i] + own_one) + (2 * other * coupling[k] + own_other)
    change += 2 * one * other * np.float64(layer.gram[i, k])
    if not (change < -tolerance * (own_one + own_other) and rows.loss[row] + change < rows.loss[row]):
        return False
    codes[i] = np.uint8(np.int64(codes[i]) + up)
    codes[k] = np.uint8(np.int64(codes[k]) + and_up)
    rows.loss[row] += change
    _add_both(coupling, layer.gram[i], one, layer.gram[k], other)
    return True


@compiled([(LAYER_TYPE, ROWS_TYPE, int64[:, ::1], int64, int64, boolean, float64)])
def advance(layer, rows, made, count, most, pairs, tolerance):
    """Make up to `count` changes in each row; adds the numbers of single and double changes to made [rows, 2]."""
    inputs = len(layer.root)
    places = -(-inputs // simd.LANES) * simd.LANES
    infinite = np.float32(np.inf)
    terms = RowTerms(
        np.empty(inputs, np.float64),
        np.empty(inputs, np.float64),
        np.empty(inputs, np.float64),
        np.empty(inputs, np.float64),
        np.zeros(2 * places, np.float32),
        np.full(2 * places, infinite),
        np.zeros(2 * places, np.float32),
        np.zeros(2 * places, np.float32),
        np.full(2 * places, infinite),
        np.full(2 * places, infinite),
    )
    scratch = SearchScratch(
        np.empty(2 * places, np.int64),
        np.empty(2 * places, np.int64),
        np.empty((2 * places + PAIRS_AT_ONCE, 2), np.int64),
        np.empty(2 * places, np.float32),
        np.empty(2 * places, np.float32),
    )
    for row in range(len(rows.codes)):
        if rows.active[row]:
            _enter(layer, rows, row, terms)
            largest = terms.size.max()
            for _ in range(count):
                if _change_one(layer, rows, row, terms, most, tolerance):
                    made[row, 0] += 1
                elif pairs and _change_two(layer, rows, row, terms, largest, scratch, most, tolerance):
                    made[row, 1] += 1
                else:
                    rows.active[row] = False
                    break
