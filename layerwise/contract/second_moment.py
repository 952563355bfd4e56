"""Means of x xt and of y xt over tokens, summed part by part: float32 products of RUN tokens, totals in float64."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 4096  # tokens whose products are summed in float32
NARROW_PANEL, WIDEST_PANEL, NARROW_BELOW = 128, 256, 2048  # of a symmetric product, and the inputs that ask for each


class _Products:
    """Sums of products [in, in], independent of how whole runs of tokens are batched."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.run = torch.zeros(features, features, dtype=torch.float32, device=device)  # its missing part so far
        self.in_run = 0  # tokens
        self.tokens = 0

    def _room(self, tokens: int) -> None:
        """Make room in the run for a part of so many tokens."""
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
    """Accumulates the second moment of inputs; the sums are those above the diagonal."""

    def update(self, inputs: Tensor) -> None:
        """Add inputs [tokens, in] of any float dtype; a part of them at a time is copied to float32."""
        for part in inputs.detach().split(RUN):
            self._room(len(part))
            add_products(self.run, part.float())

    def finish(self) -> Tensor:
        matrix = super().finish()
        mirror(matrix)
        return matrix


class CrossMoment(_Products):
    """Accumulates the mean of y xt, of what two models give for the same tokens; row: entry of y, column: of x."""

    def update(self, dense: Tensor, inputs: Tensor) -> None:
        """Add y and x [tokens, in] of any float dtype."""
        for others, part in zip(dense.detach().split(RUN), inputs.detach().split(RUN), strict=True):
            self._room(len(part))
            self.run.addmm_(others.float().T, part.float())


def add_to(total: Tensor, run: Tensor) -> None:
    """Add float32 to float64 in place, in parts: torch would take a float64 copy of the whole."""
    for rows, others in zip(total.split(WIDEST_PANEL), run.split(WIDEST_PANEL), strict=True):
        rows += others


def mirror(matrix: Tensor) -> None:
    """Make a square matrix symmetric in place: what lies below the diagonal is what lies above."""
    for start in range(0, len(matrix), WIDEST_PANEL):
        panel = matrix[start:, start : start + WIDEST_PANEL]
        upper = matrix[start : start + WIDEST_PANEL, start:]
        corner = upper[:, : len(upper)].triu()
        upper[:, : len(upper)] = corner + corner.triu(1).T
        panel.copy_(upper.T.clone())


def add_products(total: Tensor, x: Tensor) -> None:
    """Add X^T X of x [tokens, in] to total [in, in], of which what lies below its diagonal is left undefined.

    Panel by panel from the diagonal on: half the work of the whole product, and what the panels have too much.
    """
    inputs = x.shape[1]
    width = NARROW_PANEL if inputs < NARROW_BELOW and x.device.type == "cpu" else WIDEST_PANEL
    for start in range(0, inputs, width):
        total[start : start + width, start:].addmm_(x[:, start : start + width].T, x[:, start:])
