"""Write, join and read files of compressed layers (a cell's weights.safetensors), layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerwise.contract.layer import Compressed
from layerwise.contract.target import Target
from layerwise.runtime.errors import InputError
from layerwise.storage.layer_unpacking import restored

VERSION = 1
WIDTHS = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "U16": 2,
    "U8": 1,
    "F8_E4M3": 1,
    "I32": 4,
}  # bytes per number, by the dtype's name in a header
PARTS = (
    "values",
    "codes",
    "bitmap",
    "positions",
    "blocks",
    "scales",
    "zeros",
    "divisor",
    "levels",
    "rotation",
    "input_scale",
    "group_of",
    "left",
    "right",
    "left_bitmap",
    *(f"{side}_{part}" for side in ("left", "right") for part in ("codes", "scales", "zeros")),
)


def write(
    path: Path,
    layers: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    target: Target,
    targets: Mapping[str, Target] | None = None,
) -> None:
    """Write the parts of layers [out, in] to a safetensors file, each as `layer.part`.

    target: the target of all layers, or the budget if `targets` holds one per layer.
    """
    tensors = {
        f"{layer}.{part}" if part else layer: tensor
        for layer, parts in layers.items()
        for part, tensor in parts.items()
    }
    info: dict[str, Any] = {"version": VERSION, "target": target.as_dict()}
    info["shapes"] = {name: list(shapes[name]) for name in layers}
    if targets:
        info["targets"] = {name: targets[name].as_dict() for name in layers}
    save_file(tensors, path, metadata={"layerwise": json.dumps(info)})


def join(path: Path, parts: Sequence[Path]) -> None:
    """Join files of `write` with the same target or budget into one, tensor by tensor."""
    entries: list[tuple[str, dict[str, Any], Path, int]] = []
    shapes, targets, info = {}, {}, {}
    for part in parts:
        with part.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        info = json.loads(header.pop("__metadata__")["layerwise"])
        shapes |= info["shapes"]
        targets |= info.get("targets", {})
        entries += [(name, entry, part, 8 + size) for name, entry in header.items()]
    # Wide numbers are first, so that all are aligned.
    entries.sort(key=lambda entry: (-WIDTHS[entry[1]["dtype"]], entry[0]))
    gathered = {"shapes": shapes} | ({"targets": targets} if targets else {})
    whole: dict[str, Any] = {"__metadata__": {"layerwise": json.dumps(info | gathered)}}
    end = 0
    for name, entry, _, _ in entries:
        start, stop = entry["data_offsets"]
        whole[name] = entry | {"data_offsets": [end, end + stop - start]}
        end += stop - start
    text = json.dumps(whole).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, entry, part, base in entries:
            start, stop = entry["data_offsets"]
            with part.open("rb") as file:
                file.seek(base + start)
                out.write(file.read(stop - start))


class PackedFile:
    """A file of compressed layers, read layer by layer.

    target: the target of all layers, or the budget that is spread over them. The file is opened for each layer, because
    pages read from a mapped file count as memory until it is closed. A file without the metadata of `write` is read as
    weights [out, in] under their layers' names.
    Raises InputError, in one sentence, when it cannot be read or its content is inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, path.absolute()  # the process may move
        try:
            with safe_open(path, "pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                text = (file.metadata() or {}).get("layerwise")
        except (OSError, SafetensorError) as error:
            raise InputError(f"The weights at {path} cannot be read: {error}.") from None
        try:
            info = json.loads(text) if text else {"version": VERSION, "target": {}, "shapes": {}}
            if info["version"] != VERSION:
                raise InputError(
                    f"{path} must be of version {VERSION} of the layout. Got version {info['version']} instead."
                )
            self.target = Target(**info["target"])
            self.targets = {name: Target(**own) for name, own in info.get("targets", {}).items()}
            self.shapes = {name: tuple(shape) for name, shape in info["shapes"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"The description of the layers in {path} cannot be read: {error!r}.") from None
        if not text:
            self.shapes = found
        if self.targets and self.targets.keys() != self.shapes.keys():
            raise InputError(f"{path} must have a target for each of its layers. Got {len(self.targets)} instead.")
        self._parts: dict[str, dict[str, str]] = {name: {} for name in self.shapes}
        for name in found:
            layer, _, part = name.rpartition(".")
            if name in self.shapes:
                self._parts[name][""] = name
            elif layer in self.shapes and part in PARTS:
                self._parts[layer][part] = name
            else:
                raise InputError(f"{path} has the tensor {name!r}, which belongs to none of its layers.")

    def target_of(self, layer: str) -> Target:
        """The layer's target: the common one, or its own if a budget is spread over the layers."""
        return self.targets.get(layer, self.target)

    def read(self, layer: str) -> Compressed:
        """The layer, with its weight [out, in] float32."""
        try:
            with safe_open(self._place, "pt") as file:
                parts = {part: file.get_tensor(name) for part, name in self._parts[layer].items()}
            return restored(parts, self.target_of(layer), self.shapes[layer])
        except (ValueError, OSError, SafetensorError) as error:
            raise InputError(f"{layer} in {self.path} is damaged: {error}.") from None

    def stored_bytes(self, layer: str) -> int:
        """Bytes of the layer's tensors."""
        with safe_open(self._place, "pt") as file:
            return sum(file.get_tensor(name).nbytes for name in self._parts[layer].values())
