"""Every method on layers that numbers can go wrong on: what comes back is finite, true, and no nonsense."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.checks import layer_cases as layers
from layerwise.checks.case import Case
from layerwise.checks.layer_cases import Recipe
from layerwise.compression.score import output_error
from layerwise.compression.solver import Solver
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Gram, Layer, Statistics, Target
from layerwise.contract.method_file import Entry
from layerwise.numerics import ops
from tests.support.typing_helpers import some

SMALL = Recipe(out=8, inputs=32, sequences=4)
TARGETS = [
    Target(0.5),
    Target(0.5, "layer"),
    Target(pattern="2:4"),
    Target(0.5, "1x16"),
    Target(bits=4, group=16),
    Target(bits=3, symmetric=True),
    Target(0.5, bits=4, group=16),
]
FEWER = {"frank_wolfe": [{"iterations": 30}, {"iterations": 5, "step": "pairwise", "keep": 0.5}]}  # steps
MORE = {"chain": [{"chain": ["sparsegpt", "gptq"]}, {"chain": ["wanda", "awq"]}, {"chain": ["rtn", "wanda"]}]}


# -------------------------------------------------------------------------------------------------------------- layers


def seen(inputs: Tensor, weight: Tensor | None = None) -> Layer:
    """A layer with these inputs [tokens, in]."""
    base, rows = layers.make(SMALL, "layer"), inputs.double()
    sequences = rows.unflatten(0, (-1, 32))
    statistics = Statistics(
        32,
        rows.mean(0).float(),
        rows.abs().mean(0).float(),
        sequences.var(1, correction=0).mean(0).float(),
        rows.float(),
    )
    gram = Gram((rows.T @ rows / len(rows)).float(), len(rows))
    return replace(base, weight=base.weight if weight is None else weight, gram=gram, statistics=statistics)


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    mixing = torch.eye(32) + torch.randn(32, 32, generator=generator) / 3
    return torch.randn(128, 32, generator=generator) @ mixing


def weight() -> Tensor:
    return layers.make(SMALL).weight


def spectrum(change: Callable[[Tensor], Tensor], rank: int = 12) -> Layer:
    """A Gram of some rank with other eigenvalues [in], in ascending order."""
    few = inputs()[:rank].double()
    values, vectors = torch.linalg.eigh(few.T @ few / rank)
    return replace(seen(inputs()), gram=Gram(((vectors * change(values)) @ vectors.T).float(), rank))


def below_zero(values: Tensor) -> Tensor:
    """Eigenvalues that should be zero, as rounding to float32 leaves them."""
    return torch.where(values < 1e-9 * values.max(), -3e-8 * values.max(), values)


def scaled(gram: float, by: float) -> Layer:
    layer = seen(inputs())
    root, own = math.sqrt(gram), layer.statistics
    statistics = Statistics(
        32, some(own).mean * root, some(own).absmean * root, some(own).sequence_variance * gram, some(own).sample * root
    )
    matrix = (layer.gram.matrix.double() * gram).float()
    return replace(layer, weight=(layer.weight.double() * by).float(), gram=Gram(matrix, 128), statistics=statistics)


def with_entry(tensor: Tensor, at: Any, value: Any) -> Tensor:
    changed = tensor.clone()
    changed[at] = value
    return changed


ADVERSARIAL: dict[str, Callable[[], Layer]] = {
    "ordinary": lambda: seen(inputs()),
    "singular": lambda: spectrum(lambda values: values.clamp(min=0)),
    "indefinite by rounding": lambda: spectrum(below_zero),
    "rank one": lambda: seen(inputs()[:, :1] * inputs()[:1]),
    "constant inputs": lambda: seen(torch.ones(128, 32)),
    "duplicate inputs": lambda: seen(inputs()[:, torch.arange(32) // 2]),
    "half of the inputs dead": lambda: seen(with_entry(inputs(), (slice(None), slice(0, 16)), 0.0)),
    "all inputs dead": lambda: seen(torch.zeros(128, 32)),
    "an outlier of 1e6": lambda: seen(inputs() * with_entry(torch.ones(32), 5, 1e6)),
    "inputs of 1e-15 to 1e15": lambda: seen(inputs() * torch.logspace(-15, 15, 32)),
    "denormal inputs": lambda: seen(inputs() * 1e-21),
    "G of 1e-12": lambda: scaled(1e-12, 1.0),
    "G of 1e12": lambda: scaled(1e12, 1.0),
    "W of 1e-30": lambda: scaled(1.0, 1e-30),
    "W of 1e30": lambda: scaled(1.0, 1e30),
    "both of 1e-12": lambda: scaled(1e-12, 1e-12),
    "both of 1e12": lambda: scaled(1e12, 1e12),
    "rows of 1e-30 to 1e30": lambda: seen(inputs(), weight() * torch.logspace(-30, 30, 8)[:, None]),
    "constant rows": lambda: seen(inputs(), torch.tensor([0.05, -0.05] * 4)[:, None].expand(8, 32).contiguous()),
    "a row of zeros": lambda: seen(inputs(), with_entry(weight(), 3, 0.0)),
    "zero weights": lambda: seen(inputs(), torch.zeros(8, 32)),
    "a weight of 1e30": lambda: seen(inputs(), with_entry(weight(), (2, 7), 1e30)),
    "denormal weights": lambda: seen(inputs(), (weight().double() * 1e-41).float()),
    "one row": lambda: seen(inputs(), weight()[:1].clone()),
    "one weight": lambda: seen(inputs()[:, :1], weight()[:1, :1].clone()),
}
# What float16 and bfloat16 scales cannot follow, in which all grids are stored.
COARSE = {"denormal weights"}
# Relative importance, the mean activation; a rotation spreads a weight that rounding would have met exactly.
OTHER_MEASURE = {"ria", "dsnot", "rotated", "turboquant"}


def cases() -> Iterator[tuple[Entry, dict[str, Any], Target]]:
    catalogue = Catalogue()
    for name, entry in catalogue.items():
        for params in [*FEWER.get(name, [{}]), *MORE.get(name, [])]:
            method = catalogue.build(name, catalogue.complete(name, params, "the test"))
            for target in TARGETS:
                if not Case(entry, method, target, params).refusal:
                    yield entry, params, target


def solver(entry: Entry, params: dict[str, Any], target: Target) -> Solver:
    catalogue = Catalogue()
    method = catalogue.build(entry.name, catalogue.complete(entry.name, params, "the test"))
    mask_only = entry.comparison(target) == "mask-only"
    return Solver(entry.name, method, target, 0, mask_only=mask_only, criterion=entry.criterion)


def plain(layer: Layer, target: Target) -> Tensor:
    """The smallest weights pruned, what is left rounded to nearest."""
    mask = ops.prune_mask(layer.weight.abs(), target)
    kept = torch.where(mask, layer.weight, 0.0)
    return kept if target.bits is None else torch.where(mask, ops.fit_and_round(kept, target)[2], 0.0)


@pytest.mark.parametrize(
    ("entry", "params", "target"),
    [
        pytest.param(*case, id=f"{case[0].name}-{case[2].label}-{'-'.join(map(str, case[1].values()))}")
        for case in cases()
    ],
)
def test_no_layer_makes_a_method_stumble(entry: Entry, params: dict[str, Any], target: Target):
    """The runner has nothing to complain of: promises, true traces, finite errors; and no method is much worse than
    magnitude and rounding to nearest."""
    solving = solver(entry, params, target)
    for name, build in ADVERSARIAL.items():
        layer = build()
        if target.bits and name in COARSE:
            continue
        result, row = solving.solve(layer)
        numbers = [row["output_error"], row["absolute_error"], row["bits_per_weight"], row["damping"] or 0.0]
        assert all(map(math.isfinite, numbers)), (name, row)
        assert all(math.isfinite(point[2]) for point in result.trace), name
        if not entry.control:
            worst = output_error(layer, plain(layer, target))[1]
            # Grids are stored in 16 bits; what chooses weights by another measure may lose more, but not all.
            limit = 1.0 if entry.name in OTHER_MEASURE else 3 * worst + 1e-5
            assert row["output_error"] <= limit, (name, row["output_error"], worst)


SCALES = [(2.0**100, 1.0), (1.0, 2.0**-60), (2.0**60, 2.0**60), (2.0**-60, 2.0**-60)]


@pytest.mark.parametrize("target", [target for target in TARGETS if target.sparsity], ids=lambda target: target.label)
def test_masks_know_no_unit(target: Target):
    """Exactly where the factor is a power of two; with any other a near-tie may turn."""
    for entry, params, own in cases():
        if own != target:
            continue
        method, rng = solver(entry, params, target).method, torch.Generator()
        mask = method.compress(scaled(1.0, 1.0), target, rng.manual_seed(0)).mask
        for gram, by in SCALES:
            came = method.compress(scaled(gram, by), target, rng.manual_seed(0)).mask
            assert torch.equal(some(came), some(mask)), (entry.name, gram, by)
        for gram, by in ((1e-12, 1.0), (1e12, 1e-12)):
            came = method.compress(scaled(gram, by), target, rng.manual_seed(0)).mask
            assert int((came != mask).sum()) <= 2, (entry.name, gram, by)


# ------------------------------------------------------------------------------------------------------------- damping

FACTORISE = ["sparsegpt", "gptq", "gqsa", "reconstruct"]
TINY = 1e-10  # damping, below the rounding of float32


@pytest.mark.parametrize("name", FACTORISE)
def test_the_damping_that_was_needed_is_in_the_row(name: str):
    entry = Catalogue()[name]
    target = next(target for target in TARGETS if not entry.refusal(target))
    _, asked = solver(entry, {}, target).solve(seen(inputs()))
    method: Any = solver(entry, {}, target).method  # a class of the adapter's file
    assert asked["damping"] == method.damping
    _, row = solver(entry, {"damping": TINY}, target).solve(spectrum(below_zero))
    assert row["damping"] >= 10 * TINY
    assert math.log10(row["damping"] / TINY) == pytest.approx(round(math.log10(row["damping"] / TINY)))


@pytest.mark.parametrize(
    ("name", "params", "target"),
    [
        ("dsnot", {"warm_start": {"sparsegpt": {"damping": TINY}}}, Target(0.5)),
        ("sparse_swaps", {"warm_start": {"sparsegpt": {"damping": TINY}}}, Target(0.5)),
        ("frank_wolfe", {"warm_start": {"sparsegpt": {"damping": TINY}}, "iterations": 5}, Target(0.5)),
        ("awp", {"warm_start": {"sparsegpt": {"damping": TINY}}}, Target(0.5)),
        ("awp", {"warm_start": {"sparsegpt": {"damping": TINY}}, "iterations": 1}, Target(0.5, bits=4, group=16)),
        ("chain", {"chain": [{"sparsegpt": {"damping": TINY}}, "rtn"]}, Target(0.5, bits=4)),
        ("chain", {"chain": ["sparsegpt", {"gptq": {"damping": TINY}}]}, Target(0.5, bits=4)),
    ],
)
def test_the_damping_of_a_warm_start_or_a_step_is_in_the_row(name: str, params: dict[str, Any], target: Target):
    _, row = solver(Catalogue()[name], params, target).solve(spectrum(below_zero))
    assert row["damping"] is not None and row["damping"] >= 10 * TINY
    if params.get("chain", [""])[0] == "sparsegpt":
        assert row["damping"] == 0.01  # the larger of the two


def test_a_gram_that_no_damping_helps_is_named():
    with pytest.raises(ValueError, match=r"Gram.factor found no damping up to 100"):
        Gram(with_entry(torch.eye(4), (1, 1), torch.nan), 10).factor(0.01)
