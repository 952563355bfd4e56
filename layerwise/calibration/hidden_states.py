"""Files that store the hidden states of calibration or evaluation sequences between two blocks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.runtime.checkpoint import STATES
from layerwise.runtime.files import write_atomic, writing

DENSE = "dense-"  # kind of the dense model's states, next to those of the compressed model


def files_of(folder: Path, index: int, kind: str = "") -> tuple[Path, Path]:
    """The file of the hidden states that enter a block, and the record that marks it as complete."""
    return folder / f"{STATES}{kind}{index:03d}.bin", folder / f"{STATES}{kind}{index:03d}.json"


class StoredStates(Sequence[Tensor]):
    """Batches of hidden states [sequences, length, hidden] between two blocks, read on demand.

    All have one dtype and one length, so that the file does not depend on the batching of the sequences.
    """

    def __init__(self, files: tuple[Path, Path], sizes: Sequence[int]) -> None:
        """files: the values, and the record that marks them as complete. sizes: number of sequences in each batch.

        Raises FileNotFoundError when the states are absent or truncated.
        """
        self.path, said = files
        found = json.loads(said.read_text("utf-8"))
        self.dtype, self.shape = getattr(torch, found["dtype"]), tuple(found["shape"])  # (length, hidden)
        self.bytes = self.dtype.itemsize * self.shape[0] * self.shape[1]  # per sequence
        self.sizes = list(sizes)
        if self.path.stat().st_size != sum(self.sizes) * self.bytes:
            raise FileNotFoundError(f"{self.path} does not hold {sum(self.sizes)} sequences of {self.bytes} bytes.")

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, batch: int) -> Tensor:  # type: ignore[override]
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        start = sum(self.sizes[:batch]) * self.bytes
        values = np.fromfile(self.path, np.uint8, self.sizes[batch] * self.bytes, offset=start)
        return torch.from_numpy(values).view(self.dtype).view(-1, *self.shape)


def store(folder: Path, index: int, batches: Iterable[Tensor], kind: str = "") -> StoredStates:
    """Write the states that enter block `index`, and delete those that entered block `index` - 2.

    Those of block `index` - 1 stay, because their reader may have to start again.
    """
    path, said = files_of(folder, index, kind)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        said.unlink(missing_ok=True)
    for old in files_of(folder, index - 2, kind):
        old.unlink(missing_ok=True)
    sizes, found = write_values(path, batches)
    write_atomic(said, json.dumps(found) + "\n")
    return StoredStates((path, said), sizes)


def write_values(path: Path, batches: Iterable[Tensor]) -> tuple[list[int], dict[str, Any]]:
    """Write batches of states [sequences, length, hidden]; returns their sizes, and the record of dtype and shape."""
    sizes, dtype, shape = [], torch.float32, (0, 0)
    with writing(path), path.open("wb") as file:
        for states in batches:
            sizes.append(len(states))
            dtype, shape = states.dtype, (states.shape[1], states.shape[2])
            # (not tofile, which hides the reason of a disk's error)
            file.write(states.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return sizes, {"dtype": str(dtype).removeprefix("torch."), "shape": shape}
