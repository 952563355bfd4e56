"""One thread for every test, loops compiled before it, and assertions of the shared helpers with their values."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from layerwise.models import compute_dtype
from tests.support.compiled import compile_loops
from tests.support.time_budget import (  # noqa: F401 (pytest finds them here)
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_setup,
    pytest_terminal_summary,
)

pytest_plugins = ["tests.support.battery", "tests.support.traced"]
pytest.register_assert_rewrite("tests.support.official_outputs")
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def every_dtype_is_fast() -> Iterator[None]:
    """What a test computes does not depend on the processor's units: no dtype is slow unless the test says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_dtype, "slowdown", lambda dtype: 1.0)
        patch.setattr(compute_dtype, "slow_apart", lambda dtype: False)
        yield


def pytest_configure(config: pytest.Config) -> None:
    """The loops are compiled once before the workers begin, which would each take minutes for them."""
    if config.getoption("numprocesses", 0):  # of the process that starts workers, and of no worker
        try:
            compile_loops()
        except RuntimeError as error:
            raise pytest.UsageError(str(error)) from None
