"""The promises about a method's result that can be checked on any layer (docs/contract.md, promises 1 to 3 and 7).

The runner checks every result with `broken_promise`, so that a faulty adapter is named instead of published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods import ops
from methods.base import Compressed, Layer, Target


def broken_promise(layer: Layer, target: Target, result: Compressed) -> str | None:
    """One sentence about the first promise that the result breaks, or None."""
    for check in (_tensor, _masked, _pattern, _grid, _unchanged):
        sentence = check(layer, target, result)
        if sentence:
            return sentence
    return None


def _tensor(layer: Layer, target: Target, result: Compressed) -> str | None:
    for name in ("shape", "dtype", "device"):
        expected, came = getattr(layer.weight, name), getattr(result.weight, name)
        if expected != came:
            return f"promise 1: the weight's {name} must be {_words(expected)}, {_words(came)} came"
    if not torch.isfinite(result.weight).all():
        return f"promise 1: the weight must be finite, {int((~torch.isfinite(result.weight)).sum())} entries are not"
    return None


def _masked(layer: Layer, target: Target, result: Compressed) -> str | None:
    if result.mask is None:
        return None if target.sparsity == 0 else "promise 1: a pruned layer must come with its mask, None came"
    if result.mask.shape != layer.weight.shape or result.mask.dtype != torch.bool:
        return f"promise 1: the mask must be bool {_words(layer.weight.shape)}, {result.mask.dtype} came"
    left = int((result.weight[~result.mask] != 0).sum())
    return f"promise 1: the weight must be zero where the mask is False, {left} entries are not" if left else None


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
        return f"promise 2: {wanted} blocks must go in every row, {wrong} rows differ" if wrong else None
    wrong = int((came != expected).sum())
    where = {"row": "rows", "layer": "layer", "n:m": f"groups of {target.pattern}"}[target.structure]
    return f"promise 2: the kept entries of {target.label} must be exact, {wrong} {where} differ" if wrong else None


def count_kept(mask: Tensor, target: Target) -> Tensor:
    """Kept entries of each comparison group: [1] per layer, [out] per row, [out, groups] of n:m or blocks."""
    if target.n_of_m or target.block:
        length = target.n_of_m[1] if target.n_of_m else target.block
        return torch.nn.functional.pad(mask, (0, -mask.shape[1] % (length or 1))).unflatten(1, (-1, length)).sum(2)
    return mask.sum().view(1) if target.pattern == "layer" else mask.sum(1)


def kept_counts(shape: torch.Size, target: Target) -> Tensor:
    """What `count_kept` must give; of a block pattern the size of a block that is kept."""
    out, inputs = shape
    if target.n_of_m or target.block:
        length = target.n_of_m[1] if target.n_of_m else (target.block or 1)
        most = target.n_of_m[0] if target.n_of_m else length
        groups = -(-inputs // length)
        sizes = torch.tensor([min(length, inputs - g * length) for g in range(groups)])
        return sizes.clamp(max=most).expand(out, -1)
    if target.pattern == "layer":
        return torch.tensor([out * inputs - int(target.sparsity * (out * inputs))])
    return torch.full((out,), inputs - int(target.sparsity * inputs))


def _grid(layer: Layer, target: Target, result: Compressed) -> str | None:
    if target.bits is None:
        return None
    if result.codes is None or result.scales is None or result.zeros is None:
        return "promise 3: a quantised layer must come with codes, scales and zeros"
    if result.codes.dtype != torch.uint8 or result.codes.shape != layer.weight.shape:
        came = f"{result.codes.dtype} {_words(result.codes.shape)}"
        return f"promise 3: codes must be uint8 {_words(layer.weight.shape)}, {came} came"
    most = int(result.codes.max())
    if most >= 2**target.bits:
        return f"promise 3: codes of {target.bits} bits must lie in [0, {2**target.bits - 1}], {most} came"
    out, inputs = layer.weight.shape
    default = ops.groups_of(inputs, target.group, layer.weight.device)
    group_of = default if result.group_of is None else result.group_of
    if group_of.shape != (inputs,):
        return f"promise 3: group_of must be [{inputs}], {_words(group_of.shape)} came"
    groups = int(group_of.max()) + 1
    for name, tensor in (("scales", result.scales), ("zeros", result.zeros)):
        if tensor.shape != (out, groups):
            return f"promise 3: {name} must be [{out}, {groups}], {_words(tensor.shape)} came"
    if not ((result.scales > 0) & torch.isfinite(result.scales)).all():
        return "promise 3: scales must be positive and finite"
    off = (result.zeros != result.zeros.round()) | (result.zeros < 0) | (result.zeros >= 2**target.bits)
    if target.symmetric:
        off |= result.zeros != 2 ** (target.bits - 1)
    if off.any():
        expected = f"{2 ** (target.bits - 1)}" if target.symmetric else f"whole numbers in [0, {2**target.bits - 1}]"
        return f"promise 3: zeros must be {expected}, {int(off.sum())} are not"
    if result.input_scale is not None and result.input_scale.shape != (inputs,):
        return f"promise 3: input_scale must be [{inputs}], {_words(result.input_scale.shape)} came"
    if result.input_scale is not None and not ((result.input_scale > 0) & torch.isfinite(result.input_scale)).all():
        return "promise 3: input_scale must be positive and finite"
    values = ops.dequantise(result.codes, result.scales, result.zeros, group_of, result.input_scale)
    kept = values if result.mask is None else torch.where(result.mask, values, 0.0)
    wrong = int((kept != result.weight).sum())
    by = "" if result.input_scale is None else " / input_scale"
    return f"promise 3: scales * (codes - zeros){by} must equal the weight, {wrong} entries differ" if wrong else None


def _unchanged(layer: Layer, target: Target, result: Compressed) -> str | None:
    if target.sparsity == 0 and target.bits is None and not torch.equal(result.weight, layer.weight):
        return "promise 7: sparsity 0 without bits must return the weight unchanged"
    return None


def _words(value: object) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)
