"""Masks and grids against the same written plainly."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.settings import TARGETS
from layerwise.contract.layer import Target
from layerwise.numerics import ops

PRUNING = [target for target in TARGETS if target.sparsity and not target.bits] + [
    Target(pattern="1:3"),
    Target(0.4, "1x7"),
]
GRIDS = [
    Target(bits=bits, group=group, symmetric=sym)
    for bits in (2, 4, 8)
    for group in (None, 16, 24)
    for sym in (False, True)
]


def smallest(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` smallest, of equal ones the first."""
    return sorted(range(len(scores)), key=lambda index: (scores[index], index))[:count]


def plain_mask(score: np.ndarray, target: Target) -> np.ndarray:
    out, inputs = score.shape
    mask = np.ones(score.shape, bool)
    if target.pattern == "layer":
        mask.reshape(-1)[smallest(score.reshape(-1).tolist(), int(target.sparsity * score.size))] = False
        return mask
    for i in range(out):
        row = score[i].tolist()
        if target.n_of_m:
            kept, of = target.n_of_m
            for start in range(0, inputs, of):
                group = row[start : start + of]
                mask[i, [start + j for j in smallest(group, max(len(group) - kept, 0))]] = False
        elif target.block:
            starts = range(0, inputs, target.block)
            sums = [sum(row[start : start + target.block]) for start in starts]
            for block in smallest(sums, int(target.sparsity * len(sums))):
                mask[i, starts[block] : starts[block] + target.block] = False
        else:
            mask[i, smallest(row, int(target.sparsity * inputs))] = False
    return mask


@pytest.mark.parametrize("target", PRUNING, ids=lambda target: target.label)
@pytest.mark.parametrize("inputs", [1, 3, 7, 16, 50])
@pytest.mark.parametrize("tied", [False, True])
def test_prune_mask(target: Target, inputs: int, tied: bool):
    generator = torch.Generator().manual_seed(inputs)
    score = torch.randint(0, 1000, (5, inputs), generator=generator).float()  # sums of integers are exact
    if tied:
        score = score % 3
    assert np.array_equal(ops.prune_mask(score, target).numpy(), plain_mask(score.numpy(), target))


def test_prune_mask_keeps_everything_at_sparsity_0():
    assert ops.prune_mask(torch.zeros(3, 4), Target()).all()


def test_official_layer_mask_prunes_one_more_and_ties():
    score = torch.arange(20.0).reshape(4, 5)
    assert int((~ops.official_layer_mask(score, 0.5)).sum()) == 11
    assert int((~ops.official_layer_mask(score // 4, 0.5)).sum()) == 12  # the threshold is 2, and 8 to 11 are


@pytest.mark.parametrize("target", GRIDS, ids=lambda target: target.label)
def test_min_max_grid(target: Target):
    weight = layers.build("bfloat16 weights").weight[:, :40]
    grid, group_of = ops.fit_grid(weight, target), ops.groups_of(40, target.group)
    codes = grid.codes(weight, group_of)
    length, steps = target.group or 40, np.float32(2 ** (target.bits or 0) - 1)
    for i, row in enumerate(weight.numpy()):
        for group, start in enumerate(range(0, 40, length)):
            piece = row[start : start + length]
            low, high = min(piece.min(), np.float32(0)), max(piece.max(), np.float32(0))
            if target.symmetric:
                high = max(abs(low), high)
                low = -high if low < 0 else low
            scale = (high - low) / steps
            zero = (steps + 1) / 2 if target.symmetric else np.rint(-low / scale)
            assert grid.scales[i, group] == scale and grid.zeros[i, group] == zero
            expected = np.clip(np.rint(piece / scale) + zero, 0, steps)
            assert np.array_equal(codes[i, start : start + length].numpy(), expected.astype(np.uint8))
    values = grid.values(codes, group_of)
    half = grid.scales[:, group_of] / 2
    if not target.symmetric:  # the range is covered: nothing moves by more than half a step (a whole one at its ends)
        assert ((values - weight).abs() <= 2.001 * half).all()
    # zero stays zero, so that pruned weights survive quantisation
    zero_codes = grid.codes(torch.zeros_like(weight), group_of)
    assert not grid.values(zero_codes, group_of).any()


def test_values_on_the_grid_stay():
    weight = layers.build("correlated").weight
    target = Target(bits=4, group=16)
    grid, group_of = ops.fit_grid(weight, target), ops.groups_of(64, 16)
    values = grid.values(grid.codes(weight, group_of), group_of)
    assert torch.equal(grid.values(grid.codes(values, group_of), group_of), values)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_grid_is_no_worse(group: int | None, symmetric: bool):
    weight = layers.build("correlated").weight
    target, group_of = Target(bits=3, group=group, symmetric=symmetric), ops.groups_of(64, group)
    errors = []
    for mse in (False, True):
        grid = ops.fit_grid(weight, target, mse)
        errors.append(((grid.values(grid.codes(weight, group_of), group_of) - weight).abs() ** 2.4).sum())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_mse_grid_is_free_of_scale(exponent: int):
    weight = layers.build("correlated").weight
    first, second = (ops.fit_grid(scale * weight, Target(bits=3, group=16), True) for scale in (1.0, 2.0**exponent))
    assert torch.equal(second.zeros, first.zeros)
    assert torch.equal(second.scales, 2.0**exponent * first.scales)


@pytest.mark.parametrize("value", [0.0, 1e-12, -1e-12, 1e-44, 3.0, -3.0, 1e30])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mse", [False, True])
def test_a_grid_of_equal_weights_is_finite(value: float, symmetric: bool, mse: bool):
    weight = torch.full((2, 5), value)
    grid, group_of = ops.fit_grid(weight, Target(bits=3, symmetric=symmetric), mse), ops.groups_of(5, None)
    values = grid.values(grid.codes(weight, group_of), group_of)
    assert torch.isfinite(values).all() and (grid.scales > 0).all()
    # A symmetric grid reaches 2^(b - 1) - 1 steps up; rows without negatives get a finer step than that serves, as in
    # the official code, and are clipped.
    if abs(value) > 1e-40 and not symmetric:
        torch.testing.assert_close(values, weight, rtol=1e-6, atol=0)


def test_groups_of():
    assert ops.groups_of(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert ops.groups_of(3, None).tolist() == [0, 0, 0]
    assert ops.groups_of(3, 128).tolist() == [0, 0, 0]
