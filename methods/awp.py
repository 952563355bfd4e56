"""AWP: projected gradient descent on the layer problem, to prune (iterative hard thresholding), to quantise, or both.

Liu et al.: gradient step on tr((W - Theta) G (W - Theta)^T), then the nearest weight that is sparse, on a grid or both.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import gradient_projection as gp

CARD = {
    "title": "AWP",
    "paper": "AWP: Activation-Aware Weight Pruning and Quantization with Projected Gradient Descent",
    "arxiv": "2506.10205",
    "patterns": ["dense", "row", "layer", "n:m", "1xb"],
    "bits": [2, 3, 4, 5, 6, 7, 8],
    "updates_weights": True,
    "needs": ["gram"],
    "keeps_zeros": True,
    "criterion": "error",
    "cost": {"weights": 16.0, "grams": 6.0, "products": 260.0},
    "look": {"colour": "#AA4499", "marker": "D"},
    "checks": {
        "defaults": {"iterations": 20},
        "variants": [
            {"step": "spectral"},
            {"rounding": "gradual"},
            {"acceleration": "momentum"},
            {"grid_from": "gptq", "step": "diagonal", "iterate": "accumulated"},
            {"grid_from": "awq", "rounding": "gradual"},
        ],
        "reference": True,
    },
    "parameters": {
        "warm_start": {"format": "method", "asked": "pruning", "description": "Method that prunes the first iterate."},
        "step": {
            "enum": ["frobenius", "spectral", "diagonal"],
            "acts": {"diagonal": "grid"},
            "description": "frobenius: 2 / ||G||_F, and 1.5 / ||G||_F in iterations that round. spectral: 1 / "
            "lambda_max(G), with which pruning never ascends. diagonal (not in the paper): in iterations that round "
            "1 / (lambda G_jj), lambda the largest eigenvalue of G scaled to ones on its diagonal.",
        },
        "iterations": {
            "type": ["integer", "null"],
            "minimum": 0,
            "description": "Gradient steps at most; null: 200 to prune, 10 to quantise, 100 for both.",
        },
        "tolerance": {
            "type": "number",
            "acts": "pruning alone",
            "minimum": 0,
            "description": "Stops when ||(W - Theta) G||_F / ||W||_F is below this, G in units of its mean diagonal.",
        },
        "rounding": {
            "enum": ["full", "gradual"],
            "acts": "grid",
            "description": "full: all weights in every iteration that rounds. gradual (not in the paper): a rising "
            "share, nearest to the grid first, so that the others make up for them; it needs 200 iterations.",
        },
        "acceleration": {
            "enum": ["none", "momentum"],
            "acts": "pruning alone",
            "description": "momentum (not in the paper): Nesterov's, restarted where the error rises; not with bits.",
        },
        "grid_from": {
            "$ref": "quantised_start",
            "optional": True,
            "asked": "grid",
            "description": "Not in the paper: quantiser with whose result and grid the descent starts. Null: none.",
        },
        "iterate": {
            "enum": ["rounded", "accumulated"],
            "acts": "grid",
            "description": "What steps are added to in iterations that round. rounded: the rounded iterate. accumulated"
            " (not in the paper): their sum, never rounded itself, so that steps too short to change a code add up.",
        },
    },
}


@dataclass(frozen=True)
class AWP(Method):
    """Theta <- projection of Theta + step (W - Theta) G; the best iterate that meets the target is the result.

    To prune, Theta starts from the warm start. With bits it starts from W, whose first projection is RTN's; grids are
    min-max and fitted in every projection, and the result is no worse than RTN or the warm start rounded; or from
    what `grid_from` gives, whose grid stays, and is no worse. `Projection` has the schedule of both, which begins at W.
    No official code is known; the quantised part is as reported, not checked against the paper. Chosen here: the ramp,
    the step by phase, min-max grids, best iterates (also in traces with bits or momentum), the stopping rule's unit.
    """

    warm_start: Any = "wanda"
    step: str = "frobenius"
    iterations: int | None = None
    tolerance: float = 1e-4
    rounding: str = "full"
    acceleration: str = "none"
    grid_from: Any = None
    iterate: str = "rounded"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        began = time.perf_counter()
        problem, prunes, bits = gp.Problem.of(layer, target), bool(target.sparsity), bool(target.bits)
        small = self.tolerance * float(problem.weight.norm()) * float(problem.gram.diagonal().mean())
        iterations = gp.ITERATIONS[prunes, bits] if self.iterations is None else self.iterations
        start = gp.warm_started(self.warm_start, self.grid_from, layer, target, rng)
        held = start.quantised if self.grid_from else None
        projection = gp.Projection(target, layer.keep, iterations, self.rounding == "gradual", held)
        momentum = gp.Momentum(self.acceleration == "momentum" and not bits)
        steps = gp.Steps(layer.gram, problem, projection, self.step, self.iterate == "accumulated", momentum.used)
        theta, found, best, least, trace = problem.in_units(start.weight), None, None, float("inf"), []
        missing = problem.weight - theta
        memory = None if momentum.used else torch.empty_like(missing)  # momentum needs the gradient before
        for iteration in range(iterations + 1):
            gradient = torch.mm(missing, problem.gram, out=memory)  # [out, in], minus half the gradient
            objective, norm = gp.objective_and_norm(gradient, missing)
            if iteration == 0 or projection.reaches(iteration):
                scaled = objective * problem.unit**2 * problem.gram_unit
                if scaled < least:
                    least, best = scaled, found
                told = least if bits or momentum.used else scaled
                trace.append((iteration, time.perf_counter() - began, told))
            if iteration == iterations or (not bits and norm <= small):
                break
            found, missing = steps.take(iteration, theta, gradient, momentum.next(objective))
            theta = found.weight
        return problem.result(best, start, prunes, trace)
