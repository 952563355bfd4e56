"""Bits per weight, each by hand: kept values, mask, scales and zeros of a layer [rows, inputs]."""

from __future__ import annotations

import pytest

from layerwise.contract.target import Target
from layerwise.storage.bits_per_weight import bits_per_weight

INPUTS = 256
CASES = {
    # target: (share kept, bits of kept values + mask + grid)
    "dense": (Target(), 1.0, 16),
    "50% row": (Target(0.5), 0.5, 8 + 1),
    "60% row": (Target(0.6), 103 / INPUTS, 16 * 103 / INPUTS + 1),  # floor(153.6) go
    "50% layer": (Target(0.5, "layer"), 0.5, 8 + 1),
    "2:4": (Target(pattern="2:4"), 0.5, 8 + 2 * 2 / 4),  # two kept of four, each with 2 bits of position
    "4:8": (Target(pattern="4:8"), 0.5, 8 + 1),  # positions would take 4 * 3 / 8
    "8:16": (Target(pattern="8:16"), 0.5, 8 + 1),  # instead of 8 * 4 / 16
    "3:4": (Target(pattern="3:4"), 0.75, 12 + 1),
    "6:8": (Target(pattern="6:8"), 0.75, 12 + 1),
    "2:8": (Target(pattern="2:8"), 0.25, 4 + 2 * 3 / 8),
    "1:4": (Target(pattern="1:4"), 0.25, 4 + 1 * 2 / 4),
    "2:5": (Target(pattern="2:5"), 0.4, 6.4 + 1),  # a position in five needs 3 bits, and two more than a bitmap
    "1:5": (Target(pattern="1:5"), 0.2, 3.2 + 3 / 5),
    "50% 1x16": (Target(0.5, "1x16"), 0.5, 8 + 16 / 32),  # 16 bits for each kept block of 16
    "4b": (Target(bits=4), 1.0, 4 + (16 + 4) / INPUTS),  # one grid per row
    "4b g128": (Target(bits=4, group=128), 1.0, 4 + (16 + 4) / 128),
    "3b g128": (Target(bits=3, group=128), 1.0, 3 + (16 + 3) / 128),
    "4b g128 sym": (Target(bits=4, group=128, symmetric=True), 1.0, 4 + 16 / 128),
    "4b, groups longer than a row": (Target(bits=4, group=1024), 1.0, 4 + (16 + 4) / INPUTS),
    "4b g100": (Target(bits=4, group=100), 1.0, 4 + 3 * (16 + 4) / INPUTS),  # 100, 100 and 56 inputs
    "2:4 4b g128": (Target(pattern="2:4", bits=4, group=128), 0.5, 2 + 1 + (16 + 4) / 128),
    "6:8 4b g128": (Target(pattern="6:8", bits=4, group=128), 0.75, 3 + 1 + (16 + 4) / 128),
    "4:8 nvfp4": (Target(pattern="4:8", format="nvfp4"), 0.5, 2 + 1 + 8 / 16),
    "nvfp4": (Target(format="nvfp4"), 1.0, 4 + 8 / 16),  # and 32 bits of the layer
    "mxfp4": (Target(format="mxfp4"), 1.0, 4 + 8 / 32),
    "2:4 mxfp4": (Target(pattern="2:4", format="mxfp4"), 0.5, 2 + 1 + 8 / 32),
    "50% row 4b": (Target(0.5, bits=4), 0.5, 2 + 1 + (16 + 4) / INPUTS),
    # A block and a group are one: the grids of dropped blocks are not stored.
    "50% 1x16 4b g16": (Target(0.5, "1x16", bits=4, group=16), 0.5, 2 + 0.5 + 0.5 * (16 + 4) / 16),
    # Factors of 16 bits: of 64 rows and 256 inputs int(.5 * 51.2) = 25 of each, of 1 row none.
    "rank 50%": (Target(rank=0.5), 1.0, {64: 16 * 25 * 320 / (64 * 256), 1: 0}),
    "2:4 rank 20%": (Target(pattern="2:4", rank=0.2), 0.5, {64: 8 + 1 + 16 * 10 * 320 / (64 * 256), 1: 8 + 1}),
    # Of 64 x 25 and 25 x 256 codes of 4 bits, in 64 x 2 and 25 x 16 groups.
    "rank 50% 4b g16": (
        Target(rank=0.5, factor_bits=4, factor_group=16),
        1.0,
        {64: (4 * 25 * 320 + (16 + 4) * (64 * 2 + 25 * 16)) / (64 * 256), 1: 0},
    ),
    # Of 64 x 10 and 10 x 256 codes of 3 bits, a grid for each of 64 and 10 rows.
    "2:4 rank 20% 3b": (
        Target(pattern="2:4", rank=0.2, factor_bits=3),
        0.5,
        {64: 8 + 1 + (3 * 10 * 320 + (16 + 3) * (64 + 10)) / (64 * 256), 1: 8 + 1},
    ),
    "50% 1x16 4b g128": (Target(0.5, "1x16", bits=4, group=128), 0.5, 2 + 0.5 + (16 + 4) / 128),
}


@pytest.mark.parametrize("case", CASES)
def test_bits_by_hand(case):
    target, kept, bits = CASES[case]
    for rows in (64, 1):  # the same for every row
        own = bits[rows] if isinstance(bits, dict) else bits
        divisor = 32 / (rows * INPUTS) if target.format == "nvfp4" else 0
        assert bits_per_weight(target, kept, rows, INPUTS) == pytest.approx(own + divisor, rel=1e-12)


def test_a_whole_layer_by_hand():
    """Every stored number of a layer [4, 8] at 2:4 with 4 bits in groups of 4, counted one by one."""
    kept = 4 * 4  # in each of 4 rows, two of each four
    codes, positions, grids = kept * 4, kept * 2, 4 * 2 * (16 + 4)
    expected = (codes + positions + grids) / (4 * 8)
    assert bits_per_weight(Target(pattern="2:4", bits=4, group=4), 0.5, 4, 8) == expected


def test_an_input_scale_by_hand():
    """AWQ at 4 bits in groups of 4 on a layer [8, 12]: beside codes and grids 16 bits for each of 12 inputs."""
    target = Target(bits=4, group=4)
    codes, grids, input_scale = 8 * 12 * 4, 8 * 3 * (16 + 4), 12 * 16
    assert bits_per_weight(target, 1.0, 8, 12, input_scale=True) == (codes + grids + input_scale) / (8 * 12)
    assert bits_per_weight(target, 1.0, 8, 12) == (codes + grids) / (8 * 12)


def test_pruning_more_costs_less():
    costs = [bits_per_weight(Target(share), 1 - share, 8, INPUTS) for share in (0.25, 0.5, 0.75)]
    assert costs == sorted(costs, reverse=True) and costs[1] < 16
    assert bits_per_weight(Target(bits=3), 1.0, 8, INPUTS) < bits_per_weight(Target(bits=4), 1.0, 8, INPUTS)
