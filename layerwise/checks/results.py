"""Promises 1 to 4 of the layer contract as assertions about one result, checked entry by entry."""

from __future__ import annotations

import random

import numpy as np
import torch

from layerwise.checks import layer_cases
from layerwise.checks.case import Case, Finding, demand
from layerwise.contract.layer import Compressed, Layer, Rotation, Target

MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M1 = np.array([*MAGNITUDES, *(-level for level in MAGNITUDES)], np.float32)  # value of each code of the format


def assert_tensors(layer: Layer, target: Target, result: Compressed) -> None:
    """Promise 1: shape, dtype and device kept, all finite, zero where the mask is False."""
    weight, mask = result.weight, result.mask
    for key, expected in (("shape", layer.weight.shape), ("dtype", torch.float32), ("device", layer.weight.device)):
        came = getattr(weight, key)
        demand(came == expected, layer.name, f"the weight's {key} must be {_words(expected)}", _words(came))
    lost = int((~torch.isfinite(weight)).sum())
    demand(not lost, layer.name, "the weight must be finite", f"{lost} entries that are NaN or infinite")
    part = assert_parts(layer, target, result)
    if target.sparsity and part is not None:
        weight = part.weight
        if mask is None:
            raise Finding(layer.name, "a pruned layer must have a mask", "None")
        expected, came = f"torch.bool {_words(weight.shape)}", f"{mask.dtype} {_words(mask.shape)}"
        demand((mask.shape, mask.dtype) == (weight.shape, torch.bool), layer.name, f"the mask must be {expected}", came)
        left = int(np.count_nonzero(weight.numpy()[~mask.numpy()]))
        demand(not left, layer.name, "the weight must be zero where the mask is False", f"{left} nonzero entries there")


def assert_parts(layer: Layer, target: Target, result: Compressed) -> Compressed | None:
    """Promise 2 for low-rank factors: their rank, and that the weight is the sum; returns the part beside them.

    Returns the result itself for a target without a rank, and None for a target with factors alone.
    """
    low_rank = result.low_rank
    if not target.rank:
        demand(low_rank is None, layer.name, "there must be factors if, and only if, the target has a rank", "factors")
        return result
    if low_rank is None:
        raise Finding(layer.name, "a target with a rank must have low-rank factors", "None")
    out, inputs = layer.weight.shape
    rank = int(target.rank * out * inputs / (out + inputs))
    if low_rank.kept is not None:
        rank = low_rank.kept.shape[1]
        taken = (16 * int(low_rank.kept.sum()) + out * rank + 16 * rank * inputs) / (16 * out * inputs)
        demand(taken <= target.rank, layer.name, f"the factors must take at most {target.rank:g} of the weights", taken)
        zeros = not low_rank.left[~low_rank.kept].any()
        demand(zeros, layer.name, "a sparse factor must be zero where it is not kept", "nonzero entries there")
    came = f"{_words(low_rank.left.shape)} and {_words(low_rank.right.shape)}"
    shapes = low_rank.left.shape == (out, rank) and low_rank.right.shape == (rank, inputs)
    demand(shapes, layer.name, f"the factors must be [{out}, {rank}] and [{rank}, {inputs}]", came)
    alone = not target.sparsity and not target.bits
    demand((low_rank.rest is None) == alone, layer.name, f"{target.label} must have its parts", "other parts")
    parts = [low_rank.left, low_rank.right] + ([] if low_rank.rest is None else [low_rank.rest])
    total = np.zeros((out, inputs))
    for index in range(rank):
        total += np.outer(*(x.numpy().astype(np.float64) for x in (parts[0][:, index], parts[1][index])))
    if low_rank.rest is not None:
        total += low_rank.rest.numpy()
    demand(np.isfinite(total).all(), layer.name, "the parts must be finite", "NaN or infinity")
    sizes = np.abs(parts[0].numpy().astype(np.float64)) @ np.abs(parts[1].numpy().astype(np.float64)) + np.abs(total)
    assert_factor_codes(layer, target, result)
    close = (np.abs(total - result.weight.numpy()) <= 1e-6 * sizes).all()
    demand(close, layer.name, "the weight must be the sum of its parts (to 1e-6)", "another matrix")
    return None if low_rank.rest is None else Compressed(low_rank.rest, result.mask, result.quantised)


def assert_factor_codes(layer: Layer, target: Target, result: Compressed) -> None:
    """Promise 3 for quantised factors: scale * (code - zero) is the factor, entry by entry, and codes fit."""
    low_rank = result.low_rank
    assert low_rank is not None  # otherwise assert_parts would have raised
    for side, factor, codes in (
        ("left", low_rank.left, low_rank.left_codes),
        ("right", low_rank.right, low_rank.right_codes),
    ):
        demand(
            (codes is None) == (target.factor_bits is None),
            layer.name,
            f"{side} must have the form that the target asks for",
            "another form",
        )
        if codes is None or target.factor_bits is None:
            continue
        rows, length = factor.shape
        group_of = np.arange(length) // (target.factor_group or max(length, 1))
        most = 2**target.factor_bits - 1
        numbers, scales, zeros = codes.codes.numpy(), codes.scales.numpy(), codes.zeros.numpy()
        sizes = numbers.shape == (rows, length) and scales.shape == zeros.shape == (rows, len(set(group_of)))
        demand(sizes, layer.name, f"the codes of {side} must be [{rows}, {length}], in its groups", "other sizes")
        fit = numbers.dtype == np.uint8 and numbers.max(initial=0) <= most and (zeros >= 0).all()
        whole = fit and (zeros <= most).all() and (zeros == zeros.round()).all()
        demand(whole, layer.name, f"codes and zeros of {side} must be whole, 0 to {most}", "others")
        demand((np.isfinite(scales) & (scales > 0)).all(), layer.name, f"scales of {side} must be positive", "others")
        values = scales[:, group_of] * (numbers.astype(np.float32) - zeros[:, group_of])
        wrong = int((values != factor.numpy()).sum())
        demand(not wrong, layer.name, f"scales * (codes - zeros) must be {side}", f"{wrong} entries that differ")


def _words(value: object) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)


def assert_pattern(layer: Layer, target: Target, result: Compressed) -> None:
    """Promise 2, checked entry by entry."""
    if not target.sparsity:
        return
    if result.mask is None:
        raise Finding(layer.name, "a pruned layer must have a mask", "None")
    mask = result.mask.tolist()
    out, inputs = layer.weight.shape
    dropped = [[not kept for kept in row] for row in mask]

    def exact(what: str, came: int, expected: int) -> None:
        demand(came == expected, layer.name, f"{what} must have {expected} pruned entries", came)

    if target.pattern == "layer":
        exact("the layer", sum(map(sum, dropped)), int(target.sparsity * out * inputs))
        return
    for index, row in enumerate(dropped):
        if target.pattern == "row":
            exact(f"row {index}", sum(row), int(target.sparsity * inputs))
        elif ":" in target.pattern:
            kept, of = map(int, target.pattern.split(":"))
            for start in range(0, inputs, of):
                group = row[start : start + of]
                exact(f"row {index}, inputs {start} to {start + of - 1},", sum(group), max(len(group) - kept, 0))
        else:
            length = int(target.pattern[2:])
            blocks = [row[start : start + length] for start in range(0, inputs, length)]
            parts = sum(len(set(block)) > 1 for block in blocks)
            demand(not parts, layer.name, f"row {index} must keep or drop whole blocks", f"{parts} blocks in part")
            gone, expected = sum(block[0] for block in blocks), int(target.sparsity * len(blocks))
            demand(gone == expected, layer.name, f"row {index} must have {expected} pruned blocks", gone)


def assert_grid(layer: Layer, target: Target, result: Compressed) -> None:
    """Promise 3: scale * (code - zero) / input scale in float32 is the weight at kept entries, and codes fit.

    For a format, a level replaces code - zero, and scales are first divided by the layer's divisor.
    """
    if target.bits is None:
        return
    quantised = result.quantised
    if quantised is None:
        raise Finding(layer.name, "a quantised layer must have codes, scales and zeros", "None")
    codes, scales, zeros = quantised.codes.numpy(), quantised.scales.numpy(), quantised.zeros.numpy()
    inputs = layer.weight.shape[1]
    runs = np.arange(inputs) // (target.group or inputs)
    group_of = runs if quantised.group_of is None else quantised.group_of.numpy()
    most = 2**target.bits - 1
    fit = codes.dtype == np.uint8 and codes.max() <= most
    demand(fit, layer.name, f"codes must be uint8 in [0, {most}]", f"{codes.dtype} up to {codes.max()}")
    shape = (len(codes), group_of.max() + 1)
    expected = f"scales and zeros must be [{shape[0]}, {shape[1]}]"
    demand(scales.shape == zeros.shape == shape, layer.name, expected, f"{scales.shape} and {zeros.shape}")
    low = scales.min()
    low_enough = scales >= 0 if quantised.levels is not None else scales > 0
    demand((np.isfinite(scales) & low_enough).all(), layer.name, "scales must be positive and finite", f"{low:g}")
    demand(np.isfinite(zeros).all(), layer.name, "zeros must be finite", "NaN or infinity")
    if quantised.levels is not None:
        values = scales[:, group_of] * quantised.levels.numpy()[codes]
    elif target.format:
        values = _steps(layer, target, result)[:, group_of] * E2M1[codes]
    else:
        values = scales[:, group_of] * (codes.astype(np.float32) - zeros[:, group_of])
    if quantised.input_scale is not None:
        divisor = quantised.input_scale.numpy()
        positive = divisor.shape == (inputs,) and (np.isfinite(divisor) & (divisor > 0)).all()
        expected = f"input_scale must be [{inputs}], positive and finite"
        demand(positive, layer.name, expected, f"{divisor.shape} from {divisor.min():g} on")
        values = values / divisor
    if quantised.rotation is not None:
        turned = _turned_back(values, quantised.rotation)
        most = np.abs(turned).max(initial=0)
        close = np.allclose(turned, result.weight.numpy(), rtol=0, atol=1e-5 * most)
        demand(close, layer.name, "values rotated back must equal the weight (to 1e-5)", "other values")
        return
    kept = np.ones_like(codes, bool) if result.mask is None else result.mask.numpy()
    weight = result.weight if result.low_rank is None else result.low_rank.rest
    assert weight is not None  # otherwise assert_tensors would have raised
    same = np.array_equal(values[kept], weight.numpy()[kept])
    wrong = 0 if same else int((values[kept] != weight.numpy()[kept]).sum())
    demand(same, layer.name, "scales * (codes - zeros) must equal the weight", f"{wrong} entries that differ")


def _turned_back(values: np.ndarray, rotation: Rotation) -> np.ndarray:
    """Values [out, in] times Q^T, with Q as a matrix: signs by SplitMix64 in integers, entries (-1)^popcount(i & j)."""
    inputs, block, wide = values.shape[1], rotation.block, 2**64
    matrix = np.zeros((inputs, inputs))
    for i in range(inputs):
        x = (rotation.seed + (i + 1) * 0x9E3779B97F4A7C15) % wide
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % wide
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % wide
        sign = -1 if (x ^ (x >> 31)) >> 63 else 1
        for j in range(i // block * block, i // block * block + block):
            matrix[i, j] = sign * (-1) ** (i % block & j % block).bit_count() / block**0.5
    return values.astype(np.float64) @ matrix.T


def _steps(layer: Layer, target: Target, result: Compressed) -> np.ndarray:
    """[out, groups] float32 scales over their divisor; each must be a number of the format."""
    assert result.quantised is not None
    scales, divisor = result.quantised.scales.numpy(), result.quantised.divisor
    mantissa, exponent = np.frexp(scales)
    if target.format == "mxfp4":
        demand((mantissa == 0.5).all(), layer.name, "scales must be powers of two", f"{scales.max():g} among them")
        return scales
    digits = np.minimum(4, exponent + 9)  # of the mantissa: numbers below 2^-6 have fewer
    whole = (np.ldexp(mantissa, digits) % 1 == 0) & (scales <= 448)
    demand(whole.all(), layer.name, "scales must be e4m3", f"{scales[~whole].max(initial=0):g} among them")
    demand(divisor is not None and divisor.shape == (1,), layer.name, "a divisor must be [1]", divisor)
    assert divisor is not None
    return scales / divisor.numpy()


def assert_untouched(name: str, layer: Layer, result: Compressed) -> None:
    """Check that compression left the layer of that name unchanged; the result is unusable afterwards."""
    before = layer_cases.tensors(layer_cases.build(name))
    for key, value in layer_cases.tensors(layer).items():
        demand(torch.equal(value, before[key]), name, f"the {key} must be left unchanged", f"a changed {key}")
    result.weight.add_(1.0)  # so that a result that is a view of the input shows
    shared = not torch.equal(layer.weight, before["weight"])
    demand(not shared, name, "the result must have memory of its own", "memory that it shares with the layer")


def assert_deterministic(case: Case, name: str) -> Compressed:
    """Check that the result is the same for any state of the global generators, which it leaves alone. Returns it."""
    first, second, layer = twice(case, name)
    assert_same(name, first, second)
    assert_untouched(name, layer, second)
    return first


def twice(case: Case, name: str) -> tuple[Compressed, Compressed, Layer]:
    """The results of two calls with different states of the global generators, and the layer of the second call."""
    results = []
    layer = layer_cases.build(name)
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = _generators()
        results.append(case.compress(layer := layer_cases.build(name)))
        for whose, state in _generators().items():
            demand(state == states[whose], name, f"{whose} global generator must be left alone", "a changed state")
    return *results, layer


def _generators() -> dict[str, object]:
    return {
        "torch's": torch.get_rng_state().tolist(),
        "numpy's": np.random.get_state(legacy=False)["state"]["key"].tolist(),
        "Python's": random.getstate(),
    }


def assert_same(name: str, first: Compressed, second: Compressed) -> None:
    """Promise 4: two results for the same inputs are bit-identical."""
    parts = [
        {
            key: value
            for part in (result, result.quantised, result.low_rank)
            if part
            for key, value in vars(part).items()
        }
        | {
            f"{side} {key}": value
            for side in ("left_codes", "right_codes")
            if (codes := getattr(result.low_rank, side, None))
            for key, value in vars(codes).items()
        }
        for result in (first, second)
    ]
    for key in (
        "weight",
        "mask",
        "codes",
        "scales",
        "zeros",
        "group_of",
        "input_scale",
        "divisor",
        "levels",
        "rotation",
        "left",
        "right",
        "rest",
        "kept",
        *(f"{side}_codes {key}" for side in ("left", "right") for key in ("codes", "scales", "zeros")),
    ):
        a, b = (part.get(key) for part in parts)
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        demand(same, name, f"two calls with the same inputs must give the same {key}", f"a {key} that differs")
