"""Thanos against the released code's outputs, and against the layer problem solved for every row in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.contract.layer import Gram, Layer, Target
from layerwise.methods.thanos import Thanos
from layerwise.methods.wanda import Wanda
from layerwise.numerics import joint_removal
from tests.support import official_outputs
from tests.support.typing_helpers import mask_of
from tests.support.update_layers import LAYERS

TARGETS = [
    Target(0.5),
    Target(0.7),
    Target(0.5, "layer"),
    Target(0.3, "layer"),
    Target(pattern="2:4"),
    Target(pattern="3:8"),
]


@pytest.mark.parametrize(("name", "case"), official_outputs.cases("thanos"))
def test_agrees_with_the_released_code(name: str, case: str):
    official = official_outputs.load(name)
    entry, target = official.cases[case], official.target(case)
    result = Thanos(entry["blocksize"], convention="official").compress(official.layer(), target, torch.Generator())
    mask, expected, weight = official.nonzero(case), official.compressed(case), result.weight.numpy()
    own = np.arange(len(mask)) != entry.get("dense_row", -1)  # its n:m leaves one row as it is
    agree = ((weight != 0) == mask)[own]
    assert agree.mean() >= 0.9995
    assert int((~mask_of(result)).sum()) == int(target.sparsity * mask.size)
    same = own.copy()
    same[own] = agree.all(1)
    same &= ~np.isnan(expected).any(1)
    assert np.abs(weight - expected)[same].max() <= 1e-6
    assert agree.all() or name == "L2_dead"  # whose 60 % flip in float32 (4 entries of 32768 and 10)
    if "dense_row" not in entry:
        assert official.output_error(weight) == pytest.approx(entry["error"], rel=1e-3)
    elif "row_step" not in entry:
        own_rows = np.where(own[:, None], weight, expected)
        assert official.output_error(own_rows) == pytest.approx(entry["error"], rel=1e-3)


def oracle(layer: Layer, target: Target, blocksize: int, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """[out, in] float64 weight, and what went: a row's other weights of each block and after it solved for anew."""
    weight, gram = layer.weight.double().numpy().copy(), layer.gram.matrix.double().numpy().copy()
    out, inputs = weight.shape
    norm = np.sqrt(gram.diagonal())
    dead = gram.diagonal() == 0
    gram += damping * gram.diagonal().mean() * np.eye(inputs)
    gram[dead, dead] = 1.0  # coupled to nothing
    weight[:, dead] = 0
    gone = np.zeros((out, inputs), bool)
    if target.n_of_m:
        blocksize = blocksize // target.n_of_m[1] * target.n_of_m[1]
    for start in range(0, inputs, blocksize):
        end = min(start + blocksize, inputs)
        for i, j in chosen(weight, norm, gone, target, start, end):
            gone[i, j] = True
        for i in range(out):
            lost = [j for j in range(start, end) if gone[i, j]]
            free = [j for j in range(start, inputs) if j not in lost]
            # The least |w' - w|^2 in the metric of what is left of the damped Gram where the lost weights are zero.
            moved = np.linalg.solve(gram[np.ix_(free, free)], gram[np.ix_(free, lost)] @ weight[i, lost])
            weight[i, free] += moved
            weight[i, lost] = 0
    return weight, gone


def chosen(
    weight: np.ndarray, norm: np.ndarray, gone: np.ndarray, target: Target, start: int, end: int
) -> list[tuple[int, int]]:
    """The entries of a block that go: the smallest |w| norm of each group, ties by index."""
    out, inputs = weight.shape
    if target.n_of_m:
        kept, of = target.n_of_m
        groups = [[(i, j) for j in range(a, min(a + of, inputs))] for i in range(out) for a in range(start, end, of)]
        counts = [max(len(group) - kept, 0) for group in groups]
    elif target.pattern == "layer":
        groups = [[(i, j) for i in range(out) for j in range(start, inputs)]]
        counts = [int(target.sparsity * out * inputs) - int(gone.sum())]
    else:
        groups = [[(i, j) for j in range(start, inputs)] for i in range(out)]
        counts = [int(target.sparsity * inputs) - int(row.sum()) for row in gone]
    found = []
    for group, count in zip(groups, counts, strict=True):
        ranked = sorted(group, key=lambda at: (abs(weight[at]) * norm[at[1]], at))
        found += [(i, j) for i, j in ranked[:count] if j < end]
    return found


@pytest.mark.parametrize("blocksize", [8, 16, 512])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_each_row_solved_for_anew(name: str, target: Target, blocksize: int):
    layer = layers.make(LAYERS[name], name)
    result = Thanos(blocksize).compress(layer, target, torch.Generator())
    weight, gone = oracle(layer, target, blocksize, 0.01)
    assert np.array_equal(~mask_of(result).numpy(), gone)
    np.testing.assert_allclose(result.weight.numpy(), weight, rtol=0, atol=2e-6 * np.abs(weight).max())


def test_rows_are_solved_alike_in_however_many_parts(monkeypatch: pytest.MonkeyPatch):
    layer, target = layers.build("two blocks of 128"), Target(0.5, "layer")
    whole = Thanos(32).compress(layer, target, torch.Generator())
    monkeypatch.setattr(joint_removal, "LARGEST", 3 * 20**2)
    parts = Thanos(32).compress(layer, target, torch.Generator())
    assert torch.equal(mask_of(whole), mask_of(parts))
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_the_mask_of_one_block_is_wandas(target: Target):
    layer = layers.build("correlated")
    wanda = Wanda().compress(layer, target, torch.Generator())
    assert torch.equal(mask_of(Thanos().compress(layer, target, torch.Generator())), mask_of(wanda))


def test_the_official_damping_depends_on_the_scale_of_dead_inputs_and_the_exact_one_does_not():
    layer, target = layers.build("dead inputs"), Target(0.5)
    scaled = replace(layer, gram=Gram(1e-4 * layer.gram.matrix, layer.gram.tokens))
    for convention, alike in (("exact", True), ("official", False)):
        method = Thanos(16, convention=convention)
        both = [method.compress(own, target, torch.Generator()).weight for own in (layer, scaled)]
        assert torch.allclose(*both, rtol=1e-3, atol=1e-6) == alike
