"""The one function that holds an allocator's levels to the budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.allocation.budget import BITS, excess, held
from layerwise.contract.allocator_card import MOST
from layerwise.contract.target import Target

LAYERS = st.lists(st.tuples(st.floats(-3, 3), st.integers(1, 5_000_000)), min_size=1, max_size=40)


@given(LAYERS, st.floats(0.01, MOST), st.sampled_from(["row", "layer"]))
def test_shares_hold_the_budget_to_within_one_weight(layers, budget, pattern):
    levels, sizes = zip(*layers, strict=True)
    target = Target(budget, pattern)
    found = held(levels, sizes, target)
    assert abs(excess(found, sizes, target)) <= 1.0
    assert all(0 <= level <= MOST for level in found)
    alike = {level: own for level, own in zip(levels, found, strict=True)}
    assert [alike[level] for level in levels] == found


@given(
    LAYERS, st.sampled_from([Target(pattern="2:4"), Target(pattern="3:8"), Target(bits=3), Target(bits=4, group=64)])
)
def test_whole_levels_are_as_near_the_budget_as_one_shift_brings_them(layers, target):
    proposed, sizes = zip(*layers, strict=True)
    found = held(proposed, sizes, target)
    unit = target.n_of_m[1] if target.n_of_m else 1
    least, most = (0, unit - 1) if target.n_of_m else BITS
    counts = [level * unit for level in found]
    assert all(least <= count <= most and abs(count - round(count)) < 1e-9 for count in counts)
    reached = abs(excess(found, sizes, target))
    for shift in np.linspace(-12, 12, 97):
        other = np.clip(np.floor(np.array(proposed) * unit + shift + 0.5), least, most) / unit
        assert reached <= abs(excess(other.tolist(), sizes, target)) + 1e-6 * sum(sizes)


@pytest.mark.parametrize("target", [Target(0.6), Target(pattern="2:4"), Target(bits=4)])
def test_levels_that_hold_the_budget_are_left_as_they_are(target):
    step = 0.25 if target.budget != "bits" else 1.0
    levels = [target.level - step, target.level + step, target.level]
    assert held(levels, [100, 100, 7], target) == levels


@pytest.mark.parametrize("levels", [[0.5], [0.5, float("nan")], [0.5, float("inf")], [0.5, 0.5, 0.5]])
def test_levels_are_one_finite_number_for_each_layer(levels):
    with pytest.raises(ValueError, match="levels must be 2 finite numbers"):
        held(levels, [4, 4], Target(0.5))


def test_a_budget_that_no_levels_hold_is_refused():
    with pytest.raises(ValueError, match="a budget must be at most 0.99. Got 0.995 instead"):
        held([0.995], [1000], Target(0.995))
