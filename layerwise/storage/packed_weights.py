"""Compressed layers as they are stored: a cell's weights.safetensors (layout: docs/export.md).

A layer is its kept values or codes, what says which weights are kept, scales and zeros, in as many bits as
`bits_per_weight.py` counts; weights that were changed, not quantised, are in the dtype of the model. What is read is,
bit for bit, what was scored and evaluated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerwise.contract.layer import Compressed, LowRank, Quantised, Rotation
from layerwise.contract.target import Target
from layerwise.numerics import ops
from layerwise.numerics.low_rank import of_parts
from layerwise.numerics.patterns import finite, kept_counts
from layerwise.numerics.rotations import block_of
from layerwise.runtime.errors import InputError
from layerwise.storage.bits_per_weight import grids_of_blocks, group_length, kept_blocks, position_bits

VERSION = 1
WIDTHS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "U16": 2,
    "U8": 1,
    "F8_E4M3": 1,
    "I32": 4,
}  # bytes of a number, by its name in a header
EXPONENT_OFFSET = 127  # of the scales of mxfp4
HALVES = (torch.float16, torch.bfloat16)
PARTS = (
    "values",
    "codes",
    "bitmap",
    "positions",
    "blocks",
    "scales",
    "zeros",
    "divisor",
    "levels",
    "rotation",
    "input_scale",
    "group_of",
    "left",
    "right",
    "left_bitmap",
)


# ---------------------------------------------------------------------------------------------------------------- bits


def pack(numbers: Tensor, bits: int) -> Tensor:
    """[bytes] uint8: whole numbers in [0, 2^bits - 1], bits <= 16, one after the other, lowest bits first."""
    if bits == 1:
        return torch.from_numpy(np.packbits(numbers.flatten().numpy().astype(bool), bitorder="little"))
    width = 1 if bits <= 8 else 2
    octets = numbers.flatten().numpy().astype(f"<u{width}").view(np.uint8).reshape(-1, width)
    digits = np.unpackbits(octets, axis=1, count=bits, bitorder="little")  # [numbers, bits]
    return torch.from_numpy(np.packbits(digits.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """[count] uint8, or int32 where bits > 8: what `pack` was given. Raises ValueError for another number of bytes."""
    size = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise ValueError(f"{count} numbers of {bits} bits must take {size} bytes. Got {_kind(packed)} instead")
    digits = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    if bits == 1:
        return torch.from_numpy(digits)
    octets = np.packbits(digits.reshape(count, bits), axis=1, bitorder="little")  # [numbers, 1 or 2]
    return torch.from_numpy(octets[:, 0] if bits <= 8 else octets.view("<u2")[:, 0].astype(np.int32))


def half(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive values in 16 bits: a bfloat16 model's in bfloat16, others' in the one of float16 and bfloat16 whose
    largest relative error is smaller, which is float16 unless values are tiny or huge. None becomes zero or infinite;
    zeros, which scales of a code book may have, stay.
    """
    if not values.all():
        return torch.where(values == 0, 0.0, half(torch.where(values == 0, 1.0, values), dtype))
    rounded = [within(values, kind) for kind in HALVES]
    if dtype == torch.bfloat16:
        return rounded[1]
    errors = [float(((kind.double() - values) / values).abs().max()) for kind in rounded]
    return rounded[errors[1] < errors[0]]


def half_factor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in 16 bits: bfloat16 of a bfloat16 model, else the one of float16 and bfloat16 that misses less.

    What is in one of them stays as it is. Raises ValueError for a factor that neither holds.
    """
    kinds = HALVES[1:] if dtype == torch.bfloat16 else HALVES
    rounded = [values.to(kind) for kind in kinds]
    missed = [float((own.double() - values).square().sum()) for own in rounded]
    best = min(range(len(kinds)), key=lambda index: missed[index] if math.isfinite(missed[index]) else math.inf)
    if not math.isfinite(missed[best]):
        raise ValueError("a low-rank factor must fit in 16 bits")
    return rounded[best]


def within(values: Tensor, kind: torch.dtype) -> Tensor:
    """Positive values in another dtype, those beyond its smallest and largest numbers as these."""
    limits = torch.finfo(kind)
    return values.clamp(limits.tiny * limits.eps, limits.max).to(kind)


def narrowest(values: Tensor) -> Tensor:
    """The same values in 16 bits where float16 or bfloat16 holds every one, as it does those of a 16-bit checkpoint."""
    for kind in reversed(HALVES) if values.dtype not in HALVES else ():
        if torch.equal(values.to(kind).to(values.dtype), values):
            return values.to(kind)
    return values


# -------------------------------------------------------------------------------------------------------------- layers


def as_stored(result: Compressed, target: Target, dtype: torch.dtype) -> Compressed:
    """The result as it is stored: scales in 16 bits and the weight that they give, or the weight in the model's dtype.

    dtype: of the model that the weight is written into; the weight comes back in float32. Scales of inputs that are all
    one are left out. Factors are in 16 bits, whatever the model's dtype; the weight is the sum of what is stored.
    """
    if target.rank:
        low_rank, rest = low_rank_of(result), result.rest
        stored = None if rest is None else as_stored(rest, target.rest, dtype)
        left, right = (half_factor(factor, dtype).float() for factor in (low_rank.left, low_rank.right))
        return replace(of_parts(left, right, stored, result.info, low_rank.kept), trace=result.trace)
    if target.bits is None:
        return result if dtype == torch.float32 else replace(result, weight=result.weight.to(dtype).float())
    quantised = quantised_of(result)
    scales, input_scale = quantised.scales, quantised.input_scale
    if not target.format:  # whose scales are in eight bits
        scales = half(scales, dtype).float()
    if input_scale is not None:
        input_scale = None if bool((input_scale == 1).all()) else half(input_scale, dtype).float()
    quantised = replace(quantised, scales=scales, input_scale=input_scale)
    return replace(result, weight=dequantised(quantised, result.mask, target), quantised=quantised)


def low_rank_of(result: Compressed) -> LowRank:
    """The factors of a result at a target with a rank. Raises ValueError when it has none."""
    if result.low_rank is None:
        raise ValueError("a layer of a target with a rank must have factors")
    return result.low_rank


def quantised_of(result: Compressed) -> Quantised:
    """The codes and the grid of a result at a target with bits. Raises ValueError when it has none."""
    if result.quantised is None:
        raise ValueError("a layer of a target with bits must be quantised")
    return result.quantised


def dequantised(quantised: Quantised, mask: Tensor | None, target: Target) -> Tensor:
    """[out, in] float32 weight that codes and grid represent, zero where the mask [out, in] is False."""
    values = ops.quantised_values(quantised, target)
    return values if mask is None else torch.where(mask, values, 0.0)


def reordered(result: Compressed, target: Target) -> bool:
    """Whether a result has groups that are not runs of consecutive inputs."""
    group_of = result.quantised.group_of if result.quantised else None
    if group_of is None:
        return False
    return not torch.equal(group_of, ops.groups_of(len(group_of), target.group, group_of.device))


def parts_of(result: Compressed, target: Target, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that store a layer, on the processor; a weight that is not quantised is rounded to the model's dtype.

    A layer that is neither pruned nor quantised is its weight [out, in], under the empty name.
    Raises ValueError for scales that are not in 16 bits (see `as_stored`).
    """
    if target.rank:
        low_rank, rest = low_rank_of(result), result.rest
        factors = {"left": low_rank.left, "right": low_rank.right}
        if low_rank.kept is not None:
            factors["left"] = low_rank.left[low_rank.kept]
        own = {} if rest is None else parts_of(rest, target.rest, dtype)
        if low_rank.kept is not None:
            own["left_bitmap"] = pack(low_rank.kept.cpu(), 1)
        return {name: half_factor(factor.cpu(), dtype).contiguous() for name, factor in factors.items()} | own
    rows, inputs = result.weight.shape
    mask = torch.ones(rows, inputs, dtype=torch.bool) if result.mask is None else result.mask.cpu()
    parts = mask_parts(mask, target)
    if target.bits is None:
        weight = narrowest(result.weight.cpu().to(dtype))
        return {"values": weight[mask], **parts} if parts else {"": weight.clone(memory_format=torch.contiguous_format)}
    quantised = on_processor(quantised_of(result))
    codes, scales, zeros = quantised.codes, quantised.scales, quantised.zeros
    if not parts:  # a target without sparsity may still have zeros
        codes = torch.where(mask, codes, zeros[:, ops.grouping(quantised, target)].to(torch.uint8))
    parts["codes"] = pack(codes[mask] if target.sparsity else codes, target.bits)
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
    """The same with all its tensors in the processor's memory."""
    tensors = {name: part for name, part in vars(quantised).items() if isinstance(part, Tensor)}
    return replace(quantised, **{name: part.cpu() for name, part in tensors.items()})


def mask_parts(mask: Tensor, target: Target) -> dict[str, Tensor]:
    """The tensors that say which weights of a mask [out, in] are kept; none where the target prunes nothing."""
    if target.n_of_m:
        return {"positions": pack(mask.nonzero()[:, 1] % target.n_of_m[1], position_bits(target))}
    if target.block:
        kept = mask[:, :: target.block]  # [out, blocks]
        if kept.shape[1] > 2**16:
            raise ValueError(f"a block's column must fit in 16 bits. Got {kept.shape[1]} blocks in a row instead")
        return {"blocks": kept.nonzero()[:, 1].view(len(mask), -1).to(torch.uint16)}
    return {"bitmap": pack(mask, 1)} if target.sparsity else {}


def _as_half(values: Tensor, dtype: torch.dtype) -> Tensor:
    stored = half(values, dtype)
    if not torch.equal(stored.float(), values):
        raise ValueError("scales must be given in 16 bits, as they are stored")
    return stored


def format_scales(scales: Tensor, target: Target) -> Tensor:
    """Scales of a format, float32, as they are stored: nvfp4 as e4m3, mxfp4 as uint8 exponents plus 127 (e8m0)."""
    if target.format == "nvfp4":
        return scales.to(torch.float8_e4m3fn)
    return (torch.frexp(scales).exponent - 1 + EXPONENT_OFFSET).to(torch.uint8)


def scales_of_format(stored: Tensor, target: Target) -> Tensor:
    """Float32 scales that `format_scales` stored. Raises ValueError for another dtype."""
    expected = torch.float8_e4m3fn if target.format == "nvfp4" else torch.uint8
    if stored.dtype != expected:
        raise ValueError(
            f"scales of {target.format} must be {str(expected).removeprefix('torch.')}. Got {_kind(stored)} instead"
        )
    if target.format == "nvfp4":
        return stored.float()
    return torch.ldexp(torch.ones(stored.shape), stored.int() - EXPONENT_OFFSET)


def restored(parts: Mapping[str, Tensor], target: Target, shape: tuple[int, int]) -> Compressed:
    """The layer [out, in] that the parts store; codes of pruned weights are their zero, so that they give zero.

    Raises ValueError, without the layer's name, when parts are absent or do not belong together.
    """
    if target.rank:
        left, right, kept = _restored_factors(parts, target, shape)
        return of_parts(left, right, None if target.rest.dense else restored(parts, target.rest, shape), kept=kept)
    inputs = shape[1]
    if "" in parts:
        if parts[""].shape != shape:
            raise ValueError(f"the weight must be {list(shape)}, as announced. Got {_kind(parts[''])} instead")
        return Compressed(parts[""].float())
    mask = _restored_mask(parts, target, shape)
    kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    count = int(kept.sum())
    if target.bits is None:
        values = _part(parts, "values")
        if values.shape != (count,):
            raise ValueError(f"there must be {count} values, one for each kept weight. Got {_kind(values)} instead")
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


def sparse_factor(result: Compressed) -> tuple[int, int] | None:
    """(rank, kept entries) of a result with a sparse factor."""
    if result.low_rank is None or result.low_rank.kept is None:
        return None
    return result.low_rank.kept.shape[1], int(result.low_rank.kept.sum())


def _restored_factors(
    parts: Mapping[str, Tensor], target: Target, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """B [out, r] and A [r, in] float32, of the rank that the target gives the layer, and where a sparse B is kept."""
    left, right, rank, kept = _part(parts, "left"), _part(parts, "right"), target.rank_of(*shape), None
    entries: tuple[int, ...] = (shape[0], rank)
    if "left_bitmap" in parts:
        rank = len(right)
        kept = unpack(parts["left_bitmap"], 1, shape[0] * rank).bool().view(shape[0], rank)
        entries = (int(kept.sum()),)
    for name, factor, wanted in (("left", left, entries), ("right", right, (rank, shape[1]))):
        if factor.shape != wanted or factor.dtype not in HALVES or not finite(factor.float()):
            raise ValueError(
                f"the factor {name} must be {list(wanted)} in 16 bits and finite. Got {_kind(factor)} instead"
            )
    if kept is not None:
        values, left = left.float(), torch.zeros(shape[0], rank)
        left[kept] = values
    return left.float(), right.float(), kept


def _restored_grid(parts: Mapping[str, Tensor], target: Target, kept: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scales and zeros [out, groups] float32, and the group of each input where groups are no runs of inputs.

    Groups of dropped blocks, which have no grid, get scale 1 and the zero in the middle, of a format 0.
    """
    assert target.bits is not None
    (rows, inputs), length = kept.shape, group_length(target, kept.shape[1])
    stored = torch.ones(rows, -(-inputs // length), dtype=torch.bool)  # [out, groups]
    if grids_of_blocks(target, inputs) and "group_of" not in parts:
        stored = kept[:, ::length]
    count, scales = int(stored.sum()), _part(parts, "scales")
    if scales.numel() != count or (scales.dtype not in HALVES and not target.format):
        wide = 8 if target.format else 16
        raise ValueError(f"there must be {count} scales of {wide} bits. Got {_kind(scales)} instead")
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
        raise ValueError(f"levels must be [{count}] float32, finite. Got {_kind(levels)} instead")
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
    rows, inputs = shape
    if target.sparsity == 0:
        return None
    if not (target.n_of_m or target.block):
        return unpack(_part(parts, "bitmap"), 1, rows * inputs).bool().view(shape)
    if target.block:
        blocks, kept = _part(parts, "blocks"), kept_blocks(target, inputs)
        columns, last, length = blocks.to(torch.int64), -(-inputs // target.block), target.block
        if blocks.dtype != torch.uint16 or blocks.shape != (rows, kept):
            raise ValueError(f"blocks must be [{rows}, {kept}] uint16. Got {_kind(blocks)} instead")
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


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# --------------------------------------------------------------------------------------------------------------- files


def write(
    path: Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    target: Target,
    targets: Mapping[str, Target] | None = None,
) -> None:
    """Write the parts of layers [out, in] into a safetensors file, each as `layer.part`.

    target: of all layers, or the budget where `targets` has one of each layer.
    """
    tensors = {
        f"{layer}.{part}" if part else layer: tensor
        for layer, parts in layers.items()
        for part, tensor in parts.items()
    }
    info: dict[str, Any] = {"version": VERSION, "target": target.as_dict()}
    info["shapes"] = {name: list(shapes[name]) for name in layers}
    if targets:
        info["targets"] = {name: targets[name].as_dict() for name in layers}
    save_file(tensors, path, metadata={"layerwise": json.dumps(info)})


def join(path: Path, parts: Sequence[Path]) -> None:
    """Write what files of `write`, of one target or budget, hold into one, tensor by tensor."""
    entries: list[tuple[str, dict[str, Any], Path, int]] = []
    shapes, targets, info = {}, {}, {}
    for part in parts:
        with part.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        info = json.loads(header.pop("__metadata__")["layerwise"])
        shapes |= info["shapes"]
        targets |= info.get("targets", {})
        entries += [(name, entry, part, 8 + size) for name, entry in header.items()]
    # Wide numbers first, so that all are aligned.
    entries.sort(key=lambda entry: (-WIDTHS[entry[1]["dtype"]], entry[0]))
    gathered = {"shapes": shapes} | ({"targets": targets} if targets else {})
    whole: dict[str, Any] = {"__metadata__": {"layerwise": json.dumps(info | gathered)}}
    end = 0
    for name, entry, _, _ in entries:
        start, stop = entry["data_offsets"]
        whole[name] = entry | {"data_offsets": [end, end + stop - start]}
        end += stop - start
    text = json.dumps(whole).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, entry, part, base in entries:
            start, stop = entry["data_offsets"]
            with part.open("rb") as file:
                file.seek(base + start)
                out.write(file.read(stop - start))


class PackedFile:
    """A file of compressed layers, read layer by layer.

    target: of all layers, or the budget that is spread over them. It is opened for each: what has been read of a mapped
    file counts as memory until it is closed.
    A file without the metadata of `write` is taken for weights [out, in] under their layers' names.
    Raises InputError, in one sentence, when it cannot be read or what it holds does not fit together.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, path.absolute()  # the process may move
        try:
            with safe_open(path, "pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                text = (file.metadata() or {}).get("layerwise")
        except (OSError, SafetensorError) as error:
            raise InputError(f"The weights at {path} cannot be read: {error}.") from None
        try:
            info = json.loads(text) if text else {"version": VERSION, "target": {}, "shapes": {}}
            if info["version"] != VERSION:
                raise InputError(
                    f"{path} must be of version {VERSION} of the layout. Got version {info['version']} instead."
                )
            self.target = Target(**info["target"])
            self.targets = {name: Target(**own) for name, own in info.get("targets", {}).items()}
            self.shapes = {name: tuple(shape) for name, shape in info["shapes"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"The description of the layers in {path} cannot be read: {error!r}.") from None
        if not text:
            self.shapes = found
        if self.targets and self.targets.keys() != self.shapes.keys():
            raise InputError(f"{path} must have a target for each of its layers. Got {len(self.targets)} instead.")
        self._parts: dict[str, dict[str, str]] = {name: {} for name in self.shapes}
        for name in found:
            layer, _, part = name.rpartition(".")
            if name in self.shapes:
                self._parts[name][""] = name
            elif layer in self.shapes and part in PARTS:
                self._parts[layer][part] = name
            else:
                raise InputError(f"{path} has the tensor {name!r}, which belongs to none of its layers.")

    def target_of(self, layer: str) -> Target:
        """The layer's target: one for all layers, or its own where a budget is spread over them."""
        return self.targets.get(layer, self.target)

    def read(self, layer: str) -> Compressed:
        """The layer, with its weight [out, in] float32."""
        try:
            with safe_open(self._place, "pt") as file:
                parts = {part: file.get_tensor(name) for part, name in self._parts[layer].items()}
            return restored(parts, self.target_of(layer), self.shapes[layer])
        except (ValueError, OSError, SafetensorError) as error:
            raise InputError(f"{layer} in {self.path} is damaged: {error}.") from None

    def stored_bytes(self, layer: str) -> int:
        """Bytes of the layer's tensors."""
        with safe_open(self._place, "pt") as file:
            return sum(file.get_tensor(name).nbytes for name in self._parts[layer].values())
