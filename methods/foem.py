"""FOEM: GPTQ with errors measured partly from the original weight instead of the updated one.

Zheng et al., with the two coefficients of the code in GPTQModel: beta is FOEM's own, alpha is GPTAQ's. Before a column
is rounded, it moves back towards the original weight by beta, unless it is the first of a block. Its error omits beta
times its distance to the original. With both 0 it is GPTQ; with beta 0 it is GPTAQ.
"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics.column_rounding import ColumnRounding, DriftCorrection

CARD = {
    "title": "FOEM",
    "paper": "First-Order Error Matters: Accurate Compensation for Quantized Large Language Models",
    "arxiv": "2507.11017",
    "code": "https://github.com/ModelCloud/GPTQModel",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8],
    "updates_weights": True,
    "needs": ["gram", "cross_gram"],
    "unneeded": {"cross_gram": {"alpha": 0}},
    "keeps_zeros": True,
    "cost": {"weights": 10.4, "grams": 8.6, "products": 9.0},
    "look": {"colour": "#CC79A7", "marker": "d"},
    "checks": {
        "reference": True,
        "variants": [{"blocksize": 16, "alpha": 0.25}, {"act_order": True, "static_groups": True, "beta": 0.1}],
    },
    "parameters": {
        "beta": {
            "type": "number",
            "minimum": 0,
            "exclusiveMaximum": 1,
            "description": "Share of a column's distance to the original weight that is undone; GPTQModel: .2.",
        },
        "alpha": {
            "type": "number",
            "minimum": 0,
            "description": "Share of the drift of the inputs that is compensated, as in GPTAQ; GPTQModel: 0.",
        },
        "blocksize": {"$ref": "blocksize"},
        "damping": {"$ref": "damping"},
        "act_order": {"$ref": "act_order"},
        "static_groups": {"$ref": "static_groups"},
        "mse": {"$ref": "mse"},
    },
}


@dataclass(frozen=True)
class FOEM(Method):
    """One-shot rounding with weight update and a first-order term; the weight of a dead input becomes zero.

    Preconditions: a finite Gram and, with alpha, its cross-Gram; a Gram that is not positive definite is damped until
    it is (`info["damping"]`).
    """

    beta: float = 0.2
    alpha: float = 0.0
    blocksize: int = 128
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    mse: bool = False

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        settings = (self.blocksize, self.damping, self.act_order, self.static_groups, self.mse)
        correct = DriftCorrection(self.alpha, self.beta, self.damping, None)
        return ColumnRounding(*settings).round(layer, target, correct)
