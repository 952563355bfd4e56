"""That the guards guard: each kind of planted violation is caught by the runner's check and by the contract tests."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.case import Case, Finding
from layerwise.checks.layer_cases import grid_of, regridded
from layerwise.checks.promises import CHECKS
from layerwise.checks.settings import TARGETS
from layerwise.compression.verify import broken_promise
from layerwise.contract.layer import Compressed, Layer, LowRank, Method, Target, UnsupportedTarget
from layerwise.contract.method_file import Entry
from layerwise.numerics import low_rank, ops
from layerwise.numerics.patterns import count_kept, kept_counts
from tests.support import factors
from tests.support.typing_helpers import some

ROW, NM, BLOCK, WHOLE = Target(0.5), Target(pattern="2:4"), Target(0.5, "1x16"), Target(0.5, "layer")
GRID, JOINT, DENSE = Target(bits=4, group=16), Target(0.5, bits=4, group=16), Target()
NVFP4, MXFP4 = Target(format="nvfp4"), Target(format="mxfp4")
FACTORS, SUM = Target(rank=0.5), Target(0.5, rank=0.2)
ROUNDED = Target(rank=0.5, factor_bits=4, factor_group=16)


def honest(layer: Layer, target: Target) -> Compressed:
    """Magnitude pruning, rounding to nearest, factors of what that misses: keeps what broken_promise knows."""
    if target.rank:
        rest = None if target.rest.dense else honest(layer, target.rest)
        missing = layer.weight.double() - (0 if rest is None else rest.weight.double())
        return factors.of_best(missing, target, rest)
    result = ops.pruned(layer, layer.weight.abs(), target)
    if target.bits is None:
        return result
    grid, group_of = ops.fit_grid(layer.weight, target), ops.groups_of(layer.weight.shape[1], target.group)
    codes = grid.codes(result.weight, group_of)
    values = grid.values(codes, group_of)
    weight = values if result.mask is None else torch.where(result.mask, values, 0.0)
    return Compressed(weight, result.mask, grid.quantised(codes))


def with_entry(tensor: torch.Tensor, index: tuple[int, ...], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


def flip(result: Compressed, kept: int, dropped: int) -> Compressed:
    """One more entry pruned (dropped=1) and one more kept (kept=1), each the first that there is in row 0."""
    mask = some(result.mask).clone()
    first_kept, first_dropped = int(mask[0].nonzero()[0]), int((~mask[0]).nonzero()[0])
    if dropped:
        mask[0, first_kept] = False
    if kept:
        mask[0, first_dropped] = True
    return replace(result, mask=mask, weight=torch.where(mask, result.weight, 0.0))


def refactored(result: Compressed, **parts: Any) -> Compressed:
    """The result with other factors or another part beside them."""
    return replace(result, low_rank=replace(some(result.low_rank), **parts))


def recoded(result: Compressed, side: str, **parts: object) -> Compressed:
    """The result with other codes or another grid of its factor `side`."""
    return refactored(result, **{side: replace(getattr(result.low_rank, side), **parts)})


def moved(result: Compressed, target: Target) -> Compressed:
    """The counts per row right, but one entry moved into another group: breaks n:m and blocks only."""
    mask = some(result.mask).clone()
    row = mask[0]
    length = target.block or (target.n_of_m or (0, 0))[1]
    first = int(row.nonzero()[0])
    other = next(j for j in range(len(row)) if not row[j] and j // length != first // length)
    mask[0, first], mask[0, other] = False, True
    return replace(result, mask=mask, weight=torch.where(mask, result.weight, 0.0))


def wrong_codes(result: Compressed) -> Compressed:
    """Codes one too high where that is possible: the weight is no longer what they represent."""
    codes = grid_of(result).codes
    return regridded(result, codes=torch.where(codes < 15, codes + 1, codes))


Damage = Callable[[Compressed], Compressed]
# (target, damage, beginning of the sentence)
VIOLATIONS: dict[str, tuple[Target, Damage, str]] = {
    "shape": (ROW, lambda r: replace(r, weight=r.weight[:, 1:]), "promise 1: the weight's shape must be [24, 64]"),
    "dtype": (
        ROW,
        lambda r: replace(r, weight=r.weight.double()),
        "promise 1: the weight's dtype must be torch.float32",
    ),
    "device": (ROW, lambda r: replace(r, weight=r.weight.to("meta")), "promise 1: the weight's device must be cpu"),
    "nan": (
        ROW,
        lambda r: replace(r, weight=with_entry(r.weight, (0, 0), torch.nan)),
        "promise 1: the weight must be finite",
    ),
    "infinite": (
        ROW,
        lambda r: replace(r, weight=with_entry(r.weight, (3, 5), torch.inf)),
        "promise 1: the weight must be fin",
    ),
    "no factors": (FACTORS, lambda r: replace(r, low_rank=None), "promise 2: a target with a rank, and no other, must"),
    "factors that were not asked for": (
        ROW,
        lambda r: replace(r, low_rank=LowRank(torch.zeros(24, 0), torch.zeros(0, 64), r.weight.clone())),
        "promise 2: a target with a rank, and no other, must have low-rank factors. Got some instead",
    ),
    "factors that are no LowRank": (FACTORS, lambda r: replace(r, low_rank=(1, 2)), "promise 1: low_rank must be a"),
    "a rank too high": (
        FACTORS,
        lambda r: refactored(r, left=torch.zeros(24, 9), right=torch.zeros(9, 64)),
        "promise 2: left must be torch.float32 [24, 8] on the weight's device. Got torch.float32 [24, 9] on cpu",
    ),
    "a factor in float64": (
        FACTORS,
        lambda r: refactored(r, right=some(r.low_rank).right.double()),
        "promise 2: right must be",
    ),
    "a factor that is not finite": (
        FACTORS,
        lambda r: refactored(r, left=with_entry(some(r.low_rank).left, (0, 0), torch.nan)),
        "promise 1: left must be finite. Got 1 entries of NaN or Inf instead",
    ),
    "a part that was not asked for": (
        FACTORS,
        lambda r: refactored(r, rest=torch.zeros(24, 64)),
        "promise 2: rank 50% must have no part beside its factors. Got one instead",
    ),
    "no part beside the factors": (SUM, lambda r: refactored(r, rest=None), "promise 2: 50% row rank 20% must have a"),
    "a sparse factor over the budget": (
        FACTORS,
        lambda r: refactored(r, left=torch.zeros(24, 9), right=torch.zeros(9, 64), kept=torch.ones(24, 9).bool()),
        "promise 2: factors of rank 50% must take 12288 bits at most. Got 12888 instead",
    ),
    "a sparse factor that is not zero elsewhere": (
        FACTORS,
        lambda r: refactored(r, kept=torch.zeros(24, 8).bool()),
        "promise 1: left must be zero where kept is False. Got 192 nonzero entries instead",
    ),
    "factors of 16 bits where codes are asked for": (
        ROUNDED,
        lambda r: refactored(r, left_codes=None),
        "promise 2: rank 50% 4b g16 must have the codes of its factor left. Got none instead",
    ),
    "codes of factors that were not asked for": (
        FACTORS,
        lambda r: refactored(r, right_codes=some(honest(layers.build("correlated"), ROUNDED).low_rank).right_codes),
        "promise 2: rank 50% must have no codes of its factor right. Got some instead",
    ),
    "codes of a factor that are no Quantised": (
        ROUNDED,
        lambda r: refactored(r, left_codes=(1, 2)),
        "promise 1: left_codes must be a Quantised. Got tuple instead",
    ),
    "a factor that is not the value of its codes": (
        ROUNDED,
        lambda r: refactored(r, right=with_entry(some(r.low_rank).right, (0, 0), 7.0)),
        "promise 3: of the factor right, scales * (codes - zeros) must equal the weight. Got 1 entries that differ",
    ),
    "codes of a factor beyond their bits": (
        ROUNDED,
        lambda r: recoded(r, "left_codes", codes=some(some(r.low_rank).left_codes).codes + 9),
        "promise 3: of the factor left, codes of 4 bits must lie in [0, 15]. Got 24 instead",
    ),
    "groups of a factor that are no runs": (
        ROUNDED,
        lambda r: recoded(r, "right_codes", group_of=torch.arange(64) // 16),
        "promise 3: the codes of the factor right must have no group_of. Got one instead",
    ),
    "scales of another number of groups": (
        ROUNDED,
        lambda r: recoded(r, "right_codes", scales=some(some(r.low_rank).right_codes).scales[:, 1:].contiguous()),
        "promise 3: of the factor right, scales must be [8, 4]. Got [8, 3] instead",
    ),
    "a quantised factor that is sparse": (
        ROUNDED,
        lambda r: refactored(r, kept=torch.ones(24, 8).bool()),
        "promise 2: a quantised factor must not be sparse. Got kept instead",
    ),
    "places of another shape": (
        FACTORS,
        lambda r: refactored(r, kept=torch.ones(24, 7).bool()),
        "promise 2: kept must",
    ),
    "another weight than the sum": (
        SUM,
        lambda r: replace(r, weight=with_entry(r.weight, (2, 3), 7.0)),
        "promise 2: the weight must be the sum of its parts. Got 1 entries that differ instead",
    ),
    "a part that is not zero where masked": (
        SUM,
        lambda r: low_rank.of_parts(
            some(r.low_rank).left, some(r.low_rank).right, replace(some(r.rest), weight=some(r.rest).weight + 1.0)
        ),
        "promise 1: the weight must be zero where the mask is False. Got 768 nonzero entries instead",
    ),
    "a part with one more": (
        SUM,
        lambda r: low_rank.of_parts(some(r.low_rank).left, some(r.low_rank).right, flip(some(r.rest), 0, 1)),
        "promise 2: the kept entries of 50% row must be exact. Got 1 rows",
    ),
    "no mask": (ROW, lambda r: replace(r, mask=None), "promise 1: a pruned layer must have a mask"),
    "mask of floats": (ROW, lambda r: replace(r, mask=some(r.mask).float()), "promise 1: the mask must be bool"),
    "mask of another shape": (ROW, lambda r: replace(r, mask=some(r.mask)[1:]), "promise 1: the mask must be bool"),
    "not zero where masked": (
        ROW,
        lambda r: replace(r, weight=torch.where(some(r.mask), r.weight, 1e-9)),
        "promise 1: the weight must be zero where the mask is False. Got 768 nonzero entries instead",
    ),
    "a row with one more": (
        ROW,
        lambda r: flip(r, 1, 0),
        "promise 2: the kept entries of 50% row must be exact. Got 1 rows",
    ),
    "a row with one less": (ROW, lambda r: flip(r, 0, 1), "promise 2"),
    "layer with one less": (WHOLE, lambda r: flip(r, 0, 1), "promise 2: the kept entries of 50% layer must be exact"),
    "n:m with one more": (
        NM,
        lambda r: flip(r, 1, 0),
        "promise 2: the kept entries of 2:4 must be exact. Got 1 groups of 2:4",
    ),
    "n:m with one in another group": (NM, lambda r: moved(r, NM), "promise 2: the kept entries of 2:4 must be exact"),
    "part of a block": (BLOCK, lambda r: flip(r, 0, 1), "promise 2: every 1x16 block must be kept or dropped whole"),
    "blocks mixed": (BLOCK, lambda r: moved(r, BLOCK), "promise 2: every 1x16 block must be kept or dropped whole"),
    "a block too few": (
        BLOCK,
        lambda r: replace(r, mask=torch.ones_like(some(r.mask))),
        "promise 2: every row must lose 2 blocks. Got 24 rows that do not instead",
    ),
    "no codes": (GRID, lambda r: replace(r, quantised=None), "promise 3: a quantised layer must have codes"),
    "no zeros": (
        JOINT,
        lambda r: regridded(r, zeros=None),
        "promise 1: zeros must be a torch.Tensor. Got NoneType instead",
    ),
    "parts of a grid that are no Quantised": (
        GRID,
        lambda r: replace(r, quantised=vars(r.quantised)),
        "promise 1: quantised must be a Quantised. Got dict instead",
    ),
    "code too large": (
        GRID,
        lambda r: regridded(r, codes=some(r.quantised).codes + 16),
        "promise 3: codes of 4 bits must lie in [0, 15]",
    ),
    "code below zero": (GRID, lambda r: regridded(r, codes=some(r.quantised).codes.int() - 16), "promise 3: codes"),
    "scale that nvfp4 lacks": (
        NVFP4,
        lambda r: regridded(r, scales=with_entry(some(r.quantised).scales, (0, 0), 300.0)),
        "promise 3: scales must be numbers that nvfp4 has. Got 1 others instead",
    ),
    "scale that is no power of two": (
        MXFP4,
        lambda r: regridded(r, scales=1.5 * some(r.quantised).scales),
        "promise 3: scales must be numbers that mxfp4 has. Got 48 others instead",
    ),
    "nvfp4 without a divisor": (NVFP4, lambda r: regridded(r, divisor=None), "promise 3: scales of nvfp4"),
    "mxfp4 with a divisor": (MXFP4, lambda r: regridded(r, divisor=torch.ones(1)), "promise 3: scales of nvfp4"),
    "divisor of zero": (NVFP4, lambda r: regridded(r, divisor=torch.zeros(1)), "promise 3: the divisor must be"),
    "zeros of a format": (
        NVFP4,
        lambda r: regridded(r, zeros=some(r.quantised).zeros + 8),
        "promise 3: zeros must be 0",
    ),
    "levels of a format": (NVFP4, lambda r: regridded(r, levels=torch.ones(16)), "promise 3: the levels of nvfp4"),
    "levels of another count": (
        GRID,
        lambda r: regridded(r, levels=torch.ones(8), zeros=0 * some(r.quantised).zeros),
        "promise 3: levels must be torch.float32 [16]",
    ),
    "codes of other weights": (GRID, wrong_codes, "promise 3: scales * (codes - zeros) must equal the weight"),
    "weights off the grid": (
        JOINT,
        lambda r: replace(r, weight=r.weight * 1.001),
        "promise 3: scales * (codes - zeros)",
    ),
    "scales of another shape": (GRID, lambda r: regridded(r, scales=some(r.quantised).scales[:, :1]), "promise 3"),
    "a scale of zero": (
        GRID,
        lambda r: regridded(r, scales=with_entry(some(r.quantised).scales, (0, 0), 0.0)),
        "promise 3: scales must be positive and finite",
    ),
    "a zero between two codes": (
        GRID,
        lambda r: regridded(r, zeros=with_entry(some(r.quantised).zeros, (2, 1), 7.5)),
        "promise 3: zeros must be whole numbers in [0, 15]. Got 1 others instead",
    ),
    "a zero beyond the codes": (
        GRID,
        lambda r: regridded(r, zeros=with_entry(some(r.quantised).zeros, (2, 1), 16.0)),
        "promise 3: zeros must be whole numbers in [0, 15]. Got 1 others instead",
    ),
    "zeros of a symmetric grid": (
        Target(bits=4, group=16, symmetric=True),
        lambda r: regridded(r, zeros=some(r.quantised).zeros - 1),
        "promise 3: zeros must be 8. Got 96 others instead",
    ),
    "an input scale of zero": (
        GRID,
        lambda r: regridded(r, input_scale=with_entry(torch.ones(64), (5,), 0.0)),
        "promise 3: input_scale must be positive and finite",
    ),
    "group_of of another shape": (
        GRID,
        lambda r: regridded(r, group_of=torch.zeros(3, dtype=torch.int64)),
        "promise 3",
    ),
    "input_scale of another shape": (
        GRID,
        lambda r: regridded(r, input_scale=torch.ones(3)),
        "promise 3: input_scale must be [64]. Got [3] instead",
    ),
    "input_scale of other weights": (
        GRID,
        lambda r: regridded(r, input_scale=torch.full((64,), 2.0)),
        "promise 3: scales * (codes - zeros) / input_scale must equal the weight",
    ),
    "changed at sparsity 0": (
        DENSE,
        lambda r: replace(r, weight=with_entry(r.weight, (0, 0), 1.0)),
        "promise 7: sparsity 0 without bits must return the weight unchanged",
    ),
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", layers.LAYERS)
def test_an_honest_result_breaks_no_promise(name: str, target: Target):
    layer = layers.build(name)
    assert broken_promise(layer, target, honest(layer, target)) is None


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_the_runner_names_the_broken_promise(violation: str):
    target, damage, sentence = VIOLATIONS[violation]
    layer = layers.build("correlated")
    said = broken_promise(layer, target, damage(honest(layer, target)))
    assert said is not None, "the violation was not seen"
    assert said.startswith(sentence)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.7])
def test_the_counts_asked_for_are_those_of_the_masks(share: float):
    """Also where share * out * in, multiplied in another order, rounds to the other side of a whole number."""
    for shape in ((24, 50), (7, 10), (3, 30)):
        for target in (Target(share), Target(share, "layer")):
            mask = ops.prune_mask(torch.rand(shape), target)
            assert torch.equal(count_kept(mask, target), kept_counts(mask.shape, target))


@dataclass(frozen=True)
class Faulty(Method):
    """An adapter that keeps every promise but what `fault` breaks."""

    fault: Callable[[Layer, Target, torch.Generator], Compressed] = lambda layer, target, rng: honest(layer, target)

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        return self.fault(layer, target, rng)

    compress = solve  # asked at the dense target too, which the base class keeps from an adapter


def changes_its_input(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    result = honest(layer, target)
    layer.weight.mul_(some(result.mask))
    return result


def changes_the_gram(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    layer.gram.matrix.diagonal().add_(0.01)
    return honest(layer, target)


def returns_a_view(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return Compressed(layer.weight)


def global_random(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return ops.pruned(layer, torch.rand(layer.weight.shape), target)


def seeds_globally(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    torch.manual_seed(0)
    return ops.pruned(layer, torch.rand(layer.weight.shape), target)


def absolute_threshold(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return ops.pruned(layer, layer.weight.abs() + 0.05 * (layer.gram.diagonal > 1), target)


def looks_at_other_rows(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return ops.pruned(layer, (layer.weight + 0.5 * layer.weight.roll(1, 0)).abs(), target)


def last_index_first(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    flipped = replace(layer, weight=layer.weight.flip(1))
    return ops.masked(layer, ops.prune_mask(flipped.weight.abs(), target).flip(1), target)


def fails_on_dead_inputs(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return replace(
        honest(layer, target), weight=honest(layer, target).weight / layer.gram.diagonal * layer.gram.diagonal
    )


def one_entry_more(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return flip(honest(layer, target), 0, 1)


def unsupported_word(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    raise UnsupportedTarget("no")


def worst_weights(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return ops.pruned(layer, -layer.weight.abs(), target)


def too_good_to_be_true(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return replace(honest(layer, target), weight=layer.weight.clone())


def climbs(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return replace(honest(layer, target), trace=((0, 0.0, 1.0), (1, 0.1, 0.5), (2, 0.2, 0.6)))


def untrue_trace(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return replace(honest(layer, target), trace=((1, 0.0, float("nan")),))


def off_grid(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return wrong_codes(honest(layer, target))


def other_input_scale(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return regridded(honest(layer, target), input_scale=torch.full_like(layer.weight[0], 2.0))


def turned(layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    return Compressed(-layer.weight)


FAULTS = [
    ("1 inputs untouched", ROW, changes_its_input),
    ("1 inputs untouched", ROW, changes_the_gram),
    ("1 inputs untouched", GRID, returns_a_view),
    ("1 tensors", ROW, too_good_to_be_true),
    ("2 pattern", ROW, one_entry_more),
    ("2 pattern", WHOLE, one_entry_more),
    ("2 pattern", NM, one_entry_more),
    ("2 pattern", BLOCK, one_entry_more),
    ("2 ties", ROW, last_index_first),
    ("3 grid", GRID, off_grid),
    ("3 grid", GRID, other_input_scale),
    ("4 deterministic", ROW, global_random),
    ("4 deterministic", ROW, seeds_globally),
    ("5 scale", ROW, absolute_threshold),
    ("5 rows permute", ROW, looks_at_other_rows),
    ("6 hard layers", ROW, fails_on_dead_inputs),
    ("7 unchanged", DENSE, turned),
    ("8 refused", JOINT, unsupported_word),
    ("8 refused", JOINT, changes_the_gram),
    ("9 no worse than the baseline", ROW, worst_weights),
    ("1 tensors", FACTORS, too_good_to_be_true),
    ("1 tensors", SUM, too_good_to_be_true),
    ("9 best of a rank", FACTORS, too_good_to_be_true),
    ("9 brute force", ROW, too_good_to_be_true),
    ("9 brute force", ROW, worst_weights),
    ("9 descent", ROW, climbs),
    ("10 the runner's own", ROW, untrue_trace),
]


def case_of(fault: Callable, target: Target) -> Case:
    card = {
        "patterns": ["row", "layer", "n:m", "1xb"],
        "bits": [],
        "updates_weights": False,
        "needs": ["gram"],
        "parameters": {},
    }
    return Case(Entry("faulty", Path("faulty.py"), "Faulty", card), Faulty(fault), target, {})


@pytest.mark.parametrize(
    ("check", "target", "fault"), FAULTS, ids=[f"{c}-{f.__name__}-{t.label}" for c, t, f in FAULTS]
)
def test_the_contract_tests_catch_a_faulty_method(check: str, target: Target, fault: Callable):
    with pytest.raises(Finding):
        CHECKS[check](case_of(fault, target))


def test_every_check_has_a_fault_that_it_catches():
    assert {check for check, _, _ in FAULTS} == set(CHECKS)
