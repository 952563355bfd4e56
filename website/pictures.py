"""`python -m website.pictures`: draw the rooms of the code, the rules of a study, and the README's pictures.

The pictures lie in figures/gallery. Each holds what it was drawn from, so that a test can say that it is out of date.
"""

import json
import sys
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as MPath

from layerwise.figures.style import METADATA, styled
from layerwise.runtime.errors import report_errors
from layerwise.runtime.project import ROOT
from website import plan, readme_pictures
from website.canvas import INK, STAGES, box, canvas
from website.layering import layered

GALLERY = ROOT / "figures/gallery"
WIDTH = 7.0  # inches
GAP = 0.1  # between boxes of rooms
KEY = "Description"  # of the PNG's texts: what the picture was drawn from


def content(found: Any) -> str:
    """What a picture shows, as text that its file keeps."""
    return json.dumps(found, sort_keys=True)


def kept(path: Path) -> str:
    """The text that a picture keeps of what it was drawn from; empty for a picture without."""
    from PIL import Image

    with Image.open(path) as image:
        return str(image.info.get(KEY, ""))


def draw_rooms(floors: list[list[tuple[str, str]]]) -> Figure:
    """A box per room, a row per floor: a room imports only rooms on lower floors."""
    widths = [WIDTH / len(floor) - GAP for floor in floors]
    texts = [
        [textwrap.wrap(purpose, int((width - 0.1) * 18)) for _, purpose in floor]
        for floor, width in zip(floors, widths, strict=True)
    ]
    heights = [0.28 + 0.12 * max(map(len, lines)) for lines in texts]
    figure, axes = canvas(WIDTH, sum(heights) + GAP * len(heights))
    top = sum(heights) + GAP * (len(heights) - 0.5)
    for floor, lines, width, height, level in zip(floors, texts, widths, heights, range(len(floors)), strict=True):
        for place, ((room, _), said) in enumerate(zip(floor, lines, strict=True)):
            x = (width + GAP) * (place + 0.5)
            box(axes, x, top - height / 2, width, height, "#eef2f7" if level % 2 else "#e1e9f2")
            axes.text(x, top - 0.05, room, ha="center", va="top", weight="bold", size=9, color=INK)
            axes.text(x, top - 0.21, "\n".join(said), ha="center", va="top", size=6.5, color=INK)
        top -= height + GAP
    return figure


def draw_graph(graph: plan.Graph, files: Mapping[str, str]) -> Figure:
    """A box per rule, coloured by its stage, and an arrow where one reads what another makes.

    files: rule -> its file.
    """
    found = layered(graph.nodes, graph.edges)
    layers = 1 + max(layer for layer, _ in found.places.values())
    low, high = (choose(height for _, height in found.places.values()) for choose in (min, max))
    across, up, width, tall = WIDTH / layers, 0.42, WIDTH / layers - 0.2, 0.33
    figure, axes = canvas(WIDTH, up * (high - low + 1) + 0.35)

    def at(node: str) -> tuple[float, float]:
        layer, height = found.places[node]
        return across * (layer + 0.5), 0.35 + up * (high - height + 0.5)

    for way in found.ways:
        _arrow(axes, [at(node) for node in way], width)
    for node in graph.nodes:
        x, y = at(node)
        box(axes, x, y, width, tall, STAGES[files[node]][1])
        words = node.replace("_", "\n")
        axes.text(x, y, words, ha="center", va="center", size=6.5, color=INK, linespacing=0.95)
    place = 0.1
    for name, colour in STAGES.values():
        box(axes, place + 0.09, 0.16, 0.18, 0.14, colour)
        axes.text(place + 0.24, 0.16, name, va="center", size=7, color=INK)
        place += 0.5 + 0.062 * len(name)
    return figure


def _arrow(axes: Axes, points: list[tuple[float, float]], width: float) -> None:
    """An arrow from the right of a box through points between boxes to the left of another, smooth at each."""
    (x, y), *between, (to_x, to_y) = points
    corners = [(x + width / 2, y)]
    corners += [(own_x + side * width / 2, own_y) for own_x, own_y in between for side in (-1, 1)]
    corners += [(to_x - width / 2, to_y)]
    vertices, codes = [corners[0]], [MPath.MOVETO]
    for i, ((x, y), (to_x, to_y)) in enumerate(pairwise(corners)):
        middle = (x + to_x) / 2
        curved = i % 2 == 0  # in the gap between two layers; straight along a layer
        vertices += [(middle, y), (middle, to_y), (to_x, to_y)] if curved else [(to_x, to_y)]
        codes += [MPath.CURVE4] * 3 if curved else [MPath.LINETO]
    path = MPath(vertices, codes)
    shape = FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=6, linewidth=0.7, color="#777777")
    axes.add_patch(shape)


def files_of(graph: plan.Graph) -> dict[str, str]:
    """Rule of the graph -> its file; the figures' rules are of the file that collects."""
    known = {name: file for name, (_, file) in plan.rules().items()}
    return {node: known.get(node, "collect.smk") for node in graph.nodes}


def save(figure: Figure, name: str, found: Any) -> Path:
    """Save a picture with what it was drawn from."""
    path = GALLERY / f"{name}.png"
    figure.savefig(path, dpi=200, metadata={**METADATA[".png"], KEY: content(found)})
    return path


def main(argv: list[str]) -> None:
    graph, floors = plan.rule_graph(), plan.rooms()
    with styled():
        print(save(draw_rooms(floors), "rooms", floors))
        print(save(draw_graph(graph, files_of(graph)), "dag", [graph.nodes, graph.edges]))
        stages, points = readme_pictures.stages(graph, files_of(graph)), readme_pictures.divergences()
        print(save(readme_pictures.draw_stages(stages), "stages", stages))
        print(save(readme_pictures.draw_divergences(points), "divergences", points))


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
