"""The library's functions on one layer (docs/library.md): thin, typed wrappers of the code that the workflow uses."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibration.tap_statistics import TapStatistics
from layerwise.compression import lower_bound as bounds
from layerwise.compression import score
from layerwise.compression.resolve import as_target, needed_statistics, needs, resolve, solve
from layerwise.contract.gram import check_dense, whole_number
from layerwise.contract.layer import Compressed, Gram, Layer, Method, Quantised, Statistics, UnsupportedTarget
from layerwise.contract.target import Target

SCORES = ("output_error", "absolute_error", "asymmetric_error", "achieved_sparsity", "bits_per_weight")
CORRELATION = 1 + 1e-3  # largest C_ij / sqrt(dense_ii G_jj), which is at most 1 but for rounding
ASYMMETRY = 1e-3  # largest rounding difference between G and its transpose, as a share of the largest entry
__all__ = ["LayerResult", "LowerBound", "calibrate", "compress_layer", "lower_bound", "output_error"]


@dataclass(frozen=True, repr=False)
class LayerResult:
    """A layer that `compress_layer` has compressed, checked and scored.

    method, target: as requested.
    weight: [out, in], zero where pruned and dequantised where quantised, in the dtype and on the device of the input
        weight.
    compressed: what is stored: the weight in float32, the mask, and the codes and grid of a quantised layer.
    output_error: tr((W - W_hat) G (W - W_hat)^T) / tr(W G W^T) in float64, on the Gram passed in.
    absolute_error: its numerator, in squared units of the layer's output per token.
    asymmetric_error: ||W X0 - W_hat X||^2 / ||W X0||^2 with X0 the inputs in the dense model, if the Gram was computed
        from both; otherwise output_error. None if X0 is not known, or if W X0 is zero.
    achieved_sparsity: share of zeros in W_hat.
    bits_per_weight: as stored, with scales, zeros and positions (docs/export.md).
    seconds: time taken by the method alone.
    damping: share of the Gram's mean diagonal that was added to it; None for a method that adds none.
    """

    method: str
    target: Target
    weight: Tensor
    compressed: Compressed
    output_error: float
    absolute_error: float
    asymmetric_error: float | None
    achieved_sparsity: float
    bits_per_weight: float
    seconds: float
    damping: float | None

    @property
    def mask(self) -> Tensor | None:
        """[out, in] bool, True where a weight is kept; None when the target prunes nothing."""
        return self.compressed.mask

    @property
    def quantised(self) -> Quantised | None:
        """Codes, scales and zeros; None when the target has no bits."""
        return self.compressed.quantised

    @property
    def trace(self) -> tuple[tuple[int, float, float], ...]:
        """(iteration, seconds, objective) rows of an iterative method; empty for others."""
        return self.compressed.trace

    def __repr__(self) -> str:
        damped = "" if self.damping is None else f", damping {self.damping:g}"
        return (
            f"LayerResult({self.method} to {self.target.label}, weight {list(self.weight.shape)} "
            f"{str(self.weight.dtype).removeprefix('torch.')}: output_error {self.output_error:.6g}, "
            f"{100 * self.achieved_sparsity:.4g}% zeros, {self.bits_per_weight:.4g} bits per weight, "
            f"{self.seconds:.3g} s{damped})"
        )


@dataclass(frozen=True)
class LowerBound:
    """A lower bound on the output error of every mask of a pattern, where the kept weights stay as they are.

    output_error: the bound as a share of tr(W G W^T), to compare with `LayerResult.output_error`.
    absolute_error: the bound on tr((W - W_hat) G (W - W_hat)^T).
    gap: the most by which a longer computation could raise the bound, as a share like output_error.
    """

    output_error: float
    absolute_error: float
    gap: float


def calibrate(x: Tensor, dense_inputs: Tensor | None = None) -> tuple[Gram, Statistics]:
    """The Gram of a layer's inputs, and the statistics that some methods also need (AWQ, DSnoT).

    x: [sequences, length, in], of any float dtype, with the tokens of a sequence in order. The Gram is bit-identical to
    `Gram.from_inputs(x, dense_inputs)`. Raises ValueError for x of another shape, and wherever `Gram.from_inputs` does.
    """
    if not isinstance(x, Tensor) or x.ndim != 3 or not x.numel():
        came = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be a tensor [sequences, length, in] that is not empty. Got {came} instead.")
    gram = Gram.from_inputs(x, dense_inputs)  # it rejects inputs that have no Gram
    sequences, length, inputs = x.shape
    accumulated = TapStatistics(inputs, sequences, length, x.device)
    accumulated.update(x)
    return gram, accumulated.finish()[1]


def compress_layer(
    weight: Tensor | nn.Linear,
    gram: Gram,
    target: Target | str,
    method: str | Path | Mapping[str, Any] | Method,
    *,
    statistics: Statistics | None = None,
    fisher: Tensor | None = None,
    seed: int = 0,
    **parameters: Any,
) -> LayerResult:
    """Compress one linear layer, check the result and score it, as the workflow does.

    The result keeps the promises of docs/contract.md; otherwise an error names the broken promise.

    weight: [out, in] of any float dtype, or a torch Linear; neither is modified. The computation is in float32.
    gram: Gram of the layer's inputs, from `Gram.from_inputs` or `calibrate`, on the weight's device. For gptaq, foem
        and qronos use `Gram.from_inputs(x, dense_inputs=x0)`, where x are the inputs in the partly compressed model and
        x0 those in the dense model. Without dense_inputs x counts as the dense model's inputs, which have not drifted:
        gptaq and qronos then round as gptq does.
    target: a Target or its label, such as "2:4", "60% row", "50% 1x16", "4b g128" or "2:4 4b g128".
    method: a name of `layerwise.methods()`, {name: {parameters}}, the path of a method's file, or an instance.
    statistics: from `calibrate`, for methods that need more than the Gram.
    fisher: [out] float32, at least 0, for fwsvd: the mean squared gradients of the model's loss, summed over each row
        of the weight. `layerwise.calibration.fisher.of_model(model, tokens)` computes them for every layer of a model.
    seed: seed of the random numbers, for a method that draws any.
    parameters: the method's parameters by name; those not given take their defaults.

    Raises ValueError, in one sentence, for arguments that do not fit: its subclass CatalogueError for an unknown method
    or parameter, and its subclass UnsupportedTarget for a method that cannot reach the target. Raises InputError when
    the method fails or breaks a promise, and its subclass Diverged when its numbers are not finite. Gives a UserWarning
    for a parameter that does nothing at the target.
    """
    original = weight_of(weight)
    goal, seed = as_target(target), whole_number(seed, "seed", 0)
    layer = checked(
        Layer("the layer", original.to(torch.float32, copy=True).contiguous(), gram, statistics, fisher=fisher)
    )
    resolved = resolve(method, parameters, goal)
    resolved.check_inputs(goal, {layer.name: original.shape[1]})
    for sentence in resolved.idle(goal):
        warnings.warn(sentence, stacklevel=2)
    needed = needed_statistics(resolved.method)
    if needed and statistics is None:
        raise ValueError(
            f"statistics must be given: {resolved.asker(needed)} needs {' and '.join(needed)}, which "
            "layerwise.calibrate(x) returns with the Gram. Got None instead."
        )
    asked = needs(resolved.method)
    if "cross_gram" in asked and not gram.knows_dense:
        raise ValueError(
            "gram must have the cross-Gram, from Gram.from_inputs(x, dense_inputs=x0): "
            f"{resolved.asker(['cross_gram'])} needs it. Got drifted inputs alone instead."
        )
    if "fisher" in asked and fisher is None:
        raise ValueError(
            f"fisher must be given: {resolved.asker(['fisher'])} needs the mean squared gradients of the model's loss, "
            "summed over each row of the weight. Got None instead."
        )
    solver = resolved.solver(goal, seed, kept_dtype(original))
    if sentence := solver.without_factors({layer.name: (original.shape[0], original.shape[1])}):
        raise UnsupportedTarget(sentence)
    result, row = solve(solver, layer)
    return LayerResult(
        method=resolved.name,
        target=goal,
        weight=result.weight.to(original.dtype),
        compressed=result,
        **{name: row[name] for name in SCORES},
        seconds=row["seconds"],
        damping=row["damping"],
    )


def output_error(weight: Tensor | nn.Linear, weight_hat: Tensor, gram: Gram) -> float:
    """tr((W - W_hat) G (W - W_hat)^T) / tr(W G W^T) in float64, the share of the layer's output that is lost.

    weight, weight_hat: [out, in] of any float dtype. gram: undamped. A layer whose output is zero on every token has
    the error 0 if W_hat also gives zero, otherwise infinity. Raises ValueError for shapes that do not fit and numbers
    that are not finite, and InputError for a Gram with negative eigenvalues that rounding does not explain.
    """
    layer = checked(Layer("the layer", weight_of(weight), gram))
    other = weight_of(weight_hat, "weight_hat")
    if other.shape != layer.weight.shape:
        raise ValueError(f"weight_hat must be [out, in] = {list(layer.weight.shape)}. Got {list(other.shape)} instead.")
    return score.output_error(layer, other.to(layer.weight.device))[1]


def lower_bound(weight: Tensor | nn.Linear, gram: Gram, target: Target | str) -> LowerBound:
    """A lower bound on the error of every mask of a row, layer or n:m target, or of every matrix of a given rank.

    For masks it comes from a convex relaxation (that of SparseFW, arXiv 2510.13713, strengthened by a diagonal) and its
    Frank-Wolfe gap (Jaggi, ICML 2013).

    For a rank it is the optimum itself, up to rounding (Eckart and Young in the Gram's norm).

    It holds for masks that leave the kept weights unchanged; methods that update weights can go below it. weight: [out,
    in] of any float dtype. The computation runs on the CPU. Raises ValueError for another pattern, a target without
    sparsity, shapes that do not fit and numbers that are not finite.
    """
    goal = as_target(target)
    if goal.structure == "dense":
        raise ValueError(f"A lower bound must be for a target with sparsity or rank. Got {goal.label!r} instead.")
    layer = checked(Layer("the layer", weight_of(weight).float(), gram))
    layer = Layer(layer.name, layer.weight.cpu(), Gram(gram.matrix.cpu(), gram.tokens))
    bound = bounds.lower_bound(layer, goal if goal.rank else goal.pruning)
    _, whole = score.losses(layer, layer.weight)
    unit = 1 / whole if whole > 0 else 0.0
    return LowerBound(bound.error * unit, bound.error, bound.gap * unit)


def weight_of(weight: Tensor | nn.Linear, name: str = "weight") -> Tensor:
    """The weight [out, in] itself. Raises ValueError if it is not a weight or is not finite."""
    tensor = weight.weight.detach() if isinstance(weight, nn.Linear) else weight
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor [out, in] or a torch Linear. Got {type(weight).__name__} instead.")
    if tensor.ndim != 2 or not tensor.numel():
        raise ValueError(f"{name} must be [out, in] and not empty. Got {list(tensor.shape)} instead.")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point. Got {tensor.dtype} instead.")
    check_dense(tensor, name)
    if not torch.isfinite(tensor.float()).all():
        raise ValueError(f"{name} must be finite in float32. Got NaN or Inf instead.")
    return tensor.detach()


def checked(layer: Layer) -> Layer:
    """The layer itself. Raises ValueError when the Gram or statistics do not fit its inputs."""
    inputs, device = layer.weight.shape[1], layer.weight.device
    if not isinstance(layer.gram, Gram):
        came = type(layer.gram).__name__
        raise ValueError(f"gram must be a layerwise.Gram, such as Gram.from_inputs(x). Got {came} instead.")
    tensors: dict[str, tuple[Tensor, tuple[int, ...], str]] = {
        "gram": (layer.gram.matrix, (inputs, inputs), "[in, in]")
    }
    if layer.gram.apart:
        for name, matrix in (("gram.cross", layer.gram.cross), ("gram.dense", layer.gram.dense)):
            tensors[name] = (matrix, (inputs, inputs), "[in, in]")
    if layer.fisher is not None:
        if not isinstance(layer.fisher, Tensor):
            raise ValueError(f"fisher must be a tensor [out]. Got {type(layer.fisher).__name__} instead.")
        tensors["fisher"] = (layer.fisher, (len(layer.weight),), "[out]")
    if layer.statistics is not None:
        if not isinstance(layer.statistics, Statistics):
            came = type(layer.statistics).__name__
            raise ValueError(f"statistics must be a layerwise.Statistics, from calibrate(x). Got {came} instead.")
        for name in ("mean", "absmean", "sequence_variance"):
            tensors[f"statistics.{name}"] = (getattr(layer.statistics, name), (inputs,), "[in]")
        for name in ("sample", "first_tokens"):
            rows = getattr(layer.statistics, name)
            if rows is not None:
                tensors[f"statistics.{name}"] = (rows, (len(rows), inputs), "[rows, in]")
    for name, (tensor, shape, meaning) in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor {meaning}. Got {type(tensor).__name__} instead.")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {meaning} = {list(shape)}. Got {list(tensor.shape)} instead.")
        if tensor.device != device:
            raise ValueError(f"{name} must be on the weight's device, {device}. Got {tensor.device} instead.")
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be torch.float32. Got {tensor.dtype} instead.")
        check_dense(tensor, name)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} must be finite. Got NaN or Inf instead.")
    for name in ("gram", "gram.dense") if layer.gram.apart else ("gram",):
        check_moment(tensors[name][0], name)
    if layer.gram.apart:
        check_cross(layer.gram)
    if layer.fisher is not None and (least := float(layer.fisher.min())) < 0:
        raise ValueError(f"fisher must be at least 0, because it is a sum of squares. Got {least:g} instead.")
    return layer


def check_moment(matrix: Tensor, name: str) -> None:
    """Raise ValueError for a matrix [in, in] that cannot be a mean of x xt."""
    least, largest = float(matrix.diagonal().min()), float(matrix.diagonal().max())
    if least < 0:
        raise ValueError(f"{name} must have a diagonal of at least 0, means of squares. Got {least:g} instead.")
    if (apart := float((matrix - matrix.T).abs().max())) > ASYMMETRY * largest:
        raise ValueError(f"{name} must be symmetric. Got two entries that differ by {apart:g} instead.")


def check_cross(gram: Gram) -> None:
    """Raise ValueError for a cross-Gram that cannot be a mean of x0 xt (by the Cauchy-Schwarz inequality)."""
    tiny = torch.finfo(torch.float32).tiny  # what squares may lose below it
    dense, own = ((matrix.diagonal() + tiny).sqrt() for matrix in (gram.dense, gram.matrix))
    largest = float((gram.cross.abs() / dense[:, None] / own).max())
    if largest > CORRELATION:
        raise ValueError(
            "gram.cross must be a mean of x0 xt, so that C_ij^2 is at most dense_ii G_jj. "
            f"Got a C_ij of {largest:.3g} times the root of that instead."
        )


def kept_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the result is stored and scored: the weight's, or float32 if the weight's is wider."""
    return torch.float32 if weight.dtype.itemsize > 4 else weight.dtype
