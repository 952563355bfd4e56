"""`--until TIME`, where time is short: no test is begun after it, and what is left out is named."""

import random
import time
from collections import Counter

import pytest

LEFT_OUT = "left out: the time was over (--until)"


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
