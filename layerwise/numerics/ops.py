"""Operations shared by methods: masks of a target, quantisation grids, results in the contract's form.

Grids and the selection of largest scores are re-exported from `grids` and `selection`.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Target
from layerwise.kernels import selection as kernel
from layerwise.numerics import dispatch
from layerwise.numerics.grids import (
    Grid,
    book_of,
    dequantise,
    fit_and_round,
    fit_grid,
    fit_signed_grid,
    grouping,
    groups_of,
    official_awq_grid,
    quantised_values,
    values_by_rows,
)
from layerwise.numerics.patterns import ROWS
from layerwise.numerics.selection import grouped, keep_largest, keep_top_per_group

__all__ = [
    "Best",
    "Grid",
    "book_of",
    "damping_of",
    "dequantise",
    "fit_and_round",
    "fit_grid",
    "fit_signed_grid",
    "grouped",
    "grouping",
    "groups_of",
    "in_float64",
    "inner",
    "keep_largest",
    "keep_top_per_group",
    "keeping",
    "mask_objective",
    "masked",
    "normalised",
    "official_awq_grid",
    "quantised_values",
    "official_layer_mask",
    "prune_mask",
    "pruned",
    "pruned_by_norm",
    "round_to_nearest",
    "scaled",
    "values_by_rows",
]


def normalised(tensor: Tensor) -> tuple[Tensor, float]:
    """The tensor in float32 divided by a power of two, without rounding, so that entries are at most 1; and that power.

    Products of normalised weights and Grams neither overflow nor underflow, for any scale of the layer.
    Raises ValueError when an entry is not finite.
    """
    largest = max(abs(float(end)) for end in tensor.aminmax())
    if not math.isfinite(largest):
        raise ValueError("A layer's weight and Gram must be finite. Got NaN or infinity instead.")
    unit = 2.0 ** math.frexp(largest)[1]
    return scaled(tensor, 1 / unit), unit


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """The tensor [n, ...] times a factor, in float32, by products in float64 whose factors float32 may not hold.

    No more than ROWS rows are in float64 at once.
    """
    product = torch.empty_like(tensor, dtype=torch.float32)
    for own, part in zip(product.split(ROWS), tensor.split(ROWS), strict=True):
        own.copy_(part.double() * factor)
    return product


def in_float64(layer: Layer) -> tuple[Tensor, Tensor]:
    """Weight and Gram in float64, in which their products neither overflow nor underflow. Raises ValueError as
    above."""
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    if not (torch.isfinite(weight).all() and torch.isfinite(gram).all()):
        raise ValueError("A layer's weight and Gram must be finite. Got NaN or infinity instead.")
    return weight, gram


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b along each row, [out] float64. No more than ROWS rows are in float64 at once."""
    parts = zip(a.split(ROWS), b.split(ROWS), strict=True)
    return torch.cat([(one.double() * other.double()).sum(-1) for one, other in parts])


def prune_mask(score: Tensor, target: Target) -> Tensor:
    """Mask [out, in], True where kept, of the largest scores [out, in] in each comparison group of the target."""
    if target.sparsity == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if target.n_of_m:
        n_kept, group_size = target.n_of_m
        return keep_top_per_group(score, group_size, group_size - n_kept)
    if target.block:
        blocks = grouped(score, target.block, 0.0).sum(2)  # [out, blocks]
        mask = keep_largest(blocks, int(target.sparsity * blocks.shape[1]))
        return mask.repeat_interleave(target.block, 1)[:, : score.shape[1]]
    if target.pattern == "layer":
        return keep_largest(score.flatten(), int(target.sparsity * score.numel())).view_as(score)
    return keep_largest(score, int(target.sparsity * score.shape[1]))


def keeping(count: int, target: Target, shape: torch.Size) -> Target:
    """The target that keeps `count` entries, at least one, in the layer (pattern layer) or in each row (others)."""
    pattern, size = ("layer", shape.numel()) if target.pattern == "layer" else ("row", shape[1])
    return Target((size - count + 0.5) / size, pattern)  # + 0.5, so that floor() does not lose an entry to rounding


def mask_objective(weight: Tensor, gram: Tensor, mask: Tensor) -> float:
    """tr((W - W o M) G (W - W o M)^T) in float64."""
    lost = torch.where(mask, 0.0, weight).double()
    return float(inner(lost @ gram.double(), lost).sum())


def official_layer_mask(score: Tensor, sparsity: float) -> Tensor:
    """Mask of the released magnitude, RIA and SparseGPT code: prunes scores <= sorted[int(n p)], int(n p) + 1 and
    ties."""
    threshold = torch.sort(score.flatten()).values[int(score.numel() * sparsity)]
    return score > threshold


def pruned(layer: Layer, score: Tensor, target: Target) -> Compressed:
    """The layer's own weights where the scores [out, in] are largest: the result of every mask-only method."""
    return masked(layer, prune_mask(score, target), target)


def pruned_by_norm(layer: Layer, norm: Tensor, target: Target) -> Compressed:
    """The layer's own weights where |W| * norm is largest. norm: [in], nonnegative, one per input."""
    norm, _ = normalised(norm)  # |W| * norm overflows or underflows only if the weight does
    structure = target.structure if target.sparsity and dispatch.use_compiled(layer.weight) else "in torch"
    if structure == "row":
        return Compressed(*kernel.prune_lines(layer.weight, norm, int(target.sparsity * layer.weight.shape[1])))
    if structure == "layer" and (count := int(target.sparsity * layer.weight.numel())):
        return Compressed(*kernel.prune_layer(layer.weight, norm, count))
    if structure == "n:m" and target.n_of_m:
        n_kept, group_size = target.n_of_m
        return Compressed(*kernel.prune_groups(layer.weight, norm, group_size, group_size - n_kept))
    return pruned(layer, layer.weight.abs() * norm, target)


def masked(layer: Layer, mask: Tensor, target: Target) -> Compressed:
    """The layer's own weights where the mask [out, in] is True; all weights if the target prunes nothing."""
    return (
        Compressed(torch.where(mask, layer.weight, 0.0), mask) if target.sparsity else Compressed(layer.weight.clone())
    )


def damping_of(*results: Compressed) -> dict[str, float]:
    """`info` with the largest damping used for the results, if any."""
    used = [result.info["damping"] for result in results if "damping" in result.info]
    return {"damping": max(used)} if used else {}


def round_to_nearest(weight: Tensor, target: Target, mse: bool = False) -> Compressed:
    """The weight [out, in] rounded to a grid that is fitted to it. mse: as in fit_grid."""
    grid, codes, values = fit_and_round(weight, target, mse)
    return Compressed(values, quantised=grid.quantised(codes))


class Best:
    """The best of a method's sparse iterates, and the history of the best loss so far.

    In normalised units: dense and iterates [out, in] are W * norm / unit, gram [in, in] is G / (norm norm^T) / size.
    The loss tr((W - W_hat) G (W - W_hat)^T) of an iterate is then unit^2 * size * tr(E gram E^T), E = dense - iterate.
    """

    def __init__(self, dense: Tensor, gram: Tensor, norm: Tensor, unit: float, size: float) -> None:
        self.dense, self.gram, self.norm, self.unit, self.size = dense, gram.float(), norm, unit, size
        self.began = time.perf_counter()
        self.trace: list[tuple[int, float, float]] = []

    def offer(self, iteration: int, iterate: Tensor, mask: Tensor) -> None:
        """Keep the iterate [out, in], zero where its mask is False, if it is better than all before it."""
        lost = (self.dense - iterate).float()
        loss = self.unit**2 * self.size * float(inner(lost @ self.gram, lost).sum())
        if not self.trace or loss < self.trace[-1][2]:
            self.iterate, self.mask = iterate, mask
        else:
            loss = self.trace[-1][2]
        self.trace.append((iteration, time.perf_counter() - self.began, loss))

    def compressed(self, layer: Layer, damping: float) -> Compressed:
        """The best iterate in the layer's units; unchanged weights, and those of dead inputs, are taken from W."""
        weight = scaled(self.iterate / self.norm, self.unit)
        own = layer.gram.dead | (self.iterate == self.dense)
        weight = torch.where(self.mask, torch.where(own, layer.weight, weight), 0.0)
        return Compressed(weight, self.mask, trace=tuple(self.trace), info={"damping": damping})
