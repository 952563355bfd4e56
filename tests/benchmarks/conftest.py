"""Options of the benchmarks: they are run by themselves, never with the tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sizes", default="", help="sides of the layers, or OUTxIN, apart by spaces; all by default")
    parser.addoption("--threads", type=int, default=2, help="torch's")
