"""The location of the code and of the files shipped with it: the Snakefile, workflow/, config/, profiles/, resources/,
requirements.lock and results/accepted/."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A checkout has them next to the package, a wheel inside it.
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent
OWN = "layerwise:"  # prefix of portable names of files in the package or next to it
SHIPPED = ("resources", "profiles")  # folders that a relative path can name from any working directory


def locate(path: str | Path) -> Path:
    """The given path, or the file of that name shipped with the package.

    A relative path is first looked up in the working directory. If it is absent there and under resources/ or
    profiles/, it is looked up in ROOT. A path that is in neither place is returned unchanged.
    """
    given = Path(path)
    shipped = given.parts[:1] and given.parts[0] in SHIPPED and ".." not in given.parts
    return ROOT / given if shipped and not os.path.exists(given) and os.path.exists(ROOT / given) else given


def from_here(path: str | Path) -> str:
    """The path relative to the working directory, independent of symbolic links to either.

    The last part is unchanged, because a link may give a file another name.
    """
    given = Path(path)
    return os.path.relpath(given.parent.resolve() / given.name)


def portable(path: str | Path) -> str:
    """A name of a code file that does not depend on the project's location; `located` is the inverse.

    A file in the package, or next to it in a checkout, is named relative to it; any other file relative to the working
    directory.
    """
    given, around = Path(path), PACKAGE.resolve().parent
    real = given.parent.resolve() / given.name
    return f"{OWN}{real.relative_to(around).as_posix()}" if real.is_relative_to(around) else from_here(given)


def located(name: str) -> Path:
    """The file of a name from `portable`."""
    return PACKAGE.resolve().parent / name.removeprefix(OWN) if name.startswith(OWN) else Path(name)
