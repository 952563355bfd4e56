"""A layer's rows while their codes change: the state that the torch reference and the compiled loop share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# A change counts as an improvement if the row's loss falls by more than this share of what its steps alone would add.
# This is far above the rounding of float64 and independent of the row's other inputs.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class CodeState:
    """A layer's rows, C-contiguous; changes write codes, coupling and loss in place.

    gram: [in, in] float32, entries of at most 1. codes: [rows, in] uint8, at most `most`. The value of a code c is
    scales[i, g] * (c - zeros[i, g]) / input_scale[j] in float32, g = group_of[j]: scales, zeros [rows, groups] and
    input_scale [in] float32, group_of [in] int64. movable: [rows, in] bool, False where a code is fixed. coupling:
    [rows, in] float64, E G with E = values - weight. loss: [rows] float64, E G E^T.
    """

    gram: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    input_scale: Tensor
    movable: Tensor
    coupling: Tensor
    loss: Tensor
    most: int
