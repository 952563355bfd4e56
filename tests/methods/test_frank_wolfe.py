"""SparseFW against its algorithm 2 written plainly, in float64 and loops."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import best_error, output_error
from layerwise.checks.layer_cases import Recipe
from layerwise.contract.layer import Compressed, Layer, Target
from layerwise.methods.frank_wolfe import FrankWolfe
from layerwise.methods.magnitude import Magnitude
from layerwise.methods.sparse_swaps import SparseSwaps
from layerwise.methods.wanda import Wanda
from layerwise.numerics import dispatch, ops
from layerwise.numerics.relaxation import best_step, linear_minimiser
from tests.support.typing_helpers import mask_of

LAYERS = {
    "10 inputs": Recipe(out=4, inputs=10),
    "24 inputs": Recipe(out=5, inputs=24, seed=1),
    "dead inputs": Recipe(out=4, inputs=12, dead=(1, 5)),
    "fewer tokens than inputs": Recipe(out=4, inputs=16, sequences=1, length=6),
}
TARGETS = [Target(0.5), Target(0.6), Target(0.6, "layer"), Target(pattern="2:4"), Target(pattern="4:8")]
STEPS = ["published", "line_search"]
ALL_STEPS = [*STEPS, "pairwise"]
KEEPS = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9]  # of the paper's second table


def compress(layer: Layer, target: Target, **params: Any) -> Compressed:
    return FrankWolfe(**{"warm_start": Wanda(), **params}).compress(layer, target, torch.Generator())


def groups(shape: tuple[int, int], target: Target) -> list[tuple[list[tuple[int, int]], int]]:
    """(entries, how many of them stay) of every comparison group."""
    out, inputs = shape
    rows = [[(i, j) for j in range(inputs)] for i in range(out)]
    if target.pattern == "layer":
        return [(sum(rows, []), out * inputs - int(target.sparsity * out * inputs))]
    if target.n_of_m:
        kept, of = target.n_of_m
        return [(row[s : s + of], min(kept, len(row[s : s + of]))) for row in rows for s in range(0, inputs, of)]
    return [(row, inputs - int(target.sparsity * inputs)) for row in rows]


def oracle(layer: Layer, target: Target, keep: float, iterations: int, step: str) -> tuple[np.ndarray, list, list]:
    """Mask of algorithm 2, or the warm start's where that is better; f and the duality gap at every iterate."""
    weight, gram = layer.weight.double().numpy(), layer.gram.matrix.double().numpy()
    saliency = abs(weight) * np.sqrt(gram.diagonal())
    fixed, warm = np.zeros(weight.shape), np.zeros(weight.shape)
    compared = groups(weight.shape, target)
    for entries, k in compared:
        for entry in sorted(entries, key=lambda e: (-saliency[e], -e[0], -e[1]))[:k]:
            warm[entry] = 1
    for entries, _ in groups(weight.shape, Target(0.5, "layer" if target.pattern == "layer" else "row")):
        kept = sorted((e for e in entries if warm[e]), key=lambda e: (-saliency[e], -e[0], -e[1]))
        for entry in kept[: int(keep * len(kept))]:
            fixed[entry] = 1
    # (entries of a group that are not fixed, how many of them are to be chosen)
    new = [([e for e in entries if not fixed[e]], k - sum(int(fixed[e]) for e in entries)) for entries, k in compared]

    def f(mask: np.ndarray) -> float:
        lost = weight * (1 - mask)
        return float(np.trace(lost @ gram @ lost.T))

    current, objectives, gaps = warm - fixed, [], []
    for t in range(iterations + 1):
        gradient = -2 * weight * (weight @ gram - (weight * (current + fixed)) @ gram)
        vertex = np.zeros(weight.shape)
        for entries, k in new:
            for entry in sorted(entries, key=lambda e: gradient[e])[:k]:
                vertex[entry] = gradient[entry] < 0
        objectives.append(f(current + fixed))
        gaps.append(float((gradient * (current - vertex)).sum()))
        if t == iterations:
            break
        size = np.full((len(weight), 1), 2 / (t + 2))
        if step == "line_search":
            parts = [slice(None)] if target.pattern == "layer" else [[i] for i in range(len(weight))]
            for part in parts:
                size[part] = line_minimum(weight[part], gram, (current + fixed)[part], (vertex - current)[part])
        current = (1 - size) * current + size * vertex
    rounded = fixed.copy()
    for entries, k in new:
        for entry in sorted(entries, key=lambda e: (-round(current[e], 9), -warm[e], -e[0], -e[1]))[:k]:
            rounded[entry] = 1
    return (rounded if f(rounded) < f(warm) * (1 - 1e-9) else warm), objectives, gaps


def line_minimum(weight: np.ndarray, gram: np.ndarray, mask: np.ndarray, direction: np.ndarray) -> float:
    """Minimiser over [0, 1] of the loss on the way from the mask, by golden section."""

    def loss(size: float) -> float:
        lost = weight * (1 - mask - size * direction)
        return float(np.trace(lost @ gram @ lost.T))

    low, high, ratio = 0.0, 1.0, (5**0.5 - 1) / 2
    for _ in range(100):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) <= loss(b) else (a, high)
    return min((0.0, 1.0, low), key=loss)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_the_plain_algorithm(name: str, target: Target, step: str, keep: float):
    layer = layers.make(LAYERS[name], name)
    iterations = 9
    result = compress(layer, target, step=step, keep=keep, iterations=iterations)
    mask, objectives, gaps = oracle(layer, target, keep, iterations, step)
    expected = output_error(layer, layer.weight * torch.from_numpy(mask))
    assert output_error(layer, result.weight) == pytest.approx(expected, rel=1e-6)
    assert [value for _, _, value in result.trace] == pytest.approx(objectives, rel=1e-6)
    assert result.info["duality_gaps"] == pytest.approx(gaps, rel=1e-5, abs=1e-6 * objectives[0])


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("keep", [0.0, 0.9])
def test_agrees_after_many_steps(keep: float, target: Target):
    layer = layers.make(LAYERS["24 inputs"])
    mask, objectives, _ = oracle(layer, target, keep, 300, "published")
    result = compress(layer, target, keep=keep, iterations=300)
    assert result.trace[-1][2] == pytest.approx(objectives[-1], rel=1e-6)
    expected = output_error(layer, layer.weight * torch.from_numpy(mask))
    assert output_error(layer, result.weight) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("start", [Wanda(), Magnitude(), SparseSwaps(Wanda())], ids=lambda start: type(start).__name__)
@pytest.mark.parametrize("target", [Target(0.6), Target(pattern="2:4")], ids=lambda target: target.label)
def test_keep_one_is_the_warm_start(target: Target, start):
    layer = layers.build("correlated")
    mask = mask_of(start.compress(layer, target, torch.Generator()))
    assert torch.equal(mask_of(compress(layer, target, warm_start=start, keep=1.0)), mask)


@pytest.mark.parametrize("keep", [0.5, 0.9])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_fixed_entries_stay(target: Target, keep: float):
    """The top of the warm start's saliency, floor(keep k) of a row's or the layer's k, also where these are in n:m."""
    layer = layers.build("correlated")
    start = mask_of(Wanda().compress(layer, target, torch.Generator()))
    saliency = torch.where(start, layer.weight.abs() * layer.gram.diagonal.sqrt(), 0.0)
    lines = saliency.flatten()[None] if target.pattern == "layer" else saliency
    count = int(keep * int((lines[0] > 0).sum()))
    fixed = torch.zeros_like(lines, dtype=torch.bool).scatter(1, lines.topk(count).indices, True).view_as(start)
    assert torch.equal(FrankWolfe(Wanda(), keep).fixed(layer, start, target, torch.Generator()), fixed)
    came = mask_of(compress(layer, target, keep=keep, iterations=50))
    assert (came | ~fixed).all()
    assert not torch.equal(came, start)


def test_every_keep_of_a_pattern_is_another_problem():
    """floor(keep n) per group would make one of 2:4's keep from 0.5 to 0.9; the paper's table has them all apart."""
    layer = layers.build("correlated")
    optima = {compress(layer, Target(pattern="2:4"), keep=keep, iterations=100).trace[-1][2] for keep in KEEPS}
    assert len(optima) == len(KEEPS)


@pytest.mark.parametrize("inputs", range(2, 200, 7))
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_no_weight_is_lost_between_fixed_and_free(inputs: int, keep: float):
    """floor(keep k) + floor((1 - keep) k) can be k - 1; the target of every count keeps that count."""
    layer = layers.make(Recipe(out=2, inputs=inputs))
    result = compress(layer, Target(0.6), keep=keep, iterations=2)
    assert mask_of(result).sum(1).tolist() == [inputs - int(0.6 * inputs)] * 2
    for count in range(1, inputs + 1):
        for pattern, group in (("row", inputs), ("layer", 2 * inputs)):
            target = ops.keeping(count, Target(0.6, pattern), layer.weight.shape)
            assert group - int(target.sparsity * group) == count


def test_only_negative_gradients_are_chosen():
    descent = torch.tensor([[3.0, -1.0, 0.0, 2.0, 5.0, -2.0]])
    fixed = torch.tensor([[False, False, False, False, True, False]])
    vertex = linear_minimiser(descent, fixed, Target(0.4))  # four may be chosen, two would lower the objective
    assert vertex.tolist() == [[1, 0, 0, 1, 1, 0]]


@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, "layer")], ids=lambda target: target.label)
def test_the_line_search_is_the_minimiser(target: Target):
    generator = torch.Generator().manual_seed(0)
    for seed in range(10):
        layer = layers.make(Recipe(out=3, inputs=12, seed=seed))
        weight, gram = layer.weight.double(), layer.gram.matrix.double()
        mask, vertex = torch.rand(2, 3, 12, generator=generator, dtype=torch.float64)
        lost, moved = weight * (1 - mask), weight * (vertex - mask)
        came = torch.as_tensor(best_step(ops.inner(lost @ gram, moved), ops.inner(moved @ gram, moved), target))
        for part in [slice(None)] if target.pattern == "layer" else [[i] for i in range(3)]:
            numeric = line_minimum(*(x.numpy() for x in (weight[part], gram, mask[part], (vertex - mask)[part])))
            assert float(came if target.pattern == "layer" else came[part]) == pytest.approx(numeric, abs=1e-5)


def test_a_flat_direction_takes_the_whole_step_down_and_none_up():
    came = torch.as_tensor(best_step(torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3), Target(0.5)))
    assert came.flatten().tolist() == [1, 0, 0]


@pytest.mark.parametrize("name", layers.LAYERS)
def test_the_line_search_descends(name: str):
    trace = compress(layers.build(name), Target(0.6), step="line_search", keep=0.5, iterations=200).trace
    objectives = [value for _, _, value in trace]
    assert all(after <= before + 1e-6 * objectives[0] for before, after in itertools.pairwise(objectives))


@pytest.mark.parametrize("step", ALL_STEPS)
@pytest.mark.parametrize("target", [Target(0.5), Target(pattern="2:4")], ids=lambda target: target.label)
def test_the_gap_bounds_the_best_of_all_masks(target: Target, step: str):
    for seed in range(5):
        layer = layers.make(Recipe(out=3, inputs=8, seed=seed))
        result = compress(layer, target, step=step, keep=0.0, iterations=500)
        dense = layer.weight.double()
        best = best_error(layer, target, refit=False) * float(((dense @ layer.gram.matrix.double()) * dense).sum())
        points = zip(result.trace, result.info["duality_gaps"], strict=True)
        bounds = [objective - gap for (_, _, objective), gap in points]
        assert max(bounds) <= best * (1 + 1e-6)
        assert result.trace[-1][2] - result.info["duality_gap"] == bounds[-1] > 0.5 * result.trace[-1][2]
        assert output_error(layer, result.weight) >= best_error(layer, target, refit=False) * (1 - 1e-6)


@pytest.mark.parametrize("step", ALL_STEPS)
@pytest.mark.parametrize("iterations", [0, 1, 2, 50])
def test_is_never_worse_than_the_warm_start(iterations: int, step: str):
    """Rounding can end above it: after one published step the relaxed mask is the first vertex."""
    worse = 0
    for seed in range(10):
        layer = layers.make(Recipe(out=6, inputs=24, seed=seed))
        result = compress(layer, Target(0.6), keep=0.0, iterations=iterations, step=step)
        warm = output_error(layer, Wanda().compress(layer, Target(0.6), torch.Generator()).weight)
        assert output_error(layer, result.weight) <= warm * (1 + 1e-9)
        worse += result.info["rounded_objective"] > result.trace[0][2] * (1 + 1e-6)
    assert worse or iterations != 1 or step != "published"


MANY = [*TARGETS, Target(pattern="3:7"), Target(0.3, "layer")]


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("target", MANY, ids=lambda target: target.label)
@pytest.mark.parametrize("name", ["correlated", "two blocks of 128", "dead inputs", "201 inputs", "one input"])
def test_the_compiled_steps_are_those_in_torch(name: str, target: Target, step: str, keep: float):
    """The vertex's product by changed entries, and a dense product per step: f and gaps, and with them the masks."""
    layer = layers.build(name)
    ours = compress(layer, target, step=step, keep=keep, iterations=60)
    with dispatch.reference():
        plain = compress(layer, target, step=step, keep=keep, iterations=60)
    assert torch.equal(mask_of(ours), mask_of(plain))
    start = plain.trace[0][2]
    assert [f for *_, f in ours.trace] == pytest.approx([f for *_, f in plain.trace], rel=1e-9, abs=1e-9 * start)
    gaps = plain.info["duality_gaps"]
    assert ours.info["duality_gaps"] == pytest.approx(gaps, rel=1e-6, abs=1e-9 * start)


@pytest.mark.parametrize("keep", [0.0, 0.5])
@pytest.mark.parametrize("target", MANY, ids=lambda target: target.label)
@pytest.mark.parametrize("name", ["10 inputs", "24 inputs", "dead inputs"])
def test_exchanges_reach_the_relaxed_optimum(name: str, target: Target, keep: float):
    """Compiled and in torch they end within their gap of it, and so of each other; the published steps' bound holds."""
    layer = layers.make(LAYERS[name], name)
    params = {"step": "pairwise", "keep": keep, "tolerance": 1e-6, "iterations": 200}
    ours = compress(layer, target, **params)
    with dispatch.reference():
        plain = compress(layer, target, **params)
    published = compress(layer, target, keep=keep, iterations=300)
    start, optimum = ours.trace[0][2], ours.trace[-1][2]
    rounding = 1e-12 * start
    for result in (ours, plain):
        assert -rounding <= result.info["duality_gap"] <= 1e-6 * start + rounding
    assert plain.trace[-1][2] == pytest.approx(optimum, abs=1e-6 * start)
    assert published.trace[-1][2] - published.info["duality_gap"] <= optimum + rounding
    assert optimum <= published.trace[-1][2] + 1e-6 * start


@pytest.mark.parametrize("target", MANY, ids=lambda target: target.label)
def test_exchanges_descend_and_stop_at_the_tolerance(target: Target):
    layer = layers.build("correlated")
    loose, tight = (compress(layer, target, step="pairwise", keep=0.0, tolerance=x) for x in (1e-2, 1e-6))
    objectives = [value for *_, value in tight.trace]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(objectives))
    assert len(loose.trace) < len(tight.trace) < 200
    for result, tolerance in ((loose, 1e-2), (tight, 1e-6)):
        assert result.info["duality_gap"] <= tolerance * result.trace[0][2]


def test_the_trace_is_thinned_but_has_both_ends():
    result = compress(layers.build("correlated"), Target(0.6), iterations=47)
    assert [t for t, _, _ in result.trace] == [*range(10), 10, 20, 30, 40, 47]
    assert len(result.info["duality_gaps"]) == len(result.trace)
