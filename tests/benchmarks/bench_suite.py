"""The cases of suite.py under pytest-benchmark: the method, its baseline and its floor in turns, round after round.

    make benchmark                      all sizes
    make benchmark SIZES="512 1024"     some

pytest-benchmark times the method; what precedes each of its rounds, outside its clock, times the other two once, so
that all three see the same load. Their seconds are in `extra_info` of the JSON, a baseline's scaled as its case says.
"""

import os
import time
from collections.abc import Callable

import pytest
import torch

from tests.benchmarks.suite import CASES, Case, first_rows, layer_of, shapes

WARM = 256  # side of the layer that every call sees once before it is timed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = [
        pytest.param(case, shape, compared, id=f"{case.name}-{shape[0]}x{shape[1]}")
        for shape, compared in shapes(metafunc.config.getoption("sizes")).items()
        for case in CASES
    ]
    metafunc.parametrize("case, shape, compared", found)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_case(benchmark, pytestconfig: pytest.Config, case: Case, shape: tuple[int, int], compared: bool) -> None:
    out, inputs = shape
    reason = case.left_out(out, inputs, compared)
    if reason:
        pytest.skip(reason)
    torch.set_num_threads(pytestconfig.getoption("threads"))

    layer, load = first_rows(layer_of(out, inputs), case.rows), os.getloadavg()[0]
    few, taken = first_rows(layer, case.few), {"floor": [], "baseline": []}
    baseline = case.baseline if compared and max(shape) <= case.baseline_largest else None
    small = first_rows(layer_of(WARM, WARM), case.rows)
    case.compress(small), case.floor(small)
    if baseline:
        baseline(first_rows(small, case.few))

    def others() -> None:
        taken["floor"].append(seconds(lambda: case.floor(layer)))
        if baseline:
            taken["baseline"].append(seconds(lambda: baseline(few)))

    benchmark.group = case.name
    result = benchmark.pedantic(case.compress, (layer,), setup=others, rounds=case.rounds_at(inputs))
    scale = case.scale(result)
    benchmark.extra_info.update(
        case=case.name,
        out=out,
        inputs=inputs,
        floor=taken["floor"],
        baseline=[scale * each for each in taken["baseline"]],
        threads=torch.get_num_threads(),
        load=load,
    )
