"""The figure of a sweep: a pure function from the `cells` table to a figure."""

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from layerwise.figures.page import beyond, entries, log_limits, log_scale, mark_beyond, not_drawn, nothing, page
from layerwise.figures.style import Look, looks, strokes
from layerwise.storage.frames import column, distinct_values, groups, highest, lowest, matching, missing, select
from layerwise.storage.frames import rows as rows_of
from layerwise.study.allocation_entries import UNIFORM
from layerwise.study.cell import canonical
from layerwise.study.plan_checks import SWEPT_TARGET

DENSE = {"color": "black", "linestyle": (0, (6, 2)), "linewidth": 0.9, "zorder": 1}
METRICS = {"mean_output_error": "mean output error", "perplexity": "perplexity"}
TARGET = ["sparsity", "pattern", "bits", "group", "symmetric"]
NAMES = {
    "calibration": "calibration set",
    "calibration_samples": "calibration sequences",
    "calibration_length": "tokens per calibration sequence",
    "calibration_seed": "seed of the calibration",
    "group": "inputs per group",
}
BROKEN = 100  # times the lowest value: what is worse is beyond the axis
# Parts of a target's label that have no column of their own and are not swept.
OTHER_FIELDS = re.compile(r"\b(?:sym|nvfp4|mxfp4|rank \S+%(?: \d+b(?: g\d+)?)?)(?=\s|$)")
LOGARITHMIC = 8  # ratio of the largest to the smallest swept value from which the x axis is logarithmic


def sweep(cells: pd.DataFrame) -> Figure:
    """Mean output error and perplexity of the `cells` table along the quantity that the study sweeps.

    A band per model, mode, text and whatever else of calibration and target is not swept; a line per entry of the
    config. An entry that does not have the swept parameter is a horizontal line.
    """
    swept = list(column(cells, "swept").dropna().unique())
    compressed = select(cells, column(cells, "metric").isin(list(METRICS)) & (column(cells, "target") != "dense"))
    if len(swept) != 1 or compressed.empty:
        return nothing("The study sweeps nothing: its config has no `sweep`.")
    data = along(compressed, swept[0])
    done = select(data, column(data, "value").notna())
    if done.empty:
        return nothing("No result along the sweep: see the cells table for the reasons.")
    shown = entries(done)
    style = looks((label, method) for label, method, _ in shown)
    dense = matching(select(cells, column(cells, "value").notna()), metric="perplexity", target="dense")
    bands = groups(matching(done, metric="perplexity"), ["band", "text"])
    swept_values = list(dict.fromkeys(column(done, "x").dropna()))
    extra = [Line2D([], [], label="dense", **DENSE)] if len(dense) else []
    panels = []
    for (name, text), perplexities in bands:
        errors = matching(done, metric="mean_output_error", band=name)
        model = distinct_values(perplexities, "model")[0]
        level = column(matching(dense, model=model, text=text), "value").to_list()[:1]
        panels.append([(part, levels, _limits(part, levels)) for part, levels in ((errors, []), (perplexities, level))])
    points = ((select(part, column(part, "x").notna()), limits) for pair in panels for part, _, limits in pair)
    extra += beyond((column(part, "value"), limits[1]) for part, limits in points if limits)
    figure, subfigures = page([2.5] * len(bands), shown, extra, not_drawn(data))
    for band, ((name, text), _), pair in zip(subfigures, bands, panels, strict=True):
        both = band.subplots(1, 2, squeeze=False)[0]
        for axes, (part, levels, limits), metric in zip(both, pair, METRICS, strict=True):
            if limits:
                log_scale(axes, *limits)
            _panel(axes, part, levels, swept[0], swept_values, shown, style)
            axes.set_ylabel(METRICS[metric])
        band.suptitle(f"{name}, perplexity on {text}", x=0.01, ha="left")
    return figure


def _limits(data: pd.DataFrame, levels: Sequence[float]) -> tuple[float, float] | None:
    """Range of a panel's axis, on which there is no zero; None without a value. levels: of the dense model."""
    positive = column(select(data, column(data, "value") > 0), "value")
    if positive.empty:
        return None
    least = min([lowest(positive), *levels])
    return log_limits(least, min(highest(positive), BROKEN * least))


def along(cells: pd.DataFrame, swept: str) -> pd.DataFrame:
    """The rows with `x`, the swept value (empty where the entry has none), the entry's `label` without it, `band`."""
    rows = cells.copy()
    values = column(rows, swept) if swept in rows else [json.loads(text).get(swept) for text in column(rows, "params")]
    # A nullable column gives numbers of numpy and pd.NA, of which canonical knows neither.
    x = [_plain(value) for value in values]
    labels = [_series(label, swept, value) for label, value in zip(column(rows, "label"), x, strict=True)]
    bands = [_band(row, swept) for row in rows_of(rows)]
    return rows.assign(x=pd.Series(x, index=rows.index, dtype=object), label=labels, band=bands)


def _plain(value: Any) -> Any:
    if missing(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def _series(label: str, swept: str, value: Hashable) -> str:
    """The name of a config's entry, from the label of one value of its sweep."""
    return label.replace(f".{swept}_{value if isinstance(value, str) else canonical(value)}", "")


def _band(row: Mapping[str, Any], swept: str) -> str:
    """Title of the panels of a row: all that is not swept."""
    parts = [row["model"], f"{row['mode']} calibration"]
    if not swept.startswith("calibration"):
        parts[1] += f" on {row['calibration']}"
    if swept not in SWEPT_TARGET:
        return ", ".join([*parts, row["target"]])
    spread = [] if row["allocation"] == UNIFORM else [f"allocated by {row['allocation']}"]
    rest = {name: row[name] for name in TARGET if name != swept and not missing(row[name])}
    words = [f"{rest['sparsity']:.0%}"] if rest.get("sparsity") else []
    words += [rest["pattern"]] if row["sparsity"] else []
    words += [f"{rest['bits']} bits"] if "bits" in rest else []
    words += [f"groups of {rest['group']}"] if "group" in rest else []
    words += OTHER_FIELDS.findall(row["target"])
    return ", ".join([*parts, " ".join(words), *spread])


def _panel(
    axes: Axes,
    data: pd.DataFrame,
    levels: Sequence[float],
    swept: str,
    values: Sequence[Any],
    shown: Sequence[tuple[str, str, str]],
    style: dict[str, Look],
) -> None:
    numeric = not any(isinstance(value, str) for value in values)
    places = {value: value if numeric else place for place, value in enumerate(sorted(values) if numeric else values)}
    for level in levels:
        axes.axhline(level, **DENSE)
    for label, _, comparison in shown:
        points = matching(data, label=label, comparison=comparison)
        empty = column(points, "x").isna()
        line = column(select(points, ~empty).set_index("x"), "value")
        look = strokes(style[label], comparison)
        for level in column(select(points, empty), "value"):
            axes.axhline(level, color=look["color"], linestyle=look["linestyle"], linewidth=0.9, zorder=1)
        if line.empty:
            continue
        # A value without a result breaks the line: nothing is drawn through what was not measured.
        drawn = line.reindex(places)
        axes.plot(list(places.values()), drawn, **{**look, "linestyle": look["linestyle"] if numeric else "none"})
        mark_beyond(axes, list(places.values()), list(drawn), style[label])
    _x_axis(axes, places, swept, numeric)


def _x_axis(axes: Axes, places: Mapping[Any, Any], swept: str, numeric: bool) -> None:
    low, high = min(places.values()), max(places.values())
    if numeric and low > 0 and high / low >= LOGARITHMIC:
        axes.set_xscale("log")
        axes.set_xlim(*log_limits(low, high))
    else:
        spread = (high - low) or 1
        axes.set_xlim(low - 0.05 * spread, high + 0.05 * spread)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(list(places.values())))
    percent = swept == "sparsity"
    names = [f"{100 * v:g}%" if percent else f"{v:g}" if numeric else str(v) for v in places]
    axes.set_xticks(list(places.values()), names)
    if not numeric:
        axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel(NAMES.get(swept, swept.replace("_", " ")))
