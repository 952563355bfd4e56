"""Low-rank factors of a weight: the best factors for a Gram, the sum that they represent, and the least error.

For M [out, in] and G, the best B A of rank r minimises tr((M - B A) G (M - B A)^T). With G = L L^T it is
SVD_r(M L) L^-1 (Eckart and Young in the Gram's norm), and since SVD_r(M L) = U U^T M L, with U the r leading left
singular vectors of M L, it equals U (U^T M). This needs no inverse, so G may be singular.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.contract.gram import Gram
from layerwise.contract.layer import Compressed, LowRank, Quantised


def leading(matrix: Tensor, rank: int, gram: Tensor | None = None) -> Tensor:
    """[out, rank] float64, orthonormal: the leading left singular vectors U of M L, for M [out, in] and G = L L^T.

    gram: [in, in] float64, without eigenvalues below zero except by rounding; None is the identity. A rank above
    min(out, in) is reduced to that, without loss.
    """
    out, inputs = matrix.shape
    if out <= inputs:
        square = matrix @ (matrix if gram is None else matrix @ gram).T
        return torch.linalg.eigh((square + square.T) / 2)[1].flip(1)[:, :rank]
    image = matrix if gram is None else matrix @ root(gram)
    right = torch.linalg.eigh(image.T @ image)[1].flip(1)[:, :rank]  # [in, rank]
    return torch.linalg.qr(image @ right)[0]  # columns have decreasing size, and Q's first columns span the first ones


def root(gram: Tensor) -> Tensor:
    """L [in, in] float64 with L L^T = G, eigenvalues below zero are set to zero."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


def lifted_cholesky(gram: Tensor, least: float) -> Tensor:
    """Lower C [in, in] float64 with C C^T = G; if G has no factor, it is shifted so that its least eigenvalue is
    `least`."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        lift = least - float(torch.linalg.eigvalsh(gram)[0])
        lower = torch.linalg.cholesky(gram + lift * torch.eye(len(gram)).to(gram))
    return lower


def best_factors(matrix: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """B [out, rank] and A [rank, in] float64 with the least tr((M - B A) G (M - B A)^T); as `leading`."""
    left = leading(matrix, rank, gram)
    return left, left.T @ matrix


def product(low_rank: LowRank) -> Tensor:
    """[out, in] float32: S + B A, summed in float64 and rounded once."""
    total = low_rank.left.double() @ low_rank.right.double()
    return (total if low_rank.rest is None else total + low_rank.rest.double()).float()


def of_parts(
    left: Tensor,
    right: Tensor,
    rest: Compressed | None = None,
    info: Mapping[str, Any] | None = None,
    kept: Tensor | None = None,
    codes: tuple[Quantised | None, Quantised | None] = (None, None),
) -> Compressed:
    """The result made of factors of any float dtype and the part beside them. info: replaces that of the part.

    kept: [out, r] bool, for a sparse left factor. codes: those of which quantised factors are the values.
    """
    part_weight = None if rest is None else rest.weight
    low_rank = LowRank(left.float().contiguous(), right.float().contiguous(), part_weight, kept, *codes)
    told = info if info is not None or rest is None else rest.info
    part = Compressed(low_rank.left) if rest is None else rest
    return Compressed(product(low_rank), part.mask, part.quantised, low_rank, info=told or {})


def optimum(weight: Tensor, gram: Gram, rank: int) -> float:
    """The least tr((W - B A) G (W - B A)^T) over all B A of this rank, for W [out, in].

    It is the sum of the eigenvalues of W G W^T without the `rank` largest: exact up to rounding in float64, about 1e-15
    of the total.
    """
    matrix = weight.double()
    out, inputs = matrix.shape
    if out <= inputs:
        square = matrix @ gram.matrix.double() @ matrix.T
    else:
        image = matrix @ gram.once("low-rank root", lambda: root(gram.matrix.double()))
        square = image.T @ image
    values = torch.linalg.eigvalsh((square + square.T) / 2).clamp(min=0)
    return float(values[: max(len(values) - rank, 0)].sum())
