"""nvfp4 and mxfp4: rounding against compressed-tensors, GPTQ against FP-Quant, and an oracle in float64."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from layerwise.checks.layer_cases import build, grid_of
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Layer, Target
from layerwise.numerics import dispatch, ops
from layerwise.numerics.code_books import E2M1, steps_of
from tests.support import official_outputs
from tests.support.paths import DATA
from tests.support.typing_helpers import some

LEVELS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@cache
def stored() -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    with safe_open(DATA / "official-fp4.safetensors", "np") as file:
        return json.loads(file.metadata()["cases"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def cases(kind: str) -> list[tuple[str, str]]:
    return [(case["layer"], case["id"]) for case in stored()[0] if kind in case["id"]]


def error_of(layer: str, case: str) -> float:
    return next(own["error"] for own in stored()[0] if (own["layer"], own["id"]) == (layer, case))


def official(layer: str, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [out, groups] and weight [out, in], both float32, of the official code."""
    arrays, shape = stored()[1], official_outputs.load(layer).weight.shape
    bits = np.unpackbits(arrays[f"{layer}/{case}/codes"], count=4 * shape[0] * shape[1]).reshape(*shape, 4)
    steps = arrays[f"{layer}/{case}/scale"]
    values = np.array(LEVELS, np.float32)[bits[..., 1:] @ [4, 2, 1]] * np.where(bits[..., 0], -1, 1).astype(np.float32)
    return steps, values * np.repeat(steps, shape[1] // steps.shape[1], 1)


def compress(method: str, layer: Layer, target: Target, **params: object) -> Compressed:
    catalogue = Catalogue()
    built = catalogue.build(method, catalogue.complete(method, params, "test"))
    return built.compress(layer, target, torch.Generator())


@pytest.mark.parametrize(("name", "case"), cases("rtn_compressed_tensors"))
def test_nearest_is_bit_identical_to_compressed_tensors(name: str, case: str):
    result = compress("rtn", official_outputs.load(name).layer(), Target(format=case[:5]))
    steps, weight = official(name, case)
    quantised = grid_of(result)
    assert np.array_equal(steps_of(quantised.scales, quantised.divisor).numpy(), steps)
    assert np.array_equal(result.weight.numpy(), weight)


@pytest.mark.parametrize(("name", "case"), cases("gptq_identity"))
def test_gptq_has_the_codes_of_fp_quant_on_its_scales(name: str, case: str, monkeypatch):
    """Its own scales differ from ours in the last bit, or by 4/3 (mxfp4). It rounds dead inputs, which we drop."""
    known, (steps, weight) = official_outputs.load(name), official(name, case)
    grid = ops.Grid(torch.tensor(steps), torch.zeros(steps.shape), 4, E2M1)
    monkeypatch.setattr(ops, "fit_grid", lambda *_: grid)
    layer = known.layer()
    result = compress("gptq", layer, Target(format=case[:5]), act_order="activation" in case)
    live = ~layer.gram.dead.numpy()
    assert (result.weight.numpy() == weight)[:, live].mean() >= 0.995
    assert known.output_error(result.weight.numpy()) == pytest.approx(error_of(name, case), rel=5e-3)


def slow_nearest(number: float) -> float:
    """The level nearest to a number; of two the one whose code is even."""
    magnitude = min(range(8), key=lambda code: (abs(abs(number) - LEVELS[code]), code % 2))
    return float(np.copysign(LEVELS[magnitude], number))


def slow_e4m3(number: float) -> float:
    candidates = [m * 2.0**e for e in range(-9, 6) for m in range(16)]
    return min((c for c in candidates if c <= 448), key=lambda c: (abs(c - number), round(c * 2.0**9) % 2))


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_gptq_is_its_oracle_in_float64(form: str):
    """Column by column, with the inverse of the Gram of the columns that are left, on the grid of the weight."""
    layer = build("correlated")
    target = Target(format=form)
    result, groups = compress("gptq", layer, target, damping=0.01), ops.groups_of(64, target.group).numpy()
    quantised = grid_of(result)
    steps = steps_of(quantised.scales, quantised.divisor).double().numpy()
    weight, gram = layer.weight.double().numpy().copy(), layer.gram.matrix.double().numpy()
    gram = gram + 0.01 * gram.diagonal().mean() * np.eye(64)
    expected = np.zeros_like(weight)
    for j in range(64):
        inverse = np.linalg.inv(gram[j:, j:])
        step = steps[:, groups[j]]
        expected[:, j] = step * np.vectorize(slow_nearest)((weight[:, j] / step).astype(np.float32))
        lost = (weight[:, j] - expected[:, j]) / inverse[0, 0]
        weight[:, j:] -= lost[:, None] * inverse[0]
    same = np.isclose(result.weight.numpy(), expected, rtol=1e-5, atol=0)
    assert same.mean() >= 0.998


def test_both_paths_round_alike():
    for form in ("nvfp4", "mxfp4"):
        for name in ("correlated", "201 inputs", "bfloat16 weights", "weights of 1e-12"):
            for method, params in (("gptq", {"blocksize": 16}), ("gptq", {"act_order": True, "mse": True})):
                compiled = compress(method, build(name), Target(format=form), **params)
                with dispatch.reference():
                    plain = compress(method, build(name), Target(format=form), **params)
                assert torch.equal(compiled.weight, plain.weight)
                assert torch.equal(grid_of(compiled).codes, grid_of(plain).codes)


def test_numbers_halfway_go_to_the_even_code():
    halves = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    numbers = torch.tensor([*halves, *(-half for half in halves)])
    expected = [0, 1, 1, 2, 2, 4, 4]
    assert E2M1.values(E2M1.nearest(numbers)).tolist() == [*expected, *(-level for level in expected)]
    around = torch.cat([torch.nextafter(numbers, torch.tensor(away)) for away in (float("inf"), -float("inf"))])
    assert E2M1.values(E2M1.nearest(around)).tolist() == [slow_nearest(number) for number in around.tolist()]


def test_scales_are_those_of_the_format():
    weight = build("correlated").weight
    grid = ops.fit_grid(weight, Target(format="nvfp4"))
    divisor = float(some(grid.divisor))
    largest = weight.unflatten(1, (-1, 16)).abs().amax(2).double()
    assert divisor == pytest.approx(2688 / float(weight.abs().max()), rel=1e-6)
    expected = [[slow_e4m3(divisor * float(m) / 6) for m in row] for row in largest]
    assert grid.scales.tolist() == expected
    assert float(grid.scales.max()) == 448.0
    powers = ops.fit_grid(torch.tensor([[7.0, 6.99, 3.4, 3.5]]).repeat_interleave(32, 1), Target(format="mxfp4"))
    assert powers.scales.tolist() == [[2.0, 1.0, 0.5, 1.0]]  # 1.75 x 2^e counts as 2^(e + 1)


def test_a_group_without_weights_and_a_layer_without_any():
    weight = build("correlated").weight.clone()
    weight[0, :32] = 0.0
    for form in ("nvfp4", "mxfp4"):
        for given in (weight, torch.zeros_like(weight)):
            result = ops.round_to_nearest(given, Target(format=form))
            assert torch.isfinite(result.weight).all() and (result.weight[0, :32] == 0).all()


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_shrunk_ranges_lower_their_criterion(form: str):
    weight = build("two blocks of 128").weight
    plain, shrunk = (ops.round_to_nearest(weight, Target(format=form), mse).weight for mse in (False, True))
    assert (weight - shrunk).abs().pow(2.4).sum() < (weight - plain).abs().pow(2.4).sum()


def test_scaling_inputs_helps_formats_too():
    layer = build("correlated")
    for form in ("nvfp4", "mxfp4"):
        lost = [layer.weight - compress(name, layer, Target(format=form)).weight for name in ("awq", "rtn")]
        scaled, plain = (float(ops.inner(own @ layer.gram.matrix, own).sum()) for own in lost)
        assert scaled < plain


def test_others_refuse_a_format_in_one_sentence():
    catalogue = Catalogue()
    for name in ("awp", "sparsegpt", "gqsa"):
        reason = catalogue[name].refusal(Target(format="nvfp4"))
        assert reason and "\n" not in reason
    assert catalogue["awp"].refusal(Target(format="nvfp4")) == "awp quantises to 2, 3, 4, 5, 6, 7, 8 bits, not to nvfp4"
