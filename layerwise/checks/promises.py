"""Promises 1 to 9 of the layer contract (docs/contract.md) as checks for any method and target.

A check looks at a Case on one layer and raises a Finding if the promise is broken. It does its own counting, without
compression/verify.py. Only the last check, "10 the runner's own", calls the runner.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from layerwise.checks import layer_cases, settings
from layerwise.checks.brute_force import best_error, best_error_of_rank, output_error
from layerwise.checks.case import Case, Finding, NothingToCheck, cases, demand
from layerwise.checks.layer_cases import DRIFTED, EQUAL, HARD, LAYERS, ORDINARY, SMALL_ROWS, SMALL_WHOLE, UNCORRELATED
from layerwise.checks.results import (
    assert_deterministic,
    assert_grid,
    assert_pattern,
    assert_same,
    assert_tensors,
    assert_untouched,
    twice,
)
from layerwise.compression.solver import Solver
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Gram, Layer, Method, Target, UnsupportedTarget
from layerwise.contract.target import LOW_RANK
from layerwise.numerics import dispatch
from layerwise.runtime.errors import InputError


def inputs_untouched(case: Case, name: str) -> None:
    assert_untouched(name, layer := layer_cases.build(name), case.compress(layer))


def tensors(case: Case, name: str) -> None:
    assert_tensors(layer := layer_cases.build(name), case.target, case.compress(layer))


def pattern(case: Case, name: str) -> None:
    assert_pattern(layer := layer_cases.build(name), case.target, case.compress(layer))


def ties(case: Case, name: str) -> None:
    """Promise 2: among equal weights with equal inputs the lower index is pruned first."""
    if case.entry.card.get("random"):
        raise NothingToCheck("its choice is random")
    layer = layer_cases.build(name)
    assert_pattern(layer, case.target, result := case.compress(layer))
    assert result.mask is not None  # otherwise assert_pattern would have raised
    length = {"row": 64, "layer": layer.weight.numel(), "n:m": (case.target.n_of_m or (0, 1))[1], "1xb": 64}
    for group in result.mask.reshape(-1, length[case.target.structure]).tolist():
        expected = "among equal entries the lower index must be pruned first"
        demand(group == sorted(group), name, expected, "a pruned entry with a higher index than an equal kept one")


def grid(case: Case, name: str) -> None:
    assert_grid(layer := layer_cases.build(name), case.target, case.compress(layer))


def deterministic(case: Case, name: str) -> None:
    assert_deterministic(case, name)


# Powers of two for a layer with ties, otherwise any factor.
FACTORS = {"constant weights": (4.0, 2.0**-20), "correlated": (4.0, 2.0**-80, 2.0**40, 3.0, 1e-4, 77.7)}


def scale(case: Case, name: str) -> None:
    """Promise 5: the mask does not change when W or G is multiplied by a positive number."""
    mask = case.compress(layer_cases.build(name)).mask
    for factor in FACTORS[name]:
        layer = layer_cases.build(name)
        for what, scaled in (
            ("W", replace(layer, weight=factor * layer.weight)),
            ("G", replace(layer, gram=Gram(factor * layer.gram.matrix, layer.gram.tokens))),
        ):
            came = case.compress(scaled).mask
            expected = f"the mask must not change when {what} is multiplied by {factor:g}"
            if mask is None or came is None:
                raise Finding(name, expected, "no mask")
            differing = int((came != mask).sum())
            demand(not differing, name, expected, f"{differing} changed entries of the mask")


def rows_permute(case: Case, name: str) -> None:
    """Promise 5: a row's result does not depend on its position."""
    if case.entry.card.get("random"):
        raise NothingToCheck("its choice is random")
    layer = layer_cases.build(name)
    order = torch.randperm(len(layer.weight), generator=torch.Generator().manual_seed(3))
    fisher = None if layer.fisher is None else layer.fisher[order]
    result, permuted = case.compress(layer), case.compress(replace(layer, weight=layer.weight[order], fisher=fisher))
    if result.mask is not None and permuted.mask is not None:
        differing = int((permuted.mask != result.mask[order]).sum())
        demand(not differing, name, "the mask must permute with the rows", f"{differing} changed entries of the mask")
    try:
        torch.testing.assert_close(permuted.weight, result.weight[order], rtol=1e-5, atol=1e-6)
    except AssertionError as error:
        came = " ".join(str(error).split())
        raise Finding(name, "the weight must permute with the rows (to 1e-5)", came) from None


def hard_layers(case: Case, name: str) -> None:
    """Promise 6: promises 1 to 4 on degenerate layers."""
    result, second, given = twice(case, name)
    layer = layer_cases.build(name)
    assert_tensors(layer, case.target, result)  # checked first, because NaN differs from itself
    assert_pattern(layer, case.target, result)
    assert_grid(layer, case.target, result)
    assert_same(name, result, second)
    assert_untouched(name, given, second)


def unchanged(case: Case, name: str) -> None:
    """Promise 7, for every method and every card."""
    layer = layer_cases.build(name)
    result = case.compress(layer)
    differing = -1 if result.weight.shape != layer.weight.shape else int((result.weight != layer.weight).sum())
    expected = "sparsity 0 without bits must return the weight unchanged"
    demand(torch.equal(result.weight, layer.weight), name, expected, f"{differing} entries that differ")
    assert_untouched(name, layer, result)


def refused(case: Case, name: str) -> None:
    """Promise 8: one sentence that names the method and gives the reason that the card's refusal gives."""
    refusal = case.refusal or ""
    try:
        case.compress(layer_cases.build(name))
    except UnsupportedTarget as error:
        sentence = str(error)
    else:
        raise Finding(name, f"compress must raise UnsupportedTarget, as the card says: {refusal}", "a result")
    one = sentence.endswith(".") and "\n" not in sentence
    demand(one, name, "the refusal must be one sentence that ends in a full stop", repr(sentence))
    demand(case.entry.name in sentence, name, "the refusal must name the method", repr(sentence))
    stems = [stem for stem in ("prune", "pruning", "quantise", "low-rank", "changes nothing") if stem in refusal]
    told = any(stem[:4] in sentence for stem in stems)
    demand(told, name, f"the refusal must say what the card says: {refusal}", repr(sentence))


@cache
def _baselines() -> dict[str, Method]:
    catalogue = Catalogue()
    return {name: catalogue.build(name, catalogue.complete(name, {}, "baseline")) for name in ("magnitude", "rtn")}


def no_worse_than_the_baseline(case: Case, name: str) -> None:
    """Promise 9: compare with pruning the smallest weights and rounding the rest to nearest, or with the truncated
    SVD."""
    layer = layer_cases.build(name)
    baseline = layer.weight
    if case.target.structure == LOW_RANK:
        u, sizes, v = torch.linalg.svd(baseline.double(), full_matrices=False)
        rank = case.target.rank_of(*baseline.shape)
        baseline = u[:, :rank] * sizes[:rank] @ v[:rank]
    for method, needed, target in (
        ("magnitude", case.target.sparsity, case.target.pruning),
        ("rtn", case.target.bits, case.target.grid),
    ):
        if needed:
            built = _baselines()[method]
            baseline = built.compress(replace(layer, weight=baseline), target, torch.Generator()).weight
    ours, theirs = output_error(layer, case.compress(layer).weight), output_error(layer, baseline)
    demand(ours <= theirs, name, f"output_error must be at most {theirs:.4g}, the baseline's", f"{ours:.4g}")


def best_of_rank(case: Case, name: str) -> None:
    """Promise 9: no result of a given rank is better than the best one, which is known exactly."""
    layer = layer_cases.build(name)
    error, rank = output_error(layer, case.compress(layer).weight), case.target.rank_of(*layer.weight.shape)
    best = best_error_of_rank(layer, rank)
    demand(
        error >= best * (1 - 1e-6), name, f"output_error must be at least {best:.6g}, the best of rank {rank}", error
    )


def brute_force(case: Case, name: str) -> None:
    """Promise 9 for in <= 8: no mask beats the best of all masks, and if G is diagonal, the mask is the best one."""
    refit = case.entry.card["updates_weights"]
    layer = layer_cases.build(name)
    error = output_error(layer, case.compress(layer).weight)
    if name.endswith(UNCORRELATED):
        best = best_error(layer, case.target, False)
        expected = f"output_error must be that of the best mask, {best:.6g}, if G is diagonal"
        demand(math.isclose(error, best, rel_tol=1e-6, abs_tol=1e-12), name, expected, f"{error:.6g}")
        return
    best = best_error(layer, case.target, refit)
    demand(error >= best * (1 - 1e-6), name, f"output_error must be at least {best:.6g}, the best possible", error)


def _small_layers(case: Case) -> list[str]:
    names = list(SMALL_WHOLE if case.target.structure == "layer" else SMALL_ROWS)
    exact = case.entry.card["needs"] == ["gram"] and not case.entry.card["updates_weights"]
    return [*names, f"{names[0]}{UNCORRELATED}"] if exact else names


def descent(case: Case, name: str) -> None:
    """Promise 9: the objective of the trace does not grow. A method has a trace if its card says what it measures."""
    layer = layer_cases.build(name)
    result = case.compress(layer)
    came = "a trace" if result.trace else "none"
    expected = "there must be a trace if, and only if, the card has a criterion"
    demand(bool(result.trace) == bool(case.entry.criterion), name, expected, came)
    if reason := settings.no_descent(case.entry, case.params):
        raise NothingToCheck(reason)
    if not result.trace:
        raise NothingToCheck("it returns no trace")
    iterations, _, objectives = zip(*result.trace, strict=True)
    if case.entry.criterion == "error":  # the best iterate is returned
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
    """The verification that the runner applies to every result (docs/contract.md)."""
    card, entry = case.entry.card, case.entry
    solver = Solver(
        entry.name, case.method, case.target, 0, mask_only=not card["updates_weights"], criterion=entry.criterion
    )
    try:
        with dispatch.reference() if case.plain else contextlib.nullcontext():
            solver.solve(layer_cases.build(name))
    except InputError as error:
        raise Finding(name, "the runner must accept the result", f"its refusal ({str(error).rstrip('.')})") from error


@dataclass(frozen=True)
class Check:
    """One promise, or a part of it: its demand, its layers, and the function that raises a Finding."""

    asks: str
    on: Callable[[Case, str], None]  # arguments: the case and the layer's name
    layers: Callable[[Case], Iterable[str]]

    def __call__(self, case: Case) -> None:
        """Run the check on each of its layers; raises the first Finding, or NothingToCheck."""
        for name in self.layers(case):
            self.on(case, name)


def _named(*names: str) -> Callable[[Case], Iterable[str]]:
    return lambda case: names


def _drifted(*names: str) -> Callable[[Case], Iterable[str]]:
    """These layers and, for a method that needs the cross-Gram, the layers with drifted inputs."""
    return lambda case: [*names, *DRIFTED] if "cross_gram" in case.entry.card["needs"] else names


CHECKS: dict[str, Check] = {
    "1 inputs untouched": Check(
        "Weight, Gram and statistics are left unchanged, and the result has memory of its own.",
        inputs_untouched,
        _drifted(*ORDINARY),
    ),
    "1 tensors": Check(
        "The weight keeps shape, float32 and device, is finite, and is zero where the mask is False.",
        tensors,
        _drifted(*ORDINARY),
    ),
    "2 pattern": Check("Exactly as many entries are pruned as the target says.", pattern, _named(*ORDINARY)),
    "2 ties": Check("Among equal entries the lower index is pruned first.", ties, _named(EQUAL)),
    "3 grid": Check("Codes fit their bits, and scales * (codes - zeros) is the weight.", grid, _drifted(*ORDINARY)),
    "4 deterministic": Check(
        "The same inputs and rng give the same result, and no global generator is used: draw from `rng`.",
        deterministic,
        _drifted(*ORDINARY),
    ),
    "5 scale": Check(
        "The mask does not change when W or G is multiplied by a positive number.", scale, _named(*FACTORS)
    ),
    "5 rows permute": Check("A row's result does not depend on its position.", rows_permute, _named("correlated")),
    "6 hard layers": Check("Promises 1 to 4 hold on degenerate layers.", hard_layers, _drifted(*HARD)),
    "7 unchanged": Check("Sparsity 0 without bits returns the weight unchanged.", unchanged, _named(*LAYERS)),
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
    "9 best of a rank": Check("No result of a rank is better than the best one.", best_of_rank, _named(*ORDINARY)),
    "9 descent": Check(
        "There is a trace if the card has a criterion, and it does not rise.", descent, _named("correlated")
    ),
    "10 the runner's own": Check(
        "The runner's verification of every result passes: trace, info, zeros, torch's settings.",
        runner,
        _drifted(*LAYERS),
    ),
}


def checks_of(case: Case) -> list[str]:
    """Names of the checks that apply to the case, except the runner's own."""
    target = case.target
    if target == Target():
        return ["7 unchanged"]
    if case.refusal:
        return ["8 refused"]
    names = ["1 inputs untouched", "1 tensors", "4 deterministic", "6 hard layers"]
    names += ["2 pattern", "5 scale"] if target.sparsity else []
    names += ["2 ties"] if target.sparsity and not case.entry.card["updates_weights"] else []
    names += ["5 rows permute"] if target.structure != "layer" else []  # for "layer", rows compete with each other
    names += ["3 grid"] if target.bits else []
    names += ["9 brute force"] if not target.bits and not target.block and not target.rank else []
    # a sparse factor may have a higher rank
    alone = target.structure == LOW_RANK and not case.entry.card.get("sparse_factor")
    names += ["9 best of a rank"] if alone else []
    names += ["9 no worse than the baseline"] if "gram" in case.entry.card["needs"] and not case.entry.control else []
    return [*names, "9 descent"]


def rows(catalogue: Catalogue) -> Iterator[tuple[str, Case]]:
    """(check, case) pairs for the checks that apply to each case."""
    for case in cases(catalogue):
        for name in checks_of(case):
            yield name, case
