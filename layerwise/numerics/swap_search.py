"""SparseSwaps' search: repeatedly make the swap of a kept weight u for a pruned one p that lowers a row's loss most.

The change is cost_u + gain_p - 2 w_u w_p G_up. Each search is called with cost [rows, in], inf where pruned,
gain [rows, in], inf where kept, and weight [rows, in], all float32, and returns u and p, [rows] each. Ties go to the
lowest u, then the lowest p. It returns 0 and 0 if no change is below zero.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from layerwise.kernels import swap_search as kernel
from layerwise.kernels.swap_state import TOLERANCE, SwapState
from layerwise.numerics import dispatch

CANDIDATES = 32  # number of kept weights of a row tried at once
ENTRIES = 2**22  # approximate number of pairs whose change is in memory at once


def swap_rounds(rows: SwapState, swaps: int | None) -> Iterator[tuple[float, float, int]]:
    """Rounds in which every row that can improve makes its best swap, at most `swaps` rounds (None: no limit).

    After each round it yields the seconds since the call, the loss of all rows, and the number of swaps in the round
    (at least one). It is compiled on a CPU and runs in torch elsewhere. The swaps are the same, except for ties on
    devices whose minimum picks any of the equal entries.
    """
    return (kernel.swap_rounds if dispatch.use_compiled(rows.weight) else reference_rounds)(rows, swaps)


def reference_rounds(rows: SwapState, swaps: int | None) -> Iterator[tuple[float, float, int]]:
    """As `swap_rounds`, in torch on any device."""
    start = time.perf_counter()
    weight, gram, mask, coupling = rows.weight.double(), rows.gram.double(), rows.mask, rows.coupling
    alone = weight**2 * gram.diagonal()  # [rows, in] loss of removing each weight alone
    search = GroupSearch(rows.gram, rows.length) if rows.length else RowSearch(rows.gram)
    left = torch.arange(len(weight), device=weight.device)  # rows that may still improve
    made = 0
    while swaps is None or made < swaps:
        w, c, kept, single = weight[left], coupling[left], mask[left], alone[left]
        cost = torch.where(kept, single + 2 * w * c, torch.inf)  # cost of pruning a kept weight
        gain = torch.where(kept, torch.inf, single - 2 * w * c)  # gain of restoring a pruned one
        u, p = search(cost.float(), gain.float(), rows.weight[left])
        line = torch.arange(len(left), device=left.device)
        change = cost[line, u] + gain[line, p] - 2 * w[line, u] * w[line, p] * gram[u, p]
        better = change < -TOLERANCE * torch.where(kept, 0.0, single).sum(1)
        left, u, p = left[better], u[better], p[better]
        if not len(left):
            return
        mask[left, u], mask[left, p] = False, True
        coupling[left] += weight[left, u, None] * gram[u] - weight[left, p, None] * gram[p]
        rows.loss[left] += change[better]
        made += 1
        yield time.perf_counter() - start, float(rows.loss.sum()), len(left)


class RowSearch:
    """Best pair of each row. There are in^2 pairs per row, so kept weights are tried in the order of a lower bound.

    Let s_j = |w_j| sqrt(G_jj), and let r_u be the largest |correlation| of u with another input. Then 2 w_u w_p G_up is
    at most 2 r_u s_u s_p, so no pair with u is better than cost_u + f(r_u s_u), where f(t) = min_p gain_p - 2 t s_p. f
    is concave, so its chords between evaluated points lie below it. A row is done when no remaining bound is below its
    best pair.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        self.root = gram.diagonal().clamp(min=0).sqrt().clamp(min=1e-30)
        self.steepest = self.gram.abs() / self.root  # r_u sqrt(G_uu) below
        self.steepest = self.steepest.fill_diagonal_(0.0).amax(1)

    def __call__(self, cost: Tensor, gain: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Kept u and pruned p, [rows] each, of the smallest change."""
        size = max(ENTRIES // (CANDIDATES * cost.shape[1]), 1)
        parts = [self.part(*part) for part in zip(*(x.split(size) for x in (cost, gain, weight)), strict=True)]
        u, p = (torch.cat(column) for column in zip(*parts, strict=True))
        return u, p

    def part(self, cost: Tensor, gain: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        bound, order = self.bound(cost, gain, weight).sort(1)
        best = torch.zeros_like(bound[:, 0])
        u, p = torch.zeros_like(order[:, 0]), torch.zeros_like(order[:, 0])
        rows = torch.arange(len(cost), device=cost.device)
        for start in range(0, cost.shape[1], CANDIDATES):
            rows = rows[(bound[rows, start] <= best[rows]) & (bound[rows, start] < 0)]
            if not len(rows):
                break
            tried = order[rows, start : start + CANDIDATES].sort(1).values  # [rows, candidates]
            factor = -2 * weight[rows].gather(1, tried)
            change = self.gram[tried] * weight[rows, None] * factor[..., None]  # [rows, candidates, in]
            change += gain[rows, None]
            least, partner = change.min(2)
            least, which = (least + cost[rows].gather(1, tried)).min(1)
            line = torch.arange(len(rows), device=rows.device)
            new_u, new_p = tried[line, which], partner[line, which]
            better = (least < best[rows]) | (least == best[rows]) & (new_u < u[rows])
            chosen = rows[better]
            best[chosen], u[chosen], p[chosen] = least[better], new_u[better], new_p[better]
        return u, p

    def bound(self, cost: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
        """[rows, in] lower bound on the change of the loss by any pair with each kept weight."""
        size = weight.abs() * self.root  # [rows, in] s
        slope = weight.abs() * self.steepest  # r s
        ends = torch.linspace(0, 1, 9, device=cost.device) * slope.amax(1, keepdim=True)  # [rows, 9] values of t
        values = torch.stack([(gain - 2 * t[:, None] * size).amin(1) for t in ends.unbind(1)], 1)
        width = ends[:, 1:2].clamp(min=1e-30)
        left = (slope / width).long().clamp(0, 7)
        share = (slope / width - left).clamp(0, 1)
        low, high = values.gather(1, left), values.gather(1, left + 1)
        rounding = 1e-6 * (low.abs() + high.abs() + 2 * slope * size.amax(1, keepdim=True))
        return cost + (torch.lerp(low, high, share) - rounding)


class GroupSearch:
    """Best pair of each row with both inputs in the same m consecutive inputs."""

    def __init__(self, gram: Tensor, length: int) -> None:
        self.length = length
        missing = -len(gram) % length
        padded = torch.nn.functional.pad(gram, (0, missing, 0, missing))
        blocks = padded.unflatten(0, (-1, length)).unflatten(2, (-1, length))
        self.blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, m, m]

    def __call__(self, cost: Tensor, gain: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Kept u and pruned p, [rows] each, of the smallest change."""
        size = max(ENTRIES // (cost.shape[1] * self.length), 1)
        found = []
        for c, g, w in zip(*(x.split(size) for x in (cost, gain, weight)), strict=True):
            c, g, w = (self.grouped(x, fill) for x, fill in ((c, torch.inf), (g, torch.inf), (w, 0.0)))
            change = self.blocks * w[..., None, :] * (-2 * w[..., None]) + g[..., None, :] + c[..., None]
            least, pair = change.flatten(1).min(1)  # over [groups, m, m]
            found.append(torch.where(least < 0, pair, 0))
        pair = torch.cat(found)
        group, u, p = pair // self.length**2, pair // self.length % self.length, pair % self.length
        last = cost.shape[1] - 1  # used if nothing can be swapped
        return (group * self.length + u).clamp(max=last), (group * self.length + p).clamp(max=last)

    def grouped(self, lines: Tensor, fill: float) -> Tensor:
        missing = -lines.shape[1] % self.length
        return torch.nn.functional.pad(lines, (0, missing), value=fill).unflatten(1, (-1, self.length))
