"""The step of AWP's gradient descent and its projections: on a sparsity pattern, a quantisation grid, or both."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Gram, Layer, Method, Quantised, Target
from layerwise.kernels import gradient_projection as kernel
from layerwise.numerics import dispatch, ops


@dataclass(frozen=True)
class Projection:
    """The projections of a run of `iterations`, called with their numbers, 1 to `iterations`.

    Sparsity alone: on the pattern. Bits alone: on the grid. Both: the sparsity rises linearly over the first quarter of
    the iterations, is held over the second, and in the second half what pruning leaves is rounded.
    keep: [out, in] bool, False where a weight must stay zero, or None; heeded where the target prunes nothing.
    gradual: of the kept weights of each row a share is rounded, those nearest to the grid in units of its scale; the
    share rises as 1 - (1 - t)^3, t from 0 to 1, and is one in the last iteration alone.
    """

    target: Target
    keep: Tensor | None
    iterations: int
    gradual: bool

    @property
    def unrounded(self) -> int:
        """Iterations before the first that rounds."""
        if self.target.bits is None:
            return self.iterations
        return self.iterations // 2 if self.target.sparsity else 0

    def reaches(self, iteration: int) -> bool:
        """Whether the iterate after so many projections is of the target's pattern and on its grid."""
        if self.target.bits is None:
            return True
        return iteration > self.unrounded and (not self.gradual or iteration == self.iterations)

    def __call__(self, weight: Tensor, iteration: int) -> Compressed:
        """The weight [out, in] pruned, then rounded to the grid fitted to what is left, with its codes."""
        target = self.target
        if target.sparsity:
            share = 1.0 if target.bits is None else min(4 * iteration / self.iterations, 1.0)
            weight, mask = project(weight, with_share(target, share))
        else:
            mask = torch.ones_like(weight, dtype=torch.bool) if self.keep is None else self.keep
            weight = torch.where(mask, weight, 0.0)
        if iteration <= self.unrounded:
            return Compressed(weight, mask)
        grid, group_of = ops.fit_grid(weight, target), ops.groups_of(weight.shape[1], target.group, weight.device)
        codes = grid.codes(weight, group_of)
        rounded = grid.values(codes, group_of)
        if not self.reaches(iteration):
            share = 1 - (1 - (iteration - self.unrounded) / (self.iterations - self.unrounded)) ** 3
            cells = (rounded - weight).abs() / grid.scales[:, group_of]
            rounded = torch.where(nearest(cells, mask, share), rounded, weight)
        return Compressed(rounded, mask, Quantised(codes, grid.scales, grid.zeros))

    def descend(
        self,
        weight: Tensor,
        now: tuple[Tensor, Tensor],
        before: tuple[Tensor, Tensor],
        beta: float,
        step: float,
        iteration: int,
    ) -> tuple[Compressed, Tensor]:
        """The projection after a gradient step, and the weight less the projection, [out, in].

        now, before: (iterate, gradient) of this iterate and the one before it. beta: the momentum. The gradient is
        linear in the iterate, so the gradient at the point that momentum leads to needs no further product.
        """
        target = self.target
        if target.bits is None and target.structure in ("row", "n:m") and dispatch.use_compiled(weight):
            n_kept, group_size = target.n_of_m or (0, 0)
            n_pruned = group_size - n_kept if group_size else int(target.sparsity * weight.shape[1])
            theta, mask, missing = kernel.descend(weight, now, before, beta, step, n_pruned, group_size)
            return Compressed(theta, mask), missing
        moved = now[0] + step * now[1]
        if beta:
            moved = moved + beta * (now[0] - before[0]) + beta * step * (now[1] - before[1])
        found = self(moved.float(), iteration)
        return found, weight - found.weight


def warm_started(warm_start: Method, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
    """The warm start, rounded if the target has bits; the result is never worse than it."""
    if not target.sparsity:
        return ops.round_to_nearest(layer.weight, target)
    pruned = warm_start.compress(layer, target.pruning, rng)
    if not target.bits:
        return pruned
    rounded = ops.round_to_nearest(pruned.weight, target.grid)
    return replace(rounded, mask=pruned.mask, info=ops.damping_of(pruned))


class Momentum:
    """Nesterov's beta for each iterate; zero after an iterate with a larger error than the one before it."""

    def __init__(self, used: bool) -> None:
        self.used, self.length, self.error = used, 1.0, float("inf")

    def next(self, error: float) -> float:
        """The beta for the step from an iterate with that error; 0 where momentum is not used."""
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
    """The nearest weight of the target's pattern, and its mask: the blocks of largest sum of squares stay."""
    mask = ops.prune_mask(weight.double().square() if target.block else weight.abs(), target)
    return torch.where(mask, weight, 0.0), mask


def with_share(target: Target, share: float) -> Target:
    """The target's pattern with a share, in (0, 1], of its sparsity."""
    if not target.n_of_m:
        return Target(share * target.sparsity, target.pattern)
    n_kept, group_size = target.n_of_m
    n_pruned = int(share * (group_size - n_kept))
    return Target(pattern=f"{group_size - n_pruned}:{group_size}") if n_pruned else Target()


def nearest(distance: Tensor, mask: Tensor, share: float) -> Tensor:
    """[out, in] bool: in each row the share of the entries of the mask that is nearest, and all outside the mask."""
    ranks = distance.masked_fill(~mask, -1.0).argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < ((~mask).sum(1) + (share * mask.sum(1)).long())[:, None]


def step_size(gram: Gram, matrix: Tensor, unit: float, step: str, rounds: bool) -> float:
    """Of the matrix = G / unit, 2 / ||G||_F, 1.5 / ||G||_F or 1 / lambda_max(G); 0 where all inputs are dead."""
    if step == "spectral":
        size = gram.largest_eigenvalue / unit
    else:
        size = float(matrix.double().norm()) / (1.5 if rounds else 2)
    return 1 / size if size > 0 else 0.0
