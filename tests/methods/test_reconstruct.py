"""Reconstruct against the normal equations written plainly, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import output_error
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Gram, Layer, Target
from layerwise.methods import reconstruct
from tests.support.typing_helpers import mask_of, some

TARGETS = [Target(0.6), Target(0.5, "layer"), Target(pattern="2:4"), Target(0.5, "1x16")]


def build(name: str = "reconstruct", **params: object):
    catalogue = Catalogue()
    return catalogue.build(name, catalogue.complete(name, params, "test"))


def compress(layer: Layer, target: Target, name: str = "reconstruct", **params: object):
    return build(name, **params).compress(layer, target, torch.Generator())


def normal_equations(layer: Layer, mask: torch.Tensor, damping: float) -> np.ndarray:
    """[out, in] row by row: W_S + (G_SS + damping mean(diagonal) I)^-1 G_SP W_P."""
    weight, gram = layer.weight.double().numpy(), layer.gram.matrix.double().numpy()
    shift = damping * gram.diagonal().mean()
    result = np.zeros_like(weight)
    for row, keep in enumerate(mask.numpy()):
        kept, gone = np.flatnonzero(keep), np.flatnonzero(~keep)
        damped = gram[np.ix_(kept, kept)] + shift * np.eye(len(kept))
        update = np.linalg.solve(damped, gram[np.ix_(kept, gone)] @ weight[row, gone])
        result[row, kept] = weight[row, kept] + update
    return result


@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", ["correlated", "two blocks of 128", "one output", "201 inputs"])
def test_it_solves_the_normal_equations(name: str, target: Target, damping: float):
    layer = layers.build(name)
    result = compress(layer, target, damping=damping)
    expected = normal_equations(layer, mask_of(result), damping)
    np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())
    assert result.info["damping"] == damping


@pytest.mark.parametrize("name", ["dead inputs", "fewer tokens than inputs", "one token"])
def test_degenerate_grams_are_solved_to_the_same_error(name: str):
    layer = layers.build(name)
    result = compress(layer, Target(0.5), damping=1e-4)
    expected = torch.tensor(normal_equations(layer, mask_of(result), 1e-4))
    assert output_error(layer, result.weight) == pytest.approx(output_error(layer, expected), rel=1e-3, abs=1e-10)


@pytest.mark.parametrize("mask_from", ["wanda", "magnitude", "sparsegpt", "alps", "dsnot"])
def test_no_row_is_worse_than_the_method_whose_mask_it_takes(mask_from: str):
    """Whatever the damping: W under the mask and the method's own weights are candidates."""
    layer, target = layers.build("correlated"), Target(0.6)
    given = compress(layer, target, mask_from)
    for damping in (1e-6, 100.0):
        result = compress(layer, target, mask_from=mask_from, damping=damping)
        assert torch.equal(mask_of(result), mask_of(given))
        for row in range(len(layer.weight)):
            one = replace(layer, weight=layer.weight[row : row + 1])
            ours, plain = result.weight[row : row + 1], torch.where(mask_of(given), layer.weight, 0.0)[row : row + 1]
            error = output_error(one, ours)
            assert error <= output_error(one, given.weight[row : row + 1]) * (1 + 1e-6)
            assert error <= output_error(one, plain) * (1 + 1e-6)


def test_rows_of_one_support_share_a_factor(monkeypatch: pytest.MonkeyPatch):
    layer = layers.build("correlated")
    mask = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) > 0.6
    mask = mask[torch.tensor([0, 1, 0, 2] * 6)]
    chunks = list(reconstruct.supports(mask))
    assert sum(len(chunk[0]) for chunk in chunks) == 3
    assert sorted(row for _, _, rows, real in chunks for row in rows[real].tolist()) == list(range(24))
    solved = reconstruct.least_squares(layer.weight.double(), mask, layer.gram.matrix.double(), 0.01)
    np.testing.assert_allclose(some(solved).numpy(), normal_equations(layer, mask, 0.01), rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(reconstruct, "CHUNK", 1)  # one support at a time
    again = reconstruct.least_squares(layer.weight.double(), mask, layer.gram.matrix.double(), 0.01)
    torch.testing.assert_close(again, solved, rtol=1e-9, atol=1e-12)


def test_the_damping_grows_until_the_gram_can_be_factorised():
    layer = layers.build("correlated")
    broken = layer.gram.matrix.clone()
    broken[0, 1] = broken[1, 0] = 1.1 * (broken[0, 0] * broken[1, 1]).sqrt()  # no second moment of anything
    result = compress(replace(layer, gram=Gram(broken, 256)), Target(0.25))
    assert result.info["damping"] > 1e-4
    assert torch.isfinite(result.weight).all()


def test_a_gram_that_is_not_finite_is_one_sentence():
    layer = layers.build("correlated")
    bad = layer.gram.matrix.clone()
    bad[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"finite.*\.$"):
        compress(replace(layer, gram=Gram(bad, 256)), Target(0.5))
