"""Low-rank factors: against the released codes, the optimum in float64, and each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import output_error
from layerwise.checks.layer_cases import LAYERS, Recipe
from layerwise.compression.certificate import row
from layerwise.compression.lower_bound import lower_bound
from layerwise.compression.solver import Solver
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Gram, Layer, Method
from layerwise.contract.target import LOW_RANK, Target
from layerwise.methods.asvd import ASVD
from layerwise.methods.fwsvd import FWSVD
from layerwise.methods.svd import SVD
from layerwise.methods.svd_llm import SVDLLM
from layerwise.numerics import low_rank
from layerwise.runtime.errors import InputError
from tests.support import official_outputs, official_parts
from tests.support.typing_helpers import some

SHARES = (0.2, 0.5, 0.8)
SHAPES = {
    "wide": Recipe(out=12, inputs=20),
    "tall": Recipe(out=20, inputs=12),
    "dead inputs": Recipe(out=12, inputs=16, dead=(0, 3, 4, 15)),
    "tall, dead inputs": Recipe(out=20, inputs=16, dead=(0, 3, 4, 15)),
    "fewer tokens than inputs": Recipe(out=12, inputs=16, sequences=1, length=5),
    "tall, fewer tokens": Recipe(out=20, inputs=16, sequences=1, length=5),
}


def compress(method: Method, layer: Layer, target: Target) -> Compressed:
    return method.compress(layer, target, torch.Generator())


def lost(layer: Layer, weight: Tensor | np.ndarray) -> float:
    missing, gram = layer.weight.double() - torch.as_tensor(weight).double(), layer.gram.matrix.double()
    return float(((missing @ gram) * missing).sum())


def rounding(layer: Layer) -> float:
    """What a Gram's eigenvalues below zero, left by its rounding to float32, can give to an error."""
    below = -min(0.0, float(torch.linalg.eigvalsh(layer.gram.matrix.double())[0]))
    return 2 * below * float(layer.weight.double().square().sum()) + 1e-13 * lost(layer, 0 * layer.weight)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, sizes, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * sizes[:rank] @ v[:rank]


def whitened(layer: Layer, rank: int) -> np.ndarray:
    """SVD_r(W L) L^-1 in float64 with L the Cholesky factor of the Gram, lifted by 1e-13 of its mean if need be."""
    weight, gram = layer.weight.double().numpy(), layer.gram.matrix.double().numpy()
    lift = max(0.0, 1e-13 * gram.diagonal().mean() - 2 * np.linalg.eigvalsh(gram)[0])
    root = np.linalg.cholesky(gram + lift * np.eye(len(gram)))
    return truncated(weight @ root, rank) @ np.linalg.inv(root)


# ------------------------------------------------------------------------------------------------- the released codes


@pytest.mark.parametrize(("name", "case"), official_parts.cases("svd_llm"))
def test_svd_llm_has_the_released_error_and_rank(name: str, case: str):
    official, told = official_outputs.load(name), official_parts.case(name, case)
    result = compress(SVDLLM(), official.layer(), Target(rank=told["settings"]["keep"]))
    assert some(result.low_rank).left.shape[1] == told["rank"]
    assert official.output_error(result.weight.numpy()) == pytest.approx(told["error"], rel=1e-6)


@pytest.mark.parametrize(("name", "case"), official_parts.cases("svd_llm", "U", "V"))
def test_svd_llm_is_the_released_product(name: str, case: str):
    """But in the columns of dead inputs, on which nothing depends and where its jitter decides."""
    official, told = official_outputs.load(name), official_parts.case(name, case)
    product = official_parts.array(name, case, "U") @ official_parts.array(name, case, "V")
    result = compress(SVDLLM(), official.layer(), Target(rank=told["settings"]["keep"]))
    alive = official.gram.diagonal() > 0
    assert np.abs(product - result.weight.numpy())[:, alive].max() <= 1e-5
    assert official.output_error(product) == pytest.approx(told["error"], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", SHAPES)
def test_svd_llm_is_the_optimum(name: str, share: float):
    layer = layers.make(SHAPES[name], name)
    rank = Target(rank=share).rank_of(*layer.weight.shape)
    best, off = lost(layer, whitened(layer, rank)), 10 * rounding(layer)
    reached = lost(layer, compress(SVDLLM(), layer, Target(rank=share)).weight)
    assert reached == pytest.approx(best, rel=1e-6, abs=off)
    assert low_rank.optimum(layer.weight, layer.gram, rank) == pytest.approx(reached, rel=1e-6, abs=off)


@pytest.mark.parametrize("rank", [0, 1, 5, 12, 16, 30])
@pytest.mark.parametrize("name", SHAPES)
def test_factors_of_any_rank_are_the_best(name: str, rank: int):
    """A rank of min(out, in) and more loses nothing."""
    layer = layers.make(SHAPES[name], name)
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    left, right = low_rank.best_factors(weight, rank, gram)
    best = low_rank.optimum(weight, layer.gram, rank)
    assert lost(layer, left @ right) == pytest.approx(best, rel=1e-9, abs=rounding(layer))
    assert left.shape[1] == min(rank, *weight.shape)
    torch.testing.assert_close(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("rank", [1, 3, 4, 6])
def test_a_weight_of_a_lower_rank_is_met(rank: int):
    layer = layers.make(Recipe(out=12, inputs=20))
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(12, 4, generator=generator) @ torch.randn(4, 20, generator=generator)
    for method in (SVD(), ASVD(), FWSVD(), SVDLLM()):
        target = Target(rank=(rank + 0.5) * 32 / 240)
        result = compress(method, replace(layer, weight=weight), target)
        assert some(result.low_rank).left.shape[1] == rank
        error = output_error(replace(layer, weight=weight), result.weight)
        assert error < 1e-12 if rank >= 4 else error > 1e-4


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["wide", "tall"])
def test_the_controls_are_their_truncated_svds(name: str, share: float):
    layer = layers.make(SHAPES[name], name)
    rank, weight = Target(rank=share).rank_of(*layer.weight.shape), layer.weight.double().numpy()
    result = compress(SVD(), layer, Target(rank=share))
    np.testing.assert_allclose(result.weight.numpy(), truncated(weight, rank), atol=1e-7)
    for alpha in (0.5, 1.0):
        scale = some(layer.statistics).absmean.double().numpy() ** alpha
        result = compress(ASVD(alpha), layer, Target(rank=share))
        np.testing.assert_allclose(result.weight.numpy(), truncated(weight * scale, rank) / scale, atol=1e-7)


def by_loss(layer: Layer, rank: int) -> np.ndarray:
    """D^-1 SVD_r(D W), D = diag(sqrt(f)), in float64; rows of f 0 in the limit of ever smaller f."""
    fisher = some(layer.fisher).double().numpy()
    root = np.sqrt(np.where(fisher > 0, fisher, 1e-16 * fisher.max()))[:, None]
    return truncated(layer.weight.double().numpy() * root, rank) / root


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["wide", "tall", "dead inputs"])
def test_fwsvd_is_its_formula(name: str, share: float):
    layer = layers.make(SHAPES[name], name)
    rank = Target(rank=share).rank_of(*layer.weight.shape)
    fisher = some(layer.fisher)
    assert float(fisher[1]) == 0 < float(fisher[0])
    result = compress(FWSVD(), layer, Target(rank=share))
    np.testing.assert_allclose(result.weight.numpy(), by_loss(layer, rank), atol=1e-6)
    scaled = compress(FWSVD(), replace(layer, fisher=1e-30 * fisher), Target(rank=share))
    torch.testing.assert_close(scaled.weight, result.weight, atol=1e-7, rtol=0.0)
    lost = [
        float(((layer.weight - own.weight).double().square().sum(1) * fisher.double()).sum())
        for own in (result, compress(SVD(), layer, Target(rank=share)), compress(SVDLLM(), layer, Target(rank=share)))
    ]
    assert lost[0] <= min(lost[1:]) * (1 + 1e-6)  # the best of the rank in its own norm


def test_fwsvd_of_one_row_that_counts_keeps_it():
    layer = layers.make(SHAPES["wide"])
    fisher = torch.zeros(12)
    fisher[3] = 2.0
    result = compress(FWSVD(), replace(layer, fisher=fisher), Target(rank=0.2))
    torch.testing.assert_close(result.weight[3], layer.weight[3])
    assert not torch.equal(result.weight[2], layer.weight[2])


def test_fwsvd_of_equal_rows_is_the_svd():
    layer, target = layers.build("correlated"), Target(rank=0.5)
    plain = compress(SVD(), layer, target).weight
    for fisher in (torch.full((24,), 1e-20), torch.zeros(24)):  # where nothing is known no row counts more
        torch.testing.assert_close(compress(FWSVD(), replace(layer, fisher=fisher), target).weight, plain)


def test_asvd_without_scales_is_the_svd():
    layer, target = layers.build("correlated"), Target(rank=0.5)
    ours, plain = (compress(method, layer, target).weight for method in (ASVD(0.0), SVD()))
    torch.testing.assert_close(ours, plain)


def test_the_data_decide_what_a_rank_keeps():
    layer, target = layers.build("correlated"), Target(rank=0.5)
    plain, scaled, best = (output_error(layer, compress(m, layer, target).weight) for m in (SVD(), ASVD(), SVDLLM()))
    assert best < 0.9 * scaled < 0.9 * plain


# ------------------------------------------------------------------------------------------------------ the certificate


def of_a_rank() -> list[str]:
    catalogue = Catalogue()
    return [
        name
        for name in catalogue
        if catalogue[name].comparison(Target(rank=0.5)) == LOW_RANK and not catalogue[name].refusal(Target(rank=0.5))
    ]


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("name", LAYERS)
def test_no_method_is_below_the_bound(name: str, share: float):
    target, catalogue = Target(rank=share), Catalogue()
    bound = row(layers.build(name), target)
    assert bound["bound_gap"] == 0 and bound["plain_bound"] == bound["lower_bound"]
    for method in of_a_rank():
        built = catalogue.build(method, catalogue.complete(method, {}, "test"))
        for dtype in (torch.float32, torch.bfloat16):
            layer = layers.build(name)
            _, found = Solver(method, built, target, 0, dtype).solve(layer)
            assert found["output_error"] >= bound["lower_bound"], method


@pytest.mark.parametrize("share", SHARES)
def test_the_bound_is_reached(share: float):
    for name in ("correlated", "two blocks of 128"):
        layer, target = layers.build(name), Target(rank=share)
        reached = output_error(layer, compress(SVDLLM(), layer, target).weight)
        assert row(layer, target)["lower_bound"] == pytest.approx(reached, rel=1e-5)


def test_random_factors_are_never_below_the_bound():
    layer, target = layers.make(Recipe(out=6, inputs=9)), Target(rank=0.6)
    bound, rank = lower_bound(layer, target).error, target.rank_of(6, 9)
    assert rank == 2 and bound > 0
    generator = torch.Generator().manual_seed(0)
    best = compress(SVDLLM(), layer, target).low_rank
    for size in (1e-6, 1e-3, 1e-1, 1.0):
        for _ in range(20):
            left, right = (
                x + size * x.norm() * torch.randn(x.shape, generator=generator)
                for x in (some(best).left, some(best).right)
            )
            assert lost(layer, low_rank.of_parts(left, right).weight) >= bound


def test_the_bound_scales_with_weight_and_gram():
    layer, target = layers.build("correlated"), Target(rank=0.4)
    scaled = replace(layer, weight=1e4 * layer.weight, gram=Gram(1e-3 * layer.gram.matrix, 1))
    assert lower_bound(scaled, target).error == pytest.approx(1e5 * lower_bound(layer, target).error, rel=1e-5)


def test_a_sum_has_no_bound():
    with pytest.raises(ValueError, match="must be a mask or low-rank factors alone"):
        lower_bound(layers.build("correlated"), Target(0.5, rank=0.1))


def test_a_gram_that_is_not_finite_is_refused():
    layer = layers.build("correlated")
    broken = replace(layer, gram=Gram(layer.gram.matrix / 0, 1))
    with pytest.raises(InputError, match="svd_llm failed on correlated: ValueError"):
        Solver("svd_llm", SVDLLM(), Target(rank=0.5), 0).solve(broken)
