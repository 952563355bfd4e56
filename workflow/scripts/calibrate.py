"""Shared calibration: the Gram of every tap of the dense model, from one forward pass, stored block by block.

Stores are named after what decides their content, and shared by all studies that see the same folder of stores.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from methods.base import Gram, Statistics
from workflow.scripts.checkpoint import Checkpoint
from workflow.scripts.fingerprint import sha256
from workflow.scripts.models import Blocks, set_threads
from workflow.scripts.propagate import Stream
from workflow.scripts.runtime import InputError, report_errors, whole_file, write_atomic
from workflow.scripts.streaming import LazyBlocks
from workflow.scripts.taps import Tap
from workflow.scripts.text import read_tokens

STATISTICS = ("mean", "absmean", "sequence_variance", "sample")
INDEX = "index.json"
CACHE = "LAYERWISE_CACHE"  # environment variable


def shared(stream: Stream, start: int = 0) -> Iterator[list[Tap]]:
    """The taps of each block in turn, as the stream passes through the model as it is, once."""
    for index in range(start, len(stream.blocks)):
        with stream.source.open(index):
            taps = stream.collect(index, advance=True)
        yield taps
        del taps  # before the next block's


# ------------------------------------------------------------------------------------------------------------ store


def block_file(index: int) -> str:
    return f"block-{index:03d}.safetensors"


def write_gram(folder: Path, blocks: Blocks, tokens: Tensor, fingerprint: Mapping[str, Any]) -> None:
    """Write the taps of each block of a model for tokens [samples, length] to `folder`, which is there when complete.

    block-000.safetensors ... hold float32 tensors "{tap}/gram" [in, in], "{tap}/mean", "{tap}/absmean" and
    "{tap}/sequence_variance" [in], "{tap}/sample" [rows, in]; index.json says which layers a tap serves.
    A process that is killed leaves its finished blocks beside the folder, and the next goes on from there if its
    fingerprint is the same.
    """
    with Checkpoint(folder.with_name(f".{folder.name}.part"), fingerprint) as checkpoint:
        if (folder / INDEX).is_file():  # by another process, while this one waited for it
            return checkpoint.remove()
        done, part = checkpoint.done, checkpoint.folder / "store"
        part.mkdir(exist_ok=True)
        stream = Stream(blocks, tokens, folder=checkpoint.folder, start=done)
        progress = tqdm(shared(stream, done), "calibrate", total=len(blocks), initial=done, unit="block")
        for index, taps in enumerate(progress, done):
            with whole_file(part / block_file(index)) as path:
                save_file(block_tensors(taps), path)
            write_atomic(checkpoint.file(index, "json"), json.dumps({tap.name: description(tap) for tap in taps}))
            checkpoint.finish(index)
            del taps
        found = [json.loads(checkpoint.file(index, "json").read_text("utf-8")) for index in range(len(blocks))]
        samples, length = tokens.shape
        index = {"tokens": samples * length, "length": length, "blocks": found}
        write_atomic(part / INDEX, json.dumps(index, indent=1) + "\n")
        if folder.exists():  # a folder of before that has no index
            shutil.rmtree(folder)
        part.replace(folder)
        checkpoint.remove()


def block_tensors(taps: list[Tap]) -> dict[str, Tensor]:
    tensors = {}
    for tap in taps:
        tensors[f"{tap.name}/gram"] = tap.gram.matrix
        tensors |= {f"{tap.name}/{field}": getattr(tap.statistics, field) for field in STATISTICS}
    return {name: tensor.to("cpu").contiguous() for name, tensor in tensors.items()}


def description(tap: Tap) -> dict[str, Any]:
    """A tap's entry in index.json."""
    return {"layers": tap.layers, "inside": tap.inside, "in": len(tap.gram.matrix)}


def read_index(folder: Path) -> dict[str, Any]:
    """{tokens, length, blocks: [{tap: {layers, inside, in}}]}, taps in the order of their inputs.

    Raises InputError when the folder holds no complete Gram store.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise InputError(f"Expected the Grams of a calibration at {folder}, which has no {INDEX}.")
    return json.loads(path.read_text(encoding="utf-8"))


def read_block(folder: Path, index: int) -> Iterator[Tap]:
    """The taps of one block, each read when its turn comes; no other block is read.

    Raises InputError when its file is absent or damaged.
    """
    contents = read_index(folder)
    try:
        with safe_open(Path(folder) / block_file(index), "pt") as file:
            for name, entry in contents["blocks"][index].items():
                gram = Gram(file.get_tensor(f"{name}/gram"), contents["tokens"])
                fields = {field: file.get_tensor(f"{name}/{field}") for field in STATISTICS}
                statistics = Statistics(length=contents["length"], **fields)
                yield Tap(name, tuple(entry["layers"]), tuple(entry["inside"]), gram, statistics)
                del gram, fields, statistics
    except (OSError, SafetensorError) as error:
        raise InputError(f"The Gram file {block_file(index)} of {folder} cannot be read: {error}.") from error


def shared_blocks(
    folder: Path, blocks: Blocks, start: int = 0, finished: Callable[[int], None] = lambda index: None
) -> Iterator[tuple[int, Iterator[Tap]]]:
    """The taps of each block in a Gram store, read one by one; meanwhile the block of the model is open.

    finished: called when nothing of a block is needed any more.
    """
    for index in range(start, len(read_index(folder)["blocks"])):
        with blocks.open(index):
            yield index, read_block(folder, index)
        finished(index)


# ----------------------------------------------------------------------------------------------------------- sharing


def cache() -> Path:
    """The folder of all Gram stores, which studies in other folders may share."""
    return Path(os.environ.get(CACHE) or "results/grams")


def content(
    fingerprint: Path, model: Mapping[str, Any], tokens: Path, dtype: str | None, code: str, device: str
) -> Any:
    """What decides the Grams.

    fingerprint: what fingerprint.py wrote of the model; model: its config entry; code: hash of that of the job.
    """
    return {
        "model": json.loads(fingerprint.read_text("utf-8"))["files"],
        "loading": {"dtype": dtype or model.get("dtype"), "trust_remote_code": model.get("trust_remote_code")},
        "tokens": sha256(tokens),
        "code": code,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "device": device,
    }


def store_of(pointer: Path) -> Path:
    """The folder of the Grams that the file names, which the gram rule leaves; a folder stands for itself."""
    if pointer.is_dir():
        return pointer
    folder = Path(json.loads(pointer.read_text("utf-8"))["store"])
    if not (folder / INDEX).is_file():
        raise InputError(f"The Grams of {pointer} are no longer at {folder}: delete {pointer}, and run again.")
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="what fingerprint.py wrote of the model")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration tokens, safetensors")
    parser.add_argument("--code", default="", help="hash of the code that decides the Grams")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that will say where the Grams are")
    parser.add_argument("--dtype", help="of the forward passes (default: the model's)")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    set_threads(args.threads)
    fingerprint = content(args.fingerprint, args.model, args.tokens, args.dtype, args.code, args.device)
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache() / key
    if (folder / INDEX).is_file():
        print(f"The same Grams were computed before: {folder}", file=sys.stderr)
    else:
        tokens = torch.from_numpy(read_tokens(args.tokens)[0])
        model = {**args.model, "dtype": args.dtype} if args.dtype else args.model
        write_gram(folder, LazyBlocks(model, args.device), tokens, fingerprint)
    write_atomic(args.out, json.dumps({"store": str(folder), "key": key}, indent=1) + "\n")


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
