"""Learned steps against plain loops, finite differences, torch's Adam and the optimum of Chebyshev."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.layer_cases import Recipe
from layerwise.contract.layer import Target
from layerwise.numerics import learned_steps, ops
from layerwise.numerics.learned_steps import Rows, Steps, Training
from tests.support.typing_helpers import some

TARGETS = [Target(0.5), Target(0.6, "layer"), Target(pattern="2:4"), Target(0.5, "1x4")]
BEGINNINGS = ["cycles", "line_search", "incremental"]
COUNT = 5


def rows_of(recipe: Recipe, target: Target, dtype: torch.dtype = torch.float64) -> Rows:
    """A layer's rows, which start at the largest weights."""
    layer = layers.make(recipe)
    weight, gram = layer.weight.to(dtype), layer.gram.matrix.to(dtype)
    mask = ops.prune_mask(weight.double().square() if target.block else weight.abs(), target)
    return Rows(weight, gram / layer.gram.largest_eigenvalue, torch.where(mask, weight, 0.0), mask, target)


def numbers(low: float, high: float, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(low, high, COUNT))


def steps_of(momentum: bool, soft: bool) -> Steps:
    thresholds = numbers(0.05, 0.3, 2) if soft else None
    return Steps(numbers(0.5, 2, 0), numbers(-0.3, 0.9, 1) if momentum else None, thresholds)


def plainly_projected(moved: np.ndarray, target: Target) -> np.ndarray:
    """The entries of largest absolute value of each row, of each group of a row, or of the layer."""
    out, inputs = moved.shape
    places = [[(i, j) for j in range(inputs)] for i in range(out)]
    if target.pattern == "layer":
        places = [sum(places, [])]
    elif target.n_of_m:
        of = target.n_of_m[1]
        places = [row[begin : begin + of] for row in places for begin in range(0, inputs, of)]
    found = moved.copy()
    for group in places:
        count = len(group) - target.n_of_m[0] if target.n_of_m else int(target.sparsity * len(group))
        for place in sorted(group, key=lambda place: (abs(moved[place]), place))[:count]:
            found[place] = 0
    return found


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("target", TARGETS[:3], ids=lambda target: target.label)
def test_iterates_are_those_of_plain_loops(target: Target, momentum: bool, soft: bool):
    rows, steps = rows_of(Recipe(out=5, inputs=16), target), steps_of(momentum, soft)
    found = [one.theta.numpy() for one in learned_steps.iterates(rows, steps)]
    weight, gram = rows.weight.numpy(), rows.gram.numpy()
    theta = before = rows.start.numpy()
    for t in range(COUNT):
        point = theta + float(steps.momentum[t]) * (theta - before) if steps.momentum is not None else theta
        moved, before = point + float(steps.sizes[t]) * (weight - point) @ gram, theta
        if steps.thresholds is not None and t < COUNT - 1:
            limit = float(steps.thresholds[t]) * np.abs(weight).mean(1, keepdims=True)
            theta = np.where(moved > limit, moved - limit, np.where(moved < -limit, moved + limit, 0.0))
        else:
            theta = plainly_projected(moved, target)
        np.testing.assert_allclose(found[t + 1], theta, rtol=1e-10, atol=1e-14)
    assert len(found) == COUNT + 1 and np.array_equal(found[0], rows.start.numpy())


@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_gradients_are_finite_differences_while_the_support_stays(target: Target, soft: bool, supervised: bool):
    rows, steps = rows_of(Recipe(out=4, inputs=16, seed=3), target), steps_of(True, soft)
    loss = learned_steps.distance_to(rows, 0.9 * rows.weight) if supervised else learned_steps.own_error(rows)

    def at(values: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        parts = values.view(-1, COUNT)
        now = Steps(parts[0], parts[1], parts[2] if soft else None)
        supports = [one.theta.detach() != 0 for one in learned_steps.iterates(rows, now)]
        return loss(learned_steps.last(rows, now)), supports

    values = torch.cat(
        [steps.sizes, some(steps.momentum), *([steps.thresholds] if steps.thresholds is not None else [])]
    )
    values.requires_grad_(True)
    found, support = at(values)
    (gradient,) = torch.autograd.grad(found, values)
    compared = 0
    for index in range(len(values)):
        change = torch.zeros_like(values)
        change[index] = 1e-6
        (above, first), (below, second) = at(values.detach() + change), at(values.detach() - change)
        if all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(support, first, second, strict=True)):
            assert float(above - below) / 2e-6 == pytest.approx(float(gradient[index]), rel=1e-5, abs=1e-9)
            compared += 1
    assert compared > len(values) // 2 and gradient.abs().max() > 1e-4


def test_losses_are_in_units_of_the_start():
    rows = rows_of(Recipe(out=4, inputs=16), Target(0.5))
    steps, aim = steps_of(False, False), 0.9 * rows.weight
    found = learned_steps.last(rows, steps).theta.numpy()
    weight, gram, start = rows.weight.numpy(), rows.gram.numpy(), rows.start.numpy()
    errors = [np.trace((weight - theta) @ gram @ (weight - theta).T) for theta in (found, start)]
    assert learned_steps.value(rows, steps, learned_steps.own_error(rows)) == pytest.approx(errors[0] / errors[1])
    distances = [np.square(theta - aim.numpy()).sum() for theta in (found, start)]
    loss = learned_steps.distance_to(rows, aim)
    assert learned_steps.value(rows, steps, loss) == pytest.approx(distances[0] / distances[1])


def test_adam_is_that_of_torch():
    ours, theirs = torch.tensor([1.0, -2.0, 0.3]), torch.tensor([1.0, -2.0, 0.3], requires_grad=True)
    adam, official = learned_steps.Adam([ours]), torch.optim.Adam([theirs], lr=0.1)
    for number in range(12):
        gradient = torch.tensor([1.0, -0.2, 30.0]) * (theirs.detach() - number)
        theirs.grad = gradient.clone()
        adam.update((gradient,), 0.1)
        official.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("length", "lowest"), list(itertools.product(learned_steps.LENGTHS, learned_steps.LOWEST)))
def test_a_cycle_shrinks_a_spectrum_as_much_as_so_many_steps_can(length: int, lowest: float):
    sizes = learned_steps.cycle(length, lowest, 2 * length + 1)
    assert torch.equal(sizes[:length], sizes[length : 2 * length]) and len(sizes) == 2 * length + 1
    assert bool((sizes[:length].diff() > 0).all())
    spectrum = torch.linspace(lowest, 1, 10001, dtype=torch.float64)
    left = (1 - sizes[:length, None] * spectrum).prod(0).abs().max()
    assert float(left) == pytest.approx(1 / math.cosh(length * math.acosh((1 + lowest) / (1 - lowest))), rel=1e-6)


@pytest.mark.parametrize(("momentum", "soft"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_training_ends_no_worse_than_it_began(target: Target, momentum: bool, soft: bool):
    rows, improved = rows_of(Recipe(out=6, inputs=32), target, torch.float32), 0
    loss = learned_steps.own_error(rows)
    for steps in training("cycles", momentum=momentum, soft=soft).cycles(rows, loss)[:12:3]:
        found, least = learned_steps.trained(rows, steps, loss, 10)
        began = learned_steps.value(rows, steps, loss)
        assert least == learned_steps.value(rows, found, loss) <= began
        improved += least < 0.999 * began
        assert [part is None for part in vars(found).values()] == [part is None for part in vars(steps).values()]
    assert improved


def training(begin: str, count: int = 4, momentum: bool = False, soft: bool = False, updates: int = 8) -> Training:
    return Training(count, begin, updates, 2, momentum, soft)


def test_training_that_would_diverge_returns_where_it_began(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learned_steps, "RATE", 60.0)
    rows = rows_of(Recipe(out=6, inputs=32), Target(0.5), torch.float32)
    loss, steps = learned_steps.own_error(rows), Steps(torch.full((8,), 0.5))
    found, least = learned_steps.trained(rows, steps, loss, 10)
    assert least == learned_steps.value(rows, found, loss) <= learned_steps.value(rows, steps, loss) < 1
    wild = Steps(torch.full((8,), 1e30))
    assert learned_steps.trained(rows, wild, loss, 5) == (wild, math.inf)
    assert learned_steps.value(rows, wild, loss) == math.inf


@pytest.mark.parametrize("begin", BEGINNINGS)
def test_learned_steps_beat_as_many_equal_ones(begin: str):
    rows = rows_of(Recipe(out=16, inputs=64, length=64), Target(0.6), torch.float32)
    loss = learned_steps.own_error(rows)
    learned = learned_steps.value(rows, training(begin, 6, updates=15).learn(rows, loss), loss)
    equal = min(learned_steps.value(rows, Steps(torch.full((6,), size)), loss) for size in (0.5, 1.0, 1.5, 2.0))
    assert learned < equal


def test_the_best_of_several_trainings_is_taken():
    rows = rows_of(Recipe(out=16, inputs=64, length=64), Target(0.6), torch.float32)
    loss = learned_steps.own_error(rows)
    one, several = (replace(training("cycles", 6), starts=starts) for starts in (1, 6))
    every = [learned_steps.trained(rows, steps, loss, 8)[1] for steps in several.cycles(rows, loss)[:6]]
    assert learned_steps.value(rows, several.learn(rows, loss), loss) == min(every)
    assert learned_steps.value(rows, one.learn(rows, loss), loss) == every[0]
    begun = [learned_steps.value(rows, steps, loss) for steps in several.cycles(rows, loss)]
    assert begun == sorted(begun)


def test_the_line_search_takes_the_best_step_of_each_iteration():
    rows = rows_of(Recipe(out=6, inputs=32), Target(pattern="2:4"), torch.float32)
    loss, found = (
        learned_steps.own_error(rows),
        training("line_search", 3).line_search(rows, learned_steps.own_error(rows)),
    )
    for t in range(3):
        errors = []
        for size in learned_steps.TRIED:
            sizes = torch.cat([found.sizes[:t], torch.tensor([size])])
            errors.append(learned_steps.value(rows, Steps(sizes), loss))
        assert learned_steps.TRIED[errors.index(min(errors))] == pytest.approx(float(found.sizes[t]))


def test_incremental_training_trains_one_iteration_more_at_a_time(monkeypatch: pytest.MonkeyPatch):
    rows, seen = rows_of(Recipe(out=6, inputs=32), Target(0.5), torch.float32), []
    trained = learned_steps.trained

    def spy(*args):
        found = trained(*args)
        seen.append((args[1].sizes, found[0].sizes))
        return found

    monkeypatch.setattr(learned_steps, "trained", spy)
    found = training("incremental").learn(rows, learned_steps.own_error(rows))
    assert [len(before) for before, _ in seen] == [1, 2, 3, 4] and torch.equal(seen[-1][1], found.sizes)
    for (_, after), (before, _) in itertools.pairwise(seen):
        assert torch.equal(before, torch.cat([after, after[-1:]]))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_the_best_iterates_are_never_worse_than_the_start(target: Target):
    """Steps that are right for some rows and far too long for the others, which have a Gram of their own in effect."""
    rows = rows_of(Recipe(out=8, inputs=32), target)
    steps = Steps(torch.tensor([1.0, 1.0, 40.0, 40.0, 40.0], dtype=torch.float64))
    every = [one for one in learned_steps.iterates(rows, steps) if one.mask is not None]
    errors = torch.stack([ops.inner(one.gradient, one.missing) for one in every])  # [iterates, out]
    found = list(learned_steps.best_iterates(rows, steps))
    for (number, best, error), count in zip(found, range(1, len(every) + 1), strict=True):
        least = errors[:count].sum(1).min() if target.pattern == "layer" else errors[:count].amin(0).sum()
        missing = rows.weight - best.weight
        assert number == count - 1
        assert error == pytest.approx(float(least), rel=1e-12)
        assert error == pytest.approx(float(ops.inner(missing @ rows.gram, missing).sum()), rel=1e-12)
        assert torch.equal(some(best.mask) | (best.weight == 0), torch.ones_like(rows.mask))
        assert int(some(best.mask).sum()) == int(rows.mask.sum())
    assert found[-1][2] < found[0][2] < float(errors[-1].sum())


def test_soft_thresholds_leave_the_pattern_until_the_last_iteration():
    rows = rows_of(Recipe(out=8, inputs=32), Target(0.5))
    numbers_seen = [number for number, _, _ in learned_steps.best_iterates(rows, steps_of(False, True))]
    assert numbers_seen == [0, COUNT]


def test_nothing_to_learn_is_an_error():
    rows = rows_of(Recipe(out=4, inputs=16), Target(0.5))
    with pytest.raises(ValueError, match="must differ from what they aim at"):
        learned_steps.distance_to(rows, rows.start)
