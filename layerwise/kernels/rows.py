"""Compiled loops over the rows of a matrix: how they are built, and how their rows are shared between threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

PARTS = 4  # runs of rows per thread, so that one which is held up leaves little for the others to wait for
SMALL = 2**15  # entries that one thread is done with before a second one has started

# Signatures are given, so that a kernel is compiled, or read from the cache on disk, when its module is imported and
# not within a layer's seconds. No fastmath: products and differences are rounded one by one, as torch rounds them.
compiled = partial(njit, cache=True, nogil=True, error_model="numpy")


def by_rows(kernel: Callable, shape: tuple[int, ...], *arguments: Any) -> list:
    """kernel(*arguments, first, last) on runs of the rows of a matrix of that shape, in torch's number of threads.

    Returns what the kernel returns, run by run.
    """
    rows, threads = shape[0], torch.get_num_threads()
    if threads == 1 or np.prod(shape) < SMALL or rows == 1:
        return [kernel(*arguments, 0, rows)]
    bounds = np.linspace(0, rows, min(threads * PARTS, rows) + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda run: kernel(*arguments, *run), zip(bounds, bounds[1:], strict=False)))


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's entries, row after row, as kernels take them; a view where they lie so."""
    return tensor.detach().contiguous().numpy()


def empty(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Memory for a result. numpy asks for large pages, which spares most of the page faults of torch.empty."""
    return np.empty(shape, dtype)
