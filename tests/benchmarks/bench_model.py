"""Minutes that a method takes on a model of a given shape, from some of its blocks.

    python -m tests.benchmarks.bench_model --shape llama-2-7b --blocks 2 --device cuda --methods wanda sparsegpt awp

Only the measured blocks are built, and one before them that warms up and is not counted: random weights, random tokens
that pass through them, as sequential mode does it: the Grams of a block, its layers solved, the block run again. What
the measured blocks take on average is multiplied by the model's number of blocks. A method may have parameters:
frank_wolfe:step=pairwise,iterations=500.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.modes import in_turn
from layerwise.calibration.taps import Tap
from layerwise.compression.cell import visit
from layerwise.compression.solver import Solver
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.target import Target
from layerwise.runtime.provenance import peak_mb

VOCABULARY = 1024  # embeddings and head are no part of what is measured


def shape(hidden: int, width: int, blocks: int, heads: int, shared: int | None = None) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": shared or heads,
    }


SHAPES = {
    "tiny": shape(64, 96, 5, 4, 2),
    "llama-1.1b": shape(2048, 5632, 22, 32, 4),
    "llama-2-7b": shape(4096, 11008, 32, 32),
    "llama-3-8b": shape(4096, 14336, 32, 32, 8),
    "llama-2-13b": shape(5120, 13824, 40, 40),
    "llama-2-70b": shape(8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Phases:
    """Seconds of one block: its Grams, from one pass; its layers; the pass through the compressed block."""

    grams: float
    solving: float
    again: float

    @property
    def all(self) -> float:
        return self.grams + self.solving + self.again


@dataclass(frozen=True)
class Measured:
    """A method: the first block and those after it; peaks in MB, on the device none where it is the processor."""

    method: str
    first: Phases
    others: list[Phases]
    host_mb: float
    device_mb: float | None

    def minutes(self, blocks: int) -> tuple[float, float]:
        """Of a model of so many: sequential mode, and a cell in shared mode, where the Grams are there already."""
        whole, solving = (mean(values) for values in zip(*((one.all, one.solving) for one in self.others), strict=True))
        return blocks * whole / 60, blocks * solving / 60


def build(name: str, blocks: int, dtype: str, length: int, device: torch.device) -> LlamaForCausalLM:
    """A random model of the shape with so many blocks, on the device."""
    sides: dict[str, Any] = {**SHAPES[name], "num_hidden_layers": blocks}
    config = LlamaConfig(**sides, vocab_size=VOCABULARY, max_position_embeddings=length)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # never the float32 of the whole
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def walk(model: LlamaForCausalLM, tokens: Tensor, solver: Solver) -> Iterator[Phases]:
    """Compress the model block by block, in sequential mode, in place."""
    stream = Stream(model, tokens)
    for index in range(len(stream.blocks)):
        start = now(stream.device)
        taps: list[Tap] = stream.collect(index)
        collected = now(stream.device)
        for _ in visit(model, [(index, in_turn(taps))], solver.solve, lambda row: None):
            pass
        solved = now(stream.device)
        stream.advance(index)
        yield Phases(collected - start, solved - collected, now(stream.device) - solved)


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def parsed(method: str) -> tuple[str, dict[str, Any]]:
    """Name and parameters of `name` or `name:key=value,...`."""
    name, _, rest = method.partition(":")
    pairs = (part.partition("=") for part in rest.split(",") if part)
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}


def measure(method: str, args: argparse.Namespace, tokens: Tensor) -> Measured:
    catalogue, device = Catalogue(), torch.device(args.device)
    name, given = parsed(method)
    model = build(args.shape, args.blocks + 1, args.dtype, args.length, device)
    built = catalogue.build(name, catalogue.complete(name, given, method))
    solver = Solver(name, built, Target(sparsity=args.sparsity, pattern=args.pattern), 0, model.dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, *others = walk(model, tokens, solver)
    most = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    return Measured(method, first, others, peak_mb(), most)


def machine(device: torch.device) -> str:
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    return f"{what}, torch {torch.__version__}, {threads} threads, load {load:.1f}"


def table(found: list[Measured], blocks: int) -> list[str]:
    """Seconds of a block, and minutes of all blocks, as Markdown."""
    heads = ["Grams", "solving", "again", "first block", "sequential, min", "shared, min", "device, MB", "host, MB"]
    lines = ["| s per block | " + " | ".join(heads) + " |", "|:--|" + "--:|" * len(heads)]
    for one in found:
        phases = [mean(getattr(other, key) for other in one.others) for key in ("grams", "solving", "again")]
        device = "–" if one.device_mb is None else f"{one.device_mb:.0f}"
        numbers = [f"{value:.2f}" for value in (*phases, one.first.all, *one.minutes(blocks))]
        lines.append("| " + " | ".join([one.method, *numbers, device, f"{one.host_mb:.0f}"]) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--blocks", type=int, default=2, help="measured, besides the first")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "awp", "frank_wolfe", "sparse_swaps"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="row")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    if args.blocks < 2:
        parser.error("--blocks must be 2 at least: one says nothing about how they differ")
    torch.set_num_threads(args.threads)
    tokens = torch.randint(VOCABULARY, (args.samples, args.length), generator=torch.Generator().manual_seed(0))
    found, blocks = [], SHAPES[args.shape]["num_hidden_layers"]
    for method in args.methods:
        found.append(measure(method, args, tokens))
        sequential, shared = found[-1].minutes(blocks)
        print(f"{method}: {sequential:.1f} min sequential, {shared:.1f} min shared", flush=True)
    print("", *table(found, blocks), "", sep="\n")
    print(
        f"{args.shape}, {blocks} blocks from {args.blocks}, {args.samples} x {args.length} tokens, "
        f"{args.sparsity:.0%} {args.pattern}, {args.dtype}; {machine(torch.device(args.device))}"
    )


if __name__ == "__main__":
    main()
