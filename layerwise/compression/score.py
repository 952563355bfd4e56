"""The score of every method: a layer's output error, in float64 on the undamped Gram."""

import math

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer
from layerwise.runtime.errors import Diverged

LARGEST_ERROR = 1e6  # output_error above which a result has diverged
TRACE_ERROR = 1e-3  # largest relative difference between a trace's objective and the result's error
# the same in units of the dense output; also how far eigenvalues may lie below zero, as a share of the trace
ROUNDING = 1e-6
SCORED = 256  # rows of a weight, and columns of its Gram, converted to float64 at a time


def output_error(layer: Layer, weight: Tensor) -> tuple[float, float]:
    """tr((W - W_hat) G (W - W_hat)^T) and its ratio to tr(W G W^T), in float64 on the undamped Gram.

    Raises Diverged for a Gram with negative eigenvalues that rounding does not explain.
    """
    error, whole = losses(layer, weight)
    return error, ratio(error, whole)


def ratio(error: float, whole: float) -> float:
    """error / whole. If the dense output is zero on every token, the ratio is 0 for a zero error, otherwise
    infinite."""
    return error / whole if whole > 0 else 0.0 if error == 0 else math.inf


def losses(layer: Layer, weight: Tensor) -> tuple[float, float]:
    """tr((W - W_hat) G (W - W_hat)^T) and tr(W G W^T), as in output_error."""
    traces = Squares(layer.gram.matrix, len(weight))
    error = whole = 0.0
    for own, other in zip(layer.weight.split(SCORED), weight.split(SCORED), strict=True):
        whole += traces.of(own)
        error += traces.of(own, other)
    if min(error, whole) < 0:
        # In a singular Gram rounding can push a zero trace below zero, by a small share of the trace's terms.
        size = float(layer.gram.matrix.diagonal().double().sum())
        squares = max(float(part.double().square().sum()) for part in (layer.weight - weight, layer.weight))
        if min(error, whole) < -ROUNDING * squares * size:
            raise Diverged(f"The Gram of {layer.name} has negative eigenvalues that rounding does not explain.")
        error, whole = max(error, 0.0), max(whole, 0.0)
    return error, whole


class Squares:
    """tr(R G R^T) in float64 for SCORED rows R at a time and G [in, in], of which SCORED columns are converted at a
    time.

    The memory for the conversions is allocated once: new memory for each part would leave gaps that the allocator fills
    with nothing as large.
    """

    def __init__(self, gram: Tensor, rows: int) -> None:
        self.gram = gram
        sizes = (min(SCORED, rows), len(gram)), (len(gram), min(SCORED, len(gram))), (min(SCORED, rows), SCORED)
        self.rows, self.columns, self.products = (gram.new_empty(size, dtype=torch.float64) for size in sizes)

    def of(self, rows: Tensor, other: Tensor | None = None) -> float:
        """The sum for rows [n, in], or for their difference from others; n is at most SCORED."""
        own = self.rows[: len(rows)].copy_(rows)
        own = own if other is None else own.sub_(other)
        total = 0.0
        for some, gram in zip(own.split(SCORED, 1), self.gram.split(SCORED, 1), strict=True):
            width = gram.shape[1]
            product = torch.mm(own, self.columns[:, :width].copy_(gram), out=self.products[: len(own), :width])
            total += float(product.mul_(some).sum())
        return total


def asymmetric_error(layer: Layer, weight: Tensor, symmetric: float | None = None) -> float | None:
    """||W X0 - W_hat X||^2 / ||W X0||^2 in float64, with X0 the inputs in the dense model and X the layer's own.

    This equals tr(W G0 W^T - 2 W C W_hat^T + W_hat G W_hat^T) / tr(W G0 W^T), with G0 the Gram of X0. If X is X0, it is
    the output error. symmetric: the output error, if it is known. None if X0 is not known, or if W X0 is zero.

    Raises Diverged for a cross-Gram and a Gram of X0 that no inputs can have, if the square is below zero by more than
    rounding explains.
    """
    gram = layer.gram
    if not gram.knows_dense:
        return None
    if not gram.apart:
        return output_error(layer, weight)[1] if symmetric is None else symmetric
    error = whole = 0.0
    for own, other in zip(layer.weight.split(SCORED), weight.split(SCORED), strict=True):
        dense, compressed = own.double(), other.double()
        for start in range(0, dense.shape[1], SCORED):
            columns = slice(start, start + SCORED)
            alone, cross, moved = (x[:, columns].double() for x in (gram.dense, gram.cross, gram.matrix))
            size = float(((dense @ alone) * dense[:, columns]).sum())
            whole += size
            # (W C)_j is the inner product of W X0 with input j of X.
            error += size + float(((compressed @ moved - 2 * (dense @ cross)) * compressed[:, columns]).sum())
    if min(error, whole) < 0:
        # As in `losses`: rounding is a share of the terms, which may be far larger than W X0.
        sizes = [float(own.diagonal().double().sum()) for own in (gram.dense, gram.matrix)]
        squares = max(float(part.double().square().sum()) for part in (layer.weight, weight))
        if min(error, whole) < -ROUNDING * squares * max(sizes):
            raise Diverged(
                f"The cross-Gram of {layer.name} must be of the same inputs as its two Grams. Got a pair that gives a "
                f"squared error of {error:.3g} for outputs of {whole:.3g} instead."
            )
    return max(error, 0.0) / whole if whole > 0 else None


def first_token_error(layer: Layer, weight: Tensor) -> float | None:
    """||(W - W_hat) X||^2 / ||W X||^2 in float64 on the first token of each calibration sequence.

    None if these inputs are not known, or if W gives zero output for them.
    """
    if layer.statistics is None or layer.statistics.first_tokens is None:
        return None
    inputs = layer.statistics.first_tokens.double().T  # [in, sequences]
    error = whole = 0.0
    for own, other in zip(layer.weight.split(SCORED), weight.split(SCORED), strict=True):
        dense = own.double()
        whole += float((dense @ inputs).square().sum())
        error += float(((dense - other.double()) @ inputs).square().sum())
    return error / whole if whole > 0 else None


def untrue(result: Compressed, error: float, whole: float) -> str | None:
    """One sentence if the trace's objective is the layer's error but differs from the result's error, or None.

    whole: the size of the dense output, which sets the scale of rounding in the objective.
    """
    told = min(row[2] for row in result.trace)
    if abs(told - error) <= TRACE_ERROR * error + ROUNDING * whole:
        return None
    return f"promise 10: the trace's least error must be that of the result, {error:.6g}. Got {told:.6g} instead"
