"""Fit quantisation grids to a weight, and round weights to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.contract.layer import Quantised, Target
from layerwise.kernels import grids as kernel
from layerwise.numerics import dispatch
from layerwise.numerics.code_books import E2M1, CodeBook, fit_scales, steps_of
from layerwise.numerics.patterns import ROWS
from layerwise.numerics.rotations import rotate_back


@dataclass(frozen=True)
class Grid:
    """Integer grid: value = scale * (code - zero) with codes in [0, 2^bits - 1]; scales, zeros: [out, groups] float32.

    Grids and weight / scale are float32: bfloat16 weights fall on rounding ties, which a float64 grid would break
    differently.
    book: for codes that do not represent integers; value = scale / divisor * level, and zeros are 0. divisor: [1]
    float32, or None for 1.
    """

    scales: Tensor
    zeros: Tensor
    bits: int
    book: CodeBook | None = None
    divisor: Tensor | None = None
    narrow: bool = False  # whether the largest code, 2^bits - 1, is unused

    @property
    def largest_code(self) -> int:
        return 2**self.bits - (2 if self.narrow else 1)

    @property
    def steps(self) -> Tensor:
        """[out, groups] float32, the factor of code - zero, or of a level."""
        return steps_of(self.scales, self.divisor)

    def codes(self, weight: Tensor, group_of: Tensor) -> Tensor:
        """[out, in] uint8 codes of weight [out, in], rounding half to even; group_of [in] is each input's group."""
        if self.book is not None:
            return self.book.nearest(weight / self.steps[:, group_of])
        scales, zeros = self.scales[:, group_of], self.zeros[:, group_of]
        return (torch.round(weight / scales) + zeros).clamp(0, self.largest_code).to(torch.uint8)

    def values(self, codes: Tensor, group_of: Tensor) -> Tensor:
        """[out, in] float32 values of the codes."""
        if self.book is not None:
            return self.steps[:, group_of] * self.book.values(codes)
        return dequantise(codes, self.scales, self.zeros, group_of)

    def quantised(self, codes: Tensor, group_of: Tensor | None = None, input_scale: Tensor | None = None) -> Quantised:
        """Codes [out, in] on this grid as a Quantised, the form in which a method returns them."""
        return Quantised(codes, self.scales, self.zeros, group_of, input_scale, self.divisor)


def dequantise(
    codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor, input_scale: Tensor | None = None
) -> Tensor:
    """[out, in] float32: scales * (codes - zeros) / input_scale, with each input's group scale and zero."""
    values = scales[:, group_of] * (codes.float() - zeros[:, group_of])
    return values if input_scale is None else values / input_scale


def quantised_values(quantised: Quantised, target: Target, values: Tensor | None = None) -> Tensor:
    """[out, in] float32 values of a layer's codes, including those of pruned weights. values: memory for them."""
    codes = quantised.codes
    if values is None:
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for rows, part in values_by_rows(quantised, target):
        values[rows] = part
    return values


def values_by_rows(quantised: Quantised, target: Target) -> Iterator[tuple[slice, Tensor]]:
    """The same, ROWS rows at a time, with their indices. A row's values do not depend on other rows."""
    for start in range(0, len(quantised.codes), ROWS):
        rows = slice(start, start + ROWS)
        part = {name: getattr(quantised, name)[rows] for name in ("codes", "scales", "zeros")}
        yield rows, _values(replace(quantised, **part), target)


def _values(quantised: Quantised, target: Target) -> Tensor:
    groups = grouping(quantised, target)
    book = book_of(quantised, target)
    if book is None:
        values = dequantise(quantised.codes, quantised.scales, quantised.zeros, groups, quantised.input_scale)
    else:
        values = steps_of(quantised.scales, quantised.divisor)[:, groups] * book.values(quantised.codes)
        values = values if quantised.input_scale is None else values / quantised.input_scale
    return values if quantised.rotation is None else rotate_back(values, quantised.rotation).float()


def book_of(quantised: Quantised, target: Target) -> CodeBook | None:
    """The code book of a layer: its own levels, or the numbers of the target's format; None for integer codes."""
    if quantised.levels is not None:
        return CodeBook(quantised.levels)
    return E2M1 if target.format else None


def grouping(quantised: Quantised, target: Target) -> Tensor:
    """[in] int64, the group of each input of a quantised layer."""
    if quantised.group_of is not None:
        return quantised.group_of
    return groups_of(quantised.codes.shape[1], target.group, quantised.codes.device)


def groups_of(inputs: int, group: int | None, device: torch.device | None = None) -> Tensor:
    """[in] int64, group of each input when groups are runs of `group` consecutive inputs (None: one group)."""
    return torch.arange(inputs, device=device) // (group or inputs or 1)


def fit_grid(weight: Tensor, target: Target, mse: bool = False) -> Grid:
    """Min-max grid of weight [out, in] per row and group, as in the GPTQ code's Quantizer; for a format, its scales.

    Asymmetric: the range is forced to include zero. Symmetric: unsigned codes, zero at 2^(bits - 1). mse: the best of
    80 shrunken ranges, by the sum of |error|^2.4 (ties go to the first). A short last group has its own grid.
    """
    assert target.bits is not None
    if target.format:
        fitted = fit_scales(weight, target, mse)
        return Grid(fitted.scales, torch.zeros_like(fitted.scales), target.bits, E2M1, fitted.divisor)
    length = target.group or weight.shape[1]
    if dispatch.use_compiled(weight):
        return Grid(*kernel.fit(weight, length, target.bits, target.symmetric, mse), target.bits)
    pieces = [_fit(piece, target.bits, target.symmetric, mse) for piece in weight.split(length, 1)]
    scales, zeros = (torch.stack(column, 1) for column in zip(*pieces, strict=True))
    return Grid(scales, zeros, target.bits)


def fit_signed_grid(weight: Tensor, target: Target, mse: bool = False) -> Grid:
    """Symmetric grid of weight [out, in] with the step max |w| / (2^(bits - 1) - 1): the range ends on codes.

    The lowest of the 2^bits codes lies outside the range. The zero is 2^(bits - 1). mse: as in `fit_grid`.
    """
    assert target.bits is not None
    pieces = [_fit(piece, target.bits, True, mse, True) for piece in weight.split(target.group or weight.shape[1], 1)]
    scales, zeros = (torch.stack(column, 1) for column in zip(*pieces, strict=True))
    return Grid(scales, zeros, target.bits)


def fit_and_round(weight: Tensor, target: Target, mse: bool = False) -> tuple[Grid, Tensor, Tensor]:
    """The grid fitted to weight [out, in], and the weight's codes and values [out, in] on it."""
    assert target.bits is not None
    length = target.group or weight.shape[1] or 1
    if not weight.numel():  # a factor of rank 0
        scales = weight.new_ones(len(weight), -(-weight.shape[1] // length))
        return Grid(scales, torch.zeros_like(scales), target.bits), weight.to(torch.uint8), weight.clone()
    if dispatch.use_compiled(weight) and not target.format:
        scales, zeros, codes, values = kernel.fit_and_round(weight, length, target.bits, target.symmetric, mse)
        return Grid(scales, zeros, target.bits), codes, values
    grid, group_of = fit_grid(weight, target, mse), groups_of(weight.shape[1], target.group, weight.device)
    codes = grid.codes(weight, group_of)
    return grid, codes, grid.values(codes, group_of)


def _fit(piece: Tensor, bits: int, symmetric: bool, mse: bool, signed: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero, [out] each, of the rows of piece [out, length]."""
    low = piece.amin(1).clamp(max=0.0)
    high = piece.amax(1).clamp(min=0.0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    flat = (low == 0) & (high == 0)
    low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
    best = _scale_and_zero(low, high, bits, symmetric, signed)
    if not mse:
        return best
    least = torch.full_like(low, float("inf"))
    exponent = -torch.frexp(high - low).exponent[:, None]  # |error|^2.4 of tiny weights would underflow as it is
    for step in range(80):
        share = 1 - step / 100
        scale, zero = _scale_and_zero(share * low, share * high, bits, symmetric, signed)
        grid = Grid(scale[:, None], zero[:, None], bits)
        only = torch.zeros(piece.shape[1], dtype=torch.int64, device=piece.device)
        error = torch.ldexp(grid.values(grid.codes(piece, only), only) - piece, exponent).abs_().pow_(2.4).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
    return best


def _scale_and_zero(low: Tensor, high: Tensor, bits: int, symmetric: bool, signed: bool) -> tuple[Tensor, Tensor]:
    scale = high / (2 ** (bits - 1) - 1) if signed else (high - low) / (2**bits - 1)
    # If weights are so small that the step underflows, they are zero on any grid; a step of one keeps the division
    # finite.
    scale = torch.where(scale > 0, scale, 1.0)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale, zero


def official_awq_grid(weight: Tensor, target: Target) -> Grid:
    """Asymmetric min-max grid of the released AWQ code: the range need not include 0 and is at least 1e-5 wide.

    The zero point is clamped to the codes, so that a range without 0 is rounded to one end of the grid.
    """
    assert target.bits is not None
    scales, zeros, most = [], [], 2**target.bits - 1
    for piece in weight.split(target.group or weight.shape[1], 1):
        low, high = piece.aminmax(dim=1)
        scales.append((high - low).clamp(min=1e-5) / most)
        zeros.append((-torch.round(low / scales[-1])).clamp(0, most))
    return Grid(torch.stack(scales, 1), torch.stack(zeros, 1), target.bits)
