"""The comparison groups of a pattern, and the projection of relaxed masks on them: in torch, and compiled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.contract.target import Target
from layerwise.kernels import capped_simplex
from layerwise.kernels.rows import array, by_rows
from layerwise.numerics import dispatch, ops


def groups_of(target: Target, weight: Tensor) -> Groups:
    """The groups of a weight [out, in]; their projection is compiled on a CPU."""
    kind = CompiledGroups if dispatch.use_compiled(weight) else Groups
    return kind(target, weight.shape)


class Metric(NamedTuple):
    """curvature > 0 and 1 / curvature, in the shape that the groups need."""

    curvature: Tensor
    inverse: Tensor


class Groups:
    """The comparison groups of a pattern: `pruned` entries are removed in each group along one axis."""

    def __init__(self, target: Target, shape: torch.Size) -> None:
        self.target, self.shape = target, shape
        if target.n_of_m:
            kept, of = target.n_of_m
            starts = torch.arange(0, shape[1], of)
            self.pruned = ((shape[1] - starts).clamp(max=of) - kept).clamp(min=0)  # the last group may be incomplete
            self.axis = 0  # sums over an axis of length four are many times faster if it is not the last axis
        else:
            size = shape.numel() if target.pattern == "layer" else shape[1]
            self.pruned, self.axis = torch.tensor([int(target.sparsity * size)]), -1

    def split(self, entries: Tensor, filling: float) -> Tensor:
        """[out, in] as [m, out, groups], [out, in] or [out * in]; `filling` pads the last group of m."""
        if self.target.n_of_m:
            return ops.grouped(entries, self.target.n_of_m[1], filling).movedim(2, 0).contiguous()
        return entries.flatten() if self.target.pattern == "layer" else entries

    def join(self, entries: Tensor) -> Tensor:
        """[out, in], the inverse of `split`."""
        if self.target.n_of_m:
            return entries.movedim(0, 2).flatten(1)[:, : self.shape[1]]
        return entries.view(self.shape)

    def smallest(self, cost: Tensor) -> Tensor:
        """Scalar: the sum over the groups of the `pruned` smallest entries of cost [out, in]."""
        ordered = self.split(cost, float("inf")).movedim(self.axis, -1).sort(-1).values
        counted = torch.arange(ordered.shape[-1]) < self.pruned[:, None]
        return ordered.where(counted, 0.0).sum()

    def metric(self, curvature: Tensor) -> Metric:
        """The metric of curvature > 0 [out, in], as `project` needs it."""
        return Metric(self.split(curvature, 1.0), self.split(1 / curvature, 0.0))  # no price prunes the padding

    def project(self, point: Tensor, metric: Metric, price: Tensor) -> tuple[Tensor, Tensor]:
        """Project a point: p in [0, 1] [out, in] whose groups sum to their counts, nearest to the point in the metric.
        Also returns the prices of the groups: p = clip(point - price / curvature), by Newton's method.

        price: starting value, such as the price of a similar point.
        """
        point, wanted = self.split(point, -1.0), self.pruned.to(point)  # -1: padding is never pruned
        low = ((point - 1) * metric.curvature).amin(self.axis, keepdim=True)  # everything is pruned at this price ...
        high = (point * metric.curvature).amax(self.axis, keepdim=True)  # ... and nothing at this
        price, enough = price.clamp(low, high), capped_simplex.ENOUGH * point.shape[self.axis]
        for _ in range(capped_simplex.NEWTON_STEPS):
            free = point - price * metric.inverse
            excess = free.clamp(0, 1).sum(self.axis, keepdim=True) - wanted
            left = excess.abs() > enough
            if not left.any():
                break
            low, high = torch.where(excess > 0, price, low), torch.where(excess > 0, high, price)
            slope = (metric.inverse * ((free > 0) & (free < 1))).sum(self.axis, keepdim=True)
            newton = price + excess / slope
            moved = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
            price = torch.where(left, moved, price)
        return self.join((point - price * metric.inverse).clamp(0, 1)), price


class CompiledGroups(Groups):
    """As Groups, group by group; for the pattern layer, one group after another."""

    def metric(self, curvature: Tensor) -> Metric:
        curvature = curvature.contiguous()
        return Metric(curvature, 1 / curvature)

    def project(self, point: Tensor, metric: Metric, price: Tensor) -> tuple[Tensor, Tensor]:
        lines = (1, -1) if self.target.pattern == "layer" else tuple(self.shape)
        size = self.target.n_of_m[1] if self.target.n_of_m else point.view(lines).shape[1]
        relaxed = point.clone(memory_format=torch.contiguous_format).view(lines)
        prices = price.expand(len(relaxed), len(self.pruned)).contiguous()
        arrays = (array(x.view(lines)) for x in metric)
        by_rows(
            capped_simplex.project_rows, relaxed.shape, array(relaxed), *arrays, array(prices), array(self.pruned), size
        )
        return relaxed.view(self.shape), prices
