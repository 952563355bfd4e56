"""Changes of codes on a CPU: pass the layer's rows to the compiled loop, a few at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from layerwise.kernels.code_loops import CodeRows, LayerArrays, advance
from layerwise.kernels.code_state import TOLERANCE, CodeState
from layerwise.kernels.rows import array
from layerwise.kernels.swap_loops import TINY

ROUNDS = 64  # changes of a row between two readings of the clock
TASK_ROWS = 8  # rows per task of a thread, because rows take different times


def change_rounds(
    rows: CodeState, pairs: bool, most_changes: int | None
) -> Iterator[tuple[int, float, float, tuple[int, int]]]:
    """As `numerics.code_search.change_rounds`, on torch.get_num_threads() threads."""
    start = time.perf_counter()
    root = rows.gram.diagonal().clamp(min=0).sqrt().clamp(min=float(TINY))
    steepness = (rows.gram.abs() / root).fill_diagonal_(0.0).amax(1)
    shared = (rows.gram, rows.gram.diagonal(), root, steepness, rows.input_scale, rows.group_of)
    layer = LayerArrays(*map(array, shared))
    matrices = (rows.codes, rows.scales, rows.zeros, rows.movable, rows.coupling, rows.loss)
    arrays = [*(tensor.numpy() for tensor in matrices), np.ones(len(rows.codes), np.bool_)]
    active, done = arrays[-1], 0

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while active.any() and (most_changes is None or done < most_changes):
            count = ROUNDS if most_changes is None else min(ROUNDS, most_changes - done)
            made = np.zeros((len(active), 2), np.int64)

            def run(first: int, count: int = count, made: np.ndarray = made) -> None:
                part = slice(first, first + TASK_ROWS)
                advance(layer, CodeRows(*(x[part] for x in arrays)), made[part], count, rows.most, pairs, TOLERANCE)

            list(pool.map(run, range(0, len(active), TASK_ROWS)))
            ones, twos = made.sum(0).tolist()
            if not ones + twos:
                return
            done += int(made.sum(1).max())
            yield done, time.perf_counter() - start, float(rows.loss.sum()), (ones, twos)
