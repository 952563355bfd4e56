"""One cell: compress every linear layer of a model by one method, check and score each result.

shared: every layer sees the dense model's Gram. sequential: the Gram of a block comes from activations that passed
through the compressed blocks before it, as in the published codes.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.gram_store import shared_blocks, store_of, unless_damaged
from layerwise.calibration.taps import Tap, tapped_linears
from layerwise.compression import verify
from layerwise.compression.tune import Tuner
from layerwise.compression.verify import NOT_FINITE, broken_promise, finite
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Layer, Method
from layerwise.contract.target import Target
from layerwise.evaluation.cache import foresee
from layerwise.models import loading
from layerwise.models.loading import Blocks
from layerwise.models.streaming import LazyBlocks
from layerwise.runtime.checkpoint import Checkpoint
from layerwise.runtime.devices import peak_gpu_mb, take
from layerwise.runtime.errors import Diverged, InputError, record_failure, report_errors
from layerwise.runtime.files import read_made, remove_parts, sha256, unchanged, whole_file, write_atomic
from layerwise.runtime.provenance import PROVENANCE, peak_mb, provenance
from layerwise.sources.fingerprint import check_unchanged
from layerwise.sources.tokens import read_tokens
from layerwise.storage import packed_weights
from layerwise.storage.bits_per_weight import bits_per_weight
from layerwise.storage.table_schema import from_rows, write_parquet

REGISTRY = "__warningregistry__"
TUNING = "tuning.json"  # in a checkpoint: the history of the stages
LARGEST_ERROR = 1e6  # output_error of a result: what loses more has diverged
TRACE_ERROR = 1e-3  # by how much, in units of it, a trace may miss the result's error
ROUNDING = 1e-6  # the same in units of the dense output; of a Gram's trace, how far its eigenvalues may be below zero
SCORED = 512  # rows of a weight, and columns of its Gram, that are in float64 at a time


@dataclass(frozen=True)
class Solver:
    """A method at a target, as the runner calls it; dtype: of the model that it compresses.

    mask_only: whether its card says that it changes no weight that it keeps. criterion: what its trace measures.
    """

    name: str
    method: Method
    target: Target
    seed: int
    dtype: torch.dtype = torch.float32
    mask_only: bool = False
    criterion: str | None = None

    def solve(self, layer: Layer) -> tuple[Compressed, dict[str, Any]]:
        """The layer's result, with the scales that are stored, and its row of numbers.

        Raises InputError naming the layer when the method fails it.
        """
        rng = torch.Generator().manual_seed(layer_seed(self.seed, layer.name))
        before, around = inputs_state(layer), process_state()
        start = time.perf_counter()
        try:
            result = self.method.compress(layer, self.target, rng)
        except Exception as error:  # whatever a method raises is told with the method's and the layer's name
            raise InputError(f"{self.name} failed on {layer.name}: {type(error).__name__}: {error}") from error
        seconds = time.perf_counter() - start
        if not isinstance(result, Compressed):
            raise InputError(f"{self.name} must return a Compressed on {layer.name}, {type(result).__name__} came.")
        written = [name for name, state in inputs_state(layer).items() if state != before[name]]
        if written:  # the score would compare the result with itself
            raise self.breach(layer, f"promise 1: the inputs must be untouched, the {written[0]} was written to")
        changed = [name for name, state in process_state().items() if state != around[name]]
        if changed:  # later layers, and other methods' seconds, would depend on it
            raise self.breach(layer, f"promise 4: global state must be left alone, {changed[0]} changed")
        return self.judged(layer, result, seconds)

    def breach(self, layer: Layer, broken: str) -> InputError:
        """The error about a promise broken on a layer."""
        kind = Diverged if NOT_FINITE in broken else InputError
        return kind(f"{self.name} broke its contract on {layer.name}: {broken}.")

    def judged(self, layer: Layer, result: Compressed, seconds: float) -> tuple[Compressed, dict[str, Any]]:
        """A result that keeps its promises, with the scales that are stored, and its row of numbers.

        Raises InputError for the first promise that is broken, Diverged for an error beyond LARGEST_ERROR.
        """
        broken = broken_promise(layer, self.target, result, self.mask_only)
        if broken:
            raise self.breach(layer, broken)
        given, result = result, packed_weights.rounded(result, self.target, self.dtype)
        if self.dtype == torch.float16 and not finite(result.weight.half()):
            raise Diverged(
                f"{self.name} gives {layer.name} weights beyond float16: use dtype: bfloat16 or float32 for the model."
            )
        rows, inputs = layer.weight.shape
        absolute, whole = losses(layer, result.weight)
        relative = ratio(absolute, whole)
        if not relative <= LARGEST_ERROR:
            raise Diverged(f"{self.name} has diverged on {layer.name}: its output_error is {relative:.3g}.")
        if self.criterion == "error" and given.trace:
            reached = absolute if given is result else losses(layer, given.weight)[0]
            if broken := untrue(given, reached, whole):
                raise self.breach(layer, broken)
        kept = 1.0 if result.mask is None or not self.target.sparsity else int(result.mask.sum()) / result.mask.numel()
        return result, {
            "layer": layer.name,
            "kind": layer.name.rpartition(".")[2],
            "out": rows,
            "in": inputs,
            "output_error": relative,
            "absolute_error": absolute,
            "achieved_sparsity": int((result.weight == 0).sum()) / result.weight.numel(),
            "bits_per_weight": bits_per_weight(
                self.target,
                kept,
                rows,
                inputs,
                input_scale=result.input_scale is not None,
                reordered=packed_weights.reordered(result, self.target),
            ),
            "damping": None if (used := result.info.get("damping")) is None else float(used),
            "seconds": seconds,
            "peak_mb": peak_mb(),
            "peak_gpu_mb": peak_gpu_mb(layer.weight.device.type),
        }


def process_state() -> dict[str, Any]:
    """What a method could change for others: generators, torch's settings, and the functions that judge it."""
    judges = [vars(module) for module in (sys.modules[__name__], verify, packed_weights)]
    numpys = np.random.get_state(legacy=False)["state"]
    return {
        "torch's global generator": torch.get_rng_state().numpy().tobytes(),
        "numpy's global generator": (numpys["key"].tobytes(), numpys["pos"]),
        "Python's global generator": random.getstate(),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the number of threads": torch.get_num_threads(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "the precision of products": torch.get_float32_matmul_precision(),
        # (a warning of a method leaves its registry in the module that called it)
        "the runner's code": [id(own) for names in judges for name, own in names.items() if name != REGISTRY],
    }


def inputs_state(layer: Layer) -> dict[str, tuple[int, float]]:
    """What changes when a method writes into its inputs: through torch the version, through other memory the sum."""
    tensors = {"weight": layer.weight, "gram": layer.gram.matrix}
    if layer.statistics:
        tensors |= {key: value for key, value in vars(layer.statistics).items() if isinstance(value, Tensor)}
    return {name: (tensor._version, total(tensor)) for name, tensor in tensors.items()}


def total(tensor: Tensor) -> float:
    """Sum in float64 where each place has a weight of its own, so that entries that are exchanged show too."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    across, down = (torch.linspace(1, 2, n, dtype=torch.float64, device=tensor.device) for n in rows.shape[::-1])
    return float(torch.cat([part.double() @ across for part in rows.split(SCORED)]) @ down)


def layer_seed(seed: int, name: str) -> int:
    """Seed of a layer's generator, independent of the order in which layers are solved."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def output_error(layer: Layer, weight: Tensor) -> tuple[float, float]:
    """tr((W - What) G (W - What)t) and its ratio to tr(W G Wt), in float64 on the undamped Gram.

    Raises Diverged for a Gram with eigenvalues below zero by more than rounding.
    """
    error, whole = losses(layer, weight)
    return error, ratio(error, whole)


def ratio(error: float, whole: float) -> float:
    """A layer whose dense output is zero on every token has ratio 0 where that is kept, else an infinite one."""
    return error / whole if whole > 0 else 0.0 if error == 0 else math.inf


def losses(layer: Layer, weight: Tensor) -> tuple[float, float]:
    """tr((W - What) G (W - What)t) and tr(W G Wt), as output_error has them."""
    error = whole = 0.0
    for own, other in zip(layer.weight.split(SCORED), weight.split(SCORED), strict=True):
        dense = own.double()
        lost = dense - other.double()
        for start in range(0, dense.shape[1], SCORED):
            columns = slice(start, start + SCORED)
            gram = layer.gram.matrix[:, columns].double()
            error += float(((lost @ gram) * lost[:, columns]).sum())
            whole += float(((dense @ gram) * dense[:, columns]).sum())
    if min(error, whole) < 0:
        # Rounding of a Gram that is singular can push a trace of zero below it, but by no more than its own size.
        size = float(layer.gram.matrix.diagonal().double().sum())
        squares = max(float(part.double().square().sum()) for part in (layer.weight - weight, layer.weight))
        if min(error, whole) < -ROUNDING * squares * size:
            raise Diverged(f"The Gram of {layer.name} has eigenvalues below zero by more than rounding.")
        error, whole = max(error, 0.0), max(whole, 0.0)
    return error, whole


def untrue(result: Compressed, error: float, whole: float) -> str | None:
    """One sentence where the trace's objective, the layer's error, is not that of the result, or None.

    whole: the dense output's size, in units of which the objective is rounded.
    """
    told = min(row[2] for row in result.trace)
    if abs(told - error) <= TRACE_ERROR * error + ROUNDING * whole:
        return None
    return f"promise 10: the trace's least error must be that of the result, {error:.6g}, {told:.6g} came"


def visit(
    model: PreTrainedModel,
    blocks: Iterable[tuple[int, Iterable[Tap]]],
    solve: Callable[[Layer], tuple[Compressed, dict[str, Any]]],
    progress: Callable[[Mapping[str, Any]], None],
) -> Iterator[tuple[dict[str, Any], Compressed]]:
    """Compress the blocks' layers in place; yields each layer's row and result."""
    for index, tap, linear in tapped_linears(model, blocks):
        result, row = solve(Layer(linear.name, linear.weight(), tap.gram, tap.statistics))
        linear.replace(result.weight)
        row |= {"block": index, "tap": tap.name, "calibration_tokens": tap.gram.tokens, "token_scope": tap.scope}
        del tap  # before the next block's Grams come
        progress(row)
        yield row, result


def trace_rows(result: Compressed) -> list[dict[str, Any]]:
    """The trace as rows of the traces table, with the duality gaps of a method that returns them."""
    names = ("iteration", "seconds", "objective")
    gaps = result.info.get("duality_gaps", [None] * len(result.trace))
    return [
        {
            **dict(zip(names, (int(t), float(seconds), float(objective)), strict=True)),
            "duality_gap": None if gap is None else float(gap),
        }
        for (t, seconds, objective), gap in zip(result.trace, gaps, strict=True)
    ]


def sequential_blocks(
    stream: Stream,
    blocks: Blocks | None = None,
    start: int = 0,
    finished: Callable[[int], None] = lambda index: None,
) -> Iterator[tuple[int, Iterable[Tap]]]:
    """The taps of each block; between one and the next the block, by then compressed, is run again.

    blocks: those that are compressed, if the stream passes through a copy of them in another dtype. finished: called
    when nothing of a block is needed any more.
    """
    blocks = blocks or stream.source
    for index in range(start, len(blocks)):
        with blocks.open(index) as block, stream.source.open(index) as other:
            yield index, in_turn(stream.collect(index))
            if index + 1 < len(blocks):
                if block is not other:
                    other.load_state_dict(block.state_dict())  # rounded to the copy's dtype
                stream.advance(index)
        finished(index)


def in_turn(taps: list[Tap]) -> Iterator[Tap]:
    """The taps, of which the list keeps those that are still to come."""
    while taps:
        yield taps.pop(0)


@contextmanager
def bar(model: PreTrainedModel, title: str, skipped: int = 0) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar over the layers, as a function of their rows; skipped: blocks that are done."""
    total, done = loading.count_linears(model), loading.count_linears(model, skipped)
    with tqdm(total=total, initial=done, desc=title, unit="layer", mininterval=1.0) as shown:

        def progress(row: Mapping[str, Any]) -> None:
            shown.set_postfix_str(
                f"{row['kind']} error {row['output_error']:.4f} in {row['seconds']:.2f} s", refresh=False
            )
            shown.update()

        yield progress


def calibration_facts(info: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The columns about the calibration set, from what the tokens' file says of itself.

    dtype: of the forward passes.
    """
    facts = {
        "calibration_text": info["dataset"],
        "calibration_sha256": info["sha256"],
        "calibration_dtype": dtype,
    }
    return facts | {f"calibration_{key}": info[key] for key in ("samples", "length", "seed", "sampling")}


def run(args: argparse.Namespace) -> None:
    """Compress and evaluate a cell. Its checkpoint goes when all is written, also what evaluates the weights."""
    check = partial(check_unchanged, args.model, args.fingerprint)
    with Checkpoint(args.out / ".checkpoint", decisive(args), check) as checkpoint:
        remove_parts(args.out)
        with unless_damaged(args.gram):
            record = compressed(args, checkpoint)
        weights = args.out / "weights.safetensors"
        digest = sha256(weights)
        foresee(args.model, args.fingerprint, weights, digest, args.device)
        write_atomic(args.out / "cell.json", json.dumps(record | {"weights_sha256": digest}, indent=2) + "\n")
        checkpoint.remove()


def decisive(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the cell's results, in the words in which its change is told."""
    return {
        "spec": {key: args.cell[key] for key in args.cell if key != "columns"} | {"seed": args.cell["columns"]["seed"]},
        "code": args.code.name if args.code else None,
        "model": [read_made(args.fingerprint), args.model],
        "tokens": sha256(args.tokens),
        "Grams": store_of(args.gram).name if args.gram else None,
        "dtype": args.dtype,
        "device": args.device,
        "versions": {name: importlib.metadata.version(name) for name in PROVENANCE},
    }


def compressed(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Write a cell's layers, trace and weights; returns its record. What the checkpoint has is not computed again."""
    columns, entry = args.cell["columns"], args.cell["method"]
    catalogue = Catalogue(args.method_path)
    method, own = catalogue.build(entry["name"], entry["params"]), catalogue[entry["name"]]
    criterion = own.criterion or "own"
    if args.code:
        unchanged(args.code)  # by now it is imported
    tokens, info = read_tokens(args.tokens)
    blocks = LazyBlocks(args.model, args.device)
    target = Target(**args.cell["target"])
    mask_only = own.comparison(target) == "mask-only"
    solver = Solver(entry["name"], method, target, columns["seed"], blocks.model.dtype, mask_only, own.criterion)
    another = args.dtype is not None and args.dtype != loading.dtype_name(blocks.model)
    sequences, stages, solve = torch.from_numpy(tokens), args.cell.get("tune"), solver.solve
    title, tuner = f"{columns['label']} {columns['target']} {columns['mode']}", None

    def walk(
        blocks: Blocks, folder: Path | None = None, start: int = 0, finished: Callable[[int], None] = lambda index: None
    ) -> tuple[Iterator[tuple[int, Iterable[Tap]]], Stream | None]:
        """The taps of each block, and in sequential mode the stream that they come from."""
        if columns["mode"] == "shared":
            return shared_blocks(store_of(args.gram), blocks, start, finished), None
        own = LazyBlocks({**args.model, "dtype": args.dtype}, args.device) if another else blocks
        stream = Stream(own, sequences, folder=folder, start=start)
        return sequential_blocks(stream, blocks, start, finished), stream

    if stages and checkpoint.done < len(blocks):  # they take the whole model, and are not kept block by block
        checkpoint.done = 0
        tuner = Tuner(loading.load(args.model, args.device), sequences, stages, solver.target, solver.seed)
        with bar(tuner.model, f"{title}, tuned") as progress:
            for _ in visit(tuner.model, tuner.walk(*walk(Blocks(tuner.model))), tuner.keep(solver.solve), progress):
                pass
            tuner.end()
        write_atomic(checkpoint.folder / TUNING, json.dumps(tuner.history))
        # What came out is scored as if the method had returned it, on the model as it was.
        results, told = tuner.results, replace(solver, name=f"{solver.name}, tuned,", mask_only=False, criterion=None)
        del tuner

        def solve(layer: Layer) -> tuple[Compressed, dict[str, Any]]:
            result, row = results[layer.name]
            return told.judged(layer, result, row["seconds"])

    if checkpoint.done < len(blocks):
        with bar(blocks.model, title, skipped=checkpoint.done) as progress:
            for index, taps in walk(blocks, checkpoint.folder, checkpoint.done, checkpoint.finish)[0]:
                block = visit(blocks.model, [(index, taps)], solve, progress)
                write_block(checkpoint, index, block, solver)
    join_blocks(checkpoint, len(blocks), args.out, columns | {"criterion": criterion}, solver.target, title)
    fingerprint = read_made(args.fingerprint)
    fingerprint.pop("files", None)  # one hash stands for all in the tables
    facts = {
        **provenance(args.device, torch.get_num_threads()),
        **fingerprint,
        **calibration_facts(info, args.dtype or loading.dtype_name(blocks.model)),
    }
    seconds = checkpoint.total_seconds()
    peaks = {"peak_mb": peak_mb(), "peak_gpu_mb": peak_gpu_mb(args.device)}
    peaks = {name: checkpoint.most(name, value) for name, value in peaks.items()}
    record = {"columns": columns, "provenance": facts, "seconds": seconds, **peaks, "model": args.model}
    return record | ({"tuning": json.loads((checkpoint.folder / TUNING).read_text("utf-8"))} if stages else {})


def write_block(
    checkpoint: Checkpoint, index: int, block: Iterable[tuple[dict[str, Any], Compressed]], solver: Solver
) -> None:
    """Leave a block's rows, traces and weights in the checkpoint."""
    rows, traces, stored = [], [], {}
    for row, result in block:
        rows.append(row)
        for name in ("peak_mb", "peak_gpu_mb"):
            checkpoint.most(name, row[name])
        traces += [{"layer": row["layer"], **point} for point in trace_rows(result)]
        stored[row["layer"]] = packed_weights.parts_of(result, solver.target, solver.dtype)
        del result
    with whole_file(checkpoint.file(index, "safetensors")) as part:
        packed_weights.write(part, stored, {row["layer"]: (row["out"], row["in"]) for row in rows}, solver.target)
    write_atomic(checkpoint.file(index, "json"), json.dumps({"rows": rows, "traces": traces}))


def join_blocks(
    checkpoint: Checkpoint, count: int, out: Path, columns: Mapping[str, Any], target: Target, title: str
) -> None:
    """Make a cell's tables and weights from what the checkpoint has of each block.

    columns: those of the spec, and the criterion of the trace.
    """
    found = [json.loads(checkpoint.file(index, "json").read_text("utf-8")) for index in range(count)]
    own = {key: value for key, value in columns.items() if key != "criterion"}
    rows = [{**own, **row} for block in found for row in block["rows"]]
    traces = [{**columns, **point} for block in found for point in block["traces"]]
    for table, content in (("layers", rows), ("trace", traces)):
        with whole_file(out / f"{table}.parquet") as part:
            write_parquet(from_rows(content, {"trace": "traces"}.get(table, table), title), part)
    with whole_file(out / "weights.safetensors") as part:
        packed_weights.join(part, [checkpoint.file(index, "safetensors") for index in range(count)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", type=json.loads, required=True, help="spec of the cell, as JSON")
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="what fingerprint.py wrote of the model")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration tokens")
    parser.add_argument("--gram", type=Path, help="where the Grams are, as calibrate.py says (shared mode)")
    parser.add_argument("--code", type=Path, help="file named after the hash of the code that decides the result")
    parser.add_argument("--dtype", help="of the forward passes that give the Grams (default: the model's)")
    parser.add_argument("--method-path", type=Path, action="append", default=[], help="further folder of methods")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cell")
    args = parser.parse_args(argv)
    loading.set_threads(args.threads)
    with record_failure(args.out, "compress"):
        take(args.device)
        run(args)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
