"""ROCKET: a dense factor times a sparse one, from the singular vectors of the whitened weight.

With n G = C C^T, X = C^T W^T [in, out] and its r leading left singular vectors U, X is nearly U V, V = U^T X. Of each
column of V the entries of least importance go, some of all come back, and U is fitted again to the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import low_rank, ops, sparse_factor

CARD = {
    "title": "ROCKET",
    "paper": "ROCKET",
    "arxiv": "2602.11008",
    "code": "https://github.com/mts-ai/ROCKET",
    "patterns": ["low rank"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "sparse_factor": True,
    "refused_where": {
        "convention": {"official": "rocket's convention official counts no positions, and exceeds the target's bits"}
    },
    "cost": {"weights": 14.0, "grams": 9.0, "products": 50.0, "products_per": {"adam_steps": 1.6}},
    "look": {"colour": "#D55E00", "marker": "D"},
    "checks": {"variants": [{"share": 1.5, "choice": "output", "adam_steps": 3}]},
    "parameters": {
        "share": {
            "type": "number",
            "minimum": 1,
            "description": "Rank divided by the entries that each column of the sparse factor keeps (ks).",
        },
        "choice": {
            "enum": ["weight", "output"],
            "description": "Error that chooses singular vectors, fitted ones or refined factors: weight, as released, "
            "or output.",
        },
        "adam_steps": {
            "type": "integer",
            "minimum": 0,
            "description": "Steps of Adam on both factors, from the fitted ones; 100 in the released default.",
        },
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: positions count in the budget. official: they do not (breaks promise 2), and the "
            "jitter of a singular Gram is the released 7e-6 on n G, in whose units Adam moves the sparse factor.",
        },
    },
}
MARGIN = 0.005  # share of V that is dropped beyond what its budget asks for, and comes back
JITTER = 1e-9  # least eigenvalue of a singular Gram, as a share of its mean diagonal


@dataclass(frozen=True)
class ROCKET(Method):
    """B = V^T, sparse, and A = U^T C^-1, dense. The allocator knapsack is close to its allocation.

    The importance of an entry is |V| sqrt(||C^-T u||), the geometric mean of |V| and |V| ||C^-T u||; by the latter
    dropped entries come back. Precondition: a finite Gram.
    """

    share: float = 2.0
    choice: str = "weight"
    adam_steps: int = 0
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        (weight, gram), (out, inputs) = ops.in_float64(layer), layer.weight.shape
        official, rank = self.convention == "official", self.rank_of(target, out, inputs)
        unit = 7e-6 / layer.gram.tokens if official else JITTER * (float(gram.diagonal().mean()) or 1.0)
        root = low_rank.lifted_cholesky(gram, unit)
        whitened = root.T @ weight.T  # [in, out]
        basis = low_rank.leading(whitened, rank)  # [in, r]
        rank = basis.shape[1]
        values = basis.T @ whitened  # [r, out]
        size = torch.linalg.solve_triangular(root.T, basis, upper=True).norm(dim=0)  # [r]
        kept = sparse_factor.kept_entries(values, size, self._in_column(rank), self._count(rank, out))
        values = torch.where(kept, values, 0.0)
        pairs = [(basis, values), (fitted := sparse_factor.fitted(whitened, values), values)]
        if self.adam_steps:
            unit = layer.gram.tokens**0.5 if official else None  # as released, where C C^T = n G
            pairs.append(sparse_factor.refined(whitened, fitted, values, kept, self.adam_steps, unit))
        found = [
            low_rank.of_parts(
                right.T, torch.linalg.solve_triangular(root.T, left, upper=True).T, info={}, kept=kept.T.contiguous()
            )
            for left, right in pairs
        ]
        return min(found, key=lambda result: self._missed(weight, gram, result))

    def rank_of(self, target: Target, out: int, inputs: int) -> int:
        """The largest rank whose factors, with a bit for each place of the sparse one, take the target's share."""
        rank, budget = 0, target.rank * out * inputs
        if self.convention == "official":
            return int(budget / (inputs + out / self.share))
        while (rank + 1) * inputs + self._count(rank + 1, out) + (rank + 1) * out / 16 <= budget:
            rank += 1
        return min(rank, out, inputs)

    def _count(self, rank: int, out: int) -> int:
        """Entries of the sparse factor [rank, out] that stay."""
        return min(self._in_column(rank) * out + int(MARGIN * rank * out) + 1, rank * out)

    def _in_column(self, rank: int) -> int:
        """Entries that a column keeps before others come back; one more than its share, as released."""
        dropped = 1 - int(rank / self.share) / rank + MARGIN if rank else 0.0
        kept = min(int(rank * (1 - dropped)) + 1, rank)
        return max(kept, 0)  # MARGIN alone may exceed the share of a large rank

    def _missed(self, weight: Tensor, gram: Tensor, result: Compressed) -> float:
        """Squared error of the result, of the weight or of its output."""
        lost = weight - result.weight.double()
        return float(((lost @ gram if self.choice == "output" else lost) * lost).sum())
