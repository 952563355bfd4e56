"""Code swaps: make the best change of one code, then of two, in every row until none lowers the layer's error.

This is the project's own method. It changes the codes of a quantised layer as SparseSwaps changes a mask. The row's E G
is updated with every change, so the effect of each change is known exactly. The grid of the start is kept.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Quantised, Target, UnsupportedTarget
from layerwise.kernels.code_state import CodeState
from layerwise.numerics import ops
from layerwise.numerics.code_search import change_rounds

CARD = {
    "title": "Code swaps",
    "patterns": ["dense", "row", "layer", "n:m", "1xb"],
    "bits": [2, 3, 4, 5, 6, 7, 8],
    "bits_only": True,
    "updates_weights": True,
    "needs": ["gram"],
    "keeps_zeros": True,
    "criterion": "error",
    "cost": {"weights": 12.2, "grams": 4.8, "products": 340.0},
    "look": {"colour": "#117733", "marker": "8"},
    "checks": {"reference": True, "variants": [{"start": "rtn", "pairs": False}, {"start": "sparsegpt"}]},
    "parameters": {
        "start": {
            "$ref": "quantised_start",
            "description": "Method whose codes are changed and whose grid is kept; not one that needs the cross-Gram, "
            "because the changes would undo its correction.",
        },
        "pairs": {"type": "boolean", "description": "Also change two codes at once if no change of one code helps."},
        "max_changes": {
            "type": ["integer", "null"],
            "minimum": 0,
            "description": "Largest number of changes per row; null: until none lowers the row's error.",
        },
    },
}


@dataclass(frozen=True)
class CodeSwaps(Method):
    """Never worse than the start. At the end no change of one code helps, and no change of two codes by one step each.

    A change of one code may take several steps. Pairs are compared in float32. Every change is checked in float64, and
    the error and E G are stored in float64. Zeros of a start that prunes are kept, and so are those of `layer.keep`.
    info: `changes` of one code and `pairs` changed at once. Preconditions: a finite Gram, and a start that reaches the
    target.
    """

    start: Any = "gptq"
    pairs: bool = True
    max_changes: int | None = None

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        began = time.perf_counter()
        reason = self.start.refusal(target)
        if reason:
            raise UnsupportedTarget(
                f"code_swaps' start cannot be used: {reason}. Got the target {target.label} instead."
            )
        start = self.start.compress(layer, target, rng)
        rows, scale = state_of(layer, start, target)
        trace = [(0, time.perf_counter() - began, float(rows.loss.sum()) * scale)]
        changes, pairs, before = 0, 0, trace[0][1]
        for number, seconds, loss, (ones, twos) in change_rounds(rows, self.pairs, self.max_changes):
            trace.append((number, before + seconds, loss * scale))
            changes, pairs = changes + ones, pairs + twos
        quantised = replace(start.quantised, codes=rows.codes)
        weight = ops.quantised_values(quantised, target)
        if start.mask is not None:
            weight = torch.where(start.mask, weight, 0.0)
        info = {"changes": changes, "pairs": pairs, **ops.damping_of(start)}
        return replace(start, weight=weight, quantised=quantised, trace=tuple(trace), info=info)


def state_of(layer: Layer, start: Compressed, target: Target) -> tuple[CodeState, float]:
    """The layer's rows at the start, in units in which nothing overflows or underflows, and the unit of their loss."""
    quantised = start.quantised
    assert isinstance(quantised, Quantised) and target.bits is not None
    if quantised.own_grid or quantised.divisor is not None:
        raise UnsupportedTarget("code_swaps' start must give integer codes. Got a grid of its own instead.")
    weight, unit = ops.normalised(layer.weight)
    gram, gram_unit = ops.normalised(layer.gram.matrix.contiguous())
    missing = start.weight.double() / unit - weight.double()
    coupling = missing @ gram.double()
    keep = start.mask if start.mask is not None else layer.keep
    movable = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep.clone()
    scales, zeros = (x.clone(memory_format=torch.contiguous_format) for x in (quantised.scales, quantised.zeros))
    codes = quantised.codes.clone(memory_format=torch.contiguous_format)
    input_scale = torch.ones_like(weight[0]) if quantised.input_scale is None else quantised.input_scale
    rows = CodeState(
        gram,
        codes,
        ops.scaled(scales, 1 / unit),
        zeros,
        ops.grouping(quantised, target),
        input_scale,
        movable.contiguous(),
        coupling.contiguous(),
        (coupling * missing).sum(1),
        2**target.bits - 1,
    )
    return rows, unit**2 * gram_unit
