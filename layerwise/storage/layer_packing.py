"""A compressed layer as the tensors that store it (layout: docs/export.md).

A layer is stored as its kept values or codes, a record of kept weights, scales and zeros, in the number of bits that
`bits_per_weight.py` counts. Changed, unquantised weights are stored in the model's dtype. `layer_unpacking.py` reads
exactly the layer that was scored and evaluated, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, LowRank, Quantised
from layerwise.contract.target import Target
from layerwise.numerics import ops
from layerwise.numerics.low_rank import of_parts
from layerwise.numerics.patterns import ROWS
from layerwise.storage.bit_packing import half, half_factor, narrowest, pack
from layerwise.storage.bits_per_weight import grids_of_blocks, group_length, has_bitmap, position_bits

EXPONENT_OFFSET = 127  # offset of mxfp4's scales


def as_stored(result: Compressed, target: Target, dtype: torch.dtype) -> Compressed:
    """The result as stored: scales in 16 bits and the weight that they give, or the weight in the model's dtype.

    dtype: dtype of the model to which the weight is written; the weight is returned in float32, in the memory of the
    result's own weight, which is overwritten. Input scales that are all one are omitted. Factors are in 16 bits for any
    model dtype, and the weight is the sum of the stored parts.
    """
    if not rounds(target, dtype):
        return result
    if target.rank:
        low_rank, rest = low_rank_of(result), result.rest
        stored = None if rest is None else as_stored(rest, target.rest, dtype)
        if target.factor_bits:
            left, right = (as_stored(factor, target.factors, dtype) for factor in factors_of(low_rank))
            codes = (left.quantised, right.quantised)
            return replace(of_parts(left.weight, right.weight, stored, result.info, codes=codes), trace=result.trace)
        left, right = (half_factor(factor, dtype).float() for factor in (low_rank.left, low_rank.right))
        return replace(of_parts(left, right, stored, result.info, low_rank.kept), trace=result.trace)
    if target.bits is None:
        return replace(result, weight=rounded_to(result.weight, dtype))
    quantised = quantised_of(result)
    scales, input_scale = quantised.scales, quantised.input_scale
    if not target.format:  # a format's scales have eight bits
        scales = half(scales, dtype).float()
    if input_scale is not None:
        input_scale = None if bool((input_scale == 1).all()) else half(input_scale, dtype).float()
    quantised = replace(quantised, scales=scales, input_scale=input_scale)
    weight = dequantised(quantised, result.mask, target, writable(result.weight))
    return replace(result, weight=weight, quantised=quantised)


def rounds(target: Target, dtype: torch.dtype) -> bool:
    """Whether the stored weight may differ from a method's own."""
    return dtype != torch.float32 or target.bits is not None or target.rank > 0


def writable(weight: Tensor) -> Tensor:
    """The weight [out, in] itself, or a copy if several entries may be in one place of its memory, or if it was made in
    torch's inference mode, which forbids changes outside."""
    free = weight.is_contiguous() and not weight.is_inference()
    return weight if free else weight.clone(memory_format=torch.contiguous_format)


def rounded_to(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] float32, overwritten with the values that it has in another dtype."""
    rounded = writable(weight)
    for part in rounded.split(ROWS):
        part.copy_(part.to(dtype))
    return rounded


def low_rank_of(result: Compressed) -> LowRank:
    """The factors of a result at a target with a rank. Raises ValueError when it has none."""
    if result.low_rank is None:
        raise ValueError("a layer of a target with a rank must have factors")
    return result.low_rank


def factors_of(low_rank: LowRank) -> tuple[Compressed, Compressed]:
    """B and A as layers [out, r] and [r, in] of their own, quantised or not."""
    return (
        Compressed(low_rank.left, quantised=low_rank.left_codes),
        Compressed(low_rank.right, quantised=low_rank.right_codes),
    )


def quantised_of(result: Compressed) -> Quantised:
    """The codes and the grid of a result at a target with bits. Raises ValueError when it has none."""
    if result.quantised is None:
        raise ValueError("a layer of a target with bits must be quantised")
    return result.quantised


def dequantised(quantised: Quantised, mask: Tensor | None, target: Target, memory: Tensor | None = None) -> Tensor:
    """[out, in] float32 weight that codes and grid represent, zero where the mask [out, in] is False; in `memory`, if
    it is given."""
    values = ops.quantised_values(quantised, target, memory)
    return values if mask is None else values.masked_fill_(~mask, 0.0)


def reordered(result: Compressed, target: Target) -> bool:
    """Whether a result has groups that are not runs of consecutive inputs."""
    group_of = result.quantised.group_of if result.quantised else None
    if group_of is None:
        return False
    return not torch.equal(group_of, ops.groups_of(len(group_of), target.group, group_of.device))


def sparse_factor(result: Compressed) -> tuple[int, int] | None:
    """(rank, kept entries) of a result with a sparse factor."""
    if result.low_rank is None or result.low_rank.kept is None:
        return None
    return result.low_rank.kept.shape[1], int(result.low_rank.kept.sum())


def parts_of(result: Compressed, target: Target, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that store a layer, on the CPU; an unquantised weight is rounded to the model's dtype.

    A layer that is neither pruned nor quantised is stored as its weight [out, in], under the empty name.
    Raises ValueError for scales that are not in 16 bits (see `as_stored`).
    """
    if target.rank:
        low_rank, rest = low_rank_of(result), result.rest
        factors = {"left": low_rank.left, "right": low_rank.right}
        if low_rank.kept is not None:
            factors["left"] = low_rank.left[low_rank.kept]
        own = {} if rest is None else parts_of(rest, target.rest, dtype)
        if target.factor_bits:
            layers = dict(zip(("left", "right"), factors_of(low_rank), strict=True))
            stored = {side: parts_of(factor, target.factors, dtype) for side, factor in layers.items()}
            return {f"{side}_{name}": part for side, found in stored.items() for name, part in found.items()} | own
        if low_rank.kept is not None:
            own["left_bitmap"] = pack(low_rank.kept.cpu(), 1)
        return {name: half_factor(factor.cpu(), dtype).contiguous() for name, factor in factors.items()} | own
    rows, inputs = result.weight.shape
    mask = torch.ones(rows, inputs, dtype=torch.bool) if result.mask is None else result.mask.cpu()
    parts = mask_parts(mask, target)
    if target.bits is None:
        weight = result.weight.cpu()
        if parts:
            return {"values": narrowest(kept_entries(weight, mask, dtype)), **parts}
        return {"": narrowest(weight.to(dtype)).clone(memory_format=torch.contiguous_format)}
    quantised = on_processor(quantised_of(result))
    codes, scales, zeros = quantised.codes, quantised.scales, quantised.zeros
    if not parts and result.mask is not None:  # a target without sparsity may still have zeros
        codes = torch.where(mask, codes, zeros.to(torch.uint8)[:, ops.grouping(quantised, target)])
    parts["codes"] = pack(kept_entries(codes, mask) if target.sparsity else codes, target.bits)
    moved = reordered(result, target)
    if grids_of_blocks(target, inputs) and not moved:
        kept = mask[:, :: group_length(target, inputs)]  # [out, groups]
        scales, zeros = scales[kept].view(rows, -1), zeros[kept]
    parts["scales"] = format_scales(scales, target) if target.format else _as_half(scales, dtype)
    if quantised.levels is not None:
        parts["levels"] = quantised.levels
    elif target.has_zeros:
        parts["zeros"] = pack(zeros, target.bits)
    if quantised.rotation is not None:
        parts["rotation"] = torch.tensor([quantised.rotation.seed, quantised.rotation.block], dtype=torch.int32)
    if quantised.divisor is not None:
        parts["divisor"] = quantised.divisor
    if quantised.input_scale is not None:
        parts["input_scale"] = _as_half(quantised.input_scale, dtype)
    if moved and quantised.group_of is not None:
        parts["group_of"] = quantised.group_of.to(torch.uint16)
    return parts


def on_processor(quantised: Quantised) -> Quantised:
    """The same with all tensors in CPU memory."""
    tensors = {name: part for name, part in vars(quantised).items() if isinstance(part, Tensor)}
    return replace(quantised, **{name: part.cpu() for name, part in tensors.items()})


def kept_entries(values: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[kept] values[mask] for values and mask [out, in], in a dtype or in their own; torch's index has 16 bytes for
    each entry."""
    found, done = values.new_empty(int(mask.count_nonzero()), dtype=dtype or values.dtype), 0
    for own, kept in zip(values.split(ROWS), mask.split(ROWS), strict=True):
        part = own[kept]
        found[done : done + len(part)] = part
        done += len(part)
    return found


def mask_parts(mask: Tensor, target: Target) -> dict[str, Tensor]:
    """The tensors that store which weights of a mask [out, in] are kept; empty if the target prunes nothing."""
    if has_bitmap(target):
        return {"bitmap": pack(mask, 1)}
    if target.n_of_m:
        places = torch.arange(mask.shape[1], dtype=torch.int32).remainder_(target.n_of_m[1])
        narrow = places.to(torch.uint8) if target.n_of_m[1] <= 2**8 else places
        return {"positions": pack(kept_entries(narrow.expand_as(mask), mask), position_bits(target))}
    if target.block:
        kept = mask[:, :: target.block]  # [out, blocks]
        if kept.shape[1] > 2**16:
            raise ValueError(f"a block's column must fit in 16 bits. Got {kept.shape[1]} blocks in a row instead")
        return {"blocks": kept.nonzero()[:, 1].view(len(mask), -1).to(torch.uint16)}
    return {}


def _as_half(values: Tensor, dtype: torch.dtype) -> Tensor:
    stored = half(values, dtype)
    if not torch.equal(stored.float(), values):
        raise ValueError("scales must be given in 16 bits, as they are stored")
    return stored


def format_scales(scales: Tensor, target: Target) -> Tensor:
    """Float32 scales of a format in stored form: nvfp4 as e4m3, mxfp4 as uint8 exponents plus 127 (e8m0)."""
    if target.format == "nvfp4":
        return scales.to(torch.float8_e4m3fn)
    return (torch.frexp(scales).exponent - 1 + EXPONENT_OFFSET).to(torch.uint8)
