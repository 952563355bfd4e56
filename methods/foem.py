"""FOEM: GPTQ whose errors are taken, in part, from the weight as it was and not as the columns before have moved it.

Zheng et al., with the two coefficients of its code in GPTQModel: beta is FOEM's own, alpha is GPTAQ's. Before a column
is rounded it goes back towards the original weight by beta, but for the first of a block, and its error leaves beta
times its distance to the original out. Both 0 is GPTQ, beta 0 is GPTAQ.
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
            "description": "Share of the drift of the inputs that is made up for, as in GPTAQ; GPTQModel: 0.",
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

    Preconditions: a finite Gram, with alpha its cross-Gram; a Gram that is not positive definite is damped until it is
    (`info["damping"]`).
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
