"""The figures of distributions over layers: pure functions from the `layers` table to a figure."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from layerwise.contract.target import SUM
from layerwise.figures.page import (
    PLACE,
    LegendEntry,
    dodge,
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
    groups,
    highest,
    lowest,
    matching,
    select,
    true_of_any,
)

REFERENCES = ("magnitude", "wanda")
POINTS_PER_BOX = 80  # more layers than this and single points are a smear: the box alone is drawn


def error_relative(layers: pd.DataFrame) -> Figure:
    """Distribution over the layers of each method's output_error divided by magnitude's, and by Wanda's, on the same
    layer, target, model, calibration set and mode. Targets that quantise are left out: neither reference quantises."""
    pruned = column(layers, "bits").isna() & (column(layers, "sparsity") > 0) & (column(layers, "comparison") != SUM)
    data = select(layers, pruned)
    if data.empty:
        return nothing("No layer errors of a pruned model: see the cells table for the reasons.")
    places = groups(data, PLACE)
    shown = entries(data)
    style = looks((label, method) for label, method, _ in shown)
    compared = [_compared(part) for _, part in places]
    figure, bands = page([1.6 * max(len(panels), 1) + 0.4 for panels in compared], shown)
    for band, (place, part), panels in zip(bands, places, compared, strict=True):
        targets = distinct_values(part, "target")
        axes = band.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (reference, data) in zip(axes, panels.items(), strict=False):
            _ratio_panel(axis, data, targets, reference, shown, style)
        axes[-1].set_xticks(range(len(targets)), targets)
        axes[-1].set_xlim(-0.5, len(targets) - 0.5)
        absent = [reference for reference in REFERENCES if reference not in panels]
        without = f" (no errors of {' and '.join(absent)} to compare with)" if absent else ""
        band.suptitle(place_title(*place) + without, x=0.01, ha="left")
    return figure


def _compared(layers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """reference -> the positive ratios to it, for the references that have any."""
    found = {reference: ratios(layers, reference) for reference in REFERENCES}
    positive = {reference: select(data, column(data, "ratio") > 0) for reference, data in found.items()}
    return {reference: data for reference, data in positive.items() if len(data)}


def ratios(layers: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Rows of `layers` with a column `ratio`, the error over that of the reference method on the same layer.

    The reference is the entry named like the method, else its first. Its own rows, and layers where its error is zero
    or absent, are left out.
    """
    base = matching(layers, method=reference)
    names = distinct_values(base, "label")
    name = reference if reference in names or not names else names[0]
    key = [*PLACE, "target", "layer"]
    base = columns_of(matching(select(base, column(base, "output_error") > 0), label=name), [*key, "output_error"])
    others = select(layers, column(layers, "label") != name)
    joined = others.merge(base, on=key, suffixes=("", "_reference"))
    return joined.assign(ratio=column(joined, "output_error") / column(joined, "output_error_reference"))


def _ratio_panel(
    axes: Axes,
    data: pd.DataFrame,
    targets: Sequence[str],
    reference: str,
    shown: Sequence[LegendEntry],
    style: dict[str, Look],
) -> None:
    axes.set_ylabel(f"error /\n{reference}'s")
    log_scale(axes, *log_limits(min(lowest(column(data, "ratio")), 1.0), max(highest(column(data, "ratio")), 1.0)))
    axes.axhline(1.0, color="black", linewidth=0.8, zorder=1)
    _boxes(axes, data, "ratio", targets, shown, style)


def gap_to_bound(layers: pd.DataFrame) -> Figure:
    """Distribution over the layers of gap_to_bound, the largest share of the error that another mask, or another matrix
    of the rank, could save."""
    data = select(layers, column(layers, "gap_to_bound").notna())
    if data.empty:
        return nothing(
            "No certified bounds: no cell selects masks or low ranks in shared mode, or certificates are off."
        )
    places = groups(data, PLACE)
    shown = entries(data)
    style = looks((label, method) for label, method, _ in shown)
    figure, bands = page([2.6] * len(places), shown)
    for band, (place, part) in zip(bands, places, strict=True):
        axes = band.subplots()
        targets = distinct_values(part, "target")
        _boxes(axes, part, "gap_to_bound", targets, shown, style)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        masks = column(part, "sparsity") > 0
        bounded = [name for name, some in (("mask", masks), ("matrix of the rank", ~masks)) if true_of_any(some)]
        axes.set_ylabel(f"share of the error above\nthe bound on every {' or '.join(bounded)}")
        axes.set_xticks(range(len(targets)), targets)
        axes.set_xlim(-0.5, len(targets) - 0.5)
        band.suptitle(place_title(*place), x=0.01, ha="left")
    return figure


def _boxes(
    axes: Axes,
    data: pd.DataFrame,
    measure: str,
    targets: Sequence[str],
    shown: Sequence[LegendEntry],
    style: dict[str, Look],
) -> None:
    """A box per target and entry of what a column measures."""
    for boundary in range(1, len(targets)):
        axes.axvline(boundary - 0.5, color="#dddddd", linewidth=0.5, zorder=0)
    present = [entry for entry in shown if entry[0] in set(data["label"])]
    # An empty slot between groups that are not to be compared.
    comparisons = list(dict.fromkeys(comparison for _, _, comparison in present))
    slots = len(present) + len(comparisons) - 1
    width = min(0.72 / slots, 0.16)
    for number, (label, _, comparison) in enumerate(present):
        for place, target in enumerate(targets):
            chosen = matching(data, label=label, comparison=comparison, target=target)
            if len(chosen):
                centre = place + dodge(number + comparisons.index(comparison), slots, width * (slots - 1))
                _box(axes, centre, 0.75 * width, column(chosen, measure).to_numpy(), style[label], comparison)


def _box(axes: Axes, centre: float, width: float, values: np.ndarray, look: Look, comparison: str) -> None:
    """Quartiles, whiskers at 5 and 95%, every point where they are few, and the method's marker on the median."""
    few = len(values) <= POINTS_PER_BOX
    line = {"color": look.colour, "linewidth": 0.9}
    filled = comparison in ("control", "mask-only")
    axes.boxplot(
        [values],
        positions=[centre],
        widths=width,
        whis=(5, 95),
        showfliers=not few,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"edgecolor": look.colour, "facecolor": look.colour + "55" if filled else "white", "linewidth": 0.9},
        whiskerprops=line,
        capprops=line,
        medianprops=line,
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": look.colour},
        zorder=2,
    )
    if few:
        # Golden-ratio steps spread neighbours apart and are the same on every run.
        spread = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * width * 0.8
        axes.plot(centre + spread, values, ".", color=look.colour, markersize=1.8, alpha=0.6, zorder=3)
    mark = {**strokes(look, comparison), "linestyle": "none", "zorder": 4, "markersize": 4}
    axes.plot([centre], [np.median(values)], **mark)
