"""SparseSwaps against brute force over all pairs of a row, in batches, and against the plain bounded search in torch.

`python -m tests.benchmarks.bench_swaps [inputs] [rows of the slow ones]` times all in one run. Rows do not see each
other and each swap of a path takes about as long as the next, so that the slow ones run on a few rows of the layer,
whose masks must be the fast one's, and are compared by the time of a swap.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from layerwise.checks import layer_cases as layers
from layerwise.checks.layer_cases import Recipe
from layerwise.contract.layer import Compressed, Layer, Target
from layerwise.kernels import swap_search as kernel
from layerwise.methods.sparse_swaps import SparseSwaps
from layerwise.methods.wanda import Wanda
from layerwise.numerics import ops, swap_search
from tests.support.typing_helpers import mask_of

TARGETS = [Target(0.5), Target(0.6), Target(pattern="2:4")]
SIZES = [512, 1024, 2048, 4096]
SWAPS = 100


class BruteForce:
    """The change of every pair, a few rows at a time: what a batched implementation without bounds computes."""

    def __init__(self, gram: Tensor, length: int | None = None) -> None:
        group = torch.arange(len(gram)) // (length or len(gram))
        self.gram, self.elsewhere = gram, torch.where(group[:, None] == group, 0.0, torch.inf) if length else None

    def __call__(self, cost: Tensor, gain: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        inputs, found = len(self.gram), []
        for c, g, w in zip(*(x.split(4) for x in (cost, gain, weight)), strict=True):
            change = self.gram * w[:, None]  # [rows, in, in]
            change.mul_(-2 * w[:, :, None]).add_(g[:, None]).add_(c[:, :, None])
            if self.elsewhere is not None:
                change.add_(self.elsewhere)
            found.append(change.flatten(1).argmin(1))
        pair = torch.cat(found)
        return pair // inputs, pair % inputs


def swaps(layer: Layer, target: Target) -> Compressed:
    return SparseSwaps(Wanda(), SWAPS).compress(layer, target, torch.Generator())


def plain_swaps(layer: Layer, target: Target) -> Compressed:
    with mock.patch.object(kernel, "swap_rounds", swap_search.reference_rounds):
        return swaps(layer, target)


def baseline_swaps(layer: Layer, target: Target) -> Compressed:
    """The loop as it is published: every swap the best of all pairs of the row."""
    with mock.patch.multiple(swap_search, RowSearch=BruteForce, GroupSearch=BruteForce):
        return plain_swaps(layer, target)


def floor_swaps(layer: Layer, target: Target) -> Tensor:
    """The product that the method needs: c = G q of the first mask, in float64."""
    mask = mask_of(Wanda().compress(layer, target, torch.Generator()))
    weight, gram = (ops.normalised(x)[0].double() for x in (layer.weight, layer.gram.matrix))
    return torch.where(mask, 0.0, weight) @ gram


def layer_of(size: int, rows: int | None = None) -> Layer:
    """A square layer with correlated inputs of which two are outliers, or its first rows."""
    layer = layers.make(Recipe(out=size, inputs=size, sequences=16, length=256))
    return replace(layer, weight=layer.weight[:rows])


def cases() -> list[tuple[str, int, Callable[[], object]]]:
    """(name, size, what is timed); the slow ones on as many rows as their name says."""
    found: list[tuple[str, int, Callable[[], object]]] = []
    for size in SIZES:
        whole, few = layer_of(size), layer_of(size, 4)
        for target in TARGETS:
            name = f"sparse_swaps {target.label}"
            found.append((name, size, lambda layer=whole, target=target: swaps(layer, target)))
            found.append((f"{name} floor", size, lambda layer=whole, target=target: floor_swaps(layer, target)))
            found.append((f"{name} plain, 4 rows", size, lambda layer=few, target=target: plain_swaps(layer, target)))
            found.append(
                (f"{name} baseline, 4 rows", size, lambda layer=few, target=target: baseline_swaps(layer, target))
            )
    return found


def timed(function: Callable[[Layer, Target], Compressed], layer: Layer, target: Target) -> tuple[float, Compressed]:
    """Seconds of the whole call, and its result."""
    start = time.perf_counter()
    result = function(layer, target)
    return time.perf_counter() - start, result


def main(size: int = 2048, rows: int = 4) -> None:
    whole, few = layer_of(size), layer_of(size, rows)
    print(f"{size} x {size}, {SWAPS} swaps per row, {torch.get_num_threads()} threads")
    for target in TARGETS:
        seconds, result = min((timed(swaps, whole, target) for _ in range(3)), key=lambda pair: pair[0])
        each = seconds / result.info["swaps"]
        print(f"{target.label}: {seconds:.2f} s, {each * 1e6:.1f} us a swap, {result.info['swaps']} swaps")
        start = time.perf_counter()
        floor_swaps(whole, target)
        print(f"  floor {time.perf_counter() - start:.2f} s")
        for name, function in (("plain", plain_swaps), ("brute force", baseline_swaps)):
            seconds, slow = timed(function, few, target)
            assert torch.equal(mask_of(slow), mask_of(result)[:rows]), name
            ratio = seconds / slow.info["swaps"] / each
            print(f"  {name}, {rows} rows: {seconds:.2f} s, {ratio:.0f} times as long a swap")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
