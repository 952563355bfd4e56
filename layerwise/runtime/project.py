"""Where the files that ship beside the code lie: the Snakefile, workflow/, config/, profiles/ and resources/."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A checkout has them beside the package, a wheel inside it.
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent
