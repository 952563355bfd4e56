"""DSnoT, ADMM and ALPS where no official output is at hand: plain loops in float64 over the papers' steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.contract.layer import Gram, Layer, Target
from layerwise.methods.reconstruct import least_squares
from layerwise.numerics import dispatch, ops
from tests.methods.test_reconstruct import compress
from tests.support.typing_helpers import mask_of, some

ROW, PAIRS, LAYER = Target(0.6), Target(pattern="2:4"), Target(0.5, "layer")


def projection(values: np.ndarray, target: Target) -> np.ndarray:
    """Mask of the largest |values|, counted out group by group."""
    size = np.abs(values)
    if target.pattern == "layer":
        keep = np.ones(size.size, bool)
        keep[np.argsort(size, axis=None, kind="stable")[: int(target.sparsity * size.size)]] = False
        return keep.reshape(size.shape)
    of, gone = (4, 2) if target.n_of_m else (size.shape[1], int(target.sparsity * size.shape[1]))
    keep = np.ones_like(size, bool)
    for row in range(len(size)):
        for start in range(0, size.shape[1], of):
            keep[row, start + np.argsort(size[row, start : start + of], kind="stable")[:gone]] = False
    return keep


def arrays(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight.double().numpy(), layer.gram.matrix.double().numpy()


def admm(layer: Layer, target: Target) -> np.ndarray:
    """20 iterations of Boza's algorithm 1, its mask chosen in the first 15 along the cubic (layer: at once)."""
    weight, gram = arrays(layer)
    norm = np.sqrt(gram.diagonal())
    a = gram / np.outer(norm, norm)
    a = a + 0.1 * np.eye(len(a))
    b = w = weight * norm
    u = np.zeros_like(b)
    mask = np.ones_like(b, bool)
    for t in range(20):
        if t < 15:
            now = target.sparsity * (1 - (1 - (t + 1) / 15) ** 3)
            score = np.abs(b + u)
            if target.n_of_m:
                largest = projection(score, target)
                others = np.where(largest, np.inf, score)
                mask = others >= np.sort(others, axis=None)[int(now * score.size)]
            elif target.pattern == "layer":
                mask = projection(score, target)
            else:
                mask = score >= np.sort(score, axis=1)[:, [int(now * score.shape[1])]]
        z = (b + u) * mask
        u = u + b - z
        b = np.linalg.solve(a + np.eye(len(a)), (w @ a + z - u).T).T
    return (b + u) * mask / norm


@pytest.mark.parametrize("target", [ROW, PAIRS, LAYER], ids=lambda target: target.label)
@pytest.mark.parametrize("name", ["correlated", "two blocks of 128", "one output"])
def test_admm_is_the_algorithm(name: str, target: Target):
    layer = layers.build(name)
    result, expected = compress(layer, target, "admm"), admm(layer, target)
    assert np.array_equal(some(result.mask).numpy(), expected != 0)
    np.testing.assert_allclose(result.weight.numpy(), expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())
    assert result.info["damping"] == 0.1


def alps(layer: Layer, target: Target, rho: float) -> tuple[np.ndarray, int]:
    """The support that the released schedule of the penalty settles on, and how many iterations it takes."""
    weight, gram = arrays(layer)
    gram = gram + 0.01 * gram.diagonal().mean() * np.eye(len(gram))
    norm = np.sqrt(gram.diagonal())
    a, dense = gram / np.outer(norm, norm), weight * norm
    aim, d = dense @ a, dense * projection(dense, target)
    start, v, seen, moved = d, np.zeros_like(d), d != 0, False
    kept, b, i = seen.sum(), d, 0
    for i in range(300):
        b = np.linalg.solve(a + rho * np.eye(len(a)), (aim - v + rho * d).T).T
        d = b + v / rho
        d = d * projection(d, target)
        v = v + rho * (b - d)
        if i % 3 != 2:
            continue
        changed, seen = (seen != (d != 0)).sum(), d != 0
        if changed / kept > 0.1:
            moved, rho = True, 1.3 * rho
        elif changed / kept > 0.005:
            moved, rho = True, 1.2 * rho
        elif changed:
            rho = 1.1 * rho if moved else rho / 5
            d, v = (d, v) if moved else (start, np.zeros_like(d))
        elif moved:
            break
        else:
            rho = rho / 5
        if i >= 30 and changed / kept < 0.0003:
            break
    return projection(b, target), i + 1


@pytest.mark.parametrize("rho", [0.1, 30.0, 1e5])  # too large a penalty holds the start's support and must shrink
@pytest.mark.parametrize("target", [ROW, PAIRS, LAYER], ids=lambda target: target.label)
@pytest.mark.parametrize("name", ["correlated", "two blocks of 128"])
def test_alps_is_the_algorithm(name: str, target: Target, rho: float):
    layer = layers.build(name)
    mask, iterations = alps(layer, target, rho)
    result = compress(layer, target, "alps", rho=rho)
    assert np.array_equal(some(result.mask).numpy(), mask)
    assert result.trace[-1][0] == iterations + 1  # the refined weights count as one iteration more


def test_alps_refinement_leads_to_the_least_squares_of_its_support():
    layer = layers.build("correlated")
    result = compress(layer, ROW, "alps", refinements=500)
    expected = least_squares(layer.weight.double(), mask_of(result), layer.gram.matrix.double(), 0.01)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["admm", "alps"])
@pytest.mark.parametrize("target", [ROW, PAIRS, LAYER], ids=lambda target: target.label)
def test_the_trace_is_the_loss_of_what_is_returned(method: str, target: Target):
    for layer in (layers.build("correlated"), layers.build("weights of 1e-12"), layers.build("Gram of 1e12")):
        result = compress(layer, target, method)
        lost = layer.weight.double() - result.weight.double()
        loss = float(((lost @ layer.gram.matrix.double()) * lost).sum())
        assert result.trace[-1][2] == pytest.approx(loss, rel=1e-4)
        assert result.trace[0][2] > loss


@pytest.mark.parametrize(
    ("method", "factorise", "other"), [("admm", "cholesky", {"rho": 2.0}), ("alps", "eigh", {"damping": 1.0})]
)
def test_layers_of_one_tap_factorise_once(method: str, factorise: str, other: dict, monkeypatch: pytest.MonkeyPatch):
    calls, original = [], getattr(torch.linalg, factorise)
    monkeypatch.setattr(torch.linalg, factorise, lambda matrix: calls.append(1) or original(matrix))
    layer = layers.build("correlated")
    second = replace(layer, weight=layer.weight.flip(0) + 0.01)
    compress(layer, ROW, method)
    shared = compress(second, PAIRS, method)
    assert len(calls) == 1
    assert torch.equal(shared.weight, compress(replace(second, gram=Gram(layer.gram.matrix, 1)), PAIRS, method).weight)
    compress(layer, ROW, method, **other)
    assert len(calls) == 3


@pytest.mark.parametrize("method", ["admm", "alps"])
def test_kept_weights_of_dead_inputs_are_their_own(method: str):
    layer = layers.build("dead inputs")
    target = Target(0.05)  # 3 of 64 go, 6 are dead
    result = compress(layer, target, method)
    dead = layer.gram.dead & mask_of(result)
    assert dead.any()
    assert torch.equal(result.weight[dead], layer.weight[dead])


def dsnot(layer: Layer, row: int, kept: np.ndarray, cycles: int) -> np.ndarray:
    """One row of DSnoT, unstructured, that returns the mask of the smallest |expected error|."""
    share = (layer.weight[row].double() * some(layer.statistics).mean.double()).numpy()
    wanda = (layer.weight[row].abs() * layer.gram.diagonal.sqrt()).numpy()
    score = share / some(layer.statistics).sequence_variance.double().numpy()
    grow = sorted((j for j in range(len(kept)) if not kept[j]), key=lambda j: score[j])
    fall = sorted((j for j in range(len(kept)) if kept[j]), key=lambda j: wanda[j])
    drops = {True: [j for j in fall if share[j] > 0], False: [j for j in fall if share[j] < 0]}
    mask, best = kept.copy(), kept.copy()
    least = abs(share[~mask].sum())
    for _ in range(cycles):
        error = share[~mask].sum()
        if abs(error) <= 0.1 * np.linalg.norm(share):
            break
        grown = grow.pop(-1 if error > 0 else 0)
        dropped = drops[error < 0].pop(0)
        mask[grown], mask[dropped] = True, False
        if abs(share[~mask].sum()) < least:
            least, best = abs(share[~mask].sum()), mask.copy()
    return best


@pytest.mark.parametrize("warm_start", ["wanda", "magnitude"])
@pytest.mark.parametrize("name", ["correlated", "two blocks of 128"])
def test_dsnot_is_the_algorithm(name: str, warm_start: str):
    layer = layers.build(name)
    start = mask_of(compress(layer, ROW, warm_start))
    mask = mask_of(compress(layer, ROW, "dsnot", warm_start=warm_start, cycles=8))
    for row, kept in enumerate(start.numpy()):
        assert np.array_equal(mask[row].numpy(), dsnot(layer, row, kept, 8)), f"row {row}"
    assert not torch.equal(mask, start)


@pytest.mark.parametrize("threshold", [0.1, 0.0])  # without one a row ends where its lists do
@pytest.mark.parametrize("convention", ["exact", "official"])
@pytest.mark.parametrize("target", [ROW, Target(0.1), PAIRS, Target(pattern="3:7")], ids=lambda target: target.label)
@pytest.mark.parametrize("name", ["correlated", "dead inputs", "201 inputs"])
def test_dsnot_compiled_is_that_in_torch(name: str, target: Target, convention: str, threshold: float):
    layer = layers.build(name)
    layer = replace(layer, weight=(20 * layer.weight).round() / 20)  # many ties and zeros
    params = {"convention": convention, "threshold": threshold}
    result = compress(layer, target, "dsnot", **params)
    with dispatch.reference():
        plain = compress(layer, target, "dsnot", **params)
    assert torch.equal(mask_of(result), mask_of(plain))
    assert [row[0] for row in result.trace] == [row[0] for row in plain.trace]
    np.testing.assert_allclose([row[2] for row in result.trace], [row[2] for row in plain.trace], rtol=1e-9, atol=1e-25)


@pytest.mark.parametrize("target", [ROW, PAIRS], ids=lambda target: target.label)
def test_dsnot_lowers_the_loss_on_the_mean_activation(target: Target):
    layer = layers.build("correlated")
    start, result = compress(layer, target, "wanda"), compress(layer, target, "dsnot")
    for trace, weight in ((result.trace[0], start.weight), (result.trace[-1], result.weight)):
        loss = float(((layer.weight - weight).double() @ some(layer.statistics).mean.double()).square().sum())
        assert trace[2] == pytest.approx(loss, rel=1e-6)
    assert result.trace[-1][2] < result.trace[0][2]


def test_dsnot_leaves_the_layers_that_the_released_code_skips():
    layer = replace(layers.build("correlated"), name="model.layers.0.mlp.up_proj")
    start = mask_of(compress(layer, ROW, "wanda"))
    assert torch.equal(mask_of(compress(layer, ROW, "dsnot")), start)
    assert not torch.equal(mask_of(compress(layer, ROW, "dsnot", skip="")), start)
    attention = replace(layer, name="model.layers.0.self_attn.q_proj")
    assert not torch.equal(mask_of(compress(attention, ROW, "dsnot")), start)


def test_dsnot_without_statistics_is_one_sentence():
    layer = replace(layers.build("correlated"), statistics=None)
    with pytest.raises(
        ValueError, match=r"^dsnot needs mean and sequence_variance, but correlated has no statistics\.$"
    ):
        compress(layer, ROW, "dsnot")
    assert torch.equal(compress(layer, Target(), "dsnot").weight, layer.weight)


def test_dsnot_exact_is_free_of_scale_and_length_and_official_is_not():
    layer = layers.build("correlated")

    def masks(convention: str):
        small = replace(layer, weight=1e-3 * layer.weight)
        known = some(layer.statistics)
        long = replace(layer, statistics=replace(known, length=64 * known.length))
        return [mask_of(compress(case, ROW, "dsnot", convention=convention)) for case in (layer, small, long)]

    same, small, long = masks("exact")
    assert torch.equal(same, small) and torch.equal(same, long)
    same, small, long = masks("official")
    assert not torch.equal(same, small) and not torch.equal(same, long)
    assert torch.equal(
        small, ops.prune_mask(layer.weight.abs() * layer.gram.diagonal.sqrt(), ROW)
    )  # nothing is refined
