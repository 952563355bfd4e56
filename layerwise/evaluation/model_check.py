"""Check that a walk through a model's blocks gives the model's result, once per model, before any calibration.

Calibration, compression and perplexity run one block after another, each called once with the hidden states of the one
before. A model that loops over its blocks, has a second stack of blocks or is not causal would give wrong numbers.
docs/guards.md lists what this check detects and what it does not.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibration.block_stream import Stream
from layerwise.evaluation.checked import ensure_checked
from layerwise.evaluation.perplexity import to_last_block
from layerwise.models.loading import check_tokens, dtype_name, load, set_threads, vocabulary
from layerwise.models.streaming import SHARE, LazyBlocks, free_bytes
from layerwise.models.structure import Blocks, block_lists, check_unshared, few, is_linear
from layerwise.runtime.errors import InputError, out_of_memory, report_errors
from layerwise.runtime.files import write_atomic
from layerwise.runtime.sentences import reason
from layerwise.sources.fingerprint import unchanging
from layerwise.sources.hub import read_json
from layerwise.sources.tokenizer_files import check_task_tokens, load_tokenizer

WINDOW = 64  # tokens of the window, which is run three times, both by the library and by the walk
EARLY = 8  # index of the token changed in the third run; bidirectional prefixes are rarely shorter
# Largest difference of logits, relative to their size. The same operations on the same numbers give no difference;
# other kernels for other shapes give some.
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
SPREAD = 4  # smallest size of a logit, in median deviations of the logits from their median
OUTSIDE = 0.25  # largest share of weights in linear layers outside the blocks, relative to those inside


def check_model(spec: Mapping[str, Any], tokens: Tensor, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Check a config's model on its first calibration sequence, from [sequences, length].

    The reference is the library's forward pass of the model loaded by from_pretrained, if it fits into memory;
    otherwise that of the skeleton whose blocks are read when they are run. Both are computed in float32, in which a
    small leak is distinguishable from rounding and every processor is fast. Returns the record that the job writes.
    Raises InputError if the walk differs from the model.
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
    """Context in which any exception of a model's own code becomes an InputError; that code does not know the walk."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(
            f"{type(blocks.model).__name__} cannot be run block by block: {type(error).__name__}, {reason(error)}."
        ) from error


@torch.no_grad()
def check_walk(blocks: Blocks, reference: Blocks, tokens: Tensor) -> dict[str, Any]:
    """The same check for blocks that are walked through and a reference model whose own forward pass is right."""
    check_unshared(blocks.model)
    name = type(blocks.model).__name__
    windows = window_variants(blocks, tokens)
    # One at a time: a model in which sequences affect each other differs from the walk, which runs them together.
    expected = torch.cat([own_logits(reference, window) for window in windows.split(1)]).double()
    length = windows.shape[1]
    if not torch.isfinite(expected).any():  # the cells of such a model will have diverged
        return {"window": length, "finite": False}
    tolerance = TOLERANCE[dtype_name(blocks.model)]
    size = logit_size(expected)
    names = ("another last token", f"another token {EARLY}")
    ahead = {
        what: difference(expected[0, :place], other[:place], size[0, :place])
        for what, other, place in zip(names, expected[1:], changed_places(length), strict=True)
    }
    what, most = max(ahead.items(), key=lambda found: found[1])
    if not most <= tolerance:
        raise InputError(
            f"{name} is not causal: {what} changes the logits before it by {most:.1e} of their size, so its "
            f""
            "perplexity would be meaningless."
        )
    apart = difference(walk_logits(blocks, windows).double(), expected, size)
    if not apart <= tolerance:
        raise InputError(
            f"{name} must equal its blocks run one after another, but the logits of the walk through {blocks.name} "
            f""
            f"differ from the model's own by {apart:.1e} of their size; rounding explains at most {tolerance:.0e}."
        )
    return {"window": length, "finite": True, "walk_difference": apart, "causality_difference": most}


def logit_size(logits: Tensor) -> Tensor:
    """The size of each logit: its distance from the median of all logits, but at least SPREAD median deviations.

    A logit that a model masks with -1e9 or -Inf does not make the others small.
    """
    known = logits[torch.isfinite(logits)]
    middle = known.median()
    spread = SPREAD * (known - middle).abs().median()
    return (logits - middle).abs().clamp(min=float(spread) or 1.0)


def difference(one: Tensor, other: Tensor, size: Tensor) -> float:
    """The largest difference of two tensors of logits, as a share of their sizes.

    Infinite if the two do not have the same finite logits.
    """
    finite = torch.isfinite(other)
    if not torch.equal(torch.isfinite(one), finite):
        return math.inf
    if not finite.any():
        return 0.0
    return float(((one[finite] - other[finite]).abs() / size[finite]).max())


def changed_places(length: int) -> tuple[int, int]:
    """Indices of the changed token in the second and the third window."""
    return length - 1, min(EARLY, length - 1)


def window_variants(blocks: Blocks, tokens: Tensor) -> Tensor:
    """[3, length] the beginning of the first sequence: unchanged, with another last token, with another token EARLY."""
    check_tokens(blocks.model, tokens)
    windows = tokens[:1, :WINDOW].repeat(3, 1)
    for row, place in enumerate(changed_places(windows.shape[1]), 1):
        windows[row, place] = (windows[row, place] + 1) % vocabulary(blocks.model)
    return windows


def own_logits(blocks: Blocks, tokens: Tensor) -> Tensor:
    """[sequences, length, vocabulary] the library's own forward pass, on the CPU.

    Raises InputError unless it calls every block exactly once, in order, and few linear layers outside the blocks.
    """
    name, calls = type(blocks.model).__name__, list[int]()
    beside = dict[str, nn.Module]()
    with ExitStack() as stack:
        for index, block in enumerate(blocks.modules):
            hook = block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
            stack.callback(hook.remove)
        for other, module in linears_outside(blocks):
            hook = module.register_forward_pre_hook(lambda *_, layer=(other, module): beside.update([layer]))
            stack.callback(hook.remove)
        with blocks.outside():
            output = blocks.model(input_ids=tokens.to(blocks.device), use_cache=False)
            if not isinstance(getattr(output, "logits", None), Tensor):
                came = type(output).__name__
                raise InputError(
                    f"{name} must give logits, as a model of AutoModelForCausalLM does. Got {came} instead."
                )
            logits = output.logits.to("cpu")
    if not calls:
        raise InputError(f"{name} does not call {blocks.name}, the largest of its lists of blocks.")
    if calls != list(range(len(blocks))):
        counts = sorted({calls.count(index) for index in range(len(blocks))})
        times = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        how = "in another order" if counts == [1] else f"{times} times"
        raise InputError(f"{name} must call each block of {blocks.name} once, in order. It calls them {how} instead.")
    check_beside(blocks, beside)
    return logits


def check_beside(blocks: Blocks, beside: Mapping[str, nn.Module]) -> None:
    """Raise InputError for a second list of blocks, or if many of the weights that text passes are outside the blocks.

    beside: name -> linear layer outside the blocks that text passes.
    """
    name = type(blocks.model).__name__
    lists = {other for other, _ in block_lists(blocks.model)}
    if second := {other for other in lists if any(layer.startswith(f"{other}.") for layer in beside)}:
        raise InputError(
            f"{name} must have one list of blocks, {blocks.name}. It also has {few(second)}, which would not be "
            "compressed."
        )
    inside = sum(layer.get_parameter("weight").numel() for layer in filter(is_linear, blocks.modules.modules()))
    outside = sum(layer.get_parameter("weight").numel() for layer in beside.values())
    if outside > OUTSIDE * inside > 0:
        raise InputError(
            f"{name} must have its linear layers in {blocks.name}, which are compressed. It also passes {few(beside)}, "
            f"with {outside / inside:.0%} of the weights there."
        )


def linears_outside(blocks: Blocks) -> list[tuple[str, nn.Module]]:
    """(name, linear layer) for all outside the blocks, except the output embedding."""
    own = set(blocks.modules.modules()) | {blocks.model.get_output_embeddings()}
    return [(name, module) for name, module in blocks.model.named_modules() if is_linear(module) and module not in own]


def walk_logits(blocks: Blocks, tokens: Tensor) -> Tensor:
    """[sequences, length, vocabulary] by the walk that the jobs use, on the CPU."""
    stream = Stream(blocks, tokens, len(tokens))
    for _ in to_last_block(stream):
        pass
    with blocks.open(len(blocks) - 1), blocks.outside():
        return stream.logits(0, tokens).to("cpu")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="the model's fingerprint, from fingerprint.py")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration tokens, safetensors")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument(
        "--tasks", type=Path, nargs="*", default=[], help="description of each task set, from zero_shot.py"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    set_threads(args.threads)
    found = ensure_checked(args.model, args.fingerprint, args.tokens, args.device)
    if args.tasks:
        tasks = [task for path in args.tasks for task in read_json(path)["tasks"].items()]
        generating = [name for name, task in tasks if task["generates"]]
        with unchanging(args.model, args.fingerprint):
            check_task_tokens(load_tokenizer(args.model), args.model, found["vocabulary"], generating)
    write_atomic(args.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
