"""Where the code, and the files that ship beside it, lie: the Snakefile, workflow/, config/, profiles/, resources/,
requirements.lock and results/accepted/."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A checkout has them beside the package, a wheel inside it.
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent
OWN = "layerwise:"  # how the name of a file of the package, or beside it, begins wherever the package lies
SHIPPED = ("resources", "profiles")  # folders whose files a relative path may name from any working directory


def locate(path: str | Path) -> Path:
    """The path as given, or the file of that name that ships with the package.

    A relative path is looked up in the working directory first. One under resources/ or profiles/ that is not there is
    looked up in ROOT. A path that is in neither place comes back as it was given.
    """
    given = Path(path)
    shipped = given.parts[:1] and given.parts[0] in SHIPPED and ".." not in given.parts
    return ROOT / given if shipped and not os.path.exists(given) and os.path.exists(ROOT / given) else given


def from_here(path: str | Path) -> str:
    """The path from the working directory, one and the same through whatever links either is reached.

    The last part stays as it is given: a file may have a name of its own in a link.
    """
    given = Path(path)
    return os.path.relpath(given.parent.resolve() / given.name)


def portable(path: str | Path) -> str:
    """A name of a file of code that another place of the project does not change; `located` finds it again.

    A file of the package, or beside it in a checkout, is named from there; any other from the working directory.
    """
    given, around = Path(path), PACKAGE.resolve().parent
    real = given.parent.resolve() / given.name
    return f"{OWN}{real.relative_to(around).as_posix()}" if real.is_relative_to(around) else from_here(given)


def located(name: str) -> Path:
    """The file that `portable` named."""
    return PACKAGE.resolve().parent / name.removeprefix(OWN) if name.startswith(OWN) else Path(name)
