"""The promise of every allocator that is found in the folder, and the numbers of the released codes."""

import contextlib
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerwise.allocation.budget import excess, held
from layerwise.checks import allocator_cases, allocator_promises, battery
from layerwise.checks import settings as check_settings
from layerwise.checks.allocator_cases import MadeTrials, Model
from layerwise.checks.case import NothingToCheck
from layerwise.contract.allocator import DenseLayer, Part
from layerwise.contract.allocator_card import MOST
from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.gram import Gram
from layerwise.contract.target import Target
from layerwise.storage.target_bits import bits_of
from tests.support.fuzz_configs import EVERY_CHECK
from tests.support.paths import ROOT
from tests.support.typing_helpers import some

CATALOGUE = Catalogue(kind=ALLOCATOR, methods=Catalogue())
OFFICIAL = json.loads((ROOT / "tests/data/official-allocation.json").read_text("utf-8"))
TARGETS = [target for kind in allocator_cases.TARGETS.values() for target in kind]
CASES = [
    pytest.param(case, id=f"{name} {case.target.label}")
    for name in CATALOGUE
    for case in allocator_cases.cases_of(CATALOGUE, name, [{}], TARGETS)
]

VARIANTS = [
    pytest.param(case, id=f"{case.label} {case.target.label}")
    for name in CATALOGUE
    for case in allocator_cases.cases_of(CATALOGUE, name, check_settings.parameter_sets(CATALOGUE[name])[1:], TARGETS)
]


def allocator(name, **params):
    return CATALOGUE.allocator(name, CATALOGUE.complete(name, params, "here"))


def own(name: str, **params: Any) -> Any:
    """The same with what its class has besides."""
    return allocator(name, **params)


@st.composite
def models(draw):
    """Of one block, of unequal blocks, of layers of one row."""
    shape = st.tuples(st.integers(1, 24), st.integers(2, 24))
    blocks = draw(st.lists(st.lists(shape, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4))
    kind = draw(st.sampled_from(["ordinary", "ordinary", "constant", "dead", "tiny"]))
    return Model("drawn", draw(st.integers(0, 2**32 - 1)), tuple(blocks), kind)


def layers_of(block, rng):
    return Model("made", 0, (tuple(block),)).layers(0, rng)


@pytest.mark.parametrize("case", CASES)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(model=models())
def test_levels_hold_the_budget(case, model):
    allocator_promises.budget(case, model)
    allocator_promises.twice(case, model)
    if case.entry.name in ("uniform", "knapsack", "evopress") and not case.target.paired:
        parts = case.parts(model)
        sizes = [part.size for part in parts]
        levels = held(case.proposal(parts).levels, sizes, case.target)
        assert abs(excess(levels, sizes, case.target)) <= 1


@pytest.mark.parametrize("check", ["1 measure", "2 candidates", "5 equal layers", "6 one layer"])
@pytest.mark.parametrize("case", CASES)
def test_a_shipped_allocator_keeps_the_promise(case, check):
    one = allocator_promises.CHECKS[check]
    for name in one.names[:7]:
        with contextlib.suppress(NothingToCheck):
            one.on(case, name)


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_of_shipped_allocators_keep_the_promise(case):
    """Those that `layerwise check-method` tries."""
    for name in ("3 budget", "5 equal layers", "6 one layer"):
        one = allocator_promises.CHECKS[name]
        for model in one.names[:7]:
            with contextlib.suppress(NothingToCheck):
                one.on(case, model)


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


@pytest.mark.parametrize(
    ("target", "params", "got", "width"),
    [
        (Target(0.95), {}, "1.03", "spread"),
        (Target(pattern="1:4"), {"counts": 4}, "1.25", "counts"),
        (Target(pattern="3:4"), {"counts": 4}, "-0.25", "counts"),
    ],
)
def test_levels_as_released_that_no_layer_can_have_are_one_sentence(target, params, got, width):
    parts = [Part("a", 0, 8, 8, 1.0), Part("b", 1, 8, 8, 2.0)]
    said = f"must be below 1 and at least 0. Got {got} instead; a smaller {width} brings"
    with pytest.raises(ValueError, match=re.escape(said)):
        allocator("owl", official=True, **params).allocate(parts, target)
    narrow = allocator("owl", official=True, **{width: 0.01}).allocate(parts, target)
    assert narrow.levels == pytest.approx([target.level] * 2, abs=0.011)


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


def test_levels_of_alphapruning_are_clipped_and_the_other_layers_take_the_rest():
    """How far the held levels are from the released ones, which exceed 1 at 70%; docs/allocation.md has the numbers."""
    sizes = OFFICIAL["sizes"] * (len(OFFICIAL["alphas"]) // len(OFFICIAL["sizes"]))
    apart = {}
    for case in OFFICIAL["alphapruning"]:
        target, released = Target(case["sparsity"]), case["levels"]
        levels = held(released, sizes, target)
        assert abs(excess(levels, sizes, target)) <= 1 and max(levels) <= MOST
        more = [own - level for own, level in zip(levels, released, strict=True)]
        apart[case["sparsity"], case["mapping"]] = (round(max(released), 3), round(-min(more), 3), round(max(more), 3))
        kept = [gain for gain, level in zip(more, levels, strict=True) if level < MOST]
        assert max(kept) - min(kept) < 1e-12  # the others move together
    assert apart.pop((0.7, "block")) == (1.042, 0.052, 0.013)
    assert apart.pop((0.7, "layer")) == (1.146, 0.156, 0.003)
    assert {(less, more) for _, less, more in apart.values()} == {(0, 0)}


@pytest.mark.parametrize(
    ("name", "params", "alike"),
    [
        ("owl", {}, True),
        ("alphapruning", {}, True),
        ("alphapruning", {"mapping": "layer"}, False),
        ("pq_index", {}, False),
        ("knapsack", {"levels": [0.4, 0.6]}, False),
    ],
)
def test_one_block_gets_the_budget_only_where_a_block_has_one_level(name, params, alike):
    """As docs/allocation.md says; OWL measures a share of the block, the others a number of each layer."""
    measured = (2.0, 2.0) if name == "owl" else (0.3, 0.6)
    errors: list[Any] = [{0.4: (1, 1), 0.5: (2, 1), 0.6: (3, 1)}, {0.4: (1, 1), 0.5: (4, 1), 0.6: (9, 1)}]
    parts = [Part(str(i), 0, 4, 4, measured[i], errors[i]) for i in range(2)]
    levels = held(allocator(name, **params).allocate(parts, Target(0.5)).levels, [16, 16], Target(0.5))
    assert (levels == pytest.approx([0.5, 0.5])) == alike and sum(levels) == pytest.approx(1.0)


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
    errors: Any = {0.4: (1.0, 0.1), 0.5: (2.0, 0.2), 0.6: (3.5, 0.4)}
    parts = [Part(f"{i}.{name}", i, 4, 4, None, errors) for i in range(2) for name in ("up", "down")]
    proposal = found.allocate(parts, target)
    assert proposal.levels == (0.4, 0.6, 0.4, 0.6)
    assert proposal.error == 2 * (10 * 1.0 + 3.5) and proposal.uniform_error == 2 * (10 * 2.0 + 2.0)
    assert proposal.bound is not None and proposal.bound <= some(proposal.error)


@pytest.mark.parametrize("lost", [0.6, 0.5])
def test_an_option_of_infinite_divergence_is_left_out_but_not_the_budget(lost, capsys):
    target = Target(0.5)
    found = own("knapsack", levels=[0.3, 0.4, 0.6, 0.7], errors="divergence", divergences="levels")
    parts = with_errors(found, target, "ab", lambda level, place: level)

    class Overflowing(MadeTrials):
        def divergence(self, levels, windows):
            return float("inf") if levels[0] == lost else super().divergence(levels, windows)

    if lost == 0.5:
        with pytest.raises(ValueError, match="divergence of a at the budget must be finite"):
            found.search(parts, target, Overflowing(parts))
        return
    whole = found.search(parts, target, MadeTrials(parts))
    assert whole.levels == (0.6, 0.4) and capsys.readouterr().err == ""
    assert found.search(parts, target, Overflowing(parts)).levels == (0.7, 0.3)
    assert capsys.readouterr().err == "a does not get 60% row: infinite divergence\n"


def test_weights_of_no_layer_are_refused():
    parts: Any = [Part(name, 0, 4, 4, None, {0.4: (1.0, 0.1), 0.5: (2.0, 0.2), 0.6: (3.5, 0.4)}) for name in "ab"]
    weights = {"a": 2.0, "*.nothing": 2.0}
    with pytest.raises(ValueError, match=r"weights must match names of layers such as a\. Got '\*\.nothing' instead"):
        allocator("knapsack", levels=[0.4, 0.6], weights=weights).allocate(parts, Target(0.5))


def test_neuroal_takes_the_width_whose_activations_stay_most_alike():
    parts = [Part("x", block, 8, 8) for block in range(3)]
    found = own("neuroal", widths=[0.02, 0.1, 0.2], windows=3)
    trials = MadeTrials(parts)
    proposal = found.search(parts, Target(0.6), trials)
    # Early losses are in all later activations: the steepest line keeps the first block most.
    assert proposal.levels == pytest.approx((0.4, 0.6, 0.8))
    assert [len(set(levels)) for levels, _ in trials.asked] == [1, 3, 3, 3]  # dense, then each width
    assert {windows for _, windows in trials.asked} == {3}
    assert all(some(score) > 0 for score in proposal.scores[1:])


@pytest.mark.parametrize(("budget", "tried"), [(0.79, 15), (0.8, 14)])
def test_neuroal_tries_the_widths_of_the_paper(budget, tried):
    parts = [Part("x", block, 8, 8) for block in range(2)]
    trials = MadeTrials(parts)
    own("neuroal").search(parts, Target(budget), trials)
    assert len(trials.asked) == tried  # the dense model once


def test_evopress_lowers_the_divergence_by_exchanges_that_hold_the_budget():
    parts = [Part("x", block, 8, 8 * (1 + block % 2)) for block in range(4)]
    found, target = own("evopress", generations=30, offspring=6, survivors=2), Target(0.6)
    trials = MadeTrials(parts)
    proposal = found.search(parts, target, trials)
    uniform = trials.divergence([0.6] * 4, 1)
    reached = trials.divergence(proposal.levels, 1)
    assert proposal.scores == pytest.approx([reached] * 4) and reached < 0.9 * uniform
    sizes = [part.size for part in parts]
    for levels, windows in trials.asked:
        shares = [level for level in levels if isinstance(level, float)]
        assert len(shares) == len(parts) and abs(excess(shares, sizes, target)) < 1e-6
        assert windows in (1, found.screen, found.windows)
        assert all(0 <= share <= MOST for share in shares)
    assert found.search(parts, target, MadeTrials(parts)) == proposal
    other = MadeTrials(parts, seed=1)
    found.search(parts, target, other)
    assert other.asked != trials.asked[: len(other.asked)]  # other draws


def test_evopress_says_that_no_exchange_is_possible(capsys):
    parts = [Part("x", 0, 8, 8), Part("x", 1, 8, 16)]
    found = own("evopress", generations=2, offspring=2)
    assert found.search(parts, Target(bits=4), MadeTrials(parts)).levels == (4.0, 4.0)
    assert capsys.readouterr().err == "The levels of 4b stay equal: no two layers have the same size\n"
    found.search(parts, Target(0.5), MadeTrials(parts))
    assert capsys.readouterr().err == ""


def test_alphapruning_names_a_layer_that_no_power_law_fits(capsys):
    layers = [DenseLayer("plain", torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))]
    plain, none = allocator("alphapruning").measure(iter([*layers, DenseLayer("zeros", torch.zeros(16, 16))]))
    assert plain > 1 and none == 0
    assert capsys.readouterr().err == "zeros has the exponent 0: no power law fits its singular values\n"


def test_evopress_exchanges_whole_numbers_between_layers_of_one_size():
    parts = [Part("x", 0, 8, 8), Part("x", 1, 8, 8), Part("x", 2, 8, 16)]
    for target in (Target(bits=4), Target(pattern="2:4")):
        trials = MadeTrials(parts)
        levels = own("evopress", generations=5, offspring=4).search(parts, target, trials).levels
        assert levels[2] == target.level and sum(levels[:2]) == 2 * target.level
        assert len({tuple(asked) for asked, _ in trials.asked}) > 1


def with_errors(found, target, names, curve):
    return [
        Part(name, place, 4, 4, None, {option: (curve(option, place),) * 2 for option in found.candidates(target)[1]})
        for place, name in enumerate(names)
    ]


def test_the_knapsack_weights_errors_by_what_a_layer_alone_does_to_the_loss():
    target = Target(0.5)
    found = own("knapsack", levels=[0.4, 0.6], errors="divergence", windows=3)
    parts = with_errors(found, target, "ab", lambda level, place: level * (3.0 if place == 0 else 1.0))
    trials = MadeTrials(parts)
    proposal = found.search(parts, target, trials)
    # By the errors the first layer should keep more; by divergence (1 to 2.1 of strength) the second.
    assert own("knapsack", levels=[0.4, 0.6]).allocate(parts, target).levels == (0.4, 0.6)
    assert proposal.levels == (0.6, 0.4)
    assert trials.asked == [([0.5, None], 3), ([None, 0.5], 3)]
    alone = [strength * 0.25 for strength in trials.strengths]
    assert proposal.uniform_error == pytest.approx(sum(alone))
    assert proposal.scores == pytest.approx((alone[0] * 0.6 / 0.5, alone[1] * 0.4 / 0.5))


def test_the_knapsack_takes_divergences_of_every_level():
    target = Target(0.5)
    found = own("knapsack", levels=[0.4, 0.6], errors="divergence", divergences="levels")
    parts = with_errors(found, target, "ab", lambda level, place: level)
    trials = MadeTrials(parts)
    proposal = found.search(parts, target, trials)
    assert len(trials.asked) == 6
    assert proposal.scores == pytest.approx((trials.strengths[0] * 0.36, trials.strengths[1] * 0.16))


def test_a_layer_that_the_budget_does_not_harm_is_tried_at_every_level():
    """Half of its inputs may be dead: its error is zero at the budget and not beyond it."""
    target = Target(0.5)
    found = own("knapsack", levels=[0.4, 0.6], errors="divergence")
    parts = with_errors(found, target, "ab", lambda level, place: max(0.0, level - 0.5) if place == 0 else level)
    proposal = found.search(parts, target, MadeTrials(parts))
    assert proposal.levels == (0.5, 0.5)  # of strengths 1 and 2: .36 + .32 and .16 + .72 are more than .25 + .5
    assert proposal.error == pytest.approx(0.25 * sum(MadeTrials(parts).strengths))


@pytest.mark.parametrize("broken", ["one", "all"])
def test_activations_that_are_not_finite_choose_no_width(broken):
    target, found = Target(0.5), own("neuroal")
    parts = [Part(f"layer{block}", block, 8, 16) for block in range(4)]

    class Overflowing(MadeTrials):
        def profiles(self, levels, windows):
            profiles = super().profiles(levels, windows)
            lost = len(self.asked) == 2 or broken == "all"  # the first width's
            return [np.full_like(own, np.inf) for own in profiles] if lost and levels[0] is not None else profiles

    if broken == "all":
        with pytest.raises(ValueError, match="no width gives finite activations"):
            found.search(parts, target, Overflowing(parts))
    else:
        assert all(np.isfinite(some(own)) for own in found.search(parts, target, Overflowing(parts)).scores)


def test_the_longest_pattern_gives_a_layer_its_weight():
    found = own("knapsack", weights={"*.down": 5.0, "*": 2.0, "a.*": 3.0})
    assert [found.factor(name) for name in ("b.down", "b.up", "a.up", "a.down")] == [5.0, 2.0, 3.0, 5.0]


JOINT_PAIRS = [{"sparsity": 0.5, "bits": 8}, {"sparsity": 0.75, "bits": 4}, {"bits": 3}, {"sparsity": 0.25, "bits": 2}]
SUM_PAIRS = [{"sparsity": 0.75}, {"sparsity": 0.25, "rank": 0.6}, {"sparsity": 0.7, "rank": 0.2}]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("target", "given", "fourth"),
    [
        (Target(0.5, bits=4, group=4), JOINT_PAIRS, Target(bits=3, group=4)),
        (Target(0.5, rank=0.4), SUM_PAIRS, Target(0.7, rank=0.2)),
        (Target(rank=0.5), None, Target(rank=0.4)),
    ],
    ids=["joint", "sum", "factors"],
)
def test_pairs_reach_brute_force_within_the_bits_of_the_budget(seed, target, given, fourth):
    rng = np.random.default_rng(seed)
    found = own("knapsack", pairs=given)
    shapes = [(4, 8), (6, 8), (4, 12)]
    options = found.candidates(target)[1]
    assert len(options) == len(given or range(6)) + 1 and options[0] == target and options[3] == fourth
    errors: Any = [{option: (float(rng.exponential()),) * 2 for option in options} for _ in shapes]
    parts = [Part("x", i, *shape, None, own) for i, (shape, own) in enumerate(zip(shapes, errors, strict=True))]
    proposal = found.allocate(parts, target)
    costs = [{option: bits_of(option, *shape) for option in options} for shape in shapes]
    wanted = sum(cost[target] for cost in costs)
    least = min(
        sum(own[option][0] for own, option in zip(errors, picks, strict=True))
        for picks in itertools.product(options, repeat=3)
        if sum(cost[option] for cost, option in zip(costs, picks, strict=True)) <= wanted
    )
    assert proposal.error == pytest.approx(least)
    assert some(proposal.bound) <= least + 1e-12 <= some(proposal.uniform_error) + 2e-12


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


@settings(deadline=None, max_examples=10, suppress_health_check=EVERY_CHECK)
@given(model=models(), slope=st.floats(-5, 5))
def test_a_dropped_in_allocator_keeps_the_promises_of_shipped_ones(tmp_path, model, slope):
    (tmp_path / "depth.py").write_text(DROPPED.replace('["row"]', '["row", "layer", "n:m", "bits"]'), "utf-8")
    catalogue = Catalogue([tmp_path], ALLOCATOR, Catalogue())
    cases = list(allocator_cases.cases_of(catalogue, "depth", [{"slope": slope}], TARGETS))
    assert len(cases) == 9
    for case in cases:
        allocator_promises.budget(case, model)
        allocator_promises.twice(case, model)


def test_a_file_of_an_allocator_is_checked_by_its_own_promises(tmp_path):
    path = tmp_path / "depth.py"
    path.write_text(DROPPED, "utf-8")
    report = battery.check_file(path)
    text = report.render()
    assert report.ok and report.word == "allocator" and "Spread: 50% row, 70% row, 95% row." in text
    assert "depth keeps its contract" in text
    assert {row.layer for row in report.rows} > {"dead inputs", "constant weights", "unequal blocks", "random 9"}
    assert {row.target for row in battery.check_file(path, quick=True).rows} == {"50% row"}


LEVELS = "tuple(self.slope * part.block for part in parts)"


@pytest.mark.parametrize(
    ("was", "now", "promise", "came"),
    [
        (LEVELS, "(0.5,)", "3 budget", "levels must be"),
        (LEVELS, "(float('nan'),) * len(parts)", "3 budget", "finite numbers"),
        (LEVELS, "tuple(part.block / max(p.block for p in parts) for part in parts)", "3 budget", "ZeroDivisionError"),
        ("(None,) * len(parts)", "()", "3 budget", "scores must be"),
        (LEVELS, "tuple(__import__('random').random() for part in parts)", "4 deterministic", "different ones"),
        (LEVELS, "tuple(0.01 * place for place in range(len(parts)))", "5 equal layers", " and "),
        (LEVELS, "tuple(0.1 if len(parts) == 1 else 0.5 for part in parts), 1", "3 budget", "TypeError"),
        (
            "    def allocate",
            "    def measure(self, layers):\n        return [layer.weight.zero_().sum() for layer in layers]\n\n"
            "    def allocate",
            "1 measure",
            "different ones",
        ),
        ("    def allocate", "    def measure(self, layers):\n        return []\n\n    def allocate", "1 measure", "0"),
    ],
)
def test_a_broken_promise_of_an_allocator_is_found_and_can_be_repeated(tmp_path, was, now, promise, came):
    path = tmp_path / "depth.py"
    assert was in DROPPED
    path.write_text(DROPPED.replace(was, now, 1), "utf-8")
    report = battery.check_file(path, quick=True)
    found = {row.promise: row for row in report.first()}
    assert not report.ok and came in f"{found[promise].expected} {found[promise].came}"
    row = found[promise]
    case = battery.case_at(path, row.target)
    assert isinstance(case, allocator_cases.AllocatorCase)
    with pytest.raises(Exception):  # noqa: B017 (whatever the file raises)
        allocator_promises.CHECKS[promise].on(case, row.layer)
    assert f"allocator_promises.CHECKS[{promise!r}].on(case, {row.layer!r})" in report.render()
