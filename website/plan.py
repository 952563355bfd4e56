"""What the pictures of the project show, read from its code: the rooms with their floors, the rules and their order."""

import ast
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from layerwise.runtime.project import ROOT

RULE = re.compile(r'^rule (\w+):\n    """(.*?)"""', re.MULTILINE | re.DOTALL)
NODE = re.compile(r'^\s*(\d+)\[label = "(\w+)"', re.MULTILINE)
EDGE = re.compile(r"^\s*(\d+) -> (\d+)$", re.MULTILINE)
FIGURE = "figure_"  # how the names of the rules begin that draw a figure each
LEFT_OUT = ("all", "code")  # `code` is an input of every rule


@dataclass(frozen=True)
class Graph:
    """The rules of a study's run. nodes: names; edges: (rule, rule that reads what it makes), without shortcuts."""

    nodes: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]


def rule_graph(targets: tuple[str, ...] = ("all", "report_page")) -> Graph:
    """The graph of the rules that make the targets of the embedded study, as Snakemake plans it, in half a minute."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1", *targets]
    with tempfile.TemporaryDirectory() as folder:
        given = [*command, "--directory", folder, "--rulegraph", "dot"]
        done = subprocess.run(given, capture_output=True, text=True, check=True)
    return graph_of(done.stdout)


def graph_of(dot: str) -> Graph:
    """The graph that Snakemake wrote as dot: figures are one node, and edges that a longer way implies are left out."""
    names = {number: "figures" if name.startswith(FIGURE) else name for number, name in NODE.findall(dot)}
    nodes = [name for name in dict.fromkeys(names.values()) if name not in LEFT_OUT]
    pairs = {(names[first], names[second]) for first, second in EDGE.findall(dot)}
    edges = {pair for pair in pairs if not set(pair) & set(LEFT_OUT)}
    return Graph(tuple(sorted(nodes)), tuple(sorted(_reduced(edges))))  # Snakemake has an order by chance


def _reduced(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges of a graph without cycles that no longer way between their ends makes superfluous."""
    after: dict[str, set[str]] = {}
    for first, second in edges:
        after.setdefault(first, set()).add(second)

    def reached(start: str) -> set[str]:
        return {end for step in after.get(start, ()) for end in (step, *reached(step))}

    return {(a, b) for a, b in edges if not any(b in reached(step) for step in after[a] - {b})}


def rules() -> dict[str, tuple[str, str]]:
    """Rule -> (what it does, its file under workflow/rules), in the order of the files."""
    found = {}
    for path in sorted((ROOT / "workflow/rules").glob("*.smk")):
        for name, text in RULE.findall(path.read_text("utf-8")):
            found[name] = (" ".join(text.split()), path.name)
    return found


def rooms() -> list[list[tuple[str, str]]]:
    """(room, what it is) of every floor, from the top one down."""
    from tests.test_house import FLOORS, PACKAGE

    return [[(room, _purpose(PACKAGE / room)) for room in floor] for floor in FLOORS]


def _purpose(room: Path) -> str:
    """The beginning of the docstring of a room, a folder or a module."""
    path = room / "__init__.py" if room.is_dir() else room.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return re.split(r"\. |; | \(", " ".join(text.split()), maxsplit=1)[0].rstrip(".").replace("`", "")
