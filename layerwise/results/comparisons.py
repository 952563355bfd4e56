"""The tables `comparisons` and `allocation_comparisons`: do two results differ by more than noise?

The first compares all pairs of methods in a group on one target, the second all pairs of allocations of one method and
budget.

The units are layers for output_error and asymmetric_error, windows of the text for perplexity, kl and top1_agreement,
and items for accuracy. Seeds repeat the measurement of a unit. They are not units themselves, because a layer that
suits a method does so under every seed. They are averaged and must agree on the direction; three or more must also pass
a separate test.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from layerwise.results import significance
from layerwise.results.significance import Floats
from layerwise.storage.table_schema import COMPARISONS, columns

LEAST = 1e-12  # smaller errors are rounding of errors that should be zero
PLACE = ("model", "calibration", "mode", "target")
TARGET = ("allocation", "sparsity", "pattern", "bits", "group", "symmetric")
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Measure:
    """A quantity measured on every unit. statistic: maps the mean over units to the number in a table, or None if layer
    errors are compared as ratios. sign: -1 if less is better."""

    metric: str
    text: str | None
    statistic: Callable[[Floats], Floats] | None
    sign: int


ERRORS = Measure("output_error", None, None, -1)
ASYMMETRIC = Measure("asymmetric_error", None, None, -1)
LAYER_ERRORS = (ERRORS.metric, ASYMMETRIC.metric)  # both are columns of `layers`


def window_measure(metric: str, text: str) -> Measure:
    """The measure for perplexity (from mean losses of windows), kl or top1_agreement (from means of windows)."""
    statistic = np.exp if metric == "perplexity" else significance.itself
    return Measure(metric, text, statistic, 1 if metric == "top1_agreement" else -1)


def layer_errors(
    layers: Sequence[str], output: Sequence[float], asymmetric: Sequence[float | None]
) -> dict[Measure, Mapping[str, float]]:
    """The units of a cell's layer measures, from the columns of `layers`.

    Asymmetric errors count only if every layer has one (sequential mode, methods that need the cross-Gram) and if they
    differ from the output errors.
    """
    found: dict[Measure, Mapping[str, float]] = {ERRORS: dict(zip(layers, output, strict=True))}
    known = {layer: error for layer, error in zip(layers, asymmetric, strict=True) if error is not None}
    if len(known) == len(found[ERRORS]) and known != found[ERRORS]:
        found[ASYMMETRIC] = known
    return found


def accuracy_measure(metric: str, task: str) -> Measure:
    """The measure for acc, acc_norm or exact_match, from items that are right (1) or wrong (0)."""
    return Measure(metric, task, significance.itself, 1)


@dataclass(frozen=True)
class Observation:
    """A finished cell: its spec columns and, for each measure, unit name -> values [n]."""

    columns: Mapping[str, Any]
    values: Mapping[Measure, Mapping[Any, float]]


def compare_methods(observations: Sequence[Observation]) -> list[dict[str, Any]]:
    """Rows of the `comparisons` table, in the order of the cells; p_holm is adjusted over all rows of one place and
    measure."""
    measures = list(dict.fromkeys(measure for cell in observations for measure in cell.values))
    places: dict[tuple[Any, ...], list[Observation]] = {}
    for cell in observations:
        places.setdefault(tuple(cell.columns[name] for name in PLACE), []).append(cell)
    return [row for cells in places.values() for measure in measures for row in _by_comparison(cells, measure)]


def _by_comparison(cells: Sequence[Observation], measure: Measure) -> Iterator[dict[str, Any]]:
    """The rows of a place and a measure: every group's methods with each other."""
    return _family((({}, _by_label(cells, comparison, measure)) for comparison in COMPARISONS), measure)


def compare_allocations(observations: Sequence[Observation]) -> list[dict[str, Any]]:
    """Rows of the `allocation_comparisons` table: every two allocations of one budget that a method was run with.

    Layer errors are left out: the layers are not units of one problem if each has another level. p_holm is adjusted
    over all methods of a place, budget and measure.
    """
    measures = list(dict.fromkeys(measure for cell in observations for measure in cell.values if measure.statistic))
    places: dict[tuple[Any, ...], list[Observation]] = {}
    for cell in observations:
        place = (*(cell.columns[name] for name in PLACE if name != "target"), budget_of(cell.columns))
        places.setdefault(place, []).append(cell)
    rows = []
    for (*_, budget), cells in places.items():
        labels = dict.fromkeys(cell.columns["label"] for cell in cells)
        for measure in measures:
            groups = [({"method_label": label}, _by_allocation(cells, label, measure)) for label in labels]
            for row in _family(groups, measure):
                allocations = {"allocation": row["label"], "other_allocation": row.pop("other")}
                rows.append(row | allocations | {"target": budget, "label": row.pop("method_label")})
    return [{name: row[name] for name in row if name in columns("allocation_comparisons")} for row in rows]


def budget_of(spec: Mapping[str, Any]) -> str:
    """The label of a cell's target without its allocation: "60% row" of "60% row owl"."""
    return spec["target"].removesuffix(f" {spec['allocation']}")


def _family(
    groups: Iterable[tuple[Mapping[str, Any], Mapping[str, Mapping[int, Observation]]]], measure: Measure
) -> Iterator[dict[str, Any]]:
    """The rows of a place and a measure; p is adjusted over all of them. groups: columns of a group, and its cells."""
    groups = list(groups)
    pairs = sum(math.comb(len(by_label), 2) for _, by_label in groups)
    family = [{**common, **row} for common, by_label in groups for row in _group(by_label, measure, pairs)]
    adjusted = significance.holm([row["p"] for row in family])
    for row, p in zip(family, adjusted.tolist(), strict=True):
        yield row | {"p_holm": p, "verdict": _verdict(row, p, measure)}


def _by_allocation(cells: Sequence[Observation], label: str, measure: Measure) -> dict[str, dict[int, Observation]]:
    """allocation -> seed -> cell, for a method's cells that have the measure."""
    found: dict[str, dict[int, Observation]] = {}
    for cell in cells:
        if cell.columns["label"] == label and cell.values.get(measure):
            found.setdefault(cell.columns["allocation"], {})[cell.columns["seed"]] = cell
    return found


def _by_label(cells: Sequence[Observation], comparison: str, measure: Measure) -> dict[str, dict[int, Observation]]:
    """label -> seed -> cell, for a group's cells that have the measure."""
    by_label: dict[str, dict[int, Observation]] = {}
    for cell in cells:
        if cell.columns["comparison"] == comparison and cell.values.get(measure):
            by_label.setdefault(cell.columns["label"], {})[cell.columns["seed"]] = cell
    return by_label


def _group(by_label: Mapping[str, Mapping[int, Observation]], measure: Measure, pairs: int) -> Iterator[dict[str, Any]]:
    """The rows of a place, a group and a measure, without values that need other groups. pairs: number in all
    groups."""
    cells = [cell for by_seed in by_label.values() for cell in by_seed.values()]
    if len(by_label) < 2:
        return
    every = [set(cell.values[measure]) for cell in cells]
    units = [unit for unit in cells[0].values[measure] if all(unit in known for known in every)]
    if len(units) < 2:
        return
    places = {id(cell): i for i, cell in enumerate(cells)}
    values = np.array([[cell.values[measure][unit] for unit in units] for cell in cells])  # [cells, units]
    common = {name: cells[0].columns[name] for name in (*PLACE, *TARGET, "comparison")}
    common |= {"metric": measure.metric, "text": measure.text, "units": len(units)}
    drawn = None
    if measure.statistic:
        drawn = significance.resampled_means(values, samples=significance.resamples_for(pairs))
    else:
        values = np.log(np.maximum(values, LEAST))
        most = max(map(len, by_label.values()))
        whole = [
            [places[id(cell)] for cell in by_seed.values()] for by_seed in by_label.values() if len(by_seed) == most
        ]
        common["friedman_p"] = significance.friedman([values[repeats].mean(axis=0) for repeats in whole])
    for label, other in combinations(by_label, 2):
        # A cell without a result for one seed removes that seed only from its own pairs.
        seeds = [seed for seed in by_label[label] if seed in by_label[other]]
        if not seeds:
            continue
        first, second = ([places[id(by_label[name][seed])] for seed in seeds] for name in (label, other))
        samples = None if drawn is None else (drawn[:, first], drawn[:, second])
        row = common | {"label": label, "other": other, "seeds": len(seeds)}
        yield row | _pair(values[first], values[second], samples, measure)


def _pair(first: Floats, second: Floats, samples: tuple[Floats, Floats] | None, measure: Measure) -> dict[str, Any]:
    """Columns about two methods, from their values [seeds, units]. samples: their resampled means."""
    if measure.statistic is None:
        return _ratios(first, second, measure)
    return _differences(first, second, samples, measure.statistic, measure.sign)


def _ratios(first: Floats, second: Floats, measure: Measure) -> dict[str, Any]:
    """Columns about two methods, from the logarithms of layer errors [seeds, layers]."""
    logs = first - second
    mean = logs.mean(axis=0)
    p, effect = significance.signed_rank(measure.sign * mean)
    directions = [np.sign(significance.signed_rank(measure.sign * seed).effect) for seed in logs]
    low, high = significance.median_interval(mean) or (None, None)
    median, low, high = (None if value is None else float(np.exp(value)) for value in (np.median(mean), low, high))
    columns: dict[str, Any] = {"median_ratio": median, "low": low, "high": high, "effect": effect, "p": p}
    columns["p_seeds"] = significance.over_seeds(logs.mean(axis=1))
    return columns | {"seeds_agree": sum(direction == np.sign(effect) for direction in directions)}


def _differences(
    first: Floats,
    second: Floats,
    samples: tuple[Floats, Floats] | None,
    statistic: Callable[[Floats], Floats],
    sign: int,
) -> dict[str, Any]:
    """Columns about two methods, from their values per window or item [seeds, n] and the bootstrap of these."""
    value, low, high, p = significance.bootstrap_difference(first, second, statistic, samples)
    effect = significance.signed_rank(sign * (first - second).mean(axis=0)).effect
    by_seed = statistic(first.mean(axis=1)) - statistic(second.mean(axis=1))
    columns: dict[str, Any] = {"difference": value, "low": low, "high": high, "effect": effect, "p": p}
    columns["p_seeds"] = significance.over_seeds(by_seed)
    return columns | {"seeds_agree": int((np.sign(by_seed) == np.sign(value)).sum())}


def _verdict(row: Mapping[str, Any], p_holm: float, measure: Measure) -> str:
    """ "better" or "worse" for the row's label, if the tests and all seeds agree."""
    shown = p_holm < significance.ALPHA and row["seeds_agree"] == row["seeds"]
    for gate in ("friedman_p", "p_seeds"):
        shown &= row.get(gate) is None or row[gate] < significance.ALPHA
    if not shown:
        return NO_DIFFERENCE
    gain = measure.sign * row["difference"] if measure.statistic else row["effect"]
    return "better" if gain > 0 else "worse"
