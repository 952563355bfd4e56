"""SparseGPT against the optimal brain surgeon written plainly, in float64, without a Cholesky factor."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.contract.layer import Gram, Layer, Target
from layerwise.methods.sparsegpt import SparseGPT
from tests.support.update_layers import LAYERS

TARGETS = [
    Target(0.5),
    Target(0.7),
    Target(0.5, "layer"),
    Target(pattern="2:4"),
    Target(pattern="4:8"),
    Target(0.5, bits=4),
    Target(0.5, "layer", bits=3, group=8),
    Target(pattern="2:4", bits=4, group=8),
    Target(pattern="2:4", bits=4, symmetric=True),
]


def oracle(layer: Layer, target: Target, blocksize: int, damping: float) -> np.ndarray:
    """[out, in] float64: after each column the inverse of what is left of the damped Gram is computed afresh."""
    weight = layer.weight.double().numpy().copy()
    gram = layer.gram.matrix.double().numpy().copy()
    out, inputs = weight.shape
    dead = gram.diagonal() == 0
    gram += damping * gram.diagonal().mean() * np.eye(inputs)
    weight[:, dead] = 0
    grids = plain_grids(layer.weight.numpy(), target) if target.bits else None
    # [in] diagonal of the inverse when all inputs before it are gone
    left = [np.linalg.inv(gram[j:, j:]) for j in range(inputs)]
    keep = np.ones((out, inputs), bool)
    for j in range(inputs):
        if target.n_of_m:
            kept, of = target.n_of_m
            if j % of == 0:
                columns = range(j, min(j + of, inputs))
                for i in range(out):
                    drop(keep, weight, left, [(i, c) for c in columns], max(len(columns) - kept, 0))
        elif j % blocksize == 0:
            columns = range(j, min(j + blocksize, inputs))
            rows = [list(range(out))] if target.pattern == "layer" else [[i] for i in range(out)]
            for group in rows:
                size = len(group)
                count = int(target.sparsity * size * (columns[-1] + 1)) - int(target.sparsity * size * j)
                drop(keep, weight, left, [(i, c) for i in group for c in columns], count)
        for i in range(out):
            value = weight[i, j] if keep[i, j] else 0.0
            if grids is not None:
                value = round_to(value, *grids[i][j // (target.group or inputs)], target.bits or 0)
            weight[i, j:] -= (weight[i, j] - value) / left[j][0, 0] * left[j][0]
            weight[i, j] = value
    return weight


def drop(keep: np.ndarray, weight: np.ndarray, left: list, entries: list[tuple[int, int]], count: int) -> None:
    """Prune the `count` entries whose removal alone costs least, w^2 / [H^-1]_jj / 2."""
    costs = sorted((weight[i, j] ** 2 / left[j][0, 0], (i, j)) for i, j in entries)
    for _, entry in costs[:count]:
        keep[entry] = False


def plain_grids(weight: np.ndarray, target: Target) -> list[list[tuple[np.float32, np.float32]]]:
    """(scale, zero) of every row and group, min-max with zero in the range, in float32."""
    length, steps = target.group or weight.shape[1], np.float32(2 ** (target.bits or 0) - 1)
    grids = []
    for row in weight:
        grids.append([])
        for start in range(0, len(row), length):
            low = min(row[start : start + length].min(), np.float32(0))
            high = max(row[start : start + length].max(), np.float32(0))
            if target.symmetric:
                high = max(abs(low), high)
                low = -high if low < 0 else low
            scale = (high - low) / steps
            zero = (steps + 1) / 2 if target.symmetric else np.round(-low / scale)
            grids[-1].append((scale, zero))
    return grids


def round_to(value: float, scale: np.float32, zero: np.float32, bits: int) -> float:
    code = min(max(np.round(np.float32(value) / scale) + zero, 0), 2**bits - 1)
    return float(scale * np.float32(code - zero))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("blocksize", [8, 128])
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_the_plain_surgeon(name: str, blocksize: int, target: Target):
    layer = layers.make(LAYERS[name], name)
    if name == "dead inputs":  # the diagonal of a dead input is no part of the promise; anything positive will do
        assert layer.gram.dead.sum() == 5
    result = SparseGPT(blocksize=blocksize).compress(layer, target, torch.Generator())
    expected = oracle(layer, target, blocksize, 0.01)
    largest = np.abs(layer.weight.numpy()).max()
    assert np.abs(result.weight.numpy() - expected).max() <= 1e-5 * max(largest, np.abs(expected).max())


def test_a_gram_that_does_not_factorise_is_damped_until_it_does():
    layer = layers.build("correlated")
    matrix = layer.gram.matrix.clone()
    matrix[0, 1] = matrix[1, 0] = 2 * matrix.diagonal().max()  # indefinite
    result = SparseGPT().compress(replace(layer, gram=Gram(matrix, 100)), Target(0.5), torch.Generator())
    assert torch.isfinite(result.weight).all() and result.info["damping"] > 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_is_an_error(value: float):
    layer = layers.build("correlated")
    matrix = layer.gram.matrix.clone()
    matrix[2, 2] = value
    with pytest.raises(ValueError, match="found no damping"):
        SparseGPT().compress(replace(layer, gram=Gram(matrix, 100)), Target(0.5), torch.Generator())


def test_layers_of_one_tap_factorise_once():
    gram = layers.build("correlated").gram
    first, second = gram.inverse_factor(0.01), gram.inverse_factor(0.01)
    assert first[0] is second[0]
    assert gram.inverse_factor(0.02)[0] is not first[0]


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_inverse_factor_is_the_factor_of_the_damped_inverse(damping: float):
    gram = layers.build("correlated").gram
    factor, used = gram.inverse_factor(damping)
    matrix = gram.matrix.double()
    damped = matrix + damping * matrix.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert used == damping and torch.equal(factor, factor.triu())
    product = factor.double().T @ factor.double() @ damped
    torch.testing.assert_close(product, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-4)
