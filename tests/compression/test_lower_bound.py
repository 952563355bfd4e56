"""The bound on the error of every mask: never above the best mask, as brute force and a general solver find it."""

import math
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from scipy.optimize import LinearConstraint, minimize

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import best_error, output_error
from layerwise.checks.layer_cases import Recipe
from layerwise.compression.lower_bound import Bound, Relaxation, lower_bound
from layerwise.contract.layer import Gram, Layer, Target
from layerwise.methods.magnitude import Magnitude
from layerwise.methods.sparse_swaps import SparseSwaps
from layerwise.methods.wanda import Wanda
from layerwise.numerics import dispatch
from layerwise.numerics.comparison_groups import Groups, groups_of

SMALL = {
    "10 inputs": Recipe(out=6, inputs=10),
    "uncorrelated": Recipe(out=6, inputs=10, correlated=False, seed=2),
    "9 inputs": Recipe(out=4, inputs=9, seed=1),
    "dead inputs": Recipe(out=4, inputs=10, dead=(1, 5, 8)),
    "fewer tokens than inputs": Recipe(out=4, inputs=10, sequences=1, length=4),
    "one token": Recipe(out=3, inputs=8, sequences=1, length=1),
    "constant weights": Recipe(out=3, inputs=8, weights="constant"),
    "one output": Recipe(out=1, inputs=10, seed=3),
}
TARGETS = [Target(0.5), Target(0.3), Target(0.75), Target(pattern="2:4"), Target(pattern="1:5"), Target(pattern="4:8")]
TINY = Recipe(out=3, inputs=5, seed=4)
EVERY = [*TARGETS, Target(0.5, "layer")]


def squared_output(layer: Layer) -> float:
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    return float(((weight @ gram) * weight).sum())


def best(layer: Layer, target: Target) -> float:
    """The smallest error of any mask; an incomplete group of brute force's is filled up as the target says."""
    of = target.n_of_m[1] if target.n_of_m else 1
    missing = -layer.weight.shape[1] % of
    filled = torch.nn.functional.pad(layer.weight, (0, missing))
    gram = torch.nn.functional.pad(layer.gram.matrix, (0, missing, 0, missing))
    return best_error(replace(layer, weight=filled, gram=Gram(gram, 1)), target, refit=False) * squared_output(layer)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", SMALL)
def test_the_bound_is_never_above_the_best_mask(name, target):
    layer = layers.make(SMALL[name])
    bound, optimum = lower_bound(layer, target), best(layer, target)
    assert 0 <= bound.plain <= bound.error <= optimum * (1 + 1e-9)
    if name == "10 inputs":  # and it says something, the more with D
        assert bound.error > max(0.35 * optimum, 1.001 * bound.plain)


def test_a_layer_pattern_is_bounded_over_all_rows_together():
    layer, target = layers.make(TINY), Target(0.4, "layer")
    bound, optimum = lower_bound(layer, target), best(layer, target)
    assert 0.25 * optimum < bound.error <= optimum
    by_row = lower_bound(layer, Target(0.4)).error
    assert bound.error <= by_row * (1 + 1e-2)  # a mask by row is one of the layer's masks


@pytest.mark.parametrize("seed", range(10))
def test_the_bound_holds_on_random_layers(seed):
    layer = layers.make(Recipe(out=5, inputs=8, sequences=1 + seed, length=3, correlated=seed % 2 == 0, seed=seed))
    for target in (Target(0.5), Target(0.65), Target(pattern="2:4"), Target(pattern="3:4")):
        assert lower_bound(layer, target).error <= best(layer, target) * (1 + 1e-9)


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.label)
def test_where_inputs_do_not_interact_the_bound_is_the_best_mask(target):
    """G diagonal: D = G makes the relaxation a sort, so that nothing is left between bound and mask."""
    layer = layers.make(Recipe(out=4, inputs=20))
    diagonal = replace(layer, gram=Gram(layer.gram.matrix.diagonal().diag(), 1))
    pruned = Wanda().compress(diagonal, target, torch.Generator()).weight
    reached = output_error(diagonal, pruned) * squared_output(diagonal)
    found = lower_bound(diagonal, target)
    assert 0.98 * reached < found.error <= reached * (1 + 1e-9)
    assert found.plain < 0.95 * reached


@pytest.mark.parametrize("target", [Target(0.5), Target(0.3), Target(0.5, "layer")], ids=lambda target: target.label)
def test_the_plain_bound_is_the_optimum_of_the_relaxation(target, monkeypatch):
    """Against scipy's interior-point method on the same convex problem, both run until they stand still."""
    monkeypatch.setattr("layerwise.compression.lower_bound.ITERATIONS", 5000)
    monkeypatch.setattr("layerwise.compression.lower_bound.TOLERANCE", 1e-6)
    layer = layers.make(Recipe(out=3, inputs=6, seed=5))
    weight, gram = layer.weight.double().numpy(), layer.gram.matrix.double().numpy()
    rows, inputs = weight.shape

    def value(p: np.ndarray) -> tuple[float, np.ndarray]:
        lost = weight * p.reshape(rows, inputs)
        return float((lost @ gram * lost).sum()), (2 * weight * (lost @ gram)).ravel()

    size = rows * inputs if target.pattern == "layer" else inputs
    sums = np.kron(np.eye(rows * inputs // size), np.ones(size))
    pruned = int(target.sparsity * size)
    start = np.full(rows * inputs, pruned / size)
    solved = minimize(
        value,
        start,
        jac=True,
        method="trust-constr",
        bounds=[(0, 1)] * (rows * inputs),
        constraints=[LinearConstraint(sums, pruned, pruned)],
        options={"gtol": 1e-10, "xtol": 1e-12, "maxiter": 3000},
    )
    bound = lower_bound(layer, target)
    assert bound.plain == pytest.approx(solved.fun, rel=1e-3)
    assert bound.plain <= solved.fun * (1 + 1e-6)


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.label)
@pytest.mark.parametrize("name", layers.LAYERS)
def test_no_method_is_below_the_bound(name, target):
    """Every hard layer: the bound is finite, at least zero, and below every mask that we know."""
    layer = layers.build(name)
    bound = lower_bound(layer, target)
    assert np.isfinite([bound.error, bound.plain, bound.gap]).all() and min(bound.error, bound.plain, bound.gap) >= 0
    for method in (Magnitude(), Wanda(), SparseSwaps(warm_start=Wanda())):
        weight = method.compress(layer, target, torch.Generator()).weight if fits(method, target) else None
        if weight is not None:
            lost = (layer.weight - weight).double()
            error = float(((lost @ layer.gram.matrix.double()) * lost).sum())
            assert bound.error <= max(error, 0.0) * (1 + 1e-12)


def test_rounding_does_not_lift_the_bound_above_a_mask_that_cancels():
    """32 inputs cost together a millionth of what one costs alone: at their mask the bound is f, but for rounding."""
    inputs, unit = 64, 1.2345
    mask = torch.arange(inputs) < 32
    gram = torch.eye(inputs)
    gram[:32, :32] = -(1 - 6e-8) / 31
    correlation = gram.fill_diagonal_(1.0).double()
    least = min(0.0, float(torch.linalg.eigvalsh(correlation)[0]))
    shrink = torch.where(mask, least - 1e-9, 0.999).double()
    lengths = torch.full((1, inputs), unit, dtype=torch.float64)
    bound, *_ = Relaxation(lengths, Groups(Target(0.5), lengths.shape)).solve(correlation, shrink, mask.double()[None])
    cost = unit**2 * math.fsum(correlation[:32, :32].flatten().tolist())
    assert 0.999 * cost < bound <= cost


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.label)
@pytest.mark.parametrize("inputs", [11, 48])
def test_the_compiled_projection_is_that_in_torch(target: Target, inputs: int):
    rng = torch.Generator().manual_seed(inputs)
    point = 2 * torch.randn(7, inputs, generator=rng, dtype=torch.float64)
    curvature = torch.exp(3 * torch.randn(7, inputs, generator=rng, dtype=torch.float64))
    found = []
    for groups in (Groups(target, point.shape), groups_of(target, point)):
        metric, price = groups.metric(curvature), torch.zeros((), dtype=torch.float64)
        for shifted in (point, point + 0.1):  # the second begins at the first's prices
            relaxed, price = groups.project(shifted, metric, price)
        found.append(relaxed)
        sums = groups.split(relaxed, 0.0).sum(groups.axis)
        assert float((sums - groups.pruned).abs().max()) < 1e-7
    assert torch.allclose(*found, atol=1e-8) and 0 < float(found[0].mean()) < 1


@pytest.mark.parametrize("target", [Target(0.6), Target(pattern="2:4")], ids=lambda target: target.label)
def test_the_compiled_bound_is_that_in_torch(target: Target):
    layer = layers.make(Recipe(out=24, inputs=32))
    compiled = lower_bound(layer, target)
    with dispatch.reference():
        assert astuple(lower_bound(layer, target)) == pytest.approx(astuple(compiled), rel=1e-6)


def fits(method: object, target: Target) -> bool:
    return not isinstance(method, SparseSwaps) or target.pattern != "layer"


def test_inputs_are_untouched_and_the_result_scales():
    layer = layers.make(Recipe(out=6, inputs=12))
    before = layer.weight.clone(), layer.gram.matrix.clone()
    found = lower_bound(layer, Target(0.5))
    assert torch.equal(layer.weight, before[0]) and torch.equal(layer.gram.matrix, before[1])
    larger = replace(layer, weight=layer.weight * 4, gram=Gram(layer.gram.matrix * 2, 1))
    assert lower_bound(larger, Target(0.5)) == Bound(found.error * 32, found.plain * 32, found.gap * 32)


def test_a_target_without_a_bound_is_refused():
    layer = layers.make(TINY)
    with pytest.raises(
        ValueError, match="The pattern of a lower bound must be one of row, layer, n:m. Got 50% 1x4 instead"
    ):
        lower_bound(layer, Target(0.5, "1x4"))
    with pytest.raises(ValueError, match="must be finite"):
        lower_bound(replace(layer, weight=layer.weight / 0), Target(0.5))


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.label)
def test_projection_and_linear_minimum(target):
    """Against the definitions: counts as sums, the projection nearest of many feasible points, sorts by hand."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((3, 10))
    groups = Groups(target, shape)
    cost, point = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    curvature = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    nearest, _ = groups.project(point, groups.metric(curvature), torch.zeros(()))
    assert ((nearest >= 0) & (nearest <= 1)).all()
    sums = groups.split(nearest, 0.0).sum(groups.axis)
    assert torch.allclose(sums, groups.pruned.to(sums), atol=1e-8)

    def distance(p: torch.Tensor) -> float:
        return float((curvature * (p - point).square()).sum())

    least = distance(nearest)
    for _ in range(200):  # feasible points: mixtures of vertices
        vertices = []
        for _ in range(3):
            order = groups.split(torch.rand(shape, generator=generator, dtype=torch.float64), float("inf"))
            ranks = order.argsort(groups.axis).argsort(groups.axis)
            vertices.append(
                groups.join((ranks.movedim(groups.axis, -1) < groups.pruned[:, None]).double().movedim(-1, groups.axis))
            )
        mixture = sum(vertices, torch.zeros(shape, dtype=torch.float64)) / 3
        assert distance(mixture) >= least - 1e-7
        assert groups.smallest(cost) <= float((cost * mixture).sum()) + 1e-9
        assert all(float((cost * vertex).sum()) >= groups.smallest(cost) - 1e-9 for vertex in vertices)
