"""The tensors of a model's safetensors files, read by name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerwise.runtime.errors import InputError
from layerwise.sources.checkpoint_files import weight_files, weight_map

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool}


class Shards:
    """The tensors of a model's safetensors files, read by name.

    empty: name -> tensor of the same shape and dtype, without data. repeated: names that several files hold; the
    index's weight_map decides from which file such a tensor is read.
    """

    def __init__(self, name: str, folder: Path) -> None:
        """Raises SafetensorError for a damaged file, and InputError for an index that contradicts the files."""
        self._file_of: dict[str, Path] = {}
        self.empty: dict[str, Tensor] = {}
        self.repeated: set[str] = set()
        paths, chosen = weight_files(name, folder), weight_map(folder)
        seen: set[str] = set()
        for path in paths:
            with opened(path) as file:
                for key in file.keys():  # noqa: SIM118 (it is not a mapping)
                    part = file.get_slice(key)
                    if part.get_dtype() not in DTYPES:
                        raise SafetensorError(f"{key} is of dtype {part.get_dtype()}, in which no model can be read")
                    if key in seen:
                        self.repeated.add(key)
                        if key not in chosen:
                            raise InputError(
                                f"One file of the model {name!r} must hold {key}, or its index must say which. Got it "
                                f"in {self._file_of[key].name} and {path.name} instead."
                            )
                    seen.add(key)
                    if chosen.get(key, path.name) == path.name:
                        self._file_of[key] = path
                        self.empty[key] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
        if absent := sorted(seen - self._file_of.keys()):
            raise InputError(
                f"The index of the model {name!r} says that {absent[0]} is in {chosen[absent[0]]}, which lacks it."
            )

    def read(self, keys: Collection[str]) -> dict[str, Tensor]:
        """Copies of the tensors. The library's tensors are mapped files, which take memory until the last is
        released."""
        found = {}
        for path in dict.fromkeys(self._file_of[key] for key in keys):
            with opened(path) as file:
                found |= {key: file.get_tensor(key).clone() for key in keys if self._file_of[key] == path}
        return found


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; errors name it."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise SafetensorError(f"{path.name}: {error}") from error
