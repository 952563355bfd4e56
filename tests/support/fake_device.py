"""A device that is not the processor, on the processor: what mixes the two fails here as it would on a GPU.

    with far.reachable():
        tensor = tensor.to(far.DEVICE)

Every operation runs in memory, on the same numbers in the same order as on the processor, and refuses tensors of both
sides as CUDA does: but for single numbers, copies, and indices into what is far. The device calls itself `meta`, which
every build of torch knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
COPIES = ("copy_", "_to_copy")
INDEXED = ("index", "index_put_", "_index_put_impl_")  # CUDA takes indices from the processor


class Far(Tensor):
    """A tensor whose memory, `here`, is out of reach of everything but operations on far tensors."""

    here: Tensor
    # Of a subclass that dispatches, as torch documents it. The annotation of Tensor has a class method.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, here: Tensor) -> Far:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        far = Tensor._make_wrapper_subclass(cls, here.size(), device=DEVICE, **layout)
        far.here = here
        return far

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:
        raise RuntimeError(f"{function} outside of far.reachable().")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        far = [tensor for tensor in tensors if isinstance(tensor, Far)]
        near = [tensor for tensor in tensors if not isinstance(tensor, Far) and tensor.dim()]
        name = function.overloadpacket.__name__
        allowed = name in COPIES or (name in INDEXED and isinstance(args[0], Far))
        if far and near and not allowed:
            raise RuntimeError(f"{function} was given tensors on two devices.")
        goes_far = isinstance(args[0], Far) if name == "copy_" else bool(far)
        if kwargs.get("device") is not None:
            goes_far = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        given = {id(tensor.here): tensor for tensor in far}  # what is changed in place stays the same tensor
        result = function(*tree_map(_here, args), **tree_map(_here, kwargs))

        def there(leaf: Any) -> Any:
            if id(leaf) in given:
                return given[id(leaf)]
            return Far(leaf) if goes_far else leaf

        return tree_map(lambda leaf: there(leaf) if isinstance(leaf, Tensor) else leaf, result)


def _here(leaf: Any) -> Any:
    return leaf.here if isinstance(leaf, Far) else leaf


@contextmanager
def reachable() -> Iterator[None]:
    with _Mode():
        yield
