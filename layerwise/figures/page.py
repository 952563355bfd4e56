"""The frame of all figures: stacked bands over one legend, readable logarithmic axes, words for what is absent."""

import math
import textwrap
from collections.abc import Iterable, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from layerwise.figures.style import WIDTH, Look, looks, strokes
from layerwise.storage.frames import column, distinct, distinct_tuples, rows, select, sorted_by, true_of_any
from layerwise.storage.table_schema import COMPARISONS

LegendEntry = tuple[str, str, str]  # label, method, comparison
LegendItem = tuple[Line2D, str]  # handle, text
PLACE = ["model", "calibration", "mode"]  # names a band of panels
BEYOND = {"linestyle": "none", "marker": 6, "markersize": 5}  # an arrowhead that points up
WORDS = {"perplexity": "perplexity", "kl": "KL from the dense model"}  # a metric's name in titles
AXES = {"perplexity": "perplexity", "kl": "KL from dense, nats per token"}
LINE = 0.15  # inches per line of the legend
# (below this ratio of the axis' ends, ticks per decade) of a logarithmic axis
TICKS = ((10, (1, 1.5, 2, 3, 5)), (20, (1, 2, 3, 5)), (60, (1, 2, 5)), (1000, (1, 3)), (math.inf, (1,)))
LETTER, HANDLE = 0.065, 0.6  # inches in it: of a bold letter, and of a handle with the space beside a column


def place_title(model: str, calibration: str, mode: str) -> str:
    return f"{model}, {mode} calibration on {calibration}"


def entries(data: pd.DataFrame) -> list[LegendEntry]:
    """The distinct (label, method, comparison) of a table, in its order, comparisons together."""
    found = distinct_tuples(data, ["label", "method", "comparison"])
    return sorted(found, key=lambda entry: COMPARISONS.index(entry[2]))


def chosen_target(layers: pd.DataFrame) -> str:
    """The target that a figure of one target shows: 60% row, else the middle one of those that prune, else of all."""
    targets = distinct(select(layers, column(layers, "target") != "dense"), ["target"])
    pruning = select(targets, (column(targets, "sparsity") > 0) & column(targets, "bits").isna())
    candidates = sorted_by(pruning if len(pruning) else targets, ["sparsity"])
    ordered = column(candidates, "target").to_list()
    return "60% row" if "60% row" in ordered else str(ordered[(len(ordered) - 1) // 2])


def page(
    heights: Sequence[float], shown: Sequence[LegendEntry], extra: Sequence[Line2D] = (), note: str = ""
) -> tuple[Figure, list[SubFigure]]:
    """An empty figure of full width with one band per height, in inches, above the legend.

    shown: (label, method, comparison) of the legend, one column per comparison as far as they fit side by side; extra:
    handles of a column of their own; note: text above the legend, such as what is not drawn.
    """
    columns = _fitting(_legend_columns(shown, extra))
    depth = max(map(len, columns), default=0)
    lines = textwrap.wrap(note, 130)
    below = LINE * (depth + len(lines)) + 0.1
    figure = Figure(figsize=(WIDTH, sum(heights) + below), layout="constrained")
    *bands, bottom = figure.subfigures(len(heights) + 1, 1, height_ratios=[*heights, below], squeeze=False)[:, 0]
    if depth:
        _draw_legend(bottom, columns, depth, "\n".join(lines))
    return figure, bands


def _draw_legend(place: SubFigure, columns: Sequence[Sequence[LegendItem]], depth: int, title: str) -> None:
    """A legend of columns, each filled up to the same depth; names of comparisons are bold."""
    padded = [item for column in columns for item in [*column, *[_blank()] * (depth - len(column))]]
    legend = place.legend(
        [handle for handle, _ in padded],
        [text for _, text in padded],
        ncols=len(columns),
        loc="upper center",
        bbox_to_anchor=(0.5, 1.0),
        borderaxespad=0.1,
        handlelength=3.0,
        columnspacing=2.0,
        labelspacing=0.35,
        title=title or None,
        title_fontsize=7,
    )
    for text in legend.get_texts():
        if text.get_text() in COMPARISONS:
            text.set_fontweight("bold")


def _legend_columns(shown: Sequence[LegendEntry], extra: Sequence[Line2D]) -> list[list[LegendItem]]:
    style = looks((label, method) for label, method, _ in shown)
    columns = []
    for comparison in COMPARISONS:
        group = [label for label, _, group_of in shown if group_of == comparison]
        if group:
            lines = [(Line2D([], [], label=label, **strokes(style[label], comparison)), label) for label in group]
            columns.append([_blank(comparison), *lines])
    if extra:
        columns.append([(line, str(line.get_label())) for line in extra])
    return columns


def _fitting(columns: list[list[LegendItem]]) -> list[list[LegendItem]]:
    """The columns, of which the shortest neighbours are stacked until all fit into the width of the figure."""
    while len(columns) > 1 and sum(map(_width, columns)) > WIDTH:
        place = min(range(len(columns) - 1), key=lambda i: len(columns[i]) + len(columns[i + 1]))
        columns[place : place + 2] = [[*columns[place], _blank(), *columns[place + 1]]]
    return columns


def _width(column: Sequence[LegendItem]) -> float:
    return HANDLE + LETTER * max(len(text) for _, text in column)


def _blank(text: str = "") -> LegendItem:
    """An item without a line or marker."""
    return Line2D([], [], linestyle="none"), text


def nothing(sentence: str) -> Figure:
    """A figure with the reason why nothing is drawn, so that a partial study still has a report."""
    figure = Figure(figsize=(WIDTH, 1.0), layout="constrained")
    figure.text(0.5, 0.5, sentence, ha="center", va="center")
    return figure


def not_drawn(cells: pd.DataFrame) -> str:
    """A note on cells without a value: label, target and mode of up to six."""
    absent = select(cells, column(cells, "value").isna())
    words = [
        f"{row['label']} {row['target']} {row['mode']} ({row['status'] if row['status'] != 'done' else 'diverged'})"
        for row in rows(absent)
    ]
    words = list(dict.fromkeys(words))
    more = f" and {len(words) - 6} more" if len(words) > 6 else ""
    return f"Not drawn: {', '.join(words[:6])}{more}." if words else ""


def log_limits(low: float, high: float, margin: float = 0.07) -> tuple[float, float]:
    """[low, high] with a margin on either side, as a share of the logarithmic length."""
    spread = max(high / low, 1.02) ** margin
    return low / spread, high * spread


def log_scale(axes: Axes, low: float, high: float) -> None:
    """A logarithmic y axis over [low, high] with a handful of plain numbers as ticks."""
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ratio = high / low
    if ratio < 4:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
    else:
        subs = next(ticks for below, ticks in TICKS if ratio < below)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def dodge(position: int, count: int, width: float) -> float:
    """Offset of the position-th of `count` marks that share a place `width` wide."""
    return 0.0 if count < 2 else width * (position / (count - 1) - 0.5)


def beyond(axes: Iterable[tuple[pd.Series, float]]) -> list[Line2D]:
    """A handle for the legend that explains `mark_beyond`; none if no value is above its axis.

    axes: for each axis the values and its upper end.
    """
    if not any(true_of_any(values > top) for values, top in axes):
        return []
    return [Line2D([], [], label="beyond the axis", color="#8c8c8c", **BEYOND)]


def mark_beyond(axes: Axes, x: Sequence[float], values: Sequence[float], own: Look) -> None:
    """Mark values above the axis with an arrowhead on its upper edge."""
    top = axes.get_ylim()[1]
    outside = [place for place, value in zip(x, values, strict=True) if value > top]
    if outside:
        axes.plot(outside, [top] * len(outside), color=own.colour, clip_on=False, **BEYOND)[0].set_in_layout(False)
