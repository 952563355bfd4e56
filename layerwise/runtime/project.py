"""Where the files that ship beside the code lie: the Snakefile, workflow/, config/, profiles/, resources/,
requirements.lock and results/accepted/."""

import os
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A checkout has them beside the package, a wheel inside it.
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent
SHIPPED = ("resources", "profiles")  # folders whose files a relative path may name from any working directory


def locate(path: str | Path) -> Path:
    """The path as given, or the file of that name that ships with the package.

    A relative path is looked up in the working directory first. One under resources/ or profiles/ that is not there is
    looked up in ROOT. A path that is in neither place comes back as it was given.
    """
    given = Path(path)
    shipped = given.parts[:1] and given.parts[0] in SHIPPED and ".." not in given.parts
    return ROOT / given if shipped and not os.path.exists(given) and os.path.exists(ROOT / given) else given
