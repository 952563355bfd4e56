"""Calibration against the published way: one Gram per linear layer, summed in float32 over single sequences.

`published` is the walk of the released codes without the pass that compressed weights need, `floor` the forward pass
alone. Times are from the loaded model to the last Gram in memory, medians of runs taken in turns:

    python -m tests.benchmarks.bench_calibrate resources/demo --samples 32 --length 512 --rounds 5 --threads 2
"""

import argparse
import contextlib
import math
import os
import statistics
import time

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.calibrate import shared
from layerwise.models.loading import load, vocabulary
from layerwise.models.structure import find_blocks, is_linear


class Seen(Exception):
    """Ends a forward pass where the first block begins."""


def published(model: PreTrainedModel, tokens: Tensor, gram: bool = True) -> dict[str, Tensor]:
    """H [in, in] of each linear layer of the blocks, 2 / sequences of the sum of x xt; gram: False only passes through.

    As in the released SparseGPT and GPTQ codes: the inputs of the first block are caught, and each block in turn is
    run on one sequence at a time, while hooks on its linear layers add to their H.
    """
    blocks, calls = find_blocks(model)[1], {}
    inputs = []

    def catch(_: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs.append(args[0])
        calls.update(kwargs)
        raise Seen

    handle = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sequence in tokens:
        with contextlib.suppress(Seen):
            model(sequence[None], use_cache=False)
    handle.remove()
    sums: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        handles = [
            module.register_forward_hook(adder(sums, f"{index}.{name}"))
            for name, module in block.named_modules()
            if gram and is_linear(module)
        ]
        outputs = [block(hidden, **calls) for hidden in inputs]
        inputs = [output if isinstance(output, Tensor) else output[0] for output in outputs]
        for handle in handles:
            handle.remove()
    return sums


def adder(sums: dict[str, Tensor], name: str):
    """The released add_batch as a hook of one layer."""
    seen = 0

    def add(_: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal seen
        x = args[0].reshape(-1, args[0].shape[-1]).t()  # [in, tokens]
        if name not in sums:
            sums[name] = torch.zeros(len(x), len(x))
        sums[name] *= seen / (seen + 1)
        seen += 1
        x = math.sqrt(2 / seen) * x.float()
        sums[name] += x.matmul(x.t())

    return add


def ours(model: PreTrainedModel, tokens: Tensor) -> list:
    """Grams and statistics of every tap."""
    return list(shared(Stream(model, tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # One thread is timed by its own clock, which stands still while other programs have their turns.
    clock = time.process_time if args.threads == 1 else time.perf_counter
    model = load({"path": args.model, "dtype": "float32"})
    half = load({"path": args.model, "dtype": "bfloat16"})
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary(model), (args.samples, args.length), generator=rng)
    cases = {
        "one Gram per linear layer, published": lambda: published(model, tokens),
        "forward pass alone, published": lambda: published(model, tokens, gram=False),
        "ours": lambda: ours(model, tokens),
        "ours, forward in bfloat16": lambda: ours(half, tokens),
    }
    seconds: dict[str, list[float]] = {}
    with torch.no_grad():
        for _ in range(args.rounds):
            for name, call in cases.items():
                start = clock()
                call()
                seconds.setdefault(name, []).append(clock() - start)
    base = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"{name:<40}{middle:8.2f} s {min(times):8.2f} {base / middle:8.2f}x")
    print(f"{args.threads} threads, medians and minima of {args.rounds} rounds, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
