"""Masks of the largest scores of a line, or of each group of consecutive inputs.

Ties are broken by index: among equal scores the lower index is pruned first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.kernels import selection as kernel
from layerwise.numerics import dispatch


def keep_largest(score: Tensor, n_pruned: int) -> Tensor:
    """Mask, False at the `n_pruned` smallest entries of each line along the last axis."""
    if n_pruned == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if dispatch.use_compiled(score):
        return kernel.keep_largest(score, n_pruned)
    threshold = score.kthvalue(n_pruned, dim=-1, keepdim=True).values
    mask = ~(score <= threshold)  # NaN is kept and so detected: a weight that is not finite must not be pruned away
    # number of entries equal to the threshold that are kept
    spare = score.shape[-1] - n_pruned - mask.sum(-1, keepdim=True)
    if not spare.any():
        return mask
    equal = score == threshold
    return mask | equal & (equal.flip(-1).cumsum(-1).flip(-1) <= spare)  # the ones with the highest indices


def keep_top_per_group(score: Tensor, group_size: int, n_pruned: int) -> Tensor:
    """Mask [out, in], False at the `n_pruned` smallest of each `group_size` inputs of a row.

    score: [out, in] float32 or float64. A short last group is padded with entries that are pruned first.
    """
    if dispatch.use_compiled(score):
        return kernel.keep_top_per_group(score, group_size, n_pruned)
    mask = keep_largest(grouped(score, group_size, float("-inf")), n_pruned)  # [out, groups, of]
    return mask.flatten(1)[:, : score.shape[1]]


def grouped(score: Tensor, length: int, value: float) -> Tensor:
    """[out, groups, length]: consecutive inputs in groups, the last one padded with `value`."""
    missing = -score.shape[1] % length
    return torch.nn.functional.pad(score, (0, missing), value=value).unflatten(1, (-1, length))
