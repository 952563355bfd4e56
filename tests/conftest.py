"""One thread for every test, assertions of the shared checks with their values, and an end where time is short."""

import random
import time
from collections import Counter

import pytest
import torch
from compiled import compile_loops

LEFT_OUT = "left out: the time was over (--until)"
pytest.register_assert_rewrite("tests.contract", "tests.reference")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """The loops are compiled once before the workers begin, which would each take minutes for them."""
    if config.getoption("numprocesses", 0):  # of the process that starts workers, and of no worker
        compile_loops()


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
        pytest.skip(LEFT_OUT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", ())
    files = Counter(report.nodeid.partition("::")[0] for report in skipped if LEFT_OUT in str(report.longrepr))
    if files:
        told = ", ".join(f"{file} {count}" for file, count in sorted(files.items()))
        terminalreporter.write_line(f"Left out, as the time was over (--until): {told}.")
