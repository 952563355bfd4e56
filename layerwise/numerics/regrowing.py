"""The cycles of DSnoT, compiled and in torch: each regrows a pruned weight of a row and prunes a kept one."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Layer, Statistics
from layerwise.kernels import regrowing as kernel
from layerwise.kernels.rows import array
from layerwise.numerics import dispatch

Trace = list[tuple[int, float, float]]


@dataclass(frozen=True)
class Rule:
    """The rule for a row's cycles, from DSnoT's parameters. group_size: m for n:m, 0 for row."""

    cycles: int
    threshold: float
    power: float
    exact: bool
    group_size: int


def refine(layer: Layer, statistics: Statistics, start: Tensor, rule: Rule) -> tuple[Tensor, Trace]:
    """Refined mask [out, in] and the trace of (cycle, time, loss), from the mask `start` [out, in]."""
    return (refine_compiled if dispatch.use_compiled(layer.weight) else refine_reference)(
        layer, statistics, start, rule
    )


def refine_compiled(layer: Layer, statistics: Statistics, start: Tensor, rule: Rule) -> tuple[Tensor, Trace]:
    """As `refine`, compiled. A row makes all its cycles before the next row begins, so all cycles have one end time."""
    began = time.perf_counter()
    divisor = statistics.sequence_variance.double() ** rule.power
    inputs = kernel.InputStatistics(*map(array, (statistics.mean.double(), divisor, layer.gram.diagonal.sqrt())))
    unit = 0.0 if rule.exact else 1 / statistics.length
    cycles = kernel.CycleRule(rule.group_size, rule.cycles, float(rule.threshold), unit, rule.exact)
    mask, losses = kernel.refine(layer.weight, start, inputs, cycles)
    ended = time.perf_counter()
    return mask, [(cycle, ended if cycle else began, loss) for cycle, loss in enumerate(losses)]


def refine_reference(layer: Layer, statistics: Statistics, start: Tensor, rule: Rule) -> tuple[Tensor, Trace]:
    """As `refine`, in torch."""
    exact, kept = rule.exact, start.clone()
    # [out, in] contribution of a weight to its row's mean output
    share = layer.weight.double() * statistics.mean.double()
    score = (layer.weight.abs() * layer.gram.diagonal.sqrt()).masked_fill(~kept, float("inf"))  # Wanda's score score
    lost = share.masked_fill(kept, 0.0)
    error = lost.sum(1, keepdim=True)  # [out, 1], the expected error over the length of a sequence
    limit = rule.threshold * (share.norm(dim=1, keepdim=True) if exact else 1 / statistics.length)
    lost = lost / statistics.sequence_variance.double() ** rule.power  # nan: dead input
    grow = torch.sort(lost.nan_to_num(0.0) if exact else lost, stable=True).indices  # nan sorts as the largest
    drop = drop_order(share, score, kept)
    grow_ends, drop_ends = ends(torch.full_like(error, kept.shape[1])), ends(kept.sum(1, keepdim=True))
    sign, active = error.sign(), torch.ones_like(kept[:, :1])
    best, best_error = kept.clone(), error.clone()
    trace = [(0, time.perf_counter(), float(best_error.square().sum()))]
    for cycle in range(1, rule.cycles + 1):
        grown = step(grow, grow_ends, error > 0)
        if rule.group_size:
            dropped = lowest_of_group(score, grown, rule.group_size)
        else:
            dropped = step(drop, drop_ends, error < 0)
        after = error + share.gather(1, dropped) - share.gather(1, grown)
        active &= (error.abs() > limit) & ~kept.gather(1, grown) & kept.gather(1, dropped)
        active &= (after.sign() == sign) if rule.group_size else True
        if not active.any():
            break
        kept.scatter_(1, dropped, kept.gather(1, dropped) & ~active)
        kept.scatter_(1, grown, kept.gather(1, grown) | active)
        score.scatter_(1, dropped, float("inf"))
        error = torch.where(active, after, error)
        better = error.abs() < best_error.abs() if exact else active
        best, best_error = torch.where(better, kept, best), torch.where(better, error, best_error)
        trace.append((cycle, time.perf_counter(), float(best_error.square().sum())))
    return best, trace


def drop_order(share: Tensor, score: Tensor, kept: Tensor) -> Tensor:
    """[out, in] kept inputs: negative shares from the left by ascending score, positive shares from the right."""
    rank, width = score.argsort(dim=1, stable=True).argsort(dim=1), kept.shape[1]
    key = torch.where(share < 0, rank, torch.where(share > 0, 3 * width - rank, width))
    return key.masked_fill(~kept, 4 * width).argsort(dim=1, stable=True)


def ends(length: Tensor) -> Tensor:
    """[out, 2] first and last position of lists of these lengths [out, 1]."""
    return torch.cat([torch.zeros_like(length), length - 1], 1).long()


def step(order: Tensor, pointers: Tensor, from_right: Tensor) -> Tensor:
    """[out, 1] input at each row's left or right pointer [out, 2], which advances; a pointer past its list stays."""
    side = from_right.long()
    at = pointers.gather(1, side)
    pointers.scatter_(1, side, (at + 1 - 2 * side).clamp(0, order.shape[1] - 1))
    return order.gather(1, at.clamp(min=0))


def lowest_of_group(score: Tensor, member: Tensor, size: int) -> Tensor:
    """[out, 1] input with the smallest score in the n:m group of `member` [out, 1]."""
    group = (member - member % size + torch.arange(size, device=member.device)).clamp(max=score.shape[1] - 1)
    return group.gather(1, score.gather(1, group).argmin(1, keepdim=True))
