"""Count and check the masks of a target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerwise.contract.layer import Target

# Rows of a layer that are counted, rounded or packed at once: torch's temporaries take 8 or 16 bytes per entry.
ROWS = 128


def finite(tensor: Tensor) -> bool:
    """Whether all entries are finite, in one read: NaN becomes both minimum and maximum."""
    return all(math.isfinite(end) for end in tensor.aminmax()) if tensor.numel() else True


def nonzero_outside(values: Tensor, mask: Tensor) -> int:
    """Number of nonzero values [out, in] where the mask [out, in] is False."""
    parts = zip(values.split(ROWS), mask.split(ROWS), strict=True)
    return sum(int(((own != 0) & ~kept).count_nonzero()) for own, kept in parts)


def count_kept(mask: Tensor, target: Target) -> Tensor:
    """Number of kept entries in each comparison group: [1] per layer, [out] per row, [out, groups] for n:m or
    blocks."""
    length = target.n_of_m[1] if target.n_of_m else target.block
    if not length and target.pattern == "layer":
        return mask.count_nonzero().view(1)

    def counted(part: Tensor) -> Tensor:
        if not length:
            return part.sum(1)
        return torch.nn.functional.pad(part, (0, -part.shape[1] % length)).unflatten(1, (-1, length)).sum(2)

    groups = (-(-mask.shape[1] // length),) if length else ()
    counts = torch.empty((len(mask), *groups), dtype=torch.int64, device=mask.device)
    for own, part in zip(counts.split(ROWS), mask.split(ROWS), strict=True):
        own.copy_(counted(part))
    return counts


def kept_counts(shape: torch.Size, target: Target) -> Tensor:
    """The expected result of `count_kept`; for a block pattern, the size of a kept block."""
    out, inputs = shape
    if target.n_of_m or target.block:
        length = target.n_of_m[1] if target.n_of_m else (target.block or 1)
        most = target.n_of_m[0] if target.n_of_m else length
        groups = -(-inputs // length)
        sizes = torch.tensor([min(length, inputs - g * length) for g in range(groups)])
        return sizes.clamp(max=most).expand(out, -1)
    if target.pattern == "layer":
        return torch.tensor([out * inputs - int(target.sparsity * (out * inputs))])
    return torch.full((out,), inputs - int(target.sparsity * inputs))
