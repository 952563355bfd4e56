"""Every method on another device: on an emulated one bit for bit what plain torch gives, on a GPU within tolerances."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from layerwise.calibration.taps import TapStatistics
from layerwise.checks import layer_cases as layers
from layerwise.checks import settings
from layerwise.checks.case import Case
from layerwise.compression.solver import Solver
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Gram, Layer
from layerwise.contract.target import Target
from layerwise.numerics import dispatch
from layerwise.storage import layer_packing
from tests.support import fake_device
from tests.support.typing_helpers import mask_of, some

TARGETS = [
    Target(0.5),
    Target(0.5, "layer"),
    Target(pattern="2:4"),
    Target(0.5, "1x16"),
    Target(bits=4, group=16),
    Target(bits=4, symmetric=True),
    Target(pattern="2:4", bits=4),
]
RARE = [Target(0.5, "layer"), Target(bits=4, symmetric=True)]  # in `make test-long`
# Largest change of the error relative to its own, and share of the mask that may differ. Near ties fall either way with
# the order in which products are summed; iterative methods carry them on.
TOLERANCE, MASK = 1e-3, 0.0
LOOSE = ("frank_wolfe", "sparse_swaps", "dsnot", "alps", "admm", "awp", "gqsa", "chain")
LOOSER = dict.fromkeys(LOOSE, (2e-2, 0.02))
FEWER = {
    "frank_wolfe": {"iterations": 8},
    "alps": {"iterations": 40},
    "awp": {"iterations": 20},
}  # in place of minutes
SMALL = layers.Recipe(out=8, inputs=48, sequences=4, length=16)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU (torch.cuda.is_available() is False)")


def cases():
    catalogue = Catalogue()
    for name, entry in catalogue.items():
        for params in [{}, *settings.parameter_sets(entry)[1:]]:
            params = {**params, **FEWER.get(name, {})}
            method = catalogue.build(name, catalogue.complete(name, params, "the device tests"))
            for target in TARGETS:
                case = Case(entry, method, target, params)
                if not case.refusal:
                    rare = set(params) - set(FEWER.get(name, ())) or target in RARE
                    yield case, [pytest.mark.long] if rare else []


CASES = [pytest.param(case, id=f"{case.label}-{case.target.label}", marks=marks) for case, marks in cases()]


def on(device: torch.device | str, layer: Layer) -> Layer:
    moved = {name: tensor.to(device) for name, tensor in layers.tensors(layer).items()}
    weight, gram, fisher = moved.pop("weight"), Gram(moved.pop("gram"), layer.gram.tokens), moved.pop("fisher", None)
    return Layer(layer.name, weight, gram, replace(some(layer.statistics), **moved), fisher=fisher)


def solved(case: Case, device: torch.device | str):
    """What the runner makes of a method's result on a device: result, row, and stored tensors on the processor."""
    solver = Solver(case.entry.name, case.method, case.target, seed=0)
    result, row = solver.solve(on(device, layers.make(SMALL)))
    return result, row, layer_packing.parts_of(result, case.target, torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_no_method_mixes_devices(case):
    with dispatch.reference():
        _, row, parts = solved(case, "cpu")
    with fake_device.reachable():
        result, far_row, far_parts = solved(case, fake_device.DEVICE)
        assert result.weight.device == fake_device.DEVICE
    assert far_parts.keys() == parts.keys()
    for name, tensor in parts.items():
        assert torch.equal(far_parts[name], tensor), name
    assert far_row["output_error"] == row["output_error"]


def test_statistics_of_a_tap_stay_on_the_device():
    inputs = torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(0))

    def finished(device: torch.device | str) -> list[torch.Tensor]:
        tap = TapStatistics(24, 4, 16, device)
        for batch in inputs.split(2):
            tap.update(batch.to(device))
        gram, statistics = tap.finish()
        found = [gram.matrix, *(value for value in vars(statistics).values() if isinstance(value, torch.Tensor))]
        return [tensor.cpu() for tensor in found]

    with dispatch.reference():
        expected = finished("cpu")
    with fake_device.reachable():
        came = finished(fake_device.DEVICE)
    assert all(map(torch.equal, came, expected))


@GPU
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_agrees_with_the_processor(case):
    error, share = LOOSER.get(case.entry.name, (TOLERANCE, MASK))
    here, row, _ = solved(case, "cpu")
    there, gpu_row, _ = solved(case, "cuda")
    assert gpu_row["output_error"] == pytest.approx(row["output_error"], rel=error, abs=1e-9)
    assert gpu_row["peak_gpu_mb"] > 0 and row["peak_gpu_mb"] is None
    if here.mask is not None:
        assert float((mask_of(there).cpu() != here.mask).float().mean()) <= share
