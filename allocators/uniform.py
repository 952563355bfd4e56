"""The same level for every layer, as without an allocation."""

from collections.abc import Sequence
from dataclasses import dataclass

from layerwise.contract.allocator import Allocator, Part, Proposal, Target

CARD = {
    "title": "uniform",
    "needs": [],
    "budgets": ["row", "layer", "n:m", "bits"],
    "parameters": {},
}


@dataclass(frozen=True)
class Uniform(Allocator):
    """Every layer gets the target's level."""

    def allocate(self, parts: Sequence[Part], target: Target) -> Proposal:
        return Proposal((target.level,) * len(parts), (None,) * len(parts))
