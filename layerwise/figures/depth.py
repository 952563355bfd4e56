"""The figures of layer errors along the depth of a model: pure functions from the `layers` table to a figure."""

from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from layerwise.figures.errors import ratios
from layerwise.figures.page import (
    PLACE,
    Entry,
    chosen_target,
    entries,
    log_limits,
    log_scale,
    nothing,
    page,
    place_title,
)
from layerwise.figures.style import Look, looks, strokes
from layerwise.storage.table_schema import COMPARISONS

KINDS_PER_ROW = 4
TITLE_CHARACTERS = 32  # what stands beside each other above a panel


def error_along_depth(layers: pd.DataFrame) -> Figure:
    """output_error of the `layers` table along the blocks at one target, a panel per kind of layer."""
    if layers[layers["target"] != "dense"].empty:
        return nothing("No layer errors: see the cells table for the reasons.")
    target = chosen_target(layers)
    data = layers[layers["target"] == target]
    # An error of zero has no place on a log axis.
    value = data["output_error"].where(data["output_error"] > 0)
    return _depth(data.assign(value=value), "output error", _log)


def error_reduction(layers: pd.DataFrame) -> Figure:
    """Share of Wanda's error that a method saves, along the blocks at one target, a panel per kind of layer.

    As figures 1 and 2 of SparseFW's paper (arXiv 2510.13713); methods that update weights stand in a band of their own.
    """
    pruned = layers[layers["bits"].isna() & (layers["sparsity"] > 0) & (layers["comparison"] != "control")]
    data = ratios(pruned, "wanda")
    if data.empty:
        return nothing("No errors to compare with Wanda's: the study has no wanda, or nothing beside it.")
    data = data[data["target"] == chosen_target(data)]
    return _depth(data.assign(value=1 - data["ratio"]), "error saved", _share)


def _log(axes: Axes, values: pd.Series) -> None:
    log_scale(axes, *log_limits(values.min(), values.max()) if values.notna().any() else (0.1, 1.0))


def _share(axes: Axes, values: pd.Series) -> None:
    low = max(min(0.0, float(values.min())), -0.5)  # what is far worse than Wanda leaves the panel
    axes.set_ylim(1.05 * low, 1.05 * max(float(values.max()), 0.1))
    axes.axhline(0.0, color="black", linewidth=0.8, zorder=1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _depth(data: pd.DataFrame, name: str, scale: Callable[[Axes, pd.Series], None]) -> Figure:
    """A page of bands of panels of the column `value` at one target.

    What may fairly be compared stands in one band; a control stands beside the masks.
    """
    shown = entries(data)
    style = looks((label, method) for label, method, _ in shown)
    group = data["comparison"].replace("control", "mask-only")
    data = data.assign(group=pd.Categorical(group, [name for name in COMPARISONS if name in set(group)]))
    bands = [
        (f"{place_title(*place)}, {part['target'].iloc[0]}, {own}", band)
        for place, part in data.groupby(PLACE, sort=False)
        for own, band in part.groupby("group", observed=True)
    ]
    rows = [-(-part["kind"].nunique() // KINDS_PER_ROW) for _, part in bands]
    figure, frames = page([1.45 * count + 0.3 for count in rows], shown)
    for frame, (title, part), count in zip(frames, bands, rows, strict=True):
        _band(frame, part, count, shown, style, name, scale)
        frame.suptitle(title, x=0.01, ha="left")
    return figure


def _band(
    band: SubFigure,
    data: pd.DataFrame,
    rows: int,
    shown: Sequence[Entry],
    style: dict[str, Look],
    name: str,
    scale: Callable[[Axes, pd.Series], None],
) -> None:
    """A panel per kind of layer. Layers of one kind in one block, such as experts, are averaged."""
    kinds = list(data["kind"].drop_duplicates())
    columns = min(KINDS_PER_ROW, len(kinds))
    axes = band.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    blocks = range(int(data["block"].min()), int(data["block"].max()) + 1)
    mean = data.groupby(["kind", "label", "comparison", "block"])["value"].mean()
    lines = set(mean.index.droplevel("block"))
    for index, axis in enumerate(axes.flat):
        if index >= len(kinds):
            axis.set_axis_off()
            continue
        kind = kinds[index]
        scale(axis, data["value"])
        for label, _, comparison in shown:
            if (kind, label, comparison) in lines:
                values = mean[kind, label, comparison].reindex(blocks)
                every = max(1, len(blocks) // 8)
                axis.plot(blocks, values, markevery=every, **strokes(style[label], comparison))
        axis.set_title(kind, loc="left", fontweight="bold")
        shared = str(data.loc[data["kind"] == kind, "tap"].iloc[0]).split(",")
        if len(shared) > 1:
            note = "input of " + ", ".join(part.strip().removesuffix("_proj") for part in shared)
            fits = len(kind) + len(note) <= TITLE_CHARACTERS
            axis.set_title(note if fits else f"input of {len(shared)}", loc="right", fontsize=6.5, color="#555555")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.margins(x=0.06)
        axis.tick_params(labelbottom=index + columns >= len(kinds))  # the lowest panel of its column
        if index + columns >= rows * columns:
            axis.set_xlabel("block")
        if index % columns == 0:
            axis.set_ylabel(name)
