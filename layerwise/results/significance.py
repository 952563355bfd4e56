"""Whether a difference is more than noise: paired tests with effect sizes, Holm's correction, bootstrap intervals.

Pure functions of arrays; comparisons.py applies them to a study.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

LEVEL = 0.95  # confidence level of every interval
ALPHA = 1 - LEVEL  # adjusted p-values below this count as a difference
RESAMPLES = 10_000
DRAWS_AT_ONCE = 2**22  # numbers drawn at once, 32 MB
Floats = NDArray[np.float64]


def itself(means: Floats) -> Floats:
    """The statistic of a measure that is itself a mean, such as accuracy."""
    return means


class SignedRank(NamedTuple):
    """p: two-sided p-value of Wilcoxon's signed-rank test. effect: matched-pairs rank-biserial correlation in [-1,
    1]."""

    p: float
    effect: float


def signed_rank(differences: ArrayLike) -> SignedRank:
    """Wilcoxon's test that paired differences [n] are symmetric about zero, with its effect size.

    Zeros are dropped (Wilcoxon 1945). The effect is (sum of the ranks of positive differences - sum of those of
    negative ones) / sum of all (Kerby 2014). It is 1 if every difference is positive. Without any difference p is 1 and
    the effect is 0.
    """
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[differences != 0]
    if not len(differences):
        return SignedRank(1.0, 0.0)
    ranks = stats.rankdata(np.abs(differences))
    effect = float((np.sign(differences) * ranks).sum() / ranks.sum())
    return SignedRank(_p_value(stats.wilcoxon(differences)), effect)


def _p_value(test: Any) -> float:
    """The p-value of a scipy test, whose results are untyped."""
    return float(test.pvalue)


def holm(p: ArrayLike) -> Floats:
    """Adjusted p-values [n] of n tests: a value is below alpha if Holm's procedure (1979) rejects the test at alpha."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def friedman(values: ArrayLike) -> float | None:
    """p of Friedman's test that k treatments [k, n] do not differ over n blocks; None for fewer than three of them."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 3:
        return None
    if (values == values[0]).all():  # all tied, so the statistic would be 0 / 0
        return 1.0
    return _p_value(stats.friedmanchisquare(*values))


def median_interval(values: ArrayLike) -> tuple[float, float] | None:
    """Interval of a population's median from a sample [n]: two order statistics, without a bootstrap.

    None for fewer than six values, because no such interval then reaches LEVEL.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    left_out = int(stats.binom.ppf(ALPHA / 2, len(ordered), 0.5))
    return (float(ordered[left_out - 1]), float(ordered[-left_out])) if left_out else None


def over_seeds(differences: ArrayLike) -> float | None:
    """Two-sided p of the t-test that differences between seeds [seeds] have mean zero; None for fewer than three."""
    differences = np.asarray(differences, dtype=np.float64)
    if len(differences) < 3:
        return None
    if (differences == differences[0]).all():  # no spread, as when the seed changes nothing
        return 0.0 if differences[0] else 1.0
    return _p_value(stats.ttest_1samp(differences, 0.0))


def resamples_for(comparisons: int) -> int:
    """Number of bootstrap samples for which the smallest p of `comparisons` tests is below ALPHA after Holm's
    correction."""
    return max(RESAMPLES, math.ceil(4 * comparisons / ALPHA))


def resampled_means(values: ArrayLike, seed: int = 0, samples: int = RESAMPLES) -> Floats:
    """Means [samples, k] of bootstrap samples of n units, from k measurements of each unit [k, n].

    A bootstrap sample draws the same units for all k, so that columns are paired. Two calls with the same number of
    units and the same seed are also paired.
    """
    values = np.asarray(values, dtype=np.float64)
    units = values.shape[1]
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // units)
    parts = []
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        drawn = rng.integers(0, units, (count, units)) + units * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units)
        parts.append(times @ values.T / units)
    return np.concatenate(parts)


def percentiles(samples: Floats) -> tuple[float, float]:
    """The interval that omits ALPHA / 2 of the bootstrap samples on either side."""
    low, high = np.quantile(samples, (ALPHA / 2, 1 - ALPHA / 2))
    return float(low), float(high)


def bootstrap_interval(values: ArrayLike, statistic: Callable[[Floats], Floats] = itself) -> tuple[float, float] | None:
    """Percentile interval of a function of the mean of n units [n]: np.exp for perplexity from the losses of windows,
    the mean itself for accuracy from items that are right (1) or wrong (0). None for fewer than two units."""
    values = np.asarray(values, dtype=np.float64)
    return percentiles(statistic(resampled_means(values[None])[:, 0])) if len(values) > 1 else None


class Difference(NamedTuple):
    """value: first minus second. low, high: its interval. p: two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def bootstrap_difference(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Callable[[Floats], Floats] = itself,
    samples: tuple[Floats, Floats] | None = None,
) -> Difference:
    """Paired bootstrap of the difference between two measurements [seeds, n] of the same n units, as
    bootstrap_interval.

    samples: the resampled_means of both, if a caller with many comparisons has already drawn them.

    It compares the means over the seeds of each seed's statistic. p is twice the share of bootstrap samples on the
    other side of zero, with one added to both counts (Davison and Hinkley 1997, 4.11).
    """
    first, second = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (first, second))

    def of(values: Floats) -> Floats:
        return statistic(values).mean(axis=-1)

    of_first, of_second = samples or (resampled_means(first), resampled_means(second))
    differences = of(of_first) - of(of_second)
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (float(tail) + 1) / (len(differences) + 1))
    return Difference(float(of(first.mean(axis=1)) - of(second.mean(axis=1))), *percentiles(differences), p)


def bars(count: int, differ: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """The bars of a critical-difference diagram (Demsar 2006): the longest runs (first, last) of `count` items in rank
    order in which no two items differ. A run has at least two items."""
    runs: list[tuple[int, int]] = []
    for first in range(count):
        last = first
        while last + 1 < count and not any(differ(one, last + 1) for one in range(first, last + 1)):
            last += 1
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return runs
