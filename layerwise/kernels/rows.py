"""Build compiled loops over the rows of a matrix, and share the rows between threads."""

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

PARTS = 4  # runs of rows per thread: if one thread is delayed, the others wait only for one short run
NO_CACHE = "no locator available"  # part of Numba's error for a function that it cannot cache
SMALL = 2**15  # number of entries that one thread finishes before a second thread has started


def compiled(
    signatures: Any = None, *, fastmath: bool | set[str] = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator that compiles a function with Numba and keeps its type.

    signatures: if given, a kernel is compiled or read from the disk cache when its module is imported, so that this
    does not count in a layer's time. fastmath: off by default, so that products and differences are rounded separately,
    as in torch.
    Raises InputError if compiled code can be stored neither in the package nor under HOME nor in NUMBA_CACHE_DIR.
    """
    compile_ = njit(signatures, cache=True, nogil=True, error_model="numpy", fastmath=fastmath)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        try:
            return compile_(function)
        except RuntimeError as error:
            if NO_CACHE not in str(error):
                raise
            raise InputError(
                "Compiled loops must be stored in a writable folder. Got none instead, neither beside "
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
    """The tensor's entries as a C-contiguous array: a view of a contiguous tensor, otherwise a copy."""
    return tensor.detach().contiguous().numpy()


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Uninitialised memory for a result. numpy asks for large pages, which avoids most page faults of torch.empty."""
    return np.empty(shape, dtype)
