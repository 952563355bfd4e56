"""Gram stores hold the Grams of a calibration block by block. All studies that see the same folder share them.

A store's name is a hash of everything on which its content depends.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerwise.calibration.taps import Tap
from layerwise.contract.layer import Gram, Statistics
from layerwise.runtime.errors import InputError, out_of_memory, refused
from layerwise.runtime.files import read_made, sha256, write_atomic
from layerwise.runtime.shared_stores import register, registered

STATISTICS = ("mean", "absmean", "sequence_variance", "sample", "first_tokens")
INDEX = "index.json"


def block_file(index: int) -> str:
    return f"block-{index:03d}.safetensors"


def block_tensors(taps: list[Tap]) -> dict[str, Tensor]:
    tensors = {}
    for tap in taps:
        tensors[f"{tap.name}/gram"] = tap.gram.matrix
        found = {field: getattr(tap.statistics, field) for field in STATISTICS}
        tensors |= {f"{tap.name}/{field}": tensor for field, tensor in found.items() if tensor is not None}
    return {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}


def description(tap: Tap) -> dict[str, Any]:
    """A tap's entry in index.json."""
    own = {"layers": tap.layers, "inside": tap.inside, "in": len(tap.gram.matrix)}
    return own | {"tokens": tap.gram.tokens, "scope": tap.scope}


def read_index(folder: Path) -> dict[str, Any]:
    """{length, compute_dtype, blocks: [{tap: {layers, inside, in, tokens, scope}}], sha256: [one per block's file]}.

    Taps are in the order of their inputs. compute_dtype: dtype of the forward passes.

    Raises InputError when the folder holds no complete Gram store.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise InputError(f"The Grams of a calibration at {folder} have no {INDEX}: run again.")
    return read_made(path)


def computed_in(folder: Path) -> str | None:
    """The dtype in which the forward passes of a store were computed; None if the store does not record it."""
    return read_index(folder).get("compute_dtype")


def scopes(folder: Path) -> str:
    """The number of layers of a store by token_scope, such as `layers by token_scope: 8 all, 64 routed`."""
    layers: Counter[str] = Counter()
    for tap in (tap for block in read_index(folder)["blocks"] for tap in block.values()):
        layers[tap["scope"]] += len(tap["layers"])
    return "layers by token_scope: " + ", ".join(f"{count} {scope}" for scope, count in layers.items())


def read_block(folder: Path, index: int, device: str = "cpu") -> Iterator[Tap]:
    """The taps of one block on a device, read one at a time; no other block is read.

    The file is opened for each tap, because pages read from a mapped file count as memory until it is closed.

    Raises InputError when the block's file is absent or, at the latest after the last tap, when it is damaged. A
    damaged store is taken out of use, so that the next run computes it again.
    """
    contents, path = read_index(folder), Path(folder) / block_file(index)
    try:
        with ThreadPoolExecutor(1) as beside:  # work on the taps takes longer than reading
            found = beside.submit(sha256, path)
            for name, entry in contents["blocks"][index].items():
                yield _tap(path, name, entry, contents["length"], device)
            whole = found.result() == contents["sha256"][index]
    except (OSError, SafetensorError) as error:
        if out_of_memory(error) or refused(error):
            raise InputError(f"The Gram file {path.name} of {folder} cannot be read: {error}.") from error
        sentence = f"The Gram file {path.name} of {folder} cannot be read: {error}"
        raise InputError(f"{sentence}; {give_up(folder)}.") from error
    check_block(folder, index, whole)


@contextmanager
def unless_damaged(pointer: Path | None) -> Iterator[None]:
    """Context in which an InputError is replaced by one about the store, if the store is damaged."""
    try:
        yield
    except InputError:
        folder = pointer and (pointer if pointer.is_dir() else named(pointer) if pointer.is_file() else None)
        if folder and (folder / INDEX).is_file():  # otherwise the error already says that the store is out of use
            for index, known in enumerate(read_index(folder)["sha256"]):
                check_block(folder, index, sha256(folder / block_file(index)) == known)
        raise


def check_block(folder: Path, index: int, whole: bool) -> None:
    """Raise InputError, and take the store out of use, when one of its blocks is damaged."""
    if not whole:
        what = f"The Gram file {block_file(index)} of {folder} is damaged: it has changed"
        raise InputError(f"{what}; {give_up(folder)}.")


def _tap(path: Path, name: str, entry: Mapping[str, Any], length: int, device: str) -> Tap:
    with safe_open(path, "pt", device=device) as file:
        gram = Gram(file.get_tensor(f"{name}/gram"), entry["tokens"])
        names = set(file.keys())
        present = [field for field in STATISTICS if f"{name}/{field}" in names]
        statistics = Statistics(length=length, **{field: file.get_tensor(f"{name}/{field}") for field in present})
    return Tap(name, tuple(entry["layers"]), tuple(entry["inside"]), gram, statistics, entry["scope"])


# ----------------------------------------------------------------------------------------------------------- sharing


def content(
    fingerprint: Path, model: Mapping[str, Any], tokens: Path, computed: str | None, code: str, device: str
) -> Any:
    """Everything on which the Grams depend.

    fingerprint: the model's fingerprint, from fingerprint.py. model: its config entry, with the dtype of the
    calibration. computed: the dtype in which passes are computed, which depends on the machine. code: hash of the job's
    code.
    """
    return {
        "model": read_made(fingerprint)["files"],
        "loading": {key: model.get(key) for key in ("dtype", "trust_remote_code")},
        "compute dtype": computed,
        "tokens": sha256(tokens),
        "code": code,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "device": device,
    }


def give_up(folder: Path, *pointers: Path) -> str:
    """Take a store out of use by removing all records of it. Returns the end of the error's sentence."""
    known = [*users(folder), *pointers, folder / INDEX]
    try:
        for path in known:
            path.unlink(missing_ok=True)
    except OSError:
        return f"delete {' and '.join(map(str, known))}, and run again"
    return "run again to compute these Grams"


def store_of(pointer: Path) -> Path:
    """The folder of Grams named by a file that the rule `gram` wrote; a folder is returned unchanged."""
    if pointer.is_dir():
        return pointer
    if not pointer.is_file():
        raise InputError(f"The Grams of {pointer} were found damaged during this run: run again to compute them.")
    folder = named(pointer)
    if not (folder / INDEX).is_file():
        raise InputError(f"The Grams of {pointer} are no longer at {folder}: {give_up(folder, pointer)}.")
    register(folder, pointer, INDEX, "The Grams")  # registers again if the study has moved
    return folder


def named(pointer: Path) -> Path:
    """The store that a study's file names."""
    return Path(read_made(pointer)["store"])


def point_to(folder: Path, pointer: Path) -> None:
    """Write the pointer file that names a study's store, and register the study in the store."""
    register(folder, pointer, INDEX, "The Grams")
    write_atomic(pointer, json.dumps({"store": str(folder)}, indent=1) + "\n")


def users(folder: Path) -> list[Path]:
    """The pointer files of all studies that use the store."""
    found = []
    for path in registered(folder):
        with suppress(InputError):  # another study's pointer may be damaged
            found += [path] if named(path).name == folder.name else []
    return found
