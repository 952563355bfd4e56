"""EoRA: the best low-rank correction of another method's error on a layer (Liu et al., algorithm 1).

In the eigenbasis of the Gram, scaled by the roots of its eigenvalues, the truncated SVD of W - S is the correction of
its rank with the least error of the layer (Eckart and Young in the Gram's norm).
"""

from dataclasses import dataclass
from typing import Any

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target, UnsupportedTarget
from layerwise.numerics import low_rank, ops

CARD = {
    "title": "EoRA",
    "paper": "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
    "arxiv": "2410.21271",
    "code": "https://github.com/NVlabs/EoRA",
    "patterns": ["dense", "row", "layer", "n:m", "1xb"],
    "bits": [2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4"],
    "updates_weights": True,
    "needs": ["gram"],
    "sums": True,
    "cost": {"weights": 10.0, "grams": 4.0, "products": 24.0},
    "look": {"colour": "#56B4E9", "marker": "D"},
    "checks": {"variants": [{"after": "wanda"}, {"after": {"sparsegpt": {}}}, {"after": "rtn"}]},
    "parameters": {
        "after": {
            "format": "method",
            "asked": "rest",
            "gives": ["gram", "mean", "absmean", "sequence_variance", "sample", "first_tokens"],
            "description": "Method that prunes or quantises: the part S; not one that needs the cross-Gram, because "
            "the factors would undo its correction.",
        },
    },
}


@dataclass(frozen=True)
class EoRA(Method):
    """S is the result of `after` at the target without its rank; B A is the best correction. Never worse than S alone.

    It is computed in float64 as U U^T (W - S), with U the leading left singular vectors of (W - S) L for G = L L^T,
    which needs no inverse. It has not been compared with the released code, because none of its outputs are available.
    Preconditions: those of `after`.
    """

    after: Any = "gptq"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        if reason := self.after.refusal(target.rest):
            raise UnsupportedTarget(f"eora's after cannot be used: {reason}. Got the target {target.label} instead.")
        part = self.after.compress(layer, target.rest, rng)
        weight, gram = ops.in_float64(layer)
        factors = low_rank.best_factors(weight - part.weight.double(), target.rank_of(*weight.shape), gram)
        return low_rank.of_parts(*factors, part, ops.damping_of(part))
