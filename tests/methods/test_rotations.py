"""Rotations of a layer's inputs, quantisers under them, and TurboQuant: against oracles, tables and FP-Quant."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as sylvester

from layerwise.checks.layer_cases import build, grid_of
from layerwise.compression.score import asymmetric_error
from layerwise.compression.verify import broken_promise
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Gram, Layer, Rotation, Target, UnsupportedTarget
from layerwise.numerics import ops, rotations
from layerwise.numerics.code_books import E2M1
from layerwise.numerics.lloyd_max import normal_levels
from layerwise.storage import layer_packing, layer_unpacking
from layerwise.storage.bits_per_weight import stored_bits
from tests.methods.test_float_formats import cases, compress, error_of, official
from tests.support import official_outputs
from tests.support.typing_helpers import some

W3 = Target(bits=3, group=16)


def matrix_of(rotation: Rotation, inputs: int) -> np.ndarray:
    """Q [in, in] float64 as a matrix."""
    blocks = np.kron(np.eye(inputs // rotation.block), sylvester(rotation.block) / rotation.block**0.5)
    return np.diag(rotations.signs(rotation.seed, inputs).numpy()) @ blocks


@pytest.mark.parametrize(
    ("inputs", "largest", "block"), [(64, None, 64), (200, None, 8), (201, None, 1), (384, 16, 16)]
)
def test_a_rotation_is_its_matrix_and_its_inverse_exact(inputs, largest, block):
    rotation = Rotation(3, rotations.block_of(inputs, largest))
    assert rotation.block == block
    weight = torch.randn(5, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix_of(rotation, inputs)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(inputs), atol=1e-12)
    turned = rotations.rotate(weight, rotation)
    np.testing.assert_allclose(turned.numpy(), weight.numpy() @ matrix, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rotations.rotate_back(turned, rotation).numpy(), weight.numpy(), rtol=0, atol=1e-12)
    gram = Gram(weight.T @ weight / 5, 5)
    expected = matrix.T @ gram.matrix.numpy() @ matrix
    np.testing.assert_allclose(rotations.rotated_gram(gram, rotation).matrix.numpy(), expected, rtol=0, atol=1e-5)


def test_signs_are_those_of_splitmix64():
    """Of seed 0 its first outputs are e220a8397b1dcdaf, 6e789e6aa1b965f4, 06c45d188009454f and f88bb8a8724c81ec."""
    assert rotations.signs(0, 4).tolist() == [-1, 1, 1, -1]
    assert rotations.signs(1, 64).tolist() != rotations.signs(2, 64).tolist()


@pytest.mark.parametrize("under", ["rtn", "gptq"])
def test_the_quantiser_sees_the_rotated_layer(under: str):
    layer = build("correlated")
    result = compress("rotated", layer, W3, under=under, rotation_seed=5)
    rotation = some(grid_of(result).rotation)
    matrix = matrix_of(rotation, 64)
    weight = torch.from_numpy(layer.weight.double().numpy() @ matrix).float()
    gram = torch.from_numpy(matrix.T @ layer.gram.matrix.double().numpy() @ matrix).float()
    alone = compress(under, Layer("turned", weight, Gram(gram, layer.gram.tokens)), W3)
    expected = alone.weight.double().numpy() @ matrix.T
    assert np.isclose(result.weight.numpy(), expected, rtol=1e-4, atol=1e-6).mean() > 0.98
    assert broken_promise(layer, W3, result) is None


@pytest.mark.parametrize("under", ["gptaq", "qronos"])
def test_the_quantiser_sees_the_rotated_inputs_of_both_models(under: str):
    layer = build("drifted inputs")
    result = compress("rotated", layer, W3, under=under, rotation_seed=5)
    rotation = some(grid_of(result).rotation)
    matrix = matrix_of(rotation, 64)
    weight = torch.from_numpy(layer.weight.double().numpy() @ matrix).float()
    known = (layer.gram.matrix, layer.gram.cross, layer.gram.dense)
    moved, cross, dense = (torch.from_numpy(matrix.T @ own.double().numpy() @ matrix).float() for own in known)
    turned = rotations.rotated_gram(layer.gram, rotation)
    for found, product in ((turned.matrix, moved), (turned.cross, cross), (turned.dense, dense)):
        np.testing.assert_allclose(found.numpy(), product.numpy(), rtol=0, atol=1e-5)
    alone = compress(under, Layer("turned", weight, Gram(moved, layer.gram.tokens, cross, dense)), W3)
    expected = alone.weight.double().numpy() @ matrix.T
    assert np.isclose(result.weight.numpy(), expected, rtol=1e-4, atol=1e-6).mean() > 0.95
    plain = compress("rotated", layer, W3, rotation_seed=5)
    assert some(asymmetric_error(layer, result.weight)) < some(asymmetric_error(layer, plain.weight))


@pytest.mark.parametrize(("name", "case"), cases("gptq_hadamard"))
def test_gptq_in_the_hadamard_basis_is_fp_quants(name: str, case: str, monkeypatch):
    known, (steps, weight) = official_outputs.load(name), official(name, case)
    layer = known.layer()
    rotation = Rotation(0, 128)
    monkeypatch.setattr(rotations, "signs", lambda seed, inputs: torch.ones(inputs, dtype=torch.float64))
    turned = rotations.rotate(layer.weight, rotation).float()
    grid = ops.Grid(torch.tensor(steps), torch.zeros(steps.shape), 4, E2M1)
    monkeypatch.setattr(ops, "fit_grid", lambda *_: grid)
    rotated = Layer(name, turned, rotations.rotated_gram(layer.gram, rotation))
    result = compress("gptq", rotated, Target(format=case[:5]), act_order=True)
    assert (result.weight.numpy() == weight).mean() >= 0.995
    back = rotations.rotate_back(result.weight, rotation).numpy()
    assert known.output_error(back) == pytest.approx(error_of(name, case), rel=5e-3)


def test_levels_are_those_of_the_tables():
    """Max 1960, table I, for the normal variable."""
    tables = {
        1: [0.7980],
        2: [0.4528, 1.510],
        3: [0.2451, 0.7560, 1.344, 2.152],
        4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
    }
    for bits, table in tables.items():
        levels = normal_levels(bits)
        assert levels[len(table) :] == pytest.approx(table, abs=6e-4)
        assert levels[: len(table)] == pytest.approx([-level for level in reversed(table)], abs=6e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turboquant_is_its_formula_and_keeps_norms(bits: int):
    layer, target = build("two blocks of 128"), Target(bits=bits, group=32)
    result = compress("turboquant", layer, target, rotation_seed=7)
    quantised = grid_of(result)
    turned = layer.weight.double().numpy() @ matrix_of(some(quantised.rotation), 160)
    groups = turned.reshape(10, 5, 32)
    norms = np.linalg.norm(groups, axis=2, keepdims=True)
    levels = np.array(normal_levels(bits))
    nearest = levels[np.abs((groups / norms * 32**0.5)[..., None] - levels).argmin(-1)]
    expected = nearest * norms / np.linalg.norm(nearest, axis=2, keepdims=True)
    back = expected.reshape(10, 160) @ matrix_of(some(quantised.rotation), 160).T
    np.testing.assert_allclose(result.weight.numpy(), back, rtol=0, atol=1e-6)
    found = result.weight.double().numpy() @ matrix_of(some(quantised.rotation), 160)
    np.testing.assert_allclose(np.linalg.norm(found.reshape(10, 5, 32), axis=2, keepdims=True), norms, rtol=1e-5)


@pytest.mark.parametrize("method", ["rotated", "turboquant"])
@pytest.mark.parametrize("name", ["correlated", "201 inputs", "zero weights", "weights of 1e-12"])
def test_stored_layers_are_read_and_counted(method: str, name: str):
    layer, target = build(name), Target(bits=3, group=16)
    result = layer_packing.as_stored(compress(method, layer, target), target, torch.float32)
    parts = layer_packing.parts_of(result, target, torch.float32)
    out, inputs = layer.weight.shape
    found = layer_unpacking.restored(parts, target, (out, inputs))
    assert torch.equal(found.weight, result.weight)
    assert grid_of(found).rotation == grid_of(result).rotation
    expected = stored_bits(target, 1.0, out, inputs, levels=method == "turboquant", rotated=True)
    assert {key: part.nbytes for key, part in parts.items()} == {key: -(-bits // 8) for key, bits in expected.items()}
    with pytest.raises(ValueError, match="rotation must be"):
        layer_unpacking.restored({**parts, "rotation": torch.tensor([0, 3], dtype=torch.int32)}, target, (out, inputs))


def test_what_a_rotation_does_not_carry_is_refused_before_a_study():
    catalogue = Catalogue()

    def refusal(method: str, **params: object) -> str | None:
        return catalogue.refusal(method, catalogue.complete(method, params, "test"), Target(bits=4))

    for under in ("gptq", "gptaq", "qronos"):
        assert refusal("rotated", under=under) is None
    assert refusal("rotated", under="awq") == (
        "its under cannot quantise: awq needs absmean, sample, which rotated does not give"
    )
    assert refusal("rotated", under={"code_swaps": {"start": "awq"}}) == (
        "its under cannot quantise: code_swaps needs absmean, sample, which rotated does not give"
    )
    assert refusal("code_swaps", start="gptaq") == (
        "its start cannot quantise: gptaq needs cross_gram, which code_swaps does not give"
    )
    assert refusal("code_swaps", start="rotated") == "its start cannot quantise: rotated has a grid of its own"
    assert refusal("rotated", under="turboquant") == "its under cannot quantise: turboquant has a grid of its own"
    assert refusal("rotated", under="wanda") == "its under cannot be used: wanda does not quantise"
    for steps in (["wanda", "turboquant"], ["rotated", "wanda"]):
        joint = Target(pattern="2:4", bits=4)
        assert catalogue.refusal("chain", catalogue.complete("chain", {"chain": steps}, "test"), joint)


def test_what_a_rotation_does_not_carry_is_refused_of_an_instance_too():
    layer, target, rng = build("correlated"), Target(bits=4, group=16), torch.Generator()
    catalogue = Catalogue()
    turboquant, gptq, gptaq, rotated, swaps = (
        catalogue.build(name, catalogue.complete(name, {}, "test"))
        for name in ("turboquant", "gptq", "gptaq", "rotated", "code_swaps")
    )
    rotated, swaps = replace(rotated, under=turboquant), replace(swaps, start=turboquant)
    for method in (rotated, swaps, replace(swaps, start=replace(rotated, under=gptq))):
        with pytest.raises(UnsupportedTarget, match="must give integer codes. Got a grid of its own instead.$"):
            method.compress(layer, target, rng)
    unknown = replace(layer, gram=Gram(layer.gram.matrix, 1, drifted=True))
    with pytest.raises(ValueError, match="cross-Gram"):
        replace(rotated, under=gptaq).compress(unknown, target, rng)
