"""ROCKET: a dense factor times a sparse one, from the singular vectors of the whitened weight.

With n G = C C^T, X = C^T W^T [in, out] and its r leading left singular vectors U, X is nearly U V, V = U^T X. Of each
column of V the entries of least importance go, some of all come back, and U is fitted again to the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import low_rank, ops

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
    "cost": {"weights": 14.0, "grams": 9.0, "products": 50.0},
    "look": {"colour": "#D55E00", "marker": "D"},
    "checks": {"variants": [{"share": 1.5, "choice": "output"}]},
    "parameters": {
        "share": {
            "type": "number",
            "minimum": 1,
            "description": "Rank divided by the entries that each column of the sparse factor keeps (ks).",
        },
        "choice": {
            "enum": ["weight", "output"],
            "description": "Error that chooses singular vectors or fitted ones: weight, as released, or output.",
        },
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: positions count in the budget. official: they do not (breaks promise 2), and the "
            "jitter of a singular Gram is the released 7e-6 on n G.",
        },
    },
}
MARGIN = 0.005  # share of V that is dropped beyond what its budget asks for, and comes back
JITTER = 1e-9  # least eigenvalue of a singular Gram, as a share of its mean diagonal
RIDGE = 1e-3  # of the least squares, as a share of the mean eigenvalue of V V^T


@dataclass(frozen=True)
class ROCKET(Method):
    """B = V^T, sparse, and A = U^T C^-1, dense. Its allocation over layers is the allocator knapsack.

    The importance of an entry is |V| sqrt(||C^-T u||), the geometric mean of |V| and |V| ||C^-T u||; by the latter
    dropped entries come back. The 100 Adam steps of the released default are not offered. Precondition: a finite Gram.
    """

    share: float = 2.0
    choice: str = "weight"
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
        kept = self._kept(values, size, rank)
        values = torch.where(kept, values, 0.0)
        square = values @ values.T
        ridge = RIDGE * float(square.diagonal().mean()) if rank and square.any() else 1.0
        fitted = torch.linalg.solve(square + ridge * torch.eye(rank).to(square), values @ whitened.T).T
        found = [
            low_rank.of_parts(
                values.T, torch.linalg.solve_triangular(root.T, own, upper=True).T, info={}, kept=kept.T.contiguous()
            )
            for own in (basis, fitted)
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

    def _kept(self, values: Tensor, size: Tensor, rank: int) -> Tensor:
        """[r, out] bool of V [r, out]; size: ||C^-T u|| [r]."""
        out = values.shape[1]
        if rank == 0:
            return values.bool()
        importance = values.abs() * size.sqrt()[:, None]
        kept = ops.keep_largest(importance.T, rank - self._in_column(rank)).T
        back = torch.where(kept, -1.0, values.abs() * size[:, None]).flatten()
        count = self._count(rank, out) - self._in_column(rank) * out
        return kept | ~ops.keep_largest(-back, count).view_as(kept) if count else kept

    def _missed(self, weight: Tensor, gram: Tensor, result: Compressed) -> float:
        """Squared error of the result, of the weight or of its output."""
        lost = weight - result.weight.double()
        return float(((lost @ gram if self.choice == "output" else lost) * lost).sum())
