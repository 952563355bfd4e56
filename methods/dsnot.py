"""DSnoT: prune and regrow, one swap per row and cycle, until a row's mean output is what it was (Zhang et al., 2023).

The expected error of a row is the sum of W_ij * sum_t(x_tj) over its pruned weights. Each cycle regrows the pruned one
that reduces it most per unit of variance, and prunes the kept weight of smallest Wanda score whose loss reduces it too.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels import regrow
from methods import ops, paths
from methods.base import Compressed, Layer, Method, Statistics, Target

CARD = {
    "title": "DSnoT",
    "paper": "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
    "arxiv": "2310.08915",
    "code": "https://github.com/zyxxmu/DSnoT",
    "patterns": ["row", "n:m"],
    "bits": [],
    "updates_weights": False,
    "needs": ["gram", "mean", "sequence_variance"],
    "criterion": "own",
    "parameters": {
        "warm_start": {"format": "method", "description": "Method whose mask is refined."},
        "cycles": {"type": "integer", "minimum": 0, "description": "Largest number of swaps per row."},
        "threshold": {"type": "number", "minimum": 0, "description": "|expected error| at which a row is done."},
        "power": {"type": "number", "minimum": 0, "description": "Exponent of the variance in the regrowing score."},
        "skip": {"type": "string", "description": "Layers with this in the name keep the warm start's mask; '': none."},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: threshold in norms of the row's W_ij mean_j, best state. official: absolute, last.",
        },
    },
}

Trace = list[tuple[int, float, float]]


@dataclass(frozen=True)
class DSnoT(Method):
    """Refines the mask of `warm_start`, n:m within its groups. Precondition: `layer.statistics`.

    trace: the loss on the mean activation alone, ||(W - What) mean||^2. In the released code a row that is done still
    moves its pointers and resets what they meet, which can break the pattern; here it, or one out of swaps, rests.
    """

    warm_start: Any = "wanda"
    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    skip: str = "mlp"
    convention: str = "exact"

    def compress(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        ops.require("dsnot", CARD, target)
        if target.sparsity == 0:
            return Compressed(layer.weight.clone())
        if layer.statistics is None:
            raise ValueError(f"dsnot needs mean and sequence_variance, but {layer.name} has no statistics.")
        began = time.perf_counter()
        start = self.warm_start.compress(layer, target, rng).mask
        if self.skip and self.skip in layer.name:
            return ops.masked(layer, start, target)
        refined = self.in_compiled_code if paths.compiled(layer.weight) else self.in_torch
        mask, trace = refined(layer, layer.statistics, start, target.n_of_m[1] if target.n_of_m else 0)
        return replace(ops.masked(layer, mask, target), trace=tuple((t, at - began, loss) for t, at, loss in trace))

    def in_compiled_code(self, layer: Layer, statistics: Statistics, start: Tensor, of: int) -> tuple[Tensor, Trace]:
        """As `in_torch`, but that a row makes all its cycles before the next one begins: they end at one time."""
        began, official = time.perf_counter(), None if self.convention == "exact" else 1 / statistics.length
        mean, spread = statistics.mean.double(), statistics.sequence_variance.double() ** self.power
        norm = layer.gram.diagonal.sqrt()
        mask, losses = regrow.refine(layer.weight, start, mean, spread, norm, of, self.cycles, self.threshold, official)
        ended = time.perf_counter()
        return mask, [(cycle, ended if cycle else began, loss) for cycle, loss in enumerate(losses)]

    def in_torch(self, layer: Layer, statistics: Statistics, start: Tensor, of: int) -> tuple[Tensor, Trace]:
        """Mask [out, in] and (cycle, time, loss) rows from the mask of the start; of: m of n:m, 0 of row."""
        exact, kept = self.convention == "exact", start.clone()  # changed in place
        share = layer.weight.double() * statistics.mean.double()  # [out, in] of a weight in its row's mean output
        score = (layer.weight.abs() * layer.gram.diagonal.sqrt()).masked_fill(~kept, float("inf"))  # Wanda's
        lost = share.masked_fill(kept, 0.0)
        error = lost.sum(1, keepdim=True)  # [out, 1], the expected error over the length of a sequence
        limit = self.threshold * (share.norm(dim=1, keepdim=True) if exact else 1 / statistics.length)
        lost = lost / statistics.sequence_variance.double() ** self.power  # nan: dead
        grow = torch.sort(lost.nan_to_num(0.0) if exact else lost, stable=True).indices  # nan is the largest
        drop = drop_order(share, score, kept)
        grow_ends, drop_ends = ends(torch.full_like(error, kept.shape[1])), ends(kept.sum(1, keepdim=True))
        sign, active = error.sign(), torch.ones_like(kept[:, :1])
        best, best_error = kept.clone(), error.clone()
        trace = [(0, time.perf_counter(), float(best_error.square().sum()))]
        for cycle in range(1, self.cycles + 1):
            grown = step(grow, grow_ends, error > 0)
            dropped = lowest_of_group(score, grown, of) if of else step(drop, drop_ends, error < 0)
            after = error + share.gather(1, dropped) - share.gather(1, grown)
            active &= (error.abs() > limit) & ~kept.gather(1, grown) & kept.gather(1, dropped)
            active &= (after.sign() == sign) if of else True
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
    """[out, in] kept inputs, from the left those of negative share by ascending score, from the right the positive."""
    rank, width = score.argsort(dim=1, stable=True).argsort(dim=1), kept.shape[1]
    key = torch.where(share < 0, rank, torch.where(share > 0, 3 * width - rank, width))
    return key.masked_fill(~kept, 4 * width).argsort(dim=1, stable=True)


def ends(length: Tensor) -> Tensor:
    """[out, 2] first and last position of lists of these lengths [out, 1]."""
    return torch.cat([torch.zeros_like(length), length - 1], 1).long()


def step(order: Tensor, pointers: Tensor, from_right: Tensor) -> Tensor:
    """[out, 1] input at each row's left or right pointer [out, 2], which moves on; a pointer past its list stays."""
    side = from_right.long()
    at = pointers.gather(1, side)
    pointers.scatter_(1, side, (at + 1 - 2 * side).clamp(0, order.shape[1] - 1))
    return order.gather(1, at.clamp(min=0))


def lowest_of_group(score: Tensor, member: Tensor, of: int) -> Tensor:
    """[out, 1] input of the smallest score in the n:m group of `member` [out, 1]."""
    group = (member - member % of + torch.arange(of, device=member.device)).clamp(max=score.shape[1] - 1)
    return group.gather(1, score.gather(1, group).argmin(1, keepdim=True))
