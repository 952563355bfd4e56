"""SVD-LLM: the best weight of a rank for the layer's Gram, by truncation-aware whitening (Wang et al., section 3.1).

Whitened by any root L of G, the error of truncating the SVD of W L is that of the layer: no matrix of the rank has a
smaller one (Eckart and Young in the Gram's norm).
"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import low_rank, ops

CARD = {
    "title": "SVD-LLM",
    "paper": "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    "arxiv": "2403.07378",
    "code": "https://github.com/AIoT-MLSys-Lab/SVD-LLM",
    "patterns": ["low rank"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "cost": {"weights": 8.0, "grams": 4.0, "products": 24.0},
    "look": {"colour": "#0072B2", "marker": "D"},
    "parameters": {},
}


@dataclass(frozen=True)
class SVDLLM(Method):
    """SVD_r(W L) L^-1 for G = L L^T in float64, computed as U U^T W with U the leading left singular vectors of W L.

    That needs no inverse: a singular Gram, on whose Cholesky factor the released code adds a multiple of the identity,
    is taken as it is. Columns of dead inputs differ from the released ones, with no effect on the output. Its update of
    U on a few sequences is not offered: for the layer's error there is nothing to gain. Precondition: a finite Gram.
    """

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        weight, gram = ops.in_float64(layer)
        return low_rank.of_parts(*low_rank.best_factors(weight, target.rank_of(*weight.shape), gram))
