"""The promise of every allocator that is found in the folder, and the numbers of the released codes."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerwise.allocation.budget import BITS, MOST, excess, held
from layerwise.contract.allocator import DenseLayer, Part
from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.gram import Gram
from layerwise.contract.target import Target
from tests.support.paths import ROOT
from tests.support.typing_helpers import some

CATALOGUE = Catalogue(kind=ALLOCATOR, methods=Catalogue())
OFFICIAL = json.loads((ROOT / "tests/data/official-allocation.json").read_text("utf-8"))
BUDGETS = {
    "row": [Target(0.5), Target(0.7), Target(0.95)],
    "layer": [Target(0.6, "layer")],
    "n:m": [Target(pattern="2:4"), Target(pattern="3:8"), Target(pattern="1:3")],
    "bits": [Target(bits=3), Target(bits=4, group=32)],
}
CASES = [
    pytest.param(name, target, id=f"{name} {target.label}")
    for name, entry in CATALOGUE.items()
    for kind in entry.card["budgets"]
    for target in BUDGETS[kind]
]


def allocator(name, **params):
    return CATALOGUE.allocator(name, CATALOGUE.complete(name, params, "here"))


def own(name: str, **params: Any) -> Any:
    """The same with what its class has besides."""
    return allocator(name, **params)


@st.composite
def models(draw):
    """(seed, blocks of layers' shapes): of one block, of unequal blocks, of layers of one row."""
    shape = st.tuples(st.integers(1, 24), st.integers(2, 24))
    return draw(st.integers(0, 2**32 - 1)), draw(
        st.lists(st.lists(shape, min_size=1, max_size=3), min_size=1, max_size=4)
    )


def layers_of(block, rng, scale=1.0):
    """Layers with heavy tails now and then, and dead inputs."""
    for place, (out, inputs) in enumerate(block):
        weight = torch.from_numpy(rng.standard_t(2.5, (out, inputs)).astype(np.float32)) * scale
        diagonal = torch.from_numpy(rng.exponential(size=inputs).astype(np.float32)) * (rng.random() > 0.1)
        yield DenseLayer(f"layer.{place}", weight, Gram(torch.diag(diagonal), 100))


def parts_of(found, blocks, seed, target, errors):
    rng = np.random.default_rng(seed)
    parts = []
    for index, block in enumerate(blocks):
        measured = found.measure(layers_of(block, rng))
        for (out, inputs), value in zip(block, measured, strict=True):
            own = None
            if errors:
                _, levels = found.candidates(target)
                rising = np.sort(rng.exponential(size=len(levels)))
                own = {level: (float(e), float(e)) for level, e in zip(levels, rising, strict=True)}
            parts.append(Part(f"model.{index}.{len(parts)}", index, out, inputs, value, own))
    return parts


@pytest.mark.parametrize(("name", "target"), CASES)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(model=models())
def test_levels_hold_the_budget(name, target, model):
    seed, blocks = model
    found = allocator(name)
    parts = parts_of(found, blocks, seed, target, "errors" in CATALOGUE[name].card["needs"])
    sizes = [part.size for part in parts]
    proposal = found.allocate(parts, target)
    assert len(proposal.levels) == len(proposal.scores) == len(parts)
    levels = held(proposal.levels, sizes, target)
    missed = abs(excess(levels, sizes, target))
    if target.budget in ("row", "layer"):
        assert missed <= 1 and all(0 <= level <= MOST for level in levels)
    elif target.n_of_m:
        assert all(
            0 <= level < 1 and (level * target.n_of_m[1]) == pytest.approx(round(level * target.n_of_m[1]))
            for level in levels
        )
    else:
        assert all(level in range(BITS[0], BITS[1] + 1) for level in levels)
    if name in ("uniform", "knapsack"):
        assert missed <= 1
    # Pure: the same once more.
    assert found.allocate(parts, target) == proposal


@pytest.mark.parametrize(("name", "target"), CASES)
def test_equal_layers_get_equal_levels(name, target):
    found = allocator(name)
    block = [(12, 16), (8, 12)]
    blocks = [layers_of(block, np.random.default_rng(seed)) for seed in (0, 1, 0)]
    parts = []
    for index, layers in enumerate(blocks):
        for (out, inputs), value in zip(block, found.measure(layers), strict=True):
            errors: dict[float, tuple[float, float]] | None = None
            if "errors" in CATALOGUE[name].card["needs"]:
                measured = {level: level**2 / (1 + index % 2) for level in found.candidates(target)[1]}
                errors = {level: (error, error) for level, error in measured.items()}
            parts.append(Part("x", index, out, inputs, value, errors))
    levels = held(found.allocate(parts, target).levels, [part.size for part in parts], target)
    if "splits_equals" not in CATALOGUE[name].card:
        assert levels[:2] == levels[4:]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_a_model_of_one_block_of_one_layer_gets_the_budget(name, target):
    found = allocator(name)
    (value,) = found.measure(layers_of([(16, 24)], np.random.default_rng(3)))
    errors = None
    if "errors" in CATALOGUE[name].card["needs"]:
        errors = {level: (level, level) for level in found.candidates(target)[1]}
    proposal = found.allocate([Part("x", 0, 16, 24, value, errors)], target)
    assert held(proposal.levels, [16 * 24], target) == [pytest.approx(target.level)]


def test_owl_has_the_levels_of_the_released_code():
    names, sizes = OFFICIAL["names"], OFFICIAL["sizes"]
    for case in OFFICIAL["owl"]:
        found = allocator("owl", threshold=case["threshold"], spread=case["spread"])
        target = Target(case["sparsity"])
        parts = [
            Part(name, block, size, 1, share)
            for block, share in enumerate(case["shares"])
            for name, size in zip(names, sizes, strict=True)
        ]
        levels = held(found.allocate(parts, target).levels, [part.size for part in parts], target)
        assert levels[:: len(names)] == pytest.approx(case["levels"], abs=1e-6)


def test_owl_counts_outliers_of_the_whole_block():
    """Scores laid end to end, with one mean for all layers: |W| sqrt(G_jj), G up to a factor."""
    first = torch.ones(2, 4)
    first[0, 0] = 100.0
    gram = Gram(torch.eye(4), 10)
    layers = [DenseLayer("a", first, gram), DenseLayer("b", torch.ones(3, 4) * 7, gram)]
    # Sum 100 + 7 + 84 = 191 over 20 scores: mean 9.55, three times which 100 alone exceeds.
    assert allocator("owl", threshold=3).measure(iter(layers)) == [5.0, 5.0]


def test_owl_as_released_misses_a_budget_of_unequal_blocks_and_says_so():
    parts = [Part("a", 0, 10, 10, 1.0), Part("b", 1, 10, 30, 2.0)]
    target, sizes = Target(0.05), [100, 300]
    official = allocator("owl", official=True).allocate(parts, target)
    assert official.official and official.levels == (pytest.approx(0.13), 0.01)
    usual = held(allocator("owl").allocate(parts, target).levels, sizes, target)
    assert abs(excess(usual, sizes, target)) <= 1 and usual[0] > usual[1] >= 0


def test_owl_moves_whole_counts_of_a_pattern():
    """5:8 of the paper, n pruned: the block with most outliers keeps more."""
    parts = [Part("x", block, 8, 8, share) for block, share in enumerate([9.0, 5.0, 1.0])]
    target = Target(pattern="3:8")
    levels = held(allocator("owl").allocate(parts, target).levels, [64] * 3, target)
    assert [8 * level for level in levels] == [4, 5, 6]


def test_alphapruning_has_the_levels_of_the_released_code():
    sizes = OFFICIAL["sizes"]
    for case in OFFICIAL["alphapruning"]:
        found = allocator("alphapruning", mapping=case["mapping"])
        parts = [
            Part("x", place // len(sizes), sizes[place % len(sizes)], 1, alpha)
            for place, alpha in enumerate(OFFICIAL["alphas"])
        ]
        levels = found.allocate(parts, Target(case["sparsity"])).levels
        assert levels == pytest.approx(case["levels"], abs=1e-4)


def test_alphapruning_fits_the_exponents_of_the_released_code():
    for values, alpha in zip(OFFICIAL["eigenvalues"], OFFICIAL["alphas"], strict=False):
        found = own("alphapruning").exponent(np.array(values, dtype=np.float32))
        assert found == pytest.approx(alpha, rel=1e-4)


def test_alphapruning_finds_the_exponent_of_a_power_law():
    """Also in the intended window, where the released code's lower end never binds."""
    values = (1 - (np.arange(4000) + 0.5) / 4000) ** (-1 / 2.0)  # density x^-3
    for window in ("official", "intended"):
        found = own("alphapruning", window=window).exponent(values.astype(np.float32))
        assert found == pytest.approx(3, rel=0.05)


def test_the_pq_index_has_its_properties():
    index = own("pq_index").index
    rng = np.random.default_rng(0)
    entries = rng.exponential(size=100)
    assert index(np.full(50, 0.3)) == pytest.approx(0, abs=1e-12)
    one = np.zeros(100)
    one[7] = 5.0
    assert index(one) == pytest.approx(1 - 1 / 100)  # n^(1/q - 1/p) of one entry
    assert index(entries) == pytest.approx(index(1e-20 * entries))  # of no scale
    assert index(np.concatenate([entries, entries])) == pytest.approx(index(entries))  # cloned
    # The bound on what must be kept holds: that share of the largest entries has all but eta of the norm.
    share, ordered = 1 - index(entries), np.sort(entries)[::-1]
    kept = int(np.ceil(share * 100))
    lost = ordered[kept:].sum() / ordered[:kept].sum()
    assert (1 + lost) ** -2 * share <= kept / 100


def test_the_knapsack_reaches_brute_force_and_no_more_than_equal_levels():
    found = allocator("knapsack", levels=[0.4, 0.6], errors="absolute", weights={"*.up": 10})
    target = Target(0.5)
    errors = {0.4: (1.0, 0.1), 0.5: (2.0, 0.2), 0.6: (3.5, 0.4)}
    parts = [Part(f"{i}.{name}", i, 4, 4, None, errors) for i in range(2) for name in ("up", "down")]
    proposal = found.allocate(parts, target)
    assert proposal.levels == (0.4, 0.6, 0.4, 0.6)
    assert proposal.error == 2 * (10 * 1.0 + 3.5) and proposal.uniform_error == 2 * (10 * 2.0 + 2.0)
    assert proposal.bound is not None and proposal.bound <= some(proposal.error)


DROPPED = """
from dataclasses import dataclass
from layerwise.contract.allocator import Allocator, Proposal

CARD = {"title": "depth", "needs": [], "budgets": ["row"], "parameters": {"slope": {"type": "number"}}}


@dataclass(frozen=True)
class Depth(Allocator):
    slope: float = 9.0

    def allocate(self, parts, target):
        return Proposal(tuple(self.slope * part.block for part in parts), (None,) * len(parts))
"""


def test_a_dropped_in_allocator_is_held_to_the_budget(tmp_path):
    (tmp_path / "depth.py").write_text(DROPPED, "utf-8")
    catalogue = Catalogue([tmp_path], ALLOCATOR, Catalogue())
    found = catalogue.allocator("depth", catalogue.complete("depth", {}, "here"))
    parts = [Part("x", block, 10, 7) for block in range(9)]
    target = Target(0.6)
    proposed = found.allocate(parts, target).levels
    assert max(proposed) == 72
    levels = held(proposed, [70] * 9, target)
    assert abs(excess(levels, [70] * 9, target)) <= 1 and levels == sorted(levels)
    assert (min(levels), max(levels)) == (0, MOST)
