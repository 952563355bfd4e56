"""Where the project and the tests' data stand: the one place that counts folders upward."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
