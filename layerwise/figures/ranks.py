"""The figure of ranks: a pure function from the `comparisons` and `layers` tables to a figure."""

from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from layerwise.figures.page import PLACE, entries, nothing, page, place_title
from layerwise.figures.style import Look, looks, strokes
from layerwise.results.significance import bars
from layerwise.storage.frames import column, groups_by, matching, select, tuples
from layerwise.storage.frames import groups as groups_of
from layerwise.storage.table_schema import COMPARISONS

COLUMNS = 2  # panels beside each other
STEP = 0.17  # inches per method
BAR = {"color": "black", "linewidth": 2.5, "solid_capstyle": "butt", "zorder": 3}


class Group(NamedTuple):
    """Methods of one comparison group on one target: mean ranks by label, ascending; which pairs differ."""

    comparison: str
    ranks: pd.Series
    different: set[frozenset[str]]

    def bars(self) -> list[tuple[int, int]]:
        """Runs of methods, by their places in the order of ranks, that no test distinguishes."""
        names = list(self.ranks.index)
        return bars(len(names), lambda first, second: frozenset((names[first], names[second])) in self.different)


def method_ranks(comparisons: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """Mean rank of each method's output_error over layers and seeds among those of its group, a panel per target; a bar
    joins methods between which the `comparisons` table shows no difference."""
    data = matching(comparisons, metric="output_error")
    if data.empty:
        return nothing("No ranks: no target has two finished methods of one group.")
    shown = [entry for entry in entries(layers) if entry[0] in {*data["label"], *data["other"]}]
    style = looks((label, method) for label, method, _ in shown)
    bands = []
    for place, part in groups_of(data, PLACE):
        here = matching(layers, **dict(zip(PLACE, place, strict=True)))
        panels = [(target, groups(pairs, matching(here, target=target))) for target, pairs in groups_by(part, "target")]
        rows = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
        bands.append((place_title(*place), rows))
    heights = [[STEP * max(map(_lines, row)) + 0.55 for row in rows] for _, rows in bands]
    figure, frames = page([sum(band) + 0.25 for band in heights], shown)
    for frame, (title, rows), ratios in zip(frames, bands, heights, strict=True):
        axes = frame.subplots(len(rows), COLUMNS, squeeze=False, height_ratios=ratios)
        panels = [panel for row in rows for panel in row]
        for axis, (target, ranked) in zip(axes.flat, panels, strict=False):
            _panel(axis, target, ranked, style)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        frame.suptitle(f"{title}: rank of the output error", x=0.01, ha="left")
    return figure


def groups(pairs: pd.DataFrame, layers: pd.DataFrame) -> list[Group]:
    """The groups of one place and target, from its rows of both tables.

    Ranks are those of the layers and seeds that all methods of the group have, ties shared.
    """
    found = []
    for comparison in COMPARISONS:
        here = matching(pairs, comparison=comparison)
        if here.empty:
            continue
        compared = {*column(here, "label"), *column(here, "other")}
        errors = matching(layers, comparison=comparison)
        errors = errors.pivot(index="label", columns=["seed", "layer"], values="output_error")
        errors = select(errors, pd.Series(errors.index.isin(list(compared)), index=errors.index))
        ranks = errors.dropna(axis=1).rank(axis=0).mean(axis=1).sort_values(kind="stable")
        apart = select(here, column(here, "verdict").isin(["better", "worse"]))
        different = {frozenset(pair) for pair in tuples(apart, ["label", "other"])}
        found.append(Group(comparison, ranks, different))
    return found


def _lines(panel: tuple[str, list[Group]]) -> int:
    return sum(len(group.ranks) + 1 for group in panel[1])


def _panel(axes: Axes, target: str, found: list[Group], style: dict[str, Look]) -> None:
    """Methods below each other in the order of their ranks, group after group, bars to the left of their points."""
    line, ticks = 0, {}
    most = max(len(group.ranks) for group in found)
    for group in found:
        axes.text(most + 0.45, line, group.comparison, ha="right", va="center", fontsize=6.5, color="#555555")
        first = line = line + 1
        for label, rank in zip(map(str, group.ranks.index), group.ranks, strict=True):
            axes.plot([1, rank], [line, line], color="#dddddd", linewidth=0.6, zorder=1)
            axes.plot([rank], [line], **{**strokes(style[label], group.comparison), "linestyle": "none", "zorder": 4})
            ticks[line] = f"{label}  {rank:.2f}"
            line += 1
        for number, (start, end) in enumerate(group.bars()):
            x = 0.85 - 0.14 * number
            axes.plot([x, x], [first + start - 0.25, first + end + 0.25], **BAR)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(line - 0.4, -0.6)
    axes.set_xlim(0.7 - 0.14 * max(len(group.bars()) for group in found), most + 0.5)
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.set_title(target, loc="left", fontweight="bold")
    axes.grid(visible=False)
    axes.set_xlabel("mean rank")
