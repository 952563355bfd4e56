"""Read the header of a GGUF file: metadata, and name, shape and type of every tensor.

It is read while the Snakefile is parsed, without torch, transformers or weights. The format is that of llama.cpp's
docs/gguf.md, little-endian, versions 2 and 3; no others are in use.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any, NamedTuple

from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief

MAGIC, VERSIONS = b"GGUF", (2, 3)
# type -> struct's format character
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
DIMENSIONS = 4  # largest number of dimensions of a tensor
# Number of a tensor type -> (name, values per block, bytes per block), for the types that gguf.quants.dequantize reads.
TYPES: dict[int, tuple[str, int, int]] = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)},
    **{2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34)},
    **{10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176)},
    **{14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98)},
    **{19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82)},
    **{23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36)},
}
PLAIN = ("F32", "F16", "BF16")  # types that hold values, not codes


class TensorInfo(NamedTuple):
    """shape: in torch's order, [out, in] for a linear layer. kind: name of the type, such as Q4_1."""

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Header:
    """metadata: key -> a number, string, boolean or list of these."""

    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.tensors)

    def own(self, key: str) -> Any:
        """The value of an architecture's key, such as block_count for llama.block_count; None if it is absent."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @cached_property
    def quantisation(self) -> str:
        """The tensor types with their counts, the type with most values first: `Q4_1 (210), Q8_0 (1), F32 (61)`."""
        values, tensors = Counter[str](), Counter(tensor.kind for tensor in self.tensors)
        for tensor in self.tensors:
            values[tensor.kind] += math.prod(tensor.shape)
        return ", ".join(f"{kind} ({tensors[kind]})" for kind, _ in values.most_common())


class _Reader:
    """Reads consecutive parts of a stream. `left`: number of unread bytes."""

    def __init__(self, stream: IO[bytes], size: int, subject: str) -> None:
        self.stream, self.size, self.left, self.subject = stream, size, size, subject

    def take(self, length: int) -> bytes:
        found = self.stream.read(length) if length <= self.left else b""
        if len(found) < length:
            raise InputError(f"{self.subject} is cut off: it has {self.size} bytes, which end in its header.")
        self.left -= length
        return found

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def text(self) -> str:
        (length,) = self.numbers("Q")
        return self.take(length).decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth:
            raise ValueError(f"a value of type {kind}")
        element, count = self.numbers("IQ")
        if element in SCALARS:
            width = struct.calcsize(f"<{SCALARS[element]}")
            return list(struct.unpack(f"<{count}{SCALARS[element]}", self.take(count * width)))
        return [self.value(element, depth + 1) for _ in range(count)]


def read_header(stream: IO[bytes], size: int, subject: str) -> Header:
    """The header of a GGUF file. stream: at its beginning. size: bytes of the whole file. subject: its name in errors.

    Raises InputError, in one sentence, for a file that is not GGUF, or is truncated, damaged, big-endian or one of
    several, and for tensors of a type that cannot be dequantised.
    """
    reader = _Reader(stream, size, subject)
    if size < 24 or reader.take(4) != MAGIC:
        raise InputError(f"{subject} is not a GGUF file: it does not begin with {MAGIC.decode()!r}.")
    (version,) = reader.numbers("I")
    if version and version & 0xFFFF == 0:
        raise InputError(f"{subject} must be little-endian. Got a big-endian GGUF file instead.")
    if version not in VERSIONS:
        raise InputError(f"{subject} must be GGUF of version 2 or 3. Got version {version} instead.")
    try:
        count, keys = reader.numbers("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key, (kind,) = reader.text(), reader.numbers("I")
            if key in metadata:
                raise ValueError(f"the key {key} twice")
            metadata[key] = reader.value(kind)
        _check_whole(metadata, subject)
        entries = [_entry(reader) for _ in range(count)]
        return Header(metadata, _tensors(entries, metadata, reader))
    except (ValueError, OverflowError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{subject} is damaged: its header cannot be read ({brief(str(error))}).") from None


def _check_whole(metadata: Mapping[str, Any], subject: str) -> None:
    """Raise InputError for a file that is one of several, as recorded by the split."""
    files = metadata.get("split.count")
    if isinstance(files, int):
        check_one(files, subject)


def check_one(files: int, subject: str) -> None:
    """Raise InputError for one of several files."""
    if files > 1:
        raise InputError(
            f"{subject} must be a whole model. Got one of {files} files instead: join them with llama.cpp's "
            "`llama-gguf-split --merge`."
        )


def _entry(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the type, and offset of a tensor."""
    name, (dimensions,) = reader.text(), reader.numbers("I")
    if dimensions > DIMENSIONS:
        raise ValueError(f"{name} of {dimensions} dimensions")
    shape = tuple(reversed(reader.numbers(f"{dimensions}Q")))  # the file stores the fastest dimension first
    kind, offset = reader.numbers("IQ")
    return name, shape, kind, offset


def _tensors(
    entries: list[tuple[str, tuple[int, ...], int, int]], metadata: Mapping[str, Any], reader: _Reader
) -> tuple[TensorInfo, ...]:
    """The tensors; each must lie within the file."""
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r}")
    start = -(-(reader.size - reader.left) // alignment) * alignment
    found: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        if kind not in TYPES:
            raise InputError(
                f"{reader.subject} must have tensors of types that can be dequantised. Got {name} of type {kind} "
                f"instead; known are {', '.join(known for known, *_ in TYPES.values())}."
            )
        label, values, width = TYPES[kind]
        if not shape or shape[-1] % values or name in found:
            raise ValueError(f"{name} twice" if name in found else f"{name} of shape {list(shape)} as {label}")
        end = start + offset + math.prod(shape) // values * width
        if end > reader.size:
            raise InputError(
                f"{reader.subject} is cut off: it has {reader.size} bytes, and by its header {name} ends at {end}."
            )
        found[name] = TensorInfo(name, shape, label)
    return tuple(found.values())
