"""What the factorisation of a Gram is made of (methods.base.Gram)."""

import torch
from torch import Tensor

INVERTED = 512  # rows of a factor that are inverted at once


def inverse_of_lower(lower: Tensor) -> Tensor:
    """Inverse [in, in] float32 of a lower triangular matrix in float64, by runs of rows.

    With A, its inverse known, above C and D, the run's rows, the inverse's are -D^-1 C A^-1 and D^-1.
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
