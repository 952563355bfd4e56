"""AWQ against its search written plainly, row by row and group by group, with errors in float64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import output_error
from layerwise.checks.layer_cases import Recipe, grid_of
from layerwise.compression.verify import broken_promise
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Gram, Layer, Target
from layerwise.contract.method_file import CatalogueError
from layerwise.methods.awq import AWQ, input_scale
from layerwise.methods.chain import Chain
from layerwise.methods.rtn import RTN
from layerwise.methods.wanda import Wanda
from tests.support.typing_helpers import mask_of, some

SMALL = {
    "correlated": Recipe(out=3, inputs=24),
    "dead inputs": Recipe(out=3, inputs=24, dead=(3, 8, 9, 10, 11)),
    "fewer tokens than inputs": Recipe(out=3, inputs=24, sequences=1, length=9),
    "22 inputs": Recipe(out=3, inputs=22),
    "one output": Recipe(out=1, inputs=24),
    "bfloat16 weights": Recipe(out=3, inputs=24, weights="bfloat16"),
}
TARGETS = [
    Target(bits=4, group=8),
    Target(bits=3, group=8),
    Target(bits=2, group=128),  # longer than a row
    Target(bits=4),
    Target(bits=8, group=16),
    Target(bits=4, group=8, symmetric=True),
]
FOUR = Target(bits=4, group=16)
CONVENTIONS = ["exact", "official"]


def compress(layer: Layer, target: Target, **params: Any) -> Compressed:
    return AWQ(**params).compress(layer, target, torch.Generator())


def scaled(layer: Layer, weights: float, inputs: float) -> Layer:
    """The layer with its weights and its inputs multiplied."""
    known = layer.statistics
    statistics = replace(some(known), absmean=inputs * some(known).absmean, sample=inputs * some(known).sample)
    gram = Gram(inputs**2 * layer.gram.matrix, layer.gram.tokens)
    return replace(layer, weight=weights * layer.weight, gram=gram, statistics=statistics)


def plain_round(row: np.ndarray, target: Target, official: bool) -> tuple[np.ndarray, np.float32, np.float32]:
    """Codes, scale and zero of the float32 weights of one row and group."""
    levels = np.float32(2 ** some(target.bits) - 1)
    low, high = row.min(), row.max()
    if target.symmetric:
        high = max(abs(low), abs(high))
        low = -high if row.min() < 0 else np.float32(0)
        step, zero = (high - low) / levels, (levels + 1) / 2
    elif official:
        step = max(high - low, np.float32(1e-5)) / levels
        zero = np.clip(-np.round(low / step), 0, levels)
    else:
        low, high = min(low, np.float32(0)), max(high, np.float32(0))
        step = (high - low) / levels
        zero = np.round(-low / step)
    return np.clip(np.round(row / step) + zero, 0, levels), step, zero


def plain_scale(layer: Layer, ratio: float, official: bool) -> np.ndarray:
    """[in] float64 scale of the inputs."""
    absmean = some(layer.statistics).absmean.double().numpy()
    powers = np.maximum((absmean if official else absmean / absmean.mean()) ** ratio, 1e-4)
    return powers / np.sqrt(powers.max() * powers.min())


def quantised(layer: Layer, scale: np.ndarray, limits: np.ndarray | None, target: Target, official: bool) -> np.ndarray:
    """[out, in] float64 Q(W s) / s, every row and group by itself."""
    weight = (layer.weight.numpy() * scale.astype(np.float32)).astype(np.float32)
    result, length = np.zeros(weight.shape), target.group or weight.shape[1]
    for i, row in enumerate(weight):
        for group, start in enumerate(range(0, len(row), length)):
            piece = row[start : start + length]
            if limits is not None:
                piece = np.clip(piece, -limits[i, group], limits[i, group])
            codes, step, zero = plain_round(piece, target, official)
            result[i, start : start + length] = step * (codes - zero) / scale[start : start + length]
    return result


def plain_limits(layer: Layer, scale: np.ndarray, target: Target, official: bool) -> np.ndarray:
    """[out, groups] of the ten shrunk ranges the one whose outputs on the sample are best."""
    weight = (layer.weight.numpy() * scale).astype(np.float32)
    sample, length = some(layer.statistics).sample.double().numpy() / scale, target.group or weight.shape[1]
    limits = []
    for row in weight:
        limits.append([])
        for start in range(0, len(row), length):
            piece, inputs = row[start : start + length], sample[:, start : start + length]
            largest, errors = np.abs(piece).max(), []
            shrunk = [np.float32(1 - i / 20) * largest for i in range(10)]
            for limit in shrunk:
                codes, step, zero = plain_round(np.clip(piece, -limit, limit), target, official)
                errors.append(((inputs @ (piece - (step * (codes - zero)).astype(np.float64))) ** 2).mean())
            limits[-1].append(shrunk[int(np.argmin(errors))])
    return np.array(limits)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_the_plain_search(name: str, target: Target, convention: str):
    layer, official = layers.make(SMALL[name], name), convention == "official"
    result = compress(layer, target, convention=convention)
    scales = [input_scale(some(layer.statistics).absmean, step / 20, official).numpy() for step in range(20)]
    for step, scale in enumerate(scales):  # the formula; on the last bits, which are taken as they are, hang ties
        np.testing.assert_allclose(scale, plain_scale(layer, step / 20, official), rtol=1e-6)
    errors = [output_error(layer, torch.tensor(quantised(layer, s, None, target, official))) for s in scales]
    best = int(np.argmin(errors))
    assert result.info["ratio"] == best / 20
    scale = some(grid_of(result).input_scale).numpy()
    assert np.array_equal(scale, scales[best])
    limits = plain_limits(layer, scale, target, official)
    unclipped, expected = (quantised(layer, scale, tried, target, official) for tried in (None, limits))
    if output_error(layer, torch.tensor(expected)) < errors[best] or official:
        np.testing.assert_allclose(result.info["clip"].numpy(), limits, rtol=1e-6)
    else:
        assert result.info["clip"] is None
        expected = unclipped
    np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-6, atol=1e-9)
    unclipped_result = compress(layer, target, convention=convention, clip=False)
    np.testing.assert_allclose(unclipped_result.weight.numpy(), unclipped, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("target", [*TARGETS, FOUR], ids=lambda target: target.label)
@pytest.mark.parametrize("name", layers.LAYERS)
def test_neither_scaling_nor_clipping_makes_it_worse_than_rounding(name: str, target: Target):
    layer = layers.build(name)
    results = [RTN().compress(layer, target, torch.Generator())]
    results += [compress(layer, target, clip=clip) for clip in (False, True)]
    plain, scaled_only, both = (absolute_error(layer, result) for result in results)
    assert scaled_only <= plain * (1 + 1e-6) and both <= scaled_only * (1 + 1e-6)


def absolute_error(layer: Layer, result: Compressed) -> float:
    lost = layer.weight.double() - result.weight.double()
    return max(float(((lost @ layer.gram.matrix.double()) * lost).sum()), 0.0)


def test_scaling_and_clipping_each_help_where_inputs_differ():
    layer = layers.build("correlated")
    results = [RTN().compress(layer, FOUR, torch.Generator())]
    results += [compress(layer, FOUR, clip=clip) for clip in (False, True)]
    plain, scaled_only, both = (absolute_error(layer, result) for result in results)
    assert both < 0.95 * scaled_only and scaled_only < 0.8 * plain
    assert results[1].info["ratio"] > 0 and results[2].info["clip"].shape == (24, 4)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", ["correlated", "constant weights", "dead inputs", "50 inputs"])
def test_one_ratio_without_clipping_is_rounding_to_nearest(name: str, target: Target):
    layer = layers.build(name)
    result, plain = compress(layer, target, grid=1, clip=False), RTN().compress(layer, target, torch.Generator())
    assert torch.equal(result.weight, plain.weight) and torch.equal(grid_of(result).codes, grid_of(plain).codes)
    assert result.info["ratio"] == 0 and torch.equal(
        some(grid_of(result).input_scale), torch.ones(layer.weight.shape[1])
    )


@pytest.mark.parametrize(("weights", "inputs"), [(2.0**40, 1.0), (2.0**-60, 1.0), (1.0, 2.0**-30), (2.0**9, 2.0**20)])
def test_exact_is_free_of_the_scales_of_weights_and_inputs(weights: float, inputs: float):
    for name in ("correlated", "dead inputs", "constant weights"):
        layer = layers.build(name)
        before, after = compress(layer, FOUR), compress(scaled(layer, weights, inputs), FOUR)
        assert torch.equal(grid_of(before).codes, grid_of(after).codes) and torch.equal(
            some(grid_of(before).input_scale), some(grid_of(after).input_scale)
        )
        assert torch.equal(weights * before.weight, after.weight)


@pytest.mark.parametrize(("weights", "inputs"), [(1e-8, 1.0), (1.0, 1e-15)])
def test_official_is_not(weights: float, inputs: float):
    """The floors under a range, 1e-5, and under (mean |x|)^ratio, 1e-4, are absolute."""
    layer = layers.build("correlated")
    small = scaled(layer, weights, inputs)
    before, after = (output_error(case, compress(case, FOUR, convention="official").weight) for case in (layer, small))
    assert after != pytest.approx(before, rel=0.02)


def test_a_group_without_zero_in_its_range_is_lost_to_the_official_code():
    """Its zero point is clamped to the codes, so that all weights are rounded to one end of the grid."""
    layer = layers.build("correlated")
    positive = replace(layer, weight=0.9 + 0.1 * torch.rand(24, 64, generator=torch.Generator().manual_seed(0)))
    plain = RTN().compress(positive, FOUR, torch.Generator())
    exact, official = (compress(positive, FOUR, clip=False, convention=convention) for convention in CONVENTIONS)
    assert output_error(positive, exact.weight) <= output_error(positive, plain.weight)
    assert output_error(positive, official.weight) > 10 * output_error(positive, exact.weight)


def test_clipping_that_the_layer_would_suffer_from_is_not_kept():
    """A sample of one input says nothing of the others, whose weights it would clip away."""
    layer = layers.build("correlated")
    sample = torch.zeros_like(some(layer.statistics).sample)
    sample[:, 0] = 1
    misled = replace(layer, statistics=replace(some(layer.statistics), sample=sample))
    exact, official = (compress(misled, Target(bits=3), convention=convention) for convention in CONVENTIONS)
    unclipped = compress(misled, Target(bits=3), clip=False)
    assert exact.info["clip"] is None and torch.equal(exact.weight, unclipped.weight)
    assert output_error(misled, official.weight) > 1.1 * output_error(misled, unclipped.weight)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(
    "target",
    [Target(pattern="2:4", bits=4, group=16), Target(0.5, bits=2, group=4), Target(0.5, bits=3, symmetric=True)],
    ids=lambda target: target.label,
)
def test_a_chain_keeps_zeros_in_both_orders(target: Target, positive: bool, convention: str):
    """Also where all kept weights of a group are positive: the pruned ones put zero into its range."""
    layer = layers.build("correlated")
    layer = replace(layer, weight=layer.weight.abs()) if positive else layer
    awq, wanda = AWQ(convention=convention), Wanda()
    mask = mask_of(wanda.compress(layer, target.pruning, torch.Generator()))
    first = Chain((wanda, awq)).compress(layer, target, torch.Generator())
    assert torch.equal(mask_of(first), mask) and not first.weight[~mask].any()
    zeros = grid_of(first).zeros.repeat_interleave(target.group or 64, 1)
    assert torch.equal(grid_of(first).codes[~mask].float(), zeros[~mask])  # zero before any mask is applied
    second = Chain((awq, wanda)).compress(layer, target, torch.Generator())
    kept = awq.compress(layer, target.grid, torch.Generator()).weight[second.mask]
    assert torch.equal(second.weight[second.mask], kept)
    for result in (first, second):
        assert broken_promise(layer, target, result) is None and grid_of(result).input_scale is not None


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_dead_inputs_get_the_smallest_scale(convention: str):
    layer = layers.build("dead inputs")
    result = compress(layer, Target(bits=3), convention=convention)
    assert result.info["ratio"] > 0
    dead = layer.gram.dead
    scale = some(grid_of(result).input_scale)
    assert scale[dead].max() < 0.1 * scale[~dead].min()
    assert torch.equal(some(grid_of(compress(layers.build("all inputs dead"), FOUR)).input_scale), torch.ones(64))


def test_a_group_of_dead_inputs_is_not_clipped():
    """All ranges are as good there, and the first, the whole one, is taken."""
    layer = layers.make(Recipe(dead=tuple(range(16))))
    result = compress(layer, FOUR, convention="official")
    largest = (layer.weight * some(grid_of(result).input_scale))[:, :16].abs().amax(1)
    assert torch.equal(result.info["clip"][:, 0], largest)


def test_without_statistics_it_is_one_sentence():
    layer = replace(layers.build("correlated"), statistics=None)
    with pytest.raises(ValueError, match=r"^awq needs absmean and sample, but correlated has no statistics\.$"):
        compress(layer, FOUR)
    assert torch.equal(compress(layer, Target()).weight, layer.weight)


@pytest.mark.parametrize(
    ("params", "said"), [({"grid": 0}, "grid"), ({"clip": 1}, "clip"), ({"convention": "x"}, "con")]
)
def test_wrong_parameters_are_one_sentence(params: dict, said: str):
    with pytest.raises(CatalogueError, match=rf"^methods: awq's {said}\w* (is wrong: |must be ).*\.$"):
        Catalogue().complete("awq", params, "methods")
