"""ASVD: a truncated SVD of the weight, with columns scaled by the inputs' mean magnitude.

Yuan et al., section 3.2, the variant with the mean absolute activation. Ranks are equal; the paper's search for each
layer's rank is not included.
"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import low_rank

CARD = {
    "title": "ASVD",
    "paper": "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    "arxiv": "2312.05821",
    "code": "https://github.com/hahnyuan/ASVD4LLM",
    "patterns": ["low rank"],
    "bits": [],
    "updates_weights": True,
    "needs": ["absmean"],
    "cost": {"weights": 8.0, "grams": 0.0, "products": 15.0},
    "look": {"colour": "#999933", "marker": "^"},
    "parameters": {
        "alpha": {"type": "number", "minimum": 0, "description": "Exponent of mean |x| in a column's scale."},
    },
}


@dataclass(frozen=True)
class ASVD(Method):
    """SVD_r(W S) S^-1 with S = diag(mean |x|^alpha), the optimum for the Gram S^2; a scale of 0 needs no inverse.

    It has not been compared with the released code, because none of its outputs are available. Precondition: finite
    statistics.
    """

    alpha: float = 0.5

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        assert layer.statistics is not None  # the card needs them
        size = layer.statistics.absmean.double()
        scale = (size / (size.max() if size.any() else 1.0)) ** self.alpha
        rank = target.rank_of(*layer.weight.shape)
        return low_rank.of_parts(*low_rank.best_factors(layer.weight.double(), rank, torch.diag(scale.square())))
