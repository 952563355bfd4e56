"""The plan of the code: a room imports only rooms below it, and what plans a study loads no heavy package."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Rooms (folders and modules) of layerwise/ from the top floor down. Rooms of one floor do not import each other.
FLOORS = (
    ("cli",),
    ("report", "demo", "checks", "api"),
    ("comparison", "export", "figures", "compression"),
    ("results", "evaluation"),
    ("study", "calibration"),
    ("storage", "models"),
    ("numerics", "sources", "allocation"),
    ("kernels", "contract"),
    ("runtime",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ENTRANCES = {"__init__", "__main__"}  # of the package: they may import every room
PACKAGE = ROOT / "layerwise"
LINKS = {"methods", "allocators"}  # of the package to the folders of adapters
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in LINKS]
ADAPTERS = [path for folder in sorted(LINKS) for path in sorted((ROOT / folder).glob("*.py"))]
HEAVY = ("torch", "transformers", "pandas", "matplotlib")
LIGHT = (
    "contract.target",
    "contract.catalogue",
    "contract.method_file",
    "contract.cards",
    "contract.method_table",
    "runtime",
    "sources",
    "study",
)  # the Snakefile imports them
IMPORT_EACH = f"""
import importlib, pkgutil, sys
for name in {LIGHT}:
    module = importlib.import_module("layerwise." + name)
    inside = [found.name for found in pkgutil.walk_packages(getattr(module, "__path__", ()), module.__name__ + ".")]
    for each in [module.__name__, *inside]:
        importlib.import_module(each)
        heavy = [package for package in {HEAVY} if package in sys.modules]
        print(each, *heavy)
        if heavy:
            sys.exit()
"""


def room_of(path: Path) -> str:
    """The folder of a module of the package; a module that is in none is a room of its own."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names of what Python source imports, wherever in it; package: where the source stands.

    `from a import b` is a.b, for b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def rooms_of(path: Path) -> set[str]:
    """The rooms that a module imports from: its own, others, and LINKS; other names of the package are api's."""
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    names = [name.split(".") for name in imports(path.read_text("utf-8"), package)]
    firsts = {name[1] for name in names if name[0] == "layerwise" and len(name) > 1}
    return {first if first in FLOOR or first in LINKS else "api" for first in firsts}


def test_every_room_has_a_floor():
    assert {room_of(path) for path in MODULES} - ENTRANCES <= FLOOR.keys()


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_only_rooms_below_it(room):
    lower = {name for name, floor in FLOOR.items() if floor > FLOOR[room]}
    upward = {
        str(path.relative_to(ROOT)): wrong
        for path in MODULES
        if room_of(path) == room and (wrong := rooms_of(path) - lower - {room})
    }
    assert upward == {}


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_an_adapter_imports_no_other_adapter_and_nothing_beside_the_package(path):
    names = [name.split(".") for name in imports(path.read_text("utf-8"), f"layerwise.{path.parent.name}")]
    rooms = {name[1] for name in names if name[0] == "layerwise"}
    assert rooms and rooms <= FLOOR.keys()
    beside = {*LINKS, "tests", "workflow", *(adapter.stem for adapter in ADAPTERS)} - set(sys.stdlib_module_names)
    assert not beside & {name[0] for name in names}


def test_planning_loads_no_heavy_package():
    """The Snakefile is parsed again by every job."""
    command = [sys.executable, "-c", IMPORT_EACH]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.splitlines()
    assert [line for line in imported if " " in line] == []
    modules = {f"layerwise.{name}" for name in LIGHT}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if any(name.startswith(f"{module}.") for module in list(modules)):
            modules.add(name)
    assert set(imported) == modules and len(modules) > 15


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import layerwise.study.grid", {"layerwise.study.grid"}),
        ("from layerwise import study", {"layerwise.study"}),
        (
            "def f():\n    from layerwise.study import grid, estimate",
            {"layerwise.study.grid", "layerwise.study.estimate"},
        ),
        ("from . import ops", {"layerwise.numerics.ops"}),
        ("from ..study import grid", {"layerwise.study.grid"}),
        ("from .. import study", {"layerwise.study"}),
    ],
)
def test_every_way_to_import_is_seen(source, names):
    assert set(imports(source, "layerwise.numerics")) == names


def test_no_file_switches_a_check_of_types_off():
    beside = [path for folder in ("tests", "website") for path in (ROOT / folder).rglob("*.py")]
    files = [*MODULES, *ADAPTERS, *beside]
    switch = re.compile(r"^# *(pyright|type):", re.MULTILINE)
    switched = [path for path in files if switch.search(path.read_text(encoding="utf8"))]
    assert len(files) > 300 and not switched
