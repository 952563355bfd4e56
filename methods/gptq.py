"""GPTQ: round column by column, and update the rest of the row each time to compensate for the rounding.

Frantar et al., algorithm 1, with the grids of the released code: a group is fitted when its first column is reached, to
the weights as updated by the blocks before it.
"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics.column_rounding import ColumnRounding

CARD = {
    "title": "GPTQ",
    "paper": "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "arxiv": "2210.17323",
    "code": "https://github.com/IST-DASLab/gptq",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4"],
    "updates_weights": True,
    "needs": ["gram"],
    "keeps_zeros": True,
    "cost": {"weights": 9.6, "grams": 4.4, "products": 3.5},
    "look": {"colour": "#D55E00", "marker": "h"},
    "checks": {
        "reference": True,
        "variants": [{"blocksize": 16}, {"act_order": True}, {"act_order": True, "static_groups": True, "mse": True}],
    },
    "parameters": {
        "blocksize": {"$ref": "blocksize"},
        "damping": {"$ref": "damping"},
        "act_order": {"$ref": "act_order"},
        "static_groups": {
            "$ref": "static_groups",
            "description": "Groups are runs of consecutive inputs, all fitted to the original weight; always true for "
            "nvfp4 and mxfp4.",
        },
        "mse": {"$ref": "mse"},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: dead inputs are last in act_order and count as zero; results are independent of the "
            "activations' scale. official: dead inputs count as 1, as in the released code.",
        },
    },
}


@dataclass(frozen=True)
class GPTQ(Method):
    """One-shot rounding with weight update. Without groups, a row's grid is fitted to its dense weight beforehand.

    Preconditions: a finite Gram; one that is not positive definite is damped until it is (`info["damping"]`).
    """

    blocksize: int = 128
    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    mse: bool = False
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        length = layer.statistics.length if layer.statistics else 1
        # the released code's H is 2 length G
        dead_diagonal = 1 / (2 * length) if self.convention == "official" else None
        settings = (self.blocksize, self.damping, self.act_order, self.static_groups, self.mse, dead_diagonal)
        return ColumnRounding(*settings).round(layer, target)
