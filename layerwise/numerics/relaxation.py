"""Relaxed masks M in [0, 1] and the steps that Frank-Wolfe's `step` names: in torch, and compiled with the same result.

f(M) = tr((W o (1 - M)) G (W o (1 - M))t), of which minus half the gradient is W o product, product = (W o (1 - M)) G.
A line is what is optimised by itself: a row, or with a layer's pattern the layer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, from_numpy
from torch.nn.functional import pad

from layerwise.contract.layer import Layer, Target
from layerwise.kernels import exchange, frank_wolfe
from layerwise.kernels.rows import array, by_rows
from layerwise.numerics import dispatch, ops


def relaxation(layer: Layer, started: Tensor, fixed: Tensor, target: Target, step: str) -> Relaxation:
    """Compiled on a processor, plain torch on other devices."""
    if not dispatch.compiled(layer.weight):
        kind = Exchanges if step == "pairwise" else Steps
    else:
        kind = CompiledExchanges if step == "pairwise" else CompiledSteps
    return kind(layer, started, fixed, target, step)


class Relaxation:
    """Relaxed masks in the midst of their steps.

    started, fixed: [out, in] bool, the mask begun with, and what of it is fixed at 1. relaxed, product: [out, in]
    float64. active: [lines] bool, those that `advance` goes on with. Raises ValueError for entries that are not finite.
    """

    def __init__(self, layer: Layer, started: Tensor, fixed: Tensor, target: Target, step: str) -> None:
        self.weight, self.gram = ops.in_float64(layer)
        self.fixed, self.target, self.step = fixed, target, step
        self.relaxed = started.double()
        self.product = torch.where(started, 0.0, self.weight) @ self.gram
        self.lines = 1 if target.pattern == "layer" else len(started)
        self.free = int((started & ~fixed).sum()) // self.lines  # entries of a line that are chosen
        self.active = torch.ones(self.lines, dtype=torch.bool, device=started.device)
        self.prepare(layer)

    def prepare(self, layer: Layer) -> None:
        """What the steps need besides."""

    def advance(self, begin: int, end: int) -> None:
        """Steps begin + 1 to end."""
        raise NotImplementedError

    def measure(self) -> tuple[Tensor, Tensor]:
        """f and the duality gap of each line: no mask that keeps what is fixed is better than their difference."""
        slope = self.product * self.weight * (self.vertex().double() - self.relaxed)
        value = self.product * self.weight * (1 - self.relaxed)
        return value.view(self.lines, -1).sum(1), 2 * slope.view(self.lines, -1).sum(1)

    def rounding(self, started: Tensor) -> Tensor:
        """[out, in] by which entries are kept: relaxed; equal ones, most of them never chosen, by the warm start."""
        return self.relaxed.round(decimals=10) + 1e-11 * started

    def vertex(self) -> Tensor:
        """[out, in] bool, V."""
        return linear_minimiser(self.weight * self.product, self.fixed, self.target)


class Steps(Relaxation):
    """`published` and `line_search` in torch: towards the vertex by 2 / (t + 2), or as far as is best for each line."""

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
    """[out, in] by which entries are kept after exchanges: relaxed; equal ones, most of them 0, by what f saves.

    At the exact optimum those with m = 0 are equal, while after some steps of 2 / (t + 2) the better ones are above 0.
    """
    saved = weight * (2 * product - weight * gram.diagonal())
    return relaxed.round(decimals=10) + 1e-11 * saved / saved.abs().max().clamp(min=1e-300)


class CompiledSteps(Relaxation):
    """The same, where (W o (1 - V)) G of the vertex is kept and follows the entries that enter and leave it."""

    def prepare(self, layer: Layer) -> None:
        self.weight, self.gram = layer.weight, layer.gram.matrix  # the compiled loops widen float32 as they read
        vertex, product = self.relaxed.bool(), self.product.clone()
        self.state = [array(x) for x in (self.weight, self.gram, self.fixed, self.relaxed, self.product)]
        self.state += [array(vertex), array(product)]
        inputs, of = self.weight.shape[1], self.target.n_of_m
        self.pruned = (of[1] - of[0], of[1]) if of else (int(self.target.sparsity * inputs), 0)

    def advance(self, begin: int, end: int) -> None:
        search = self.step == "line_search"
        if self.target.pattern != "layer":
            by_rows(frank_wolfe.steps, self.fixed.shape, *self.state, *self.pruned, search, begin, end)
            return
        for t in range(begin, end):
            sums = np.empty((2, len(self.fixed)))
            by_rows(frank_wolfe.approach, self.fixed.shape, *self.state, array(self.vertex()), *sums)
            best = best_step(from_numpy(sums[0]), from_numpy(sums[1]), self.target)
            size = float(best) if search else 2 / (t + 2)
            _, _, _, relaxed, product, vertex, vertex_product = self.state
            by_rows(frank_wolfe.move, self.fixed.shape, relaxed, product, vertex, vertex_product, size)

    def measure(self) -> tuple[Tensor, Tensor]:
        if self.target.pattern == "layer":
            return super().measure()
        return measured(self.weight, self.fixed, self.relaxed, self.product, self.pruned)


def measured(
    weight: Tensor, fixed: Tensor, relaxed: Tensor, product: Tensor, pruned: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """f and the gap of each row, compiled."""
    sums = np.empty((2, len(weight)))
    by_rows(frank_wolfe.measure, weight.shape, *map(array, (weight, fixed, relaxed, product)), *pruned, *sums)
    return from_numpy(sums[0]), from_numpy(sums[1])


class Exchanges(Relaxation):
    """`pairwise` in torch: a step is `free` exchanges in each line (layerwise/kernels/exchange.py has their rule)."""

    def prepare(self, layer: Layer) -> None:
        of = self.target.n_of_m[1] if self.target.n_of_m else self.relaxed.numel() // self.lines
        self.of, inputs = of, self.relaxed.shape[1]
        place = torch.arange(self.relaxed.numel(), device=self.relaxed.device).view(self.lines, -1)
        self.places = pad(place, (0, -place.shape[1] % of), value=-1).unflatten(1, (-1, of))  # [lines, groups, of]
        self.spare = torch.zeros(self.places.shape[:2], dtype=torch.float64, device=place.device)
        self.inputs = inputs

    def advance(self, begin: int, end: int) -> None:
        for _ in range((end - begin) * max(self.free, 1)):
            self.exchange()

    def rounding(self, started: Tensor) -> Tensor:
        return spared(self.weight.double(), self.gram, self.relaxed, self.product)

    def exchange(self) -> None:
        line, inf = torch.arange(self.lines, device=self.spare.device), float("inf")
        score, relaxed, fixed = (
            torch.where(self.places < 0, fill, x.flatten()[self.places])
            for x, fill in ((self.weight * self.product, 0.0), (self.relaxed, 1.0), (self.fixed, True))
        )
        fixed = fixed.bool()
        high = torch.where(fixed | (relaxed >= 1), -inf, score)
        low = torch.where(fixed | (relaxed <= 0), inf, score)
        least = torch.where(self.spare > 0, low.amin(2).clamp(max=0), low.amin(2))
        group = (high.amax(2).clamp(min=0) - least).argmax(1)
        places, high, low, spare = (x[line, group] for x in (self.places, high, low, self.spare))
        top, u = high.max(1)
        raises, top = top >= 0, top.clamp(min=0)
        u = places[line, u]
        weight, diagonal = self.weight.flatten(), self.gram.diagonal()
        w_u = torch.where(raises, weight[u], 0.0)
        others = places.clamp(min=0)
        w = weight[others]
        alone = w_u.square() * diagonal[u % self.inputs]
        coupled = self.gram[(u % self.inputs)[:, None], others % self.inputs]
        coupled = torch.where(others // self.inputs == (u // self.inputs)[:, None], coupled, 0.0)
        bend = alone[:, None] + w.square() * diagonal[others % self.inputs] - 2 * w_u[:, None] * w * coupled
        # The entry of weight zero, first as in the compiled loop, which of equal gains takes the first.
        low = torch.cat([torch.where(spare > 0, 0.0, inf)[:, None], low], 1)
        bend = torch.cat([alone[:, None], bend], 1)
        fall = top[:, None] - low
        gain = torch.where(fall > 0, torch.where(bend > 0, fall.square() / bend, inf), 0.0)
        most, v = gain.max(1)
        lowers = v > 0
        fall, bend = fall[line, v], bend[line, v]
        v = others[line, (v - 1).clamp(min=0)]
        flat = self.relaxed.view(-1)
        limit = torch.minimum(torch.where(raises, 1 - flat[u], inf), torch.where(lowers, flat[v], spare))
        size = torch.where(bend > 0, torch.minimum(fall / bend, limit), limit)
        size = torch.where((most > 0) & self.active, size, 0.0)
        self.spare[line, group] += torch.where(raises, 0.0, size) - torch.where(lowers, 0.0, size)
        up, down = torch.where(raises, size, 0.0), torch.where(lowers, size, 0.0)
        flat[u] = torch.where(up == 1 - flat[u], 1.0, flat[u] + up)
        flat[v] -= down
        for entry, moved in ((u, -up), (v, down)):
            change = (moved * weight[entry])[:, None] * self.gram[entry % self.inputs]
            self.product.index_add_(0, entry // self.inputs, change)


class CompiledExchanges(Relaxation):
    """The same, row after row; a layer's exchanges one after another."""

    def prepare(self, layer: Layer) -> None:
        (out, inputs), n_of_m = self.fixed.shape, self.target.n_of_m
        of = n_of_m[1] if n_of_m and inputs > n_of_m[1] else 1
        missing = -inputs % (of if of > 1 else exchange.LANES)
        order = torch.arange(inputs + missing)
        order = order.view(-1, of).T.flatten() if of > 1 else order
        self.order, self.inverse = order, order.argsort()[:inputs]
        gram = pad(layer.gram.matrix, (0, missing, 0, missing))[order][:, order]
        self.laid = [pad(x, (0, missing))[:, order] for x in (layer.weight, self.product)]
        masks = torch.where(self.fixed, exchange.FIXED, self.relaxed)
        masks = pad(masks, (0, missing), value=exchange.FIXED)[:, order]
        self.state = [array(x) for x in (self.laid[0], gram, masks, self.laid[1])]
        self.spare = np.zeros((out, len(order) // of if of > 1 else 1))
        self.left = 0.0
        self.weight, self.gram = layer.weight, layer.gram.matrix
        self.pruned = (n_of_m[1] - n_of_m[0], n_of_m[1]) if n_of_m else (int(self.target.sparsity * inputs), 0)

    def advance(self, begin: int, end: int) -> None:
        count = (end - begin) * max(self.free, 1)
        if self.target.pattern == "layer":
            weight, gram, relaxed, product = self.state
            self.left = exchange.exchange_layer(weight, gram, relaxed, product, self.left, count)
        else:
            by_rows(exchange.exchange_rows, self.state[0].shape, *self.state, self.spare, array(self.active), count)
        relaxed, product = (from_numpy(x)[:, self.inverse] for x in self.state[2:])
        self.relaxed, self.product = relaxed.clamp(max=1), product

    def measure(self) -> tuple[Tensor, Tensor]:
        if self.target.pattern == "layer":
            return super().measure()
        return measured(self.weight, self.fixed, self.relaxed, self.product, self.pruned)

    def rounding(self, started: Tensor) -> Tensor:
        return spared(self.weight.double(), self.gram, self.relaxed, self.product)


def linear_minimiser(descent: Tensor, fixed: Tensor, target: Target) -> Tensor:
    """[out, in] bool: what is fixed and, as far as they are positive, the largest entries of minus the gradient."""
    return ops.prune_mask(descent.masked_fill(fixed, float("inf")), target) & (descent > 0) | fixed


def best_step(slope: Tensor, curvature: Tensor, target: Target) -> float | Tensor:
    """Minimiser over [0, 1] of f - 2 slope t + curvature t^2, given per row; [out, 1], or one for a layer's pattern."""
    if target.pattern == "layer":
        slope, curvature = slope.sum(), curvature.sum()
    best = torch.where(curvature > 0, slope / curvature, torch.where(slope > 0, 1.0, 0.0)).clamp(0, 1)
    return best if target.pattern == "layer" else best[:, None]
