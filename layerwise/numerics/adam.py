"""Adam, for methods that learn something about one layer."""

from __future__ import annotations

import torch
from torch import Tensor


class Adam:
    """Kingma and Ba's updates, as torch.optim.Adam's: the first use of that one in a process imports for a second."""

    def __init__(self, parts: list[Tensor]) -> None:
        self.parts, self.number = parts, 0
        self.means, self.squares = ([torch.zeros_like(part) for part in parts] for _ in range(2))

    def update(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        """Move the parts, in place, against their gradients."""
        self.number += 1
        for part, gradient, mean, square in zip(self.parts, gradients, self.means, self.squares, strict=True):
            mean.mul_(0.9).add_(gradient, alpha=0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            root = (square / (1 - 0.999**self.number)).sqrt() + 1e-8
            part.data.addcdiv_(mean, root, value=-rate / (1 - 0.9**self.number))
