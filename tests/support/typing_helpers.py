"""What may be None and, where a test goes on with it, must not be."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from layerwise.contract.layer import Compressed

T = TypeVar("T")


def some(value: T | None) -> T:
    """The value, which must be there."""
    assert value is not None
    return value


def mask_of(result: Compressed) -> Tensor:
    """The mask of a result that must have one."""
    return some(result.mask)
