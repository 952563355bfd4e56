"""SparseSwaps on a CPU: lay out the layer's rows for the compiled loops, and report the swaps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from layerwise.kernels import simd
from layerwise.kernels.rows import array
from layerwise.kernels.swap_loops import TINY, GramArrays, RowArrays, advance
from layerwise.kernels.swap_state import TOLERANCE, SwapState

ROUNDS = 32  # rounds between two readings of the clock
TASK_ROWS = 8  # rows per task of a thread, because rows take different times


def swap_rounds(rows: SwapState, swaps: int | None) -> Iterator[tuple[float, float, int]]:
    """As `numerics.swap_search.swap_rounds`. Between two readings of the clock all swaps are assumed to take equally
    long.

    The clock is read every ROUNDS rounds. It runs on torch.get_num_threads() threads, each of which takes a few rows at
    a time.
    """
    start = time.perf_counter()
    inputs = rows.weight.shape[1]
    origin = origins(inputs, rows.length) if rows.length else torch.arange(inputs)
    layout = by_place(rows, origin) if rows.length else rows
    blocks = group_blocks(rows.gram, rows.length) if rows.length else torch.empty(0, 0, 0)
    outside = (origin == inputs).nonzero().flatten()
    root = layout.gram.diagonal().clamp(min=0).sqrt().clamp(min=float(TINY))
    slope = root if rows.length else (layout.gram.abs() / root).fill_diagonal_(0.0).amax(1)
    gram = GramArrays(*map(array, (layout.gram, layout.gram.diagonal(), root, slope, blocks, outside)))
    matrices = [x.numpy() for x in (layout.weight, layout.mask, layout.coupling, layout.loss)]
    active = np.ones(len(rows.mask), np.bool_)

    def advance_task(losses: NDArray[np.float64], made: NDArray[np.bool_], first: int) -> None:
        part = slice(first, first + TASK_ROWS)
        rows_of_task = RowArrays(*(x[part] for x in (*matrices, active)))
        advance(gram, rows_of_task, losses[:, part], made[:, part], TOLERANCE)

    done, began = 0, 0.0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while active.any() and (swaps is None or done < swaps):
            count = ROUNDS if swaps is None else min(ROUNDS, swaps - done)
            losses, made = np.empty((count, len(active))), np.zeros((count, len(active)), np.bool_)
            list(pool.map(partial(advance_task, losses, made), range(0, len(active), TASK_ROWS)))
            ended = time.perf_counter() - start
            swapped = made.sum(1)
            until = began + (ended - began) * swapped.cumsum() / max(swapped.sum(), 1)
            for seconds, loss, number in zip(until, losses, swapped, strict=True):
                if number:
                    yield float(seconds), float(torch.from_numpy(loss).sum()), int(number)
            done, began = done + count, ended
    if rows.length:
        rows.mask[:, origin[origin < inputs]] = layout.mask[:, origin < inputs]


def origins(inputs: int, length: int) -> Tensor:
    """[m * groups] int64, the input at each place; `inputs` means padding. The number of groups is a multiple of 16.

    The first inputs of all groups come first, then the second inputs, and so on.
    """
    groups = -(-inputs // (length * simd.LANES)) * simd.LANES
    place = torch.arange(length * groups)
    return (place % groups * length + place // groups).clamp(max=inputs)


def by_place(rows: SwapState, origin: Tensor) -> SwapState:
    """The rows with their inputs in the order `origin`; padding is a kept weight of zero."""
    weight, coupling = (pad(x, (0, 1))[:, origin] for x in (rows.weight, rows.coupling))
    gram = pad(rows.gram, (0, 1, 0, 1))[origin][:, origin]
    mask = pad(rows.mask, (0, 1), value=True)[:, origin]
    return SwapState(weight, gram, mask, coupling, rows.loss, rows.length)


def group_blocks(gram: Tensor, length: int) -> Tensor:
    """[m, m, groups] the Gram within each group; the number of groups is padded with zeros to a multiple of 16."""
    missing = -len(gram) % (length * simd.LANES)
    padded = pad(gram, (0, missing, 0, missing))
    return padded.unflatten(0, (-1, length)).unflatten(2, (-1, length)).diagonal(dim1=0, dim2=2)
