"""Unfolded IHT: AWP's pruning in a few iterations whose steps are learned on a sample of the layer's rows.

Nagahisa et al. unroll iterative hard thresholding, with a step of its own in each iteration, and train the steps by the
objective itself, or by the distance to a known solution. Here for tr((W - Theta) G (W - Theta)^T).
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import gradient_projection as gp
from layerwise.numerics import learned_steps, ops
from layerwise.numerics.learned_steps import Rows, Steps, Training

CARD = {
    "title": "Unfolded IHT",
    "paper": "Comparison between Supervised and Unsupervised Learning in Deep Unfolded Sparse Signal Recovery",
    "arxiv": "2509.01331",
    "patterns": ["row", "layer", "n:m", "1xb"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "random": True,
    "criterion": "error",
    "cost": {"weights": 29.2, "grams": 3.8, "products": 300.0, "products_per": {"iterations": 25.0, "updates": 10.4}},
    "look": {"colour": "#AA4499", "marker": "P"},
    "checks": {
        "defaults": {"iterations": 4, "updates": 3, "starts": 1},
        "variants": [
            {"begin": "incremental", "momentum": "learned"},
            {"begin": "line_search", "toward": "magnitude"},
            {"threshold": "soft"},
        ],
    },
    "parameters": {
        "warm_start": {"format": "method", "asked": "pruning", "description": "Method that prunes the first iterate."},
        "iterations": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of gradient steps, each with its own size.",
        },
        "rows": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of the layer's rows on which steps are learned.",
        },
        "begin": {
            "enum": ["cycles", "line_search", "incremental"],
            "description": "Where training begins. incremental: with the first iteration, then the first two, and so "
            "on. cycles (not in the paper): with repeated cycles of Chebyshev steps, the best of 48. line_search (not "
            "in the paper): with the best step of each iteration by itself. The last two train all at once.",
        },
        "starts": {"type": "integer", "minimum": 1, "maximum": 48, "description": "Number of cycles that are trained."},
        "updates": {"type": "integer", "minimum": 0, "description": "Adam's updates in each training."},
        "momentum": {"enum": ["none", "learned"], "description": "learned (not in the paper): one for each iteration."},
        "threshold": {
            "enum": ["hard", "soft"],
            "description": "soft: learned thresholds instead of the pattern (ISTA) in all iterations but the last.",
        },
        "toward": {
            "format": "method",
            "optional": True,
            "asked": "pruning",
            "description": "Method whose weights the steps approach (supervised). null: they lower the error.",
        },
    },
}


@dataclass(frozen=True)
class Unfolded(Method):
    """Each row's best iterate of the warm start and learned steps; with a layer's pattern the best whole iterate.

    Steps are in units of 1 / lambda_max(G), learned on rows that `rng` draws among those with an error, and are in
    `info["learned"]`. The seconds of the trace count the training. Chosen here: Adam's rate, .1 on logarithms, falling
    as a cosine; the best cycles by their loss on the rows. Precondition: a finite Gram.
    """

    warm_start: Any = "wanda"
    iterations: int = 12
    rows: int = 64
    begin: str = "cycles"
    starts: int = 3
    updates: int = 20
    momentum: str = "none"
    threshold: str = "hard"
    toward: Any = None

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        began = time.perf_counter()
        problem, start = gp.Problem.of(layer, target), self.warm_start.compress(layer, target, rng)
        rows = Rows.of_layer(layer, problem, start, target)
        steps = self.learned(layer, rows, problem.unit, rng)
        scale, best, trace = problem.unit**2 * layer.gram.largest_eigenvalue, None, []
        for iteration, kept, error in learned_steps.best_iterates(rows, steps):
            best = kept
            trace.append((iteration, time.perf_counter() - began, scale * error))
        result = problem.result(best, start, True, trace)
        parts = {"steps": steps.sizes, "momentum": steps.momentum, "thresholds": steps.thresholds}
        told = {name: part.tolist() for name, part in parts.items() if part is not None}
        return replace(result, info={**result.info, "learned": told})

    def learned(self, layer: Layer, rows: Rows, unit: float, rng: torch.Generator) -> Steps:
        """Steps for rows that are the layer's in that unit; none where no row has an error, or no better weights."""
        missing = rows.weight - rows.start
        wrong = ops.inner(missing @ rows.gram, missing).nonzero().flatten()
        order = torch.randperm(len(wrong), generator=rng, device=rng.device).to(wrong.device)
        chosen = wrong[order[: self.rows]]
        sample = rows.of(chosen)
        aim = sample.weight
        if self.toward is not None and len(chosen):
            given = replace(layer, weight=layer.weight[chosen])
            aim = ops.scaled(self.toward.compress(given, rows.target, rng).weight, 1 / unit)
        if torch.equal(aim, sample.start):
            return Steps(rows.weight.new_empty(0))
        loss = learned_steps.own_error(sample) if self.toward is None else learned_steps.distance_to(sample, aim)
        momentum, soft = self.momentum == "learned", self.threshold == "soft"
        training = Training(self.iterations, self.begin, self.updates, self.starts, momentum, soft)
        return training.learn(sample, loss)
