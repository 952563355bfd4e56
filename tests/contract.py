"""Promises 1 to 9 of the layer contract (docs/contract.md) as checks that hold for any method and target.

Each check takes a Case and raises AssertionError; what it needs it counts itself, without compression/verify.py.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from layerwise.contract.catalogue import Catalogue, Entry
from layerwise.contract.layer import Compressed, Gram, Layer, Method, Statistics, Target, UnsupportedTarget
from layerwise.numerics import dispatch
from tests import layers
from tests.brute_force import best_error, output_error
from tests.layers import HARD, ORDINARY, Recipe

TARGETS = [
    Target(),
    Target(0.5),
    Target(0.7),  # of 64, 44.8 go
    Target(0.5, "layer"),
    Target(pattern="2:4"),
    Target(pattern="3:8"),  # not as many go as stay
    Target(0.5, "1x16"),
    Target(bits=4, group=128),
    Target(bits=4, group=16),
    Target(bits=3, group=16),
    Target(bits=4, symmetric=True),
    Target(pattern="2:4", bits=4),
    Target(0.5, bits=4, group=16),
    Target(0.5, "1x16", bits=4, group=16),
]
# Parameters tried beside the defaults: what makes a method take another path on layers as small as these.
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "sparsegpt": [{"blocksize": 16}],
    "rtn": [{"mse": True}],
    "gptq": [{"blocksize": 16}, {"act_order": True}, {"act_order": True, "static_groups": True, "mse": True}],
    "awq": [{"grid": 4, "clip": False}, {"convention": "official"}],
    "awp": [
        {"step": "spectral", "iterations": 20},
        {"rounding": "gradual", "iterations": 20},
        {"acceleration": "momentum", "iterations": 20},
    ],
    "chain": [{"chain": ["rtn", "wanda"]}, {"chain": ["wanda", {"awp": {"rounding": "gradual", "iterations": 20}}]}],
    "frank_wolfe": [
        {"step": "line_search", "keep": 0.5, "iterations": 20},
        {"step": "pairwise", "keep": 0.5, "iterations": 20},
    ],
    "sparse_swaps": [{"warm_start": "magnitude", "swaps": None}],
    "dsnot": [{"warm_start": "sparsegpt", "cycles": 5}],
    "admm": [{"iterations": 3, "refresh": 0}],
    "alps": [{"iterations": 4, "refinements": 0}],
    "reconstruct": [{"mask_from": "ria", "damping": 0.01}],
    "gqsa": [{"damping": 1.0}],
}
# In place of the defaults, which take minutes: a step is a step, the thousandth finds no new path through the code.
FEWER: dict[str, dict[str, Any]] = {"frank_wolfe": {"iterations": 60}, "awp": {"iterations": 20}}
# Methods with compiled code of their own, whose plain torch reference keeps the promises too.
COMPILED = ("magnitude", "wanda", "rtn", "sparsegpt", "gptq", "awp", "dsnot", "frank_wolfe", "sparse_swaps")
# Methods whose paper claims no descent, with their reason; a label as in Case.
NO_DESCENT = {"frank_wolfe(iterations=60)": "2 / (t + 2) is no descent step, and the first is a whole one"}


@dataclass(frozen=True)
class Case:
    """A method, constructed, at a target."""

    entry: Entry
    method: Method
    target: Target
    params: Mapping[str, Any]  # what differs from the defaults
    plain: bool = False  # in plain torch, where by default compiled code runs

    @property
    def variant(self) -> bool:
        """Whether it is not what a study has that sets nothing."""
        return self.plain or self.params != FEWER.get(self.entry.name, {})

    @property
    def label(self) -> str:
        changed = ",".join(f"{key}={value}" for key, value in self.params.items())
        name = f"{self.entry.name}({changed})" if changed else self.entry.name
        return f"{name} in torch" if self.plain else name

    def compress(self, layer: Layer, seed: int = 0) -> Compressed:
        with dispatch.plain_torch() if self.plain else contextlib.nullcontext():
            return self.method.compress(layer, self.target, torch.Generator().manual_seed(seed))


def cases(catalogue: Catalogue) -> Iterator[Case]:
    """Every method of the catalogue, with every set of parameters, at every target."""
    for name, entry in catalogue.items():
        for params in [FEWER.get(name, {}), *PARAMETERS.get(name, [])]:
            method = catalogue.build(name, catalogue.complete(name, params, "the contract tests"))
            both = name in COMPILED and params == FEWER.get(name, {})
            for target in TARGETS:
                yield Case(entry, method, target, params)
                if both and not entry.refusal(target):
                    yield Case(entry, method, target, params, plain=True)


def rows(catalogue: Catalogue) -> Iterator[tuple[str, Case]]:
    """(check, case) pairs: the checks that say something of the case."""
    for case in cases(catalogue):
        for name in checks_of(case):
            yield name, case


def checks_of(case: Case) -> list[str]:
    target = case.target
    if target == Target():
        return ["7 unchanged"]
    if case.entry.refusal(target):
        return ["8 refused"]
    names = ["1 inputs untouched", "1 tensors", "4 deterministic", "6 hard layers"]
    names += ["2 pattern", "5 scale"] if target.sparsity else []
    names += ["2 ties"] if target.sparsity and not case.entry.card["updates_weights"] else []
    names += ["5 rows permute"] if target.structure != "layer" else []  # there rows compete with each other
    names += ["3 grid"] if target.bits else []
    names += ["9 brute force"] if not target.bits and not target.block else []
    names += ["9 no worse than the baseline"] if "gram" in case.entry.card["needs"] and not case.entry.control else []
    return [*names, "9 descent"]


def assert_tensors(layer: Layer, target: Target, result: Compressed) -> None:
    """Promise 1: shape, dtype and device kept, all finite, zero where the mask is False."""
    weight, mask = result.weight, result.mask
    for key, expected in (("shape", layer.weight.shape), ("dtype", torch.float32), ("device", layer.weight.device)):
        assert getattr(weight, key) == expected, f"{layer.name}: {key}"
    assert torch.isfinite(weight).all(), f"{layer.name}: not finite"
    if target.sparsity:
        assert mask is not None, f"{layer.name}: no mask"
        assert (mask.shape, mask.dtype) == (weight.shape, torch.bool), f"{layer.name}: mask"
        assert weight.numpy()[~mask.numpy()].any() == np.False_, f"{layer.name}: weights where the mask is False"


def assert_pattern(layer: Layer, target: Target, result: Compressed) -> None:
    """Promise 2, counted entry by entry."""
    if not target.sparsity:
        return
    assert result.mask is not None, layer.name
    mask = result.mask.tolist()
    out, inputs = layer.weight.shape
    dropped = [[not kept for kept in row] for row in mask]
    if target.pattern == "layer":
        assert sum(map(sum, dropped)) == int(target.sparsity * out * inputs), layer.name
        return
    for row in dropped:
        if target.pattern == "row":
            assert sum(row) == int(target.sparsity * inputs), layer.name
        elif ":" in target.pattern:
            kept, of = map(int, target.pattern.split(":"))
            for start in range(0, inputs, of):
                group = row[start : start + of]
                assert sum(group) == max(len(group) - kept, 0), f"{layer.name}: inputs {start} to {start + of}"
        else:
            length = int(target.pattern[2:])
            blocks = [row[start : start + length] for start in range(0, inputs, length)]
            assert all(len(set(block)) == 1 for block in blocks), f"{layer.name}: a block is neither kept nor dropped"
            assert sum(block[0] for block in blocks) == int(target.sparsity * len(blocks)), layer.name


def assert_grid(layer: Layer, target: Target, result: Compressed) -> None:
    """Promise 3: scale * (code - zero) / input scale in float32 is the weight at kept entries, and codes fit."""
    if target.bits is None:
        return
    quantised = result.quantised
    assert quantised is not None, layer.name
    codes, scales, zeros = quantised.codes.numpy(), quantised.scales.numpy(), quantised.zeros.numpy()
    inputs = layer.weight.shape[1]
    runs = np.arange(inputs) // (target.group or inputs)
    group_of = runs if quantised.group_of is None else quantised.group_of.numpy()
    assert codes.dtype == np.uint8 and codes.max() < 2**target.bits, layer.name
    assert scales.shape == zeros.shape == (len(codes), group_of.max() + 1), layer.name
    assert (np.isfinite(scales) & (scales > 0)).all() and np.isfinite(zeros).all(), layer.name
    values = scales[:, group_of] * (codes.astype(np.float32) - zeros[:, group_of])
    if quantised.input_scale is not None:
        divisor = quantised.input_scale.numpy()
        assert divisor.shape == (inputs,) and (np.isfinite(divisor) & (divisor > 0)).all(), layer.name
        values = values / divisor
    kept = np.ones_like(codes, bool) if result.mask is None else result.mask.numpy()
    assert np.array_equal(values[kept], result.weight.numpy()[kept]), f"{layer.name}: dequantised codes"


def assert_untouched(name: str, layer: Layer, result: Compressed) -> None:
    """Of the layer of that name, which was compressed; the result is of no use afterwards."""
    before = layers.tensors(layers.build(name))
    for key, value in layers.tensors(layer).items():
        assert torch.equal(value, before[key]), f"{name}: {key} changed"
    result.weight.add_(1.0)  # and the result is no view of the input
    assert torch.equal(layer.weight, before["weight"]), f"{name}: the result shares memory with the layer"


def assert_deterministic(case: Case, name: str) -> Compressed:
    """The same again whatever the global generators hold, which are left alone. Returns it; inputs stay, too."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
        results.append(case.compress(layer := layers.build(name)))
        assert torch.equal(torch.get_rng_state(), states[0]), f"{name}: torch's global generator was used"
        assert np.random.get_state()[1].tolist() == states[1], f"{name}: numpy's global generator was used"  # type: ignore[index]
        assert random.getstate() == states[2], f"{name}: Python's global generator was used"
    first, second = results
    parts = [vars(result) | (vars(result.quantised) if result.quantised else {}) for result in results]
    for key in ("weight", "mask", "codes", "scales", "zeros", "group_of", "input_scale"):
        a, b = (found.get(key) for found in parts)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), f"{name}: {key} differs"
    assert_untouched(name, layer, second)
    return first


def inputs_untouched(case: Case) -> None:
    for name in ORDINARY:
        assert_untouched(name, layer := layers.build(name), case.compress(layer))


def tensors(case: Case) -> None:
    for name in ORDINARY:
        assert_tensors(layer := layers.build(name), case.target, case.compress(layer))


def pattern(case: Case) -> None:
    for name in ORDINARY:
        assert_pattern(layer := layers.build(name), case.target, case.compress(layer))


def ties(case: Case) -> None:
    """Promise 2: among equal weights of equal inputs the lower index goes first."""
    if case.entry.card.get("random"):
        pytest.skip("its choice is random")
    one = torch.ones(64)
    layer = replace(layers.build("constant weights"), gram=Gram(torch.eye(64), 1000))
    layer = replace(layer, statistics=Statistics(32, one, one, one, torch.ones(32, 64)))
    assert_pattern(layer, case.target, result := case.compress(layer))
    assert result.mask is not None
    length = {"row": 64, "layer": layer.weight.numel(), "n:m": (case.target.n_of_m or (0, 1))[1], "1xb": 64}
    for group in result.mask.reshape(-1, length[case.target.structure]).tolist():
        assert group == sorted(group), "an entry was pruned before an equal one with a lower index"


def grid(case: Case) -> None:
    for name in ORDINARY:
        assert_grid(layer := layers.build(name), case.target, case.compress(layer))


def deterministic(case: Case) -> None:
    for name in ORDINARY:
        assert_deterministic(case, name)


def scale(case: Case) -> None:
    """Promise 5, with powers of two where there are ties, else with any factor."""
    factors = {"constant weights": (4.0, 2.0**-20), "correlated": (4.0, 2.0**-80, 2.0**40, 3.0, 1e-4, 77.7)}
    for name, by in factors.items():
        mask = case.compress(layers.build(name)).mask
        for factor in by:
            layer = layers.build(name)
            for what, scaled in (
                ("W", replace(layer, weight=factor * layer.weight)),
                ("G", replace(layer, gram=Gram(factor * layer.gram.matrix, layer.gram.tokens))),
            ):
                came = case.compress(scaled).mask
                assert mask is not None and came is not None
                differing = int((came != mask).sum())
                assert not differing, f"{name}: {differing} mask entries change when {what} is scaled by {factor:g}"


def rows_permute(case: Case) -> None:
    if case.entry.card.get("random"):
        pytest.skip("its choice is random")
    layer = layers.build("correlated")
    order = torch.randperm(len(layer.weight), generator=torch.Generator().manual_seed(3))
    result, permuted = case.compress(layer), case.compress(replace(layer, weight=layer.weight[order]))
    if result.mask is not None and permuted.mask is not None:
        assert torch.equal(permuted.mask, result.mask[order]), "the mask does not permute with the rows"
    torch.testing.assert_close(permuted.weight, result.weight[order], rtol=1e-5, atol=1e-6)


def hard_layers(case: Case) -> None:
    """Promise 6: promises 1 to 4 where a layer is degenerate."""
    for name in HARD:
        result = assert_deterministic(case, name)
        layer = layers.build(name)
        assert_tensors(layer, case.target, result)
        assert_pattern(layer, case.target, result)
        assert_grid(layer, case.target, result)


def unchanged(case: Case) -> None:
    """Promise 7, of every method, whatever its card lists."""
    for name in layers.LAYERS:
        layer = layers.build(name)
        result = case.compress(layer)
        assert torch.equal(result.weight, layer.weight), f"{name}: sparsity 0 changed the weight"
        assert_untouched(name, layer, result)


def refused(case: Case) -> None:
    """Promise 8: one sentence that names the method and speaks of what the card's refusal speaks of."""
    refusal = case.entry.refusal(case.target) or ""
    with pytest.raises(UnsupportedTarget) as caught:
        case.compress(layers.build("correlated"))
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence, sentence
    assert case.entry.name in sentence, f"does not name the method: {sentence}"
    stems = [stem for stem in ("prune", "pruning", "quantise", "changes nothing") if stem in refusal]
    assert any(stem[:4] in sentence for stem in stems), f"the card says {refusal!r}, compress {sentence!r}"


def no_worse_than_the_baseline(case: Case) -> None:
    """Promise 9: the smallest weights pruned, what is left rounded to nearest."""
    catalogue = Catalogue()
    for name in ORDINARY:
        layer = layers.build(name)
        baseline = layer.weight
        for method, needed, target in (
            ("magnitude", case.target.sparsity, replace(case.target, bits=None, group=None, symmetric=False)),
            ("rtn", case.target.bits, replace(case.target, sparsity=0.0, pattern="row")),
        ):
            if needed:
                built = catalogue.build(method, catalogue.complete(method, {}, "baseline"))
                baseline = built.compress(replace(layer, weight=baseline), target, torch.Generator()).weight
        ours, theirs = output_error(layer, case.compress(layer).weight), output_error(layer, baseline)
        assert ours <= theirs, f"{name}: output_error {ours:.4g}, the baseline's is {theirs:.4g}"


def brute_force(case: Case) -> None:
    """Promise 9 for in <= 8: nothing beats the best of all masks, which the mask is where G is diagonal."""
    structure = case.target.structure
    small = Recipe(out=2, inputs=4) if structure == "layer" else Recipe(out=3, inputs=8)
    refit = case.entry.card["updates_weights"]
    for seed in range(5):
        layer = layers.make(replace(small, seed=seed))
        error, best = output_error(layer, case.compress(layer).weight), best_error(layer, case.target, refit)
        assert error >= best * (1 - 1e-6), f"output_error {error:.6g} is below the best possible, {best:.6g}"
    if case.entry.card["needs"] == ["gram"] and not refit:
        layer = layers.make(small)
        layer = replace(layer, gram=Gram(torch.diag(layer.gram.diagonal), layer.gram.tokens))
        error, best = output_error(layer, case.compress(layer).weight), best_error(layer, case.target, False)
        assert error == pytest.approx(best, rel=1e-6), "the mask is not the best although G is diagonal"


def descent(case: Case) -> None:
    """Promise 9: the objective of the trace, which a method has whose card says what it measures, does not grow."""
    result = case.compress(layers.build("correlated"))
    assert bool(result.trace) == bool(case.entry.criterion), "the card has a criterion, and there is no trace, or none"
    if (label := case.label.removesuffix(" in torch")) in NO_DESCENT:
        pytest.skip(NO_DESCENT[label])
    if not result.trace:
        pytest.skip("it returns no trace")
    iterations, _, objectives = zip(*result.trace, strict=True)
    if case.entry.criterion == "error":  # the best iterate is what is returned
        reached = absolute_error(case, result)
        assert min(objectives) == pytest.approx(reached, rel=1e-4), "the least of the trace is not the result's error"
    assert list(iterations) == sorted(set(iterations)), "iterations of the trace are not in order"
    for before, after in itertools.pairwise(objectives):
        assert after <= before * (1 + 1e-6), f"the objective grows from {before:.6g} to {after:.6g}"


def absolute_error(case: Case, result: Compressed) -> float:
    layer = layers.build("correlated")
    lost = (layer.weight - result.weight).double()
    return float(((lost @ layer.gram.matrix.double()) * lost).sum())


CHECKS: dict[str, Callable[[Case], None]] = {
    "1 inputs untouched": inputs_untouched,
    "1 tensors": tensors,
    "2 pattern": pattern,
    "2 ties": ties,
    "3 grid": grid,
    "4 deterministic": deterministic,
    "5 scale": scale,
    "5 rows permute": rows_permute,
    "6 hard layers": hard_layers,
    "7 unchanged": unchanged,
    "8 refused": refused,
    "9 no worse than the baseline": no_worse_than_the_baseline,
    "9 brute force": brute_force,
    "9 descent": descent,
}
