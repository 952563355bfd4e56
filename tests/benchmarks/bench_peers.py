"""This suite beside other codes in one run: llm-compressor on a model, and released codes on its layers.

    python -m tests.benchmarks.bench_peers MODEL CALIBRATION EVALUATION --peer PEER/bin/python --released FOLDER

MODEL is a local folder; CALIBRATION and EVALUATION are token files of a study (results/tokens/). PEER is an environment
with llm-compressor, which this one does not need; FOLDER holds clones named as in RELEASED. Either may be left out.

In the first table each side gets the loaded model and the tokens, compresses all blocks from the inputs that the blocks
before give once compressed, and saves a folder, whose perplexity is evaluated here. Timed is the call alone, oneshot or
compress_model. In the second, both get the weight and the Gram of a layer, one for each shape in a block of the model.
The codes are as released; only what they ask of CUDA is done by the processor. Medians of rounds taken in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import layerwise
from layerwise.calibration.block_stream import Stream
from layerwise.contract.layer import Gram, Layer, Method, Target
from layerwise.evaluation.perplexity import evaluate
from layerwise.methods.alps import ALPS
from layerwise.methods.gptq import GPTQ
from layerwise.methods.quantease import QuantEase
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.models.loading import load
from layerwise.models.structure import find_blocks, model_linears
from layerwise.sources.tokens import read_tokens
from tests.benchmarks.suite import layer_of

BLOCK, DAMPING = 128, 0.01
HALF, GRID = Target(0.5, "layer"), Target(bits=4, group=64)
PEER = """
import json, sys, time
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM

job = json.load(sys.stdin)
torch.set_num_threads(job["threads"])
clock = time.process_time if job["threads"] == 1 else time.perf_counter
linear = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
columns = {"block_size": job["block"], "dampening_frac": job["damping"]}
weights = QuantizationArgs(num_bits=4, strategy="group", group_size=64, symmetric=False)
scheme = QuantizationScheme(targets=linear["targets"], weights=weights)
recipe = {
    "wanda": lambda: WandaPruningModifier(sparsity=0.5, mask_structure="0:0", **linear),
    "sparsegpt": lambda: SparseGPTModifier(sparsity=0.5, mask_structure="0:0", **columns, **linear),
    "gptq": lambda: GPTQModifier(
        config_groups={"group_0": scheme}, actorder="static", ignore=linear["ignore"], **columns
    ),
}[job["method"]]()
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True)
tokens = job["tokens"]
data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
sizes = {"num_calibration_samples": len(tokens), "max_seq_length": len(tokens[0])}
start = clock()
oneshot(model=model, dataset=data, recipe=recipe, shuffle_calibration_samples=False, **sizes)
seconds = clock() - start
dense = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, local_files_only=True)
state = model.state_dict()
with torch.no_grad():
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not dense.get_output_embeddings():
            module.weight.copy_(state[f"{name}.weight"])  # on their grid's values where it is quantised
dense.save_pretrained(job["out"])
print(json.dumps({"seconds": seconds}))
"""


@dataclass(frozen=True)
class Case:
    """A method of both: our target and settings, which are those that the peer's recipe asks for."""

    method: str
    target: str
    settings: dict[str, Any]


COLUMNS = {"blocksize": BLOCK, "damping": DAMPING}
# llm-compressor's Wanda prunes half of each row. In its SparseGPT all rows of a block of columns compete. Its grids are
# fitted to the dense weight, and columns are taken by falling diagonal of the Gram.
CASES = [
    Case("wanda", "50% row", {}),
    Case("sparsegpt", "50% layer", COLUMNS),
    Case("gptq", "4b g64", {**COLUMNS, "act_order": True, "static_groups": True}),
]
MODEL_HEAD = ["", "ours, s", "llm-compressor, s", "gain", "perplexity, ours", "theirs", "difference, %"]
LAYER_HEAD = ["", "shape", "ours, ms", "released, ms", "gain", "error, ours", "released"]


def read_loops() -> None:
    """Each method once on a small layer, so that no compiled loop is read from its file within a time."""
    layer = layer_of(64, 128)
    for case in CASES:
        layerwise.compress_layer(layer.weight, layer.gram, case.target, case.method, **case.settings)
    for code in RELEASED.values():
        code.ours.compress(layer, code.target, torch.Generator())


def cannot_import(python: str) -> str | None:
    """Why that Python has no llm-compressor, or None."""
    try:
        found = subprocess.run([python, "-c", "import llmcompressor"], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return (found.stderr.strip().splitlines() or ["no message"])[-1] if found.returncode else None


# ------------------------------------------------------------------------------------------------- a whole model


def load_folder(folder: Path) -> PreTrainedModel:
    return load({"path": str(folder), "name": folder.name, "dtype": "float32"})


def shortened(folder: Path, count: int, out: Path) -> Path:
    """A copy of the model's folder with its first blocks only."""
    model = load_folder(folder)
    del find_blocks(model)[1][count:]
    model.config.num_hidden_layers = count
    model.save_pretrained(out)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, out)
    return out


def ours(case: Case, model_folder: Path, tokens: Tensor, out: Path, args: argparse.Namespace) -> float:
    """Seconds of our side, which saves the compressed model in `out`."""
    model = load_folder(model_folder)
    start = args.clock()
    layerwise.compress_model(
        model, tokens, case.target, case.method, mode="sequential", progress=False, **case.settings
    )
    seconds = args.clock() - start
    model.save_pretrained(out)
    return seconds


def theirs(case: Case, model_folder: Path, tokens: Tensor, out: Path, args: argparse.Namespace) -> float:
    """The same of llm-compressor, in a process of its own."""
    job = {"model": str(model_folder.resolve()), "out": str(out), "method": case.method, "tokens": tokens.tolist()}
    job |= {"block": BLOCK, "damping": DAMPING, "threads": args.threads}
    run = subprocess.run(
        [args.peer, "-c", PEER],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=out,
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
    )
    if run.returncode:
        raise SystemExit(f"llm-compressor failed on {case.method}: {run.stderr.strip()[-2000:]}")
    return float(json.loads(run.stdout.splitlines()[-1])["seconds"])


def rows_of_model(model_folder: Path, tokens: Tensor, windows: Tensor, args: argparse.Namespace) -> Iterator[list[str]]:
    """A row for each case, when all rounds are over."""
    seconds: dict[tuple[str, str], list[float]] = {}
    perplexities: dict[tuple[str, str], float] = {}
    for number in range(args.rounds):
        for case, side in itertools.product(CASES, (ours, theirs)):
            with tempfile.TemporaryDirectory() as out:
                key = case.method, side.__name__
                seconds.setdefault(key, []).append(side(case, model_folder, tokens, Path(out), args))
                if number == 0:
                    perplexities[key] = evaluate(load_folder(Path(out)), windows)["perplexity"]
    for case in CASES:
        here, there = (median(seconds[case.method, side]) for side in ("ours", "theirs"))
        mine, other = (perplexities[case.method, side] for side in ("ours", "theirs"))
        numbers = [f"{here:.2f}", f"{there:.2f}", f"{there / here:.1f}", f"{mine:.2f}", f"{other:.2f}"]
        yield [f"{case.method} {case.target}", *numbers, f"{100 * (mine / other - 1):+.2f}"]


# ------------------------------------------------------------------------------------------------ released codes


@contextlib.contextmanager
def imported(folder: Path, name: str) -> Iterator[Any]:
    """A module of a released code, in which CUDA's device is the processor, its clock stands and nothing is printed."""
    to: Callable[..., Tensor] = Tensor.to

    def to_processor(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(tensor, *("cpu" if own == "cuda:0" else own for own in args), **kwargs)

    with (
        mock.patch.object(sys, "path", [str(folder), *sys.path]),
        mock.patch.dict(sys.modules),
        mock.patch.multiple(torch.cuda, synchronize=mock.MagicMock(), Event=mock.MagicMock()),
        mock.patch.object(Tensor, "to", to_processor),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield importlib.import_module(name)


def released_sparsegpt(code: Any, linear: nn.Linear, layer: Layer) -> Callable[[], object]:
    solver = code.SparseGPT(linear)
    solver.H = layer.gram.matrix.clone()
    return lambda: solver.fasterprune(HALF.sparsity, blocksize=BLOCK, percdamp=DAMPING)


def released_gptq(code: Any, linear: nn.Linear, layer: Layer) -> Callable[[], object]:
    solver = code.GPTQ(linear)
    solver.H, solver.quantizer = layer.gram.matrix.clone(), quantizer(code)
    return lambda: solver.fasterquant(blocksize=BLOCK, percdamp=DAMPING, groupsize=GRID.group)


def released_alps(code: Any, linear: nn.Linear, layer: Layer) -> Callable[[], object]:
    solver = code.ALPS_prune(linear, 1, layer.gram.tokens)
    solver.XtX = layer.gram.matrix * layer.gram.tokens
    return lambda: solver.ALPS_admm(HALF.sparsity)


def released_quantease(code: Any, linear: nn.Linear, layer: Layer) -> Callable[[], object]:
    solver = code.QuantEase(linear)
    solver.XtX, solver.quantizer = layer.gram.matrix * layer.gram.tokens, quantizer(sys.modules["method.quant"])
    return lambda: solver.fasterquant(group_size=GRID.group, static_groups=False, actorder=False)


def quantizer(code: Any) -> Any:
    """Asymmetric grids of 4 bits between the least and the largest weight."""
    found = code.Quantizer()
    found.configure(GRID.bits, perchannel=True, sym=False, mse=False)
    return found


@dataclass(frozen=True)
class Released:
    """A released code: its folder and module. prepared: takes the module, a linear layer, which it is to change, and
    the layer's problem. ours, target: our method with the same settings."""

    folder: str
    module: str
    prepared: Callable[[Any, nn.Linear, Layer], Callable[[], object]]
    ours: Method
    target: Target


RELEASED = {
    "sparsegpt": Released("sparsegpt", "sparsegpt", released_sparsegpt, SparseGPT(BLOCK, DAMPING), HALF),
    "gptq": Released("gptq", "gptq", released_gptq, GPTQ(BLOCK, DAMPING), GRID),
    "alps": Released("ALPS", "alps", released_alps, ALPS(damping=DAMPING), HALF),
    "quantease": Released("QuantEase", "method.quantease", released_quantease, QuantEase(), GRID),
}


def layers_of(folder: Path, tokens: Tensor) -> list[Layer]:
    """One layer for each shape in the middle block of a model, with the dense model's Grams."""
    model = load_folder(folder)
    stream = Stream(model, tokens)
    for index in range(len(stream.blocks) // 2):
        stream.advance(index)
    weights, found = model_linears(model), dict[tuple[int, int], Layer]()
    for tap in stream.collect(len(stream.blocks) // 2):
        for name in tap.layers:
            weight = weights[name].weight().clone()
            found.setdefault((weight.shape[0], weight.shape[1]), Layer(name, weight, tap.gram, tap.statistics))
    return list(found.values())


def rows_of_layers(layers: list[Layer], args: argparse.Namespace) -> Iterator[list[str]]:
    for name, code in RELEASED.items():
        for layer in layers:
            rounds = [(solved(code, layer, args), released(code, layer, args)) for _ in range(args.rounds)]
            here, there = (median(run[side][0] for run in rounds) for side in (0, 1))
            errors = [layerwise.output_error(layer.weight, weight, layer.gram) for _, weight in rounds[-1]]
            out, inputs = layer.weight.shape
            numbers = [f"{1e3 * here:.1f}", f"{1e3 * there:.1f}", f"{there / here:.1f}"]
            yield [f"{name} {code.target.label}", f"{out} x {inputs}", *numbers, *(f"{error:.5f}" for error in errors)]


def solved(code: Released, layer: Layer, args: argparse.Namespace) -> tuple[float, Tensor]:
    """Seconds of our method, with nothing kept on the layer's Gram, and its weight [out, in]."""
    afresh = replace(layer, gram=Gram(layer.gram.matrix, layer.gram.tokens))
    start = args.clock()
    result = code.ours.compress(afresh, code.target, torch.Generator())
    return args.clock() - start, result.weight


def released(code: Released, layer: Layer, args: argparse.Namespace) -> tuple[float, Tensor]:
    """Seconds of a released code, and its weight [out, in]."""
    out, inputs = layer.weight.shape
    linear = nn.Linear(inputs, out, bias=False).requires_grad_(False)
    linear.weight.copy_(layer.weight)
    with imported(args.released / code.folder, code.module) as module:
        run = code.prepared(module, linear, layer)
        start = args.clock()
        run()
        return args.clock() - start, linear.weight.detach().clone()


# --------------------------------------------------------------------------------------------------------- main


def table(head: list[str], rows: Iterator[list[str]]) -> None:
    print("", "| " + " | ".join(head) + " |", "|:--|" + "--:|" * (len(head) - 1), sep="\n", flush=True)
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "evaluation"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--peer", help="a Python that can import llmcompressor")
    parser.add_argument("--released", type=Path, help="folder of the released codes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="of the calibration tokens (default: all)")
    parser.add_argument("--windows", type=int, help="of the evaluation tokens (default: all)")
    parser.add_argument("--blocks", type=int, help="of the model, the first ones (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    if not (args.peer or args.released):
        parser.error("--peer or --released must be given. Got neither instead.")
    if args.peer and (reason := cannot_import(args.peer)):
        parser.error(f"--peer must be a Python that can import llmcompressor. Got {args.peer} ({reason}) instead.")
    lacking = [own.folder for own in RELEASED.values() if args.released and not (args.released / own.folder).is_dir()]
    if lacking:
        parser.error(f"--released must hold {', '.join(lacking)}. Got {args.released} without them instead.")
    torch.set_num_threads(args.threads)
    # One thread is timed by its own clock, which stands still while other programs have their turns.
    args.clock = time.process_time if args.threads == 1 else time.perf_counter
    tokens, windows = (
        torch.from_numpy(read_tokens(path)[0][:count]).long()
        for path, count in ((args.calibration, args.samples), (args.evaluation, args.windows))
    )
    read_loops()
    with tempfile.TemporaryDirectory() as scratch:
        model = shortened(args.model, args.blocks, Path(scratch)) if args.blocks else args.model
        if args.peer:
            table(MODEL_HEAD, rows_of_model(model, tokens, windows, args))
        if args.released:
            table(LAYER_HEAD, rows_of_layers(layers_of(model, tokens), args))
    print(
        f"\n{len(tokens)} x {tokens.shape[1]} tokens, {len(windows)} windows, {args.threads} threads, medians of "
        f"{args.rounds} rounds, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
