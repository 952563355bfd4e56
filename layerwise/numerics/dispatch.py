"""Choose between two equivalent paths of a loop: compiled on a CPU, the torch reference on other devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_reference = ContextVar("reference", default=False)


def use_compiled(tensor: Tensor) -> bool:
    """Whether loops over the tensor, float32 or float64, run as compiled code (Numba)."""
    return tensor.device.type == "cpu" and not _reference.get()


@contextmanager
def reference() -> Iterator[None]:
    """Context in which the torch reference runs everywhere: for tests and benchmarks."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)
