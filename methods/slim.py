"""SLiM: a low-rank correction of a pruned layer, from the size of the inputs alone (Mozaffari et al., section 3.2).

With D = diag(sqrt(mean x_j^2)) the factors are SVD_r((W - S) D) D^-1: the best correction of its rank for the diagonal
of the Gram. EoRA uses the whole Gram.
"""

from dataclasses import dataclass
from typing import Any

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import low_rank, ops

CARD = {
    "title": "SLiM",
    "paper": "SLiM: One-shot Quantization and Sparsity with Low-rank Approximation for LLM Weight Compression",
    "arxiv": "2410.09615",
    "code": "https://github.com/Paramathic/slim",
    "patterns": ["row", "layer", "n:m", "1xb"],
    # its single scale for a whole tensor is not a grid of the contract, which has at least one scale per row
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "sums": True,
    "cost": {"weights": 14.0, "grams": 4.0, "products": 15.0},
    "look": {"colour": "#CC79A7", "marker": "^"},
    "checks": {"variants": [{"mask": {"sparsegpt": {}}}]},
    "parameters": {
        "mask": {
            "format": "method",
            "asked": "rest",
            "description": "Method that prunes: wanda, sparsegpt, or another. Its result is the part S.",
        },
    },
}


@dataclass(frozen=True)
class SLiM(Method):
    """S is the result of `mask` at the target without its rank; B A is the correction of W - S, in float64.

    It is computed as U U^T (W - S), with U the leading left singular vectors of (W - S) D, which needs no inverse. The
    columns of dead inputs differ from those of the formula, with no effect on the output. The paper's quantisation of S
    and of the factors, and its tuning, are not included. It has not been compared with the released code.
    Preconditions: those of `mask`.
    """

    mask: Any = "wanda"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        part = self.mask.compress(layer, target.rest, rng)
        weight, gram = ops.in_float64(layer)
        missing = weight - part.weight.double()
        scale = gram.diagonal().clamp(min=0).sqrt()  # [in]
        left = low_rank.leading(missing * scale, target.rank_of(*weight.shape))
        return low_rank.of_parts(left, left.T @ missing, part, ops.damping_of(part))
