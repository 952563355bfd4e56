"""Sums S + B A: against the released codes, the optimum in float64, and plain loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import output_error
from layerwise.checks.layer_cases import LAYERS, Recipe
from layerwise.compression.solver import Solver
from layerwise.compression.verify import broken_promise
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Gram, Layer, Method, Target, UnsupportedTarget
from layerwise.methods.eora import EoRA
from layerwise.methods.gptq import GPTQ
from layerwise.methods.oats import OATS
from layerwise.methods.rocket import ROCKET
from layerwise.methods.slim import SLiM
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.methods.svd import SVD
from layerwise.methods.three_basil import ThreeBASiL
from layerwise.methods.wanda import Wanda
from layerwise.numerics import low_rank, sparse_factor
from layerwise.runtime.errors import InputError
from layerwise.storage import layer_packing, layer_unpacking
from layerwise.storage.bits_per_weight import bits_per_weight
from tests.support import official_outputs, official_parts
from tests.support.typing_helpers import mask_of, some


def compress(method: Method, layer: Layer, target: Target) -> Compressed:
    return method.compress(layer, target, torch.Generator())


# ----------------------------------------------------------------------------------------------------------------- EoRA

AFTER = {
    Target(0.5, rank=0.2): Wanda(),
    Target(pattern="2:4", rank=0.2): SparseGPT(),
    Target(0.5, "layer", rank=0.1): Wanda(),
    Target(bits=3, group=16, rank=0.2): GPTQ(),
    Target(format="nvfp4", rank=0.1): GPTQ(),
}


@pytest.mark.parametrize("target", AFTER, ids=lambda target: target.label)
@pytest.mark.parametrize("name", LAYERS)
def test_eora_is_the_best_correction_of_what_another_method_left(name: str, target: Target):
    """The error left is the tail of the singular values of (W - S) L, which an SVD gives; it is never above S's own."""
    layer, after = layers.build(name), AFTER[target]
    if target.group and layer.weight.shape[1] % target.group:
        pytest.skip("its groups do not divide the inputs")
    part, result = compress(after, layer, target.rest), compress(EoRA(after), layer, target)
    assert torch.equal(some(some(result.low_rank).rest), part.weight)
    assert broken_promise(layer, target, result) is None
    missing, gram = layer.weight.double() - part.weight.double(), layer.gram.matrix.double()
    tail = np.linalg.svd((missing @ low_rank.root(gram)).numpy(), compute_uv=False)
    best = float((tail[target.rank_of(*missing.shape) :] ** 2).sum())
    left = (
        layer.weight.double()
        - some(some(result.low_rank).rest).double()
        - some(result.low_rank).left.double() @ some(result.low_rank).right.double()
    )
    negative = -min(0.0, float(torch.linalg.eigvalsh(gram)[0])) * float(missing.square().sum())
    whole = float(((missing @ gram) * missing).sum())
    off = 2 * negative + 1e-12 * float((missing.square() @ gram.diagonal()).sum())
    reached = float(((left @ gram) * left).sum())
    assert reached == pytest.approx(best, rel=1e-6, abs=off) and reached <= whole + off


def test_eora_improves_with_the_rank():
    layer = layers.build("correlated")
    errors = [
        output_error(layer, compress(EoRA(GPTQ()), layer, Target(bits=3, group=16, rank=rank)).weight)
        for rank in (0.01, 0.1, 0.2, 0.4)
    ]
    own = output_error(layer, compress(GPTQ(), layer, Target(bits=3, group=16)).weight)
    assert (
        errors == sorted(errors, reverse=True) and errors[0] == pytest.approx(own, rel=1e-6) and errors[2] < 0.6 * own
    )


# ----------------------------------------------------------------------------------------------------------------- SLiM

PRUNED = {
    Target(0.5, rank=0.2): Wanda(),
    Target(pattern="2:4", rank=0.2): SparseGPT(),
    Target(0.5, "layer", rank=0.1): Wanda(),
    Target(0.5, "1x16", rank=0.2): Wanda(),
}


@pytest.mark.parametrize("target", PRUNED, ids=lambda target: target.label)
@pytest.mark.parametrize("name", LAYERS)
def test_slim_is_its_formula_and_never_below_the_exact_correction(name: str, target: Target):
    """B A = SVD_r((W - S) D) D^-1 in numpy, D = diag(sqrt(mean x_j^2)), on the inputs that are alive."""
    layer, mask = layers.build(name), PRUNED[target]
    part, result = compress(mask, layer, target.rest), compress(SLiM(mask), layer, target)
    assert torch.equal(some(some(result.low_rank).rest), part.weight) and torch.equal(mask_of(result), mask_of(part))
    assert broken_promise(layer, target, result) is None
    missing, gram = (x.numpy() for x in (layer.weight.double() - part.weight.double(), layer.gram.matrix.double()))
    scale, rank = np.sqrt(np.diag(gram)), target.rank_of(*missing.shape)
    u, sizes, v = np.linalg.svd(missing * scale, full_matrices=False)
    formula = (u[:, :rank] * sizes[:rank]) @ v[:rank] / np.where(scale > 0, scale, 1.0)
    left, exact = (
        missing - (some(low).left.double() @ some(low).right.double()).numpy()
        for low in (result.low_rank, compress(EoRA(mask), layer, target).low_rank)
    )
    found, best = left * scale, (missing - formula) * scale
    unit = float(((missing * scale) ** 2).sum())
    assert float((found**2).sum()) == pytest.approx(float((best**2).sum()), rel=1e-6, abs=1e-12 * unit)
    if rank and sizes[rank - 1] > 1.01 * sizes[rank : rank + 1].sum():  # else equal values have many vectors
        assert np.abs(found - best).max() <= 1e-5 * np.abs(missing * scale).max()
    below = -min(0.0, float(np.linalg.eigvalsh(gram)[0])) * float((missing**2).sum())  # by rounding of the Gram
    assert ((exact @ gram) * exact).sum() <= ((left @ gram) * left).sum() * (1 + 1e-6) + 2 * below + 1e-12 * unit


def test_slim_loses_to_the_exact_correction_where_inputs_are_correlated():
    layer, target = layers.build("correlated"), Target(0.5, rank=0.2)
    ours, exact = (output_error(layer, compress(m, layer, target).weight) for m in (SLiM(Wanda()), EoRA(Wanda())))
    alone = output_error(layer, compress(Wanda(), layer, target.rest).weight)
    assert exact < 0.95 * ours < 0.95 * alone
    plain = replace(layer, gram=Gram(torch.diag(layer.gram.diagonal), layer.gram.tokens))
    ours, exact = (compress(m, plain, target).weight for m in (SLiM(Wanda()), EoRA(Wanda())))
    torch.testing.assert_close(ours, exact)  # where they are not, it is the exact one


def test_slim_only_prunes():
    catalogue = Catalogue()
    params = catalogue.complete("slim", {}, "test")
    assert catalogue.refusal("slim", params, Target(0.5, rank=0.1)) is None
    assert catalogue.refusal("slim", params, Target(bits=4, rank=0.1)) == "slim does not quantise"
    assert (
        catalogue.refusal("slim", params, Target(rank=0.4))
        == "slim gives a sum with low-rank factors, not the factors alone"
    )
    blocks = catalogue.complete("slim", {"mask": "sparsegpt"}, "test")
    told = "its mask cannot be used: sparsegpt prunes by row, layer, n:m, not by 1xb"
    assert catalogue.refusal("slim", blocks, Target(0.5, "1x16", rank=0.1)) == told


def test_eora_is_refused_where_its_part_is():
    catalogue, target = Catalogue(), Target(bits=4, rank=0.1)
    params = catalogue.complete("eora", {"after": "wanda"}, "test")
    assert catalogue.refusal("eora", params, target) == "its after cannot be used: wanda does not quantise"
    assert catalogue.refusal("eora", params, Target(0.5, rank=0.1)) is None
    reason = "eora gives only sums with low-rank factors, so the target must have a rank"
    assert catalogue.refusal("eora", params, Target(0.5)) == reason
    assert (
        catalogue.refusal("eora", params, Target(rank=0.5))
        == "eora gives a sum with low-rank factors, not the factors alone"
    )
    drifted = catalogue.complete("eora", {"after": "gptaq"}, "test")
    told = "its after cannot quantise: gptaq needs cross_gram, which eora does not give"
    assert catalogue.refusal("eora", drifted, target) == told
    assert catalogue.refusal("eora", catalogue.complete("eora", {"after": "awq"}, "test"), target) is None
    with pytest.raises(UnsupportedTarget, match="wanda does not quantise"):
        compress(EoRA(Wanda()), layers.build("correlated"), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_runner_counts_and_scores_the_parts_as_stored(dtype: torch.dtype):
    layer = layers.make(Recipe(out=32, inputs=64))
    for target, after in ((Target(bits=4, group=16, rank=0.2), GPTQ()), (Target(0.5, rank=0.2), Wanda())):
        result, row = Solver("eora", EoRA(after), target, 0, dtype).solve(layer)
        rank = target.rank_of(32, 64)
        assert rank == 4
        kept = 1.0 if result.mask is None else 0.5
        expected = bits_per_weight(target.rest, kept, 32, 64) + 16 * rank * (32 + 64) / (32 * 64)
        assert row["bits_per_weight"] == pytest.approx(expected)
        assert torch.equal(low_rank.product(some(result.low_rank)), result.weight)
        assert row["output_error"] == pytest.approx(output_error(layer, result.weight), rel=1e-9)


# ----------------------------------------------------------------------------------------------------------------- OATS


def oats(name: str, case: str) -> tuple[Compressed, dict]:
    told = official_parts.case(name, case)
    kept, ratio = 1 - told["settings"]["sparsity"], told["settings"]["rank_ratio"]
    target = Target(1 - (1 - ratio) * kept, rank=ratio * kept)
    return compress(OATS(told["settings"]["iterations"]), official_outputs.load(name).layer(), target), told


@pytest.mark.parametrize(("name", "case"), official_parts.cases("oats", "mask"))
def test_oats_is_the_released_sum(name: str, case: str):
    (result, told), official = oats(name, case), official_outputs.load(name)
    mask = official_parts.mask(name, case, "mask", official.weight.shape)
    assert np.array_equal(mask_of(result).numpy(), mask) and some(result.low_rank).left.shape[1] == told["rank"]
    expected = official_parts.array(name, case, "U") @ official_parts.array(name, case, "V")
    expected[mask] += official_parts.array(name, case, "values")
    assert np.abs(result.weight.numpy() - expected).max() <= 3e-6
    assert official.output_error(result.weight.numpy()) == pytest.approx(told["error"], rel=1e-6)


@pytest.mark.parametrize(("name", "case"), [pair for pair in official_parts.cases("oats") if pair[0] == "L3"])
def test_oats_has_about_the_released_error_where_float32_flips_its_choice(name: str, case: str):
    (result, told), official = oats(name, case), official_outputs.load(name)
    assert official.output_error(result.weight.numpy()) == pytest.approx(told["error"], rel=2e-2)


def alternated(layer: Layer, target: Target, iterations: int) -> np.ndarray:
    """OATS by whole rows: [out, in] float64."""
    scale = np.sqrt(layer.gram.diagonal.double().numpy())
    scaled = layer.weight.double().numpy() * scale
    sparse, total = np.zeros_like(scaled), scaled
    for _ in range(iterations):
        u, sizes, v = np.linalg.svd(scaled - sparse, full_matrices=False)
        rank = target.rank_of(*scaled.shape)
        low = u[:, :rank] * sizes[:rank] @ v[:rank]
        sparse = scaled - low
        for row in sparse:
            if target.n_of_m:
                kept, of = target.n_of_m
                for start in range(0, len(row), of):
                    group = row[start : start + of]
                    group[np.argsort(np.abs(group))[: of - kept]] = 0
            else:
                row[np.argsort(np.abs(row))[: int(target.sparsity * len(row))]] = 0
        total = low + sparse
    return total / scale


@pytest.mark.parametrize("target", [Target(0.5, rank=0.2), Target(0.6, rank=0.3), Target(pattern="2:4", rank=0.2)])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_oats_is_the_plain_alternation(target: Target, shape: tuple[int, int]):
    layer = layers.make(Recipe(*shape))
    result = compress(OATS(20), layer, target)
    np.testing.assert_allclose(result.weight.numpy(), alternated(layer, target, 20), rtol=1e-5, atol=1e-6)


def test_oats_leaves_dead_inputs_their_weights_where_it_keeps_them():
    layer, target = layers.build("dead inputs"), Target(pattern="2:4", rank=0.2)  # a whole group of four is dead
    result = compress(OATS(10), layer, target)
    dead, kept = layer.gram.dead, mask_of(result)
    assert (some(result.low_rank).right[:, dead] == 0).all() and kept[:, 4:8].sum(1).eq(2).all()
    assert torch.equal(some(some(result.low_rank).rest)[:, dead], torch.where(kept, layer.weight, 0.0)[:, dead])


def test_a_sum_beats_its_sparse_part_alone_and_takes_more_bits():
    layer = layers.build("correlated")
    whole = output_error(layer, compress(OATS(), layer, Target(0.5, rank=0.2)).weight)
    assert whole < 0.5 * output_error(layer, compress(Wanda(), layer, Target(0.5)).weight)


def test_a_weight_that_is_not_finite_is_refused():
    layer = layers.build("correlated")
    with pytest.raises(InputError, match="oats failed on correlated: ValueError"):
        Solver("oats", OATS(), Target(0.5, rank=0.2), 0).solve(replace(layer, weight=layer.weight / 0))


# --------------------------------------------------------------------------------------------------------------- 3BASiL


def three_basil(name: str, case: str) -> tuple[Compressed, dict]:
    told, (out, inputs) = official_parts.case(name, case), official_outputs.load(name).weight.shape
    rank = (told["rank"] + 0.5) * (out + inputs) / (out * inputs)  # the half: floor() must not lose one
    settings = told["settings"]
    target = Target(pattern="2:4", rank=rank) if "nm" in settings else Target(settings["sparsity"], "layer", rank=rank)
    return compress(ThreeBASiL(), official_outputs.load(name).layer(), target), told


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(*pair, marks=[pytest.mark.long] if pair[0] == "L3" else [])
        for pair in official_parts.cases("three_basil")
    ],
)
def test_3basil_has_the_released_error_as_far_as_its_random_svd_has(name: str, case: str):
    """The released code with another seed differs from itself by up to 9 %: within 10 % of what lies between both."""
    (result, told), official = three_basil(name, case), official_outputs.load(name)
    errors = sorted((told["error"], told["rel_error_other_seed"]))
    assert 0.9 * errors[0] <= official.output_error(result.weight.numpy()) <= 1.1 * errors[1]
    assert some(result.low_rank).left.shape[1] == told["rank"]
    assert abs(int(mask_of(result).sum()) - told["nonzero_sparse"]) <= 1  # it cuts (1 - p) n to a whole number


def admm(layer: Layer, target: Target, rho: float, iterations: int) -> np.ndarray:
    """Sum [out, in] float64 after so many steps of three-block ADMM with one penalty, by solves and full SVDs."""
    weight, gram = layer.weight.double().numpy(), layer.gram.matrix.double().numpy()
    gram = gram / gram.diagonal().mean()
    damped = gram + np.diag(0.005 * (1 + gram.diagonal()))
    norm = np.sqrt(damped.diagonal())
    damped = damped / norm / norm[:, None]
    dense, rank = weight * norm / np.abs(weight).max(), target.rank_of(*weight.shape)
    lower = np.linalg.cholesky(damped)

    def project(matrix: np.ndarray) -> np.ndarray:
        count = int(target.sparsity * matrix.size)
        flat = matrix.copy().ravel()
        flat[np.argsort(np.abs(flat), kind="stable")[:count]] = 0
        return flat.reshape(matrix.shape)

    def best(matrix: np.ndarray) -> np.ndarray:
        u, sizes, v = np.linalg.svd(matrix @ lower, full_matrices=False)
        return u[:, :rank] * sizes[:rank] @ v[:rank] @ np.linalg.inv(lower)

    split, dual = project(dense), np.zeros_like(dense)
    low = best(dense - split)
    current = dense
    for _ in range(iterations):
        aim = (dense - low) @ damped - dual + rho * split
        current = np.linalg.solve(damped + rho * np.eye(len(damped)), aim.T).T
        low = best(dense - current)
        split = project(current + dual / rho)
        dual = dual + rho * (current - split)
    return (project(current) + low) / norm * np.abs(weight).max()


@pytest.mark.parametrize("rho", [0.1, 1.0])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_3basil_takes_the_steps_of_plain_admm(shape: tuple[int, int], rho: float):
    """Before the penalty moves, which it does after ten."""
    layer, target = layers.make(Recipe(*shape)), Target(0.5, "layer", rank=0.2)
    for iterations in (1, 4, 9):
        result = compress(ThreeBASiL(rho, iterations), layer, target)
        np.testing.assert_allclose(result.weight.numpy(), admm(layer, target, rho, iterations), rtol=1e-4, atol=1e-6)


def test_3basil_ends_below_oats_and_eora_at_the_same_target():
    layer, target = layers.make(Recipe(out=48, inputs=64)), Target(0.5, rank=0.15)
    ours = output_error(layer, compress(ThreeBASiL(), layer, target).weight)
    assert ours < output_error(layer, compress(OATS(), layer, target).weight)
    assert ours < output_error(layer, compress(EoRA(SparseGPT()), layer, target).weight)


# --------------------------------------------------------------------------------------------------------------- ROCKET


def rocket(name: str, case: str) -> tuple[Compressed, dict]:
    told = official_parts.case(name, case)
    settings = told["settings"]
    method = ROCKET(settings["ks"], adam_steps=settings.get("adam", 0), convention="official")
    return compress(method, official_outputs.load(name).layer(), Target(rank=1 - settings["cr"])), told


@pytest.mark.parametrize(("name", "case"), official_parts.cases("rocket"))
def test_rocket_is_the_released_factorisation(name: str, case: str):
    (result, told), official = rocket(name, case), official_outputs.load(name)
    assert (some(result.low_rank).left.shape[1], int(some(some(result.low_rank).kept).sum())) == (
        told["rank"],
        told["nonzero_V"],
    )
    assert official.output_error(result.weight.numpy()) == pytest.approx(told["error"], rel=1e-6)
    weight = torch.tensor(official.weight).double()
    assert float((result.weight - weight).norm() / weight.norm()) == pytest.approx(told["weight_error"], rel=1e-5)


@pytest.mark.parametrize(("name", "case"), official_parts.cases("rocket", "V_mask"))
def test_rocket_keeps_the_released_entries(name: str, case: str):
    (result, told), official = rocket(name, case), official_outputs.load(name)
    mask = official_parts.mask(name, case, "V_mask", (told["rank"], len(official.weight)))
    assert np.array_equal(some(some(result.low_rank).kept).numpy().T, mask)


@pytest.mark.parametrize(("name", "case"), official_parts.cases("rocket", "U"))
def test_rocket_has_the_released_product(name: str, case: str):
    (result, told), official = rocket(name, case), official_outputs.load(name)
    values = np.zeros((told["rank"], len(official.weight)))
    values[official_parts.mask(name, case, "V_mask", values.shape)] = official_parts.array(name, case, "V_values")
    product = (official_parts.array(name, case, "U").astype(np.float64) @ values).T
    assert np.abs(result.weight.numpy() - product).max() <= 1e-6


@pytest.mark.parametrize("share", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("rank", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", LAYERS)
def test_rocket_takes_the_budget_with_its_positions(name: str, rank: float, share: float):
    layer, target = layers.build(name), Target(rank=rank)
    (out, inputs), low = layer.weight.shape, compress(ROCKET(share), layer, target).low_rank

    def bits(r: int, entries: int) -> int:
        return 16 * (r * inputs + entries) + out * r

    r, entries = some(some(low).kept).shape[1], int(some(some(low).kept).sum())
    assert bits(r, entries) <= 16 * rank * out * inputs
    if 0 < r < min(out, inputs):  # one more would not fit
        assert bits(r + 1, entries) > 16 * rank * out * inputs - 32 * (out + inputs)


def test_rocket_keeps_what_comes_back_where_a_share_keeps_nothing():
    """A column of rank 420 keeps 420 / 1000 of an entry, less than the half per cent that is dropped beyond it."""
    layer, target = layers.make(Recipe(out=640, inputs=420)), Target(rank=0.95)
    result = compress(ROCKET(share=1000.0), layer, target)
    kept = some(some(result.low_rank).kept)
    assert kept.shape == (640, 420) and int(kept.sum()) == int(0.005 * 420 * 640) + 1
    assert broken_promise(layer, target, result) is None


def test_rocket_counts_its_sparse_factor_as_it_is_stored():
    layer, target = layers.make(Recipe(out=64, inputs=96)), Target(rank=0.4)
    result, row = Solver("rocket", ROCKET(), target, 0).solve(layer)
    low = result.low_rank
    stored = 16 * (some(low).right.numel() + int(some(some(low).kept).sum())) + some(some(low).kept).numel()
    assert row["bits_per_weight"] == pytest.approx(stored / (64 * 96)) and 6.0 < row["bits_per_weight"] <= 6.4
    tensors = layer_packing.parts_of(result, target, torch.float32)
    assert sum(tensor.nbytes * 8 for tensor in tensors.values()) == pytest.approx(stored, abs=8)
    again = layer_unpacking.restored(tensors, target, (64, 96))
    assert torch.equal(again.weight, result.weight) and torch.equal(
        some(some(again.low_rank).kept), some(some(low).kept)
    )
    with pytest.raises(ValueError, match="the factor left must be"):
        layer_unpacking.restored({**tensors, "left": tensors["left"][1:]}, target, (64, 96))


def test_rocket_by_output_error_is_no_worse_on_the_output():
    layer = layers.make(Recipe(out=32, inputs=48))
    for rank in (0.3, 0.5, 0.7):
        by = [
            output_error(layer, compress(ROCKET(choice=c), layer, Target(rank=rank)).weight)
            for c in ("output", "weight")
        ]
        assert by[0] <= by[1] < output_error(layer, compress(SVD(), layer, Target(rank=rank)).weight)


def missed(layer: Layer, weight: torch.Tensor) -> float:
    """The squared error of the output, also of layers whose output is 0."""
    lost = layer.weight.double() - weight.double()
    return float(((lost @ layer.gram.matrix.double()) * lost).sum())


def factors(layer: Layer, rank: float) -> tuple[torch.Tensor, ...]:
    """X [in, out] whitened, and of ROCKET's result U [in, r], V [r, out] and where V is kept, all float64."""
    low = some(compress(ROCKET(choice="output"), layer, Target(rank=rank)).low_rank)
    root = low_rank.root(layer.gram.matrix.double())
    return root.T @ layer.weight.double().T, root.T @ low.right.double().T, low.left.double().T, some(low.kept).T


@pytest.mark.parametrize("unit", [0.1, 1.0, 8.0])
def test_the_steps_on_factors_are_those_of_a_plain_loop(unit: float):
    """torch's Adam and autograd at the released rate; V is masked in the product, so that dropped entries stay."""
    aim, left, right, kept = factors(layers.make(Recipe(out=40, inputs=48)), 0.5)
    leaves = [left.clone().requires_grad_(), (unit * right).requires_grad_()]
    official = torch.optim.Adam(leaves, lr=1e-3)
    for _ in range(25):
        official.zero_grad()
        missed = unit * aim - leaves[0] @ (leaves[1] * kept)
        (missed.square().sum() / (unit * aim).square().sum()).backward()
        official.step()
    ours = sparse_factor.refined(aim, left, right, kept, 25, unit)
    torch.testing.assert_close(ours[0], leaves[0].detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours[1], leaves[1].detach() / unit, rtol=1e-9, atol=1e-12)
    assert torch.equal(ours[1] != 0, kept)


def test_steps_on_factors_return_their_start_where_they_only_ascend():
    """Of the best factors each step, of a fixed size, is one away from them."""
    _, left, right, kept = factors(layers.make(Recipe(out=40, inputs=48)), 0.5)
    ours = sparse_factor.refined(left @ right, left, right, kept, 5)
    assert torch.equal(ours[0], left) and torch.allclose(ours[1], right, rtol=1e-15, atol=0)


@pytest.mark.parametrize("choice", ["weight", "output"])
@pytest.mark.parametrize("rank", [0.3, 0.7])
@pytest.mark.parametrize("name", LAYERS)
def test_rocket_is_no_worse_on_the_output_with_more_steps(name: str, rank: float, choice: str):
    layer, target = layers.build(name), Target(rank=rank)
    found = [compress(ROCKET(choice=choice, adam_steps=steps), layer, target) for steps in (0, 5, 40)]
    errors, whole = [missed(layer, result.weight) for result in found], missed(layer, torch.zeros_like(layer.weight))
    assert errors[2] <= errors[1] + 1e-9 * whole <= errors[0] + 2e-9 * whole
    assert all(torch.equal(some(some(r.low_rank).kept), some(some(found[0].low_rank).kept)) for r in found)
    assert broken_promise(layer, target, found[2]) is None


def test_the_steps_of_rocket_do_not_depend_on_units():
    """100 steps lower the error by a quarter; with the weight, the inputs or the tokens scaled, by as much."""
    layer, target = layers.make(Recipe(out=40, inputs=48)), Target(rank=0.6)
    method = ROCKET(choice="output", adam_steps=100)
    start, error = (
        output_error(layer, compress(own, layer, target).weight) for own in (ROCKET(choice="output"), method)
    )
    assert error < 0.8 * start
    scaled = replace(layer, weight=8 * layer.weight, gram=Gram(64 * layer.gram.matrix, 3 * layer.gram.tokens))
    ours, theirs = (compress(method, own, target).weight for own in (layer, scaled))
    torch.testing.assert_close(theirs, 8 * ours, rtol=1e-4, atol=1e-5)


def test_a_singular_gram_is_lifted_to_the_least_eigenvalue():
    gram = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    lower = low_rank.lifted_cholesky(gram, 1e-3)
    torch.testing.assert_close(lower @ lower.T, gram + 1e-3 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(
        low_rank.lifted_cholesky(gram + torch.eye(4), 1e-3), torch.linalg.cholesky(gram + torch.eye(4))
    )


def test_rocket_stands_in_a_group_of_its_own():
    entry = Catalogue()["rocket"]
    assert entry.comparison(Target(rank=0.4)) == "sparse factor"  # the bound of a rank says nothing of its rank
    assert Catalogue()["svd"].comparison(Target(rank=0.4)) == "low rank"
    assert Catalogue()["oats"].comparison(Target(0.5, rank=0.1)) == "sum of parts"
