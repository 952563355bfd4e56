"""Shared calibration: compute every tap's Gram in the dense model in one forward pass, stored block by block."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.gram_store import INDEX, block_file, block_tensors, content, description, point_to, scopes
from layerwise.calibration.taps import Tap
from layerwise.models import compute_dtype
from layerwise.models.loading import computed_dtype, set_threads
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Blocks
from layerwise.runtime.checkpoint import Checkpoint
from layerwise.runtime.devices import take
from layerwise.runtime.errors import report_errors
from layerwise.runtime.files import gram_stores, remove_parts, unchanged, whole_file, write_atomic
from layerwise.sources.fingerprint import check_unchanged
from layerwise.sources.tokens import read_tokens


def shared(stream: Stream, start: int = 0) -> Iterator[list[Tap]]:
    """The taps of each block in turn, from one pass of the stream through the unchanged model."""
    for index in range(start, len(stream.blocks)):
        with stream.source.open(index):
            taps = stream.collect(index, advance=True)
        yield taps
        del taps  # frees them before the next block's taps


def write_gram(
    folder: Path,
    blocks: Blocks,
    tokens: Tensor,
    fingerprint: Mapping[str, Any],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write the taps of each block of a model for tokens [samples, length] to `folder`, which exists only when
    complete.

    block-000.safetensors ... hold float32 tensors "{tap}/gram" [in, in], "{tap}/mean", "{tap}/absmean" and
    "{tap}/sequence_variance" [in], "{tap}/sample" [rows, in] and, except for experts, "{tap}/first_tokens" [sequences,
    in]; index.json says which layers a tap serves. A killed process leaves its finished blocks next to the folder, and
    the next process resumes there if its fingerprint is the same. check: raises InputError if the model no longer
    matches its fingerprint.
    """
    with Checkpoint(folder.with_name(f".{folder.name}.part"), fingerprint, check) as checkpoint:
        if (folder / INDEX).is_file():  # another process finished while this one waited
            return checkpoint.remove()
        part = checkpoint.folder / "store"
        if not all((part / block_file(index)).is_file() for index in range(checkpoint.done)):
            checkpoint.restart()  # its blocks were made into a store that was removed later
        done = checkpoint.done
        part.mkdir(exist_ok=True)
        remove_parts(part)
        stream = Stream(blocks, tokens, folder=checkpoint.folder, start=done)
        progress = tqdm(shared(stream, done), "calibrate", total=len(blocks), initial=done, unit="block")
        for index, taps in enumerate(progress, done):
            with whole_file(part / block_file(index)) as path:
                save_file(block_tensors(taps), path)
            write_atomic(checkpoint.file(index, "json"), json.dumps({tap.name: description(tap) for tap in taps}))
            checkpoint.finish(index)
            taps.clear()  # the progress bar still refers to the list
        found = [json.loads(checkpoint.file(index, "json").read_text("utf-8")) for index in range(len(blocks))]
        hashes = [checkpoint.hashes[f"{part.name}/{block_file(index)}"] for index in range(len(blocks))]
        contents = {"length": tokens.shape[1], "compute_dtype": computed_dtype(blocks.model)}
        contents |= {"blocks": found, "sha256": hashes}
        write_atomic(part / INDEX, json.dumps(contents, indent=1) + "\n")
        if folder.exists():  # an old folder without an index
            shutil.rmtree(folder)
        part.replace(folder)
        checkpoint.remove()


def main(
    argv: list[str] | None = None, before: Callable[[Mapping[str, Any], Path, Path, str], object] | None = None
) -> None:
    """before: called first, with the model's entry, its fingerprint, the tokens' file and the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="the model's fingerprint, from fingerprint.py")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration tokens, safetensors")
    parser.add_argument("--code", type=Path, help="file that names the code on which the Grams depend, and its hash")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, with the location of the Grams")
    parser.add_argument("--dtype", help="dtype of the forward passes (default: the model's)")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)

    set_threads(args.threads)
    if before:
        before(args.model, args.fingerprint, args.tokens, args.device)
    code = unchanged(args.code) if args.code else ""
    model = compute_dtype.at(args.model, args.dtype)
    computed = compute_dtype.compute_dtype(model, args.device)
    fingerprint = content(args.fingerprint, model, args.tokens, computed, code, args.device)
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:32]
    folder = gram_stores() / key
    if (folder / INDEX).is_file():
        print(f"The same Grams already exist: {folder} ({scopes(folder)})", file=sys.stderr)
    else:
        check = partial(check_unchanged, args.model, args.fingerprint)
        check()  # before the model is opened; the checkpoint checks again
        take(args.device)
        tokens = torch.from_numpy(read_tokens(args.tokens)[0])
        compute_dtype.tell(model, computed, args.device)
        write_gram(folder, LazyBlocks(model, args.device, computed), tokens, fingerprint, check)
    point_to(folder, args.out)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
