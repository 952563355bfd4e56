"""SparseFW: relax the mask to [0, 1], optimise it by Frank-Wolfe, and round it (Roux et al., algorithm 2).

Minimise f(M) = tr((W o (1 - M)) G (W o (1 - M))^T) over masks M in [0, 1] in which each comparison group sums to at
most k. A share of the k entries, those with the highest saliency in the warm start, is fixed at 1 beforehand.
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
        "no_descent": "2 / (t + 2) is not a descent step, and the first step is a full one",
    },
    "parameters": {
        "warm_start": {
            "format": "method",
            "description": "Method whose mask is the first iterate, and whose saliency selects the fixed entries.",
        },
        "keep": {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "description": "Share of the kept entries of each row, or of the layer, that is fixed (the paper's alpha).",
        },
        "iterations": {"type": "integer", "minimum": 0, "description": "Frank-Wolfe steps."},
        "step": {
            "enum": ["published", "line_search", "pairwise"],
            "description": "published: 2 / (t + 2). line_search: the best step, for each row where rows are separate. "
            "pairwise (not in the paper): the best exchanges between two entries of a group; an iteration makes one "
            "exchange for each entry to choose in the row, or in the layer.",
        },
        "tolerance": {
            "type": "number",
            "minimum": 0,
            "description": "Duality gap, in units of the warm start's error, at which `pairwise` ends a row or layer.",
        },
    },
}
TRACED = 10  # the trace has the first TRACED iterations, and then every TRACED-th


@dataclass(frozen=True)
class FrankWolfe(Method):
    """The better of the warm start's mask and the rounded relaxed one. Precondition: a finite Gram.

    Computed in float64: near the relaxed optimum the gradient's entries are nearly equal, and rounding decides the
    choice. After many line searches over a whole layer, even a rescaling that rounds the weights can change an entry of
    the mask.

    trace: the relaxed objective, which can rise with the published step. info: `duality_gaps`, one for each row of the
    trace; the last one as `duality_gap` (no mask that keeps the fixed weights is better than the relaxed objective
    minus the gap); and `rounded_objective`, that of the rounded mask, whether it is used or not.
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
        del run
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
        """[out, in] bool, the fixed entries of the warm start's mask: the floor(keep k) of k with the highest
        saliency."""
        held = int(self.keep * int((started if target.pattern == "layer" else started[0]).sum()))
        if not held:
            return torch.zeros_like(started)
        if target.n_of_m:  # the target is by row here, so pruned entries must not come first
            layer = replace(layer, weight=torch.where(started, layer.weight, 0.0))
        return self.warm_start.compress(layer, ops.keeping(held, target, started.shape), rng).mask & started
