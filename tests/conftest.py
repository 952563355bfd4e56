"""One thread for every test, and assertions of the shared checks with their values."""

import importlib

import pytest
import torch

LOOPS = ("columns", "descent", "exchange", "frank_wolfe", "grids", "regrow", "select", "sums", "swap_rounds")
pytest.register_assert_rewrite("tests.contract", "tests.reference")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """The loops are compiled, or read, once before the workers begin, which would each take minutes for them."""
    if not hasattr(config, "workerinput"):
        for name in LOOPS:
            importlib.import_module(f"kernels.{name}")
