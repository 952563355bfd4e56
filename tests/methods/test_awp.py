"""AWP against projected gradient descent written plainly, in loops: float64, and float32 for what is on a grid."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import best_error, output_error
from layerwise.checks.layer_cases import Recipe, grid_of
from layerwise.contract.layer import Gram, Layer, Target
from layerwise.methods.awp import AWP
from layerwise.methods.chain import Chain
from layerwise.methods.magnitude import Magnitude
from layerwise.methods.rtn import RTN
from layerwise.methods.wanda import Wanda
from layerwise.numerics import dispatch
from layerwise.numerics.gradient_projection import Projection, project, with_share
from tests.support.typing_helpers import mask_of, some

LAYERS = {
    "10 inputs": Recipe(out=4, inputs=10),
    "24 inputs": Recipe(out=5, inputs=24, seed=1),
    "dead inputs": Recipe(out=4, inputs=12, dead=(1, 5)),
    "fewer tokens than inputs": Recipe(out=4, inputs=16, sequences=1, length=6),
}
TARGETS = [Target(0.5), Target(0.7), Target(0.5, "layer"), Target(pattern="2:4"), Target(0.5, "1x4")]


def oracle(layer: Layer, target: Target, step: str, iterations: int, tolerance: float = 1e-4) -> list[np.ndarray]:
    """[out, in] float64 of every iterate."""
    weight, gram = layer.weight.double().numpy(), layer.gram.matrix.double().numpy()
    size = np.sqrt((gram**2).sum()) / 2 if step == "frobenius" else np.linalg.eigvalsh(gram).max()
    theta = plain_projection(weight * np.sqrt(gram.diagonal()), weight, target, power=1)
    iterates = [theta]
    for _ in range(iterations):
        gradient = (weight - theta) @ gram
        if np.linalg.norm(gradient) / np.linalg.norm(weight) < tolerance * gram.diagonal().mean():
            break
        moved = theta + gradient / size
        theta = plain_projection(moved, moved, target, power=2)
        iterates.append(theta)
    return iterates


def plain_projection(score: np.ndarray, weight: np.ndarray, target: Target, power: int) -> np.ndarray:
    """The weight where the sums of |score|^power are largest; Wanda's block score is a sum of absolute values."""
    out, inputs = weight.shape
    length = target.block or 1
    starts = range(0, inputs, length)
    pieces = [[[(i, j) for j in range(s, min(s + length, inputs))] for s in starts] for i in range(out)]
    if target.pattern == "layer":
        groups = [sum(pieces, [])]
    elif target.n_of_m:
        of = target.n_of_m[1]
        groups = [row[s : s + of] for row in pieces for s in range(0, inputs, of)]
    else:
        groups = pieces
    result = weight.copy()
    for group in groups:
        count = max(len(group) - target.n_of_m[0], 0) if target.n_of_m else int(target.sparsity * len(group))
        costs = sorted((sum(abs(score[entry]) ** power for entry in piece), piece) for piece in group)
        for _, piece in costs[:count]:
            for entry in piece:
                result[entry] = 0
    return result


@pytest.mark.parametrize("step", ["frobenius", "spectral"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_plain_projected_gradient_descent(name: str, target: Target, step: str):
    layer = layers.make(LAYERS[name], name)
    result = AWP(Wanda(), step, iterations=60).compress(layer, target, torch.Generator())
    iterates = oracle(layer, target, step, 60)
    errors = [output_error(layer, torch.from_numpy(iterate)) for iterate in iterates]
    total = float(torch.trace(layer.weight.double() @ layer.gram.matrix.double() @ layer.weight.double().T))
    assert output_error(layer, result.weight) == pytest.approx(min(errors), rel=1e-6, abs=1e-12)
    assert [t for t, _, _ in result.trace] == list(range(len(iterates)))
    assert [value / total for _, _, value in result.trace] == pytest.approx(errors, rel=1e-5, abs=1e-9)


def test_the_best_iterate_is_returned_although_the_published_step_can_ascend():
    """With two tokens G is nearly of rank one, and 2 / ||G||_F close to twice what gradient descent may take."""
    ascended = 0
    for seed in range(40):
        layer = layers.make(Recipe(out=8, inputs=24, sequences=1, length=2, seed=seed))
        result = AWP(Wanda()).compress(layer, Target(0.6), torch.Generator())
        objectives = [value for _, _, value in result.trace]
        ascended += any(b > a + 1e-6 * objectives[0] for a, b in itertools.pairwise(objectives))
        lost = (layer.weight - result.weight).double()
        objective = float(((lost @ layer.gram.matrix.double()) * lost).sum())
        assert objective == pytest.approx(min(objectives), abs=1e-6 * objectives[0])
    assert ascended  # else this test says nothing


@pytest.mark.parametrize("name", layers.LAYERS)
def test_the_spectral_step_never_ascends(name: str):
    result = AWP(Wanda(), "spectral").compress(layers.build(name), Target(0.6), torch.Generator())
    objectives = [value for _, _, value in result.trace]
    assert all(b <= a + 1e-6 * objectives[0] for a, b in itertools.pairwise(objectives))


@pytest.mark.parametrize("acceleration", ["none", "momentum"])
@pytest.mark.parametrize("target", [*TARGETS, Target(pattern="3:7")], ids=lambda target: target.label)
@pytest.mark.parametrize("name", ["correlated", "two blocks of 128", "dead inputs", "constant weights", "one input"])
def test_the_compiled_steps_are_those_in_torch(name: str, target: Target, acceleration: str):
    layer, method = layers.build(name), AWP(Wanda(), iterations=30, acceleration=acceleration)
    ours = method.compress(layer, target, torch.Generator())
    with dispatch.reference():
        plain = method.compress(layer, target, torch.Generator())
    assert torch.equal(mask_of(ours), mask_of(plain))
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-5, atol=1e-6 * float(layer.weight.abs().max()))
    start = plain.trace[0][2]
    assert [f for *_, f in ours.trace] == pytest.approx([f for *_, f in plain.trace], rel=1e-5, abs=1e-6 * start)


@pytest.mark.parametrize("target", [Target(0.6), Target(pattern="2:4"), Target(0.6, "layer")], ids=lambda t: t.label)
def test_momentum_needs_less_than_half_the_iterations(target: Target):
    """To the error of 200 plain ones with the published step; the step must be one that descends."""
    layer = layers.make(Recipe(out=16, inputs=128, sequences=4, length=128))
    plain = AWP(Wanda()).compress(layer, target, torch.Generator())
    trace = AWP(Wanda(), "spectral", acceleration="momentum").compress(layer, target, torch.Generator()).trace
    assert next(t for t, _, error in trace if error <= min(f for *_, f in plain.trace)) < 100


@pytest.mark.parametrize("name", layers.LAYERS)
def test_the_largest_eigenvalue_is_bounded_closely(name: str):
    gram = layers.build(name).gram
    exact = float(torch.linalg.eigvalsh(gram.matrix.double())[-1])
    assert exact * (1 - 1e-12) <= gram.largest_eigenvalue <= exact * (1 + 1.1e-9)


@pytest.mark.parametrize("start", [Wanda(), Magnitude()])
def test_no_iteration_is_the_warm_start(start):
    layer = layers.build("correlated")
    expected = start.compress(layer, Target(0.6), torch.Generator())
    result = AWP(start, iterations=0).compress(layer, Target(0.6), torch.Generator())
    assert torch.equal(result.weight, expected.weight) and torch.equal(mask_of(result), mask_of(expected))


def test_the_stopping_rule_does_not_depend_on_the_scale_of_the_activations():
    layer = layers.build("correlated")
    lengths = []
    for factor in (1.0, 1e-6, 77.7):
        scaled = replace(layer, gram=Gram(factor * layer.gram.matrix, layer.gram.tokens))
        lengths.append(len(AWP(Wanda(), tolerance=0.05).compress(scaled, Target(0.5), torch.Generator()).trace))
    assert 1 < lengths[0] < 201 and len(set(lengths)) == 1


@pytest.mark.parametrize("target", [Target(0.5), Target(pattern="2:4")], ids=lambda target: target.label)
def test_is_between_the_best_of_all_masks_and_the_warm_start(target: Target):
    for seed in range(5):
        layer = layers.make(Recipe(out=3, inputs=8, seed=seed))
        error = output_error(layer, AWP(Wanda()).compress(layer, target, torch.Generator()).weight)
        assert best_error(layer, target, refit=True) * (1 - 1e-6) <= error
        assert error <= output_error(layer, Wanda().compress(layer, target, torch.Generator()).weight)


def test_blocks_are_projected_by_their_squares():
    """The nearest blockwise sparse weight keeps [3, 0], not [2, 2], whose sum of absolute values is larger."""
    _, mask = project(torch.tensor([[3.0, 0.0, 2.0, 2.0]]), Target(0.5, "1x2"))
    assert mask.tolist() == [[True, True, False, False]]


def test_weights_that_are_not_finite_are_an_error():
    layer = layers.build("correlated")
    with pytest.raises(ValueError, match="must be finite"):
        AWP(Wanda()).compress(replace(layer, weight=layer.weight / 0), Target(0.5), torch.Generator())


# ----------------------------------------------------------------------------------------- quantising, alone or as well

QUANTISED = [Target(bits=3, group=4), Target(bits=2), Target(bits=4, group=5, symmetric=True)]
JOINT = [
    Target(0.5, bits=3, group=4),
    Target(0.6, "layer", bits=4, group=8),
    Target(pattern="2:4", bits=3),
    Target(pattern="1:8", bits=4, group=8),
    Target(0.5, "1x4", bits=3, group=8),
    Target(0.3, bits=2, group=16, symmetric=True),
]


def quantising_oracle(
    layer: Layer, target: Target, step: str, iterations: int, gradual: bool
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """[out, in] float32 of the start, and of every iterate that is on the grid with its number."""
    weight, gram = layer.weight.double().numpy(), layer.gram.matrix.double().numpy()
    before = iterations // 2 if target.sparsity else 0
    wanda = plain_projection(weight * np.sqrt(gram.diagonal()), weight, target, power=1)
    start = plain_rounding(wanda.astype(np.float32), target)[0]
    found, theta = [], layer.weight.numpy()
    for t in range(1, iterations + 1):
        multiple = {"frobenius": 2.0 if t <= before else 1.5, "spectral": 1.0}[step]
        size = np.sqrt((gram**2).sum()) if step == "frobenius" else np.linalg.eigvalsh(gram).max()
        moved = (theta + multiple / size * (weight - theta) @ gram).astype(np.float32)
        if target.sparsity:
            moved = plain_projection(moved, moved, ramped(target, min(4 * t / iterations, 1)), power=2)
        theta = moved
        if t <= before:
            continue
        theta, cells = plain_rounding(moved, target)
        if gradual and t < iterations:
            share = 1 - (1 - (t - before) / (iterations - before)) ** 3
            for i, row in enumerate(moved):
                kept = sorted((cells[i, j], j) for j in range(len(row)) if not target.sparsity or row[j] != 0)
                for _, j in kept[int(share * len(kept)) :]:
                    theta[i, j] = row[j]
        else:
            found.append((t, theta))
    return start, found


def ramped(target: Target, share: float) -> Target:
    if not target.n_of_m:
        return Target(share * target.sparsity, target.pattern)
    kept, of = target.n_of_m
    kept = of - int(share * (of - kept))
    return Target(pattern=f"{kept}:{of}") if kept < of else Target()


def plain_rounding(weight: np.ndarray, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """[out, in] float32 on the min-max grid of each row and group, and the distances to it in units of its scale."""
    result, cells = np.zeros_like(weight), np.zeros_like(weight)
    bits, length = some(target.bits), target.group or weight.shape[1]
    last = np.float32(2**bits - 1)
    for i in range(len(weight)):
        for begin in range(0, weight.shape[1], length):
            piece = weight[i, begin : begin + length]
            low, high = min(piece.min(), np.float32(0)), max(piece.max(), np.float32(0))
            if target.symmetric:
                high = max(-low, high)
                low = -high if low < 0 else low
            if low == high == 0:
                continue
            scale = (high - low) / last
            zero = np.float32(2 ** (bits - 1)) if target.symmetric else np.rint(-low / scale)
            codes = np.clip(np.rint(piece / scale) + zero, 0, last)
            result[i, begin : begin + length] = scale * (codes - zero)
            cells[i, begin : begin + length] = np.abs(result[i, begin : begin + length] - piece) / scale
    return result, cells


@pytest.mark.parametrize("rounding", ["full", "gradual"])
@pytest.mark.parametrize("step", ["frobenius", "spectral"])
@pytest.mark.parametrize("target", QUANTISED + JOINT, ids=lambda target: target.label)
@pytest.mark.parametrize("name", LAYERS)
def test_quantising_agrees_with_plain_projected_gradient_descent(name: str, target: Target, step: str, rounding: str):
    layer = layers.make(LAYERS[name], name)
    result = AWP(Wanda(), step, iterations=24, rounding=rounding).compress(layer, target, torch.Generator())
    start, iterates = quantising_oracle(layer, target, step, 24, rounding == "gradual")
    candidates = [(0, start), *iterates]
    errors = [output_error(layer, torch.from_numpy(iterate)) for _, iterate in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    np.testing.assert_allclose(result.weight.numpy(), candidates[best][1], rtol=1e-6, atol=1e-12)
    assert [t for t, _, _ in result.trace] == [t for t, _ in candidates]
    total = float(torch.trace(layer.weight.double() @ layer.gram.matrix.double() @ layer.weight.double().T))
    so_far = list(itertools.accumulate(errors, min))
    assert [value / total for _, _, value in result.trace] == pytest.approx(so_far, rel=1e-6)


@pytest.mark.parametrize(("target", "expected"), [(Target(bits=3), 10), (Target(0.5, bits=3), 100), (Target(0.5), 200)])
def test_iterations_left_open_are_those_of_the_kind_of_target(target: Target, expected: int):
    layer = layers.build("correlated")
    assert AWP(Wanda(), tolerance=0.0).compress(layer, target, torch.Generator()).trace[-1][0] == expected


@pytest.mark.parametrize("rounding", ["full", "gradual"])
@pytest.mark.parametrize("name", [name for name in layers.LAYERS if name != "zero weights"])
def test_is_never_worse_than_rounding_to_nearest(name: str, rounding: str):
    layer, method = layers.build(name), AWP(Wanda(), iterations=10, rounding=rounding)
    for bits in (2, 3, 4):
        for group, symmetric in ((None, False), (16, False), (16, True)):
            target = Target(bits=bits, group=group, symmetric=symmetric)
            rounded = RTN().compress(layer, target, torch.Generator())
            result = method.compress(layer, target, torch.Generator())
            assert lost(layer, result.weight) <= lost(layer, rounded.weight), target.label


@pytest.mark.parametrize("rounding", ["full", "gradual"])
@pytest.mark.parametrize("target", JOINT, ids=lambda target: target.label)
def test_both_together_are_never_worse_than_the_warm_start_rounded(target: Target, rounding: str):
    for name in layers.ORDINARY:
        layer = layers.build(name)
        chained = Chain((Wanda(), RTN())).compress(layer, target, torch.Generator())
        result = AWP(Wanda(), iterations=12, rounding=rounding).compress(layer, target, torch.Generator())
        assert lost(layer, result.weight) <= lost(layer, chained.weight)


def lost(layer: Layer, weight: torch.Tensor) -> float:
    missing = layer.weight.double() - weight.double()
    return float(((missing @ layer.gram.matrix.double()) * missing).sum())


def test_gradual_rounding_ends_below_full_rounding_which_stays_near_the_start():
    """A step that is shorter than half a cell of the grid changes nothing; what is not yet rounded moves freely."""
    layer, target = layers.build("correlated"), Target(bits=3, group=16)
    start = lost(layer, RTN().compress(layer, target, torch.Generator()).weight)
    full, gradual = (
        lost(layer, AWP(Wanda(), iterations=200, rounding=rounding).compress(layer, target, torch.Generator()).weight)
        for rounding in ("full", "gradual")
    )
    assert 0.85 * start < full <= start
    assert gradual < 0.95 * full


@pytest.mark.parametrize("rounding", ["full", "gradual"])
@pytest.mark.parametrize("target", JOINT, ids=lambda target: target.label)
@pytest.mark.parametrize("name", layers.LAYERS)
def test_zeros_are_exact_and_so_are_those_of_the_codes(name: str, target: Target, rounding: str):
    layer = layers.build(name)
    result = AWP(Wanda(), iterations=8, rounding=rounding).compress(layer, target, torch.Generator())
    group_of = torch.arange(layer.weight.shape[1]) // (target.group or layer.weight.shape[1])
    grid = grid_of(result)
    values = grid.scales[:, group_of] * (grid.codes.float() - grid.zeros[:, group_of])
    assert result.mask is not None and (values[~result.mask] == 0).all()
    assert torch.equal(values, result.weight)


@pytest.mark.parametrize("rounding", ["full", "gradual"])
def test_zeros_of_the_layer_stay(rounding: str):
    layer, method = layers.build("correlated"), AWP(Wanda(), iterations=20, rounding=rounding)
    pruned = Wanda().compress(layer, Target(0.5), torch.Generator())
    assert pruned.mask is not None
    kept, target = replace(layer, weight=pruned.weight, keep=pruned.mask), Target(bits=3, group=16)
    result = method.compress(kept, target, torch.Generator())
    rounded = RTN().compress(replace(layer, weight=pruned.weight), target, torch.Generator())
    assert result.mask is None and (result.weight[~pruned.mask] == 0).all()
    assert not torch.equal(result.weight, rounded.weight)  # it moved, else this test says nothing


@pytest.mark.parametrize("target", [QUANTISED[0], JOINT[0]], ids=lambda target: target.label)
def test_no_iteration_is_the_start_rounded(target: Target):
    layer = layers.build("correlated")
    result = AWP(Wanda(), iterations=0).compress(layer, target, torch.Generator())
    pruned = Wanda().compress(layer, target.pruning, torch.Generator()).weight
    expected = RTN().compress(replace(layer, weight=pruned), target.grid, torch.Generator())
    assert torch.equal(result.weight, expected.weight) and torch.equal(grid_of(result).codes, grid_of(expected).codes)
    assert [t for t, _, _ in result.trace] == [0]


def test_the_sparsity_rises_over_the_first_quarter_and_is_held():
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    projection = Projection(Target(0.5, bits=4, group=16), None, 40, False)
    dropped = [int((~projection(weight, t).mask).sum()) // 3 for t in range(1, 41)]  # type: ignore[operator]
    assert dropped == [int(0.5 * t / 10 * 64) for t in range(1, 10)] + [32] * 31
    assert [projection(weight, t).quantised is not None for t in (1, 20, 21, 40)] == [False, False, True, True]
    assert [with_share(Target(pattern="2:4"), share).label for share in (0.4, 0.5, 1.0)] == ["dense", "3:4", "2:4"]


def test_gradual_rounding_takes_the_nearest_of_each_row_first():
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    target = Target(bits=2, group=16)
    projection = Projection(target, None, 10, True)
    rounded = RTN().compress(Layer("layer", weight, Gram(torch.eye(64), 1)), target, torch.Generator())
    cells = (rounded.weight - weight).abs() / grid_of(rounded).scales.repeat_interleave(16, 1)
    for t in range(1, 11):
        on_grid = projection(weight, t).weight == rounded.weight
        count = int((1 - (1 - t / 10) ** 3) * 64)
        assert on_grid.sum(1).tolist() == [count] * 3
        if t < 10:
            assert (cells.where(on_grid, 0.0).amax(1) <= cells.where(~on_grid, torch.inf).amin(1)).all()
