"""Means of x xt and of y xt over tokens, summed in parts: float32 products of RUN tokens, totals in float64."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 4096  # tokens whose products are summed in float32
# panel widths of a symmetric product, and the number of inputs below which it is narrow
NARROW_PANEL, WIDEST_PANEL, NARROW_BELOW = 128, 256, 2048


class _Products:
    """Sums of products [in, in], independent of the batching of whole runs of tokens."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(features, features, dtype=torch.float64, device=device)
        # the sum of the current, incomplete run
        self.run = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.in_run = 0  # tokens in the run in the run
        self.tokens = 0

    def _room(self, tokens: int) -> None:
        """Make room in the run for a part with this many tokens."""
        if self.in_run + tokens > RUN:
            self._end_run()
        self.in_run += tokens
        self.tokens += tokens

    def _end_run(self) -> None:
        add_to(self.total, self.run)
        self.run.zero_()
        self.in_run = 0

    def finish(self) -> Tensor:
        """[in, in] float32, the mean over the tokens on the device of the inputs; the accumulated sums are freed."""
        self._end_run()
        matrix = self.run.copy_(self.total.div_(self.tokens))
        del self.total, self.run
        return matrix


class SecondMoment(_Products):
    """Accumulates the second moment of inputs; only entries above the diagonal are summed."""

    def update(self, inputs: Tensor) -> None:
        """Add inputs [tokens, in] of any float dtype; they are copied to float32 in parts."""
        for part in inputs.detach().split(RUN):
            self._room(len(part))
            add_products(self.run, part.float())

    def finish(self) -> Tensor:
        matrix = super().finish()
        mirror(matrix)
        return matrix


class CrossMoment(_Products):
    """Accumulates the mean of y xt, the inputs of the same tokens in two models. Rows: entries of y. Columns: of x."""

    def update(self, dense: Tensor, inputs: Tensor) -> None:
        """Add y and x [tokens, in] of any float dtype."""
        for others, part in zip(dense.detach().split(RUN), inputs.detach().split(RUN), strict=True):
            self._room(len(part))
            self.run.addmm_(others.float().T, part.float())


def add_to(total: Tensor, run: Tensor) -> None:
    """Add float32 to float64 in place, in parts; otherwise torch would make a float64 copy of the whole matrix."""
    for rows, others in zip(total.split(WIDEST_PANEL), run.split(WIDEST_PANEL), strict=True):
        rows += others


def mirror(matrix: Tensor) -> None:
    """Make a square matrix symmetric in place: copy the entries above the diagonal to below it."""
    for start in range(0, len(matrix), WIDEST_PANEL):
        panel = matrix[start:, start : start + WIDEST_PANEL]
        upper = matrix[start : start + WIDEST_PANEL, start:]
        corner = upper[:, : len(upper)].triu()
        upper[:, : len(upper)] = corner + corner.triu(1).T
        panel.copy_(upper.T.clone())


def add_products(total: Tensor, x: Tensor) -> None:
    """Add X^T X of x [tokens, in] to total [in, in]; entries below the diagonal are left undefined.

    It computes panel by panel from the diagonal on: half the work of the whole product, plus the panels' overlap.
    """
    inputs = x.shape[1]
    width = NARROW_PANEL if inputs < NARROW_BELOW and x.device.type == "cpu" else WIDEST_PANEL
    for start in range(0, inputs, width):
        total[start : start + width, start:].addmm_(x[:, start : start + width].T, x[:, start:])
