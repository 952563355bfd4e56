"""Tests of differences: against scipy, brute force and published formulas, and how often they err on known effects."""

import math
from itertools import combinations, product
from typing import Any, cast

import numpy as np
import pytest
from scipy import stats

from layerwise.results import significance
from layerwise.results.comparisons import (
    ASYMMETRIC,
    ERRORS,
    LEAST,
    NO_DIFFERENCE,
    Observation,
    accuracy_measure,
    compare_allocations,
    compare_methods,
    layer_errors,
    window_measure,
)
from layerwise.results.significance import (
    ALPHA,
    bars,
    bootstrap_difference,
    bootstrap_interval,
    friedman,
    holm,
    median_interval,
    resampled_means,
    signed_rank,
)
from layerwise.storage.table_schema import from_rows

LAYERS = 28

# ------------------------------------------------------------------------------------------------------------ the tests


def every_sign(differences: np.ndarray) -> tuple[float, float]:
    """(p, effect) of the signed-rank test from all 2^n assignments of signs; no ties, no zeros."""
    ranks = np.abs(differences).argsort().argsort() + 1
    sums = np.array([np.dot(signs, ranks) for signs in product((-1, 1), repeat=len(ranks))])
    own = np.dot(np.sign(differences), ranks)
    return float((np.abs(sums) >= abs(own)).mean()), own / ranks.sum()


@pytest.mark.parametrize("seed", range(5))
def test_the_signed_rank_test_is_that_of_all_signs(seed):
    differences = np.random.default_rng(seed).normal(0.4, 1, 10)
    assert signed_rank(differences) == pytest.approx(every_sign(differences))


def test_the_signed_rank_test_is_scipys():
    rng = np.random.default_rng(0)
    first, second = rng.lognormal(size=(2, 60))
    found = signed_rank(first - second)
    wilcoxon = cast(Any, stats.wilcoxon)  # whose results have no types
    assert found.p == wilcoxon(first, second).pvalue
    more = wilcoxon(first, second, alternative="greater").statistic  # the sum of the positive ranks
    assert found.effect == pytest.approx(2 * more / (60 * 61 / 2) - 1)


def test_zeros_are_dropped_and_ties_share_their_rank():
    assert signed_rank([0.0, 0.0, 0.0]) == (1.0, 0.0)
    # |-1|, |1|, |2| have the ranks 1.5, 1.5 and 3.
    assert signed_rank([0, -1, 1, 2]).effect == pytest.approx((1.5 + 3 - 1.5) / 6)
    assert signed_rank(-np.arange(1, 8)).effect == -1


def test_holm_is_the_step_down_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]).tolist() == [] and holm([0.7, 0.9]).tolist() == [1.0, 1.0]
    rng = np.random.default_rng(1)
    for _ in range(50):
        p, adjusted = (values := rng.beta(0.3, 2, 6)), holm(values)
        for alpha in (0.01, 0.05, 0.2):
            rejected = set()
            for step, index in enumerate(np.argsort(p)):
                if p[index] >= alpha / (len(p) - step):
                    break
                rejected.add(int(index))
            assert rejected == {i for i, value in enumerate(adjusted) if value < alpha}


def test_friedmans_test_is_scipys():
    values = np.random.default_rng(2).normal(size=(4, 12))
    assert friedman(values) == stats.friedmanchisquare(*values).pvalue
    assert friedman(values[:2]) is None and friedman(np.ones((3, 5))) == 1.0


# -------------------------------------------------------------------------------------------------------- the intervals


def test_the_interval_of_a_median_leaves_out_at_most_its_share():
    for count in (6, 9, 28, 224):
        interval = median_interval(np.arange(count))
        assert interval
        left_out = int(interval[0])  # values below the lower end
        assert interval[1] == count - 1 - left_out
        tail = sum(math.comb(count, k) for k in range(left_out + 1)) / 2**count  # this many or fewer fall on one side
        more = tail + math.comb(count, left_out + 1) / 2**count
        assert tail <= ALPHA / 2 < more
    assert median_interval(range(5)) is None


def test_the_bootstrap_is_scipys():
    losses = np.random.default_rng(3).normal(3, 0.5, 40)
    found = bootstrap_interval(losses, np.exp)
    options = {"n_resamples": 20_000, "method": "percentile", "rng": np.random.default_rng(4)}
    wanted = stats.bootstrap((losses,), lambda x, axis: np.exp(x.mean(axis=axis)), **options).confidence_interval
    assert found == pytest.approx(tuple(wanted), rel=0.005)
    assert bootstrap_interval([2.5]) is None


def test_the_bootstrap_of_three_is_that_of_all_27_samples():
    values = np.array([0.0, 1.0, 5.0])
    every = np.array([np.mean(sample) for sample in product(values, repeat=3)])
    means = resampled_means(values[None])[:, 0]
    for value in np.unique(every):
        assert np.isclose(means, value).mean() == pytest.approx(np.isclose(every, value).mean(), abs=0.015)


def test_few_draws_at_once_draw_as_many(monkeypatch):
    values = np.random.default_rng(5).normal(size=(2, 30))
    whole = resampled_means(values)
    monkeypatch.setattr(significance, "DRAWS_AT_ONCE", 3 * 30)
    assert resampled_means(values) == pytest.approx(whole, abs=1e-12)  # up to the order of sums
    assert whole.shape == (significance.RESAMPLES, 2)


def test_a_paired_difference_is_much_surer_than_two_intervals():
    rng = np.random.default_rng(6)
    hard = rng.normal(3, 0.5, 64)  # windows differ far more than methods
    first, second = (hard + rng.normal(shift, 0.01, 64) for shift in (0.0, 0.02))
    (low, high), (other_low, other_high) = (bootstrap_interval(one, np.exp) or (0, 0) for one in (first, second))
    assert low < other_low < high < other_high  # they overlap
    found = bootstrap_difference(first, second, np.exp)
    assert found.value == pytest.approx(np.exp(first.mean()) - np.exp(second.mean()))
    assert found.low < found.value < found.high < 0 and found.p < 0.001
    turned = bootstrap_difference(second, first, np.exp)
    assert (turned.value, turned.low, turned.high, turned.p) == pytest.approx(
        (-found.value, -found.high, -found.low, found.p)
    )


def test_no_difference_at_all_has_p_one():
    losses = np.random.default_rng(7).normal(size=20)
    assert bootstrap_difference(losses, losses, np.exp) == (0.0, 0.0, 0.0, 1.0)


# ------------------------------------------------------------------------------------------------------ the whole table


def observed(label: str, seed: int, measure, values, comparison: str = "mask-only", target="60% row") -> Observation:
    columns = {"model": "m", "calibration": "c", "mode": "shared", "target": target, "sparsity": 0.6, "pattern": "row"}
    columns |= {"bits": None, "group": None, "symmetric": False, "allocation": "uniform"}
    columns |= {"label": label, "seed": seed, "comparison": comparison}
    return Observation(columns, {measure: dict(enumerate(values))})


def study(rng, factors: dict[str, float], seeds: int = 3, own: float = 0.15, noise: float = 0.05) -> list[Observation]:
    """Layers with errors of their own, times the method's factor, times what a layer has against a method (`own`, the
    same under all seeds) and the noise of a seed; standard deviations of logarithms."""
    layers = rng.normal(-3, 1, LAYERS)
    found = []
    for label, factor in factors.items():
        level = layers + math.log(factor) + rng.normal(0, own, LAYERS)
        for seed in range(seeds):
            found.append(observed(label, seed, ERRORS, np.exp(level + rng.normal(0, noise, LAYERS))))
    return found


def test_a_planted_effect_is_found_with_its_size():
    rows = compare_methods(study(np.random.default_rng(0), {"a": 1.0, "b": 0.8, "c": 0.79}))
    from_rows(rows, "comparisons", "the test")
    by_pair = {(row["label"], row["other"]): row for row in rows}
    assert list(by_pair) == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair in (("a", "b"), ("a", "c")):
        row = by_pair[pair]
        assert row["verdict"] == "worse" and row["effect"] < -0.8 and row["seeds_agree"] == row["seeds"] == 3
        assert row["low"] < row["median_ratio"] < row["high"] and row["low"] < 1 / 0.8 < row["high"]
        assert row["units"] == LAYERS and row["p_holm"] > row["p"] and row["friedman_p"] < 1e-4
    assert by_pair["b", "c"]["verdict"] == NO_DIFFERENCE


@pytest.mark.long
def test_methods_that_do_not_differ_are_seldom_separated():
    """The share of studies of four equal methods with any verdict is at most the level: Holm's promise. Seeds that
    count as units would break it, because what a layer has against a method is the same under every seed."""
    rng = np.random.default_rng(1)
    told, pooled, studies = 0, 0, 300
    for _ in range(studies):
        made = study(rng, dict.fromkeys("abcd", 1.0))
        told += any(row["verdict"] != NO_DIFFERENCE for row in compare_methods(made))
        logs: dict[str, list[float]] = {}
        for one in made:
            logs.setdefault(one.columns["label"], []).extend(np.log(list(one.values[ERRORS].values())))
        pairs = combinations(map(np.array, logs.values()), 2)
        pooled += bool((holm([signed_rank(first - second).p for first, second in pairs]) < ALPHA).any())
    # Twice the standard error of a share of 0.05 in 300 is 0.025.
    assert told / studies <= ALPHA + 0.025
    assert pooled / studies > 2 * ALPHA


@pytest.mark.parametrize("measure", [ERRORS, window_measure("perplexity", "wiki")], ids=["layers", "windows"])
def test_noise_of_the_draw_that_all_units_share_is_seldom_a_difference(measure):
    """A draw of the calibration shifts a method on all layers and windows at once: three that happen to agree are no
    evidence, which they do in one study of four."""
    rng = np.random.default_rng(8)
    told, agreed, studies = 0, 0, 200
    for _ in range(studies):
        level = rng.normal(3, 0.5, LAYERS)
        level = np.exp(level - 6) if measure is ERRORS else level
        made = []
        for label in "ab":
            for seed in range(3):
                noise = rng.normal(0, 0.02) + rng.normal(0, 0.01, LAYERS)
                made.append(
                    observed(label, seed, measure, level * np.exp(noise) if measure is ERRORS else level + noise)
                )
        (row,) = compare_methods(made)
        told += row["verdict"] != NO_DIFFERENCE
        agreed += row["p_holm"] < ALPHA and row["seeds_agree"] == 3
    assert told / studies <= ALPHA + 0.03 and agreed / studies > 0.15


def test_a_cell_that_is_lost_takes_its_seed_from_its_own_pairs_alone():
    rng = np.random.default_rng(9)
    made = study(rng, {"a": 1.0, "b": 0.8, "c": 0.6, "d": 0.5})
    made = [
        one for one in made if one.columns["label"] in "ab" or one.columns["seed"] == "cd".index(one.columns["label"])
    ]
    seeds = {(row["label"], row["other"]): row["seeds"] for row in compare_methods(made)}
    assert seeds == {("a", "b"): 3, **{(x, y): 1 for x in "ab" for y in "cd"}}


def test_many_methods_can_still_be_distinguished():
    """The smallest p of a bootstrap, times the pairs, must stay below the level."""
    rng = np.random.default_rng(10)
    hard = rng.normal(3, 0.5, 64)
    text = window_measure("perplexity", "wiki")
    made = [observed(f"m{i}", 0, text, hard + 0.5 * i + rng.normal(0, 0.01, 64)) for i in range(24)]
    rows = compare_methods(made)
    assert len(rows) == 276 and {row["verdict"] for row in rows} == {"better"}


def test_seeds_that_disagree_show_no_difference():
    rng = np.random.default_rng(2)
    level = rng.normal(-3, 1, LAYERS)
    shifts = {0: -0.5, 1: -0.5, 2: 0.1}  # of method a, by seed
    made = [observed("a", seed, ERRORS, np.exp(level + shift)) for seed, shift in shifts.items()]
    made += [observed("b", seed, ERRORS, np.exp(level)) for seed in shifts]
    (row,) = compare_methods(made)
    assert row["p_holm"] < 1e-6 and row["seeds_agree"] == 2 and row["verdict"] == NO_DIFFERENCE
    (row,) = compare_methods([one for one in made if one.columns["seed"] < 2])
    assert row["verdict"] == "better" and row["median_ratio"] == pytest.approx(math.exp(-0.5))


def test_holm_runs_over_a_target_and_groups_are_kept_apart():
    rng = np.random.default_rng(3)
    made = study(rng, {"a": 1.0, "b": 0.9}) + study(rng, {"a": 1.0, "b": 0.9})
    made = [
        Observation({**one.columns, "target": "2:4" if number >= 6 else "60% row"}, one.values)
        for number, one in enumerate(made)
    ]
    made += [observed(label, 0, ERRORS, rng.lognormal(size=LAYERS), "weight-updating") for label in "xyz"]
    made += [observed("alone", 0, ERRORS, rng.lognormal(size=LAYERS), "tuned")]
    rows = compare_methods(made)
    assert {(row["target"], row["comparison"]) for row in rows} == {
        ("60% row", "mask-only"), ("60% row", "weight-updating"), ("2:4", "mask-only"),
    }  # fmt: skip
    family = [row for row in rows if row["target"] == "60% row"]
    assert [row["p_holm"] for row in family] == holm([row["p"] for row in family]).tolist() and len(family) == 4
    (alone,) = [row for row in rows if row["target"] == "2:4"]
    assert alone["p_holm"] == alone["p"] and alone["friedman_p"] is None  # two methods


def test_only_what_all_methods_of_a_group_have_is_compared():
    rng = np.random.default_rng(4)
    made = [observed(label, seed, ERRORS, rng.lognormal(size=LAYERS)) for label in "abc" for seed in range(3)]
    del made[4]  # b under seed 1
    made[0] = observed("a", 0, ERRORS, [0.1] * (LAYERS - 2))
    assert {(row["units"], row["seeds"]) for row in compare_methods(made)} == {(LAYERS - 2, 2), (LAYERS - 2, 3)}
    assert compare_methods([observed("a", 0, ERRORS, [0.1] * 9), observed("b", 0, ERRORS, [])]) == []


def test_asymmetric_errors_are_compared_where_every_layer_has_one_of_its_own():
    layers, errors = ["q", "k", "v"], [0.1, 0.2, 0.3]
    assert layer_errors(layers, errors, errors) == {ERRORS: dict(zip(layers, errors, strict=True))}  # shared mode
    partial = layer_errors(layers, errors, [0.1, None, None])  # known of the first block alone
    assert list(partial) == [ERRORS]
    whole = layer_errors(layers, errors, [0.1, 0.25, 0.4])
    assert whole == partial | {ASYMMETRIC: {"q": 0.1, "k": 0.25, "v": 0.4}}
    cells = [observed(label, 0, ERRORS, [0.1] * LAYERS) for label in "abc"]
    for i, share in enumerate((1.0, 2.0)):  # c has none
        own = {ASYMMETRIC: {layer: share * (1 + layer) for layer in range(LAYERS)}}
        cells[i] = Observation(cells[i].columns, {**cells[i].values, **own})
    rows = [row for row in compare_methods(cells) if row["metric"] == "asymmetric_error"]
    assert [(row["label"], row["other"], row["units"], row["verdict"]) for row in rows] == [
        ("a", "b", LAYERS, "better")
    ]
    assert rows[0]["median_ratio"] == pytest.approx(0.5)


def test_errors_of_zero_are_equal_to_one_another():
    made = [observed(label, 0, ERRORS, [0.0, LEAST / 10, 0.2, 0.3]) for label in "ab"]
    (row,) = compare_methods(made)
    assert (row["median_ratio"], row["effect"], row["p"], row["verdict"]) == (1.0, 0.0, 1.0, NO_DIFFERENCE)


@pytest.mark.parametrize("better", ["first", "second", "neither"])
def test_perplexities_are_compared_by_windows_and_accuracies_by_items(better):
    rng = np.random.default_rng(5)
    gain = {"first": -0.05, "second": 0.05, "neither": 0.0}[better]
    hard = rng.normal(3, 0.5, 64)
    text, task = window_measure("perplexity", "wiki"), accuracy_measure("acc", "boolq of zero-shot")
    chance = {"first": (0.8, 0.6), "second": (0.6, 0.8), "neither": (0.7, 0.7)}[better]
    made = []
    for label, shift, right in (("a", gain, chance[0]), ("b", 0.0, chance[1])):
        for seed in range(2):
            own = observed(label, seed, text, hard + shift + rng.normal(0, 0.02, 64))
            items = dict(enumerate((rng.random(500) < right).astype(float)))
            made.append(Observation(own.columns, {**own.values, task: items}))
    wanted = {"first": "better", "second": "worse", "neither": NO_DIFFERENCE}[better]
    rows = compare_methods(made)
    from_rows(rows, "comparisons", "the test")
    assert [(row["metric"], row["text"], row["units"], row["verdict"]) for row in rows] == [
        ("perplexity", "wiki", 64, wanted),
        ("acc", "boolq of zero-shot", 500, wanted),
    ]
    for row, sign in zip(rows, (-1, 1), strict=True):
        assert row["low"] < row["difference"] < row["high"]
        assert better == "neither" or (sign * row["difference"] > 0) == (better == "first")


# ------------------------------------------------------------------------------------------------------------- the bars


@pytest.mark.parametrize(
    ("different", "wanted"),
    [
        (set(), [(0, 3)]),
        ({(0, 3)}, [(0, 2), (1, 3)]),
        ({(0, 1), (0, 2), (0, 3)}, [(1, 3)]),
        ({(0, 2), (0, 3), (1, 3)}, [(0, 1), (1, 2), (2, 3)]),
        ({(0, 1), (1, 2), (2, 3)}, []),  # 0 and 2 do not differ, but 1 between them differs from both
    ],
)
def test_bars_join_the_longest_runs_without_a_difference(different, wanted):
    assert bars(4, lambda one, two: (one, two) in different) == wanted


# ---------------------------------------------------------------------------------------------------------- allocations


def spread_cells(effects, rng, metric="perplexity", seeds=3, windows=60, label="wanda", budget="60% row"):
    """Cells of one method: allocation -> the mean by which its losses differ from those of the uniform budget."""
    measure = window_measure(metric, "docstrings")
    difficulty = rng.normal(3, 0.5, windows)
    place = {"model": "demo", "calibration": "docstrings", "mode": "shared", "comparison": "mask-only", "label": label}
    target = {"sparsity": 0.6, "pattern": "row", "bits": None, "group": None, "symmetric": False}
    cells = []
    for allocation, effect in effects.items():
        named = budget if allocation == "uniform" else f"{budget} {allocation}"
        for seed in range(seeds):
            losses = difficulty + effect + rng.normal(0, 0.01, windows)
            columns = {**place, **target, "target": named, "allocation": allocation, "seed": seed}
            values = {measure: dict(enumerate(losses)), ERRORS: dict(enumerate(np.exp(-losses)))}
            cells.append(Observation(columns, values))
    return cells


def test_allocations_of_one_budget_are_compared_method_by_method():
    rng = np.random.default_rng(20)
    cells = spread_cells({"uniform": 0.0, "owl": -0.1, "mild": 0.0}, rng)
    cells += spread_cells({"uniform": 0.0, "owl": 0.1}, rng, label="sparsegpt")
    cells += spread_cells({"uniform": 0.0}, rng, label="magnitude") + spread_cells({"owl": 0.0}, rng, budget="70% row")
    rows = compare_allocations(cells)
    from_rows(rows, "allocation_comparisons", "a test")
    assert {row["metric"] for row in rows} == {"perplexity"}  # not the errors of layers
    assert {row["target"] for row in rows} == {"60% row"}
    verdicts = {(row["label"], row["allocation"], row["other_allocation"]): row["verdict"] for row in rows}
    assert verdicts == {
        ("wanda", "uniform", "owl"): "worse",
        ("wanda", "uniform", "mild"): NO_DIFFERENCE,
        ("wanda", "owl", "mild"): "better",
        ("sparsegpt", "uniform", "owl"): "better",
    }
    first = rows[0]
    losses = [np.array([*cell.values[window_measure("perplexity", "docstrings")].values()]) for cell in cells[:6]]
    perplexities = [np.exp(own.mean()) for own in losses]
    assert first["difference"] == pytest.approx(np.mean(perplexities[:3]) - np.mean(perplexities[3:]))
    raw = [row["p"] for row in rows]
    assert [row["p_holm"] for row in rows] == pytest.approx(holm(raw).tolist())  # over both methods


def test_a_study_without_allocations_compares_none():
    assert compare_allocations(spread_cells({"uniform": 0.0}, np.random.default_rng(21))) == []
