"""The README's two pictures, drawn to be read on a phone: the stages of a study, and the divergences of one.

Both are 3.6 inches wide, so that the text of 8 points and more is legible where the page is 360 pixels wide.
"""

import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from layerwise.figures.style import look, strokes
from layerwise.runtime.project import ROOT
from layerwise.storage import frames
from layerwise.storage.table_schema import COMPARISONS
from website import plan
from website.canvas import INK, STAGES, box, canvas

WIDTH = 3.6  # inches; 200 pixels each
STUDY = "smollm2"
LEFT_OUT = ("ria", "dsnot-all")  # not in the README's table
TITLES = {"60% row": "60% of each row pruned", "2:4": "2:4", "4b g64": "4 bits, groups of 64"}
Point = tuple[str, str, str, float]  # target, comparison, label, KL


def stages(graph: plan.Graph, files: Mapping[str, str]) -> list[tuple[str, str, list[str]]]:
    """(name, colour, rules) of each stage of a study, from the first to the last. files: rule -> its file."""
    return [
        (name, colour, [node.replace("_", " ") for node in graph.nodes if files[node] == file])
        for file, (name, colour) in STAGES.items()
    ]


def draw_stages(found: Sequence[tuple[str, str, list[str]]]) -> Figure:
    """A box per stage with its rules, from top to bottom."""
    texts = [textwrap.wrap(", ".join(rules), 44) for _, _, rules in found]
    heights = [0.36 + 0.16 * len(lines) for lines in texts]
    gap = 0.2
    figure, axes = canvas(WIDTH, sum(heights) + gap * (len(heights) - 1) + 0.1)
    tops = [axes.get_ylim()[1] - 0.05]
    for (name, colour, _), lines, height in zip(found, texts, heights, strict=True):
        top = tops[-1]
        box(axes, WIDTH / 2, top - height / 2, WIDTH - 0.1, height, colour)
        axes.text(WIDTH / 2, top - 0.07, name, ha="center", va="top", weight="bold", size=10, color=INK)
        axes.text(WIDTH / 2, top - 0.28, "\n".join(lines), ha="center", va="top", size=8.5, color=INK)
        tops.append(top - height - gap)
    for top, height in list(zip(tops, heights, strict=False))[:-1]:
        ends = ((WIDTH / 2, top - height - gap), (WIDTH / 2, top - height))
        axes.annotate("", *ends, arrowprops={"arrowstyle": "-|>", "color": "#777777", "shrinkA": 0, "shrinkB": 0})
    return figure


def divergences(study: str = STUDY) -> list[Point]:
    """The accepted KL of every compressed cell, by target, group and rising value."""
    data = pd.read_csv(ROOT / "results/accepted" / study / "divergences.csv")
    found = [
        (target, group_of(label, target), label, float(row["kl"]))
        for row in frames.rows(data)
        if (target := str(row["target"])) in TITLES and (label := str(row["label"])) not in LEFT_OUT
    ]
    return sorted(found, key=lambda own: (list(TITLES).index(own[0]), COMPARISONS.index(own[1]), -own[3]))


def group_of(label: str, target: str) -> str:
    """The comparison group of a method at a target, by its card; labels are names of methods in this study."""
    from layerwise.contract.catalogue import Catalogue
    from layerwise.contract.target import Target

    return Catalogue()[label].comparison(Target.parse(target))


def draw_divergences(points: Sequence[Point]) -> Figure:
    """A line per method below its target's title: a mark at its KL, and the number."""
    lines = []  # (title, point) from top to bottom
    for i, own in enumerate(points):
        if i == 0 or points[i - 1][0] != own[0]:
            lines.append((TITLES[own[0]], None))
        lines.append(("", own))
    step, below = 0.2, 0.62
    figure = Figure(figsize=(WIDTH, step * len(lines) + below))
    axes = figure.add_axes((0.3, below / figure.get_figheight(), 0.66, 1 - (below + 0.02) / figure.get_figheight()))
    axes.set(xscale="log", xlim=(0.1, 12), ylim=(len(lines) - 0.4, -0.6))
    axes.grid(visible=False)
    for spine in ("left", "top", "right"):
        axes.spines[spine].set_visible(False)
    axes.set_yticks([])
    for y, (title, own) in enumerate(lines):
        if own is None:
            axes.text(-0.42, y + 0.1, title, transform=axes.get_yaxis_transform(), weight="bold", size=9, va="center")
            continue
        _, comparison, label, kl = own
        axes.axhline(y, color="#dddddd", linewidth=0.5, zorder=0)
        axes.plot([kl], [y], **{**strokes(look(label), comparison), "markersize": 6})
        axes.text(-0.02, y, label, transform=axes.get_yaxis_transform(), ha="right", va="center", size=9)
        axes.annotate(f"{kl:#.3g}", (kl, y), (6, 0), textcoords="offset points", va="center", size=8.5)
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], size=9)
    axes.minorticks_off()
    axes.set_xlabel("KL from dense, nats per token\n(open marks: kept weights change)", size=9)
    return figure
