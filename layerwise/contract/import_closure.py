"""The files on which a result depends: a module's imports, direct and indirect, found by reading the files.

Nothing is run, so that a study can be planned without torch. Source: imports `from layerwise.room import module` and
`from layerwise.room.module import name`, at the top of a file or in a function. Imports under TYPE_CHECKING do not run.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from layerwise.runtime.project import PACKAGE, ROOT

NAME = "layerwise"
# Folders of adapters; in a checkout they are next to the package.
FOLDERS = {name: (PACKAGE / name).resolve() for name in ("methods", "allocators")}
METHODS, ALLOCATORS = FOLDERS["methods"], FOLDERS["allocators"]
DATA = re.compile(r"(workflow|resources)/[\w./-]+\.\w+")  # shipped files that a module names in a string


def closure(modules: Iterable[str | Path]) -> list[Path]:
    """The files of these modules and of everything that they import, each once and after a file that imports it.

    modules: dotted names, such as layerwise.results.collect, or files. A shipped file that a module names, such as
    "workflow/schemas/tables.schema.yaml", is one of its files. Raises ValueError for a name that is not a module.
    """
    files: dict[Path, None] = {}
    waiting = [module if isinstance(module, Path) else file_of(module) for module in modules]
    while waiting:
        path = waiting.pop(0)
        if path not in files:
            files[path] = None
            waiting = [*imports(path), *waiting]
    return list(files)


def file_of(module: str) -> Path:
    """The file of a module of the package. Raises ValueError if there is none."""
    path = _file(module)
    if path is None:
        raise ValueError(f"{module} must be a module of {NAME}.")
    return path


@cache
def imports(path: Path) -> tuple[Path, ...]:
    """Files of the package that a file imports, and shipped files that it names."""
    if path.suffix != ".py":
        return ()
    return imports_of(ast.parse(path.read_text("utf-8")))


def imports_of(tree: ast.Module) -> tuple[Path, ...]:
    """The same for a parsed file."""
    return tuple(dict.fromkeys(_files(tree)))


def _files(tree: ast.AST) -> Iterator[Path]:
    for node in _running(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            module = str(node.module)
            names = [module.rpartition(".")[0], module, *(f"{module}.{alias.name}" for alias in node.names)]
            yield from (path for name in names if (path := _file(name)))
        elif isinstance(node, ast.Import):
            names = [name for alias in node.names for name in (alias.name.rpartition(".")[0], alias.name)]
            yield from (path for name in names if (path := _file(name)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and DATA.fullmatch(node.value):
            path = ROOT / node.value
            if path.is_file():
                yield path


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes in order, except those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _running(node)


def _file(module: str) -> Path | None:
    """The file of a module of a room, or of a room that runs code when it is imported."""
    name, *parts = module.split(".")
    if name != NAME or not parts:  # the package's own file only exports the library's names
        return None
    if parts[0] in FOLDERS:
        path = FOLDERS[parts[0]].joinpath(*parts[1:]).with_suffix(".py") if len(parts) == 2 else None
    else:
        path = PACKAGE.joinpath(*parts)
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path if path and path.is_file() else None
