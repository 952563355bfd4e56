"""Wanda: score weights by their magnitude times the norm of their input (Sun et al., equation 1)."""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

CARD = {
    "title": "Wanda",
    "paper": "A Simple and Effective Pruning Approach for Large Language Models",
    "arxiv": "2306.11695",
    "patterns": ["row", "layer", "n:m", "1xb"],
    "bits": [],
    "updates_weights": False,
    "needs": ["gram"],
    "cost": {"weights": 7.5, "grams": 3.7, "products": 0.2},
    "look": {"colour": "#0072B2", "marker": "s"},
    "checks": {"reference": True},
    "parameters": {},
}


@dataclass(frozen=True)
class Wanda(Method):
    """Keeps the largest |W_ij| sqrt(G_jj) of each comparison group: the exact greedy choice for single weights.

    No preconditions; the weights of a dead input score zero and are pruned first.
    """

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        return ops.pruned_by_norm(layer, layer.gram.diagonal.sqrt(), target)
