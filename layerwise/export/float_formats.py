"""Layers in nvfp4 and mxfp4 as the compressed-tensors library lays them out: two codes a byte, scales of eight bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layerwise.contract.layer import Quantised
from layerwise.contract.target import Target
from layerwise.numerics import ops
from layerwise.numerics.code_books import E2M1, steps_of
from layerwise.storage.layer_packing import format_scales
from layerwise.storage.layer_unpacking import scales_of_format

PACKINGS = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}  # the library's name -> the format


def packing(target: Target) -> str:
    """The library's name of the target's format."""
    return next(name for name, own in PACKINGS.items() if own == target.format)


def packed_format(quantised: Quantised, target: Target) -> dict[str, Tensor]:
    """The tensors of a layer [out, in] of whole groups: weight_packed [out, in / 2] uint8, the first code
    of two in the lower half; weight_scale [out, groups]; of nvfp4 weight_global_scale [1]."""
    codes = quantised.codes
    tensors = {
        "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": format_scales(quantised.scales, target),
    }
    return tensors | ({} if quantised.divisor is None else {"weight_global_scale": quantised.divisor})


def names_of(target: Target) -> list[str]:
    """Names of the tensors of a layer."""
    return ["weight_packed", "weight_scale", *(["weight_global_scale"] if target.format == "nvfp4" else [])]


def unpacked_format(parts: Mapping[str, Tensor], target: Target, shape: tuple[int, int]) -> Tensor:
    """The float32 weight [out, in] of the tensors of `packed_format`. Raises ValueError when they do not fit."""
    (rows, inputs), packed, scales = shape, parts["weight_packed"], parts["weight_scale"]
    assert target.group
    if packed.dtype != torch.uint8 or packed.shape != (rows, inputs // 2):
        raise ValueError(
            f"its codes must be uint8 [{rows}, {inputs // 2}]. Got {packed.dtype} {list(packed.shape)} instead"
        )
    if scales.shape != (rows, -(-inputs // target.group)):
        raise ValueError(f"its scales must be [{rows}, {-(-inputs // target.group)}]. Got {list(scales.shape)} instead")
    steps = steps_of(scales_of_format(scales, target), parts.get("weight_global_scale"))
    if not (torch.isfinite(steps).all() and (steps > 0).all()):
        raise ValueError("its scales must be positive and finite")
    codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1)  # [out, in]
    return steps[:, ops.groups_of(inputs, target.group)] * E2M1.values(codes)


def on_format(groups: Tensor) -> Tensor:
    """[groups] bool: whether some scale makes the weights of each of groups [groups, length] numbers of four bits.

    The largest weight is tried as each level. Every weight may be off by the rounding of its dtype and of the largest.
    """
    limits, weight = torch.finfo(groups.dtype), groups.double()
    largest = weight.abs().amax(1, keepdim=True)
    found = largest[:, 0] == 0
    for level in E2M1.rising[E2M1.rising > 0].tolist():
        rows = (~found).nonzero()[:, 0]
        scale = largest[rows] / level
        near = E2M1.values(E2M1.nearest((weight[rows] / scale).float())) * scale
        found[rows] = ((weight[rows] - near).abs() <= 2 * limits.eps * (weight[rows].abs() + limits.tiny)).all(1)
    return found
