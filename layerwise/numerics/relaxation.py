"""Relaxed masks M in [0, 1] and Frank-Wolfe's steps: in torch, and compiled with the same result.

f(M) = tr((W o (1 - M)) G (W o (1 - M))^T). Minus half its gradient is W o product, with product = (W o (1 - M)) G.
Each line is optimised separately. A line is a row or, for the pattern layer, the whole layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, from_numpy
from torch.nn.functional import pad

from layerwise.contract.layer import Layer, Target
from layerwise.kernels import relaxation_exchanges, relaxation_steps
from layerwise.kernels.relaxation_exchanges import ExchangeState
from layerwise.kernels.relaxation_steps import MaskState, PruneCount, VertexState
from layerwise.kernels.rows import array, by_rows
from layerwise.numerics import dispatch, ops
from layerwise.numerics.patterns import ROWS


def relaxed_masks(layer: Layer, started: Tensor, fixed: Tensor, target: Target, step: str) -> RelaxedMasks:
    """The initial masks; their steps are compiled on a CPU and run in torch on other devices. See RelaxedMasks."""
    if not dispatch.use_compiled(layer.weight):
        kind = Exchanges if step == "pairwise" else Steps
    else:
        kind = CompiledExchanges if step == "pairwise" else CompiledSteps
    return kind(layer, started, fixed, target, step)


class RelaxedMasks:
    """Relaxed masks and the state of their steps.

    started: [out, in] bool, the initial mask. fixed: [out, in] bool, its entries that stay 1. relaxed, product:
    [out, in] float64. active: [lines] bool, the lines that `advance` updates. Raises ValueError for entries that are
    not finite.
    """

    def __init__(self, layer: Layer, started: Tensor, fixed: Tensor, target: Target, step: str) -> None:
        self.weight, self.gram = ops.in_float64(layer)
        self.fixed, self.target, self.step = fixed, target, step
        self.relaxed = started.double()
        self.product = torch.where(started, 0.0, self.weight) @ self.gram
        self.lines = 1 if target.pattern == "layer" else len(started)
        self.free = int((started & ~fixed).sum()) // self.lines  # number of entries to choose per line
        self.active = torch.ones(self.lines, dtype=torch.bool, device=started.device)
        self.prepare(layer)

    def prepare(self, layer: Layer) -> None:
        """Set up further state that the steps need."""

    def advance(self, begin: int, end: int) -> None:
        """Make steps begin + 1 to end."""
        raise NotImplementedError

    def measure(self) -> tuple[Tensor, Tensor]:
        """f and the duality gap of each line, [lines] float64: no mask with the fixed entries has a value below f -
        gap."""
        slope = self.product * self.weight * (self.vertex().double() - self.relaxed)
        value = self.product * self.weight * (1 - self.relaxed)
        return value.view(self.lines, -1).sum(1), 2 * slope.view(self.lines, -1).sum(1)

    def rounding(self, started: Tensor) -> Tensor:
        """[out, in] scores of the entries to keep: the relaxed mask; ties go to entries of the warm start."""
        return self.relaxed.round(decimals=10) + 1e-11 * started

    def vertex(self) -> Tensor:
        """[out, in] bool, the vertex V that minimises the linearised f."""
        return linear_minimiser(self.weight * self.product, self.fixed, self.target)


class Steps(RelaxedMasks):
    """`published` and `line_search` in torch: towards the vertex by 2 / (t + 2), or by the best step of each line."""

    def advance(self, begin: int, end: int) -> None:
        for t in range(begin, end):
            vertex = self.vertex().double()
            direction = self.weight * (vertex - self.relaxed)
            change = direction @ self.gram
            size = 2 / (t + 2)
            if self.step == "line_search":
                size = best_step((self.product * direction).sum(1), (change * direction).sum(1), self.target)
            self.relaxed += size * (vertex - self.relaxed)
            self.product -= size * change


def spared(weight: Tensor, gram: Tensor, relaxed: Tensor, product: Tensor) -> Tensor:
    """[out, in] scores of the entries to keep after exchanges: the relaxed mask; ties are broken by the reduction of f.

    At the exact optimum all entries with m = 0 are tied; after steps of 2 / (t + 2) the better ones are above 0.
    """
    parts = [slice(start, start + ROWS) for start in range(0, len(weight), ROWS)]

    def saved(part: slice) -> Tensor:
        own = weight[part].double()
        return own * (2 * product[part] - own * gram.diagonal())

    largest = max(1e-300, *(float(saved(part).abs().max()) for part in parts))
    scores = relaxed.round(decimals=10)
    for part in parts:
        scores[part] += 1e-11 * saved(part) / largest
    return scores


class CompiledSteps(RelaxedMasks):
    """As Steps, but the vertex's (W o (1 - V)) G is stored and updated by the entries that change in the vertex."""

    def prepare(self, layer: Layer) -> None:
        # the compiled loops convert float32 to float64 on reading
        self.weight, self.gram = layer.weight, layer.gram.matrix
        vertex, product = self.relaxed.bool(), self.product.clone()
        self.state = MaskState(*map(array, (self.weight, self.fixed, self.relaxed, self.product)))
        self.vertices = VertexState(array(vertex), array(product), array(self.gram))
        self.count = prune_count(self.target, self.weight.shape[1])

    def advance(self, begin: int, end: int) -> None:
        search, shape = self.step == "line_search", self.fixed.shape
        if self.target.pattern != "layer":
            by_rows(relaxation_steps.steps, shape, self.state, self.vertices, self.count, search, begin, end)
            return
        for t in range(begin, end):
            slopes, curvatures = np.empty((2, len(self.fixed)))
            chosen = array(self.vertex())
            by_rows(relaxation_steps.follow_vertex, shape, self.state, self.vertices, chosen, slopes, curvatures)
            best = best_step(from_numpy(slopes), from_numpy(curvatures), self.target)
            size = float(best) if search else 2 / (t + 2)
            by_rows(relaxation_steps.move, shape, self.state, self.vertices, size)

    def measure(self) -> tuple[Tensor, Tensor]:
        if self.target.pattern == "layer":
            return super().measure()
        return measured(self.state, self.count)


def prune_count(target: Target, inputs: int) -> PruneCount:
    """Number of entries pruned in a row, or in each group of n:m."""
    if target.n_of_m:
        n_kept, group_size = target.n_of_m
        return PruneCount(group_size - n_kept, group_size)
    return PruneCount(int(target.sparsity * inputs), 0)


def measured(state: MaskState, count: PruneCount) -> tuple[Tensor, Tensor]:
    """f and the gap of each row, [out] float64 each, compiled."""
    objectives, gaps = np.empty((2, len(state.weight)))
    by_rows(relaxation_steps.measure, state.weight.shape, state, count, objectives, gaps)
    return from_numpy(objectives), from_numpy(gaps)


class Exchange(NamedTuple):
    """An exchange in each line, [lines] each: one entry of a group is raised and another lowered by the same amount.

    group: index of the group in the line. raised, lowered: indices of the entries in the flat matrix. raises, lowers:
    bool, False where the unused part of the group's sum replaces the entry. fall, curvature: moving t changes f by -2
    fall t + curvature t^2. gain: the reduction of f with the best unlimited t; 0 if no exchange lowers f.
    """

    group: Tensor
    raised: Tensor
    raises: Tensor
    lowered: Tensor
    lowers: Tensor
    fall: Tensor
    curvature: Tensor
    gain: Tensor


class Exchanges(RelaxedMasks):
    """`pairwise` in torch: a step is `free` exchanges in each line (rule: kernels/relaxation_exchanges.py)."""

    def prepare(self, layer: Layer) -> None:
        group_size = self.target.n_of_m[1] if self.target.n_of_m else self.relaxed.numel() // self.lines
        index = torch.arange(self.relaxed.numel(), device=self.relaxed.device).view(self.lines, -1)
        padded = pad(index, (0, -index.shape[1] % group_size), value=-1)
        self.entries = padded.unflatten(1, (-1, group_size))  # [lines, groups, group size], flat indices, -1: padding
        self.spare = torch.zeros(self.entries.shape[:2], dtype=torch.float64, device=index.device)
        self.inputs = self.relaxed.shape[1]
        self.line = torch.arange(self.lines, device=index.device)

    def advance(self, begin: int, end: int) -> None:
        for _ in range((end - begin) * max(self.free, 1)):
            exchange = self.choose()
            self.apply(exchange, self.sizes(exchange))

    def rounding(self, started: Tensor) -> Tensor:
        return spared(self.weight, self.gram, self.relaxed, self.product)

    def choose(self) -> Exchange:
        """The exchange of each line with the largest gain."""
        group, high, low = self.widest_groups()
        entries, spare = self.entries[self.line, group], self.spare[self.line, group]
        top, place = high.max(1)
        raises, top = top >= 0, top.clamp(min=0)
        raised, others = entries[self.line, place], entries.clamp(min=0)
        alone, curvature = self.curvatures(raised, raises, others)
        # The entry of weight zero is first, as in the compiled loop, because ties go to the first entry.
        low = torch.cat([torch.where(spare > 0, 0.0, float("inf"))[:, None], low], 1)
        curvature = torch.cat([alone[:, None], curvature], 1)
        fall = top[:, None] - low
        gain = torch.where(fall > 0, torch.where(curvature > 0, fall.square() / curvature, float("inf")), 0.0)
        best, column = gain.max(1)
        lowered = others[self.line, (column - 1).clamp(min=0)]
        fall, curvature = fall[self.line, column], curvature[self.line, column]
        return Exchange(group, raised, raises, lowered, column > 0, fall, curvature, best)

    def widest_groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """The group [lines] whose entries differ most in W o product, and its entries' values [lines, group size].

        The values are returned twice: with -inf for entries that cannot be raised, and with inf for those that cannot
        be lowered.
        """
        inf = float("inf")
        score, relaxed, fixed = (
            torch.where(self.entries < 0, padding, x.flatten()[self.entries])
            for x, padding in ((self.weight * self.product, 0.0), (self.relaxed, 1.0), (self.fixed, True))
        )
        fixed = fixed.bool()
        high = torch.where(fixed | (relaxed >= 1), -inf, score)
        low = torch.where(fixed | (relaxed <= 0), inf, score)
        lowest = torch.where(self.spare > 0, low.amin(2).clamp(max=0), low.amin(2))
        group = (high.amax(2).clamp(min=0) - lowest).argmax(1)
        return group, high[self.line, group], low[self.line, group]

    def curvatures(self, raised: Tensor, raises: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Curvatures of raising `raised` alone [lines], and of also lowering each of `others` [lines, group size]."""
        weight, diagonal, inputs = self.weight.flatten(), self.gram.diagonal(), self.inputs
        weight_raised = torch.where(raises, weight[raised], 0.0)
        weight_others = weight[others]
        alone = weight_raised.square() * diagonal[raised % inputs]
        coupled = self.gram[(raised % inputs)[:, None], others % inputs]
        coupled = torch.where(others // inputs == (raised // inputs)[:, None], coupled, 0.0)  # in one row
        both = alone[:, None] + weight_others.square() * diagonal[others % inputs]
        return alone, both - 2 * weight_raised[:, None] * weight_others * coupled

    def sizes(self, exchange: Exchange) -> Tensor:
        """[lines] size of each exchange: up to the minimum of f, or to the masks' limits."""
        relaxed, inf = self.relaxed.view(-1), float("inf")
        room_above = torch.where(exchange.raises, 1 - relaxed[exchange.raised], inf)
        spare = self.spare[self.line, exchange.group]
        limit = torch.minimum(room_above, torch.where(exchange.lowers, relaxed[exchange.lowered], spare))
        best = torch.minimum(exchange.fall / exchange.curvature, limit)
        size = torch.where(exchange.curvature > 0, best, limit)
        return torch.where((exchange.gain > 0) & self.active, size, 0.0)

    def apply(self, exchange: Exchange, size: Tensor) -> None:
        """Update the relaxed masks, their product and the unused sums of their groups, in place."""
        raises, raised, lowers, lowered = exchange.raises, exchange.raised, exchange.lowers, exchange.lowered
        self.spare[self.line, exchange.group] += torch.where(raises, 0.0, size) - torch.where(lowers, 0.0, size)
        up, down = torch.where(raises, size, 0.0), torch.where(lowers, size, 0.0)
        relaxed, weight = self.relaxed.view(-1), self.weight.flatten()
        relaxed[raised] = torch.where(up == 1 - relaxed[raised], 1.0, relaxed[raised] + up)
        relaxed[lowered] -= down
        for entry, moved in ((raised, -up), (lowered, down)):
            change = (moved * weight[entry])[:, None] * self.gram[entry % self.inputs]
            self.product.index_add_(0, entry // self.inputs, change)


class CompiledExchanges(RelaxedMasks):
    """As Exchanges, row by row; for the pattern layer, one exchange after another."""

    def prepare(self, layer: Layer) -> None:
        self.weight, self.gram = layer.weight, layer.gram.matrix  # the loops convert float32 to float64 on reading
        (out, inputs), n_of_m = self.fixed.shape, self.target.n_of_m
        group_size = n_of_m[1] if n_of_m and inputs > n_of_m[1] else 1  # 1: rows are single groups
        grouped = group_size > 1
        missing = -inputs % (group_size if grouped else relaxation_exchanges.STRIPES)
        order = torch.arange(inputs + missing)
        order = order.view(-1, group_size).T.flatten() if grouped else order
        self.inverse = order.argsort()[:inputs]  # place of each input

        def placed(matrix: Tensor, padding: float = 0.0) -> Tensor:
            """The columns [n, in] of a matrix in their places."""
            result = matrix.new_full((len(matrix), len(order)), padding)
            result[:, self.inverse] = matrix
            return result

        gram = placed(placed(self.gram).T.contiguous()).T.contiguous()
        masks = placed(torch.where(self.fixed, relaxation_exchanges.FIXED, self.relaxed), relaxation_exchanges.FIXED)
        self.state = ExchangeState(*map(array, (placed(self.weight), gram, masks, placed(self.product))))
        self.spare = np.zeros((out, len(order) // group_size if grouped else 1))
        self.spare_of_layer = 0.0
        self.count = prune_count(self.target, inputs)

    def advance(self, begin: int, end: int) -> None:
        count, state = (end - begin) * max(self.free, 1), self.state
        if self.target.pattern == "layer":
            self.spare_of_layer = relaxation_exchanges.exchange_layer(state, self.spare_of_layer, count)
        else:
            rows = relaxation_exchanges.exchange_rows
            by_rows(rows, state.weight.shape, state, self.spare, array(self.active), count)
        relaxed, product = (from_numpy(x)[:, self.inverse] for x in (state.relaxed, state.product))
        self.relaxed, self.product = relaxed.clamp(max=1), product

    def measure(self) -> tuple[Tensor, Tensor]:
        if self.target.pattern == "layer":
            return super().measure()
        return measured(MaskState(*map(array, (self.weight, self.fixed, self.relaxed, self.product))), self.count)

    def rounding(self, started: Tensor) -> Tensor:
        return spared(self.weight, self.gram, self.relaxed, self.product)


def linear_minimiser(descent: Tensor, fixed: Tensor, target: Target) -> Tensor:
    """[out, in] bool: the fixed entries and the largest positive entries of `descent`, the negative gradient."""
    return ops.prune_mask(descent.masked_fill(fixed, float("inf")), target) & (descent > 0) | fixed


def best_step(slope: Tensor, curvature: Tensor, target: Target) -> float | Tensor:
    """Minimiser over [0, 1] of f - 2 slope t + curvature t^2, given per row; [out, 1], or one number for the pattern
    layer."""
    if target.pattern == "layer":
        slope, curvature = slope.sum(), curvature.sum()
    best = torch.where(curvature > 0, slope / curvature, torch.where(slope > 0, 1.0, 0.0)).clamp(0, 1)
    return best if target.pattern == "layer" else best[:, None]
