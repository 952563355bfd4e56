"""The figures of perplexity and KL against size: pure functions from the `cells` table to a figure."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from layerwise.figures.page import (
    AXES,
    WORDS,
    LegendEntry,
    beyond,
    entries,
    log_limits,
    log_scale,
    mark_beyond,
    not_drawn,
    nothing,
    page,
)
from layerwise.figures.style import Look, looks, strokes
from layerwise.storage.frames import (
    column,
    columns_of,
    distinct_tuples,
    distinct_values,
    highest,
    lowest,
    matching,
    renamed,
    rows,
    select,
    sorted_by,
)

CELL = ["model", "calibration", "mode", "cell"]
FRONT = {"color": "#8c8c8c", "linewidth": 1.0, "drawstyle": "steps-post", "zorder": 1}
DENSE = {"color": "black", "marker": "*", "markersize": 7, "linestyle": "none"}
BROKEN = {"perplexity": 10, "kl": 1e4}  # times the lowest value: what is worse is beyond the axis
SIZES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)  # ticks, in bits per weight


def perplexity_vs_bits(cells: pd.DataFrame) -> Figure:
    """Perplexity of every cell of the `cells` table against its bits per weight, and their Pareto front.

    A band per model, calibration set and text, a panel per mode. The front is of all cells but the controls, and of the
    dense model; its points are numbered, and named above the legend.
    """
    return _vs_bits(cells, "perplexity")


def kl_vs_bits(cells: pd.DataFrame) -> Figure:
    """The same for the KL divergence from the dense model, which itself has none."""
    return _vs_bits(cells, "kl")


def _vs_bits(cells: pd.DataFrame, metric: str) -> Figure:
    data = sized(cells, metric)
    compressed = select(data, column(data, "target") != "dense")
    done = select(compressed, column(compressed, "value") > 0)  # there is no zero on the axis
    if done.empty:
        return nothing(f"No {WORDS[metric]} of a compressed model: see the cells table for the reasons.")
    bands = distinct_tuples(done, ["model", "calibration", "text"])
    modes = distinct_values(done, "mode")
    shown = entries(done)
    style = looks((label, method) for label, method, _ in shown)
    dense = matching(select(data, column(data, "value") > 0), target="dense")
    extra = [Line2D([], [], label="dense", **DENSE)] if len(dense) else []
    panels = []
    for model, calibration, text in bands:
        # The dense model is one cell of the model: it belongs to every calibration set and mode.
        level = matching(dense, model=model, text=text).head(1)
        for mode in modes:
            here = matching(done, model=model, calibration=calibration, text=text, mode=mode)
            panels.append((here, level, pareto_front(pd.concat([here, level]))))
    numbers = count(1)
    named = [[(row, next(numbers)) for row in rows(front)] for _, _, front in panels]
    names = [f"({number}) {_name(row)}" for front in named for row, number in front]
    note = " ".join(filter(None, [f"Front: {', '.join(names)}." if names else "", not_drawn(compressed)]))
    wholes = [panels[start : start + len(modes)] for start in range(0, len(panels), len(modes))]
    drawn = [pd.concat([frame for panel in whole for frame in panel[:2]]) for whole in wholes]
    limits = [_limits(part, BROKEN[metric]) for part in drawn]
    extra += beyond((column(part, "value"), high) for part, (_, high) in zip(drawn, limits, strict=True))
    figure, subfigures = page([3.2] * len(bands), shown, extra, note)
    for index, (band, (model, calibration, text)) in enumerate(zip(subfigures, bands, strict=True)):
        axes = band.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        for place, (axis, mode) in enumerate(zip(axes, modes, strict=True), index * len(modes)):
            here, level, front = panels[place]
            log_scale(axis, *limits[index])
            _sizes(axis, column(drawn[index], "size"))
            _points(axis, here, level, front, named[place], shown, style)
            axis.set_title(mode, loc="left", fontweight="bold")
        axes[0].set_ylabel(AXES[metric])
        band.suptitle(f"{model}, {WORDS[metric]} on {text}, calibrated on {calibration}", x=0.01, ha="left")
    return figure


def sized(cells: pd.DataFrame, metric: str = "perplexity") -> pd.DataFrame:
    """The rows of a metric of `cells`, with a column `size`: bits per weight, mean over all compressed weights."""
    size = renamed(columns_of(matching(cells, metric="bits_per_weight"), [*CELL, "value"]), {"value": "size"})
    return matching(cells, metric=metric).merge(size, on=CELL, how="left")


def pareto_front(data: pd.DataFrame) -> pd.DataFrame:
    """The rows, controls left out, that no other beats in `size` and `value` both, from small to large."""
    contest = select(data, (column(data, "comparison") != "control") | (column(data, "target") == "dense"))
    ordered = sorted_by(contest.dropna(subset=["size", "value"]), ["size", "value"])
    values = column(ordered, "value")
    return select(ordered, values < values.cummin().shift(fill_value=float("inf")))


def _name(row: Mapping[str, Any]) -> str:
    return "dense" if row["target"] == "dense" else f"{row['label']} {row['target']}"


def _limits(data: pd.DataFrame, broken: float) -> tuple[float, float]:
    """Range of the axis. Controls, and values more than `broken` times the lowest, do not count."""
    contest = select(data, column(data, "comparison") != "control")
    values = column(pd.concat([contest if len(contest) else data, matching(data, target="dense")]), "value")
    return log_limits(lowest(values), min(highest(values), broken * lowest(values)))


def _sizes(axes: Axes, sizes: pd.Series) -> None:
    """The axis of bits per weight, up to at least the dense model's 16."""
    axes.set_xscale("log")
    low, high = log_limits(lowest(sizes), max(highest(sizes), 16.0), 0.05)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([size for size in SIZES if low <= size <= high]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("bits per weight, as stored")


def _points(
    axes: Axes,
    data: pd.DataFrame,
    dense: pd.DataFrame,
    front: pd.DataFrame,
    named: Sequence[tuple[Mapping[str, Any], int]],
    shown: Sequence[LegendEntry],
    style: Mapping[str, Look],
) -> None:
    """A panel: the methods' points, the front as a line, and its points' numbers."""
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    if len(front):
        axes.plot([*front["size"], right], [*front["value"], *front["value"].tail(1)], **FRONT)
    for label, _, comparison in shown:
        points = matching(data, label=label, comparison=comparison)
        sizes, values = (column(points, name).to_list() for name in ("size", "value"))
        mark = strokes(style[label], comparison)
        clear = {name: "none" for name in ("markerfacecolor", "markerfacecoloralt") if mark[name] == "white"}
        # Of cells with equal bits none hides another: open markers are clear, and small ones are above large ones.
        axes.plot(sizes, values, **{**mark, **clear, "linestyle": "none", "zorder": 3 - mark["markersize"] / 10})
        mark_beyond(axes, sizes, values, style[label])
    axes.plot(dense["size"], dense["value"], **DENSE)
    for row, number in named:  # on either side in turn, so that neighbours do not overlap; none is beyond the axis
        side = "left" if number % 2 == 0 else "right"
        shift = (4 if number % 2 == 0 else -4, -3)
        axes.annotate(
            str(number),
            (row["size"], min(row["value"], top)),
            shift,
            textcoords="offset points",
            ha=side,
            va="top",
            size=7,
        )
