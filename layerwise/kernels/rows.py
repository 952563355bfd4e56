"""Compiled loops over the rows of a matrix: how they are built, and how their rows are shared between threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from numba import njit, types
from numpy.typing import DTypeLike
from torch import Tensor

from layerwise.runtime.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")

PARTS = 4  # runs of rows per thread: if one thread is held up, the others wait for one short run only
NO_CACHE = "no locator available"  # in Numba's error for a function of which it can keep nothing
SMALL = 2**15  # entries that one thread finishes before a second one has started


def compiled(
    signatures: Any = None, *, fastmath: bool | set[str] = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator that compiles a function with Numba and keeps its type.

    signatures: with them a kernel is compiled, or read from the cache on disk, when its module is imported, not within
    a layer's seconds. fastmath: off by default, so that products and differences are rounded one by one, as in torch.
    Raises InputError where neither the package, HOME nor NUMBA_CACHE_DIR is a place to keep what is compiled.
    """
    compile_ = njit(signatures, cache=True, nogil=True, error_model="numpy", fastmath=fastmath)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        try:
            return compile_(function)
        except RuntimeError as error:
            if NO_CACHE not in str(error):
                raise
            raise InputError(
                "Compiled loops must be kept in a folder that can be written. Got none instead, neither beside "
                f"{__file__} nor under HOME: set NUMBA_CACHE_DIR to one."
            ) from error

    return decorate


def named(kind: type[tuple], *fields: types.Type) -> types.Type:
    """Numba's type of a named tuple with fields of these types, for signatures."""
    return cast(types.Type, types.BaseTuple.from_types(fields, kind))


def by_rows(kernel: Callable, shape: tuple[int, ...], *arguments: Any) -> list:
    """Call kernel(*arguments, first, last) on runs of rows of a matrix of that shape, in torch's number of threads.

    Returns the kernel's results, one per run.
    """
    rows, threads = shape[0], torch.get_num_threads()
    if threads == 1 or np.prod(shape) < SMALL or rows == 1:
        return [kernel(*arguments, 0, rows)]
    bounds = np.linspace(0, rows, min(threads * PARTS, rows) + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda run: kernel(*arguments, *run), zip(bounds, bounds[1:], strict=False)))


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's entries as a C-contiguous array: a view of a contiguous tensor, else a copy."""
    return tensor.detach().contiguous().numpy()


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Uninitialised memory for a result. numpy asks for large pages, which avoids most page faults of torch.empty."""
    return np.empty(shape, dtype)
