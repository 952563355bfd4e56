"""Quantised low-rank factors: against the published algorithm in numpy, the optimum, and brute force over codes."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import best_error_of_rank, output_error
from layerwise.checks.layer_cases import LAYERS, Recipe
from layerwise.compression.solver import Solver
from layerwise.compression.verify import broken_promise
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Layer, Method, Target, UnsupportedTarget
from layerwise.methods.eora import EoRA
from layerwise.methods.gptq import GPTQ
from layerwise.methods.lplr import LPLR
from layerwise.methods.oats import OATS
from layerwise.methods.rocket import ROCKET
from layerwise.methods.svd import SVD
from layerwise.methods.svd_llm import SVDLLM
from layerwise.methods.wanda import Wanda
from layerwise.numerics import factor_rounding, low_rank
from layerwise.storage.bits_per_weight import bits_per_weight
from tests.support.typing_helpers import some

ROUNDED = Target(rank=0.5, factor_bits=4, factor_group=16)


def compress(method: Method, layer: Layer, target: Target) -> Compressed:
    return method.compress(layer, target, torch.Generator())


def nearest(matrix: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Each row's groups on a min-max grid that holds 0, code by code in float32."""
    out = np.zeros(matrix.shape, np.float32)
    for row, line in enumerate(matrix.astype(np.float32)):
        for start in range(0, len(line), group):
            piece = line[start : start + group]
            low, high = min(piece.min(), np.float32(0)), max(piece.max(), np.float32(0))
            scale = np.float32((high - low) / np.float32(2**bits - 1))
            zero = np.round(-low / scale)
            codes = np.clip(np.round(piece / scale) + zero, 0, 2**bits - 1)
            out[row, start : start + group] = scale * (codes - zero)
    return out


def published(layer: Layer, right: np.ndarray, bits: int, group: int, sweeps: int) -> list[float]:
    """The loss after each sweep of LPLRFactorize: least squares on the whitened matrices, B first."""
    weight, root = layer.weight.double().numpy(), low_rank.root(layer.gram.matrix.double()).numpy()
    losses = []
    for _ in range(sweeps):
        left = nearest(np.linalg.lstsq((right @ root).T, (weight @ root).T, rcond=None)[0].T, bits, group)
        right = nearest(np.linalg.lstsq(left.astype(np.float64), weight, rcond=None)[0], bits, group)
        losses.append(float((((weight - left.astype(np.float64) @ right) @ root) ** 2).sum()))
    return losses


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["correlated", "two blocks of 128", "bfloat16 weights"])
def test_lplr_is_the_published_algorithm(name: str, bits: int):
    """The least loss of its first sweeps, as far as no rounding tie is decided by the last bit."""
    layer, target = layers.build(name), Target(rank=0.4, factor_bits=bits, factor_group=16)
    start = some(compress(SVDLLM(), layer, target.unrounded).low_rank).right.double().numpy()
    start = start * np.sign(start[np.arange(len(start)), np.abs(start).argmax(1)])[:, None]
    losses = published(layer, start, bits, 16, 3)
    for sweeps in (1, 3):
        found = compress(LPLR(SVDLLM(), sweeps), layer, target)
        lost = (layer.weight - found.weight).double()
        reached = float(((lost @ layer.gram.matrix.double()) * lost).sum())
        assert reached == pytest.approx(min(losses[:sweeps]), rel=1e-5)


@pytest.mark.parametrize("compensate", [False, True])
def test_the_loss_is_that_of_the_rounded_factors(compensate: bool):
    layer = layers.build("correlated")
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    _, right = low_rank.best_factors(weight, 8, gram)
    found = factor_rounding.round_factors(weight, layer, right, Target(bits=3, group=16), 4, compensate)
    lost = weight - found.left.weight.double() @ found.right.weight.double()
    assert found.loss == pytest.approx(float(((lost @ gram) * lost).sum()), rel=1e-12)
    for factor in (found.left, found.right):
        own = replace(layer, weight=factor.weight.clone())
        assert broken_promise(own, Target(bits=3, group=16), factor) is None


def test_an_error_of_a_factor_costs_as_in_a_layer_of_its_own():
    """By B + D the loss of the best B grows by tr(D (A G A^T) D^T); by A + E, B orthonormal, by tr(E G E^T)."""
    layer = layers.build("correlated")
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    left, right = low_rank.best_factors(weight, 5, gram)

    def loss(b: torch.Tensor, a: torch.Tensor) -> float:
        lost = weight - b @ a
        return float(((lost @ gram) * lost).sum())

    generator = torch.Generator().manual_seed(0)
    moved = torch.randn(left.shape, generator=generator, dtype=torch.float64)
    grown = float(((moved @ (right @ gram @ right.T)) * moved).sum())
    assert loss(left + moved, right) - loss(left, right) == pytest.approx(grown, rel=1e-9)
    moved = torch.randn(right.shape, generator=generator, dtype=torch.float64)
    grown = float(((moved @ gram) * moved).sum())
    assert loss(left, right + moved) - loss(left, right) == pytest.approx(grown, rel=1e-9)


def test_no_codes_of_the_left_factor_are_better_where_its_gram_is_diagonal():
    """Then rounding to nearest is best: brute force over all codes of 2 bits on the grid that was fitted."""
    layer = layers.make(Recipe(out=3, inputs=8, correlated=False))
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    root = low_rank.root(gram)
    right = (root @ torch.linalg.svd(weight @ root, full_matrices=False)[2][:2].T).T  # A G^-1 A^T would be I
    right = torch.linalg.qr((right @ torch.linalg.inv(root.T) @ torch.linalg.inv(root)).T @ torch.eye(2).double())[0].T
    inner = right @ gram @ right.T
    right = torch.linalg.inv(torch.linalg.cholesky(inner)) @ right  # A G A^T = I
    found = factor_rounding.round_factors(weight, layer, right, Target(bits=2), 1, False)
    codes = found.left.quantised
    losses = []
    for row in range(3):
        scale, zero = float(some(codes).scales[row, 0]), float(some(codes).zeros[row, 0])
        tried = [
            float((lost @ gram) @ lost)
            for pair in itertools.product(range(4), repeat=2)
            for lost in [weight[row] - torch.tensor([scale * (code - zero) for code in pair]).double() @ right]
        ]
        lost = weight[row] - found.left.weight[row].double() @ right
        losses.append((float((lost @ gram) @ lost), min(tried)))
    assert all(own == pytest.approx(best, rel=1e-6) for own, best in losses)


@pytest.mark.parametrize("rounding", ["nearest", "columns"])
@pytest.mark.parametrize("name", LAYERS)
def test_more_bits_and_sweeps_are_no_worse_and_the_optimum_is_never_beaten(name: str, rounding: str):
    layer = layers.build(name)
    rank = ROUNDED.rank_of(*layer.weight.shape)
    errors = []
    for bits in (2, 4, 8):
        target = replace(ROUNDED, factor_bits=bits)
        once, often = (compress(LPLR(SVDLLM(), sweeps, rounding), layer, target) for sweeps in (1, 6))
        assert broken_promise(layer, target, often) is None
        first, best = (output_error(layer, result.weight) for result in (once, often))
        assert not best > first * (1 + 1e-6) + 1e-12
        if math.isnan(first):  # there is no output to lose
            return
        errors.append(best)
    optimum = best_error_of_rank(layer, rank)
    assert errors[2] <= errors[0] + 1e-9 and errors[2] >= optimum * (1 - 1e-6) - 1e-9
    if name in ("correlated", "bfloat16 weights"):
        assert errors[2] <= 1.01 * optimum < errors[1] < errors[0]


def test_columns_with_compensation_lose_less_than_rounding_to_nearest():
    layer = layers.build("correlated")
    for bits in (2, 3, 4):
        target = replace(ROUNDED, factor_bits=bits)
        plain, better = (output_error(layer, compress(LPLR(SVDLLM(), 10, how), layer, target).weight) for how in HOW)
        assert better < (1 - 0.04 * (4 - bits)) * plain


HOW = ("nearest", "columns")
AFTER = {
    Target(rank=0.4, factor_bits=4): SVD(),
    Target(bits=3, group=16, rank=0.2, factor_bits=4, factor_group=16): EoRA(GPTQ()),
    Target(pattern="2:4", rank=0.2, factor_bits=3): EoRA(Wanda()),
    Target(0.5, rank=0.2, factor_bits=8, factor_group=24): OATS(5),
}


@pytest.mark.parametrize("target", AFTER, ids=lambda target: target.label)
def test_the_part_beside_the_factors_is_that_of_after(target: Target):
    layer, after = layers.build("correlated"), AFTER[target]
    given, result = compress(after, layer, target.unrounded), compress(LPLR(after), layer, target)
    assert broken_promise(layer, target, result) is None
    if some(given.low_rank).rest is None:
        assert some(result.low_rank).rest is None and result.quantised is None and result.mask is None
    else:
        assert torch.equal(some(some(result.low_rank).rest), some(some(given.low_rank).rest))
    exact, rounded = output_error(layer, given.weight), output_error(layer, result.weight)
    assert rounded <= (1.6 if target.factor_bits == 3 else 1.3) * exact


def test_its_bits_are_those_of_its_codes_and_grids():
    layer, target = layers.build("correlated"), ROUNDED
    result, told = Solver("lplr", LPLR(SVDLLM()), target, 0).solve(layer)
    rank, out, inputs = 8, 24, 64
    counted = 4 * rank * (out + inputs) + (16 + 4) * (out * 1 + rank * 4)  # rows of B have one group, of A four
    assert told["bits_per_weight"] == counted / (out * inputs) < bits_per_weight(Target(rank=0.5), 1.0, out, inputs)
    assert torch.equal(
        some(some(result.low_rank).left_codes).scales.half().float(), some(some(result.low_rank).left_codes).scales
    )


def test_who_quantises_factors_and_what_lplr_follows():
    catalogue = Catalogue()

    def refusal(name: str, target: Target, **params: object) -> str | None:
        return catalogue.refusal(name, catalogue.complete(name, params, "test"), target)

    assert refusal("lplr", ROUNDED) is None
    assert refusal("svd_llm", ROUNDED) == "svd_llm does not quantise low-rank factors"
    assert refusal("wanda", ROUNDED) == "wanda gives no low-rank factors"
    told = "lplr gives quantised low-rank factors, so the target must have factor_bits"
    assert refusal("lplr", Target(rank=0.4)) == told
    assert refusal("lplr", Target(0.5)) == "lplr gives low-rank factors, so the target must have a rank"
    beside = replace(ROUNDED, sparsity=0.5)
    told = "its after cannot be used: svd_llm gives only low-rank factors, not a sum with them"
    assert refusal("lplr", beside) == told and refusal("lplr", beside, after="oats") is None
    assert refusal("lplr", ROUNDED, after="rocket") == "its after cannot be used: rocket gives a sparse factor"
    told = "its after cannot be used: lplr gives quantised low-rank factors, so the target must have factor_bits"
    assert refusal("lplr", ROUNDED, after={"lplr": {}}) == told
    with pytest.raises(
        UnsupportedTarget, match=r"lplr's after cannot be used: svd_llm gives only .* Got the target 50% row"
    ):
        compress(LPLR(SVDLLM()), layers.build("correlated"), beside)
    with pytest.raises(UnsupportedTarget, match="lplr's after must not give a sparse low-rank factor. Got one instead"):
        compress(LPLR(ROCKET()), layers.build("correlated"), ROUNDED)
