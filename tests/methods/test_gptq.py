"""GPTQ against optimal brain quantisation written plainly: float64, the inverse updated column by column, no factor."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import output_error
from layerwise.checks.layer_cases import Recipe, grid_of
from layerwise.compression.verify import broken_promise
from layerwise.contract.layer import Compressed, Gram, Layer, Target
from layerwise.methods.chain import Chain
from layerwise.methods.gptq import GPTQ
from layerwise.methods.rtn import RTN
from layerwise.methods.wanda import Wanda
from layerwise.numerics import ops
from tests.support.typing_helpers import mask_of, some

LAYERS = {
    "correlated": Recipe(out=3, inputs=24),
    "dead inputs": Recipe(out=3, inputs=24, dead=(3, 8, 9, 10, 11, 12, 13, 14, 15)),  # all of one group of 8
    "fewer tokens than inputs": Recipe(out=3, inputs=24, sequences=1, length=9),
    "22 inputs": Recipe(out=5, inputs=22),
}
TARGETS = [
    Target(bits=2),
    Target(bits=4, symmetric=True),
    Target(bits=4, group=8),
    Target(bits=3, group=8, symmetric=True),
    Target(bits=3, group=5),
    Target(bits=8, group=12),
    Target(bits=4, group=128),
]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"blocksize": 8},
    {"blocksize": 5, "mse": True, "damping": 0.1},
    {"act_order": True},
    {"static_groups": True},
    {"act_order": True, "static_groups": True, "blocksize": 8},
    {"act_order": True, "mse": True, "blocksize": 8},
]


def label(settings: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items()) or "defaults"


def compress(layer: Layer, target: Target, **settings: Any) -> Compressed:
    return GPTQ(**settings).compress(layer, target, torch.Generator())


def plain_grid(row: np.ndarray, target: Target, mse: bool) -> tuple[np.float32, np.float32]:
    """(scale, zero) of the weights of one row and group, in float32."""
    row, steps = row.astype(np.float32), np.float32(2 ** (target.bits or 0) - 1)
    low, high = min(row.min(), np.float32(0)), max(row.max(), np.float32(0))
    if target.symmetric:
        high = max(abs(low), high)
        low = -high if low < 0 else low
    if low == high:
        low, high = np.float32(-1), np.float32(1)
    found = []
    for step in range(80 if mse else 1):
        scale = (np.float32(1 - step / 100) * high - np.float32(1 - step / 100) * low) / steps
        zero = (steps + 1) / 2 if target.symmetric else np.round(-np.float32(1 - step / 100) * low / scale)
        lost = sum(abs(value - round_to(value, scale, zero, target)[1]) ** 2.4 for value in row.astype(float))
        found.append((lost, scale, zero))
    return min(found, key=lambda entry: entry[0])[1:]


def round_to(value: float, scale: np.float32, zero: np.float32, target: Target) -> tuple[int, float]:
    """Code, and the weight that it represents."""
    code = min(max(np.round(np.float32(value) / scale) + zero, 0), 2 ** (target.bits or 0) - 1)
    return int(code), float(scale * np.float32(code - zero))


def oracle(layer: Layer, target: Target, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [out, in] and weight [out, in], a row at a time, and the rows [out] without a tie.

    Half way between two codes float32 decides, and the row goes on from there. The largest weight of a symmetric group,
    if negative, lies there: -max / scale = -(2^bits - 1) / 2.
    """
    gram = layer.gram.matrix.double().numpy()
    out, inputs = layer.weight.shape
    alive = gram.diagonal() > 0
    damped = gram + settings.get("damping", 0.01) * gram.diagonal().mean() * np.eye(inputs)
    group, mse, static = target.group or inputs, settings.get("mse", False), settings.get("static_groups", False)
    order = sorted(range(inputs), key=lambda j: -gram[j, j]) if settings.get("act_order") else list(range(inputs))
    codes, result, certain = np.zeros((out, inputs), int), np.zeros((out, inputs)), np.ones(out, bool)
    for i in range(out):
        dense = layer.weight[i].double().numpy()
        weight = np.where(alive, dense, 0.0)
        keep = np.ones(inputs, bool) if layer.keep is None else layer.keep[i].numpy()
        grids: dict[int | None, tuple[np.float32, np.float32]] = {None: plain_grid(dense, target, mse)}
        for g in range(-(-inputs // group)):
            grids[g] = plain_grid(weight[g * group : (g + 1) * group], target, mse)
        inverse = np.linalg.inv(damped)
        before = weight.copy()  # as it was when the block began
        for place, j in enumerate(order):
            if place % settings.get("blocksize", 128) == 0:
                before = weight.copy()
            g = (j if static else place) // group if target.group else None
            if target.group and not static and place % group == 0:
                own = order[place : place + group]
                grids[g] = plain_grid(np.where(keep, before, 0.0)[own], target, mse)
            value = weight[j] if keep[j] else 0.0
            codes[i, j], result[i, j] = round_to(value, *grids[g], target)
            near = {round_to(value * (1 + by), *grids[g], target)[0] for by in (-1e-5, 1e-5)}
            certain[i] &= len(near) == 1
            weight = weight - (weight[j] - result[i, j]) / inverse[j, j] * inverse[j]
            inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]  # input j is gone
            inverse[j, j] = 1.0  # and is asked for no more
    return codes, result, certain


def pruned(layer: Layer) -> Layer:
    """The layer as an earlier method would hand it over."""
    keep = ops.prune_mask(layer.weight.abs(), Target(0.4))
    return replace(layer, weight=torch.where(keep, layer.weight, 0.0), keep=keep)


@pytest.mark.parametrize("settings", SETTINGS, ids=label)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("zeros", ["dense", "pruned"])
def test_agrees_with_plain_quantisation(zeros: str, name: str, target: Target, settings: dict[str, Any]):
    layer = layers.make(LAYERS[name], name)
    layer = pruned(layer) if zeros == "pruned" else layer
    result = compress(layer, target, **settings)
    codes, weight, certain = oracle(layer, target, settings)
    assert certain.mean() >= 0.5
    assert np.array_equal(grid_of(result).codes.numpy()[certain], codes[certain])
    np.testing.assert_allclose(result.weight.numpy()[certain], weight[certain], rtol=1e-4, atol=1e-7)


def everything(check):
    """The check for every target and every setting."""
    check = pytest.mark.parametrize("settings", SETTINGS, ids=label)(check)
    return pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)(check)


@everything
def test_zeros_to_keep_stay_zero_and_their_loss_is_made_up_for(target: Target, settings: dict[str, Any]):
    layer = layers.build("correlated")
    dense, layer = layer.weight, pruned(layer)
    keep = some(layer.keep)
    layer.weight[~keep] = dense[~keep]  # not zero yet: their whole loss is to be made up for
    result = compress(layer, target, **settings)
    assert not result.weight[~keep].any()
    values = ops.quantised_values(grid_of(result), target)
    assert torch.equal(values, result.weight)  # zero is on the grid
    zeroed = replace(layer, weight=torch.where(keep, dense, 0.0))
    rounded = RTN(settings.get("mse", False)).compress(zeroed, target, torch.Generator())
    assert output_error(layer, result.weight) < output_error(layer, rounded.weight)


@pytest.mark.parametrize("settings", SETTINGS, ids=label)
@pytest.mark.parametrize("pattern", [Target(0.5), Target(pattern="2:4"), Target(0.5, "1x16")], ids=lambda t: t.label)
def test_a_chain_keeps_pattern_and_grid(pattern: Target, settings: dict[str, Any]):
    chain = Chain((Wanda(), GPTQ(**settings)))
    for grid in TARGETS:
        target = replace(pattern, bits=grid.bits, group=grid.group, symmetric=grid.symmetric)
        for name in ("correlated", "dead inputs", "50 inputs", "zero weights", "one input"):
            layer = layers.build(name)
            result = chain.compress(layer, target, torch.Generator())
            assert broken_promise(layer, target, result) is None
            assert torch.equal(mask_of(result), mask_of(Wanda().compress(layer, pattern, torch.Generator())))


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_act_order_is_nothing_but_another_order(target: Target, static_groups: bool):
    layer = pruned(layers.build("correlated"))
    diagonal = layer.gram.diagonal.tolist()
    order = sorted(range(64), key=lambda j: -diagonal[j])
    assert order != list(range(64))
    gram = Gram(layer.gram.matrix[order][:, order], layer.gram.tokens)
    ordered = replace(layer, weight=layer.weight[:, order], keep=some(layer.keep)[:, order], gram=gram)
    result = compress(layer, target, act_order=True, static_groups=static_groups)
    if not (static_groups and target.group):  # whose groups are those of the order that the inputs came in
        expected = compress(ordered, target)
        assert torch.equal(grid_of(result).codes[:, order], grid_of(expected).codes)
        assert torch.equal(result.weight[:, order], expected.weight)
        assert torch.equal(ops.grouping(grid_of(result), target)[order], ops.groups_of(64, target.group))
    again = compress(ordered, target, act_order=True)
    assert torch.equal(grid_of(again).codes, grid_of(compress(ordered, target)).codes)  # they are in that order already


def test_static_groups_are_those_of_rtn():
    layer = layers.build("correlated")
    target = Target(bits=3, group=16)
    rounded = RTN().compress(layer, target, torch.Generator())
    for act_order in (False, True):
        result = compress(layer, target, static_groups=True, act_order=act_order)
        assert torch.equal(grid_of(result).scales, grid_of(rounded).scales) and torch.equal(
            grid_of(result).zeros, grid_of(rounded).zeros
        )
        assert grid_of(result).group_of is None and not torch.equal(grid_of(result).codes, grid_of(rounded).codes)


@pytest.mark.parametrize("settings", SETTINGS, ids=label)
def test_8_bits_lose_next_to_nothing(settings: dict[str, Any]):
    for name in ("correlated", "two blocks of 128", "201 inputs", "bfloat16 weights"):
        layer = layers.build(name)
        for target in (Target(bits=8), Target(bits=8, group=16), Target(bits=8, symmetric=True)):
            assert output_error(layer, compress(layer, target, **settings).weight) < 1e-4


@pytest.mark.parametrize("settings", [{}, {"mse": True}, {"act_order": True}, {"static_groups": True}], ids=label)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_error_is_below_that_of_rounding_to_nearest(target: Target, settings: dict[str, Any]):
    ratios = []
    for seed in range(6):
        layer = layers.make(Recipe(out=12, inputs=96, sequences=16, seed=seed))
        rounded = RTN(settings.get("mse", False)).compress(layer, target, torch.Generator())
        ours = compress(layer, target, **settings)
        ratios.append(output_error(layer, ours.weight) / output_error(layer, rounded.weight))
    assert max(ratios) < 1 and np.mean(ratios) < 0.75, ratios


@everything
@pytest.mark.parametrize("name", ["correlated", "dead inputs", "50 inputs"])
def test_results_are_free_of_scale(name: str, target: Target, settings: dict[str, Any]):
    layer = layers.build(name)
    expected = compress(layer, target, **settings)
    for exponent in (-80, 4, 60):  # even, so that the root of the Gram's is exact too
        for scaled, factor in (
            (replace(layer, weight=2.0**exponent * layer.weight), 2.0**exponent),
            (replace(layer, gram=Gram(2.0**exponent * layer.gram.matrix, layer.gram.tokens)), 1.0),
        ):
            result = compress(scaled, target, **settings)
            assert torch.equal(grid_of(result).codes, grid_of(expected).codes)
            assert torch.equal(result.weight, factor * expected.weight)


def test_the_official_convention_counts_a_dead_input_as_1():
    """In the released code's H = 2 length G, so that it comes before inputs of small activations and raises damping."""
    layer = layers.build("dead inputs")
    small = Gram(1e-6 * layer.gram.matrix, layer.gram.tokens)
    dead = small.dead.nonzero()[:, 0].tolist()
    assert small.descending()[0].tolist()[-len(dead) :] == dead
    assert small.descending(1 / (2 * some(layer.statistics).length))[0].tolist()[: len(dead)] == dead
    target = Target(bits=4, group=16)
    for settings in ({}, {"act_order": True}):
        exact, official = (
            [
                compress(replace(layer, gram=gram), target, convention=convention, **settings)
                for gram in (layer.gram, small)
            ]
            for convention in ("exact", "official")
        )
        assert torch.equal(grid_of(exact[0]).codes, grid_of(exact[1]).codes) and not torch.equal(
            grid_of(official[0]).codes, grid_of(official[1]).codes
        )


def test_inputs_of_equal_activations_stay_in_their_order_and_are_sorted_once():
    gram = Gram(torch.diag(torch.tensor([1.0, 4.0, 0.0, 1.0, 4.0, 0.0])), 10)
    order, ordered = gram.descending()
    assert order.tolist() == [1, 4, 0, 3, 2, 5] and ordered.tokens == 10
    assert ordered.diagonal.tolist() == [4.0, 4.0, 1.0, 1.0, 0.0, 0.0]
    assert gram.descending()[1] is ordered and gram.descending(2.0)[0].tolist() == [1, 4, 2, 5, 0, 3]
