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
from layerwise.storage.frames import (
    column,
    columns_of,
    distinct_values,
    entry,
    groups,
    groups_by,
    highest,
    matching,
    select,
    true_of_any,
)

BOUND = {"color": "black", "linewidth": 0.9, "linestyle": (0, (6, 2))}


def convergence(traces: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """The error along the iterations, and along the seconds, of every method whose trace measures it, on one layer.

    Traces of a criterion of the method's own are left out. The layer is the one with the median error, and the target
    is that of the other figures. A relaxed error belongs to no mask, so the marker at the end of a line is the error
    of the result, and a note above the legend says so.
    """
    traces = select(traces, column(traces, "criterion") != "own")
    if traces.empty:
        return nothing("No traces: none of the methods is iterative, or none has finished.")
    target = chosen_target(traces)
    traces, layers = matching(traces, target=target), matching(layers, target=target)
    shown = entries(traces)
    style = looks((label, method) for label, method, _ in shown)
    bands = groups(traces, [*PLACE, "comparison"])
    results = layers.merge(columns_of(traces, [*PLACE, "label"]).drop_duplicates())
    chosen = {place: typical_layer(part) for place, part in groups(results, PLACE)}
    bounded = true_of_any(column(layers, "lower_bound").notna())
    certified = [Line2D([], [], label="no mask is better", **BOUND)] if bounded else []
    figure, frames = page([2.2] * len(bands), shown, certified, _relaxed(traces))
    for frame, ((*place, comparison), part) in zip(frames, bands, strict=True):
        layer = chosen[tuple(place)]
        here = matching(layers, **dict(zip(PLACE, place, strict=True)), layer=layer).set_index("label")
        lines = [
            (label, trace) for label, trace in groups_by(matching(part, layer=layer), "label") if label in here.index
        ]
        for axes, unit in zip(frame.subplots(1, 2, sharey=True), ("iteration", "seconds"), strict=True):
            _panel(axes, lines, here, unit, comparison, style)
            axes.set_xlabel(unit)
            if unit == "iteration":
                axes.set_ylabel("output error")
        frame.suptitle(f"{place_title(*place)}, {target}, {layer}, {comparison}", x=0.01, ha="left")
    return figure


def _relaxed(traces: pd.DataFrame) -> str:
    """A note on the lines that are not errors of masks."""
    names = distinct_values(matching(traces, criterion="relaxed error"), "label")
    if not names:
        return ""
    return (
        f"A line of {' or '.join(names)} is the error of a relaxed mask; the marker at its end is the error of the "
        "result."
    )


def typical_layer(layers: pd.DataFrame) -> str:
    """The layer of the median error, averaged over the methods."""
    errors = {layer: column(part, "output_error").mean() for layer, part in groups_by(layers, "layer", sort=True)}
    ordered = sorted(errors, key=errors.__getitem__)
    return str(ordered[(len(ordered) - 1) // 2])


def _panel(
    axes: Axes,
    lines: list[tuple[str, pd.DataFrame]],
    layer: pd.DataFrame,
    unit: str,
    comparison: str,
    style: dict[str, Look],
) -> None:
    """layer: the rows of one layer by label, for the units of the objective and for the result's error."""
    values = []
    for label, trace in lines:
        error, absolute = (entry(layer, label, name) for name in ("output_error", "absolute_error"))
        # The objective is absolute; of a layer with nothing to lose both are zero.
        scale = error / absolute if absolute else 1.0
        objective = column(trace, "objective")
        errors = (objective * scale).where(objective > 0)  # zero has no place on a log axis
        look = strokes(style[label], comparison)
        axes.plot(trace[unit], errors, **{**look, "markevery": 0.15, "markersize": 3, "zorder": 2})
        end = {**look, "linestyle": "none", "zorder": 3}
        axes.plot([trace[unit].iloc[-1]], [error], **end)
        values += [*errors, error]
    bounds = column(layer, "lower_bound").dropna()
    if len(bounds) and comparison == "mask-only":
        axes.axhline(bounds.iloc[0], **BOUND)
        values.append(bounds.iloc[0])
    positive = [value for value in values if value > 0] or [0.1, 1.0]
    log_scale(axes, *log_limits(min(positive), max(positive)))
    axes.set_xscale("symlog", linthresh=1.0 if unit == "iteration" else 1e-2, linscale=0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    last = max((highest(column(trace, unit)) for _, trace in lines), default=0.0)
    axes.set_xlim(0, 1.3 * last or 1.0)  # 0: no method made a step
