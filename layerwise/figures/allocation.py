"""The figures of budgets that are spread over layers: pure functions from a table to a figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from layerwise.contract.target import Target
from layerwise.figures.page import (
    AXES,
    PLACE,
    chosen_target,
    log_limits,
    log_scale,
    not_drawn,
    nothing,
    page,
    place_title,
)
from layerwise.figures.style import SPARE_MARKERS
from layerwise.results.seeds import repeats
from layerwise.storage.frames import column, distinct_values, groups, groups_by, highest, lowest, matching, rows, select
from layerwise.study.allocation_entries import UNIFORM

KINDS_PER_ROW = 4
BUDGET = ["sparsity", "pattern", "bits", "group", "symmetric"]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
METRICS = ("perplexity", "kl")
BROKEN = 30  # times the lowest value: what is worse is beyond the axis


def levels_along_depth(layers: pd.DataFrame) -> Figure:
    """Level of each layer along the blocks, a panel per kind of layer, a line per allocation.

    A band per model, calibration set and mode, at one of the budgets that are spread (page.chosen_target). Layers of
    one kind in one block, such as experts, are averaged, and so are seeds, whose range is shaded.
    """
    spread = budgets(layers)
    if spread.empty:
        return nothing("No budget is spread over the layers: the study has no allocation but uniform.")
    chosen = chosen_target(spread.assign(target=column(spread, "budget")))
    data = matching(spread, budget=chosen)
    style = allocation_strokes(distinct_values(data, "allocation"))
    bands = groups(data, PLACE)
    counts = [-(-len(distinct_values(part, "kind")) // KINDS_PER_ROW) for _, part in bands]
    figure, frames = page([1.45 * count + 0.3 for count in counts], (), handles(style))
    for frame, (place, part), count in zip(frames, bands, counts, strict=True):
        _depth_band(frame, part, count, style, Target.parse(chosen))
        frame.suptitle(f"{place_title(*place)}, {chosen}", x=0.01, ha="left")
    return figure


def metrics_vs_budget(cells: pd.DataFrame) -> Figure:
    """Perplexity and KL from the dense model against the budget, a column of panels per method, a line per allocation.

    A band per model, calibration set, mode, text and kind of target. Lines are means over the seeds, whose range is
    shaded; a budget that lacks a value under some seed has none.
    """
    wanted = select(cells, column(cells, "metric").isin(list(METRICS)))
    every, measured = budgets(wanted), budgets(repeats(wanted, "cells", "mean"))
    done = select(measured, column(measured, "value") > 0)  # there is no zero on the axis
    if done.empty:
        return nothing("No perplexity of a model whose budget is spread: see the cells table for the reasons.")
    style = allocation_strokes(distinct_values(done, "allocation"))
    bands = groups(done, [*PLACE, "text", "unit"])
    figure, frames = page([3.2] * len(bands), (), handles(style), not_drawn(measured))
    for frame, ((model, calibration, mode, text, unit), part) in zip(frames, bands, strict=True):
        keys = {**dict(zip(PLACE, (model, calibration, mode), strict=True)), "text": text, "unit": unit}
        _budget_band(frame, part, matching(every, **keys), style, unit)
        frame.suptitle(f"{place_title(model, calibration, mode)}, on {text}", x=0.01, ha="left")
    return figure


def budgets(data: pd.DataFrame) -> pd.DataFrame:
    """The rows at budgets that some allocation spreads, with `budget`, the target's short name without the
    allocation's, `x`, its share of zeros, its bits or its rank, and `unit`, what that is."""
    names = [
        row["target"] if row["allocation"] == UNIFORM else str(row["target"]).removesuffix(f" {row['allocation']}")
        for row in rows(data)
    ]
    targets = {name: Target.parse(name) for name in set(names)}
    x = [float(own.sparsity or own.bits or own.rank) for own in map(targets.__getitem__, names)]
    units = [unit_of(targets[name]) for name in names]
    data = data.assign(
        budget=pd.Series(names, index=data.index, dtype=object), x=pd.Series(x, index=data.index, dtype=float)
    )
    data = data.assign(unit=pd.Series(units, index=data.index, dtype=object))
    spread = set(column(select(data, column(data, "allocation") != UNIFORM), "budget"))
    return select(data, column(data, "budget").isin(list(spread)))


def unit_of(target: Target) -> str:
    """What changes along a figure's axis of budgets, and what all of them have besides."""
    if target.sparsity:
        zeros = f"zeros {'of n:m patterns' if target.n_of_m else f'of every {target.pattern}'}"
        beside = replace(target, sparsity=0.0, pattern="row")
        return zeros if beside.dense else f"{zeros}, at {beside.label}"
    if target.bits is not None:
        return (
            "bits" if not target.rank else f"bits, at {replace(target, bits=None, group=None, symmetric=False).label}"
        )
    return f"rank, factors of {target.factors.label}" if target.factor_bits is not None else "rank"


def allocation_strokes(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Keyword arguments of `plot` for each allocation; equal levels are black and dashed."""
    others = [name for name in names if name != UNIFORM]
    found: dict[str, dict[str, Any]] = {}
    if UNIFORM in names:
        found[UNIFORM] = {"color": "black", "linestyle": (0, (4, 1.5)), "marker": "o"}
    for place, name in enumerate(others):
        marker = SPARE_MARKERS[place % len(SPARE_MARKERS)]
        found[name] = {"color": COLOURS[place % len(COLOURS)], "linestyle": "-", "marker": marker}
    return found


def handles(style: Mapping[str, Mapping[str, Any]]) -> list[Line2D]:
    return [Line2D([], [], label=name, **strokes) for name, strokes in style.items()]


def _depth_band(
    band: SubFigure, data: pd.DataFrame, count: int, style: Mapping[str, Mapping[str, Any]], target: Target
) -> None:
    kinds = distinct_values(data, "kind")
    width = min(KINDS_PER_ROW, len(kinds))
    axes = band.subplots(count, width, sharex=True, sharey=True, squeeze=False)
    blocks = range(int(lowest(column(data, "block"))), int(highest(column(data, "block"))) + 1)
    zeros, named = not target.paired and target.sparsity > 0, "bits per weight" if target.paired else "bits"
    for index, axis in enumerate(axes.flat):
        if index >= len(kinds):
            axis.set_axis_off()
            continue
        part = matching(data, kind=kinds[index])
        for name, strokes in style.items():
            line = matching(part, allocation=name)
            if len(line):
                by_seed = pd.DataFrame(line.groupby(["block", "seed"])["level"].mean()).reset_index()
                found = {block: column(here, "level") for block, here in groups_by(by_seed, "block", sort=True)}
                mean = [found[block].mean() if block in found else math.nan for block in blocks]
                axis.plot(blocks, mean, markevery=max(1, len(blocks) // 8), **strokes)
                shade(axis, found, strokes)
        axis.set_title(kinds[index], loc="left", fontweight="bold")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.margins(x=0.06)
        if zeros:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.tick_params(labelbottom=index + width >= len(kinds))
        if index + width >= count * width:
            axis.set_xlabel("block")
        if index % width == 0:
            axis.set_ylabel("zeros" if zeros else named)


def _budget_band(
    band: SubFigure, data: pd.DataFrame, every: pd.DataFrame, style: Mapping[str, Mapping[str, Any]], unit: str
) -> None:
    """every: the same of all seeds."""
    labels = distinct_values(data, "label")
    axes = band.subplots(len(METRICS), len(labels), sharex=True, sharey="row", squeeze=False)
    places = sorted(distinct_values(data, "x"))
    for metric, line in zip(METRICS, axes, strict=True):
        values = column(matching(data, metric=metric), "value")
        for label, axis in zip(labels, line, strict=True):
            if len(values):
                log_scale(axis, *log_limits(lowest(values), min(highest(values), BROKEN * lowest(values))))
            own = {"metric": metric, "label": label}
            _budget_lines(axis, matching(data, **own), matching(every, **own), places, style)
            _budget_axis(axis, places, not unit.startswith("bits"))
            if metric == METRICS[0]:
                axis.set_title(label, loc="left", fontweight="bold")
            else:
                axis.set_xlabel(unit)
        line[0].set_ylabel({"kl": "KL, nats per token"}.get(metric, AXES[metric]))


def _budget_lines(
    axis: Axes,
    data: pd.DataFrame,
    every: pd.DataFrame,
    places: Sequence[float],
    style: Mapping[str, Mapping[str, Any]],
) -> None:
    for name, strokes in style.items():
        line = matching(data, allocation=name)
        if len(line):
            # A budget without a value breaks the line: nothing is drawn through what was not measured.
            mean = column(line.drop_duplicates("x").set_index("x"), "value").reindex(places)
            axis.plot(places, mean, **strokes)
            seeds = groups_by(matching(every, allocation=name), "x", sort=True)
            drawn = [place for place, value in zip(places, mean.to_list(), strict=True) if pd.notna(value)]
            shade(axis, {x: column(here, "value") for x, here in seeds if x in drawn}, strokes)


def shade(axis: Axes, found: Mapping[Any, pd.Series], strokes: Mapping[str, Any]) -> None:
    """The range of the values at each x, where some differ: a band, and bars, as a band of one place has no width."""
    x, low, high = list(found), [lowest(own) for own in found.values()], [highest(own) for own in found.values()]
    if low != high:
        axis.fill_between(x, low, high, color=strokes["color"], alpha=0.15, linewidth=0)
        axis.vlines(x, low, high, color=strokes["color"], linewidth=0.8)


def _budget_axis(axis: Axes, places: Sequence[float], share: bool) -> None:
    spread = (max(places) - min(places)) or (0.1 if share else 1.0)
    axis.set_xlim(min(places) - 0.1 * spread, max(places) + 0.1 * spread)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_locator(FixedLocator(list(places)))
    axis.set_xticks(list(places), [f"{100 * place:g}%" if share else f"{place:g}" for place in places])
