"""AWP's own options with bits: a start whose grid stays, iterates that accumulate, a diagonal step.

Held against descent written plainly in float64, a weight at a time where it is rounded.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import output_error
from layerwise.checks.layer_cases import Recipe, grid_of
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.import_closure import METHODS
from layerwise.contract.layer import Compressed, Layer, Method, Quantised, Target, UnsupportedTarget
from layerwise.contract.method_file import CatalogueError
from layerwise.methods.awp import AWP
from layerwise.methods.awq import AWQ
from layerwise.methods.chain import Chain
from layerwise.methods.gptq import GPTQ
from layerwise.methods.rotated import Rotated
from layerwise.methods.rtn import RTN
from layerwise.methods.turboquant import TurboQuant
from layerwise.methods.wanda import Wanda
from layerwise.numerics import ops
from tests.support.typing_helpers import some

LAYERS = {
    "10 inputs": Recipe(out=4, inputs=10),
    "24 inputs": Recipe(out=5, inputs=24, seed=1),
    "dead inputs": Recipe(out=4, inputs=12, dead=(1, 5)),
    "fewer tokens than inputs": Recipe(out=4, inputs=16, sequences=1, length=6),
}
STARTS: dict[str, Method] = {"rtn": RTN(), "gptq": GPTQ(act_order=True), "awq": AWQ()}
TARGETS = [Target(bits=3, group=4), Target(bits=2), Target(bits=4, group=5, symmetric=True)]
JOINT = [Target(0.5, bits=3, group=4), Target(pattern="2:4", bits=3)]
ROUNDS = 24


def compress(method: Method, layer: Layer, target: Target) -> Compressed:
    return method.compress(layer, target, torch.Generator())


def nearest_codes(weight: np.ndarray, held: Quantised, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """[out, in] float64 values of the nearest codes of the held grid, and the distances in units of its step."""
    group_of = ops.grouping(held, target).numpy()
    scales, zeros = held.scales.double().numpy(), held.zeros.numpy()
    width = np.ones(weight.shape[1]) if held.input_scale is None else held.input_scale.double().numpy()
    values, cells = np.zeros_like(weight), np.zeros_like(weight)
    for i, j in np.ndindex(*weight.shape):
        step, zero = scales[i, group_of[j]] / width[j], zeros[i, group_of[j]]
        code = min(range(2 ** (target.bits or 0)), key=lambda code: abs(step * (code - zero) - weight[i, j]))
        values[i, j] = step * (code - zero)
        cells[i, j] = abs(values[i, j] - weight[i, j]) / step
    return values, cells


def step_of(gram: np.ndarray, step: str) -> np.ndarray:
    """[in] the step of each input where it rounds."""
    alive = gram.diagonal() > 0
    if step == "diagonal":
        root = np.sqrt(np.where(alive, gram.diagonal(), 1.0))
        largest = np.linalg.eigvalsh(gram / root / root[:, None]).max()
        return np.where(alive, 1 / (largest * root**2), 0.0)
    size = np.sqrt((gram**2).sum()) / 1.5 if step == "frobenius" else np.linalg.eigvalsh(gram).max()
    return np.full(len(gram), 1 / size)


def plain_descent(
    layer: Layer, target: Target, start: Compressed, step: str, accumulates: bool, gradual: bool
) -> list[tuple[int, np.ndarray]]:
    """(number, [out, in] float64) of every iterate on the start's grid, itself included; bits alone."""
    weight, gram = layer.weight.double().numpy(), layer.gram.matrix.double().numpy()
    total = theta = start.weight.double().numpy()
    found, sizes = [(0, theta)], step_of(gram, step)
    for t in range(1, ROUNDS + 1):
        total = (total if accumulates else theta) + sizes * ((weight - theta) @ gram)
        theta, cells = nearest_codes(total, grid_of(start), target)
        if gradual and t < ROUNDS:
            share = 1 - (1 - t / ROUNDS) ** 3
            for i, row in enumerate(total):
                for j in sorted(range(len(row)), key=lambda j: (cells[i, j], j))[int(share * len(row)) :]:
                    theta[i, j] = row[j]
        else:
            found.append((t, theta))
    return found


@pytest.mark.parametrize("rounding", ["full", "gradual"])
@pytest.mark.parametrize("iterate", ["rounded", "accumulated"])
@pytest.mark.parametrize("step", ["frobenius", "spectral", "diagonal"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", LAYERS)
def test_descent_on_a_kept_grid_agrees_with_one_written_plainly(
    name: str, start: str, target: Target, step: str, iterate: str, rounding: str
):
    layer = layers.make(LAYERS[name], name)
    method = AWP(Wanda(), step, ROUNDS, rounding=rounding, grid_from=STARTS[start], iterate=iterate)
    result, begun = compress(method, layer, target), compress(STARTS[start], layer, target)
    iterates = plain_descent(layer, target, begun, step, iterate == "accumulated", rounding == "gradual")
    errors = [output_error(layer, torch.from_numpy(iterate)) for _, iterate in iterates]
    best = min(range(len(errors)), key=errors.__getitem__)
    np.testing.assert_allclose(result.weight.numpy(), iterates[best][1], rtol=1e-6, atol=1e-9)
    assert [t for t, _, _ in result.trace] == [t for t, _ in iterates]
    total = float(torch.trace(layer.weight.double() @ layer.gram.matrix.double() @ layer.weight.double().T))
    so_far = list(itertools.accumulate(errors, min))
    assert [value / total for _, _, value in result.trace] == pytest.approx(so_far, rel=1e-5, abs=1e-14)
    if (iterate, rounding) == ("rounded", "full") and step != "frobenius":  # a projected step in a metric: no ascent
        assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize("step", ["frobenius", "diagonal"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_without_a_start_the_sum_begins_at_the_weight_and_grids_follow_it(target: Target, step: str):
    layer = layers.make(LAYERS["24 inputs"])
    weight, gram = layer.weight.double().numpy(), layer.gram.matrix.double().numpy()
    result = compress(AWP(Wanda(), step, ROUNDS, iterate="accumulated"), layer, target)
    total, theta, found = weight, weight, [compress(RTN(), layer, target).weight]
    for _ in range(ROUNDS):
        total = total + step_of(gram, step) * ((weight - theta) @ gram)
        found.append(ops.round_to_nearest(torch.from_numpy(total).float(), target).weight)
        theta = found[-1].double().numpy()
    errors = [output_error(layer, own) for own in found]
    assert output_error(layer, result.weight) == pytest.approx(min(errors), rel=1e-6)
    assert len(set(errors)) > 2  # it moves, else this test says nothing


@pytest.mark.parametrize("iterate", ["rounded", "accumulated"])
@pytest.mark.parametrize("step", ["frobenius", "diagonal"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", [name for name in layers.LAYERS if name != "zero weights"])
def test_is_never_worse_than_its_start_whose_grid_stays(name: str, start: str, step: str, iterate: str):
    layer = layers.build(name)
    for target in (Target(bits=2), Target(bits=3, group=16), Target(bits=4, group=16, symmetric=True)):
        begun = compress(STARTS[start], layer, target)
        result = compress(AWP(Wanda(), step, 10, grid_from=STARTS[start], iterate=iterate), layer, target)
        assert lost(layer, result.weight) <= lost(layer, begun.weight)
        ours, theirs = grid_of(result), grid_of(begun)
        assert torch.equal(ours.scales, theirs.scales) and torch.equal(ours.zeros, theirs.zeros)
        assert torch.equal(ops.grouping(ours, target), ops.grouping(theirs, target))
        assert (ours.input_scale is None) == (theirs.input_scale is None)
        assert ours.input_scale is None or torch.equal(ours.input_scale, some(theirs.input_scale))
        assert torch.equal(result.weight, ops.quantised_values(ours, target))


def lost(layer: Layer, weight: torch.Tensor) -> float:
    missing = layer.weight.double() - weight.double()
    return float(((missing @ layer.gram.matrix.double()) * missing).sum())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("target", JOINT, ids=lambda target: target.label)
def test_both_together_keep_the_grid_of_the_start_fitted_to_what_is_left(target: Target, start: str):
    for name in layers.ORDINARY:
        layer = layers.build(name)
        chained = compress(Chain((Wanda(), STARTS[start])), layer, target)
        method = AWP(Wanda(), "diagonal", 12, grid_from=STARTS[start], iterate="accumulated")
        result = compress(method, layer, target)
        assert torch.equal(grid_of(result).scales, grid_of(chained).scales)
        assert lost(layer, result.weight) <= lost(layer, chained.weight)
        assert result.mask is not None and (result.weight[~result.mask] == 0).all()


@pytest.mark.parametrize("start", STARTS)
def test_zeros_that_came_with_the_layer_stay(start: str):
    layer, target = layers.build("correlated"), Target(bits=3, group=16)
    pruned = compress(Wanda(), layer, Target(0.5))
    assert pruned.mask is not None
    kept = replace(layer, weight=pruned.weight, keep=pruned.mask)
    result = compress(AWP(Wanda(), "diagonal", 50, grid_from=STARTS[start], iterate="accumulated"), kept, target)
    assert (result.weight[~pruned.mask] == 0).all()
    assert not torch.equal(result.weight, compress(STARTS[start], kept, target).weight)  # it moved


def test_steps_that_add_up_move_what_single_steps_leave():
    layer, target = layers.build("correlated"), Target(bits=3, group=16)
    start = lost(layer, compress(RTN(), layer, target).weight)
    single, added = (
        lost(layer, compress(AWP(Wanda(), "diagonal", 20, grid_from=RTN(), iterate=iterate), layer, target).weight)
        for iterate in ("rounded", "accumulated")
    )
    assert added < 0.9 * single <= 0.9 * start


@pytest.mark.parametrize("start", [Rotated(RTN()), TurboQuant()], ids=["rotated", "turboquant"])
def test_a_start_with_a_grid_of_its_own_is_refused(start: Method):
    with pytest.raises(
        UnsupportedTarget, match="^awp's grid_from must give integer codes. Got a grid of its own instead.$"
    ):
        compress(AWP(Wanda(), grid_from=start), layers.build("correlated"), Target(bits=3, group=16))


@pytest.mark.parametrize(
    ("start", "target", "reason"),
    [
        ("gptq", Target(bits=3), None),
        ("gptq", Target(0.5, bits=3), None),
        ("gptq", Target(0.5), None),  # not asked: nothing is rounded
        (None, Target(0.5, bits=3), None),
        ("wanda", Target(bits=3), "its grid_from cannot be used: wanda does not quantise"),
        ("turboquant", Target(bits=3), "its grid_from cannot quantise: turboquant has a grid of its own"),
        ("gptaq", Target(bits=3), "its grid_from cannot quantise: gptaq needs cross_gram, which awp does not give"),
        ("sparsegpt", Target(0.5, bits=3), "its grid_from cannot be used: sparsegpt does not quantise without pruning"),
    ],
)
def test_what_the_start_cannot_is_known_before_any_job(start: str | None, target: Target, reason: str | None):
    catalogue = Catalogue()
    params = catalogue.complete("awp", {"grid_from": start}, "test")
    found = catalogue.refusal("awp", params, target)
    assert found == reason if reason is None else str(found).startswith(reason)


def test_a_start_that_moves_zeros_is_refused_beside_pruning(tmp_path: Path):
    source = METHODS.joinpath("rtn.py").read_text("utf-8").replace('    "keeps_zeros": True,\n', "")
    (tmp_path / "shifting.py").write_text(source, encoding="utf-8")
    catalogue = Catalogue([tmp_path])
    params = catalogue.complete("awp", {"grid_from": "shifting"}, "test")
    assert catalogue.refusal("awp", params, Target(bits=3)) is None
    told = "its grid_from cannot be used: shifting does not keep zeros"
    assert catalogue.refusal("awp", params, Target(0.5, bits=3)) == told


def test_no_other_warm_start_may_be_null():
    with pytest.raises(CatalogueError, match="must be a method's name"):
        Catalogue().complete("awp", {"warm_start": None}, "test")
