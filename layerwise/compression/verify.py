"""The promises about a method's result that can be checked on any layer (docs/contract.md, promises 1 to 3, 7 and 10).

The runner checks every result with `broken_promise`, so that a faulty adapter is named instead of published.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, LowRank, Quantised, Rotation, Target
from layerwise.numerics import ops
from layerwise.numerics.code_books import expressible
from layerwise.numerics.low_rank import product
from layerwise.numerics.patterns import ROWS, count_kept, finite, kept_counts, nonzero_outside
from layerwise.numerics.rotations import block_of
from layerwise.storage.layer_packing import factors_of

NOT_FINITE = "must be finite"  # part of the sentence about a result that has diverged


def broken_promise(layer: Layer, target: Target, result: Compressed, mask_only: bool = False) -> str | None:
    """One sentence about the first promise that the result breaks, or None.

    mask_only: whether the method's card says that it leaves kept weights unchanged.
    """
    for check in (_plain, _tensor, _factors):
        if sentence := check(layer, target, result):
            return sentence
    part = result.rest  # None for factors alone
    for check in (_masked, _pattern, _grid):
        if part is not None and (sentence := check(layer, target.rest, part)):
            return sentence
    for check in (_unchanged, _told):
        if sentence := check(layer, target, result):
            return sentence
    return _moved(layer, target, result) if mask_only else None


def _plain(layer: Layer, target: Target, result: Compressed) -> str | None:
    inputs = [layer.weight, layer.gram.matrix, layer.keep, layer.fisher]
    inputs += [layer.gram.cross, layer.gram.dense] if layer.gram.apart else []
    inputs += vars(layer.statistics).values() if layer.statistics else ()
    taken = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)} - {0}  # 0: no storage
    tensors: dict[str, object] = {"weight": result.weight}
    optional = {"mask": result.mask}
    if result.quantised is not None:
        if not isinstance(result.quantised, Quantised):
            return f"promise 1: quantised must be a Quantised. Got {type(result.quantised).__name__} instead"
        parts = vars(result.quantised)
        tensors |= {name: parts[name] for name in ("codes", "scales", "zeros")}
        optional |= {name: parts[name] for name in ("group_of", "input_scale", "divisor", "levels")}
    if result.low_rank is not None:
        if not isinstance(result.low_rank, LowRank):
            return f"promise 1: low_rank must be a LowRank. Got {type(result.low_rank).__name__} instead"
        low_rank = vars(result.low_rank)
        optional |= {name: low_rank[name] for name in ("left", "right", "rest", "kept")}
        for name in ("left_codes", "right_codes"):
            if low_rank[name] is not None and not isinstance(low_rank[name], Quantised):
                return f"promise 1: {name} must be a Quantised. Got {type(low_rank[name]).__name__} instead"
            own = vars(low_rank[name]) if low_rank[name] is not None else {}
            optional |= {f"{name}.{part}": value for part, value in own.items() if part != "rotation"}
    tensors |= {name: value for name, value in optional.items() if value is not None}
    expected = type(layer.weight)
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or type(value) is not expected:
            came = type(value).__name__
            return f"promise 1: {name} must be a {expected.__module__}.{expected.__name__}. Got {came} instead"
        if value.requires_grad:
            return f"promise 1: {name} must not require a gradient"
        if value.layout != torch.strided:
            return f"promise 1: {name} must be a dense tensor. Got {value.layout} instead"
        if value.device == layer.weight.device and value.untyped_storage().data_ptr() in taken:
            return f"promise 1: {name} must have memory of its own. Got the memory of the inputs instead"
    return None


def _tensor(layer: Layer, target: Target, result: Compressed) -> str | None:
    for name in ("shape", "dtype", "device"):
        expected, came = getattr(layer.weight, name), getattr(result.weight, name)
        if expected != came:
            return f"promise 1: the weight's {name} must be {_words(expected)}. Got {_words(came)} instead"
    if not finite(result.weight):
        ruined = int((~torch.isfinite(result.weight)).sum())
        return f"promise 1: the weight {NOT_FINITE}. Got {ruined} entries of NaN or Inf instead"
    return None


def _factors(layer: Layer, target: Target, result: Compressed) -> str | None:
    """The fault in low-rank factors: their rank, the part beside them, or the sum; or None."""
    low_rank = result.low_rank
    if (low_rank is None) != (target.rank == 0):
        came = "none" if low_rank is None else "some"
        return f"promise 2: a target with a rank, and no other, must have low-rank factors. Got {came} instead"
    if low_rank is None:
        return None
    (out, inputs), rank = layer.weight.shape, target.rank_of(*layer.weight.shape)
    if (kept := low_rank.kept) is not None:
        rank = len(low_rank.right) if low_rank.right.ndim == 2 else rank
        if kept.dtype != torch.bool or kept.shape != (out, rank):
            return f"promise 2: kept must be torch.bool [{out}, {rank}]. Got {kept.dtype} {_words(kept.shape)} instead"
        bits, budget = 16 * (rank * inputs + int(kept.sum())) + out * rank, 16 * target.rank * out * inputs
        if bits > budget:
            return f"promise 2: factors of {target.label} must take {budget:g} bits at most. Got {bits} instead"
    tensors = {"left": (low_rank.left, (out, rank)), "right": (low_rank.right, (rank, inputs))}
    if (low_rank.rest is None) != target.rest.dense:
        wanted, came = ("no", "one") if target.rest.dense else ("a", "none")
        return f"promise 2: {target.label} must have {wanted} part beside its factors. Got {came} instead"
    if low_rank.rest is not None:
        tensors["rest"] = (low_rank.rest, (out, inputs))
    for name, (tensor, shape) in tensors.items():
        if tensor.dtype != torch.float32 or tensor.shape != shape or tensor.device != layer.weight.device:
            came = f"{tensor.dtype} {_words(tensor.shape)} on {tensor.device}"
            return f"promise 2: {name} must be torch.float32 {list(shape)} on the weight's device. Got {came} instead"
        if not finite(tensor):
            ruined = int((~torch.isfinite(tensor)).sum())
            return f"promise 1: {name} {NOT_FINITE}. Got {ruined} entries of NaN or Inf instead"
    if kept is not None and (left := nonzero_outside(low_rank.left, kept)):
        return f"promise 1: left must be zero where kept is False. Got {left} nonzero entries instead"
    if sentence := _factor_codes(layer, target, low_rank):
        return sentence
    wrong = int((product(low_rank) != result.weight).count_nonzero())
    return (
        f"promise 2: the weight must be the sum of its parts. Got {wrong} entries that differ instead"
        if wrong
        else None
    )


def _factor_codes(layer: Layer, target: Target, low_rank: LowRank) -> str | None:
    """The fault in the codes of factors, each as of a layer of its own, or None."""
    for name, factor in zip(("left", "right"), factors_of(low_rank), strict=True):
        codes = factor.quantised
        if (codes is None) != (target.factor_bits is None):
            wanted, came = ("no", "some") if target.factor_bits is None else ("the", "none")
            return f"promise 2: {target.label} must have {wanted} codes of its factor {name}. Got {came} instead"
        if codes is None:
            continue
        if low_rank.kept is not None:
            return "promise 2: a quantised factor must not be sparse. Got kept instead"
        for part in ("group_of", "input_scale", "divisor", "levels", "rotation"):
            if getattr(codes, part) is not None:
                return f"promise 3: the codes of the factor {name} must have no {part}. Got one instead"
        own = replace(layer, weight=factor.weight)
        if factor.weight.numel() and (sentence := _grid(own, target.factors, factor)):
            return sentence.replace(": ", f": of the factor {name}, ", 1)
    return None


def _masked(layer: Layer, target: Target, result: Compressed) -> str | None:
    if result.mask is None:
        return None if target.sparsity == 0 else "promise 1: a pruned layer must have a mask. Got None instead"
    if result.mask.shape != layer.weight.shape or result.mask.dtype != torch.bool:
        return f"promise 1: the mask must be bool {_words(layer.weight.shape)}. Got {result.mask.dtype} instead"
    left = nonzero_outside(result.weight, result.mask)
    return (
        f"promise 1: the weight must be zero where the mask is False. Got {left} nonzero entries instead"
        if left
        else None
    )


def _pattern(layer: Layer, target: Target, result: Compressed) -> str | None:
    if target.sparsity == 0 or result.mask is None:
        return None
    expected = kept_counts(result.mask.shape, target).to(result.mask.device)
    came = count_kept(result.mask, target)
    if target.block and not torch.isin(came, torch.stack([torch.zeros_like(expected), expected])).all():
        return f"promise 2: every 1x{target.block} block must be kept or dropped whole"
    if target.block:
        dropped = (came == 0).sum(1)
        wanted = int(target.sparsity * came.shape[1])
        wrong = int((dropped != wanted).sum())
        return (
            f"promise 2: every row must lose {wanted} blocks. Got {wrong} rows that do not instead" if wrong else None
        )
    wrong = int((came != expected).count_nonzero())
    where = {"row": "rows", "layer": "layer", "n:m": f"groups of {target.pattern}"}[target.structure]
    return (
        f"promise 2: the kept entries of {target.label} must be exact. Got {wrong} {where} that differ instead"
        if wrong
        else None
    )


def _grid(layer: Layer, target: Target, result: Compressed) -> str | None:
    if target.bits is None:
        return None
    quantised = result.quantised
    if quantised is None:
        return "promise 3: a quantised layer must have codes, scales and zeros"
    codes, scales, zeros, input_scale = quantised.codes, quantised.scales, quantised.zeros, quantised.input_scale
    if codes.dtype != torch.uint8 or codes.shape != layer.weight.shape:
        came = f"{codes.dtype} {_words(codes.shape)}"
        return f"promise 3: codes must be uint8 {_words(layer.weight.shape)}. Got {came} instead"
    most = int(codes.max())
    if most >= 2**target.bits:
        return f"promise 3: codes of {target.bits} bits must lie in [0, {2**target.bits - 1}]. Got {most} instead"
    out, inputs = layer.weight.shape
    group_of = ops.grouping(quantised, target)
    if group_of.shape != (inputs,) or group_of.dtype != torch.int64 or int(group_of.min()) < 0:
        came = f"{group_of.dtype} {_words(group_of.shape)}, least {group_of.min()}"
        return f"promise 3: group_of must be int64 [{inputs}], at least 0. Got {came} instead"
    groups = int(group_of.max()) + 1
    shapes = {"scales": (out, groups), "zeros": (out, groups), "input_scale": (inputs,)}
    for name, tensor in (("scales", scales), ("zeros", zeros), ("input_scale", input_scale)):
        if tensor is not None and tensor.dtype != torch.float32:
            return f"promise 3: {name} must be torch.float32. Got {tensor.dtype} instead"
        if tensor is not None and tensor.shape != shapes[name]:
            return f"promise 3: {name} must be {list(shapes[name])}. Got {_words(tensor.shape)} instead"
    for name, tensor in (("scales", scales), ("input_scale", input_scale)):
        may_be_zero = name == "scales" and quantised.levels is not None
        if tensor is not None and not (((tensor >= 0) if may_be_zero else (tensor > 0)) & torch.isfinite(tensor)).all():
            return f"promise 3: {name} must be positive and finite"
    if sentence := _book(quantised, target) or _zeros(zeros, target, quantised.levels is not None):
        return sentence
    wrong = 0
    for rows, values in ops.values_by_rows(quantised, target):
        kept = values if result.mask is None else values.masked_fill_(~result.mask[rows], 0.0)
        wrong += int((kept != result.weight[rows]).count_nonzero())
    by = "" if input_scale is None else " / input_scale"
    value = "scales * (codes - zeros)" if ops.book_of(quantised, target) is None else "scales * levels"
    return f"promise 3: {value}{by} must equal the weight. Got {wrong} entries that differ instead" if wrong else None


def _zeros(zeros: Tensor, target: Target, levels: bool) -> str | None:
    assert target.bits is not None
    if target.format or levels:
        off, expected = zeros != 0, "0"
    elif target.symmetric:
        off, expected = zeros != 2 ** (target.bits - 1), f"{2 ** (target.bits - 1)}"
    else:
        off = (zeros != zeros.round()) | (zeros < 0) | (zeros >= 2**target.bits)
        expected = f"whole numbers in [0, {2**target.bits - 1}]"
    return f"promise 3: zeros must be {expected}. Got {int(off.sum())} others instead" if off.any() else None


def _book(quantised: Quantised, target: Target) -> str | None:
    """The fault in levels, the divisor, or the scales of a format, or None."""
    assert target.bits is not None
    divisor, levels, rotation = quantised.divisor, quantised.levels, quantised.rotation
    if rotation is not None and not (
        isinstance(rotation, Rotation)
        and 0 <= rotation.seed < 2**31
        and rotation.block == block_of(quantised.codes.shape[1], rotation.block)
    ):
        return f"promise 3: a rotation must have a seed and a block that divides the inputs. Got {rotation} instead"
    if (divisor is None) == (target.format == "nvfp4"):
        return f"promise 3: scales of nvfp4, and no others, must have a divisor. Got {divisor} instead"
    if divisor is not None and not (
        divisor.shape == (1,) and divisor.dtype == torch.float32 and 0 < divisor < math.inf
    ):
        return f"promise 3: the divisor must be torch.float32 [1], positive and finite. Got {divisor} instead"
    if levels is not None and target.format:
        return f"promise 3: the levels of {target.format} are fixed. Got others instead"
    if levels is not None and (levels.shape != (2**target.bits,) or levels.dtype != torch.float32):
        came = f"{levels.dtype} {_words(levels.shape)}"
        return f"promise 3: levels must be torch.float32 [{2**target.bits}]. Got {came} instead"
    if levels is not None and not finite(levels):
        return "promise 3: levels must be finite"
    if target.format and (wrong := int((~expressible(quantised.scales, target)).sum())):
        return f"promise 3: scales must be numbers that {target.format} has. Got {wrong} others instead"
    return None


def _unchanged(layer: Layer, target: Target, result: Compressed) -> str | None:
    if target.dense and not torch.equal(result.weight, layer.weight):
        return "promise 7: sparsity 0 without bits must return the weight unchanged"
    return None


def _moved(layer: Layer, target: Target, result: Compressed) -> str | None:
    """The fault of a mask-only method that changed a kept weight, or None. Such methods are compared by their masks."""
    if result.mask is None or target.bits is not None:
        return None
    parts = zip(*(x.split(ROWS) for x in (layer.weight, result.weight, result.mask)), strict=True)
    moved = sum(int(((own != other) & kept).count_nonzero()) for own, other, kept in parts)
    return (
        f"promise 7: a mask-only method must leave what it keeps unchanged. Got {moved} weights that differ instead"
        if moved
        else None
    )


def _told(layer: Layer, target: Target, result: Compressed) -> str | None:
    """The fault in the trace and info, which the tables show unchanged, or None."""
    if not isinstance(result.info, Mapping) or not isinstance(result.trace, Sequence):
        came = f"{type(result.trace).__name__} and {type(result.info).__name__}"
        return f"promise 10: trace and info must be a tuple and a dict. Got {came} instead"
    for row in result.trace:
        if not isinstance(row, Sequence) or len(row) != 3 or not all(isinstance(x, numbers.Real) for x in row):
            return f"promise 10: the trace must be rows of (iteration, seconds, objective). Got {row!r} instead"
        if not all(map(math.isfinite, row)):
            return f"promise 10: the trace {NOT_FINITE}. Got {tuple(map(float, row))} instead"
    iterations = [row[0] for row in result.trace]
    if any(not isinstance(i, numbers.Integral) or i < 0 for i in iterations) or iterations != sorted(set(iterations)):
        return "promise 10: the iterations of a trace must be rising whole numbers"
    damping = result.info.get("damping")
    if damping is not None and not (isinstance(damping, numbers.Real) and 0 <= float(damping) < math.inf):
        return f"promise 10: info['damping'] must be a finite number, at least 0. Got {damping!r} instead"
    gaps = result.info.get("duality_gaps")
    if gaps is not None and (len(gaps) != len(result.trace) or not all(isinstance(x, numbers.Real) for x in gaps)):
        return "promise 10: info['duality_gaps'] must be a number for each row of the trace"
    if gaps is not None and not all(map(math.isfinite, gaps)):
        return f"promise 10: the duality gaps {NOT_FINITE}"
    learned = result.info.get("learned", {})
    if not isinstance(learned, Mapping):
        return f"promise 10: info['learned'] must be a dict. Got {type(learned).__name__} instead"
    for name, values in learned.items():
        if not isinstance(values, Sequence) or not all(isinstance(x, numbers.Real) for x in values):
            return (
                f"promise 10: info['learned'][{name!r}] must be a list of numbers. Got {type(values).__name__} instead"
            )
        if not all(map(math.isfinite, values)):
            return f"promise 10: info['learned'][{name!r}] {NOT_FINITE}"
    return None


def _words(value: object) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)
