"""OWL: blocks with more outliers among their Wanda scores keep more (Yin et al.)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layerwise.contract.allocator import Allocator, DenseLayer, Part, Proposal, Target

CARD = {
    "title": "OWL",
    "paper": "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
    "arxiv": "2310.05175",
    "code": "https://github.com/luuyin/OWL",
    "needs": ["weight", "gram"],
    "budgets": ["row", "layer", "n:m"],
    "checks": {"variants": [{"official": True, "spread": 0.02, "counts": 0}]},  # wider ones may reach 1
    "parameters": {
        "threshold": {
            "type": "number",
            "exclusiveMinimum": 0,
            "description": "M: a score above this multiple of its block's mean is an outlier.",
        },
        "spread": {
            "type": "number",
            "minimum": 0,
            "maximum": 0.5,
            "description": "lambda: levels of blocks differ by at most twice this.",
        },
        "counts": {
            "type": "number",
            "minimum": 0,
            "description": "The same for an n:m pattern: largest difference between blocks in pruned weights of m.",
        },
        "official": {
            "type": "boolean",
            "description": "Levels as in the released code: their mean over blocks, not over weights, is the budget, a "
            "level at or below zero becomes 0.01, and n:m counts are rounded without correction.",
        },
    },
}
LEAST = 0.01  # the released code replaces a sparsity at or below zero by this


@dataclass(frozen=True)
class Owl(Allocator):
    """Keeps more of a block if a larger share of its scores |W_ij| sqrt(G_jj) exceeds `threshold` x their mean.

    All layers of a block get one level. Blocks with equal shares, and a single block, get the budget itself.
    """

    threshold: float = 5.0
    spread: float = 0.08
    counts: float = 2.0
    official: bool = False

    def measure(self, layers: Iterator[DenseLayer]) -> Sequence[float]:
        """The percentage of outliers among all scores of the block, repeated for each layer."""
        scores = []
        for layer in layers:
            assert layer.gram is not None
            scores.append(layer.weight.abs() * layer.gram.diagonal.sqrt())
            del layer
        count = sum(own.numel() for own in scores)
        mean = sum(float(own.double().sum()) for own in scores) / count if count else 0.0
        beyond = sum(int((own > self.threshold * mean).sum()) for own in scores)
        return [100 * beyond / count if count else 0.0] * len(scores)

    def allocate(self, parts: Sequence[Part], target: Target) -> Proposal:
        shares = {part.block: float(part.measured) for part in parts}
        values = np.array(list(shares.values()))
        range_ = values.max() - values.min()
        width = self.counts / target.n_of_m[1] if target.n_of_m else 2 * self.spread
        more = (values - values.min()) / range_ * width if range_ > 0 else np.zeros(len(values))
        more = more - more.mean()  # share kept beyond the budget
        if self.official and target.n_of_m:
            more = np.round(more * target.n_of_m[1]) / target.n_of_m[1]
        levels = target.level - more
        if self.official and not target.n_of_m:
            levels = np.where(levels <= 0, LEAST, levels)
        if self.official:
            self._check(levels, "counts" if target.n_of_m else "spread")
        of_block = dict(zip(shares, levels.tolist(), strict=True))
        scores = tuple(shares[part.block] for part in parts)
        return Proposal(tuple(of_block[part.block] for part in parts), scores, official=self.official)

    def _check(self, levels: NDArray[np.float64], width: str) -> None:
        """Raise ValueError for levels of the released code that prune all of a layer, or less than nothing."""
        for level in levels.tolist():
            if not 0 <= level < 1:
                raise ValueError(
                    "levels of owl with official must be below 1 and at least 0. "
                    f"Got {level:.4g} instead; a smaller {width} brings them nearer to the budget"
                )
