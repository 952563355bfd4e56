"""The exact choice of levels, and its bound."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.allocation.knapsack import DOWN, NEAREST, UP, choose

OPTIONS = st.lists(st.tuples(st.floats(0, 10), st.integers(-7, 7)), max_size=4)


@st.composite
def tables(draw):
    """Errors and excesses of a few layers, each with an option of excess zero."""
    layers = [[(draw(st.floats(0, 10)), 0), *draw(OPTIONS)] for _ in range(draw(st.integers(1, 5)))]
    layers = [draw(st.permutations(layer)) for layer in layers]
    return [[error for error, _ in layer] for layer in layers], [[move for _, move in layer] for layer in layers]


@given(tables())
def test_the_choice_is_that_of_brute_force_and_the_bound_lies_below(table):
    errors, excess = table
    sums = [
        sum(own[pick] for own, pick in zip(errors, picks, strict=True))
        for picks in itertools.product(*(range(len(own)) for own in errors))
        if sum(own[pick] for own, pick in zip(excess, picks, strict=True)) == 0
    ]
    found = choose(errors, excess, 1000)
    assert found.error == pytest.approx(min(sums), abs=1e-12)
    assert found.unit == 1 and found.bound <= found.error
    assert sum(own[pick] for own, pick in zip(excess, found.picks, strict=True)) == 0


@given(tables())
def test_a_sum_at_most_zero_is_that_of_brute_force(table):
    errors, excess = table
    sums = [
        sum(own[pick] for own, pick in zip(errors, picks, strict=True))
        for picks in itertools.product(*(range(len(own)) for own in errors))
        if sum(own[pick] for own, pick in zip(excess, picks, strict=True)) <= 0
    ]
    found = choose(errors, excess, 1000, at_most=True)
    assert found.error == pytest.approx(min(sums), abs=1e-12)
    assert found.unit == 1 and found.bound <= found.error
    assert sum(own[pick] for own, pick in zip(excess, found.picks, strict=True)) <= 0


def test_coarse_sums_stay_at_most_zero():
    excess = [[-1000 * size, 0, 1, 999 * size] for size in range(1, 21)]  # one beyond each share is within a unit
    errors = [[3.0, 1.0, 0.5, 0.1]] * 20
    found = choose(errors, excess, 1000, at_most=True)
    assert found.unit > 1 and found.bound <= found.error < 20.0
    assert sum(own[pick] for own, pick in zip(excess, found.picks, strict=True)) <= 0


@given(
    st.lists(
        st.tuples(st.integers(10**5, 10**6), st.lists(st.floats(0, 1), min_size=5, max_size=5)), min_size=2, max_size=4
    )
)
def test_coarse_sums_of_bits_never_exceed_the_budget_and_are_the_best_of_their_unit(layers):
    sizes, errors = [size for size, _ in layers], [sorted(own, reverse=True) for _, own in layers]
    excess = [[size * step for step in (-2, -1, 0, 1, 2)] for size in sizes]
    found = choose(errors, excess, 1000, rounding=UP)
    unit = found.unit * math.gcd(*sizes)
    missed = sum(own[pick] for own, pick in zip(excess, found.picks, strict=True))
    assert -unit * len(sizes) < missed <= 0
    least = min(
        math.fsum(own[pick] for own, pick in zip(errors, picks, strict=True))
        for picks in itertools.product(range(5), repeat=len(sizes))
        if sum(-(-own[pick] // unit) for own, pick in zip(excess, picks, strict=True)) == 0
    )
    assert found.error == pytest.approx(least, abs=1e-12)
    mirrored = [[-own for own in moves] for moves in excess]
    down = choose(errors, mirrored, 1000, rounding=DOWN)
    assert down.error == pytest.approx(least, abs=1e-12)
    assert sum(own[pick] for own, pick in zip(mirrored, down.picks, strict=True)) >= 0


def test_sums_rounded_to_the_nearest_unit_exceed_the_budget_where_those_rounded_upwards_do_not():
    sizes = [1970881, 1007917, 1789545, 1082003]
    excess = [[size * step for step in (-2, -1, 0, 1, 2)] for size in sizes]
    picks = (0, 2, 3, 4)
    errors = [[0.0 if option == pick else 1.0 for option in range(5)] for pick in picks]
    sums = []
    for rounding in (NEAREST, UP):
        found = choose(errors, excess, 1000, rounding=rounding)
        assert found.unit > 1
        sums.append(sum(moves[pick] for moves, pick in zip(excess, found.picks, strict=True)))
    assert sums[0] == 11789 and sums[1] <= 0


def test_the_bound_of_convex_errors_is_met_where_whole_steps_meet_the_budget():
    errors = [[0.0, 1.0, 4.0], [0.0, 3.0, 12.0]]
    found = choose(errors, [[-1, 0, 1]] * 2, 1000)
    assert (found.picks, found.error, found.bound) == ((1, 1), 4.0, pytest.approx(4.0))


def test_coarse_sums_are_never_worse_than_equal_levels():
    sizes = [999_983, 500_009, 250_007, 125_003]  # primes: no sums of two are alike
    errors = [[0.1, 1.0, 3.0], [0.2, 1.0, 2.0], [0.5, 1.0, 9.0], [0.1, 1.0, 1.1]]
    excess = [[-100 * size, 0, 100 * size] for size in sizes]
    found = choose(errors, excess, 1000)
    assert found.unit > 1 and found.error <= 4.0
    missed = sum(own[pick] for own, pick in zip(excess, found.picks, strict=True))
    assert abs(missed) <= len(sizes) * found.unit * 100  # 100 divides all


@pytest.mark.parametrize(
    ("errors", "excess", "sentence"),
    [
        ([[1.0, float("nan")]], [[0, 1]], "errors must be finite"),
        ([[1.0, 2.0]], [[1, 2]], "must have an option that gives its share"),
    ],
)
def test_tables_of_no_use_are_refused(errors, excess, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose(errors, excess, 1000)
