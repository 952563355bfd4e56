"""Qronos: solve for the first column against the dense output, refit the others, and round them by GPTQ.

Zhang et al., with the damping of Brevitas. The problem is min |W X0 - W_hat X|^2, with X0 the inputs in the dense model
and X those in the compressed one. With G = X X^T / tokens, C = X0 X^T / tokens and d the damping, the first column
becomes (W C - W_rest G)_0 / G_00. The others become W C + d W, minus the first column's contribution, times the inverse
of their damped Gram. Both are sums of W and a term in the drift C - G, so without drift this is GPTQ.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.contract.gram import Gram
from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops
from layerwise.numerics.column_rounding import ColumnRounding

CARD = {
    "title": "Qronos",
    "paper": "Qronos: Correcting the Past by Shaping the Future... in Post-Training Quantization",
    "arxiv": "2505.11695",
    "code": "https://github.com/Xilinx/brevitas",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8],
    "updates_weights": True,
    "needs": ["gram", "cross_gram"],
    "keeps_zeros": True,
    "cost": {"weights": 18.0, "grams": 12.4, "products": 18.0},
    "look": {"colour": "#009E73", "marker": "<"},
    "checks": {"reference": True, "variants": [{"act_order": False, "blocksize": 16}]},
    "parameters": {
        "damping": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "Added to the Gram's diagonal, as a share of its largest eigenvalue.",
        },
        "act_order": {
            "$ref": "act_order",
            "description": "Process columns in order of decreasing diagonal of the Gram; groups are runs of "
            "consecutive inputs nevertheless.",
        },
        "blocksize": {
            "$ref": "blocksize",
            "description": "Number of columns after which the others are updated; it affects only rounding errors.",
        },
        "mse": {"$ref": "mse"},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: weights of dead inputs become zero; symmetric grids are GPTQ's. official: weights "
            "of dead inputs are rounded, and a symmetric grid has 2^bits - 1 codes and the step max |w| / "
            "(2^(bits - 1) - 1), as in Brevitas.",
        },
    },
}


@dataclass(frozen=True)
class Qronos(Method):
    """Refits to the dense output, then rounds with weight update on a grid fitted to the original weight.

    In shared mode, and on a Gram without `dense_inputs`, there is nothing to refit: it is GPTQ with this damping, order
    and grid. Preconditions: a finite Gram with its cross-Gram. A Gram that does not factorise is damped ten times as
    much, repeatedly, until it does (`info["damping"]`, a share of the mean of the diagonal).
    """

    damping: float = 1e-6
    act_order: bool = True
    blocksize: int = 128
    mse: bool = False
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        gram, official = layer.gram, self.convention == "official"
        damping = self.damping * gram.largest_eigenvalue / (float(gram.diagonal.double().mean()) or 1.0)
        settings = ColumnRounding(self.blocksize, damping, self.act_order, True, self.mse, None, official)
        zeroed = official or not target.group
        dense = layer.weight if zeroed else torch.where(gram.dead, 0.0, layer.weight)  # as GPTQ fits groups
        grid = settings.fitted(dense, target)
        narrow = official and target.symmetric
        if narrow:  # its codes are one lower, so that the lowest code is unused instead of the largest
            grid = ops.Grid(grid.scales, grid.zeros - 1, grid.bits, narrow=True)
        order, ordered = settings.ordered(gram)
        refitted = torch.empty_like(layer.weight)
        refitted[:, order] = refit(layer.weight[:, order], ordered, damping)
        result = settings.round(replace(layer, weight=refitted), target, grid=grid, dead_stay=official)
        if narrow and result.quantised:
            own = result.quantised
            return replace(result, quantised=replace(own, codes=own.codes + 1, zeros=own.zeros + 1))
        return result


def refit(weight: Tensor, gram: Gram, damping: float) -> Tensor:
    """The weight [out, in] from which rounding starts; its first column is solved for separately.

    gram: Gram of the inputs in column order. damping: a share of the mean of its diagonal. Raises ValueError if the
    cross-Gram is not known.
    """
    drift = (gram.cross - gram.matrix).double()
    if not gram.apart:
        return weight
    dense, matrix = weight.double(), gram.matrix.double()
    lacking = dense @ drift  # [out, in] missing output, correlated with the inputs
    first = dense[:, 0] + (lacking[:, 0] / matrix[0, 0] if matrix[0, 0] > 0 else 0.0)
    lacking = lacking[:, 1:] + torch.outer(dense[:, 0] - first, matrix[0, 1:])
    factor = gram.factor(damping)[0][1:, 1:].double()  # factor M of the other inputs' damped Gram, Mt M
    half = torch.linalg.solve_triangular(factor, lacking, upper=False, left=False)
    moved = torch.linalg.solve_triangular(factor.T, half, upper=True, left=False)
    return torch.cat([first[:, None], dense[:, 1:] + moved], 1).float()
