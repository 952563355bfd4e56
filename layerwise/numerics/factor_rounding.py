"""Round two low-rank factors to grids (Saha et al., LPLRFactorize). In turn, each is refitted to the other as rounded.

For M [out, in] and G the loss of B A is tr((M - B A) G (M - B A)^T). With A fixed, the best B is M G A^T (A G A^T)^-1,
and an error of B costs as in a layer whose inputs are A x, with the Gram A G A^T. With B fixed, the best A is
(B^T B)^-1 B^T M whatever G, and an error of A costs as in a layer with the Gram G where B's columns are orthonormal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.gram import Gram
from layerwise.contract.layer import Compressed, Layer, Quantised, Target
from layerwise.numerics import ops
from layerwise.numerics.column_rounding import ColumnRounding


@dataclass(frozen=True)
class RoundedFactors:
    """B [out, r] and A [r, in] float32 on their grids, their codes, and the loss tr((M - B A) G (M - B A)^T)."""

    left: Compressed
    right: Compressed
    loss: float

    @property
    def codes(self) -> tuple[Quantised | None, Quantised | None]:
        return self.left.quantised, self.right.quantised


def round_factors(
    missing: Tensor, layer: Layer, right: Tensor, target: Target, sweeps: int, compensate: bool
) -> RoundedFactors:
    """The best pair of all sweeps; a sweep fits and rounds B, and then A.

    missing: [out, in] float64, the matrix M. right: [r, in] float64, A before it is rounded. target: the grid of each
    factor as a layer of its own. compensate: whether columns are rounded one by one, with updates of the rest as in
    GPTQ, instead of to nearest.
    """
    gram, best = layer.gram.matrix.double(), None
    for _ in range(sweeps):
        inner = right @ gram @ right.T
        left = missing @ gram @ right.T @ torch.linalg.pinv((inner + inner.T) / 2, hermitian=True)
        gram_of_left = Gram(((inner + inner.T) / 2).float(), layer.gram.tokens)
        rounded_left = _rounded(left, gram_of_left, target, compensate)
        left = rounded_left.weight.double()
        rounded_right = _rounded(torch.linalg.pinv(left) @ missing, layer.gram, target, compensate)
        right = rounded_right.weight.double()
        lost = missing - left @ right
        loss = float(ops.inner(lost @ gram, lost).sum())
        if best is None or loss < best.loss:
            best = RoundedFactors(rounded_left, rounded_right, loss)
    assert best is not None  # at least one sweep
    return best


def _rounded(factor: Tensor, gram: Gram, target: Target, compensate: bool) -> Compressed:
    """The factor [rows, columns] float64 on a grid; gram: of its inputs."""
    weight = factor.float()
    if compensate and weight.numel():
        return ColumnRounding().round(Layer("factor", weight, gram), target)
    return ops.round_to_nearest(weight, target)
