"""The step of AWP's gradient descent and its projections: on a sparsity pattern, a quantisation grid, or both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Gram, Layer, Method, Quantised, Target, UnsupportedTarget
from layerwise.kernels import gradient_projection as kernel
from layerwise.numerics import dispatch, ops

ITERATIONS = {(True, False): 200, (False, True): 10, (True, True): 100}  # keyed by (prunes, quantises)


@dataclass(frozen=True)
class Problem:
    """A layer's weight [out, in] and Gram, divided by units: unscaled in float64 with bits, otherwise normalised
    float32.

    float32 cannot distinguish two roundings with almost equal errors.
    """

    weight: Tensor
    gram: Tensor
    unit: float
    gram_unit: float

    @staticmethod
    def of(layer: Layer, target: Target) -> Problem:
        """Raises ValueError if the weight or the Gram is not finite."""
        if target.bits:
            return Problem(*ops.in_float64(layer), 1.0, 1.0)
        weight, unit = ops.normalised(layer.weight)
        gram, gram_unit = ops.normalised(layer.gram.matrix)
        return Problem(weight, gram, unit, gram_unit)

    def in_units(self, weight: Tensor) -> Tensor:
        """A weight [out, in] of the layer in the problem's unit, in float32."""
        return ops.scaled(weight, 1 / self.unit)

    def result(
        self, best: Compressed | None, start: Compressed, pruned: bool, trace: list[tuple[int, float, float]]
    ) -> Compressed:
        """The best iterate in the layer's units, or the start if no iterate is better."""
        info, rows = ops.damping_of(start), tuple(trace)
        if best is None:
            return replace(start, trace=rows, info=info)
        weight = ops.scaled(best.weight, self.unit)
        return replace(best, weight=weight, mask=best.mask if pruned else None, trace=rows, info=info)


@dataclass(frozen=True)
class Projection:
    """The projections of a run, called with the iteration's number, 1 to `iterations`.

    With sparsity alone they project on the pattern, with bits alone on the grid. With both, the sparsity rises linearly
    over the first quarter of the iterations and is held over the second. In the second half the unpruned weights are
    rounded.
    keep: [out, in] bool, False where a weight must stay zero, or None; used if the target prunes nothing.
    held: codes whose grid is used, including AWQ's input scale, or None to fit a grid to the unpruned weights.
    gradual: only a share of each row's kept weights is rounded, those nearest to the grid in units of its scale. The
    share rises as 1 - (1 - t)^3, t from 0 to 1, and is one only in the last iteration.
    """

    target: Target
    keep: Tensor | None
    iterations: int
    gradual: bool
    held: Quantised | None = None

    @property
    def begins_at_weight(self) -> bool:
        """Whether the first step begins at the weight itself instead of the start."""
        return self.target.bits is not None and (self.held is None or bool(self.target.sparsity))

    @property
    def unrounded(self) -> int:
        """Number of iterations before the first one that rounds."""
        if self.target.bits is None:
            return self.iterations
        return self.iterations // 2 if self.target.sparsity else 0

    def reaches(self, iteration: int) -> bool:
        """Whether the iterate after this many projections has the target's pattern and grid."""
        if self.target.bits is None:
            return True
        return iteration > self.unrounded and (not self.gradual or iteration == self.iterations)

    def __call__(self, weight: Tensor, iteration: int) -> Compressed:
        """The weight [out, in] pruned, then rounded to the grid, with its codes."""
        target = self.target
        if target.sparsity:
            share = 1.0 if target.bits is None else min(4 * iteration / self.iterations, 1.0)
            weight, mask = project(weight, with_share(target, share))
        else:
            mask = torch.ones_like(weight, dtype=torch.bool) if self.keep is None else self.keep
            weight = torch.where(mask, weight, 0.0)
        if iteration <= self.unrounded:
            return Compressed(weight, mask)
        quantised = self._codes(weight)
        rounded = ops.quantised_values(quantised, target)
        if not self.reaches(iteration):
            share = 1 - (1 - (iteration - self.unrounded) / (self.iterations - self.unrounded)) ** 3
            cells = (rounded - weight).abs() / quantised.scales[:, ops.grouping(quantised, target)]
            cells = cells if quantised.input_scale is None else cells * quantised.input_scale
            rounded = torch.where(nearest(cells, mask, share), rounded, weight)
        return Compressed(rounded, mask, quantised)

    def _codes(self, weight: Tensor) -> Quantised:
        """The nearest codes of a weight [out, in] on the held grid, or on a grid fitted to the weight."""
        assert self.target.bits is not None
        if self.held is None:
            grid = ops.fit_grid(weight, self.target)
            return grid.quantised(grid.codes(weight, ops.groups_of(weight.shape[1], self.target.group, weight.device)))
        grid = ops.Grid(self.held.scales, self.held.zeros, self.target.bits)
        scaled = weight if self.held.input_scale is None else weight * self.held.input_scale
        return replace(self.held, codes=grid.codes(scaled, ops.grouping(self.held, self.target)))

    def descend(
        self,
        weight: Tensor,
        now: tuple[Tensor, Tensor],
        before: tuple[Tensor, Tensor],
        beta: float,
        step: float | Tensor,
        iteration: int,
    ) -> tuple[Compressed, Tensor]:
        """The projection after a gradient step, and weight - projection, [out, in].

        now, before: (iterate, gradient) of this iterate and the previous one. beta: the momentum. step: one number, or
        with bits one number per input [in]. The gradient is linear in the iterate, so the gradient at the extrapolated
        point needs no further product.
        """
        target = self.target
        by_kernel = target.bits is None and target.structure in ("row", "n:m") and dispatch.use_compiled(weight)
        if by_kernel and not isinstance(step, Tensor):
            n_kept, group_size = target.n_of_m or (0, 0)
            n_pruned = group_size - n_kept if group_size else int(target.sparsity * weight.shape[1])
            theta, mask, missing = kernel.descend(weight, now, before, beta, step, n_pruned, group_size)
            return Compressed(theta, mask), missing
        moved = now[0] + step * now[1]
        if beta:
            moved = moved + beta * (now[0] - before[0]) + beta * step * (now[1] - before[1])
        found = self(moved.float(), iteration)
        return found, weight - found.weight


class Steps:
    """The steps of a run: the starting point of each step, its length, and its projection.

    accumulates: whether a rounded step begins at the unrounded end of the step before it. remembers: whether each step
    is given the iterate and gradient before its own, which momentum needs.
    """

    def __init__(
        self, gram: Gram, problem: Problem, projection: Projection, step: str, accumulates: bool, remembers: bool
    ) -> None:
        bits = projection.target.bits is not None
        sizes = (step_size(gram, problem.gram, problem.gram_unit, step, rounds) for rounds in (False, bits))
        self.weight, self.projection, self.sizes = problem.weight, projection, list(sizes)
        self.accumulates, self.remembers, self.total, self.before = accumulates and bits, remembers, None, None

    def take(self, iteration: int, theta: Tensor, gradient: Tensor, beta: float) -> tuple[Compressed, Tensor]:
        """The projection after step number `iteration` (from 0) at an iterate; as `Projection.descend`."""
        rounds = iteration >= self.projection.unrounded
        step, now = self.sizes[rounds], (theta, gradient)
        if iteration == 0 and self.projection.begins_at_weight:
            now = (self.weight, torch.zeros_like(gradient))
        if self.accumulates and rounds:
            now = now if self.total is None else (self.total, gradient)
            self.total = now[0] + step * now[1]  # in float64
        before, self.before = self.before or now, now if self.remembers else None
        return self.projection.descend(self.weight, now, before, beta, step, iteration + 1)


def warm_started(
    warm_start: Method, grid_from: Method | None, layer: Layer, target: Target, rng: torch.Generator
) -> Compressed:
    """The warm start; if the target has bits, it is rounded to nearest or by grid_from. The result is never worse.

    Raises UnsupportedTarget if grid_from has levels of its own or a rotation.
    """
    pruned = warm_start.compress(layer, target.pruning, rng) if target.sparsity else None
    if pruned and not target.bits:
        return pruned
    left = replace(layer, weight=pruned.weight, keep=pruned.mask) if pruned else layer
    if grid_from is None:
        rounded = ops.round_to_nearest(left.weight, target.grid)
    else:
        rounded = grid_from.compress(left, target.grid, rng)
        if rounded.quantised is None or rounded.quantised.own_grid:
            raise UnsupportedTarget("awp's grid_from must give integer codes. Got a grid of its own instead.")
    mask = pruned.mask if pruned else None
    weight = rounded.weight if mask is None else torch.where(mask, rounded.weight, 0.0)
    info = ops.damping_of(*filter(None, (pruned, rounded)))
    return Compressed(weight, mask, rounded.quantised, info=info)


class Momentum:
    """Nesterov's beta for each iterate; zero after an iterate whose error is larger than the previous one's."""

    def __init__(self, used: bool) -> None:
        self.used, self.length, self.error = used, 1.0, float("inf")

    def next(self, error: float) -> float:
        """The beta for the step from an iterate with this error; 0 without momentum."""
        if not self.used:
            return 0.0
        last, rises = self.length, error > self.error
        self.length = 1.0 if rises else (1 + (1 + 4 * last**2) ** 0.5) / 2
        self.error = error
        return 0.0 if rises else (last - 1) / self.length


def objective_and_norm(gradient: Tensor, missing: Tensor) -> tuple[float, float]:
    """The sum of gradient * missing, both [out, in], and the norm of the gradient; sums in float64."""
    if gradient.dtype == torch.float32 and dispatch.use_compiled(gradient):
        return kernel.objective_and_norm(gradient, missing)
    return float(ops.inner(gradient, missing).sum()), float(gradient.norm())


def project(weight: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """The nearest weight with the target's pattern, and its mask: it keeps the blocks with the largest sum of
    squares."""
    mask = ops.prune_mask(weight.double().square() if target.block else weight.abs(), target)
    return torch.where(mask, weight, 0.0), mask


def with_share(target: Target, share: float) -> Target:
    """The target's pattern at a share, in (0, 1], of its sparsity."""
    if not target.n_of_m:
        return Target(share * target.sparsity, target.pattern)
    n_kept, group_size = target.n_of_m
    n_pruned = int(share * (group_size - n_kept))
    return Target(pattern=f"{group_size - n_pruned}:{group_size}") if n_pruned else Target()


def nearest(distance: Tensor, mask: Tensor, share: float) -> Tensor:
    """[out, in] bool: in each row the nearest share of the mask's entries, and all entries outside the mask."""
    ranks = distance.masked_fill(~mask, -1.0).argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < ((~mask).sum(1) + (share * mask.sum(1)).long())[:, None]


def step_size(gram: Gram, matrix: Tensor, unit: float, step: str, rounds: bool) -> float | Tensor:
    """2 / ||G||_F, 1.5 / ||G||_F or 1 / lambda_max(G) of matrix = G / unit; 0 if all inputs are dead.

    diagonal: when rounding, [in] 1 / (lambda G_jj), 0 for dead inputs; otherwise 2 / ||G||_F. lambda is the largest
    eigenvalue of D^-1/2 G D^-1/2, with D the diagonal of G. In the metric of D, rounding to nearest is also a
    projection. So on a fixed grid this gradient step never increases the error.
    """
    if step == "diagonal" and rounds:
        inverse = torch.where(gram.dead, 0.0, 1 / matrix.diagonal().double())  # 1 / 0 is discarded
        return inverse / (gram.once("largest scaled eigenvalue", lambda: _largest_scaled_eigenvalue(gram)) or 1.0)
    if step == "spectral":
        size = gram.largest_eigenvalue / unit
    else:
        size = float(matrix.double().norm()) / (1.5 if rounds else 2)
    return 1 / size if size > 0 else 0.0


def _largest_scaled_eigenvalue(gram: Gram) -> float:
    """The largest eigenvalue of D^-1/2 G D^-1/2, D the diagonal of G, without dead inputs."""
    root = torch.where(gram.dead, 1.0, gram.diagonal.double()).sqrt()
    return Gram((gram.matrix.double() / root / root[:, None]).float(), gram.tokens).largest_eigenvalue
