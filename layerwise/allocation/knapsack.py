"""One level for each layer with the least sum of errors at a budget: the multiple-choice knapsack, and its bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STATES = 200_000_000  # entries of the table of choices, a byte each
NEAREST, UP, DOWN = "nearest", "up", "down"  # how excesses are rounded to multiples of the unit
ROUNDS = 200  # bisection rounds for the bound
Floats = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """picks: the option chosen for each layer. error: the sum of their errors. bound: no picks at the budget have a
    smaller sum. unit: number of weights in which sums were counted, 1 if they were exact."""

    picks: tuple[int, ...]
    error: float
    bound: float
    unit: int


def choose(
    errors: Sequence[Sequence[float]],
    excess: Sequence[Sequence[int]],
    resolution: int,
    at_most: bool = False,
    rounding: str = NEAREST,
) -> Choice:
    """Pick one option per layer: excesses sum to zero, and the sum of errors is the least.

    at_most: the sum of excesses may also be below zero. It is never above zero, for any unit.

    errors, excess: [layers][options]. excess: whole numbers by which an option exceeds the layer's share of the budget.
    Every layer must have an option of excess zero, so that equal levels are a possible choice. resolution: the largest
    number of distinct sums. If there are more, excesses are rounded to multiples of a unit, and the picks are the best
    of those whose rounded sum is zero. The true sum then differs from zero by at most half a unit per layer. With the
    rounding UP it is never above zero, with DOWN never below, and the difference is less than one unit per layer.
    Raises ValueError for errors that are not finite.
    """
    tables = [np.array(own, dtype=np.float64) for own in errors]
    if not all(np.isfinite(own).all() for own in tables):
        raise ValueError("errors must be finite numbers. Got NaN or infinity instead")
    divisor = math.gcd(*(value for own in excess for value in own)) or 1
    exact = [np.array([value // divisor for value in own], dtype=np.int64) for own in excess]
    if any(0 not in own for own in exact):
        raise ValueError("every layer must have an option that gives its share of the budget")
    most = max(1, min(resolution, STATES // len(exact)))
    unit = max(1, -(-_width(exact, at_most) // most))
    if at_most or rounding == UP:
        counted = [-(-own // unit) for own in exact]
    elif rounding == DOWN:
        counted = [own // unit for own in exact]
    else:  # Half a unit is rounded away from zero on both sides, so that no side is favoured.
        counted = [np.sign(own) * ((2 * np.abs(own) + unit) // (2 * unit)) for own in exact]
    picks = _programme(tables, counted, at_most)
    error = math.fsum(float(own[pick]) for own, pick in zip(tables, picks, strict=True))
    return Choice(tuple(picks), error, min(error, _bound(tables, exact, at_most)), unit)


def _width(excess: Sequence[Whole], at_most: bool) -> int:
    """Width of the range of sums that can still return to zero (or, with at_most, to zero or below)."""
    up, down = sum(int(own.max()) for own in excess), sum(int(-own.min()) for own in excess)
    return 2 * (down if at_most else min(up, down)) + 1


def _programme(errors: Sequence[Floats], excess: Sequence[Whole], at_most: bool) -> list[int]:
    """Dynamic programming over the sum of excesses, which always stays within `side` of zero."""
    side = _width(excess, at_most) // 2
    best = np.full(2 * side + 1, np.inf)
    best[side] = 0.0
    choices = []
    for error, move in zip(errors, excess, strict=True):
        after, choice = np.full_like(best, np.inf), np.zeros(len(best), dtype=np.uint8)
        for option in np.argsort(np.abs(move), kind="stable").tolist():  # ties go to the level nearest the budget
            shift = int(move[option])
            if abs(shift) > 2 * side:
                continue
            into = slice(max(shift, 0), len(best) + min(shift, 0))
            source = slice(max(-shift, 0), len(best) + min(-shift, 0))
            reached = best[source] + error[option]
            better = reached < after[into]
            after[into][better] = reached[better]
            choice[into][better] = option
        best = after
        choices.append(choice)
    picks, place = [], int(np.argmin(best[: side + 1])) if at_most else side
    for move, choice in zip(reversed(excess), reversed(choices), strict=True):
        option = int(choice[place])
        picks.append(option)
        place -= int(move[option])
    return picks[::-1]


def _bound(errors: Sequence[Floats], excess: Sequence[Whole], at_most: bool) -> float:
    """The largest of the Lagrangian's minima, which is the optimum over the lower convex hulls of the options.

    Every multiplier gives a bound; if the sum may be below zero, every nonnegative multiplier does. The bound is best
    at the multiplier where the sum of the picked excesses changes sign.
    """
    scale = max(1.0, *(float(np.abs(own).max()) for own in excess))
    moves = [own / scale for own in excess]

    def at(multiplier: float) -> tuple[float, float]:
        total, slope = [], 0.0
        for error, move in zip(errors, moves, strict=True):
            values = error + multiplier * move
            pick = int(np.argmin(values))
            total.append(float(values[pick]))
            slope += float(move[pick])
        return math.fsum(total), slope

    spread = sum(float(own.max() - own.min()) for own in errors) + 1e-300
    finest = min((float(np.abs(own[own != 0]).min()) for own in moves if (own != 0).any()), default=1.0)
    low, high = 0.0 if at_most else -2 * spread / finest, 2 * spread / finest
    best = at(0.0)[0]
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        value, slope = at(middle)
        best = max(best, value)
        low, high = (middle, high) if slope > 0 else (low, middle)
    return best
