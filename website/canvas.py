"""Boxes on a canvas in inches, for the pictures of the documentation."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

STAGES = {  # file of the rules -> what the stage is called, and its colour
    "calibrate.smk": ("model, text and calibration", "#dbe9f6"),
    "compress.smk": ("compression and bounds", "#fde3c8"),
    "evaluate.smk": ("evaluation", "#d9f0e3"),
    "collect.smk": ("tables, figures and report", "#eadcf0"),
}
INK = "#333333"


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """A rounded box, centred at x and y."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=colour, edgecolor=INK, linewidth=0.7,
    )  # fmt: skip
    axes.add_patch(shape)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose unit is an inch, without axes."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return figure, axes
