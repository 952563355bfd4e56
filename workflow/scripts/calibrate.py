"""Shared calibration: the Gram of every tap of the dense model, from one forward pass, stored block by block."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from methods.base import Gram, Statistics
from workflow.scripts.devices import take
from workflow.scripts.models import load, set_threads
from workflow.scripts.propagate import Stream
from workflow.scripts.runtime import InputError, report_errors
from workflow.scripts.taps import Tap
from workflow.scripts.text import read_tokens

STATISTICS = ("mean", "absmean", "sequence_variance", "sample")


def shared(stream: Stream) -> Iterator[list[Tap]]:
    """The taps of each block in turn, as the stream passes through the model as it is, once."""
    for index in range(len(stream.blocks)):
        taps, outputs = stream.collect(index)
        stream.advance(index, outputs)
        yield taps
        del taps, outputs  # before the next block's


# ------------------------------------------------------------------------------------------------------------ store


def block_file(index: int) -> str:
    return f"block-{index:03d}.safetensors"


def write_gram(folder: Path, blocks: Iterable[list[Tap]]) -> None:
    """Write the taps of each block to `folder`, which takes its place, in exchange for an older one, when complete.

    block-000.safetensors ... hold float32 tensors "{tap}/gram" [in, in], "{tap}/mean", "{tap}/absmean" and
    "{tap}/sequence_variance" [in], "{tap}/sample" [rows, in]; index.json says which layers a tap serves.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        index: dict[str, Any] = {"tokens": 0, "length": 0, "blocks": []}
        for number, taps in enumerate(blocks):
            save_file(block_tensors(taps), part / block_file(number))
            index["blocks"].append({tap.name: description(tap) for tap in taps})
            for tap in taps:
                index |= {"tokens": tap.gram.tokens, "length": tap.statistics.length}
        (part / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8", newline="\n")
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
    path = Path(folder) / "index.json"
    if not path.is_file():
        raise InputError(f"Expected the Grams of a calibration at {folder}, which has no index.json.")
    return json.loads(path.read_text(encoding="utf-8"))


def read_block(folder: Path, index: int, device: str = "cpu") -> Iterator[Tap]:
    """The taps of one block on a device, each read when its turn comes; no other block is read.

    Raises InputError when its file is absent or damaged.
    """
    contents = read_index(folder)
    try:
        with safe_open(Path(folder) / block_file(index), "pt", device=device) as file:
            for name, entry in contents["blocks"][index].items():
                gram = Gram(file.get_tensor(f"{name}/gram"), contents["tokens"])
                fields = {field: file.get_tensor(f"{name}/{field}") for field in STATISTICS}
                statistics = Statistics(length=contents["length"], **fields)
                yield Tap(name, tuple(entry["layers"]), tuple(entry["inside"]), gram, statistics)
                del gram, fields, statistics
    except (OSError, SafetensorError) as error:
        raise InputError(f"The Gram file {block_file(index)} of {folder} cannot be read: {error}.") from error


def shared_blocks(folder: Path, device: str = "cpu") -> Iterator[tuple[int, Iterator[Tap]]]:
    """The blocks of a Gram store with their numbers, each tap read when its turn comes."""
    for index in range(len(read_index(folder)["blocks"])):
        yield index, read_block(folder, index, device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration tokens, safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder for the Grams")
    parser.add_argument("--dtype", help="of the forward passes (default: the model's)")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    take(args.device)
    set_threads(args.threads)
    tokens = torch.from_numpy(read_tokens(args.tokens)[0])
    model = {**args.model, "dtype": args.dtype} if args.dtype else args.model
    stream = Stream(load(model, args.device), tokens)
    write_gram(args.out, tqdm(shared(stream), "calibrate", total=len(stream.blocks), unit="block"))


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
