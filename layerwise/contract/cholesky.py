"""The factorisation of a Gram (layerwise.contract.gram.Gram)."""

import torch
from torch import Tensor

RUN, INVERTED = 128, 512  # rows of a factor that are computed (and inverted) at once
PANEL = 64  # columns per panel of an in-place factorisation


def reversed_cholesky(matrix: Tensor, diagonal: Tensor) -> Tensor | None:
    """Lower M [in, in] float32 with Mt M = the symmetric matrix [in, in] with that diagonal [in] float64, or None.

    Computed in float64, by runs of rows from the last one up, after the products of the rows below are subtracted. None
    if the matrix is not positive definite or not finite.
    """
    exact = torch.empty_like(matrix, dtype=torch.float64)
    lower = torch.zeros_like(matrix)
    for end in range(len(matrix), 0, -RUN):
        start = max(end - RUN, 0)
        rows = exact[start:end, :end].copy_(matrix[start:end, :end])
        rows.diagonal(start).copy_(diagonal[start:end])
        rows.addmm_(exact[end:, start:end].T, exact[end:, :end], alpha=-1)
        # The reversed factor of the reversed block factorises the block: J A J = L Lt gives A = (J L J) (J Lt J).
        own, failed = torch.linalg.cholesky_ex(rows[:, start:].flip(0, 1))
        if failed or not torch.isfinite(own.diagonal()).all():
            return None
        rows[:, start:] = own.T.flip(0, 1)
        rows[:, :start] = torch.linalg.solve_triangular(rows[:, start:].T, rows[:, :start], upper=True)
        lower[start:end, :end] = rows
    return lower


def cholesky_in_place(matrices: Tensor) -> bool:
    """Overwrite symmetric matrices [u, n, n] with their lower Cholesky factors; False if one has none.

    Entries above the diagonal are undefined. Columns are processed in runs, after the products of the columns before
    are subtracted. Most of the work is matrix products, which run faster than LAPACK's factorisation at a few thousand
    rows.
    """
    size = matrices.shape[1]
    for start in range(0, size, PANEL):
        end = min(start + PANEL, size)
        panel = matrices[:, start:, start:end]
        if start:
            panel.baddbmm_(matrices[:, start:, :start], matrices[:, start:end, :start].mT, alpha=-1)
        own, failed = torch.linalg.cholesky_ex(panel[:, : end - start])
        if failed.any() or not torch.isfinite(own.diagonal(dim1=1, dim2=2)).all():
            return False
        panel[:, : end - start] = own
        if end < size:
            below = panel[:, end - start :]
            below.copy_(torch.linalg.solve_triangular(own.mT, below, upper=True, left=False))
    return True


def inverse_of_lower(lower: Tensor) -> Tensor:
    """Inverse [in, in] float32 of a lower triangular matrix, by runs of rows.

    Let A be the rows above, whose inverse is known, and let the run's rows be [C D]. Their inverse is [-D^-1 C A^-1,
    D^-1].
    """
    inverse = torch.zeros_like(lower, dtype=torch.float32)
    identity = torch.eye(min(INVERTED, len(lower)), dtype=lower.dtype, device=lower.device)
    for start in range(0, len(lower), INVERTED):
        end = min(start + INVERTED, len(lower))
        own = lower[start:end, start:end]
        inverse[start:end, start:end] = torch.linalg.solve_triangular(
            own, identity[: end - start, : end - start], upper=False
        )
        if start:
            before = torch.linalg.solve_triangular(
                lower[:start, :start], lower[start:end, :start], upper=False, left=False
            )
            inverse[start:end, :start] = torch.linalg.solve_triangular(own, before, upper=False).neg_()
    return inverse
