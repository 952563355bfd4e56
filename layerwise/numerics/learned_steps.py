"""Iterative thresholding whose steps are learned: iterations unrolled over some rows, and trained by gradient descent.

Deep unfolding (Nagahisa et al., arXiv 2509.01331): Theta <- H_k(Theta + eta_t (W - Theta) G), each eta_t a parameter of
its own. H_k passes gradients through the entries that it keeps. Steps are in units of 1 / lambda_max(G).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Target
from layerwise.numerics import gradient_projection as gp
from layerwise.numerics import ops
from layerwise.numerics.adam import Adam

RATE = 0.1  # Adam's, of the logarithms of steps and thresholds, and of momentum
LENGTHS = (1, 2, 3, 4, 6, 12)  # of cycles of steps
LOWEST = (0.3, 0.1, 0.05, 0.03, 0.02, 0.01, 0.003, 0.001)  # lower ends of the spectrum that a cycle is made for
THRESHOLDS = (0.01, 0.03, 0.1, 0.3)  # tried with each cycle
TRIED = [0.5 * 200 ** (i / 19) for i in range(20)]  # steps of the line search, 0.5 to 100


@dataclass(frozen=True)
class Rows:
    """Rows of a layer: weight and start [rows, in], start of the target's pattern with its mask, and a Gram [in, in].

    gram: divided by its largest eigenvalue. All are of one floating dtype, in which everything is computed.
    """

    weight: Tensor
    gram: Tensor
    start: Tensor
    mask: Tensor
    target: Target

    @staticmethod
    def of_layer(layer: Layer, problem: gp.Problem, start: Compressed, target: Target) -> Rows:
        """All rows of a layer, in the units of its problem; a start of theirs in the layer's own."""
        largest = layer.gram.largest_eigenvalue / problem.gram_unit or 1.0
        mask = torch.ones_like(start.weight, dtype=torch.bool) if start.mask is None else start.mask
        theta = problem.in_units(start.weight)
        return Rows(problem.weight, problem.gram / largest, theta, mask, target)

    def of(self, rows: Tensor) -> Rows:
        """The rows of these indices."""
        return replace(self, weight=self.weight[rows], start=self.start[rows], mask=self.mask[rows])


@dataclass(frozen=True)
class Steps:
    """What is learned of T iterations, [T] each. None where an iteration has no such part.

    sizes: in units of 1 / lambda_max(G), positive. momentum: Nesterov's beta; the first is not used. thresholds: of
    soft thresholding, in units of each row's mean |W|, positive; the last is not used, for the last iteration is H_k.
    """

    sizes: Tensor
    momentum: Tensor | None = None
    thresholds: Tensor | None = None

    def changed(self, change: Steps) -> Steps:
        """Sizes and thresholds times the exponentials of a change of them, momentum plus its change."""
        momentum, thresholds = self.momentum, self.thresholds
        if momentum is not None and change.momentum is not None:
            momentum = momentum + change.momentum
        if thresholds is not None and change.thresholds is not None:
            thresholds = thresholds * change.thresholds.exp()
        return Steps(self.sizes * change.sizes.exp(), momentum, thresholds)

    def each(self, change: Callable[[Tensor], Tensor]) -> Steps:
        """The same change of all parts."""
        parts = (self.sizes, self.momentum, self.thresholds)
        return Steps(*(None if part is None else change(part) for part in parts))  # pyright: ignore[reportArgumentType]


class Iterate(NamedTuple):
    """Theta, W - Theta, and (W - Theta) G, [rows, in] each. mask: where Theta is kept; None after soft thresholding."""

    theta: Tensor
    missing: Tensor
    gradient: Tensor
    mask: Tensor | None

    @property
    def error(self) -> Tensor:
        """tr((W - Theta) G (W - Theta)^T), a float64 scalar."""
        return ops.inner(self.gradient, self.missing).sum()


Loss = Callable[[Iterate], Tensor]


def iterates(rows: Rows, steps: Steps) -> Iterator[Iterate]:
    """The start, and what each iteration gives; differentiable in the steps.

    With thresholds all iterations but the last threshold softly; the others keep the largest entries.
    """
    theta, mask, before, count = rows.start, rows.mask, None, len(steps.sizes)
    for t in range(count + 1):
        missing = rows.weight - theta
        now = Iterate(theta, missing, missing @ rows.gram, mask)
        yield now
        if t == count:
            return
        size = steps.sizes[t]
        moved = theta + size * now.gradient
        if steps.momentum is not None and before is not None:  # the gradient is linear in Theta: no further product
            moved = moved + steps.momentum[t] * (theta - before.theta + size * (now.gradient - before.gradient))
        if steps.thresholds is not None and t + 1 < count:
            limit = steps.thresholds[t] * rows.weight.abs().mean(1, keepdim=True)
            theta, mask = moved.sign() * (moved.abs() - limit).clamp(min=0), None
        else:
            mask = gp.project(moved.detach(), rows.target)[1]
            theta = torch.where(mask, moved, 0.0)
        before = now


def last(rows: Rows, steps: Steps) -> Iterate:
    """The iterate after all steps."""
    *_, found = iterates(rows, steps)
    return found


def best_iterates(rows: Rows, steps: Steps) -> Iterator[tuple[int, Compressed, float]]:
    """After the start, and each iteration that ends on the pattern: its number, the best so far, and that one's error.

    The best is that of each row, where rows do not compete with each other. It is never worse than the start.
    """
    weight, mask, whole = rows.start, rows.mask, rows.target.pattern == "layer"
    least = torch.full((len(weight),), math.inf, dtype=torch.float64, device=weight.device)
    for number, now in enumerate(iterates(rows, steps)):
        if now.mask is None:
            continue
        errors = ops.inner(now.gradient, now.missing)
        better = (errors.sum() < least.sum()).expand(len(errors)) if whole else errors < least
        least = torch.where(better, errors, least)
        weight = torch.where(better[:, None], now.theta, weight)
        mask = torch.where(better[:, None], now.mask, mask)
        yield number, Compressed(weight, mask), float(least.sum())


def own_error(rows: Rows) -> Loss:
    """Unsupervised: the rows' output error, in units of the start's."""
    return _relative(lambda iterate: iterate.error, rows)


def distance_to(rows: Rows, weight: Tensor) -> Loss:
    """Supervised: the squared distance to a weight [rows, in], in units of the start's."""
    return _relative(lambda iterate: (iterate.theta - weight).double().square().sum(), rows)


def _relative(measure: Loss, rows: Rows) -> Loss:
    """Raises ValueError where the start's is zero, so that there is nothing to learn."""
    missing = rows.weight - rows.start
    unit = float(measure(Iterate(rows.start, missing, missing @ rows.gram, rows.mask)))
    if unit == 0:
        raise ValueError("The start of learned steps must differ from what they aim at. Got the same instead.")
    return lambda iterate: measure(iterate) / unit


def value(rows: Rows, steps: Steps, loss: Loss) -> float:
    """The loss after all steps, infinite where it is not a number."""
    found = float(loss(last(rows, steps)))
    return found if math.isfinite(found) else math.inf


def trained(rows: Rows, steps: Steps, loss: Loss, updates: int) -> tuple[Steps, float]:
    """The best steps among the given ones and so many updates of all of them together, and their loss.

    Adam on the logarithms of sizes and thresholds and on the momentum, its rate falling to zero as a cosine. It ends
    early where the loss or its gradient is no longer finite.
    """
    change = steps.each(lambda part: torch.zeros_like(part).requires_grad_(True))
    learned = [part for part in vars(change).values() if part is not None]
    adam, best, least = Adam(learned), steps, math.inf
    for update in range(updates + 1):
        with torch.enable_grad():
            now = steps.changed(change)
            found = loss(last(rows, now))
        if not math.isfinite(reached := float(found.detach())):
            break
        if reached < least:
            least, best = reached, now.each(lambda part: part.detach().clone())
        if update == updates:
            break
        gradients = torch.autograd.grad(found, learned, materialize_grads=True)
        if not all(gradient.isfinite().all() for gradient in gradients):
            break
        adam.update(gradients, RATE * (1 + math.cos(math.pi * update / updates)) / 2)
    return best, least


def cycle(length: int, lowest: float, count: int) -> Tensor:
    """[count] steps that repeat a cycle: the best for gradient descent on a spectrum in [lowest, 1], short ones first.

    The inverse roots of a Chebyshev polynomial of that degree.
    """
    angles = torch.arange(1, length + 1, dtype=torch.float64).sub(0.5) * (math.pi / length)
    sizes = 2 / ((1 + lowest) + (1 - lowest) * angles.cos())
    return sizes.repeat(-(-count // length))[:count]


@dataclass(frozen=True)
class Training:
    """How the steps of `count` iterations are learned.

    begin: `cycles` trains the steps of each of the `starts` best cycles, `line_search` those of a line search, all
    iterations together; `incremental`, as published, the first iteration, then the first two, and so on, from steps of
    1. updates: of each training. momentum, soft: whether iterations have momentum, and soft thresholds.
    """

    count: int
    begin: str
    updates: int
    starts: int
    momentum: bool
    soft: bool

    def learn(self, rows: Rows, loss: Loss) -> Steps:
        """The steps with the least loss that is found. Raises ValueError where no cycle has a finite one."""
        if self.begin == "incremental":
            return self.incremental(rows, loss)
        begun = self.cycles(rows, loss)[: self.starts] if self.begin == "cycles" else [self.line_search(rows, loss)]
        if not begun:
            raise ValueError("Learned steps must start from a cycle with a finite loss. Got none instead.")
        return min((trained(rows, steps, loss, self.updates) for steps in begun), key=lambda found: found[1])[0]

    def untrained(self, sizes: Tensor, threshold: float = THRESHOLDS[0]) -> Steps:
        """Steps of these sizes, without any momentum yet, and with one threshold."""
        momentum = torch.zeros_like(sizes) if self.momentum else None
        return Steps(sizes, momentum, torch.full_like(sizes, threshold) if self.soft else None)

    def cycles(self, rows: Rows, loss: Loss) -> list[Steps]:
        """All cycles, with each of the thresholds, by rising loss; without those whose loss is not finite."""
        tried = []
        for length in LENGTHS:
            for lowest in LOWEST:
                for threshold in THRESHOLDS[: None if self.soft else 1]:
                    steps = self.untrained(cycle(length, lowest, self.count).to(rows.weight), threshold)
                    tried.append((value(rows, steps, loss), len(tried), steps))
        return [steps for found, _, steps in sorted(tried, key=lambda one: one[:2]) if found < math.inf]

    def line_search(self, rows: Rows, loss: Loss) -> Steps:
        """For one iteration after the other the size with the least loss, if it were the last iteration."""
        sizes = rows.weight.new_empty(0)
        for _ in range(self.count):
            tried = [torch.cat([sizes, sizes.new_full((1,), size)]) for size in TRIED]
            sizes = min(tried, key=lambda candidate: value(rows, self.untrained(candidate), loss))
        return self.untrained(sizes)

    def incremental(self, rows: Rows, loss: Loss) -> Steps:
        """A further iteration begins with the steps of the last one."""
        steps = self.untrained(rows.weight.new_ones(1))
        for number in range(self.count):
            steps = steps.each(lambda part: torch.cat([part, part[-1:]])) if number else steps
            steps, _ = trained(rows, steps, loss, self.updates)
        return steps
