"""The report page's chart of one cell, which Bokeh draws in the browser."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layerwise.figures.style import SPARE_COLOURS

if TYPE_CHECKING:
    from bokeh.plotting import figure as Plot

# Okabe and Ito's without black and yellow, which are lost on one of the two backgrounds.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", *SPARE_COLOURS)
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "x", "star")
GREY = "#7d7d7d"  # legible on both backgrounds


def chart(shapes: Sequence[Mapping[str, Any]]) -> str:
    """The drill-down's chart as Bokeh's JSON: error along the blocks, a line per kind of layer; page.js fills it."""
    from bokeh.core.types import ID
    from bokeh.embed import json_item

    kinds = list(dict.fromkeys(kind for shape in shapes for kind in shape["kind"]))
    drawn = _empty()
    _add_lines(drawn, kinds)
    _set_axes(drawn)
    if kinds:
        _place_legend(drawn)
    return json.dumps(json_item(drawn, ID("chart")))


def _empty() -> "Plot":
    from bokeh.models import Range1d
    from bokeh.plotting import figure

    return figure(
        height=340,
        sizing_mode="stretch_width",
        y_axis_type="log",
        x_range=Range1d(start=0, end=1),  # set to the cell's by page.js
        y_range=Range1d(start=0.01, end=1),
        x_axis_label="block",
        y_axis_label="output error",
        tools="pan,box_zoom,reset,save",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0,
        output_backend="svg",
    )


def _add_lines(drawn: "Plot", kinds: Sequence[str]) -> None:
    """A line with marks for each kind of layer, of data that page.js fills in."""
    from bokeh.models import ColumnDataSource, HoverTool

    for i, kind in enumerate(kinds):
        source = ColumnDataSource({"block": [], "error": [], "layer": []}, name=kind)
        colour = COLOURS[i % len(COLOURS)]
        drawn.line("block", "error", source=source, color=colour, legend_label=kind)
        marker = MARKERS[i % len(MARKERS)]
        drawn.scatter("block", "error", source=source, color=colour, size=7, marker=marker, legend_label=kind)
    drawn.add_tools(HoverTool(tooltips=[("layer", "@layer"), ("output error", "@error")]))


def _set_axes(drawn: "Plot") -> None:
    from bokeh.models import BasicTickFormatter, LogTicker

    drawn.yaxis.ticker = LogTicker(mantissas=[1, 2, 5])
    drawn.yaxis.formatter = BasicTickFormatter(use_scientific=True, precision=3)
    for axis in (*drawn.xaxis, *drawn.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = axis.axis_line_color = GREY
        axis.major_tick_line_color = axis.minor_tick_line_color = GREY
        axis.axis_label_text_font_style = "normal"
    drawn.grid.grid_line_color, drawn.grid.grid_line_alpha = GREY, 0.25
    drawn.toolbar.logo = None


def _place_legend(drawn: "Plot") -> None:
    legend = drawn.legend[0]
    legend.click_policy, legend.label_text_color, legend.orientation = "hide", GREY, "horizontal"
    legend.ncols = 4  # seven kinds in a row are wider than a phone
    legend.background_fill_alpha = legend.border_line_alpha = 0
    drawn.add_layout(legend, "below")
