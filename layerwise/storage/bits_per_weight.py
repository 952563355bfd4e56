"""The only place that counts stored bits per weight (docs/export.md).

The parts are those in the files of `layer_packing.py`; tests compare each count with the bytes of its tensor.
"""

import math
from typing import TypedDict, Unpack

from layerwise.contract.target import Target

SCALE_BITS = 8  # of a format's scale
DIVISOR_BITS = 32
FLOAT_BITS = 16  # of a kept unquantised weight, of a scale, and of an input's scale
INDEX_BITS = 16  # of a kept 1xb block, and of an input's group if groups are not runs of inputs


class Extras(TypedDict, total=False):
    """Flags for parts that a method may add to a layer (`stored_bits`)."""

    input_scale: bool
    reordered: bool
    levels: bool
    rotated: bool
    sparse_factor: tuple[int, int] | None


def bits_per_weight(target: Target, kept: float, rows: int, inputs: int, **extras: Unpack[Extras]) -> float:
    """Bits stored per weight of a layer [rows, inputs], of which a share `kept` in [0, 1] is kept."""
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
    """Bits of each part of a layer [rows, inputs], of which a share `kept` in [0, 1] is kept.

    values or codes: 16 bits, or `target.bits`, per kept weight. bitmap: one bit per weight (row, layer, and n:m
    where positions would take more, such as 4:8). positions: ceil(log2 m) bits per kept weight, its place in its group
    of m (other n:m; 2 for 2:4). blocks: 16 bits, the column, per kept block (1xb). scales: 16 bits per group of a row,
    8 in a format. zeros: `target.bits` per group, none if symmetric or in a format. If `grids_of_blocks`, only kept
    blocks count. divisor: 32 bits per layer in nvfp4.
    input_scale: 16 bits per input (AWQ). group_of: 16 bits per input if groups are `reordered` and so not runs of
    inputs (GPTQ's act-order). levels: 32 bits for each of 2^bits levels, for a method with its own code book, which has
    no zeros. rotation: 32 bits each for seed and block. left and right: 16 bits per entry of the factors of a target
    with a rank; factors and S are all parts of such a target. For a `sparse_factor` (rank, kept entries), left holds
    the kept entries and left_bitmap has one bit per entry. left_codes, left_scales, left_zeros, and so for right:
    instead of left and right, if factors are quantised, the parts of layers [rows, rank] and [rank, inputs].
    """
    count = kept * rows * inputs
    parts: dict[str, float] = {}
    if target.rank:
        rank, entries = sparse_factor or (own := target.rank_of(rows, inputs), rows * own)
        if target.factor_bits:
            left, right = (stored_bits(target.factors, 1.0, *shape) for shape in ((rows, rank), (rank, inputs)))
            parts = {f"left_{name}": bits for name, bits in left.items()}
            parts |= {f"right_{name}": bits for name, bits in right.items()}
        else:
            parts = {"left": entries * FLOAT_BITS, "right": rank * inputs * FLOAT_BITS}
        if sparse_factor:
            parts["left_bitmap"] = rows * rank
        if target.rest.dense:
            return parts
    parts["codes" if target.bits else "values"] = count * (target.bits or FLOAT_BITS)
    if has_bitmap(target):
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


def has_bitmap(target: Target) -> bool:
    """Whether one bit per weight records which are kept: for rows and layers, and for n:m if positions take more.

    n positions take n ceil(log2 m) bits in each group of m. For 2:4 that is m, and positions are stored.
    """
    if target.n_of_m:
        n, m = target.n_of_m
        return n * position_bits(target) > m
    return target.structure in ("row", "layer")


def position_bits(target: Target) -> int:
    """Bits for a kept weight's position in its group of an n:m pattern."""
    assert target.n_of_m
    return math.ceil(math.log2(target.n_of_m[1]))


def kept_blocks(target: Target, inputs: int) -> int:
    """Number of blocks of a 1xb pattern kept in every row."""
    assert target.block
    blocks = math.ceil(inputs / target.block)
    return blocks - int(target.sparsity * blocks)


def group_length(target: Target, inputs: int) -> int:
    """Number of inputs that share a scale and zero; the last group may be shorter."""
    return max(min(target.group or inputs, inputs), 1)  # a factor of rank 0 has no inputs


def grids_of_blocks(target: Target, inputs: int) -> bool:
    """Whether every group lies in one block of a 1xb pattern, so that dropped blocks need neither scales nor zeros."""
    length = group_length(target, inputs)
    return bool(target.block) and target.block % length == 0 and inputs % target.block == 0  # type: ignore[operator]
