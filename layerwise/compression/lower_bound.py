"""A lower bound on the error of every mask of a pattern on one layer: no mask can be better.

Let p in {0, 1} mark the pruned entries and x = w o p be the part that a row loses. The error is the sum over the rows
of xt G x. Since p = p^2 for a mask, it is also, for every diagonal D,

    f(p) = xt (G - D) x + sum_i D_ii w_i^2 p_i,

which is convex over the relaxed p in [0, 1] as long as G - D has no negative eigenvalue. For convex f and any p,

    every mask's error >= f(p) - max over masks v of <grad f(p), p - v>,

the Frank-Wolfe gap (Jaggi, ICML 2013), whose maximum is a sort. D = 0 is the relaxation of SparseFW (arXiv 2510.13713),
in which a small weight is half pruned at a quarter of its cost; the D that raises f most there removes this discount as
far as convexity permits (Poljak, Rendl and Wolkowicz, J. Global Optim. 7, 1995). The bound is valid for any p and D.
Their choice decides how tight it is, not whether it is true.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Layer, Target
from layerwise.contract.target import CERTIFIED, LOW_RANK
from layerwise.numerics import low_rank, ops
from layerwise.numerics.comparison_groups import Groups, groups_of

ITERATIONS = 100  # at most, in each of two relaxations
EVERY = 10  # iterations between two evaluations of the bound
TOLERANCE = 2e-3  # the Frank-Wolfe gap, as a share of the bound, at which a relaxation is solved
ROUNDING = 1e-9  # relative reduction of the bound, and least allowance for rounding in eigenvalues
CANCELLATION = 1e-12  # further reduction of the bound, as a share of the sum of w_j^2 G_jj
INTERIOR = 1e-6  # margin by which the first D leaves G - D positive definite
SMALLEST_STEP = 1e-6  # a Newton step shortened further than this ends the search for D
FLOAT32 = 2.0**-23  # twice the largest relative rounding of a number in float32
RELAXATION = 1.6  # over-relaxation of ADMM (Boyd et al. 2011, section 3.4.3)


@dataclass(frozen=True)
class Bound:
    """error: no mask has a smaller tr((W - W_hat) G (W - W_hat)^T). plain: the same bound with D = 0 (nearly 0 if G is
    singular). gap: the remaining Frank-Wolfe gap, the most by which a longer run could raise `error`."""

    error: float
    plain: float
    gap: float


def lower_bound(layer: Layer, target: Target) -> Bound:
    """Bound on the error of every mask of a row, layer or n:m target on a layer.

    For a target with low-rank factors alone, the bound is on the error of every matrix of the rank (`low_rank_bound`).
    Raises ValueError for another target and when the weight or the Gram is not finite.
    """
    if target.structure == LOW_RANK:
        return low_rank_bound(layer, target)
    if target.rank:
        raise ValueError(
            f"The target of a lower bound must be a mask or low-rank factors alone. Got {target.label} instead."
        )
    if target.structure not in CERTIFIED:
        raise ValueError(
            f"The pattern of a lower bound must be one of {', '.join(CERTIFIED)}. Got {target.label} instead."
        )
    gram, gram_unit = ops.normalised(layer.gram.matrix)
    weight, weight_unit = ops.normalised(layer.weight)
    scale = gram.double().diagonal().clamp(min=0).sqrt()
    correlation = gram.double() / scale.where(scale > 0, 1.0) / scale.where(scale > 0, 1.0)[:, None]
    correlation.diagonal().fill_(1.0)  # a dead input, whose scale is 0, has no other entry
    problem = Relaxation(weight.double() * scale, groups_of(target, layer.weight))
    # In float32 a singular Gram can have an eigenvalue just below zero. D need not go lower than that.
    shift = min(0.0, float(torch.linalg.eigvalsh(correlation)[0])) - rounding(correlation)
    shrink = torch.full_like(scale, shift)
    plain, gap, relaxed = problem.solve(correlation, shrink)
    error = plain
    gain = (problem.lengths.square() * relaxed * (1 - relaxed)).sum(0)  # gain of the bound per unit of D
    if gain.sum() > 0:
        better, left, _ = problem.solve(correlation, strengthened(correlation, gain, shrink), relaxed)
        if better > error:
            error, gap = better, left
    unit = weight_unit**2 * gram_unit
    return Bound(max(error, 0.0) * unit, max(plain, 0.0) * unit, gap * unit)


def low_rank_bound(layer: Layer, target: Target) -> Bound:
    """The least error of any matrix of the target's rank, which is known exactly (Eckart and Young in the Gram's norm).

    It is lowered by two effects that can bring a result below it: the weight B A is rounded to float32, independently
    entry by entry, and rounding can leave eigenvalues of the Gram below zero.
    """
    (weight, gram), rank = ops.in_float64(layer), target.rank_of(*layer.weight.shape)
    least = low_rank.optimum(layer.weight, layer.gram, rank)
    rounded = FLOAT32 * float((weight.square() @ gram.diagonal().clamp(min=0)).sum()) ** 0.5
    below = min(0.0, float(layer.gram.once("least eigenvalue", lambda: torch.linalg.eigvalsh(gram)[0])))
    bound = max(least**0.5 - rounded, 0.0) ** 2 * (1 - ROUNDING) + 4 * below * float(weight.square().sum())
    return Bound(max(bound, 0.0), max(bound, 0.0), 0.0)


class Relaxation:
    """min over p of f(p) for lengths a = w sqrt(diag G) [out, in] float64 and the correlations of the inputs."""

    def __init__(self, lengths: Tensor, groups: Groups) -> None:
        self.lengths, self.groups = lengths, groups

    def solve(self, correlation: Tensor, shrink: Tensor, start: Tensor | None = None) -> tuple[float, float, Tensor]:
        """The bound, the remaining gap and the relaxed p [out, in], for D = diag(shrink) in units of the correlation.

        ADMM on x = a o p, which solves for x with one matrix for all rows, then projects p.
        """
        convex = correlation - torch.diag(shrink)
        linear = shrink * self.lengths.square()
        identity = torch.eye(len(convex), dtype=convex.dtype)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(2 * convex + identity))
        lengths, force = self.lengths, shrink * self.lengths
        curvature = lengths.square()
        # If inputs cancel, the error is far smaller than the products in its sum, and their rounding matters.
        margin = CANCELLATION * float(curvature.sum())
        # For a weight of almost zero length any p will do, as long as it does not drown the others in rounding.
        curvature = curvature.clamp(min=max(1e-13 * float(curvature.max()), 1e-200))
        reciprocal, metric = lengths / curvature, self.groups.metric(curvature)
        relaxed, price = self.groups.project(torch.zeros_like(lengths), metric, lengths.new_zeros(()))
        if start is not None:
            relaxed = start
        point, dual = lengths * relaxed, torch.zeros_like(lengths)
        best, gap, answer = float("-inf"), float("inf"), relaxed
        for iteration in range(ITERATIONS + 1):
            if iteration % EVERY == 0:
                product = point @ convex
                quadratic = float((product * point).sum())
                bound = float(self.groups.smallest(2 * self.lengths * product + linear)) - quadratic
                bound -= ROUNDING * abs(bound) + margin
                value = quadratic + float((linear * relaxed).sum())
                if bound > best:
                    best, gap, answer = bound, max(value - bound, 0.0), relaxed
                if gap <= TOLERANCE * best:
                    break
            free = (point - dual - force) @ inverse
            free = RELAXATION * free + (1 - RELAXATION) * point
            relaxed, price = self.groups.project((free + dual) * reciprocal, metric, price)
            point = lengths * relaxed
            dual += free - point
        return best, gap, answer


def rounding(correlation: Tensor) -> float:
    """Largest rounding error in an eigenvalue, or in a Cholesky test, of a matrix with a unit diagonal."""
    return max(ROUNDING, len(correlation) ** 2 * torch.finfo(correlation.dtype).eps)


def strengthened(correlation: Tensor, gain: Tensor, start: Tensor, steps: int = 12) -> Tensor:
    """D [in] that nearly maximises gain . D while the correlation [in, in] minus diag(D) stays positive definite.

    Newton's method on gain . D + t log det(C - diag D) with decreasing t. start: a feasible D.
    """
    gain = gain / gain.mean() + 1e-3  # without a gain, D of an input would decrease without limit
    barrier, shrink, margin = 0.1, start - INTERIOR, rounding(correlation)
    for _ in range(steps):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation - torch.diag(shrink)))
        ascent = gain - barrier * inverse.diagonal()
        step = torch.linalg.solve(barrier * inverse.square(), ascent)
        size = 1.0
        while torch.linalg.cholesky_ex(correlation - torch.diag(shrink + size * step + margin)).info:
            size /= 2
            if size < SMALLEST_STEP:
                return shrink
        shrink = shrink + size * step
        if size == 1.0:
            barrier *= 0.2
    return shrink
