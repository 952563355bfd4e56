"""SparseSwaps: in every row, repeat the best exchange of one kept weight for one pruned one (Zimmer et al.).

Let q = w o (1 - m) be the pruned part of a row and c = G q. Pruning u and restoring p changes the row's loss q^T G q by
    2 w_u c_u + w_u^2 G_uu - 2 w_p c_p + w_p^2 G_pp - 2 w_u w_p G_up = cost_u + gain_p - 2 w_u w_p G_up.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.kernels.swap_state import SwapState
from layerwise.numerics import ops, swap_search

CARD = {
    "title": "SparseSwaps",
    "paper": "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale",
    "arxiv": "2512.10922",
    "code": "https://github.com/ZIB-IOL/SparseSwaps",
    "patterns": ["row", "n:m"],
    "bits": [],
    "updates_weights": False,
    "needs": ["gram"],
    "criterion": "error",
    "cost": {"weights": 9.3, "grams": 5.5, "products": 66.0},
    "look": {"colour": "#117733", "marker": "v"},
    "checks": {"reference": True, "variants": [{"warm_start": "magnitude", "swaps": None}]},
    "parameters": {
        "warm_start": {"$ref": "mask_warm_start"},
        "swaps": {
            "type": ["integer", "null"],
            "minimum": 0,
            "description": "Largest number of swaps per row; null: until no swap improves the row.",
        },
    },
}


@dataclass(frozen=True)
class SparseSwaps(Method):
    """Refines a mask by the best swaps within rows, or within the groups of n:m. Precondition: a finite Gram.

    Pairs are compared in float32; ties go to the lowest kept index, then the lowest pruned index. Each swap is checked
    in float64, and the loss is stored in float64. The search is compiled on a CPU and runs in torch elsewhere, with the
    same swaps except for ties on devices whose minimum takes any of them (numerics.swap_search). The trace has the
    objective after each round, in which every row that can improve makes one swap (for its seconds on a CPU see
    kernels.swap_search). info: `swaps`, the number of swaps.
    """

    warm_start: Any = "wanda"
    swaps: int | None = 100

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        start = time.perf_counter()
        warm = self.warm_start.compress(layer, target, rng)
        mask, damping = warm.mask.clone(memory_format=torch.contiguous_format), ops.damping_of(warm)
        del warm  # its weight
        (weight, unit), (gram, gram_unit) = (ops.normalised(x.contiguous()) for x in (layer.weight, layer.gram.matrix))
        coupling, loss = coupled(torch.where(mask, 0.0, weight).double(), gram.double())
        rows = SwapState(weight, gram, mask, coupling, loss, target.n_of_m[1] if target.n_of_m else None)
        scale = unit**2 * gram_unit
        began = time.perf_counter() - start
        trace = [(0, began, float(loss.sum()) * scale)]
        made = 0
        for seconds, left, swapped in swap_search.swap_rounds(rows, self.swaps):
            trace.append((len(trace), began + seconds, left * scale))
            made += swapped
        return replace(ops.masked(layer, mask, target), trace=tuple(trace), info={"swaps": made, **damping})


def coupled(pruned: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """c = G q [out, in] and q^T G q [out] for the pruned parts q [out, in], which are overwritten."""
    coupling = pruned @ gram
    return coupling, pruned.mul_(coupling).sum(1)
