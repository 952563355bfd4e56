"""Methods that set codes one by one: QuantEase beside its published loop.

`python -m tests.benchmarks.bench_codes [inputs] [rows of the slow ones]` times what is compared in one run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.contract.layer import Layer, Target
from layerwise.numerics import ops

PASSES = 3  # of QuantEase's 30, which all cost about the same


def baseline_quantease(layer: Layer, target: Target, passes: int = PASSES) -> Tensor:
    """Weight [out, in] after so many passes as they are published: a product with a column of the Gram for each."""
    weight, gram = layer.weight, layer.gram.matrix
    grid, group_of = ops.fit_grid(weight, target), ops.groups_of(weight.shape[1], target.group)
    ratios = (gram / gram.diagonal()).fill_diagonal_(0.0)
    values = weight.clone()
    for number in range(passes):
        for j in range(len(gram)):
            best, group = weight[:, j] + (weight - values) @ ratios[:, j], group_of[j : j + 1]
            if number % 3 != 1 or number == passes - 1:
                best = grid.values(grid.codes(best[:, None], group), group)[:, 0]
            values[:, j] = best
    return values


def floor_quantease(layer: Layer, passes: int = PASSES) -> None:
    """One product of the weight and the Gram for each pass."""
    for _ in range(passes):
        torch.mm(layer.weight, layer.gram.matrix)
