"""What `make benchmark` times: one list of cases, each a method at a target beside its published loop and its floor.

baseline: a plain torch implementation of the published loop. floor: the matrix products and factorisations, or the one
reading and writing of the weight, that the method cannot do without. bench_suite.py runs the list, summary.py lays out
what came of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Gram, Layer, Method, Statistics, Target
from layerwise.methods.admm import ADMM
from layerwise.methods.alps import ALPS
from layerwise.methods.awp import AWP
from layerwise.methods.awq import AWQ
from layerwise.methods.chain import Chain
from layerwise.methods.code_swaps import CodeSwaps
from layerwise.methods.dsnot import DSnoT
from layerwise.methods.frank_wolfe import FrankWolfe
from layerwise.methods.gptq import GPTQ
from layerwise.methods.gqsa import GQSA
from layerwise.methods.magnitude import Magnitude
from layerwise.methods.quantease import QuantEase
from layerwise.methods.random import Random
from layerwise.methods.reconstruct import Reconstruct
from layerwise.methods.ria import RIA
from layerwise.methods.rtn import RTN
from layerwise.methods.sparse_swaps import SparseSwaps
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.methods.thanos import Thanos
from layerwise.methods.wanda import Wanda
from tests.benchmarks import bench_codes as codes
from tests.benchmarks import bench_columns as columns
from tests.benchmarks import bench_iterative as iterative
from tests.benchmarks import bench_swaps as swaps
from tests.benchmarks import companions

SIZES = ((512, 512), (1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096))  # out x in
SIDES, FIXED = (512, 1024, 2048), 1024  # of the layers by which seconds grow with `in` and with `out`
BUDGET = 60  # seconds on two cores that one round of a case may take; `largest` and `baseline_largest` follow from it
ROUNDS = {512: 5, 1024: 3}  # by `out` up to that; up to 4096 as many as the case says, above that one

STEPS = 5  # of Frank-Wolfe and AWP, which take hundreds that all cost the same
PENALTIES = 8  # iterations of ADMM; ALPS
PATH = 12
PUBLISHED = 2000  # Frank-Wolfe's steps
TRIED = 40  # swaps per row of brute force at most, of swaps.SWAPS
# Methods without a case, and why.
UNTIMED = {
    "dense": "returns the weight as it is",
    "gptaq": "gptq's sweep with a second product per column, after two of a Gram's size",
    "foem": "as gptaq",
    "qronos": "gptq, after two triangular solutions in float64",
    "rotated": "its quantiser, after two Hadamard transforms of the Gram",
    "turboquant": "looks each weight up once, and sees no Gram",
    "svd": "one singular value decomposition of the library",
    "asvd": "as svd",
    "fwsvd": "as svd",
    "svd_llm": "one eigenvalue decomposition of the library, between products in float64",
    "eora": "its first method, then svd_llm of the error",
    "lplr": "its first method, then least-squares solutions for thin factors, in float64",
    "slim": "its first method, then svd of the error",
    "oats": "80 singular value decompositions of the library",
    "rocket": "svd_llm, a sort, and a least-squares solution per column",
    "unfolded": "awp's products, of a sample of rows most of them; bench_learned_steps has its seconds",
    "three_basil": "alps, with an eigenvalue decomposition of the library in each iteration",
}


@lru_cache(2)
def tokens(inputs: int) -> tuple[Gram, Statistics]:
    """Gram and statistics of 2 * inputs made-up tokens in 8 sequences, like those of linear layers in language models.

    The k-th of `inputs` random directions has variance 1 / k, so that the spectrum falls by a power; one part in eleven
    of the variance is white. Inputs have scales of their own (log-normal, sigma 0.5) and means of 0.2 standard
    deviations; one in 512, at least one, is an outlier 20 times as large.
    """
    rng = torch.Generator().manual_seed(0)
    length = inputs // 4
    decay = (torch.arange(1, inputs + 1) / inputs) ** -0.5
    mixing = decay[:, None] * torch.randn(inputs, inputs, generator=rng) / decay.square().sum().sqrt()
    x = torch.randn(8 * length, inputs, generator=rng) @ mixing
    x += 0.1**0.5 * torch.randn(x.shape, generator=rng) + 0.2 * torch.randn(inputs, generator=rng)
    x *= torch.exp(0.5 * torch.randn(inputs, generator=rng))
    x[:, torch.randperm(inputs, generator=rng)[: max(inputs // 512, 1)]] *= 20
    variance = x.view(8, length, inputs).var(1, correction=0).mean(0)
    statistics = Statistics(length, x.mean(0), x.abs().mean(0), variance, x[:: max(len(x) // 512, 1)][:512].clone())
    return Gram(x.T @ x / len(x), len(x)), statistics


@lru_cache(2)
def layer_of(out: int, inputs: int) -> Layer:
    """Normal weights with some rows larger than others."""
    rng = torch.Generator().manual_seed(1)
    weight = 0.02 * torch.randn(out, inputs, generator=rng) * torch.exp(0.3 * torch.randn(out, 1, generator=rng))
    return Layer(f"{out} x {inputs}", weight, *tokens(inputs))


def first_rows(layer: Layer, rows: int | None) -> Layer:
    return replace(layer, weight=layer.weight[:rows].clone()) if rows else layer


def one(*_: object) -> float:
    return 1.0


@dataclass(frozen=True)
class Case:
    """A row of the table.

    built: the method as it is timed, each time with nothing kept on the layer's Gram. floor, baseline: callables of the
    layer; None where nothing is published. note: what is timed where it is not the whole run, and how it is scaled.
    rows: how many of the layer's are timed where all are alike; few: how many by the baseline; scale: what, given both
    results, the baseline's seconds are multiplied by. largest, baseline_largest: side of a layer above which
    one round would take more than BUDGET seconds.
    """

    method: str
    label: str
    built: Method
    target: Target
    floor: Callable[[Layer], object]
    baseline: Callable[[Layer], Tensor | Compressed] | None = None
    note: str = ""
    rounds: int = 1
    rows: int | None = None
    few: int | None = None
    scale: Callable[[Compressed, Any], float] = one
    largest: int = 11008
    baseline_largest: int = 11008

    def rounds_at(self, out: int) -> int:
        return next((rounds for side, rounds in ROUNDS.items() if out <= side), self.rounds if out <= 4096 else 1)

    def left_out(self, out: int, inputs: int) -> str | None:
        """Why a layer of that shape is not timed, or None."""
        if max(out, inputs) > self.largest:
            return f"a round takes more than {BUDGET} s"
        if self.rows and out not in (inputs, FIXED):
            return f"{self.rows} of its rows are timed, however many it has"
        return None

    @property
    def name(self) -> str:
        return f"{self.method} {self.label}"

    def compress(self, layer: Layer) -> Compressed:
        afresh = replace(layer, gram=Gram(layer.gram.matrix, layer.gram.tokens))
        return self.built.compress(afresh, self.target, torch.Generator().manual_seed(0))


def relaxed(layer: Layer, target: Target, steps: int) -> Tensor:
    """Weight [out, in] of the mask after so many published Frank-Wolfe steps, rounded."""
    mask = iterative.baseline_frank_wolfe(layer, target, steps)
    compared, kept = iterative.lines(mask, target)
    chosen = torch.zeros_like(compared).scatter_(-1, compared.topk(kept, dim=-1).indices, 1.0)
    return layer.weight * chosen.view_as(mask)


def brute_force(layer: Layer, target: Target) -> Compressed:
    """Up to TRIED swaps in each row, of all pairs the best."""
    with mock.patch.object(swaps, "SWAPS", TRIED):
        return swaps.baseline_swaps(layer, target)


def one_after_the_other(layer: Layer, prune: Target, grid: Target) -> Tensor:
    weight = columns.baseline_wanda(layer, prune)
    rounded = columns.baseline_rtn(replace(layer, weight=weight), grid)
    return torch.where(weight == 0, 0.0, rounded)


def products(layer: Layer, count: int) -> None:
    for _ in range(count):
        iterative.floor_product(layer)


def copies(layer: Layer, count: int) -> None:
    for _ in range(count):
        columns.floor_copy(layer)


def of(call: Callable, *arguments: object, **named: object) -> Callable[[Layer], Any]:
    """call(layer, *arguments)."""
    return lambda layer: call(layer, *arguments, **named)


def shapes(sizes: str) -> dict[tuple[int, int], bool]:
    """(out, in) of sizes given as sides or OUTxIN, all when empty, and whether baselines are timed.

    They are not in the layers that grow in one direction alone, of those SIDES that are among the sizes.
    """
    parts = [size.partition("x") for size in sizes.split()]
    asked = [(int(out), int(inputs or out)) for out, _, inputs in parts] or list(SIZES)
    sides = [side for side in SIDES if (side, side) in asked]
    grown = [shape for side in sides for shape in ((FIXED, side), (side, FIXED))] if len(sides) > 1 else []
    both = dict.fromkeys(grown, False) | dict.fromkeys(asked, True)
    return {shape: both[shape] for shape in sorted(both, key=lambda shape: shape[::-1])}


def listed() -> list[Case]:
    row, row60, whole, pairs = Target(0.5), Target(0.6), Target(0.5, "layer"), Target(pattern="2:4")
    grid, blocks = Target(bits=4, group=128), Target(0.5, "1x16", bits=4, group=16)
    sparse_grid = Target(pattern="2:4", bits=4, group=128)
    copy = columns.floor_copy
    found = [
        Case("random", "50% row", Random(), row, copy, rounds=3),
        Case("magnitude", "50% layer", Magnitude(), whole, copy, of(columns.baseline_magnitude, whole), rounds=3),
        Case("wanda", "50% row", Wanda(), row, copy, of(columns.baseline_wanda, row), rounds=3),
        Case("wanda", "2:4", Wanda(), pairs, copy, of(columns.baseline_wanda, pairs), rounds=3),
        Case("ria", "50% layer", RIA(), whole, copy, of(companions.baseline_ria, whole)),
        Case("dsnot", "50% row", DSnoT(Wanda()), row, copy, of(companions.baseline_dsnot, row)),
    ]
    for target, label in ((row60, "60% row"), (pairs, "2:4")):
        n_of_m = target.n_of_m is not None
        found += [
            Case(
                "sparse_swaps",
                f"{label}, 100 swaps",
                SparseSwaps(Wanda(), swaps.SWAPS),
                target,
                of(swaps.floor_swaps, target),
                None if n_of_m else of(brute_force, target),
                "" if n_of_m else f"brute force: up to {TRIED} swaps in each of 4 rows, scaled to the number of swaps",
                few=4,
                scale=lambda result, tried: result.info["swaps"] / tried.info["swaps"],
                baseline_largest=4096,
            ),
            Case(
                "frank_wolfe",
                f"{label}, published",
                FrankWolfe(Wanda(), iterative.KEEP, STEPS),
                target,
                of(products, STEPS + 1),
                of(relaxed, target, STEPS),
                f"{STEPS} steps",
            ),
            Case(
                "frank_wolfe",
                f"{label}, pairwise",
                iterative.EXCHANGES,
                target,
                of(products, 1),
                of(relaxed, target, STEPS),
                f"to a duality gap of 1e-4; published: {STEPS} of {PUBLISHED} steps, scaled",
                scale=lambda *_: PUBLISHED / STEPS,
                largest=4096,
            ),
            Case(
                "awp",
                label,
                AWP(Wanda(), iterations=STEPS, tolerance=0.0),
                target,
                of(products, STEPS + 1),
                of(iterative.baseline_awp, target, STEPS),
                f"{STEPS} iterations",
            ),
        ]
    for target, label in ((row, "50% row"), (whole, "50% layer"), (pairs, "2:4")):
        baseline = of(columns.baseline_sparsegpt, target)
        found.append(Case("sparsegpt", label, SparseGPT(), target, columns.floor_columns, baseline, rounds=3))
    found += [
        Case(
            "admm",
            "50% layer",
            ADMM(iterations=PENALTIES, refresh=3 * PENALTIES // 4),
            whole,
            of(companions.floor_admm, PENALTIES),
            of(companions.baseline_admm, whole, PENALTIES),
            f"{PENALTIES} iterations",
            largest=4096,
        ),
        Case(
            "alps",
            "50% layer",
            ALPS(iterations=PATH),
            whole,
            of(companions.floor_alps, PATH),
            of(companions.baseline_alps, whole, PATH),
            f"{PATH} iterations",
            largest=2048,
        ),
        Case(
            "reconstruct",
            "50% row",
            Reconstruct(Wanda()),
            row,
            of(companions.floor_reconstruct, row),
            of(companions.baseline_reconstruct, row),
            "64 rows",
            rows=64,
        ),
        Case(
            "thanos",
            "50% layer",
            Thanos(companions.THANOS_BLOCK),
            whole,
            of(companions.floor_thanos, whole),
            of(companions.baseline_thanos, whole),
            "64 rows",
            rows=64,
        ),
        Case("rtn", "4 bits g128", RTN(), grid, copy, of(columns.baseline_rtn, grid), rounds=3),
        Case("gptq", "4 bits g128", GPTQ(), grid, columns.floor_columns, of(columns.baseline_gptq, grid), rounds=3),
        Case(
            "code_swaps",
            "4 bits g128 from gptq",
            CodeSwaps(GPTQ()),
            grid,
            codes.floor_swaps,
            of(codes.baseline_swaps, grid),
            "brute force: on 4 rows, scaled to the number of changes and pairs",
            few=4,
            scale=lambda result, tried: codes.made(result) / codes.made(tried),
            largest=2048,
            baseline_largest=1024,
        ),
        Case(
            "quantease",
            "4 bits g128",
            QuantEase(codes.PASSES),
            grid,
            codes.floor_quantease,
            of(codes.baseline_quantease, grid),
            f"{codes.PASSES} passes",
            largest=4096,
            baseline_largest=2048,
        ),
        Case(
            "awq",
            "4 bits g128",
            AWQ(),
            grid,
            of(companions.floor_awq, grid),
            of(companions.baseline_awq, grid),
            f"released loops on {companions.BATCH} rows, scaled",
            few=companions.BATCH,
            scale=lambda result, tried: len(result.weight) / len(tried),
            largest=4096,
        ),
        Case(
            "gqsa",
            "4 bits 50% 1x16",
            GQSA(),
            blocks,
            columns.floor_factorisation,
            of(companions.baseline_gqsa, blocks),
        ),
        Case(
            "chain",
            "wanda 2:4, rtn 4 bits",
            Chain((Wanda(), RTN())),
            sparse_grid,
            of(copies, 2),
            of(one_after_the_other, pairs, grid),
            rounds=3,
        ),
    ]
    return found


CASES = {case.name: case for case in listed()}
