"""The step that ALPS and ADMM repeat: least squares pulled towards a sparse weight, and a multiplier of their distance.

B minimises tr((B - W) A (B - W)^T) + rho |B - D + U|^2, D is Y = B + U where a mask keeps it, and U, the multiplier
over rho, becomes Y - D. So Y and the mask hold both D and U: Y where kept, and Y where pruned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layerwise.contract.second_moment import add_products, mirror

# Up to this penalty products are in float32, in coordinates in which A has a diagonal of about one. After 30 steps the
# error differs by at most 6e-5 from that in float64, even if inputs are 1e4 times as large as others or A has not full
# rank. At larger penalties B - D, of the size of A / rho, is lost in the rounding of B. A small penalty needs no
# float64, since W A has cancelled.
LARGEST_FLOAT32 = 1e3


def precision(rho: float) -> torch.dtype:
    """The dtype of a step's matrices and products at a penalty."""
    return torch.float32 if rho <= LARGEST_FLOAT32 else torch.float64


class Splitting:
    """The iterates of a layer: B, Y and the mask of D, [out, in], in the dtype of the penalty's `precision`.

    dense: W [out, in] float64. both: Y to begin with. resolvent(rho, dtype): rho (A + rho I)^-1 [in, in].
    """

    def __init__(
        self, dense: Tensor, both: Tensor, mask: Tensor, rho: float, resolvent: Callable[[float, torch.dtype], Tensor]
    ) -> None:
        self.dense, self.both, self.mask, self.rho, self.resolvent = dense, both, mask, rho, resolvent
        self.weight = dense
        self._begin()

    def _begin(self) -> None:
        """Convert the matrices for the penalty, and compute its resolvent."""
        dtype = precision(self.rho)
        self.near, self.both, self.matrix = self.dense.to(dtype), self.both.to(dtype), self.resolvent(self.rho, dtype)

    @property
    def sparse(self) -> Tensor:
        """D [out, in]."""
        return self.both * self.mask  # a fifth of the time of torch.where and masked_fill

    @property
    def multiplier(self) -> Tensor:
        """U [out, in]."""
        return self.both * ~self.mask

    def restart(self, both: Tensor, mask: Tensor) -> None:
        """Begin again at another Y and mask [out, in]."""
        self.both, self.mask = both.to(self.both.dtype), mask

    def set_penalty(self, rho: float) -> None:
        """Go on with another penalty; the multiplier, rho U, stays."""
        if rho != self.rho:
            self.both = self.sparse.add_(self.multiplier, alpha=self.rho / rho)
            self.rho = rho
            self._begin()

    def step(self) -> None:
        """Update B and Y. B is W + (D - U - W) rho (A + rho I)^-1: one product, in which W A, the largest part of the
        right-hand side, has cancelled."""
        multiplier = self.multiplier
        pull = (self.both - self.near).sub_(multiplier, alpha=2)
        self.weight = torch.addmm(self.near, pull, self.matrix)
        self.both = multiplier.add_(self.weight)


def resolvent_of(eigenvalues: Tensor, vectors: Tensor, rho: float, dtype: torch.dtype) -> Tensor:
    """[in, in] rho (A + rho I)^-1 from the eigendecomposition of A; half of the entries are multiplied."""
    root = (vectors * (rho / (eigenvalues + rho)).sqrt()).to(dtype).T.contiguous()
    total = torch.zeros_like(root)
    add_products(total, root)
    mirror(total)
    return total
