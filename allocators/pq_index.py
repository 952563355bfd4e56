"""PQ index: layers whose weights are concentrated in few entries are pruned more (Diao et al.)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from layerwise.contract.allocator import Allocator, DenseLayer, Part, Proposal, Target

CARD = {
    "title": "PQ index",
    "paper": "Pruning Deep Neural Networks from a Sparsity Perspective",
    "arxiv": "2302.05601",
    "needs": ["weight"],
    "budgets": ["row", "layer"],
    "parameters": {
        "p": {
            "type": "number",
            "exclusiveMinimum": 0,
            "exclusiveMaximum": 1,
            "description": "Order of the first norm, below 1.",
        },
        "q": {"type": "number", "minimum": 1, "maximum": 2, "description": "Order of the second norm, at least 1."},
    },
}
ROUNDS = 200


@dataclass(frozen=True)
class PqIndex(Allocator):
    """Keeps a share of each layer in proportion to the paper's bound on the share that must be kept.

    The index of a weight is I = 1 - n^(1/q - 1/p) ||w||_p / ||w||_q, 0 for equal entries. The share
    (1 + eta)^(-q/(q - p)) (1 - I)^(q p/(q - p)) of the entries, at least, holds all of the norm except eta. The factor
    with eta is the same for all layers and follows from the budget. The allocator sees only the weights.
    """

    p: float = 0.5
    q: float = 1.0

    def measure(self, layers: Iterator[DenseLayer]) -> Sequence[float]:
        """The index of each layer; 1 for a layer of zeros."""
        return [self.index(layer.weight.abs().double().flatten().cpu().numpy()) for layer in layers]

    def index(self, entries: np.ndarray) -> float:
        """The index of entries [n] >= 0."""
        largest = entries.max(initial=0.0)
        if largest == 0:
            return 1.0
        entries = entries / largest
        small, large = ((entries**power).mean() ** (1 / power) for power in (self.p, self.q))
        return float(1 - small / large)

    def allocate(self, parts: Sequence[Part], target: Target) -> Proposal:
        indices = np.array([float(part.measured) for part in parts])
        shares = np.clip(1 - indices, 0.0, 1.0) ** (self.q * self.p / (self.q - self.p))
        sizes = np.array([part.size for part in parts], dtype=np.float64)
        wanted = (1 - target.level) * sizes.sum()
        # One factor for all layers, with shares capped at 1; bisection on the logarithm of the factor.
        low, high = -50.0, 50.0
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            less = np.minimum(np.exp(middle) * shares, 1.0) @ sizes < wanted
            low, high = (middle, high) if less else (low, middle)
        kept = np.minimum(np.exp(high) * shares, 1.0)
        return Proposal(tuple((1 - kept).tolist()), tuple(indices.tolist()))
