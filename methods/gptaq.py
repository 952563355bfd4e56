"""GPTAQ: GPTQ that also compensates for the change of the inputs by the layers before.

Li et al., with the coefficient alpha and the order of the released code. The problem is min |W X0 - W_hat X|^2, with
X0 the inputs in the dense model and X those in the compressed one. If both are the same, it is GPTQ, bit for bit.
"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics.column_rounding import ColumnRounding, DriftCorrection

CARD = {
    "title": "GPTAQ",
    "paper": "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
    "arxiv": "2504.02692",
    "code": "https://github.com/Intelligent-Computing-Lab-Yale/GPTAQ",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8],
    "updates_weights": True,
    "needs": ["gram", "cross_gram"],
    "unneeded": {"cross_gram": {"alpha": 0}},
    "keeps_zeros": True,
    "cost": {"weights": 12.2, "grams": 8.4, "products": 10.0},
    "look": {"colour": "#56B4E9", "marker": "*"},
    "checks": {
        "reference": True,
        "variants": [
            {"blocksize": 16, "between_blocks": "unrounded"},
            {"act_order": True, "static_groups": True, "alpha": 1.0},
        ],
    },
    "parameters": {
        "alpha": {
            "type": "number",
            "minimum": 0,
            "description": "Share of the drift of the inputs that is compensated; 0 is GPTQ. The paper has no such "
            "factor; its code .25.",
        },
        "between_blocks": {
            "enum": ["rounded", "unrounded"],
            "description": "Weight that corrects columns after its own block for the drift. rounded: after rounding, "
            "as in the released code, where the result depends on the block size. unrounded: before rounding, as in "
            "the paper and within blocks.",
        },
        "blocksize": {"$ref": "blocksize"},
        "damping": {"$ref": "damping"},
        "act_order": {"$ref": "act_order"},
        "static_groups": {"$ref": "static_groups"},
        "mse": {"$ref": "mse"},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: dead inputs are last in act_order and count as zero; symmetric grids are GPTQ's. "
            "official: dead inputs count as 1, and a symmetric grid has the step max |w| / (2^(bits - 1) - 1), as in "
            "the released code.",
        },
    },
}


@dataclass(frozen=True)
class GPTAQ(Method):
    """One-shot rounding with weight update for inputs that have drifted; the weight of a dead input becomes zero.

    In shared mode, and on a Gram without `dense_inputs`, nothing has drifted: the result is GPTQ's.
    Preconditions: a finite Gram with its cross-Gram; a Gram that is not positive definite is damped until it is
    (`info["damping"]`).
    """

    alpha: float = 0.25
    between_blocks: str = "rounded"
    blocksize: int = 128
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    mse: bool = False
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        length = layer.statistics.length if layer.statistics else 1
        official = self.convention == "official"
        dead_diagonal = 1 / (2 * length) if official else None  # the released code's H is 2 length G
        settings = (self.blocksize, self.damping, self.act_order, self.static_groups, self.mse, dead_diagonal, official)
        correct = DriftCorrection(
            self.alpha, 0.0, self.damping, dead_diagonal, unrounded=self.between_blocks == "unrounded"
        )
        return ColumnRounding(*settings).round(layer, target, correct)
