"""Unfolded IHT: as good as AWP in far more iterations, exact counts on hard layers, steps of the drawn rows alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import output_error
from layerwise.checks.layer_cases import Recipe
from layerwise.contract.layer import Compressed, Gram, Layer, Target
from layerwise.methods.alps import ALPS
from layerwise.methods.awp import AWP
from layerwise.methods.magnitude import Magnitude
from layerwise.methods.unfolded import Unfolded
from layerwise.methods.wanda import Wanda
from layerwise.numerics import learned_steps
from layerwise.numerics.ops import prune_mask
from tests.support.typing_helpers import mask_of

TARGETS = [Target(0.6), Target(0.6, "layer"), Target(pattern="2:4"), Target(0.5, "1x4")]
FORMS: list[dict[str, Any]] = [
    {},
    {"momentum": "learned"},
    {"threshold": "soft"},
    {"begin": "line_search"},
    {"begin": "incremental"},
    {"toward": ALPS()},
]
BRIEFLY = {"iterations": 4, "updates": 4, "starts": 1}


def falling(out: int = 48, inputs: int = 96) -> Layer:
    """A layer whose k-th direction has variance 1 / k, as in language models the spectrum falls by a power."""
    rng = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(inputs, inputs, generator=rng))[0]
    x = torch.randn(1024, inputs, generator=rng) * torch.arange(1, inputs + 1) ** -0.5 @ turned
    return Layer("falling", torch.randn(out, inputs, generator=rng), Gram.from_inputs(x))


def solved(layer: Layer, target: Target, seed: int = 0, **parameters: Any) -> Compressed:
    given: dict[str, Any] = {"warm_start": Wanda()} | parameters
    method = Unfolded(**given)
    return method.compress(layer, target, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_twelve_learned_steps_reach_two_hundred_of_awp(target: Target):
    layer = falling()
    plain = output_error(layer, AWP(Wanda()).compress(layer, target, torch.Generator()).weight)
    result = solved(layer, target)
    assert output_error(layer, result.weight) <= plain
    assert [iteration for iteration, _, _ in result.trace] == list(range(13)) and len(
        result.info["learned"]["steps"]
    ) == 12


@pytest.mark.parametrize("target", [Target(0.6), Target(pattern="2:4")], ids=lambda target: target.label)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_far_better_than_its_warm_start(form: dict[str, Any], target: Target):
    layer = falling()
    start = output_error(layer, Wanda().compress(layer, target, torch.Generator()).weight)
    assert output_error(layer, solved(layer, target, **form).weight) < 0.6 * start


def kept_zeros() -> Layer:
    """Rows with fewer weights that are not zero than are kept, one of them all zero."""
    layer = layers.make(Recipe(out=8, inputs=32))
    alive = torch.arange(32) < 4 * torch.arange(8)[:, None]
    return replace(layer, weight=torch.where(alive, layer.weight, 0.0))


def tiny_rows() -> Layer:
    """Each row 1e-5 of the one before it, the last ones too small for squares in float32."""
    layer = layers.make(Recipe(out=8, inputs=32))
    return replace(layer, weight=layer.weight * 10.0 ** (-5 * torch.arange(8.0)[:, None]))


HARD = {
    "kept zeros": kept_zeros,
    "dead inputs": lambda: layers.make(Recipe(out=8, inputs=32, dead=(0, 5, 6, 7, 31))),
    "rank-deficient": lambda: layers.make(Recipe(out=8, inputs=32, sequences=1, length=9)),
    "one row": lambda: layers.make(Recipe(out=1, inputs=32)),
    "tiny rows": tiny_rows,
}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", HARD)
def test_counts_are_exact_and_no_row_is_worse_than_in_the_warm_start(name: str, target: Target, form: dict[str, Any]):
    if target.block and "toward" in form:
        form = {"toward": Wanda(), "warm_start": Magnitude()}  # ALPS has no blocks
    layer = HARD[name]()
    start = form.get("warm_start", Wanda()).compress(layer, target, torch.Generator())
    result = solved(layer, target, **BRIEFLY | form)
    mask = mask_of(result)
    assert torch.isfinite(result.weight).all() and not result.weight[~mask].any()
    assert same_counts(mask, mask_of(start), target)
    before, after = (row_errors(layer, weight) for weight in (start.weight, result.weight))
    if target.pattern == "layer":
        before, after = before.sum(), after.sum()
    assert bool((after <= before * (1 + 1e-5) + 1e-12 * before.max()).all())


def row_errors(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    lost = (layer.weight - weight).double()
    return ((lost @ layer.gram.matrix.double()) * lost).sum(1)


def same_counts(mask: torch.Tensor, other: torch.Tensor, target: Target) -> bool:
    if target.pattern == "layer":
        return int(mask.sum()) == int(other.sum())
    groups = (-1, target.n_of_m[1]) if target.n_of_m else mask.shape
    return torch.equal(mask.reshape(groups).sum(1), other.reshape(groups).sum(1))


def test_the_same_seed_gives_the_same_steps_and_another_one_others():
    layer = falling()
    first, again, other = (solved(layer, Target(0.6), seed, rows=8, **BRIEFLY) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight) and first.info == again.info
    assert first.info["learned"]["steps"] != other.info["learned"]["steps"]


def test_steps_depend_on_the_drawn_rows_alone():
    """Of eight rows seven are drawn; the other one may be anything, and each of the seven matters."""
    layer, form = falling(out=8), {"rows": 7, **BRIEFLY}
    steps, same = solved(layer, Target(0.6), **form).info["learned"]["steps"], 0
    for row in range(8):
        weight = layer.weight.clone()
        weight[row] = weight[row].flip(0)
        same += solved(replace(layer, weight=weight), Target(0.6), **form).info["learned"]["steps"] == steps
    assert same == 1


def test_steps_are_in_units_of_the_largest_eigenvalue():
    layer = falling()
    scaled = replace(layer, gram=Gram(64 * layer.gram.matrix, layer.gram.tokens), weight=layer.weight / 8)
    assert solved(layer, Target(0.6), **BRIEFLY).info == solved(scaled, Target(0.6), **BRIEFLY).info
    one = Unfolded(Wanda(), iterations=1, updates=0, starts=1).compress(layer, Target(0.6), torch.Generator())
    start = Wanda().compress(layer, Target(0.6), torch.Generator()).weight
    moved = (
        start
        + one.info["learned"]["steps"][0] / layer.gram.largest_eigenvalue * (layer.weight - start) @ layer.gram.matrix
    )
    expected = torch.where(prune_mask(moved.abs(), Target(0.6)), moved, 0.0)
    rows = row_errors(layer, expected) < row_errors(layer, start)
    assert rows.sum() > 40
    torch.testing.assert_close(one.weight[rows], expected[rows], rtol=1e-5, atol=1e-6)


def test_steps_toward_other_weights_lead_to_them(monkeypatch: pytest.MonkeyPatch):
    """The aim is what the other method gives of the drawn rows alone, in units of the layer's weight."""
    layer, target, aims = falling(), Target(0.6), []
    distance_to = learned_steps.distance_to

    def spy(rows: learned_steps.Rows, aim: torch.Tensor) -> learned_steps.Loss:
        aims.append((rows, aim))
        return distance_to(rows, aim)

    monkeypatch.setattr(learned_steps, "distance_to", spy)
    supervised, own = (solved(layer, target, rows=16, toward=toward) for toward in (ALPS(), None))
    assert supervised.info["learned"]["steps"] != own.info["learned"]["steps"]
    ((rows, aim),) = aims
    chosen = (layer.weight @ rows.weight.T).argmax(0)
    unit = float(layer.weight[chosen[0], 0] / rows.weight[0, 0])
    whole = ALPS().compress(layer, target, torch.Generator()).weight
    part = ALPS().compress(replace(layer, weight=layer.weight[chosen]), target, torch.Generator()).weight
    torch.testing.assert_close(unit * aim, part, rtol=1e-6, atol=1e-7)
    start = Wanda().compress(layer, target, torch.Generator()).weight
    assert (supervised.weight - whole).norm() < 0.9 * (start - whole).norm()


def test_a_start_that_is_where_the_steps_lead_is_returned():
    layer, target = falling(), Target(0.6)
    result, start = solved(layer, target, toward=Wanda()), Wanda().compress(layer, target, torch.Generator())
    assert torch.equal(result.weight, start.weight) and result.info["learned"]["steps"] == [] and len(result.trace) == 1
    sparse = torch.where(prune_mask(layer.weight.abs(), target), layer.weight, 0.0)
    alone = solved(replace(layer, weight=sparse, gram=Gram(torch.eye(96), 1000)), target)
    assert torch.equal(alone.weight, sparse) and alone.trace[0][2] == 0
