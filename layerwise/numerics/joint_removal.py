"""Remove several weights of a row at once: the optimal brain surgeon with one linear system per row (Thanos)."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2**20  # entries of the systems that are solved together, 8 MB


def multipliers(weight: Tensor, gone: Tensor, inverse: Tensor) -> Tensor:
    """L [out, columns] float64, zero at kept weights: w - L K has the least loss of all rows with these weights zero.

    weight: [out, columns] float64. gone: [out, columns] bool, the weights to remove. inverse: K [columns, columns]
    float64, the columns' part of the inverse of the Gram. For a row that loses the set S, L_S solves L_S K_SS = w_S;
    rows that lose similar numbers are solved together.
    """
    counts = gone.sum(1)
    places = (~gone).to(torch.uint8).argsort(dim=1, stable=True)  # in each row, removed entries first
    order = counts.argsort(descending=True)
    found, done, sizes = torch.zeros_like(weight), 0, counts[order].tolist()
    while done < len(order) and sizes[done]:
        most = sizes[done]
        rows = order[done : done + max(LARGEST // most**2, 1)]
        at = places[rows, :most]  # [rows, most]
        used = torch.arange(most, device=at.device) < counts[rows, None]
        systems = inverse[at[:, :, None], at[:, None, :]] * (used[:, :, None] & used[:, None, :])
        systems.diagonal(dim1=1, dim2=2).add_((~used).double())  # padding of shorter rows
        aims = weight[rows].gather(1, at) * used
        solved = torch.cholesky_solve(aims[:, :, None], torch.linalg.cholesky(systems))[:, :, 0]
        found[rows] = torch.zeros_like(weight[rows]).scatter_(1, at, solved * used)
        done += len(rows)
    return found
