"""Restore a compressed layer from its stored tensors, written by `layer_packing.py`, and check each part."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Quantised, Rotation
from layerwise.contract.target import Target
from layerwise.numerics import ops
from layerwise.numerics.low_rank import of_parts
from layerwise.numerics.patterns import count_kept, finite, kept_counts
from layerwise.numerics.rotations import block_of
from layerwise.storage.bit_packing import HALVES, described, unpack
from layerwise.storage.bits_per_weight import grids_of_blocks, group_length, has_bitmap, kept_blocks, position_bits
from layerwise.storage.layer_packing import EXPONENT_OFFSET, dequantised


def restored(parts: Mapping[str, Tensor], target: Target, shape: tuple[int, int]) -> Compressed:
    """The layer [out, in] that the parts store; pruned weights get their group's zero as code, so that they are zero.

    Raises ValueError, without the layer's name, when parts are absent or inconsistent.
    """
    if target.rank:
        rest = None if target.rest.dense else restored(parts, target.rest, shape)
        if target.factor_bits:
            left, right = _restored_codes(parts, target, shape)
            return of_parts(left.weight, right.weight, rest, codes=(left.quantised, right.quantised))
        left, right, kept = _restored_factors(parts, target, shape)
        return of_parts(left, right, rest, kept=kept)
    inputs = shape[1]
    if "" in parts:
        if parts[""].shape != shape:
            raise ValueError(f"the weight must be {list(shape)}, as announced. Got {described(parts[''])} instead")
        return Compressed(parts[""].float())
    mask = _restored_mask(parts, target, shape)
    kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    count = int(kept.sum())
    if target.bits is None:
        values = _part(parts, "values")
        if values.shape != (count,):
            raise ValueError(f"there must be {count} values, one for each kept weight. Got {described(values)} instead")
        weight = torch.zeros(shape)
        weight[kept] = values.float()
        return Compressed(weight, mask)
    scales, zeros, group_of = _restored_grid(parts, target, kept)
    input_scale = parts["input_scale"].float() if "input_scale" in parts else None
    if input_scale is not None and (
        input_scale.shape != (inputs,) or not ((input_scale > 0) & torch.isfinite(input_scale)).all()
    ):
        raise ValueError(f"input_scale must be [{inputs}], positive and finite")
    groups = ops.groups_of(inputs, target.group) if group_of is None else group_of
    codes = zeros[:, groups].to(torch.uint8)
    codes[kept] = unpack(_part(parts, "codes"), target.bits, count)
    levels, rotation = _restored_levels(parts, target), _restored_rotation(parts, inputs)
    quantised = Quantised(
        codes, scales, zeros, group_of, input_scale, _restored_divisor(parts, target), levels, rotation
    )
    return Compressed(dequantised(quantised, mask, target), mask, quantised)


def _restored_codes(
    parts: Mapping[str, Tensor], target: Target, shape: tuple[int, int]
) -> tuple[Compressed, Compressed]:
    """Quantised B [out, r] and A [r, in], each from its parts as a layer of its own."""
    found, rank = [], target.rank_of(*shape)
    for side, size in (("left", (shape[0], rank)), ("right", (rank, shape[1]))):
        own = {name.removeprefix(f"{side}_"): part for name, part in parts.items() if name.startswith(f"{side}_")}
        try:
            found.append(restored(own, target.factors, size))
        except ValueError as error:
            raise ValueError(f"the factor {side}: {error}") from None
    return found[0], found[1]


def _restored_factors(
    parts: Mapping[str, Tensor], target: Target, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """B [out, r] and A [r, in] float32 of the target's rank for the layer, and the mask of a sparse B."""
    left, right, rank, kept = _part(parts, "left"), _part(parts, "right"), target.rank_of(*shape), None
    entries: tuple[int, ...] = (shape[0], rank)
    if "left_bitmap" in parts:
        rank = len(right)
        kept = unpack(parts["left_bitmap"], 1, shape[0] * rank).bool().view(shape[0], rank)
        entries = (int(kept.sum()),)
    for name, factor, wanted in (("left", left, entries), ("right", right, (rank, shape[1]))):
        if factor.shape != wanted or factor.dtype not in HALVES or not finite(factor.float()):
            raise ValueError(
                f"the factor {name} must be {list(wanted)} in 16 bits and finite. Got {described(factor)} instead"
            )
    if kept is not None:
        values, left = left.float(), torch.zeros(shape[0], rank)
        left[kept] = values
    return left.float(), right.float(), kept


def _restored_grid(parts: Mapping[str, Tensor], target: Target, kept: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales and zeros [out, groups] float32, and the group of each input if groups are not runs of inputs.

    Groups of dropped blocks have no grid; they get scale 1 and the middle code as zero (0 for a format).
    """
    assert target.bits is not None
    (rows, inputs), length = kept.shape, group_length(target, kept.shape[1])
    stored = torch.ones(rows, -(-inputs // length), dtype=torch.bool)  # [out, groups]
    if grids_of_blocks(target, inputs) and "group_of" not in parts:
        stored = kept[:, ::length]
    count, scales = int(stored.sum()), _part(parts, "scales")
    if scales.numel() != count or (scales.dtype not in HALVES and not target.format):
        wide = 8 if target.format else 16
        raise ValueError(f"there must be {count} scales of {wide} bits. Got {described(scales)} instead")
    scales = scales_of_format(scales, target) if target.format else scales
    if not (((scales >= 0) if "levels" in parts else (scales > 0)) & torch.isfinite(scales)).all():
        raise ValueError("a scale is not a positive finite number")
    middle = 0 if target.format or "levels" in parts else 2 ** (target.bits - 1)
    filled, zeros = torch.ones(stored.shape), torch.full(stored.shape, float(middle))
    filled[stored] = scales.float().flatten()
    if target.has_zeros and "levels" not in parts:
        zeros[stored] = unpack(_part(parts, "zeros"), target.bits, count).float()
    group_of = parts["group_of"].to(torch.int64) if "group_of" in parts else None
    if group_of is not None and (group_of.shape != (inputs,) or int(group_of.max()) >= stored.shape[1]):
        raise ValueError(f"group_of must name one of {stored.shape[1]} groups for each of {inputs} inputs")
    return filled, zeros, group_of


def scales_of_format(stored: Tensor, target: Target) -> Tensor:
    """Float32 scales that `format_scales` stored. Raises ValueError for another dtype."""
    expected = torch.float8_e4m3fn if target.format == "nvfp4" else torch.uint8
    if stored.dtype != expected:
        raise ValueError(
            f"scales of {target.format} must be {str(expected).removeprefix('torch.')}. Got {described(stored)} instead"
        )
    if target.format == "nvfp4":
        return stored.float()
    return torch.ldexp(torch.ones(stored.shape), stored.int() - EXPONENT_OFFSET)


def _restored_divisor(parts: Mapping[str, Tensor], target: Target) -> Tensor | None:
    if target.format != "nvfp4":
        return None
    divisor = _part(parts, "divisor")
    if divisor.shape != (1,) or divisor.dtype != torch.float32 or not (divisor > 0) & torch.isfinite(divisor):
        raise ValueError("divisor must be [1] float32, positive and finite")
    return divisor


def _restored_levels(parts: Mapping[str, Tensor], target: Target) -> Tensor | None:
    levels = parts.get("levels")
    count = 2 ** (target.bits or 0)
    if levels is not None and not (
        levels.shape == (count,)
        and levels.dtype == torch.float32
        and torch.isfinite(levels).all()
        and not target.format
    ):
        raise ValueError(f"levels must be [{count}] float32, finite. Got {described(levels)} instead")
    return levels


def _restored_rotation(parts: Mapping[str, Tensor], inputs: int) -> Rotation | None:
    if "rotation" not in parts:
        return None
    numbers = parts["rotation"].tolist()
    if len(numbers) != 2 or numbers[0] < 0 or numbers[1] < 1 or block_of(inputs, numbers[1]) != numbers[1]:
        raise ValueError(
            f"rotation must be a seed and a block, a power of two that divides {inputs}. Got {numbers} instead"
        )
    return Rotation(*numbers)


def _restored_mask(parts: Mapping[str, Tensor], target: Target, shape: tuple[int, int]) -> Tensor | None:
    """The mask [out, in], or None if the target prunes nothing. Older files have positions for every n:m."""
    rows, inputs = shape
    if target.sparsity == 0:
        return None
    if has_bitmap(target) and "positions" not in parts:
        mask = unpack(_part(parts, "bitmap"), 1, rows * inputs).bool().view(shape)
        if target.n_of_m and (wrong := int((count_kept(mask, target) != kept_counts(mask.shape, target)).sum())):
            raise ValueError(f"the bitmap must be {target.pattern}. Got other numbers in {wrong} groups instead")
        return mask
    if target.block:
        blocks, kept = _part(parts, "blocks"), kept_blocks(target, inputs)
        columns, last, length = blocks.to(torch.int64), -(-inputs // target.block), target.block
        if blocks.dtype != torch.uint16 or blocks.shape != (rows, kept):
            raise ValueError(f"blocks must be [{rows}, {kept}] uint16. Got {described(blocks)} instead")
    else:
        assert target.n_of_m
        counts = kept_counts(torch.Size(shape), target)  # [out, groups]
        places = unpack(_part(parts, "positions"), position_bits(target), int(counts.sum())).to(torch.int64)
        groups = torch.arange(counts.shape[1]).expand_as(counts).flatten().repeat_interleave(counts.flatten())
        columns, last, length = (groups * target.n_of_m[1] + places).view(rows, -1), inputs, 1
    mask = torch.zeros(rows, last, dtype=torch.bool)
    if int(columns.max()) >= last or (columns.diff() <= 0).any():
        raise ValueError("the kept columns of a row do not rise, or lie outside it")
    return mask.scatter_(1, columns, True).repeat_interleave(length, 1)[:, :inputs]


def _part(parts: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in parts:
        raise ValueError(f"the tensor {name!r} is absent")
    return parts[name]
