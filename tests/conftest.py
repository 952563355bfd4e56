"""One thread for every test, assertions of the shared checks with their values, and an end where time is short."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LOOPS = ("columns", "descent", "exchange", "frank_wolfe", "grids", "regrow", "select", "sums", "swap_rounds")
pytest.register_assert_rewrite("tests.contract", "tests.reference")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """The loops are compiled once before the workers begin, which would each take minutes for them; half by half."""
    if config.getoption("numprocesses", 0):  # of the process that starts workers, and of no worker
        halves = [", ".join(f"kernels.{name}" for name in LOOPS[first::2]) for first in (0, 1)]
        running = [subprocess.Popen([sys.executable, "-c", f"import {half}"], cwd=ROOT) for half in halves]
        for half in running:
            half.wait()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=int, help="begin no test after this time, in seconds since 1970; files by chance")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By chance, so that over time each file has its turn; the same in every worker."""
    if until := config.getoption("until"):
        files = sorted({item.path for item in items})
        random.Random(until).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("until")
    if until and time.time() > until:
        pytest.skip("left out: the time was over (--until)")
