"""One cell: compress every linear layer of a model by one method, check and score each result.

shared: every layer sees the dense model's Gram. sequential: the Gram of a block comes from activations that passed
through the compressed blocks before it, as in the published codes.
"""

import argparse
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.gram_store import store_of, unless_damaged
from layerwise.calibration.modes import sequential_blocks, shared_blocks
from layerwise.calibration.taps import Tap, tapped_linears
from layerwise.compression.solver import Solver
from layerwise.compression.tune import Tuner
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Layer
from layerwise.contract.target import Target
from layerwise.evaluation.cache import foresee
from layerwise.models import loading, structure
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Blocks
from layerwise.runtime.checkpoint import Checkpoint
from layerwise.runtime.devices import peak_gpu_mb, take
from layerwise.runtime.errors import record_failure, report_errors
from layerwise.runtime.files import read_made, remove_parts, sha256, unchanged, whole_file, write_atomic
from layerwise.runtime.provenance import PROVENANCE, peak_mb, provenance
from layerwise.sources.fingerprint import check_unchanged
from layerwise.sources.tokens import read_tokens
from layerwise.storage import packed_weights
from layerwise.storage.table_schema import from_rows, write_parquet

TUNING = "tuning.json"  # in a checkpoint: the history of the stages


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


@contextmanager
def bar(model: PreTrainedModel, title: str, skipped: int = 0) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar over the layers, as a function of their rows; skipped: blocks that are done."""
    total, done = structure.count_linears(model), structure.count_linears(model, skipped)
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
