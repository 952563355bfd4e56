"""Pure projections that methods share: masks of a target, quantisation grids.

Ties are broken by index everywhere: of equal scores the one with the lower index is pruned first.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Quantised, Target
from layerwise.kernels import grids, select
from layerwise.numerics import dispatch


def normalised(tensor: Tensor) -> tuple[Tensor, float]:
    """The tensor in float32 with entries of at most 1, and the power of two that it was divided by (no rounding).

    Products of normalised weights and Grams neither over- nor underflow, whatever the layer's scale.
    Raises ValueError when an entry is not finite.
    """
    largest = float(tensor.abs().max())
    if not math.isfinite(largest):
        raise ValueError("A layer's weight and Gram must be finite, an entry that is not came.")
    unit = 2.0 ** math.frexp(largest)[1]
    return (tensor.double() / unit).float(), unit


def in_float64(layer: Layer) -> tuple[Tensor, Tensor]:
    """Weight and Gram in float64, where products of them neither over- nor underflow. Raises ValueError as above."""
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    if not (torch.isfinite(weight).all() and torch.isfinite(gram).all()):
        raise ValueError("A layer's weight and Gram must be finite, an entry that is not came.")
    return weight, gram


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a * b along each row, [out] float64."""
    return (a.double() * b.double()).sum(-1)


def prune_mask(score: Tensor, target: Target) -> Tensor:
    """Mask [out, in], True where kept, of the largest scores [out, in] in each comparison group of the target."""
    if target.sparsity == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if target.n_of_m:
        kept, of = target.n_of_m
        return keep_of_groups(score, of, of - kept)
    if target.block:
        blocks = grouped(score, target.block, 0.0).sum(2)  # [out, blocks]
        mask = keep_largest(blocks, int(target.sparsity * blocks.shape[1]))
        return mask.repeat_interleave(target.block, 1)[:, : score.shape[1]]
    if target.pattern == "layer":
        return keep_largest(score.flatten(), int(target.sparsity * score.numel())).view_as(score)
    return keep_largest(score, int(target.sparsity * score.shape[1]))


def keeping(count: int, target: Target, shape: torch.Size) -> Target:
    """The target at which `count` entries, at least one, are kept in the layer (layer) or in each row (others)."""
    pattern, size = ("layer", shape.numel()) if target.pattern == "layer" else ("row", shape[1])
    return Target((size - count + 0.5) / size, pattern)  # the half: floor() must not lose one to rounding


def mask_objective(weight: Tensor, gram: Tensor, mask: Tensor) -> float:
    """tr((W - W o M) G (W - W o M)t) in float64."""
    lost = torch.where(mask, 0.0, weight).double()
    return float(inner(lost @ gram.double(), lost).sum())


def official_layer_mask(score: Tensor, sparsity: float) -> Tensor:
    """Mask of the released magnitude, RIA and SparseGPT codes: scores <= sorted[int(n p)] go, int(n p) + 1 and ties."""
    threshold = torch.sort(score.flatten()).values[int(score.numel() * sparsity)]
    return score > threshold


def keep_largest(score: Tensor, pruned: int) -> Tensor:
    """Mask, True where kept, without the `pruned` smallest entries of each line along the last axis."""
    if pruned == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if dispatch.compiled(score):
        return select.keep_largest(score, pruned)
    threshold = score.kthvalue(pruned, dim=-1, keepdim=True).values
    mask = ~(score <= threshold)  # nan is kept, where it is seen: a weight that is not finite must not be pruned away
    spare = score.shape[-1] - pruned - mask.sum(-1, keepdim=True)  # how many of the entries equal to it stay
    if not spare.any():
        return mask
    equal = score == threshold
    return mask | equal & (equal.flip(-1).cumsum(-1).flip(-1) <= spare)  # those with the highest indices


def keep_of_groups(score: Tensor, of: int, pruned: int) -> Tensor:
    """Mask [out, in] without the `pruned` smallest of each `of` consecutive inputs; what the last lacks goes first."""
    if dispatch.compiled(score):
        return select.keep_of_groups(score, of, pruned)
    mask = keep_largest(grouped(score, of, float("-inf")), pruned)  # [out, groups, of]
    return mask.flatten(1)[:, : score.shape[1]]


def grouped(score: Tensor, length: int, value: float) -> Tensor:
    """[out, groups, length]: consecutive inputs in groups, the last one filled up with `value`."""
    missing = -score.shape[1] % length
    return torch.nn.functional.pad(score, (0, missing), value=value).unflatten(1, (-1, length))


def pruned(layer: Layer, score: Tensor, target: Target) -> Compressed:
    """The layer's own weights where the scores [out, in] are largest: what every mask-only method returns."""
    return masked(layer, prune_mask(score, target), target)


def pruned_by_norm(layer: Layer, norm: Tensor, target: Target) -> Compressed:
    """The layer's own weights where |W| * norm is largest; norm: [in] of each input, not negative."""
    norm, _ = normalised(norm)  # |W| * norm neither overflows nor underflows before the weight itself
    structure = target.structure if target.sparsity and dispatch.compiled(layer.weight) else "in torch"
    if structure == "row":
        return Compressed(*select.prune_lines(layer.weight, norm, int(target.sparsity * layer.weight.shape[1])))
    if structure == "layer" and (count := int(target.sparsity * layer.weight.numel())):
        return Compressed(*select.prune_layer(layer.weight, norm, count))
    if structure == "n:m":
        kept, of = target.n_of_m
        return Compressed(*select.prune_groups(layer.weight, norm, of, of - kept))
    return pruned(layer, layer.weight.abs() * norm, target)


def masked(layer: Layer, mask: Tensor, target: Target) -> Compressed:
    """The layer's own weights where the mask [out, in] is True; all of them when nothing is to be pruned."""
    return (
        Compressed(torch.where(mask, layer.weight, 0.0), mask) if target.sparsity else Compressed(layer.weight.clone())
    )


def damping_of(*results: Compressed) -> dict[str, float]:
    """`info` about the largest damping that the results were computed with, if any was."""
    used = [result.info["damping"] for result in results if "damping" in result.info]
    return {"damping": max(used)} if used else {}


@dataclass(frozen=True)
class Grid:
    """Integer grid: value = scale * (code - zero) with codes in [0, 2^bits - 1]; scales, zeros: [out, groups] float32.

    Grids and weight / scale are float32: bfloat16 weights land on rounding ties, which a float64 grid would flip.
    """

    scales: Tensor
    zeros: Tensor
    bits: int

    def codes(self, weight: Tensor, group_of: Tensor) -> Tensor:
        """[out, in] uint8 codes of weight [out, in], rounding half to even; group_of [in] names each input's group."""
        scales, zeros = self.scales[:, group_of], self.zeros[:, group_of]
        return (torch.round(weight / scales) + zeros).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def values(self, codes: Tensor, group_of: Tensor) -> Tensor:
        """[out, in] float32 values of the codes."""
        return dequantise(codes, self.scales, self.zeros, group_of)


def dequantise(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, input_scale: Tensor | None = None
) -> Tensor:
    """[out, in] float32: scales * (codes - zeros) / input_scale, each input with the scale and zero of its group."""
    values = scales[:, group_of] * (codes.float() - zeros[:, group_of])
    return values if input_scale is None else values / input_scale


def quantised_values(quantised: Quantised, target: Target) -> Tensor:
    """[out, in] float32 values of a layer's codes; those of pruned weights too."""
    groups = grouping(quantised, target)
    return dequantise(quantised.codes, quantised.scales, quantised.zeros, groups, quantised.input_scale)


def grouping(quantised: Quantised, target: Target) -> Tensor:
    """[in] int64, the group of each input of a quantised layer."""
    if quantised.group_of is not None:
        return quantised.group_of
    return groups_of(quantised.codes.shape[1], target.group, quantised.codes.device)


def groups_of(inputs: int, group: int | None, device: torch.device | None = None) -> Tensor:
    """[in] int64, group of each input when groups are runs of `group` consecutive inputs (None: one group)."""
    return torch.arange(inputs, device=device) // (group or inputs)


def fit_grid(weight: Tensor, target: Target, mse: bool = False) -> Grid:
    """Min-max grid of weight [out, in] per row and group, as in the GPTQ code's Quantizer.

    Asymmetric: the range is forced to include zero. Symmetric: unsigned codes, zero at 2^(bits - 1). mse: of 80 shrunk
    ranges the one with the smallest sum of |error|^2.4 (first best wins). A last group that is short stands alone.
    """
    assert target.bits is not None
    length = target.group or weight.shape[1]
    if dispatch.compiled(weight):
        return Grid(*grids.fit(weight, length, target.bits, target.symmetric, mse), target.bits)
    pieces = [_fit(piece, target.bits, target.symmetric, mse) for piece in weight.split(length, 1)]
    scales, zeros = (torch.stack(column, 1) for column in zip(*pieces, strict=True))
    return Grid(scales, zeros, target.bits)


def fit_and_round(weight: Tensor, target: Target, mse: bool = False) -> tuple[Grid, Tensor, Tensor]:
    """The grid fitted to weight [out, in], and the weight's codes and values [out, in] on it."""
    assert target.bits is not None
    length = target.group or weight.shape[1]
    if dispatch.compiled(weight):
        scales, zeros, codes, values = grids.fit_and_round(weight, length, target.bits, target.symmetric, mse)
        return Grid(scales, zeros, target.bits), codes, values
    grid, group_of = fit_grid(weight, target, mse), groups_of(weight.shape[1], target.group, weight.device)
    codes = grid.codes(weight, group_of)
    return grid, codes, grid.values(codes, group_of)


def round_to_nearest(weight: Tensor, target: Target, mse: bool = False) -> Compressed:
    """The weight [out, in] on the grid that is fitted to it; mse: as fit_grid has it."""
    grid, codes, values = fit_and_round(weight, target, mse)
    return Compressed(values, quantised=Quantised(codes, grid.scales, grid.zeros))


def _fit(piece: Tensor, bits: int, symmetric: bool, mse: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero, [out] each, of the rows of piece [out, length]."""
    low = piece.amin(1).clamp(max=0.0)
    high = piece.amax(1).clamp(min=0.0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    flat = (low == 0) & (high == 0)
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    best = _scale_and_zero(low, high, bits, symmetric)
    if not mse:
        return best
    least = torch.full_like(low, float("inf"))
    exponent = -torch.frexp(high - low).exponent[:, None]  # |error|^2.4 of tiny weights would underflow as it is
    for step in range(80):
        share = 1 - step / 100
        scale, zero = _scale_and_zero(share * low, share * high, bits, symmetric)
        grid = Grid(scale[:, None], zero[:, None], bits)
        only = torch.zeros(piece.shape[1], dtype=torch.int64, device=piece.device)
        error = torch.ldexp(grid.values(grid.codes(piece, only), only) - piece, exponent).abs_().pow_(2.4).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
    return best


def _scale_and_zero(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale = (high - low) / (2**bits - 1)
    # Weights so small that the step underflows are zero on any grid; a step of one keeps the division finite.
    scale = torch.where(scale > 0, scale, 1.0)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale, zero


def official_awq_grid(weight: Tensor, target: Target) -> Grid:
    """Asymmetric min-max grid of the released AWQ code: 0 is not forced into the range, which is at least 1e-5 wide.

    The zero point is clamped to the codes, so that a range without 0 is rounded to one end of the grid.
    """
    assert target.bits is not None
    scales, zeros, most = [], [], 2**target.bits - 1
    for piece in weight.split(target.group or weight.shape[1], 1):
        low, high = piece.aminmax(dim=1)
        scales.append((high - low).clamp(min=1e-5) / most)
        zeros.append((-torch.round(low / scales[-1])).clamp(0, most))
    return Grid(torch.stack(scales, 1), torch.stack(zeros, 1), target.bits)


class Best:
    """The best of a method's sparse iterates, and the path of the loss of the best so far.

    In normalised units: dense and iterates [out, in] are W * norm / unit, gram [in, in] is G / (norm normt) / size; the
    loss tr((W - What) G (W - What)t) of an iterate is then unit^2 * size * tr(E gram Et), E its distance to dense.
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
        """The best iterate in the layer's units; an untouched weight, and one of a dead input, is W's own."""
        weight = ((self.iterate / self.norm).double() * self.unit).float()
        own = layer.gram.dead | (self.iterate == self.dense)
        weight = torch.where(self.mask, torch.where(own, layer.weight, weight), 0.0)
        return Compressed(weight, self.mask, trace=tuple(self.trace), info={"damping": damping})
