"""The dense model's hidden states after its last block on every window of an evaluation, computed once for all cells.

Each cell's evaluation computes the dense model's logits from them (divergence.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.hidden_states import write_values
from layerwise.evaluation.divergence import values_of
from layerwise.evaluation.model_check import TOLERANCE, difference, logit_size
from layerwise.evaluation.perplexity import batch_size, to_last_block
from layerwise.models.compute_dtype import compute_dtype, tell
from layerwise.models.loading import computed_dtype, set_threads, vocabulary
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Blocks
from layerwise.runtime.devices import take
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import read_made, sha256, whole_file, write_atomic
from layerwise.sources.fingerprint import unchanging
from layerwise.sources.tokens import read_tokens

COMPARED = 64  # number of last tokens of a window whose logits are compared in float64


@torch.no_grad()
def write_dense_states(blocks: Blocks, tokens: Tensor, out: Path, made_of: Mapping[str, Any]) -> None:
    """Write the states of windows [n, length], in the dtype of the forward passes, and the record `out`.

    They use the same batches as the evaluation of cells, so that the dense cell's own states are bit-identical.
    made_of: entries for the record. Raises InputError if logits computed from the states differ from those of the whole
    model.
    """
    words, folder = vocabulary(blocks.model), out.with_name(f".{out.stem}.states")
    shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
    try:
        stream = Stream(blocks, tokens, batch_size(tokens.shape[1], words), folder)
        last = len(stream.blocks) - 1
        for _ in to_last_block(stream):
            pass
        with blocks.open(last), whole_file(values_of(out)) as part:
            with returned_by(stream.blocks[last]) as returned:
                sizes, record = write_values(part, stream.outputs(last))
            with blocks.outside():
                check_last(stream, tokens[: sizes[0]], returned[0])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record |= {"windows": len(tokens), "returned": returned[0], "sha256": sha256(values_of(out)), **made_of}
    write_atomic(out, json.dumps(record, indent=1) + "\n")


@contextmanager
def returned_by(block: nn.Module) -> Iterator[list[int]]:
    """A list to which each call of the block adds: 0 if it returns a tensor, n for a tuple of n."""
    returned = list[int]()

    def note(_: nn.Module, args: Any, output: Any) -> None:
        returned.append(0 if isinstance(output, Tensor) else len(output))

    handle = block.register_forward_hook(note)
    try:
        yield returned
    finally:
        handle.remove()


def check_last(stream: Stream, tokens: Tensor, returned: int) -> None:
    """Raise InputError unless the model uses only hidden states from its last block; checked on the first batch."""
    after = next(stream.outputs(len(stream.blocks) - 1))
    whole, made = (
        logits[:, -COMPARED:].double()
        for logits in (stream.logits(0, tokens), stream.logits(0, tokens, after, returned))
    )
    if not torch.isfinite(whole).any():  # such logits have no divergence, as every cell's row will say
        return
    apart = difference(made, whole, logit_size(whole))
    if not apart <= TOLERANCE[computed_dtype(stream.model)]:
        raise InputError(
            f"{type(stream.model).__name__} must use only hidden states from its last block. Logits computed "
            f"from these alone differ from its own by {apart:.1e} of their size instead."
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="dense-states", description=__doc__)
    parser.add_argument("--model", type=json.loads, required=True, help="the model's config entry, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="the model's fingerprint, from fingerprint.py")
    parser.add_argument("--tokens", type=Path, required=True, help="evaluation tokens, safetensors")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="JSON file to write, with the description of the states; they are written next to it",
    )
    args = parser.parse_args(argv)
    set_threads(args.threads)
    with unchanging(args.model, args.fingerprint):
        take(args.device)
        computed = compute_dtype(args.model, args.device)
        tell(args.model, computed, args.device)
        made_of = {"tokens": sha256(args.tokens), "model": read_made(args.fingerprint)["files"]}
        tokens = torch.from_numpy(read_tokens(args.tokens)[0])
        write_dense_states(LazyBlocks(args.model, args.device, computed), tokens, args.out, made_of)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
