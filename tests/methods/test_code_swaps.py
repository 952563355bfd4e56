"""Code swaps against changes written plainly: every loss computed again in float64, from the weight as it comes out."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.layer_cases import Recipe, grid_of
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Gram, Layer, Method, Quantised, Target, UnsupportedTarget
from layerwise.kernels import code_search as kernel
from layerwise.methods.awq import AWQ
from layerwise.methods.chain import Chain
from layerwise.methods.code_swaps import CodeSwaps
from layerwise.methods.gptq import GPTQ
from layerwise.methods.gqsa import GQSA
from layerwise.methods.quantease import QuantEase
from layerwise.methods.rtn import RTN
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.methods.wanda import Wanda
from layerwise.numerics import dispatch, ops
from tests.support.typing_helpers import mask_of
from tests.support.wide_layer import wide

SMALL = {
    "10 inputs": Recipe(out=6, inputs=10),
    "9 inputs": Recipe(out=4, inputs=9, seed=1),
    "dead inputs": Recipe(out=4, inputs=10, dead=(1, 5, 8)),
    "fewer tokens than inputs": Recipe(out=4, inputs=10, sequences=1, length=4),
}
DENSE = {
    "rtn": (RTN(), Target(bits=3)),
    "gptq": (GPTQ(act_order=True), Target(bits=2, group=4)),
    "awq": (AWQ(), Target(bits=3, group=5)),
    "quantease": (QuantEase(), Target(bits=2, symmetric=True)),
}
JOINT: dict[str, tuple[Method, Target]] = {
    "sparsegpt": (SparseGPT(), Target(pattern="2:4", bits=3)),
    "gqsa": (GQSA(), Target(0.5, "1x2", bits=4, group=4)),
    "chain": (Chain((Wanda(), GPTQ())), Target(0.5, bits=3, group=4)),
}
STARTS = DENSE | JOINT


def compress(method: Method, layer: Layer, target: Target) -> Compressed:
    return method.compress(layer, target, torch.Generator())


def row_losses(layer: Layer, result: Compressed) -> np.ndarray:
    """[out] float64 E G E^T of the weight as it is."""
    missing = (result.weight.double() - layer.weight.double()).numpy()
    return ((missing @ layer.gram.matrix.double().numpy()) * missing).sum(1)


def plain_values(quantised: Quantised, target: Target, codes: np.ndarray) -> np.ndarray:
    """[out, in] float64, code by code in float32."""
    return ops.quantised_values(replace(quantised, codes=torch.tensor(codes)), target).double().numpy()


def improvements(layer: Layer, result: Compressed, target: Target, row: int, pairs: bool) -> list[tuple[float, tuple]]:
    """(change of the row's loss, the codes after it) for each change of one code, or of two by one step each."""
    quantised, most = grid_of(result), 2 ** (target.bits or 0) - 1
    weight, gram = layer.weight.double().numpy()[row], layer.gram.matrix.double().numpy()
    free = np.ones(len(weight), bool) if result.mask is None else result.mask[row].numpy()
    codes = quantised.codes[row].numpy().astype(int)

    def loss(after: np.ndarray) -> float:
        whole = quantised.codes.numpy().copy()
        whole[row] = after
        missing = plain_values(quantised, target, whole)[row] * free - weight
        return float(missing @ gram @ missing)

    def moved(*steps: tuple[int, int]) -> np.ndarray | None:
        after = codes.copy()
        for j, by in steps:
            after[j] += by
        return after if after.min() >= 0 and after.max() <= most else None

    places, now = [int(j) for j in np.flatnonzero(free)], loss(codes)
    if pairs:
        signs = list(itertools.product((-1, 1), repeat=2))
        tried = [moved((i, a), (k, b)) for i, k in itertools.combinations(places, 2) for a, b in signs]
    else:
        tried = [moved((j, by)) for j in places for by in range(-most, most + 1) if by]
    return [(loss(after) - now, tuple(after)) for after in tried if after is not None]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", SMALL)
def test_no_change_of_one_code_and_none_of_two_helps_in_the_end(name: str, start: str):
    layer, (method, target) = layers.make(SMALL[name], name), STARTS[start]
    result = compress(CodeSwaps(method), layer, target)
    alone = compress(CodeSwaps(method, pairs=False), layer, target)
    total = float((layer.weight.double() ** 2 * layer.gram.diagonal.double()).sum())
    for row in range(len(layer.weight)):
        assert min(change for change, _ in improvements(layer, alone, target, row, False)) > -1e-7 * total
        for pairs in (False, True):
            assert min(change for change, _ in improvements(layer, result, target, row, pairs)) > -1e-7 * total


@pytest.mark.parametrize("start", ["rtn", "awq"])
def test_every_change_is_the_best_one_of_one_code_and_then_of_two(start: str):
    layer, (method, target) = layers.make(SMALL["10 inputs"], "small"), STARTS[start]
    before, both = compress(method, layer, target), {False: 0, True: 0}
    small = 1e-7 * float((layer.weight.double() ** 2 * layer.gram.diagonal.double()).sum())
    for changes in range(1, 60):
        after = compress(CodeSwaps(method, max_changes=changes), layer, target)
        for row in range(len(layer.weight)):
            came = row_losses(layer, after)[row] - row_losses(layer, before)[row]
            for pairs in (False, True):
                best = min(change for change, _ in improvements(layer, before, target, row, pairs))
                if best < -small:
                    assert came == pytest.approx(best, abs=1e-2 * small + 1e-6 * abs(best))
                    both[pairs] += 1
                    break
        if torch.equal(grid_of(after).codes, grid_of(before).codes):
            break
        before = after
    else:
        raise AssertionError("the changes must end")
    assert both[False] and both[True]


def test_a_row_of_four_ends_at_an_optimum_of_all_codes_more_often_than_its_start():
    optimal = {"start": 0, "end": 0}
    for seed in range(20):
        layer, target = layers.make(Recipe(out=1, inputs=4, seed=seed)), Target(bits=2)
        start = compress(RTN(), layer, target)
        everything = [
            plain_values(grid_of(start), target, np.array([codes], np.uint8))[0]
            for codes in itertools.product(range(4), repeat=4)
        ]
        missing = np.array(everything) - layer.weight.double().numpy()
        least = ((missing @ layer.gram.matrix.double().numpy()) * missing).sum(1).min()
        for key, result in (("start", start), ("end", compress(CodeSwaps(RTN()), layer, target))):
            reached = float(row_losses(layer, result)[0])
            assert reached >= least * (1 - 1e-9)
            optimal[key] += reached <= least * (1 + 1e-6)
    assert optimal["end"] >= 15 > optimal["start"]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", layers.ORDINARY)
def test_no_row_is_worse_than_the_start_whose_grid_and_zeros_stay(name: str, start: str, pairs: bool):
    layer, (method, target) = layers.build(name), STARTS[start]
    before, after = compress(method, layer, target), compress(CodeSwaps(method, pairs), layer, target)
    assert (row_losses(layer, after) <= row_losses(layer, before) * (1 + 1e-12)).all()
    if start != "quantease":  # whose last passes have left few changes of one code, or none, that help
        assert row_losses(layer, after).sum() < 0.99 * row_losses(layer, before).sum()
    ours, theirs = grid_of(after), grid_of(before)
    assert torch.equal(ours.scales, theirs.scales) and torch.equal(ours.zeros, theirs.zeros)
    if before.mask is not None:
        assert torch.equal(mask_of(after), mask_of(before)) and (after.weight[~mask_of(before)] == 0).all()
        assert torch.equal(ours.codes[~mask_of(before)], theirs.codes[~mask_of(before)])


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", layers.ORDINARY)
def test_the_trace_falls_and_ends_at_the_error_of_the_weight(name: str, start: str):
    """E G is kept up to date over hundreds of changes."""
    layer, (method, target) = layers.build(name), STARTS[start]
    result = compress(CodeSwaps(method), layer, target)
    objectives = [value for *_, value in result.trace]
    assert all(b < a for a, b in itertools.pairwise(objectives)) and len(objectives) > 1
    assert objectives[0] == pytest.approx(row_losses(layer, compress(method, layer, target)).sum(), rel=1e-6)
    assert objectives[-1] == pytest.approx(row_losses(layer, result).sum(), rel=1e-6)
    assert result.info["changes"] + result.info["pairs"] >= result.trace[-1][0]


def assert_same(fast: Compressed, plain: Compressed) -> None:
    """To the last bit."""
    assert torch.equal(grid_of(fast).codes, grid_of(plain).codes) and fast.info == plain.info
    assert [(i, value) for i, _, value in fast.trace] == [(i, value) for i, _, value in plain.trace]


@pytest.mark.parametrize("start", ["rtn", "gptq", "sparsegpt"])
@pytest.mark.parametrize("name", [*layers.LAYERS, "wide"])
def test_both_paths_make_the_same_changes(name: str, start: str):
    layer, (method, target) = wide(180, 0) if name == "wide" else layers.build(name), STARTS[start]
    fast = compress(CodeSwaps(method), layer, target)
    with dispatch.reference():
        start_there = compress(method, layer, target)
        plain = compress(CodeSwaps(method), layer, target)
    assert torch.equal(grid_of(start_there).codes, grid_of(compress(method, layer, target)).codes)
    assert torch.equal(grid_of(fast).codes, grid_of(plain).codes) and fast.info == plain.info
    assert fast.trace[-1][2] == plain.trace[-1][2]


def test_threads_and_rows_at_a_time_change_nothing(monkeypatch):
    layer, before = wide(100, 1), torch.get_num_threads()
    one = compress(CodeSwaps(RTN()), layer, Target(bits=3))
    monkeypatch.setattr(kernel, "TASK_ROWS", 5)
    torch.set_num_threads(3)
    try:
        assert_same(compress(CodeSwaps(RTN()), layer, Target(bits=3)), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reference", [False, True])
def test_changes_are_counted_per_row(reference: bool):
    layer, target = layers.build("correlated"), Target(bits=3)
    start = compress(RTN(), layer, target)
    for most in (0, 1, 5, 70):
        method = CodeSwaps(RTN(), pairs=False, max_changes=most)
        if reference:
            with dispatch.reference():
                result = compress(method, layer, target)
        else:
            result = compress(method, layer, target)
        assert int((grid_of(result).codes != grid_of(start).codes).sum(1).max()) <= most
        assert result.info["changes"] <= most * len(layer.weight) and result.trace[-1][0] <= most


def test_a_huge_input_does_not_end_the_search():
    layer, found = layers.build("correlated"), []
    for power in (10, 15):  # exact in float32
        size = torch.ones(64)
        size[3] = 2.0**power
        gram = Gram(layer.gram.matrix * size * size[:, None], layer.gram.tokens)
        result = compress(CodeSwaps(RTN(), pairs=False), replace(layer, gram=gram), Target(bits=3))
        found.append(result.info["changes"])
    assert min(found) > 24 * 3


def test_zeros_of_the_layer_stay():
    layer, target = layers.build("correlated"), Target(0.5, bits=3, group=16)
    chained = compress(Chain((Wanda(), CodeSwaps(GPTQ()))), layer, target)
    plain = compress(Chain((Wanda(), GPTQ())), layer, target)
    assert torch.equal(mask_of(chained), mask_of(plain)) and (chained.weight[~mask_of(plain)] == 0).all()
    pruned = replace(layer, weight=compress(Wanda(), layer, target.pruning).weight)
    assert row_losses(pruned, chained).sum() < 0.99 * row_losses(pruned, plain).sum()


def test_unreachable_targets_are_refused_in_a_sentence():
    catalogue, layer = Catalogue(), layers.build("correlated")
    params = catalogue.complete("code_swaps", {"start": "gptq"}, "test")
    assert catalogue.refusal("code_swaps", params, Target(bits=3)) is None
    told = "its start cannot be used: gptq does not prune"
    assert catalogue.refusal("code_swaps", params, Target(0.5, bits=3)) == told
    assert catalogue.refusal("code_swaps", params, Target(0.5)) == "code_swaps does not prune without quantising"
    with pytest.raises(
        UnsupportedTarget, match="code_swaps' start cannot be used: gptq does not prune. Got the target 50% row 3b"
    ):
        compress(CodeSwaps(GPTQ()), layer, Target(0.5, bits=3))
    with pytest.raises(UnsupportedTarget, match="code_swaps does not prune without quantising"):
        compress(CodeSwaps(GPTQ()), layer, Target(0.5))


@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_is_below_rtn_and_gptq_from_either(start: str):
    layer = layers.make(Recipe(out=24, inputs=128, length=128, seed=3))
    target = Target(bits=3, group=32)
    errors = [row_losses(layer, compress(m, layer, target)).sum() for m in (CodeSwaps(STARTS[start][0]), RTN(), GPTQ())]
    assert errors[0] < min(errors[1:])
