"""GQSA's one-shot part against its formulas written plainly, in float64 with numpy's inverse."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.layer_cases import Recipe, grid_of
from layerwise.contract.layer import Gram, Layer, Target
from layerwise.methods.gqsa import GQSA
from layerwise.numerics import ops
from layerwise.storage.bits_per_weight import bits_per_weight
from tests.support.typing_helpers import mask_of

LAYERS = {
    "correlated": Recipe(out=6, inputs=24),
    "dead inputs": Recipe(out=6, inputs=24, dead=(3, 8, 9, 10, 11)),
    "fewer tokens than inputs": Recipe(out=6, inputs=24, sequences=1, length=9),
    "22 inputs": Recipe(out=5, inputs=22),
    "weights of 1e-12": Recipe(out=5, inputs=16, weight_scale=1e-12),
}
TARGETS = [
    Target(0.5, "1x4"),
    Target(0.7, "1x8"),
    Target(0.5, "1x4", bits=4, group=4),
    Target(0.5, "1x8", bits=3, group=4),  # a block of two groups
    Target(0.5, "1x4", bits=4, group=8),  # a group of two blocks
    Target(0.5, "1x4", bits=2),
    Target(0.5, "1x4", bits=4, group=4, symmetric=True),
]


def oracle(layer: Layer, target: Target, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """(weight [out, in] float32, mask), block by block and group by group."""
    weight, gram = layer.weight.numpy(), layer.gram.matrix.double().numpy()
    inputs, block = weight.shape[1], int(target.pattern[2:])
    inverse = np.linalg.inv(gram + damping * gram.diagonal().mean() * np.eye(inputs))
    mask = np.ones_like(weight, bool)
    values = weight.copy()
    for row, kept, value in zip(weight.astype(float), mask, values, strict=True):
        saliency = np.where(gram.diagonal() == 0, 0.0, row**2 / inverse.diagonal() ** 2)
        blocks = [range(start, min(start + block, inputs)) for start in range(0, inputs, block)]
        mean = [sum(saliency[j] for j in columns) / block for columns in blocks]
        for gone in np.argsort(mean, kind="stable")[: int(target.sparsity * len(blocks))]:
            kept[blocks[gone]] = False
        value[~kept] = 0
        if target.bits:
            length = target.group or inputs
            for start in range(0, inputs, length):
                value[start : start + length] = on_grid(value[start : start + length], target.bits, target.symmetric)
        value[~kept] = 0
    return values, mask


def on_grid(piece: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """The piece rounded to its min-max grid, which holds zero, in float32."""
    low, high = min(piece.min(), np.float32(0)), max(piece.max(), np.float32(0))
    if symmetric:
        high = max(-low, high)
        low = -high if low < 0 else low
    if high == low:
        return np.zeros_like(piece)
    scale = (high - low) / np.float32(2**bits - 1)
    zero = np.float32(2 ** (bits - 1)) if symmetric else np.round(-low / scale)
    return scale * (np.clip(np.round(piece / scale) + zero, 0, 2**bits - 1) - zero)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_the_formulas(name: str, damping: float, target: Target):
    layer = layers.make(LAYERS[name], name)
    result = GQSA(damping).compress(layer, target, torch.Generator())
    weight, mask = oracle(layer, target, damping)
    assert np.array_equal(mask_of(result).numpy(), mask)
    assert np.array_equal(result.weight.numpy(), weight)
    assert result.info["damping"] == damping


def test_activations_decide_which_block_stays():
    """Of two blocks with weights 2 and 1, the second stays where the mean square of its inputs is more than twice."""
    weight = torch.tensor([[2.0, 2.0, 1.0, 1.0]])
    for size, kept in ((1.9, [True, False]), (2.1, [False, True])):
        gram = Gram(torch.diag(torch.tensor([1.0, 1.0, size, size])), 10)
        result = GQSA(1e-6).compress(Layer("layer", weight, gram), Target(0.5, "1x2"), torch.Generator())
        assert mask_of(result)[0, ::2].tolist() == kept


def test_the_blocks_of_dead_inputs_go_first():
    layer = layers.make(Recipe(out=6, inputs=24, dead=tuple(range(8, 16))))
    layer = replace(layer, weight=torch.where(layer.gram.dead, 100.0, layer.weight))
    mask = mask_of(GQSA().compress(layer, Target(0.4, "1x8"), torch.Generator()))
    assert torch.equal(mask, (~layer.gram.dead).expand_as(mask))


def test_stored_at_a_little_more_than_three_bits():
    """4-bit codes, 4-bit zero, 16-bit scale and 16-bit index of each kept block of 16: the paper's W4S50."""
    assert bits_per_weight(Target(0.5, "1x16", bits=4, group=16), 0.5, 64, 256) == 0.5 * (4 + (4 + 16 + 16) / 16)


def test_the_grid_of_a_group_is_that_of_its_kept_weights():
    layer = layers.build("correlated")
    target = Target(0.5, "1x16", bits=4, group=32)
    result = GQSA().compress(layer, target, torch.Generator())
    grid = ops.fit_grid(torch.where(mask_of(result), layer.weight, 0.0), target)
    came = grid_of(result)
    assert torch.equal(came.scales, grid.scales) and torch.equal(came.zeros, grid.zeros)
