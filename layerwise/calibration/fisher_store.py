"""The file of a model's `fisher`: a vector [out] float32 for each linear layer of its blocks
(calibration/fisher.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerwise.runtime.errors import InputError, out_of_memory, refused
from layerwise.runtime.files import set_aside, whole_file


def write(path: Path, vectors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """info: {samples, length}, over which the vectors are means. It is stored in the file with a hash of the
    vectors."""
    tensors = {name: own.to("cpu").contiguous() for name, own in vectors.items()}
    with whole_file(path) as part:
        save_file(tensors, part, metadata={"info": json.dumps({**info, "sha256": _hash(tensors)})})


def read(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Layer -> its vector, on a device. Raises InputError for a damaged file, which is set aside."""
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
            known = json.loads((file.metadata() or {})["info"])["sha256"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        sentence = f"{path} must hold a vector for each layer and their 'info': {error}"
        kept = isinstance(error, OSError) or refused(error) or out_of_memory(error)
        raise InputError(f"{sentence}." if kept else f"{sentence}; {set_aside(path)}.") from error
    if _hash(found) != known:
        raise InputError(f"{path} is damaged: its vectors have changed since they were written; {set_aside(path)}.")
    return {name: own.to(device) for name, own in found.items()}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, own in sorted(tensors.items()):
        digest.update(f"{name} {list(own.shape)} {own.dtype}\n".encode())
        digest.update(own.numpy().tobytes())
    return digest.hexdigest()
