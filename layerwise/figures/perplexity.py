"""The figures of perplexity and KL along the sparsity: pure functions from the `cells` table to a figure."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from layerwise.contract.target import SUM
from layerwise.figures.page import (
    AXES,
    WORDS,
    LegendEntry,
    beyond,
    dodge,
    entries,
    log_limits,
    log_scale,
    mark_beyond,
    not_drawn,
    nothing,
    page,
)
from layerwise.figures.style import Look, looks, strokes
from layerwise.storage.frames import column, distinct_tuples, distinct_values, matching, select, sorted_by
from layerwise.study.allocation_entries import UNIFORM

DENSE = {"color": "black", "linestyle": (0, (6, 2)), "linewidth": 0.9}


def perplexity_vs_sparsity(cells: pd.DataFrame) -> Figure:
    """Perplexity of the `cells` table along the row-wise sparsities, other patterns beside them; a band per model,
    calibration set and text, a pair of panels per mode. Quantised targets are left out."""
    return _vs_sparsity(cells, "perplexity")


def kl_vs_sparsity(cells: pd.DataFrame) -> Figure:
    """The same for the KL divergence from the dense model, which itself has none."""
    return _vs_sparsity(cells, "kl")


def _vs_sparsity(cells: pd.DataFrame, metric: str) -> Figure:
    data = matching(select(cells, column(cells, "bits").isna()), metric=metric)
    pruned = select(data, (column(data, "sparsity") > 0) & (column(data, "comparison") != SUM))  # which keep more
    done = select(pruned, column(pruned, "value") > 0)  # there is no zero on the axis
    if done.empty:
        return nothing(f"No {WORDS[metric]} of a pruned model: see the cells table for the reasons.")
    bands = distinct_tuples(done, ["model", "calibration", "text"])
    modes = distinct_values(done, "mode")
    shown = entries(done)
    style = looks((label, method) for label, method, _ in shown)
    dense = matching(select(data, column(data, "value") > 0), target="dense")
    parts, limits = [], []
    for model, calibration, text in bands:
        part = matching(done, model=model, calibration=calibration, text=text)
        # The dense model is one cell of the model: it belongs to every calibration set and mode.
        level = column(matching(dense, model=model, text=text), "value").to_list()[:1]
        parts.append((part, level))
        limits.append(_limits(part, level))
    extra = [Line2D([], [], label="dense", **DENSE)] if len(dense) else []
    extra += beyond((column(part, "value"), high) for (part, _), (_, high) in zip(parts, limits, strict=True))
    figure, subfigures = page([2.5] * len(bands), shown, extra, not_drawn(pruned))
    for band, (part, level), limit, names in zip(subfigures, parts, limits, bands, strict=True):
        _band(band, part, level, limit, modes, shown, style)
        band.axes[0].set_ylabel(AXES[metric])
        model, calibration, text = names
        band.suptitle(f"{model}, {WORDS[metric]} on {text}, calibrated on {calibration}", x=0.01, ha="left")
    return figure


def _limits(data: pd.DataFrame, dense: Sequence[float]) -> tuple[float, float]:
    """Range of the axis. A control can be orders of magnitude worse than everything else: it does not count,
    or it would squeeze the methods together."""
    contest = select(data, column(data, "comparison") != "control")
    values = [*column(contest if len(contest) else data, "value"), *dense]
    return log_limits(min(values), max(values), margin=0.1)


def _band(
    band: SubFigure,
    data: pd.DataFrame,
    dense: Sequence[float],
    limits: tuple[float, float],
    modes: Sequence[str],
    shown: Sequence[LegendEntry],
    style: dict[str, Look],
) -> None:
    # Spread budgets are drawn beside the lines; a line joins a method's equal levels.
    lined = (column(data, "pattern") == "row") & (column(data, "allocation") == UNIFORM)
    by_row, others = select(data, lined), select(data, ~lined)
    patterns = distinct_values(others, "target")
    sparsities = sorted(distinct_values(by_row, "sparsity"))
    widths = ([3.0] if len(by_row) else []) + ([max(1.2, 0.7 * len(patterns))] if patterns else [])
    axes = band.subplots(1, len(widths) * len(modes), sharey=True, squeeze=False, width_ratios=widths * len(modes))[0]
    for axis in axes:
        log_scale(axis, *limits)
        for level in dense:
            axis.axhline(level, zorder=1, **DENSE)
    for index, mode in enumerate(modes):
        pair = list(axes[index * len(widths) : (index + 1) * len(widths)])
        pair[0].set_title(mode, loc="left", fontweight="bold")
        if len(by_row):
            _sparsity_lines(pair.pop(0), matching(by_row, mode=mode), sparsities, shown, style)
        if patterns:
            _pattern_points(pair.pop(0), matching(others, mode=mode), patterns, shown, style)


def _sparsity_lines(
    axes: Axes, data: pd.DataFrame, sparsities: Sequence[float], shown: Sequence[LegendEntry], style: dict[str, Look]
) -> None:
    for label, _, comparison in shown:
        line = sorted_by(matching(data, label=label, comparison=comparison), ["sparsity"])
        # A sparsity without a value breaks the line: nothing is drawn through what was not measured.
        values = column(line.set_index("sparsity"), "value").reindex(sparsities)
        percent = [100 * sparsity for sparsity in sparsities]
        axes.plot(percent, values, **strokes(style[label], comparison))
        mark_beyond(axes, percent, list(values), style[label])
    axes.set_xticks([100 * sparsity for sparsity in sparsities], [f"{100 * value:g}%" for value in sparsities])
    spread = 100 * (max(sparsities) - min(sparsities)) or 10.0
    axes.set_xlim(100 * min(sparsities) - 0.1 * spread, 100 * max(sparsities) + 0.1 * spread)
    axes.set_xlabel("sparsity of every row")


def _pattern_points(
    axes: Axes, data: pd.DataFrame, patterns: Sequence[str], shown: Sequence[LegendEntry], style: dict[str, Look]
) -> None:
    for position, (label, _, comparison) in enumerate(shown):
        points = matching(data, label=label, comparison=comparison)
        x = [patterns.index(target) + dodge(position, len(shown), 0.7) for target in points["target"]]
        axes.plot(x, points["value"], **{**strokes(style[label], comparison), "linestyle": "none"})
        mark_beyond(axes, x, list(points["value"]), style[label])
    axes.set_xticks(range(len(patterns)), [target.replace(" ", "\n") for target in patterns])
    axes.set_xlim(-0.5, len(patterns) - 0.5)
    axes.set_xlabel("other targets")
