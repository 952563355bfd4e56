"""Grids with unequal steps: four-bit floating-point numbers (e2m1), and a method's own code books."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from layerwise.contract.target import Target

LARGEST_LEVEL, LARGEST_SCALE = 6.0, 448.0  # largest numbers of e2m1 and of e4m3
NO_SCALE = 0.125  # the step of e4m3 at 1: the scale of a group whose own scale is rounded to zero
OFFSET, LEAST_EXPONENT = 127, -127  # an e8m0 scale is 2^(stored - 127)
SHRUNK = 80  # number of ranges tried by `mse`, as for integer grids
FORMAT_LEVELS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@dataclass(frozen=True, eq=False)
class CodeBook:
    """The value of each code, in units of its group's scale.

    levels: [codes] float32, with at least two different values.
    even_last_bit: whether a number halfway between two levels is rounded to the one with the even code, as for
    floating-point numbers; otherwise to the smaller level.
    """

    levels: Tensor
    even_last_bit: bool = False

    @cached_property
    def codes(self) -> Tensor:
        """[levels] int64, the codes in order of increasing level; for equal levels (0 and -0) only the first code."""
        order = self.levels.argsort(stable=True)
        level = self.levels[order]
        return order[torch.cat([torch.ones(1, dtype=torch.bool), level[1:] != level[:-1]])]

    @cached_property
    def rising(self) -> Tensor:
        """[levels] float32, the levels of `codes`."""
        return self.levels[self.codes]

    @cached_property
    def bounds(self) -> Tensor:
        """[levels - 1] float32: a number gets the level after the last bound that is not above it."""
        middle = (self.rising[:-1].double() + self.rising[1:].double()) / 2
        bound = middle.float()
        above = torch.nextafter(bound, torch.tensor(float("inf")))
        bound = torch.where(bound.double() < middle, above, bound)  # a float32 below the middle stays below the bound
        tied = bound.double() == middle  # the middle is a float32; it is rounded down unless the upper code is even
        stays = self.codes[1:] % 2 == 1 if self.even_last_bit else torch.ones_like(tied)
        return torch.where(tied & stays, above, bound)

    @cached_property
    def table(self) -> Tensor:
        """[3, levels] float32: `rising`, `codes`, and `bounds` after an unused first number."""
        return torch.stack([self.rising, self.codes.float(), torch.cat([self.rising[:1], self.bounds])])

    def nearest(self, numbers: Tensor) -> Tensor:
        """Code of the level nearest to each number, uint8 in the numbers' shape."""
        place = torch.bucketize(numbers, self.bounds.to(numbers.device), right=True)
        return self.codes.to(numbers.device)[place].to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """Level of each code, float32 in the codes' shape."""
        return self.levels.to(codes.device)[codes.long()]


# A code has a sign bit, two exponent bits and one mantissa bit. A negative level's code is its magnitude's code plus 8.
E2M1 = CodeBook(torch.tensor(FORMAT_LEVELS + [-level for level in FORMAT_LEVELS]), even_last_bit=True)


@dataclass(frozen=True)
class FormatScales:
    """Scales [out, groups] float32 of a format, and the tensor's divisor of all scales: [1] float32, or None."""

    scales: Tensor
    divisor: Tensor | None = None

    @property
    def steps(self) -> Tensor:
        """[out, groups] float32, the factor of a level."""
        return steps_of(self.scales, self.divisor)


def steps_of(scales: Tensor, divisor: Tensor | None) -> Tensor:
    """[out, groups] float32 scales / divisor."""
    return scales if divisor is None else scales / divisor


def fit_scales(weight: Tensor, target: Target, mse: bool = False) -> FormatScales:
    """Scales of the groups of weight [out, in] in the target's format, bit-identical to compressed-tensors.

    nvfp4: max|w| / 6 in units of 1 / divisor, rounded to e4m3; divisor = 6 * 448 / max|W|, one for the whole tensor.
    mxfp4: a power of two, 2^(e - 2) where max|w| rounded to three significant bits is in [2^e, 2^(e + 1)).
    mse: the best of 80 shrunken ranges, by the sum of |error|^2.4 (ties go to the first).
    """
    assert target.format and target.group
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % target.group)).unflatten(1, (-1, target.group))
    largest = groups.abs().amax(2)  # [out, groups]
    divisor = divisor_of(weight) if target.format == "nvfp4" else None
    best = scales_of(largest, divisor)
    if not mse:
        return FormatScales(best, divisor)
    exponent = -torch.frexp(largest).exponent[..., None]  # without this, |error|^2.4 of tiny weights would underflow
    least = torch.full_like(largest, float("inf"))
    for step in range(SHRUNK):
        scales = scales_of((1 - step / 100) * largest, divisor)
        steps = steps_of(scales, divisor)[..., None]
        lost = steps * E2M1.values(E2M1.nearest(groups / steps)) - groups
        error = torch.ldexp(lost, exponent).abs_().pow_(2.4).sum(2)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return FormatScales(best, divisor)


def divisor_of(weight: Tensor) -> Tensor:
    """[1] float32: 2688 times the reciprocal of max|W|, both rounded (a quotient may be an ulp off); 1 if that is
    infinite."""
    largest = weight.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    divisor = LARGEST_LEVEL * LARGEST_SCALE * largest.reciprocal()
    return torch.where(torch.isfinite(divisor), divisor, 1.0).reshape(1)


def scales_of(largest: Tensor, divisor: Tensor | None) -> Tensor:
    """The scales of groups with these largest magnitudes [out, groups]: e4m3 with a divisor, otherwise e8m0."""
    if divisor is None:
        # The bits added carry magnitudes of 1.75 x 2^e and more to 2^(e + 1).
        exponent = ((largest.contiguous().view(torch.int32) + (1 << 21)) >> 23) - OFFSET - 2
        return torch.ldexp(torch.ones_like(largest), exponent.clamp(min=LEAST_EXPONENT))
    scales = (divisor * (largest / LARGEST_LEVEL)).clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn).float()
    return torch.where(scales == 0, NO_SCALE, scales)


def expressible(scales: Tensor, target: Target) -> Tensor:
    """Bool in the scales' shape: whether the format can represent the scale."""
    if target.format == "nvfp4":
        return scales.clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn).float() == scales
    return torch.frexp(scales).mantissa == 0.5
