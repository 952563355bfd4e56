"""One thread for every test, and assertions of the shared checks with their values."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LOOPS = ("columns", "descent", "exchange", "frank_wolfe", "grids", "regrow", "select", "sums", "swap_rounds")
pytest.register_assert_rewrite("tests.contract", "tests.reference")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """The loops are compiled once before the workers begin, which would each take minutes for them; half by half."""
    if not hasattr(config, "workerinput"):
        halves = [", ".join(f"kernels.{name}" for name in LOOPS[first::2]) for first in (0, 1)]
        running = [subprocess.Popen([sys.executable, "-c", f"import {half}"], cwd=ROOT) for half in halves]
        for half in running:
            half.wait()
