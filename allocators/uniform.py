"""The same level for every layer: what a target asks for where nothing is allocated."""

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
    """Every layer gives the target's own level."""

    def allocate(self, parts: Sequence[Part], target: Target) -> Proposal:
        return Proposal((target.level,) * len(parts), (None,) * len(parts))
