"""LPLR: the low-rank factors of another method, quantised (Saha et al., algorithm 2, LPLRFactorize).

Each factor is fitted to the other as rounded, in the norm of the Gram, and rounded itself; the best of several such
sweeps is the result.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target, UnsupportedTarget
from layerwise.numerics import low_rank, ops
from layerwise.numerics.factor_rounding import round_factors

CARD = {
    "title": "LPLR",
    "paper": "Compressing Large Language Models using Low Rank and Low Precision Decomposition",
    "arxiv": "2405.18886",
    "code": "https://github.com/pilancilab/caldera",
    "patterns": ["low rank", "dense", "row", "layer", "n:m", "1xb"],
    "bits": [2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4"],
    "updates_weights": True,
    "needs": ["gram"],
    "sums": True,
    "factor_bits": [2, 3, 4, 5, 6, 7, 8],
    "cost": {"weights": 14.0, "grams": 6.0, "products": 60.0},
    "look": {"colour": "#882255", "marker": "D"},
    "checks": {
        "variants": [
            {"rounding": "columns"},
            {"after": "eora", "rounding": "columns"},
            {"after": {"eora": {"after": "sparsegpt"}}},
        ]
    },
    "parameters": {
        "after": {"format": "method", "asked": "unrounded", "description": "Method that gives the factors, and S."},
        "sweeps": {"type": "integer", "minimum": 1, "description": "Times that both factors are fitted and rounded."},
        "rounding": {
            "enum": ["nearest", "columns"],
            "description": "nearest: as released. columns: one by one, with updates of the rest as in GPTQ.",
        },
    },
}


@dataclass(frozen=True)
class LPLR(Method):
    """S and the rank are those of `after`; B and A have min-max grids, each row in groups of `factor_group`.

    The released code rounds S and the factors in turn, with a scale for a whole factor or lattice codes; here S stays.
    Its results have not been compared with these. Preconditions: those of `after`, whose factors must be dense.
    """

    after: Any = "svd_llm"
    sweeps: int = 10
    rounding: str = "nearest"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        try:
            given = self.after.compress(layer, target.unrounded, rng)
        except UnsupportedTarget as error:
            raise UnsupportedTarget(f"lplr's after cannot be used: {error}") from None
        if given.low_rank.kept is not None:
            raise UnsupportedTarget("lplr's after must not give a sparse low-rank factor. Got one instead.")
        weight, _ = ops.in_float64(layer)
        rest = given.rest
        missing = weight if rest is None else weight - rest.weight.double()
        start, compensate = _signed(given.low_rank.right.double()), self.rounding == "columns"
        found = round_factors(missing, layer, start, target.factors, self.sweeps, compensate)
        info = ops.damping_of(given, *((found.left, found.right) if compensate else ()))
        return low_rank.of_parts(found.left.weight, found.right.weight, rest, info, codes=found.codes)


def _signed(right: Tensor) -> Tensor:
    """A [r, in] whose rows have their largest entry above zero: a sign, which is arbitrary, decides on a grid."""
    if not right.numel():
        return right
    return right * right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
