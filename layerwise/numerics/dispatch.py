"""Which of two equal paths a loop takes: compiled on a processor, plain torch on every other device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_plain = ContextVar("plain", default=False)


def compiled(tensor: Tensor) -> bool:
    """Whether what is done with the tensor, float32 or float64, is done by compiled code (Numba)."""
    return tensor.device.type == "cpu" and not _plain.get()


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within it the plain torch reference runs everywhere: for tests and benchmarks."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)
