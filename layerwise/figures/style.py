"""The look of every figure: one fixed colour and marker per method, and bytes that depend only on the data.

A method keeps its colour and marker in every figure and study: its card gives them. Filled markers on solid lines leave
the kept weights as they are, open markers on dashed lines change them. Half-filled markers say what else is stored:
factors (left half), a sum of factors and another part (upper half), codes of kept weights (lower half). Colours are
those of Okabe, Ito and Tol, which colour-blind readers can tell apart; the marker says the same without colour.
"""

import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import style
from matplotlib.figure import Figure

from layerwise.contract.catalogue import Catalogue
from layerwise.contract.target import JOINT, LOW_RANK, SUM

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
HALVES = {LOW_RANK: "left", "sparse factor": "left", SUM: "top", JOINT: "bottom"}  # filled, of an open marker


class Look(NamedTuple):
    colour: str
    marker: str


SPARE_COLOURS = ("#44AA99", "#661100", "#CC6677", "#DDAA33", "#AA4466", "#4477AA", "#6699CC")
SPARE_MARKERS = ("<", ">", "d", "*", "p", "h", "8", "P")


def looks_of(catalogue: Catalogue) -> dict[str, Look]:
    """Colour and marker of every method: those of its card, or spare ones for a card without.

    Spare ones depend on the names of the catalogue's methods alone, so that all figures of a study agree.
    """
    found = {name: Look(**entry.look) for name, entry in catalogue.items() if entry.look}
    for name in sorted(catalogue.keys() - found.keys()):
        found[name] = spare(name, found.values())
    return found


def spare(method: str, taken: Collection[Look]) -> Look:
    """A pair for a method of this name: with a colour that is not taken, or else any pair that is not taken."""
    colours, looks_taken = {own.colour for own in taken}, set(taken)
    digest = zlib.crc32(method.encode())
    pairs = [Look(colour, marker) for marker in SPARE_MARKERS for colour in SPARE_COLOURS]
    pairs = pairs[digest % len(pairs) :] + pairs[: digest % len(pairs)]
    free = [pair for pair in pairs if pair.colour not in colours] or [pair for pair in pairs if pair not in looks_taken]
    return (free or pairs)[0]


LOOKS = looks_of(Catalogue())  # of the methods that come with the project
_LOOKS = ContextVar("looks", default=LOOKS)  # of the methods of the study that is drawn


def look(method: str) -> Look:
    """Colour and marker of a method, as given to `styled`; a method that no card describes gets spare ones."""
    known = _LOOKS.get()
    return known[method] if method in known else spare(method, known.values())


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
    """Keyword arguments of `plot` for a method: mask-only filled and solid, weight-updating open and dashed,
    and those of HALVES half filled."""
    updates = comparison not in ("control", "mask-only")
    return {
        "color": own.colour,
        "marker": own.marker,
        "linestyle": (0, (4, 1.5)) if updates else (0, (1, 1.5)) if comparison == "control" else "-",
        "fillstyle": HALVES.get(comparison, "full"),
        "markerfacecolor": "white" if updates and comparison not in HALVES else own.colour,
        "markerfacecoloralt": "white",
        "markeredgecolor": own.colour,
        "markeredgewidth": 0.8 if comparison in HALVES else 1.1,
        "markersize": 6.0 if comparison in HALVES else RC["lines.markersize"],  # so that the halves are seen
    }


@contextmanager
def styled(method_paths: Sequence[Path] = ()) -> Iterator[None]:
    """Context in which figures must be both drawn and saved.

    method_paths: the study's folders of methods besides the shipped ones; the cards there say how they are drawn.
    Raises CatalogueError for a folder or a card that is wrong.
    """
    token = _LOOKS.set(looks_of(Catalogue(list(method_paths))) if method_paths else LOOKS)
    try:
        with style.context(RC, after_reset=True):
            yield
    finally:
        _LOOKS.reset(token)


def save(figure: Figure, path: Path, suffix: str) -> None:
    """Write a figure in the format of the suffix, .pdf, .svg or .png; equal figures give equal bytes."""
    figure.savefig(path, format=suffix[1:], metadata=METADATA[suffix])
