"""SparseFW: the mask relaxed to [0, 1] and optimised by Frank-Wolfe, then rounded (Roux et al., algorithm 2).

Minimise f(M) = tr((W o (1 - M)) G (W o (1 - M))^T) over masks M in [0, 1] of which each comparison group sums to at
most k. A share of the k, the weights that the warm start values most, is fixed at 1 beforehand.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops
from layerwise.numerics.relaxation import relaxed_masks

CARD = {
    "title": "SparseFW",
    "paper": "Don't Be Greedy, Just Relax! Pruning LLMs via Frank-Wolfe",
    "arxiv": "2510.13713",
    "code": "https://github.com/ZIB-IOL/SparseFW",
    "patterns": ["row", "layer", "n:m"],
    "bits": [],
    "updates_weights": False,
    "needs": ["gram"],
    "criterion": "relaxed error",
    "cost": {"weights": 27.0, "grams": 10.0, "products": 2000.0, "products_where": {"step": {"pairwise": 60.0}}},
    "look": {"colour": "#CC79A7", "marker": "P"},
    "checks": {
        "defaults": {"iterations": 60},
        "variants": [
            {"step": "line_search", "keep": 0.5, "iterations": 20},
            {"step": "pairwise", "keep": 0.5, "iterations": 20},
        ],
        "reference": True,
        "no_descent": "2 / (t + 2) is no descent step, and the first is a whole one",
    },
    "parameters": {
        "warm_start": {
            "format": "method",
            "description": "Method whose mask is the first iterate, and whose saliency says what is fixed.",
        },
        "keep": {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "description": "Share of what each row, or the layer, keeps that is fixed (the paper's alpha).",
        },
        "iterations": {"type": "integer", "minimum": 0, "description": "Frank-Wolfe steps."},
        "step": {
            "enum": ["published", "line_search", "pairwise"],
            "description": "published: 2 / (t + 2). line_search: the best step, for each row where rows are separate. "
            "pairwise (not in the paper): the best exchanges between two entries of a group; an iteration makes as "
            "many in each row, or the layer, as it has entries to choose.",
        },
        "tolerance": {
            "type": "number",
            "minimum": 0,
            "description": "Duality gap, in units of the warm start's error, at which `pairwise` ends a row or layer.",
        },
    },
}
TRACED = 10  # every so many iterations, and the first as many, are in the trace


@dataclass(frozen=True)
class FrankWolfe(Method):
    """The better of the warm start's mask and the rounded relaxed one. Precondition: a finite Gram.

    In float64: near the relaxed optimum the gradient's entries are nearly equal, and rounding decides which are chosen.
    After many line searches over a whole layer even a scale that rounds the weights can move an entry of the mask.

    trace: the relaxed objective, which the published step lets rise. info: `duality_gaps` in the trace's rows, the last
    one as `duality_gap` (no mask that keeps the fixed weights is better than the relaxed objective minus the gap), and
    `rounded_objective`, of the mask that rounding gave, used or not.
    """

    warm_start: Any = "wanda"
    keep: float = 0.9
    iterations: int = 2000
    step: str = "published"
    tolerance: float = 1e-4

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        begin = time.perf_counter()
        warm_start = self.warm_start.compress(layer, target, rng)
        started = warm_start.mask
        if self.keep == 1:
            return replace(ops.masked(layer, started, target), info=ops.damping_of(warm_start))
        fixed = self.fixed(layer, started, target, rng)
        run = relaxed_masks(layer, started, fixed, target, self.step)
        trace, gaps, done, (warm, _) = [], [], 0, run.measure()
        for t in range(self.iterations + 1):
            if self.step != "pairwise" and t >= TRACED and t % TRACED and t != self.iterations:
                continue
            run.advance(done, t)
            done = t
            objectives, gap = run.measure()
            trace.append((t, time.perf_counter() - begin, float(objectives.sum())))
            gaps.append(float(gap.sum()))
            if self.step == "pairwise":
                run.active = gap > self.tolerance * warm
                if not run.active.any():
                    break
        rounded = ops.prune_mask(torch.where(fixed, 2.0, run.rounding(started)), target)
        reached = [ops.mask_objective(layer.weight, layer.gram.matrix, mask) for mask in (started, rounded)]
        best = rounded if reached[1] < reached[0] * (1 - 1e-9) else started
        info = {
            **ops.damping_of(warm_start),
            "duality_gap": gaps[-1],
            "duality_gaps": tuple(gaps),
            "rounded_objective": reached[1],
        }
        return replace(ops.masked(layer, best, target), trace=tuple(trace), info=info)

    def fixed(self, layer: Layer, started: Tensor, target: Target, rng: torch.Generator) -> Tensor:
        """[out, in] bool, what of the warm start's mask is fixed: the floor(keep k) of k that it values most."""
        held = int(self.keep * int((started if target.pattern == "layer" else started[0]).sum()))
        if not held:
            return torch.zeros_like(started)
        if target.n_of_m:  # asked by row, what is pruned must not come first
            layer = replace(layer, weight=torch.where(started, layer.weight, 0.0))
        return self.warm_start.compress(layer, ops.keeping(held, target, started.shape), rng).mask & started
