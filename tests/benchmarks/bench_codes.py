"""Methods that set codes one by one: QuantEase beside its published loop, code swaps beside brute force.

`python -m tests.benchmarks.bench_codes [inputs] [rows of the slow ones]` times what is compared in one run.
"""

from __future__ import annotations

import sys
import time
from unittest import mock

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Target
from layerwise.methods.code_swaps import CodeSwaps
from layerwise.methods.gptq import GPTQ
from layerwise.numerics import code_search, dispatch, ops
from tests.benchmarks.bench_swaps import BruteForce, layer_of
from tests.support.typing_helpers import some

PASSES = 3  # of QuantEase's 30, which all cost about the same


def baseline_quantease(layer: Layer, target: Target, passes: int = PASSES) -> Tensor:
    """Weight [out, in] after so many passes as they are published: a product with a column of the Gram for each."""
    weight, gram = layer.weight, layer.gram.matrix
    grid, group_of = ops.fit_grid(weight, target), ops.groups_of(weight.shape[1], target.group)
    ratios = (gram / gram.diagonal()).fill_diagonal_(0.0)
    values = weight.clone()
    for number in range(passes):
        for j in range(len(gram)):
            best, group = weight[:, j] + (weight - values) @ ratios[:, j], group_of[j : j + 1]
            if number % 3 != 1 or number == passes - 1:
                best = grid.values(grid.codes(best[:, None], group), group)[:, 0]
            values[:, j] = best
    return values


def floor_quantease(layer: Layer, passes: int = PASSES) -> None:
    """One product of the weight and the Gram for each pass."""
    for _ in range(passes):
        torch.mm(layer.weight, layer.gram.matrix)


def swapped(layer: Layer, target: Target, most_changes: int | None = None) -> Compressed:
    return CodeSwaps(GPTQ(), max_changes=most_changes).compress(layer, target, torch.Generator())


def baseline_swaps(layer: Layer, target: Target, most_changes: int | None = None) -> Compressed:
    """The changes in batched torch; of two codes every pair of moves is tried."""
    with mock.patch.object(code_search, "MoveSearch", lambda tiled, gram: BruteForce(tiled)), dispatch.reference():
        return swapped(layer, target, most_changes)


def made(result: Compressed) -> int:
    """The changes of one code and of two that led to a result; looking for a pair is what takes the time."""
    return result.info["changes"] + result.info["pairs"]


def floor_swaps(layer: Layer) -> Tensor:
    """The product that the method needs: E G of the start, in float64."""
    return layer.weight.double() @ layer.gram.matrix.double()


def main(size: int = 2048, rows: int = 64, slow_rows: int = 2) -> None:
    """Seconds of a change, start left out: of the compiled loop, and of brute force on the first few of the rows."""
    target, seconds, codes = Target(bits=3, group=128), [], []
    for run, count in ((swapped, rows), (baseline_swaps, slow_rows)):
        layer = layer_of(size, count)
        run(layer, target, 0)
        begin = time.perf_counter()
        result = run(layer, target)
        ended = time.perf_counter()
        run(layer, target, 0)
        spent = (ended - begin) - (time.perf_counter() - ended)
        seconds.append(spent / made(result))
        codes.append(some(result.quantised).codes[:slow_rows])
        print(f"{run.__name__}, {count} rows: {spent / made(result) * 1e6:.1f} us a change, {result.info}", flush=True)
    assert torch.equal(*codes)
    print(f"{size} inputs: brute force takes {seconds[1] / seconds[0]:.0f} times as long a change")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
