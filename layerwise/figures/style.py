"""The look of every figure: one colour and marker per method, for good; bytes that depend on the data alone.

A method keeps its colour and marker in every figure and study. Filled markers on solid lines leave the kept weights as
they are, open markers on dashed lines change them. Colours are Okabe and Ito's and Tol's muted ones, which colour-blind
readers tell apart; the marker says the same without colour.
"""

import zlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.figure import Figure

WIDTH = 7.0  # inches, the text width of a two-column page
RC = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "figure.titlesize": 9,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "layerwise",
    "path.simplify": False,
}
# Neither date nor version: the bytes change when the picture does.
METADATA = {
    ".pdf": {"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None},
    ".svg": {"Date": None, "Creator": None},
    ".png": {"Software": None},
}


class Look(NamedTuple):
    colour: str
    marker: str


LOOKS = {
    "dense": Look("#000000", "_"),
    "random": Look("#8c8c8c", "x"),
    "magnitude": Look("#E69F00", "o"),
    "wanda": Look("#0072B2", "s"),
    "ria": Look("#56B4E9", "^"),
    "dsnot": Look("#332288", "D"),
    "sparse_swaps": Look("#117733", "v"),
    "frank_wolfe": Look("#CC79A7", "P"),
    "sparsegpt": Look("#D55E00", "o"),
    "alps": Look("#009E73", "s"),
    "admm": Look("#882255", "^"),
    "awp": Look("#AA4499", "D"),
    "reconstruct": Look("#999933", "v"),
    "rtn": Look("#E69F00", "X"),
    "gptq": Look("#D55E00", "h"),
    "awq": Look("#0072B2", "X"),
    "gqsa": Look("#009E73", "p"),
}
SPARE_COLOURS = ("#44AA99", "#661100", "#6699CC", "#888888", "#DDAA33", "#AA4466", "#4477AA", "#117733")
SPARE_MARKERS = ("<", ">", "d", "*", "p", "h", "8", "P")


def look(method: str) -> Look:
    """Colour and marker of a method; one that is not in LOOKS gets a pair that depends on its name alone."""
    if method in LOOKS:
        return LOOKS[method]
    digest = zlib.crc32(method.encode())
    return Look(SPARE_COLOURS[digest % len(SPARE_COLOURS)], SPARE_MARKERS[digest // 8 % len(SPARE_MARKERS)])


def looks(labels: Iterable[tuple[str, str]]) -> dict[str, Look]:
    """The look of every (label, method) entry of a study, by label.

    The entry named like its method, else the first by name, has the method's look; further entries of that method keep
    its colour and take other markers.
    """
    entries = sorted(set(labels), key=lambda entry: (entry[1], entry[0] != entry[1], entry[0]))
    seen: dict[str, int] = {}
    found = {}
    for label, method in entries:
        nth = seen[method] = seen.get(method, -1) + 1
        own = look(method)
        spare = [marker for marker in SPARE_MARKERS if marker != own.marker]
        found[label] = own if nth == 0 else Look(own.colour, spare[(nth - 1) % len(spare)])
    return found


def strokes(own: Look, comparison: str) -> dict[str, Any]:
    """Keyword arguments of `plot` for a method: mask-only filled and solid, weight-updating open and dashed."""
    updates = comparison not in ("control", "mask-only")
    return {
        "color": own.colour,
        "marker": own.marker,
        "linestyle": (0, (4, 1.5)) if updates else (0, (1, 1.5)) if comparison == "control" else "-",
        "markerfacecolor": "white" if updates else own.colour,
        "markeredgecolor": own.colour,
        "markeredgewidth": 1.1,
    }


def styled() -> AbstractContextManager[None]:
    """Context in which figures must be both drawn and saved."""
    return style.context(RC, after_reset=True)


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure in the format of the suffix, .pdf, .svg or .png; equal figures give equal bytes."""
    figure.savefig(path, format=suffix[1:], metadata=METADATA[suffix])
