"""The figures of layer errors along the depth of a model: pure functions from the `layers` table to a figure."""

import math
from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from layerwise.contract.target import SUM
from layerwise.figures.errors import ratios
from layerwise.figures.page import (
    PLACE,
    LegendEntry,
    chosen_target,
    entries,
    log_limits,
    log_scale,
    nothing,
    page,
    place_title,
)
from layerwise.figures.style import Look, looks, strokes
from layerwise.storage.frames import (
    column,
    distinct_values,
    groups,
    groups_by,
    highest,
    lowest,
    matching,
    select,
    true_of_any,
)
from layerwise.storage.table_schema import COMPARISONS

KINDS_PER_ROW = 4
TITLE_CHARACTERS = 32  # titles side by side above a panel


def error_along_depth(layers: pd.DataFrame) -> Figure:
    """output_error of the `layers` table along the blocks at one target, a panel per kind of layer."""
    if select(layers, column(layers, "target") != "dense").empty:
        return nothing("No layer errors: see the cells table for the reasons.")
    target = chosen_target(layers)
    data = matching(layers, target=target)
    error = column(data, "output_error")
    # An error of zero has no place on a log axis.
    return _depth(data.assign(value=error.where(error > 0)), "output error", _log)


def error_reduction(layers: pd.DataFrame) -> Figure:
    """Share of Wanda's error that a method saves, along the blocks at one target, a panel per kind of layer.

    As figures 1 and 2 of SparseFW's paper (arXiv 2510.13713); methods that update weights have a band of their own.
    """
    pruned = column(layers, "bits").isna() & (column(layers, "sparsity") > 0) & (column(layers, "comparison") != SUM)
    data = ratios(select(layers, pruned & (column(layers, "comparison") != "control")), "wanda")
    if data.empty:
        return nothing("No errors to compare with Wanda's: the study has no wanda, or no other method.")
    data = matching(data, target=chosen_target(data))
    return _depth(data.assign(value=1 - column(data, "ratio")), "error saved\nover Wanda", _share)


def _log(axes: Axes, values: pd.Series) -> None:
    log_scale(axes, *log_limits(lowest(values), highest(values)) if true_of_any(values.notna()) else (0.1, 1.0))


def _share(axes: Axes, values: pd.Series) -> None:
    low = max(min(0.0, lowest(values)), -0.5)  # values far worse than Wanda's leave the panel
    axes.set_ylim(1.05 * low, 1.05 * max(highest(values), 0.1))
    axes.axhline(0.0, color="black", linewidth=0.8, zorder=1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _depth(data: pd.DataFrame, name: str, scale: Callable[[Axes, pd.Series], None]) -> Figure:
    """A page of bands of panels of the column `value` at one target.

    Methods that may fairly be compared share a band; a control is drawn beside the masks.
    """
    shown = entries(data)
    style = looks((label, method) for label, method, _ in shown)
    data = data.assign(group=column(data, "comparison").replace("control", "mask-only"))
    bands = [
        (f"{place_title(*place)}, {distinct_values(part, 'target')[0]}, {group}", band)
        for place, part in groups(data, PLACE)
        for group, band in sorted(groups_by(part, "group"), key=lambda pair: COMPARISONS.index(pair[0]))
    ]
    rows = [-(-len(distinct_values(part, "kind")) // KINDS_PER_ROW) for _, part in bands]
    figure, frames = page([1.45 * count + 0.3 for count in rows], shown)
    for frame, (title, part), count in zip(frames, bands, rows, strict=True):
        _band(frame, part, count, shown, style, name, scale)
        frame.suptitle(title, x=0.01, ha="left")
    return figure


def _band(
    band: SubFigure,
    data: pd.DataFrame,
    rows: int,
    shown: Sequence[LegendEntry],
    style: dict[str, Look],
    name: str,
    scale: Callable[[Axes, pd.Series], None],
) -> None:
    """A panel per kind of layer. Layers of one kind in one block, such as experts, are averaged."""
    kinds = distinct_values(data, "kind")
    columns = min(KINDS_PER_ROW, len(kinds))
    axes = band.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    blocks = range(int(lowest(column(data, "block"))), int(highest(column(data, "block"))) + 1)
    for index, axis in enumerate(axes.flat):
        if index >= len(kinds):
            axis.set_axis_off()
            continue
        kind = kinds[index]
        part = matching(data, kind=kind)
        scale(axis, column(data, "value"))
        for label, _, comparison in shown:
            line = matching(part, label=label, comparison=comparison)
            if len(line):
                mean = {block: column(here, "value").mean() for block, here in groups_by(line, "block")}
                every = max(1, len(blocks) // 8)
                values = [mean.get(block, math.nan) for block in blocks]
                axis.plot(blocks, values, markevery=every, **strokes(style[label], comparison))
        _title(axis, kind, str(distinct_values(part, "tap")[0]).split(","))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.margins(x=0.06)
        axis.tick_params(labelbottom=index + columns >= len(kinds))  # the lowest panel of its column
        if index + columns >= rows * columns:
            axis.set_xlabel("block")
        if index % columns == 0:
            axis.set_ylabel(name)


def _title(axes: Axes, kind: str, shared: Sequence[str]) -> None:
    """The kind of a panel's layers, and which layers share their input."""
    axes.set_title(kind, loc="left", fontweight="bold")
    if len(shared) > 1:
        note = "input of " + ", ".join(name.strip().removesuffix("_proj") for name in shared)
        fits = len(kind) + len(note) <= TITLE_CHARACTERS
        axes.set_title(note if fits else f"input of {len(shared)}", loc="right", fontsize=6.5, color="#555555")
