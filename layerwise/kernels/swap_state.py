"""A layer's rows while they swap: the state that the torch reference and the compiled loop share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# A swap counts as an improvement if the row's loss falls by more than this share of the sum of w_j^2 G_jj over the
# pruned entries. This is far above the rounding of float64, so no row can cycle, and independent of the kept inputs.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class SwapState:
    """A layer's rows, C-contiguous; swaps change mask, coupling and loss in place.

    weight [rows, in] and gram [in, in]: float32, entries of at most 1. mask: [rows, in], True where kept. coupling:
    [rows, in] float64, G q for the pruned part q. loss: [rows] float64, q^T G q. length: m of n:m, None for whole rows.
    """

    weight: Tensor
    gram: Tensor
    mask: Tensor
    coupling: Tensor
    loss: Tensor
    length: int | None
