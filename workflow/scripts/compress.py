"""One cell: compress every linear layer of a model by one method, check and score each result.

shared: every layer sees the dense model's Gram. sequential: the Gram of a block comes from activations that passed
through the compressed blocks before it, as in the published codes.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from methods.base import Compressed, Layer, Method
from methods.catalogue import Catalogue
from methods.promises import broken_promise
from methods.target import Target
from workflow.scripts import models, packed
from workflow.scripts.accounting import bits_per_weight
from workflow.scripts.calibrate import shared_blocks
from workflow.scripts.devices import peak_gpu_mb, take
from workflow.scripts.propagate import Stream
from workflow.scripts.recall import foresee
from workflow.scripts.runtime import (
    InputError,
    peak_mb,
    provenance,
    record_failure,
    report_errors,
    whole_file,
    write_atomic,
)
from workflow.scripts.table_schema import from_rows
from workflow.scripts.taps import Tap, tapped_linears
from workflow.scripts.text import read_tokens
from workflow.scripts.tune import Tuner

SCORED = 512  # rows of a weight, and columns of its Gram, that are in float64 at a time


@dataclass(frozen=True)
class Solver:
    """A method at a target, as the runner calls it; dtype: of the model that it compresses."""

    name: str
    method: Method
    target: Target
    seed: int
    dtype: torch.dtype = torch.float32

    def solve(self, layer: Layer) -> tuple[Compressed, dict[str, Any]]:
        """The layer's result, with the scales that are stored, and its row of numbers.

        Raises InputError naming the layer when the method fails it.
        """
        rng = torch.Generator().manual_seed(layer_seed(self.seed, layer.name))
        before = inputs_state(layer)
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
            broken = f"promise 1: the inputs must be untouched, the {written[0]} was written to"
            raise InputError(f"{self.name} broke its contract on {layer.name}: {broken}.")
        return self.judged(layer, result, seconds)

    def judged(self, layer: Layer, result: Compressed, seconds: float) -> tuple[Compressed, dict[str, Any]]:
        """A result that keeps its promises, with the scales that are stored, and its row of numbers.

        Raises InputError for the first promise that is broken.
        """
        broken = broken_promise(layer, self.target, result)
        if broken:
            raise InputError(f"{self.name} broke its contract on {layer.name}: {broken}.")
        result = packed.rounded(result, self.target, self.dtype)
        rows, inputs = layer.weight.shape
        absolute, relative = output_error(layer, result.weight)
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
                reordered=packed.reordered(result, self.target),
            ),
            "damping": result.info.get("damping"),
            "seconds": seconds,
            "peak_mb": peak_mb(),
            "peak_gpu_mb": peak_gpu_mb(layer.weight.device.type),
        }


def inputs_state(layer: Layer) -> dict[str, tuple[int, float]]:
    """What changes when a method writes into its inputs: through torch the version, through other memory the sum."""
    tensors = {"weight": layer.weight, "gram": layer.gram.matrix}
    if layer.statistics:
        tensors |= {key: value for key, value in vars(layer.statistics).items() if isinstance(value, Tensor)}
    return {name: (tensor._version, total(tensor)) for name, tensor in tensors.items()}


def total(tensor: Tensor) -> float:
    """Sum in float64, which torch would copy the whole tensor to."""
    return sum(float(rows.sum(dtype=torch.float64)) for rows in tensor.split(SCORED))


def layer_seed(seed: int, name: str) -> int:
    """Seed of a layer's generator, independent of the order in which layers are solved."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def output_error(layer: Layer, weight: Tensor) -> tuple[float, float]:
    """tr((W - What) G (W - What)t) and its ratio to tr(W G Wt), in float64 on the undamped Gram.

    A layer whose dense output is zero on every token has ratio 0: nothing can be lost.
    """
    error = whole = 0.0
    for own, other in zip(layer.weight.split(SCORED), weight.split(SCORED), strict=True):
        dense = own.double()
        lost = dense - other.double()
        for start in range(0, dense.shape[1], SCORED):
            columns = slice(start, start + SCORED)
            gram = layer.gram.matrix[:, columns].double()
            error += float(((lost @ gram) * lost[:, columns]).sum())
            whole += float(((dense @ gram) * dense[:, columns]).sum())
    # Rounding of a Gram that is singular can push a trace of zero below it.
    error, whole = max(error, 0.0), max(whole, 0.0)
    return error, error / whole if whole > 0 else 0.0


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
        row |= {"block": index, "tap": tap.name}
        del tap  # before the next block's Grams come
        progress(row)
        yield row, result


def trace_rows(result: Compressed) -> list[dict[str, Any]]:
    """The trace as rows of the traces table, with the duality gaps of a method that returns them."""
    names = ("iteration", "seconds", "objective")
    gaps = result.info.get("duality_gaps", [None] * len(result.trace))
    return [
        {**dict(zip(names, point, strict=True)), "duality_gap": gap}
        for point, gap in zip(result.trace, gaps, strict=True)
    ]


def sequential_blocks(stream: Stream, blocks: nn.ModuleList | None = None) -> Iterator[tuple[int, Iterable[Tap]]]:
    """The taps of each block; between one and the next the block, by then compressed, is run again.

    blocks: those that are compressed, if the stream passes through a copy of them in another dtype.
    """
    for index in range(len(stream.blocks)):
        yield index, in_turn(stream.collect(index)[0])
        if index + 1 < len(stream.blocks):
            if blocks is not None and blocks is not stream.blocks:
                stream.blocks[index].load_state_dict(blocks[index].state_dict())  # rounded to the copy's dtype
            stream.advance(index)


def in_turn(taps: list[Tap]) -> Iterator[Tap]:
    """The taps, of which the list keeps those that are still to come."""
    while taps:
        yield taps.pop(0)


@contextmanager
def bar(model: PreTrainedModel, title: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar over the layers, as a function of their rows."""
    with tqdm(total=models.count_linears(model), desc=title, unit="layer", mininterval=1.0) as shown:

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
    model, record = compressed(args)  # what has been written is no longer in memory
    foresee(model, args.model, args.fingerprint, args.out / "weights.safetensors", args.device)
    write_atomic(args.out / "cell.json", json.dumps(record, indent=2) + "\n")


def compressed(args: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Write a cell's layers, trace and weights; returns a model to evaluate them in and the cell's record."""
    start = time.perf_counter()
    columns, entry = args.cell["columns"], args.cell["method"]
    catalogue = Catalogue(args.method_path)
    method, criterion = catalogue.build(entry["name"], entry["params"]), catalogue[entry["name"]].criterion or "own"
    tokens, info = read_tokens(args.tokens)
    model = models.load(args.model, args.device)
    solver = Solver(entry["name"], method, Target(**args.cell["target"]), columns["seed"], model.dtype)
    another = args.dtype is not None and args.dtype != models.dtype_name(model)
    sequences, stages, solve = torch.from_numpy(tokens), args.cell.get("tune"), solver.solve
    title = f"{columns['label']} {columns['target']} {columns['mode']}"

    def blocks() -> tuple[Iterator[tuple[int, Iterable[Tap]]], Stream | None]:
        """The taps of each block, and in sequential mode the stream that they come from."""
        if columns["mode"] == "shared":
            return shared_blocks(args.gram, args.device), None
        own = models.load({**args.model, "dtype": args.dtype}, args.device) if another else model
        stream = Stream(own, sequences)
        return sequential_blocks(stream, models.find_blocks(model)[1]), stream

    tuner = Tuner(model, sequences, stages or {}, solver.target, solver.seed)
    if stages:
        with bar(model, f"{title}, tuned") as progress:
            for _ in visit(model, tuner.walk(*blocks()), tuner.keep(solver.solve), progress):
                pass
            tuner.end()
        # What came out is scored as if the method had returned it, on the model as it was.
        model = models.load(args.model, args.device)
        told = replace(solver, name=f"{solver.name}, tuned,")

        def solve(layer: Layer) -> tuple[Compressed, dict[str, Any]]:
            result, row = tuner.results[layer.name]
            return told.judged(layer, result, row["seconds"])

    rows, traces, stored = [], [], {}
    with bar(model, title) as progress:
        for row, result in visit(model, blocks()[0], solve, progress):
            rows.append({**columns, **row})
            own = {**columns, "layer": row["layer"], "criterion": criterion}
            traces += [{**own, **point} for point in trace_rows(result)]
            stored[row["layer"]] = packed.parts_of(result, solver.target, model.dtype)
    for table, content in (("layers", rows), ("trace", traces)):
        with whole_file(args.out / f"{table}.parquet") as part:
            pq.write_table(from_rows(content, {"trace": "traces"}.get(table, table), title), part)
    with whole_file(args.out / "weights.safetensors") as part:
        packed.write(part, stored, {row["layer"]: (row["out"], row["in"]) for row in rows}, solver.target)
    fingerprint = json.loads(args.fingerprint.read_text("utf-8"))
    fingerprint.pop("files", None)  # one hash stands for all in the tables
    facts = {
        **provenance(args.device, torch.get_num_threads()),
        **fingerprint,
        **calibration_facts(info, args.dtype or models.dtype_name(model)),
    }
    seconds = time.perf_counter() - start
    peaks = {"peak_mb": peak_mb(), "peak_gpu_mb": peak_gpu_mb(args.device)}
    record = {"columns": columns, "provenance": facts, "seconds": seconds, **peaks, "model": args.model}
    return model, record | ({"tuning": tuner.history} if stages else {})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", type=json.loads, required=True, help="spec of the cell, as JSON")
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="what fingerprint.py wrote of the model")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration tokens")
    parser.add_argument("--gram", type=Path, help="folder of the Grams (shared mode)")
    parser.add_argument("--dtype", help="of the forward passes that give the Grams (default: the model's)")
    parser.add_argument("--method-path", type=Path, action="append", default=[], help="further folder of methods")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cell")
    args = parser.parse_args(argv)
    models.set_threads(args.threads)
    with record_failure(args.out, "compress"):
        take(args.device)
        run(args)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
