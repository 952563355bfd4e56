"""Results with low-rank factors, for tests that need one without a method."""

from torch import Tensor

from layerwise.contract.layer import Compressed
from layerwise.contract.target import Target
from layerwise.numerics import low_rank, ops


def of_best(missing: Tensor, target: Target, rest: Compressed | None) -> Compressed:
    """S with the nearest factors of missing [out, in] float64, rounded to nearest if the target quantises them."""
    factors = low_rank.best_factors(missing, target.rank_of(missing.shape[0], missing.shape[1]))
    if not target.factor_bits:
        return low_rank.of_parts(*factors, rest)
    left, right = (ops.round_to_nearest(factor.float(), target.factors) for factor in factors)
    return low_rank.of_parts(left.weight, right.weight, rest, codes=(left.quantised, right.quantised))
