"""FWSVD: a truncated SVD of the weight, with rows scaled by the gradients of the model's loss (Hsu et al.).

The result is D^-1 SVD_r(D W) with D = diag(sqrt(f)), where f_i is the sum over row i of the mean squared gradients. It
weights the error of the weight, not of the output, by the importance of each row for the loss (section 4, with rows for
outputs).
"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import low_rank

CARD = {
    "title": "FWSVD",
    "paper": "Language model compression with weighted low-rank factorization",
    "arxiv": "2207.00112",
    "patterns": ["low rank"],
    "bits": [],
    "updates_weights": True,
    "needs": ["fisher"],
    "cost": {"weights": 8.0, "grams": 0.0, "products": 15.0},
    "look": {"colour": "#882255", "marker": "v"},
    "parameters": {},
}


@dataclass(frozen=True)
class FWSVD(Method):
    """W V V^T in float64, with V the r leading right singular vectors of D W.

    This is D^-1 SVD_r(D W) if D has an inverse, and its limit if some f_i is 0, without a division. If all f_i are 0,
    all rows have equal weight, and it is the plain SVD. There is no released code. Precondition: finite f >= 0.
    """

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        assert layer.fisher is not None  # the card needs it
        weight, fisher = layer.weight.double(), layer.fisher.double()
        scale = (fisher / fisher.max()).sqrt() if fisher.any() else torch.ones_like(fisher)  # [out]
        right = low_rank.leading((weight * scale[:, None]).T, target.rank_of(*weight.shape))  # [in, r]
        return low_rank.of_parts(weight @ right, right.T)
