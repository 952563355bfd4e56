"""The figure of convergence: a pure function from the `traces` and `layers` tables to a figure."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from layerwise.figures.page import (
    PLACE,
    chosen_target,
    entries,
    log_limits,
    log_scale,
    nothing,
    page,
    place_title,
)
from layerwise.figures.style import Look, looks, strokes

BOUND = {"color": "black", "linewidth": 0.9, "linestyle": (0, (6, 2))}


def convergence(traces: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """The error along the iterations, and along the seconds, of every method whose trace measures it, on one layer.

    Left out are traces of a criterion of the method's own. The layer is the one of the median error, the target that of
    the other figures. A relaxed error is that of no mask: the marker at the end of a line is the error of the result.
    """
    traces = traces[traces["criterion"] != "own"]
    if traces.empty:
        return nothing("No traces: none of the methods is iterative, or none has finished.")
    target = chosen_target(traces)
    traces, layers = traces[traces["target"] == target], layers[layers["target"] == target]
    shown = entries(traces)
    style = looks((label, method) for label, method, _ in shown)
    bands = list(traces.groupby([*PLACE, "comparison"], sort=False))
    results = layers.merge(traces[[*PLACE, "label"]].drop_duplicates())
    chosen = {place: typical_layer(part) for place, part in results.groupby(PLACE, sort=False)}
    certified = [Line2D([], [], label="no mask is better", **BOUND)] if layers["lower_bound"].notna().any() else []
    figure, frames = page([2.2] * len(bands), shown, certified)
    for frame, ((*place, comparison), part) in zip(frames, bands, strict=True):
        layer = chosen[tuple(place)]
        here = layers[(layers[PLACE] == place).all(axis=1) & (layers["layer"] == layer)].set_index("label")
        lines = [
            (label, own)
            for label, own in part[part["layer"] == layer].groupby("label", sort=False)
            if label in here.index
        ]
        for axes, column in zip(frame.subplots(1, 2, sharey=True), ("iteration", "seconds"), strict=True):
            _panel(axes, lines, here, column, comparison, style)
            axes.set_xlabel(column)
            if column == "iteration":
                axes.set_ylabel("output error")
        frame.suptitle(f"{place_title(*place)}, {target}, {layer}, {comparison}", x=0.01, ha="left")
    return figure


def typical_layer(layers: pd.DataFrame) -> str:
    """The layer of the median error, averaged over the methods."""
    errors = layers.groupby("layer")["output_error"].mean().sort_values(kind="stable")
    return str(errors.index[(len(errors) - 1) // 2])


def _panel(
    axes: Axes,
    lines: list[tuple[str, pd.DataFrame]],
    layer: pd.DataFrame,
    column: str,
    comparison: str,
    style: dict[str, Look],
) -> None:
    """layer: the rows of one layer by label, for the units of the objective and for the result's error."""
    values = []
    for label, trace in lines:
        result = layer.loc[label]
        # The objective is absolute; of a layer with nothing to lose both are zero.
        scale = result["output_error"] / result["absolute_error"] if result["absolute_error"] else 1.0
        errors = (trace["objective"] * scale).where(trace["objective"] > 0)  # zero has no place on a log axis
        look = strokes(style[label], comparison)
        axes.plot(trace[column], errors, **{**look, "markevery": 0.15, "markersize": 3, "zorder": 2})
        end = {**look, "linestyle": "none", "zorder": 3}
        axes.plot([trace[column].iloc[-1]], [result["output_error"]], **end)
        values += [*errors, result["output_error"]]
    bounds = layer["lower_bound"].dropna()
    if len(bounds) and comparison == "mask-only":
        axes.axhline(bounds.iloc[0], **BOUND)
        values.append(bounds.iloc[0])
    positive = [value for value in values if value > 0] or [0.1, 1.0]
    log_scale(axes, *log_limits(min(positive), max(positive)))
    axes.set_xscale("symlog", linthresh=1.0 if column == "iteration" else 1e-2, linscale=0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    last = max((trace[column].max() for _, trace in lines), default=0)
    axes.set_xlim(0, 1.3 * last or 1.0)  # 0: no method made a step
