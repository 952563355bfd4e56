"""Whether the walk through a model's blocks is the model: checked once per model, before anything is calibrated.

Calibration, compression and perplexity pass one block after the other, each called once with the hidden states of the
one before. A model that loops over its blocks, has a second stack of them or looks ahead would give a number that is
not its own. docs/guards.md lists what is seen here and what is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibration.block_stream import Stream
from layerwise.evaluation.perplexity import to_last_block
from layerwise.models.loading import check_tokens, dtype_name, load, set_threads, vocabulary
from layerwise.models.streaming import SHARE, LazyBlocks, free_bytes
from layerwise.models.structure import Blocks, block_lists, check_unshared, few, is_linear
from layerwise.runtime.devices import take
from layerwise.runtime.errors import InputError, out_of_memory, report_errors
from layerwise.runtime.files import write_atomic
from layerwise.runtime.sentences import reason
from layerwise.sources.fingerprint import unchanging
from layerwise.sources.hub import read_json
from layerwise.sources.tokenizer_files import check_task_tokens, load_tokenizer
from layerwise.sources.tokens import read_tokens

WINDOW = 64  # tokens of the window; it is run twice, with another last token, by the library and by the walk
# Largest difference of logits, as a share of the largest logit. The same operations on the same numbers give none;
# other kernels for other shapes give some.
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


def check_model(spec: Mapping[str, Any], tokens: Tensor, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Check a config's model on the first of its calibration sequences [sequences, length].

    The reference is the library's forward pass of the model as from_pretrained loads it, where it fits into memory;
    otherwise that of the skeleton whose blocks are read when they are run. Both in float32, in which a small leak is
    no rounding, and which every processor is fast in.
    Returns the record that the job writes. Raises InputError for a model that the walk is not.
    """
    spec = {**spec, "dtype": "float32"}
    lazy = LazyBlocks(spec, device)
    size = sum(own.nbytes for own in lazy.model.parameters())
    whole = size <= SHARE * free_bytes(lazy.device)
    with refusing(lazy):
        found = check_walk(lazy, Blocks(load(spec, device)) if whole else lazy, tokens)
    reference = "from_pretrained" if whole else "block by block"
    return found | {"reference": reference, "vocabulary": vocabulary(lazy.model)}


@contextmanager
def refusing(blocks: Blocks) -> Iterator[None]:
    """Within it whatever a model's own code raises becomes an InputError: it knows nothing of the walk."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(
            f"{type(blocks.model).__name__} cannot be run one block after the other: {type(error).__name__}, "
            f"{reason(error)}."
        ) from error


@torch.no_grad()
def check_walk(blocks: Blocks, reference: Blocks, tokens: Tensor) -> dict[str, Any]:
    """The same for blocks that are walked through and the model whose own forward pass is right."""
    check_unshared(blocks.model)
    name = type(blocks.model).__name__
    pair = window_pair(blocks, tokens)
    expected = own_logits(reference, pair).double()
    if not torch.isfinite(expected).all():  # float16 that overflows; the cells of such a model have diverged
        return {"window": pair.shape[1], "finite": False}
    tolerance, scale = TOLERANCE[dtype_name(blocks.model)], float(expected.abs().max())
    ahead = float((expected[0, :-1] - expected[1, :-1]).abs().max()) / scale
    if ahead > tolerance:
        raise InputError(
            f"{name} is not causal: another last token changes the logits before it by {ahead:.1e} of the largest, so "
            "that its perplexity means nothing."
        )
    walked = walk_logits(blocks, pair).double()
    apart = float((walked - expected).abs().max()) / scale
    if not apart <= tolerance:
        raise InputError(
            f"{name} is more than its blocks one after the other: the logits of the walk through {blocks.name} differ "
            f"from the model's own by {apart:.1e} of the largest, and at most {tolerance:.0e} is rounding."
        )
    return {"window": pair.shape[1], "finite": True, "walk_difference": apart, "causality_difference": ahead}


def window_pair(blocks: Blocks, tokens: Tensor) -> Tensor:
    """[2, length] the beginning of the first sequence, and the same with another last token."""
    check_tokens(blocks.model, tokens)
    window = tokens[0, :WINDOW]
    other = window.clone()
    other[-1] = (other[-1] + 1) % vocabulary(blocks.model)
    return torch.stack([window, other])


def own_logits(blocks: Blocks, tokens: Tensor) -> Tensor:
    """[sequences, length, vocabulary] the library's own forward pass, on the CPU.

    Raises InputError unless it calls every block exactly once, in order, and no other list of blocks.
    """
    name, calls = type(blocks.model).__name__, list[int]()
    elsewhere = list[str]()
    with ExitStack() as stack:
        for index, block in enumerate(blocks.modules):
            hook = block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
            stack.callback(hook.remove)
        for other, module in linears_of_other_lists(blocks):
            hook = module.register_forward_pre_hook(lambda *_, other=other: elsewhere.append(other))
            stack.callback(hook.remove)
        with blocks.outside():
            logits = blocks.model(input_ids=tokens.to(blocks.device), use_cache=False).logits.to("cpu")
    if not calls:
        raise InputError(f"{name} does not call {blocks.name}, the largest of its lists of blocks.")
    if calls != list(range(len(blocks))):
        counts = sorted({calls.count(index) for index in range(len(blocks))})
        times = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        how = "in another order" if counts == [1] else f"{times} times"
        raise InputError(f"{name} must call each block of {blocks.name} once, in order. It calls them {how} instead.")
    if elsewhere:
        raise InputError(
            f"{name} must have one list of blocks, {blocks.name}. It also has {few(set(elsewhere))}, which would not "
            "be compressed."
        )
    return logits


def linears_of_other_lists(blocks: Blocks) -> list[tuple[str, nn.Module]]:
    """Name of the list, and linear layer, of all that lies in lists of modules other than the blocks."""
    return [
        (name, module)
        for name, modules in block_lists(blocks.model)
        if modules is not blocks.modules
        for module in modules.modules()
        if is_linear(module)
    ]


def walk_logits(blocks: Blocks, tokens: Tensor) -> Tensor:
    """[sequences, length, vocabulary] by the walk that the jobs make, on the CPU."""
    stream = Stream(blocks, tokens, len(tokens))
    for _ in to_last_block(stream):
        pass
    with blocks.open(len(blocks) - 1), blocks.outside():
        return stream.logits(0, tokens).to("cpu")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="what fingerprint.py wrote of the model")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration tokens, safetensors")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for what was found")
    parser.add_argument(
        "--tasks", type=Path, nargs="*", default=[], help="what zero_shot.py wrote of each set of tasks"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    set_threads(args.threads)
    with unchanging(args.model, args.fingerprint):
        take(args.device)
        tokens = torch.from_numpy(read_tokens(args.tokens)[0])
        found = check_model(args.model, tokens, args.device)
        if args.tasks:
            tasks = [task for path in args.tasks for task in read_json(path)["tasks"].items()]
            generating = [name for name, task in tasks if task["generates"]]
            check_task_tokens(load_tokenizer(args.model), args.model, found["vocabulary"], generating)
    write_atomic(args.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
