"""Stored numbers: integers with a fixed number of bits, and other numbers in 16 bits."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
PACKED = 2**18  # numbers that are packed at once, each as one byte per bit; they fill whole bytes


def pack(numbers: Tensor, bits: int) -> Tensor:
    """[bytes] uint8: whole numbers in [0, 2^bits - 1], bits <= 16, consecutive, lowest bits first."""
    flat = numbers.flatten().numpy()
    if bits == 1:
        return torch.from_numpy(np.packbits(flat.astype(bool, copy=False), bitorder="little"))
    width = 1 if bits <= 8 else 2
    packed = np.empty(-(-len(flat) * bits // 8), np.uint8)
    for start in range(0, len(flat), PACKED):
        part = flat[start : start + PACKED].astype(f"<u{width}", copy=False)
        octets = part.view(np.uint8).reshape(-1, width)
        digits = np.unpackbits(octets, axis=1, count=bits, bitorder="little")  # [numbers, bits]
        done, size = start * bits // 8, -(-len(part) * bits // 8)
        packed[done : done + size] = np.packbits(digits.reshape(-1), bitorder="little")
    return torch.from_numpy(packed)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """[count] uint8, or int32 if bits > 8: the inverse of `pack`. Raises ValueError for a wrong number of bytes."""
    size = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise ValueError(f"{count} numbers of {bits} bits must take {size} bytes. Got {described(packed)} instead")
    digits = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    if bits == 1:
        return torch.from_numpy(digits)
    octets = np.packbits(digits.reshape(count, bits), axis=1, bitorder="little")  # [numbers, 1 or 2]
    return torch.from_numpy(octets[:, 0] if bits <= 8 else octets.view("<u2")[:, 0].astype(np.int32))


def half(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Positive values in 16 bits: in bfloat16 for a bfloat16 model, otherwise in float16 or bfloat16, whichever has the
    smaller largest relative error. This is float16 unless values are tiny or huge. No value becomes zero or infinite.
    Zeros, which scales of a code book may contain, are kept.
    """
    if not values.numel():  # of a factor of rank 0
        return values.to(HALVES[dtype == torch.bfloat16])
    if not values.all():
        return torch.where(values == 0, 0.0, half(torch.where(values == 0, 1.0, values), dtype))
    rounded = [within(values, kind) for kind in HALVES]
    if dtype == torch.bfloat16:
        return rounded[1]
    errors = [float(((kind.double() - values) / values).abs().max()) for kind in rounded]
    return rounded[errors[1] < errors[0]]


def half_factor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in 16 bits: bfloat16 for a bfloat16 model, otherwise float16 or bfloat16, whichever has the smaller
    error.

    A factor that is already in 16 bits is unchanged. Raises ValueError for a factor that neither dtype can represent.
    """
    kinds = HALVES[1:] if dtype == torch.bfloat16 else HALVES
    rounded = [values.to(kind) for kind in kinds]
    missed = [float((own.double() - values).square().sum()) for own in rounded]
    best = min(range(len(kinds)), key=lambda index: missed[index] if math.isfinite(missed[index]) else math.inf)
    if not math.isfinite(missed[best]):
        raise ValueError("a low-rank factor must fit in 16 bits")
    return rounded[best]


def within(values: Tensor, kind: torch.dtype) -> Tensor:
    """Positive values in another dtype, clamped to its smallest and largest numbers."""
    limits = torch.finfo(kind)
    return values.clamp(limits.tiny * limits.eps, limits.max).to(kind)


def narrowest(values: Tensor) -> Tensor:
    """The same values in 16 bits if float16 or bfloat16 represents all exactly, as for a 16-bit checkpoint."""
    for kind in reversed(HALVES) if values.dtype not in HALVES else ():
        if torch.equal(values.to(kind).to(values.dtype), values):
            return values.to(kind)
    return values


def described(tensor: Tensor) -> str:
    """A tensor's dtype and shape, for a message."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
