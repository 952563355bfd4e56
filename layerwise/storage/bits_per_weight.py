"""Bits per weight as stored: the one place that counts them (docs/export.md).

The parts are those of the files of `layer_packing.py`; the tests hold each count against the bytes of its tensor.
"""

import math
from typing import TypedDict, Unpack

from layerwise.contract.target import Target

SCALE_BITS = 8  # of a scale of a format
DIVISOR_BITS = 32
FLOAT_BITS = 16  # of a kept weight that is not quantised, of a scale, and of an input's scale
INDEX_BITS = 16  # of a kept 1xb block, and of an input's group where groups are no runs of inputs


class Extras(TypedDict, total=False):
    """Whether a layer has what a method may add to its target (`stored_bits`)."""

    input_scale: bool
    reordered: bool
    levels: bool
    rotated: bool
    sparse_factor: tuple[int, int] | None


def bits_per_weight(target: Target, kept: float, rows: int, inputs: int, **extras: Unpack[Extras]) -> float:
    """Bits stored per weight of a layer [rows, inputs] of which the share `kept` is kept, in [0, 1]."""
    return sum(stored_bits(target, kept, rows, inputs, **extras).values()) / (rows * inputs)


def stored_bits(
    target: Target,
    kept: float,
    rows: int,
    inputs: int,
    input_scale: bool = False,
    reordered: bool = False,
    levels: bool = False,
    rotated: bool = False,
    sparse_factor: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Bits of each part of a layer [rows, inputs] of which the share `kept` is kept, in [0, 1].

    values or codes: 16 bits, or `target.bits`, per kept weight. bitmap: one bit per weight (row, layer). positions:
    ceil(log2 m) bits per kept weight, its place in its group of m (n:m; 2 for 2:4). blocks: 16 bits, the column, per
    kept block (1xb). scales: 16 bits per group of a row, 8 in a format. zeros: `target.bits` per group, none if
    symmetric or in a format. Where `grids_of_blocks`, of the kept blocks only. divisor: 32 bits of a layer in nvfp4.
    input_scale: 16 bits per input (AWQ). group_of: 16 bits per input where groups are `reordered`, no runs of inputs
    (GPTQ's act-order). levels: 32 bits of each of 2^bits, of a method with a code book of its own, which has no zeros.
    rotation: 32 bits of seed and of block. left and right: 16 bits per entry of the factors of a target with a rank,
    all that there is where it asks for nothing else. Of a `sparse_factor` (rank, kept entries) left has the kept ones,
    and left_bitmap one bit per entry.
    """
    count = kept * rows * inputs
    parts: dict[str, float] = {}
    if target.rank:
        rank, entries = sparse_factor or (own := target.rank_of(rows, inputs), rows * own)
        parts = {"left": entries * FLOAT_BITS, "right": rank * inputs * FLOAT_BITS}
        if sparse_factor:
            parts["left_bitmap"] = rows * rank
        if target.rest.dense:
            return parts
    parts["codes" if target.bits else "values"] = count * (target.bits or FLOAT_BITS)
    if target.structure in ("row", "layer"):
        parts["bitmap"] = rows * inputs
    elif target.n_of_m:
        parts["positions"] = count * position_bits(target)
    elif target.block:
        parts["blocks"] = rows * kept_blocks(target, inputs) * INDEX_BITS
    if target.bits:
        groups = math.ceil(inputs / group_length(target, inputs))
        if grids_of_blocks(target, inputs) and not reordered:
            assert target.block
            groups = kept_blocks(target, inputs) * target.block // group_length(target, inputs)
        parts["scales"] = rows * groups * (SCALE_BITS if target.format else FLOAT_BITS)
        if target.has_zeros and not levels:
            parts["zeros"] = rows * groups * target.bits
        if target.format == "nvfp4":
            parts["divisor"] = DIVISOR_BITS
        if levels:
            parts["levels"] = 2**target.bits * 32
        if rotated:
            parts["rotation"] = 64
    if input_scale:
        parts["input_scale"] = inputs * FLOAT_BITS
    if reordered:
        parts["group_of"] = inputs * INDEX_BITS
    return parts


def position_bits(target: Target) -> int:
    """Bits of a kept weight's place in its group of an n:m pattern."""
    assert target.n_of_m
    return math.ceil(math.log2(target.n_of_m[1]))


def kept_blocks(target: Target, inputs: int) -> int:
    """Blocks of a 1xb pattern that stay in every row."""
    assert target.block
    blocks = math.ceil(inputs / target.block)
    return blocks - int(target.sparsity * blocks)


def group_length(target: Target, inputs: int) -> int:
    """Inputs that share a scale and zero; the last group may be shorter."""
    return min(target.group or inputs, inputs)


def grids_of_blocks(target: Target, inputs: int) -> bool:
    """Whether every group lies in one block of a 1xb pattern, so that dropped blocks need no scales and zeros."""
    length = group_length(target, inputs)
    return bool(target.block) and target.block % length == 0 and inputs % target.block == 0  # type: ignore[operator]
