"""Promises 1 to 9 of the layer contract (docs/contract.md) as checks that hold for any method and target.

A check looks at a Case on one layer and raises a Finding. What it needs it counts itself, without
compression/verify.py; the last one, "10 the runner's own", asks the runner. `check_file` runs all on one method's file.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.checks import layer_cases
from layerwise.checks.brute_force import best_error, output_error
from layerwise.checks.layer_cases import EQUAL, HARD, LAYERS, ORDINARY, SMALL_ROWS, SMALL_WHOLE, UNCORRELATED
from layerwise.checks.report import BROKEN, KEPT, KNOWN, NOTE, NOTHING, Report, Row
from layerwise.compression.solver import Solver
from layerwise.contract.catalogue import Catalogue, CatalogueError, Entry, forget
from layerwise.contract.import_closure import METHODS
from layerwise.contract.layer import Compressed, Gram, Layer, Method, Target, UnsupportedTarget
from layerwise.numerics import dispatch
from layerwise.runtime.errors import InputError

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
# One target of each kind, by label: where variants of a method are tried at every change, and all that `quick` has.
ONE_OF_EACH = ("50% row", "50% layer", "2:4", "4b g16", "2:4 4b", "50% 1x16 4b g16")
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
# (check, method, target's label): why it does not hold. The tests fail where one holds after all: the table stays true.
KNOWN_FAILURES: dict[tuple[str, str, str], str] = {
    ("9 brute force", "ria", target): "RIA's score is relative to row and column, no loss, even where G is diagonal"
    for target in ("50% row", "70% row", "2:4", "3:8")
}


class Finding(AssertionError):
    """A promise that does not hold: on which layer, what was expected, what came."""

    def __init__(self, layer: str, expected: str, came: object) -> None:
        super().__init__(f"{layer}: {expected}. Got {came} instead.")
        self.layer = layer
        self.expected = expected
        self.came = str(came)


class NothingToCheck(Exception):
    """Why a check says nothing of a case."""


def demand(holds: object, layer: str, expected: str, came: object) -> None:
    """Raise a Finding unless it holds. expected: "X must be Y", without the full stop."""
    if not holds:
        raise Finding(layer, expected, came)


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
        with dispatch.reference() if self.plain else contextlib.nullcontext():
            result = self.method.compress(layer, self.target, torch.Generator().manual_seed(seed))
        came = type(result).__name__
        demand(isinstance(result, Compressed), layer.name, "what a method returns must be a Compressed", came)
        return result


def cases(catalogue: Catalogue) -> Iterator[Case]:
    """Every method of the catalogue, with every set of parameters, at every target."""
    for name in catalogue:
        yield from cases_of(catalogue, name, [FEWER.get(name, {}), *PARAMETERS.get(name, [])], TARGETS)


def cases_of(
    catalogue: Catalogue, name: str, variants: Sequence[Mapping[str, Any]], targets: Sequence[Target]
) -> Iterator[Case]:
    """A method of the catalogue with each of these sets of parameters at each target."""
    entry = catalogue[name]
    for params in variants:
        method = catalogue.build(name, catalogue.complete(name, params, "the contract tests"))
        both = name in COMPILED and params == FEWER.get(name, {})
        for target in targets:
            yield Case(entry, method, target, params)
            if both and not entry.refusal(target):
                yield Case(entry, method, target, params, plain=True)


def rows(catalogue: Catalogue) -> Iterator[tuple[str, Case]]:
    """(check, case) pairs: the checks that say something of the case."""
    for case in cases(catalogue):
        for name in checks_of(case):
            yield name, case


def checks_of(case: Case) -> list[str]:
    """Names of the checks that say something of the case, the runner's own apart."""
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
        came = getattr(weight, key)
        demand(came == expected, layer.name, f"the weight's {key} must be {_words(expected)}", _words(came))
    lost = int((~torch.isfinite(weight)).sum())
    demand(not lost, layer.name, "the weight must be finite", f"{lost} entries that are NaN or infinite")
    if target.sparsity:
        if mask is None:
            raise Finding(layer.name, "a pruned layer must come with its mask", "None")
        expected, came = f"torch.bool {_words(weight.shape)}", f"{mask.dtype} {_words(mask.shape)}"
        demand((mask.shape, mask.dtype) == (weight.shape, torch.bool), layer.name, f"the mask must be {expected}", came)
        left = int(np.count_nonzero(weight.numpy()[~mask.numpy()]))
        demand(not left, layer.name, "the weight must be zero where the mask is False", f"{left} other entries there")


def assert_pattern(layer: Layer, target: Target, result: Compressed) -> None:
    """Promise 2, counted entry by entry."""
    if not target.sparsity:
        return
    if result.mask is None:
        raise Finding(layer.name, "a pruned layer must come with its mask", "None")
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
    """Promise 3: scale * (code - zero) / input scale in float32 is the weight at kept entries, and codes fit."""
    if target.bits is None:
        return
    quantised = result.quantised
    if quantised is None:
        raise Finding(layer.name, "a quantised layer must come with codes, scales and zeros", "None")
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
    demand((np.isfinite(scales) & (scales > 0)).all(), layer.name, "scales must be positive and finite", f"{low:g}")
    demand(np.isfinite(zeros).all(), layer.name, "zeros must be finite", "NaN or infinity")
    values = scales[:, group_of] * (codes.astype(np.float32) - zeros[:, group_of])
    if quantised.input_scale is not None:
        divisor = quantised.input_scale.numpy()
        positive = divisor.shape == (inputs,) and (np.isfinite(divisor) & (divisor > 0)).all()
        expected = f"input_scale must be [{inputs}], positive and finite"
        demand(positive, layer.name, expected, f"{divisor.shape} from {divisor.min():g} on")
        values = values / divisor
    kept = np.ones_like(codes, bool) if result.mask is None else result.mask.numpy()
    same = np.array_equal(values[kept], result.weight.numpy()[kept])
    wrong = 0 if same else int((values[kept] != result.weight.numpy()[kept]).sum())
    demand(same, layer.name, "scales * (codes - zeros) must equal the weight", f"{wrong} entries that differ")


def assert_untouched(name: str, layer: Layer, result: Compressed) -> None:
    """Of the layer of that name, which was compressed; the result is of no use afterwards."""
    before = layer_cases.tensors(layer_cases.build(name))
    for key, value in layer_cases.tensors(layer).items():
        demand(torch.equal(value, before[key]), name, f"the {key} given must stay as it is", f"a changed {key}")
    result.weight.add_(1.0)  # and the result is no view of the input
    shared = not torch.equal(layer.weight, before["weight"])
    demand(not shared, name, "the result must have memory of its own", "memory that it shares with the layer")


def assert_deterministic(case: Case, name: str) -> Compressed:
    """The same again whatever the global generators hold, which are left alone. Returns it; inputs stay, too."""
    first, second, layer = twice(case, name)
    assert_same(name, first, second)
    assert_untouched(name, layer, second)
    return first


def twice(case: Case, name: str) -> tuple[Compressed, Compressed, Layer]:
    """The results of two calls that find other global generators, and the layer of the second call."""
    results = []
    layer = layer_cases.build(name)
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = _generators()
        results.append(case.compress(layer := layer_cases.build(name)))
        for whose, state in _generators().items():
            demand(state == states[whose], name, f"{whose} global generator must be left alone", "another state of it")
    return *results, layer


def _generators() -> dict[str, object]:
    return {
        "torch's": torch.get_rng_state().tolist(),
        "numpy's": np.random.get_state(legacy=False)["state"]["key"].tolist(),
        "Python's": random.getstate(),
    }


def assert_same(name: str, first: Compressed, second: Compressed) -> None:
    """Promise 4: two results of the same inputs are the same to the last bit."""
    parts = [vars(result) | (vars(result.quantised) if result.quantised else {}) for result in (first, second)]
    for key in ("weight", "mask", "codes", "scales", "zeros", "group_of", "input_scale"):
        a, b = (part.get(key) for part in parts)
        same = b is None if a is None else b is not None and torch.equal(a, b)
        demand(same, name, f"two calls with the same inputs must give the same {key}", f"a {key} that differs")


def inputs_untouched(case: Case, name: str) -> None:
    assert_untouched(name, layer := layer_cases.build(name), case.compress(layer))


def tensors(case: Case, name: str) -> None:
    assert_tensors(layer := layer_cases.build(name), case.target, case.compress(layer))


def pattern(case: Case, name: str) -> None:
    assert_pattern(layer := layer_cases.build(name), case.target, case.compress(layer))


def ties(case: Case, name: str) -> None:
    """Promise 2: among equal weights of equal inputs the lower index goes first."""
    if case.entry.card.get("random"):
        raise NothingToCheck("its choice is random")
    layer = layer_cases.build(name)
    assert_pattern(layer, case.target, result := case.compress(layer))
    assert result.mask is not None  # or assert_pattern had raised
    length = {"row": 64, "layer": layer.weight.numel(), "n:m": (case.target.n_of_m or (0, 1))[1], "1xb": 64}
    for group in result.mask.reshape(-1, length[case.target.structure]).tolist():
        expected = "of equal entries the lower index must be pruned first"
        demand(group == sorted(group), name, expected, "a pruned entry after an equal one that is kept")


def grid(case: Case, name: str) -> None:
    assert_grid(layer := layer_cases.build(name), case.target, case.compress(layer))


def deterministic(case: Case, name: str) -> None:
    assert_deterministic(case, name)


# With powers of two where there are ties, else with any factor.
FACTORS = {"constant weights": (4.0, 2.0**-20), "correlated": (4.0, 2.0**-80, 2.0**40, 3.0, 1e-4, 77.7)}


def scale(case: Case, name: str) -> None:
    """Promise 5: the mask stays when W or G is multiplied by a positive number."""
    mask = case.compress(layer_cases.build(name)).mask
    for factor in FACTORS[name]:
        layer = layer_cases.build(name)
        for what, scaled in (
            ("W", replace(layer, weight=factor * layer.weight)),
            ("G", replace(layer, gram=Gram(factor * layer.gram.matrix, layer.gram.tokens))),
        ):
            came = case.compress(scaled).mask
            expected = f"the mask must stay when {what} is multiplied by {factor:g}"
            if mask is None or came is None:
                raise Finding(name, expected, "no mask")
            differing = int((came != mask).sum())
            demand(not differing, name, expected, f"{differing} other entries of the mask")


def rows_permute(case: Case, name: str) -> None:
    """Promise 5: a row's result does not depend on where it stands."""
    if case.entry.card.get("random"):
        raise NothingToCheck("its choice is random")
    layer = layer_cases.build(name)
    order = torch.randperm(len(layer.weight), generator=torch.Generator().manual_seed(3))
    result, permuted = case.compress(layer), case.compress(replace(layer, weight=layer.weight[order]))
    if result.mask is not None and permuted.mask is not None:
        differing = int((permuted.mask != result.mask[order]).sum())
        demand(not differing, name, "the mask must permute with the rows", f"{differing} other entries of the mask")
    try:
        torch.testing.assert_close(permuted.weight, result.weight[order], rtol=1e-5, atol=1e-6)
    except AssertionError as error:
        came = " ".join(str(error).split())
        raise Finding(name, "the weight must permute with the rows (to 1e-5)", came) from None


def hard_layers(case: Case, name: str) -> None:
    """Promise 6: promises 1 to 4 where a layer is degenerate."""
    result, second, given = twice(case, name)
    layer = layer_cases.build(name)
    assert_tensors(layer, case.target, result)  # first: NaN differ from themselves
    assert_pattern(layer, case.target, result)
    assert_grid(layer, case.target, result)
    assert_same(name, result, second)
    assert_untouched(name, given, second)


def unchanged(case: Case, name: str) -> None:
    """Promise 7, of every method, whatever its card lists."""
    layer = layer_cases.build(name)
    result = case.compress(layer)
    differing = -1 if result.weight.shape != layer.weight.shape else int((result.weight != layer.weight).sum())
    expected = "sparsity 0 without bits must return the weight as it is"
    demand(torch.equal(result.weight, layer.weight), name, expected, f"{differing} entries that differ")
    assert_untouched(name, layer, result)


def refused(case: Case, name: str) -> None:
    """Promise 8: one sentence that names the method and speaks of what the card's refusal speaks of."""
    refusal = case.entry.refusal(case.target) or ""
    try:
        case.compress(layer_cases.build(name))
    except UnsupportedTarget as error:
        sentence = str(error)
    else:
        raise Finding(name, f"compress must raise UnsupportedTarget, as the card says: {refusal}", "a result")
    one = sentence.endswith(".") and "\n" not in sentence
    demand(one, name, "the refusal must be one sentence that ends in a full stop", repr(sentence))
    demand(case.entry.name in sentence, name, "the refusal must name the method", repr(sentence))
    stems = [stem for stem in ("prune", "pruning", "quantise", "changes nothing") if stem in refusal]
    told = any(stem[:4] in sentence for stem in stems)
    demand(told, name, f"the refusal must say what the card says: {refusal}", repr(sentence))


@cache
def _baselines() -> dict[str, Method]:
    catalogue = Catalogue()
    return {name: catalogue.build(name, catalogue.complete(name, {}, "baseline")) for name in ("magnitude", "rtn")}


def no_worse_than_the_baseline(case: Case, name: str) -> None:
    """Promise 9: the smallest weights pruned, what is left rounded to nearest."""
    layer = layer_cases.build(name)
    baseline = layer.weight
    for method, needed, target in (
        ("magnitude", case.target.sparsity, replace(case.target, bits=None, group=None, symmetric=False)),
        ("rtn", case.target.bits, replace(case.target, sparsity=0.0, pattern="row")),
    ):
        if needed:
            built = _baselines()[method]
            baseline = built.compress(replace(layer, weight=baseline), target, torch.Generator()).weight
    ours, theirs = output_error(layer, case.compress(layer).weight), output_error(layer, baseline)
    demand(ours <= theirs, name, f"output_error must be {theirs:.4g} at most, the baseline's", f"{ours:.4g}")


def brute_force(case: Case, name: str) -> None:
    """Promise 9 for in <= 8: nothing beats the best of all masks, which the mask is where G is diagonal."""
    refit = case.entry.card["updates_weights"]
    layer = layer_cases.build(name)
    error = output_error(layer, case.compress(layer).weight)
    if name.endswith(UNCORRELATED):
        best = best_error(layer, case.target, False)
        expected = f"where G is diagonal output_error must be that of the best mask, {best:.6g}"
        demand(math.isclose(error, best, rel_tol=1e-6, abs_tol=1e-12), name, expected, f"{error:.6g}")
        return
    best = best_error(layer, case.target, refit)
    demand(error >= best * (1 - 1e-6), name, f"output_error must be {best:.6g} at least, the best possible", error)


def _small_layers(case: Case) -> list[str]:
    names = list(SMALL_WHOLE if case.target.structure == "layer" else SMALL_ROWS)
    exact = case.entry.card["needs"] == ["gram"] and not case.entry.card["updates_weights"]
    return [*names, f"{names[0]}{UNCORRELATED}"] if exact else names


def descent(case: Case, name: str) -> None:
    """Promise 9: the objective of the trace, which a method has whose card says what it measures, does not grow."""
    layer = layer_cases.build(name)
    result = case.compress(layer)
    came = "a trace" if result.trace else "none"
    expected = "a trace must come where the card has a criterion, and only there"
    demand(bool(result.trace) == bool(case.entry.criterion), name, expected, came)
    if (label := case.label.removesuffix(" in torch")) in NO_DESCENT:
        raise NothingToCheck(NO_DESCENT[label])
    if not result.trace:
        raise NothingToCheck("it returns no trace")
    iterations, _, objectives = zip(*result.trace, strict=True)
    if case.entry.criterion == "error":  # the best iterate is what is returned
        reached = _absolute_error(layer_cases.build(name), result)
        close = math.isclose(min(objectives), reached, rel_tol=1e-4, abs_tol=1e-12)
        expected = f"the least of the trace must be the result's error, {reached:.6g}"
        demand(close, name, expected, f"{min(objectives):.6g}")
    rising = list(iterations) == sorted(set(iterations))
    demand(rising, name, "the iterations of the trace must rise", iterations)
    for before, after in itertools.pairwise(objectives):
        falls = after <= before * (1 + 1e-6)
        demand(falls, name, "the objective of the trace must not grow", f"{after:.6g} after {before:.6g}")


def _absolute_error(layer: Layer, result: Compressed) -> float:
    lost = (layer.weight - result.weight).double()
    return float(((lost @ layer.gram.matrix.double()) * lost).sum())


def runner(case: Case, name: str) -> None:
    """What the runner verifies of every result of every run (docs/contract.md), as it verifies it."""
    card, entry = case.entry.card, case.entry
    solver = Solver(
        entry.name, case.method, case.target, 0, mask_only=not card["updates_weights"], criterion=entry.criterion
    )
    try:
        with dispatch.reference() if case.plain else contextlib.nullcontext():
            solver.solve(layer_cases.build(name))
    except InputError as error:
        raise Finding(name, "the runner must accept the result", f"its refusal ({str(error).rstrip('.')})") from error


def _words(value: object) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)


@dataclass(frozen=True)
class Check:
    """One promise, or a part of it: what it asks, on which layers, and the function that raises a Finding."""

    asks: str
    on: Callable[[Case, str], None]  # of the layer with that name
    layers: Callable[[Case], Iterable[str]]

    def __call__(self, case: Case) -> None:
        """On each of its layers; raises the first Finding, or NothingToCheck."""
        for name in self.layers(case):
            self.on(case, name)


def _named(*names: str) -> Callable[[Case], Iterable[str]]:
    return lambda case: names


CHECKS: dict[str, Check] = {
    "1 inputs untouched": Check(
        "Weight, Gram and statistics stay as they were given, and the result has memory of its own.",
        inputs_untouched,
        _named(*ORDINARY),
    ),
    "1 tensors": Check(
        "The weight keeps shape, float32 and device, is finite, and is zero where the mask is False.",
        tensors,
        _named(*ORDINARY),
    ),
    "2 pattern": Check("Exactly as many entries are pruned as the target says.", pattern, _named(*ORDINARY)),
    "2 ties": Check("Of equal entries the lower index is pruned first.", ties, _named(EQUAL)),
    "3 grid": Check("Codes fit their bits, and scales * (codes - zeros) is the weight.", grid, _named(*ORDINARY)),
    "4 deterministic": Check(
        "The same inputs and rng give the same result, and no global generator is used: draw from `rng`.",
        deterministic,
        _named(*ORDINARY),
    ),
    "5 scale": Check("Masks stay when W or G is multiplied by a positive number.", scale, _named(*FACTORS)),
    "5 rows permute": Check("A row's result does not depend on where it stands.", rows_permute, _named("correlated")),
    "6 hard layers": Check("Promises 1 to 4 hold on degenerate layers.", hard_layers, _named(*HARD)),
    "7 unchanged": Check("Sparsity 0 without bits returns the weight as it is.", unchanged, _named(*LAYERS)),
    "8 refused": Check(
        "A target that the card does not list raises UnsupportedTarget with one sentence.",
        refused,
        _named("correlated"),
    ),
    "9 no worse than the baseline": Check(
        "A method that needs the Gram does no worse than magnitude pruning and rounding to nearest.",
        no_worse_than_the_baseline,
        _named(*ORDINARY),
    ),
    "9 brute force": Check("No result of a small layer is better than the best mask's.", brute_force, _small_layers),
    "9 descent": Check("A trace comes where the card has a criterion, and falls.", descent, _named("correlated")),
    "10 the runner's own": Check(
        "What the runner verifies of every result of a run holds: trace, info, zeros, torch's settings.",
        runner,
        _named(*LAYERS),
    ),
}


Progress = Callable[[int, int, str], None]


def check_file(path: str | Path, *, quick: bool = False, progress: Progress | None = None) -> Report:
    """Every promise of the contract, checked on one method's file at every target.

    Targets that the card lists are checked on ordinary and degenerate layers; the others must be refused. Beside the
    defaults each value of a parameter that is an enum or a boolean is tried, one at a time.

    path: the file; methods beside it can be its warm starts. quick: the defaults alone, at one target of each kind.
    progress: called with (done, of, label) before each case.
    Raises InputError where the file is no method: it cannot be read or imported, or its card is wrong.
    """
    began = time.perf_counter()
    catalogue, entry = _loaded(Path(path))
    work = [(name, case) for case in _file_cases(catalogue, entry, quick) for name in _file_checks(case)]
    found = []
    for done, (name, case) in enumerate(work):
        if progress:
            progress(done, len(work), f"{case.label} at {case.target.label}: {name}")
        found += [_row(name, case, layer) for layer in CHECKS[name].layers(case)]
    if progress:
        progress(len(work), len(work), "")
    asks = {name: check.asks for name, check in CHECKS.items()}
    return Report(entry.name, str(path), tuple(found), asks, time.perf_counter() - began)


def case_at(path: str | Path, target: str, params: Mapping[str, Any] | None = None, plain: bool = False) -> Case:
    """A file's method with these parameters at the target of that label, one of the battery's; to repeat one check.

    Raises InputError where the file is no method, or the target or a parameter is not known.
    """
    catalogue, entry = _loaded(Path(path))
    known = {one.label: one for one in [*TARGETS, *_more_targets(entry)]}
    if target not in known:
        raise InputError(f"target must be one of {', '.join(known)}. Got {target!r} instead.")
    made = _construct(catalogue, entry, params or {}, [known[target]])
    return replace(next(made), plain=plain)


def _loaded(path: Path) -> tuple[Catalogue, Entry]:
    """The shipped methods with this file's, and the file's entry."""
    path = path.resolve()
    try:
        catalogue = Catalogue()
        if path.parent == METHODS and path.stem in catalogue:
            return catalogue, catalogue[path.stem]
        forget(path)  # it may have been edited since
        entry = catalogue.add(path)
    except CatalogueError as error:
        raise InputError(str(error)) from None
    if entry is None:
        raise InputError(f"{path} must hold a method, with a literal CARD. Got a file without one instead.")
    for other in sorted(path.parent.glob("*.py")):  # may be its warm starts; what is wrong with them is not asked here
        if other != path:
            with contextlib.suppress(CatalogueError):
                catalogue.add(other)
    return catalogue, entry


def _file_cases(catalogue: Catalogue, entry: Entry, quick: bool) -> Iterator[Case]:
    name = entry.name
    shipped = entry.path.parent == METHODS
    variants = [FEWER.get(name, {}), *PARAMETERS.get(name, [])] if shipped else [{}, *_card_values(entry)]
    targets = [*TARGETS, *_more_targets(entry)]
    if quick:
        variants = variants[:1]
        targets = [one for one in targets if one == Target() or one.label in ONE_OF_EACH or one not in TARGETS]
    for params in variants:
        yield from _construct(catalogue, entry, params, targets)


def _construct(
    catalogue: Catalogue, entry: Entry, params: Mapping[str, Any], targets: Sequence[Target]
) -> Iterator[Case]:
    """`cases_of` with what goes wrong in a sentence."""
    try:
        yield from cases_of(catalogue, entry.name, [params], targets)
    except CatalogueError as error:
        raise InputError(str(error)) from None
    except Exception as error:  # whatever a file does when it is imported or its class is made
        made = f" with {dict(params)}" if params else ""
        raise InputError(
            f"{entry.path} must make a {entry.class_name}{made}. Got {_told(error, entry.path)} instead."
        ) from error


def _card_values(entry: Entry) -> list[dict[str, Any]]:
    """Each value that the card lists for a parameter and that is not its default."""
    found = []
    for key, schema in entry.card["parameters"].items():
        values = schema.get("enum", [False, True] if schema.get("type") == "boolean" else [])
        found += [{key: value} for value in values if value != entry.defaults[key]]
    return found


def _more_targets(entry: Entry) -> list[Target]:
    """Targets that the card lists with widths that no target of the battery has."""
    usual = {target.bits for target in TARGETS}
    found = []
    for bits in entry.card["bits"]:
        if bits not in usual:
            found += [Target(bits=bits, group=16), Target(pattern="2:4", bits=bits)]
            found += [Target(0.5, pattern, bits=bits, group=16) for pattern in ("row", "layer", "1x16")]
    return [target for target in found if not entry.refusal(target)]


def _file_checks(case: Case) -> list[str]:
    names = checks_of(case)
    return names if case.entry.refusal(case.target) else [*names, "10 the runner's own"]


def _row(name: str, case: Case, layer: str) -> Row:
    """A check of a case on one layer. Whatever the method raises is a broken promise."""
    row = Row(name, case.target.label, layer, case.label, dict(case.params), case.plain, KEPT)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        CHECKS[name].on(case, layer)
        return row
    except NothingToCheck as reason:
        return replace(row, status=NOTHING, sentence=f"Nothing to check: {reason}.")
    except Finding as finding:
        row = replace(row, status=BROKEN, expected=finding.expected, came=finding.came)
    except Exception as error:
        came = _told(error, case.entry.path)
        row = replace(row, status=BROKEN, expected="compress must return a result", came=came)
    finally:  # the caller's, which checks of promise 4 seed
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
    if known := KNOWN_FAILURES.get((name, case.label, case.target.label)):
        return replace(row, status=KNOWN, sentence=f"Known: {known}.")
    if (
        layer.endswith(UNCORRELATED) and case.entry.path.parent != METHODS
    ):  # a score may measure something else, as RIA's
        row = replace(row, status=NOTE)
    return replace(row, sentence=f"{layer}: {row.expected}. Got {row.came} instead.")


def _told(error: Exception, path: Path) -> str:
    """An error's kind, words and the line of the file that it comes from."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path
    ]
    at = f" in line {lines[-1]} of {path.name}" if lines else ""
    return f"{type(error).__name__}{at} ({' '.join(str(error).split())})"
