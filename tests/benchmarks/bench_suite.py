"""The cases of suite.py under pytest-benchmark: the method, its baseline and its floor in turns, round after round.

    make benchmark                      all sizes
    make benchmark SIZES="512 1024"     some

pytest-benchmark times the method; what precedes each of its rounds, outside its clock, times the other two once, so
that all three see the same load. Their seconds are in `extra_info` of the JSON, a baseline's scaled as its case says.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from layerwise.contract.layer import Layer
from tests.benchmarks.suite import CASES, first_rows, layer_of, shapes
from tests.support.typing_helpers import some

WARM = 256  # side of the layer that every call sees once before it is timed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = [
        pytest.param(name, shape, compared, id=f"{name}, {shape[0]} x {shape[1]}")
        for shape, compared in shapes(some(metafunc.config.getoption("sizes"))).items()
        for name in CASES
    ]
    metafunc.parametrize("name, shape, compared", found)


def timed(call: Callable[[Layer], Any], layer: Layer) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = call(layer)
    return time.perf_counter() - start, result


def test_case(benchmark, pytestconfig: pytest.Config, name: str, shape: tuple[int, int], compared: bool) -> None:
    case, (out, inputs) = CASES[name], shape
    reason = case.left_out(out, inputs)
    if reason:
        pytest.skip(reason)
    torch.set_num_threads(some(pytestconfig.getoption("threads")))

    layer, load = first_rows(layer_of(out, inputs), case.rows), os.getloadavg()[0]
    few, floor, baseline = first_rows(layer, case.few), [], []
    published = case.baseline if compared and max(shape) <= case.baseline_largest else None
    warm = first_rows(layer_of(WARM, WARM), case.rows)
    for call, seen in ((case.compress, warm), (case.floor, warm), (published, first_rows(warm, case.few))):
        if call:
            call(seen)

    def others() -> None:
        floor.append(timed(case.floor, layer)[0])
        if published:
            baseline.append(timed(published, few))

    benchmark.group = name
    result = benchmark.pedantic(case.compress, (layer,), setup=others, rounds=case.rounds_at(out))
    benchmark.extra_info |= {
        "case": name,
        "out": out,
        "in": inputs,
        "compared": compared,
        "floor": floor,
        "baseline": [case.scale(result, theirs) * each for each, theirs in baseline],
        "threads": torch.get_num_threads(),
        "load": load,
    }
