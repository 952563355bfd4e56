"""One cell: compress every linear layer of a model by one method, check and score each result.

shared: every layer sees the dense model's Gram. sequential: the Gram of a block comes from activations that passed
through the compressed blocks before it, as in the published codes.
"""

import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from layerwise.calibration import fisher_store
from layerwise.calibration.block_stream import Stream
from layerwise.calibration.gram_store import computed_in, store_of, unless_damaged
from layerwise.calibration.modes import sequential_blocks, shared_blocks
from layerwise.calibration.taps import Tap, tapped_linears
from layerwise.compression.levels import targets_at
from layerwise.compression.solver import Solver
from layerwise.compression.tune import Tuner
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Layer
from layerwise.contract.method_file import Entry
from layerwise.contract.target import Target
from layerwise.models import compute_dtype, loading, structure
from layerwise.models.stored_dtypes import stored_dtype
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Blocks, model_linears
from layerwise.runtime.checkpoint import Checkpoint
from layerwise.runtime.devices import peak_gpu_mb
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import read_made, remove_parts, sha256, unchanged, whole_file, write_atomic
from layerwise.runtime.provenance import PROVENANCE, peak_mb, provenance
from layerwise.sources.fingerprint import check_unchanged
from layerwise.sources.tokens import read_tokens
from layerwise.storage import layer_packing, packed_file
from layerwise.storage.table_schema import from_rows, write_parquet

TUNING = "tuning.json"  # file in a checkpoint with the history of the stages


def visit(
    model: PreTrainedModel,
    blocks: Iterable[tuple[int, Iterable[Tap]]],
    solve: Callable[[Layer], tuple[Compressed, dict[str, Any]]],
    progress: Callable[[Mapping[str, Any]], None],
    fishers: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[dict[str, Any], Compressed]]:
    """Compress the blocks' layers in place; yields each layer's row and result. fishers: layer -> fisher [out]."""
    for index, tap, linear in tapped_linears(model, blocks):
        fisher = fishers[linear.name] if fishers else None
        result, row = solve(Layer(linear.name, linear.weight(), tap.gram, tap.statistics, fisher=fisher))
        linear.replace(result.weight)
        row |= {"block": index, "tap": tap.name, "calibration_tokens": tap.gram.tokens, "token_scope": tap.scope}
        del tap  # before the next block's Grams are computed
        progress(row)
        yield row, result
        del result  # before the next layer is solved


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
def bar(
    model: PreTrainedModel, title: str, skipped: int = 0, total: int | None = None
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar over the layers, as a function of their rows. skipped: finished blocks. total: number of layers,
    if not all."""
    total = structure.count_linears(model) if total is None else total
    done = structure.count_linears(model, skipped)
    with tqdm(total=total, initial=done, desc=title, unit="layer", mininterval=1.0) as shown:

        def progress(row: Mapping[str, Any]) -> None:
            shown.set_postfix_str(
                f"{row['kind']} error {row['output_error']:.4f} in {row['seconds']:.2f} s", refresh=False
            )
            shown.update()

        yield progress


def calibration_facts(info: Mapping[str, Any], dtype: str, computed: str | None) -> dict[str, Any]:
    """The columns about the calibration set, from the metadata of the tokens' file.

    dtype: the dtype to which the weights are rounded in the forward passes. computed: the dtype in which the passes are
    computed.
    """
    facts = {
        "calibration_text": info["dataset"],
        "calibration_sha256": info["sha256"],
        "calibration_normalised": info.get("normalised"),
        "calibration_dtype": dtype,
        "calibration_compute_dtype": computed,
    }
    return facts | {f"calibration_{key}": info[key] for key in ("samples", "length", "seed", "sampling")}


@dataclass(frozen=True)
class CellJob:
    """The job that computes one cell.

    spec: of the cell, as the grid has it: columns, method, target and, if it is tuned, tune. model: the config's entry.
    fingerprint: what sources/fingerprint.py wrote of the model. tokens: the calibration sequences. out: folder of the
    cell. gram: where the Grams are, as calibration/calibrate.py says; None in sequential mode. fisher: file of the
    `fisher` of each layer, where the method needs it. levels: the table of the layers' levels, where the target's
    budget is spread over them. code: the file that is named after the hash of the code that decides the result. dtype:
    of the forward passes that give the Grams, None for the model's. method_paths: folders of methods besides the
    shipped ones.
    """

    spec: Mapping[str, Any]
    model: Mapping[str, Any]
    fingerprint: Path
    tokens: Path
    out: Path
    gram: Path | None = None
    fisher: Path | None = None
    levels: Path | None = None
    code: Path | None = None
    dtype: str | None = None
    method_paths: tuple[Path, ...] = ()
    device: str = "cpu"

    @property
    def columns(self) -> Mapping[str, Any]:
        return self.spec["columns"]

    @property
    def stages(self) -> Mapping[str, Any] | None:
        """The tuning stages, or None if the cell is not tuned."""
        return self.spec.get("tune")

    @property
    def title(self) -> str:
        """Label of the progress bar."""
        return "{label} {target} {mode}".format(**self.columns)

    @cached_property
    def entry(self) -> Entry:
        return self.catalogue[self.spec["method"]["name"]]

    @cached_property
    def catalogue(self) -> Catalogue:
        return Catalogue(list(self.method_paths))

    @property
    def needs(self) -> set[str]:
        """The names of the statistics that the method, and the methods inside it, need."""
        method = self.spec["method"]
        return self.catalogue.needs(method["name"], method["params"])

    @property
    def corrects_drift(self) -> bool:
        """Whether the method needs the inputs in the dense model beside those in the compressed one."""
        return "cross_gram" in self.needs

    @property
    def needs_cross(self) -> bool:
        """Whether the method or the score needs them."""
        return self.spec.get("asymmetric", False) or self.corrects_drift

    @cached_property
    def fishers(self) -> Mapping[str, Tensor] | None:
        """Layer -> its fisher [out], or None if the method does not need it. Raises InputError if it is not given."""
        if "fisher" not in self.needs:
            return None
        if self.fisher is None or self.columns["mode"] != "shared":
            came = "none" if self.fisher is None else f"the mode {self.columns['mode']}"
            raise InputError(
                f"{self.entry.name} must have the fisher of the dense model, in shared mode. Got {came} instead."
            )
        return fisher_store.read(self.fisher, self.device)

    @property
    def computed(self) -> str | None:
        """The dtype in which this machine computes passes of the model; None if the entry gives no dtype."""
        return compute_dtype.compute_dtype(self.model, self.device)

    @property
    def calibrated(self) -> Mapping[str, Any]:
        """The model's entry, with the dtype of the calibration."""
        return compute_dtype.at(self.model, self.dtype)

    @property
    def calibration_computed(self) -> str | None:
        """The dtype in which the calibration's passes were computed by the job that wrote the Grams, or are computed
        here."""
        if self.gram and self.columns["mode"] == "shared":
            return computed_in(store_of(self.gram))
        return compute_dtype.compute_dtype(self.calibrated, self.device)

    def solver(self, dtype: torch.dtype) -> Solver:
        """The cell's method at its target. dtype: dtype in which the compressed weights are stored."""
        name, target = self.spec["method"]["name"], Target(**self.spec["target"])
        method = self.catalogue.build(name, self.spec["method"]["params"])
        mask_only = self.entry.comparison(target) == "mask-only"
        targets = targets_at(self.levels, target) if self.levels else {}
        return Solver(name, method, target, self.columns["seed"], dtype, mask_only, self.entry.criterion, targets)

    def decisive(self) -> dict[str, Any]:
        """Everything on which the cell's results depend, keyed by the words that a message about a change uses."""
        spec = {key: value for key, value in self.spec.items() if key != "columns"}
        found = {"levels": self.levels, "fisher": self.fisher}
        return {name: sha256(path) for name, path in found.items() if path} | {
            "spec": spec | {"seed": self.columns["seed"]},
            "code": self.code.name if self.code else None,
            "model": [read_made(self.fingerprint), self.model],
            "tokens": sha256(self.tokens),
            "Grams": store_of(self.gram).name if self.gram else None,
            "dtype": self.dtype,
            "compute dtype": [self.computed, self.calibration_computed],
            "device": self.device,
            "versions": {name: importlib.metadata.version(name) for name in PROVENANCE},
        }


def run(job: CellJob, then: Callable[[Path, str], None] = lambda weights, digest: None) -> None:
    """Compress a cell into its folder: layers.parquet, trace.parquet, weights.safetensors and, last, cell.json.

    A killed process leaves its finished blocks in a checkpoint, from which the next process resumes. then: called with
    the weights' file and its SHA-256 before the cell counts as done. Raises InputError for a method that fails or
    breaks its contract, and for a model or Grams that have changed.
    """
    check = partial(check_unchanged, job.model, job.fingerprint)
    with Checkpoint(job.out / ".checkpoint", job.decisive(), check) as checkpoint:
        remove_parts(job.out)
        with unless_damaged(job.gram):
            record = compress(job, checkpoint)
        weights = job.out / "weights.safetensors"
        digest = sha256(weights)
        then(weights, digest)
        write_atomic(job.out / "cell.json", json.dumps(record | {"weights_sha256": digest}, indent=2) + "\n")
        checkpoint.remove()


def compress(job: CellJob, checkpoint: Checkpoint) -> dict[str, Any]:
    """Write a cell's layers, trace and weights; returns its record. Blocks in the checkpoint are not computed again."""
    tokens, text = read_tokens(job.tokens)
    sequences = torch.from_numpy(tokens)
    compute_dtype.tell(job.model, job.computed, job.device)
    blocks = LazyBlocks(job.model, job.device, job.computed)
    solver = job.solver(stored_dtype(blocks.model))
    if sentence := solver.without_factors({name: own.shape for name, own in model_linears(blocks.model).items()}):
        raise InputError(sentence)
    if job.code:
        unchanged(job.code)  # all the code is imported by now
    if checkpoint.done < len(blocks):
        solve = tuned(job, solver, sequences, checkpoint) if job.stages else each(solver)
        with bar(blocks.model, job.title, skipped=checkpoint.done) as progress:
            stays = partial(all_dense, solver, blocks)
            taps_of_blocks, _ = walk(
                job, blocks, sequences, checkpoint.folder, checkpoint.done, checkpoint.finish, stays
            )
            for index, taps in taps_of_blocks:
                block = visit(blocks.model, [(index, taps)], solve, progress, job.fishers)
                write_block(checkpoint, index, block, solver)
    columns = {**job.columns, "criterion": job.entry.criterion or "own"}
    learned = join_blocks(checkpoint, len(blocks), job.out, columns, job.title)
    record = record_of(job, checkpoint, text, blocks.model)
    if learned:
        grams = store_of(job.gram).name if job.gram and job.columns["mode"] == "shared" else None
        record["learned"] = {"grams": grams, "layers": learned}
    return record


def each(solver: Solver) -> Callable[[Layer], tuple[Compressed, dict[str, Any]]]:
    """A function that gives each layer's result at the layer's own target."""
    return lambda layer: solver.at(layer.name).solve(layer)


def walk(
    job: CellJob,
    blocks: Blocks,
    sequences: Tensor,
    folder: Path | None = None,
    start: int = 0,
    finished: Callable[[int], None] = lambda index: None,
    stays: Callable[[int], bool] = lambda index: False,
) -> tuple[Iterator[tuple[int, Iterable[Tap]]], Stream | None]:
    """The taps of each block from `start` on, and in sequential mode the stream that yields them.

    sequences: [samples, length] tokens. folder: holds the stream's hidden states (default: in memory). finished: called
    when a block is no longer needed. stays: as in `sequential_blocks`.
    """
    if job.columns["mode"] == "shared":
        assert job.gram is not None
        return shared_blocks(store_of(job.gram), blocks, start, finished), None
    same = job.dtype is None or job.dtype == loading.dtype_name(blocks.model)
    if not same:
        compute_dtype.tell(job.calibrated, job.calibration_computed, job.device)
    source = blocks if same else LazyBlocks(job.calibrated, job.device, job.calibration_computed)
    stream = Stream(source, sequences, folder=folder, start=start, beside=job.needs_cross)
    return sequential_blocks(stream, blocks, start, finished, stays, job.corrects_drift), stream


def all_dense(solver: Solver, blocks: Blocks, index: int) -> bool:
    """Whether all layers of a block have the dense target."""
    layers = structure.linears(blocks.modules[index], f"{blocks.name}.{index}")
    return all(solver.at(layer.name).target.dense for layer in layers)


def tuned(
    job: CellJob, solver: Solver, sequences: Tensor, checkpoint: Checkpoint
) -> Callable[[Layer], tuple[Compressed, dict[str, Any]]]:
    """A function that gives each layer's tuned result, scored as if the method had returned it.

    The stages need the whole model and are not saved block by block, so the checkpoint starts empty.
    """
    assert job.stages is not None
    checkpoint.done = 0
    tuner = Tuner(loading.load(job.model, job.device, job.computed), sequences, job.stages, solver.target, solver.seed)
    with bar(tuner.model, f"{job.title}, tuned") as progress:
        blocks = tuner.walk(*walk(job, Blocks(tuner.model), sequences))
        for _ in visit(tuner.model, blocks, tuner.keep(solver.solve), progress, job.fishers):
            pass
        tuner.end()
    write_atomic(checkpoint.folder / TUNING, json.dumps(tuner.history))
    results, judge = tuner.results, replace(solver, name=f"{solver.name}, tuned,", mask_only=False, criterion=None)

    def solve(layer: Layer) -> tuple[Compressed, dict[str, Any]]:
        result, row = results[layer.name]
        return judge.judged(layer, result, row["seconds"])

    return solve


def record_of(job: CellJob, checkpoint: Checkpoint, text: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The cell's record: its provenance, time and memory. text: the metadata of the tokens' file."""
    fingerprint = read_made(job.fingerprint)
    fingerprint.pop("files", None)  # in the tables one hash represents them all
    facts = {
        **provenance(job.device, torch.get_num_threads()),
        **fingerprint,
        "compute_dtype": loading.computed_dtype(model),
        **calibration_facts(text, job.dtype or loading.dtype_name(model), job.calibration_computed),
    }
    peaks = {"peak_mb": peak_mb(), "peak_gpu_mb": peak_gpu_mb(job.device)}
    peaks = {name: checkpoint.most(name, value) for name, value in peaks.items()}
    seconds = checkpoint.total_seconds()
    record = {"columns": job.columns, "provenance": facts, "seconds": seconds, **peaks, "model": job.model}
    return record | ({"tuning": json.loads((checkpoint.folder / TUNING).read_text("utf-8"))} if job.stages else {})


def write_block(
    checkpoint: Checkpoint, index: int, block: Iterable[tuple[dict[str, Any], Compressed]], solver: Solver
) -> None:
    """Save a block's rows, traces, weights, and what the method learned on its layers, in the checkpoint."""
    rows, traces, stored, targets, learned = [], [], {}, {}, {}
    for row, result in block:
        target = solver.at(row["layer"]).target
        if solver.target.paired:
            rows.append(row | {"level": row["bits_per_weight"], "pair": target.label})
        else:
            rows.append(row | {"level": target.level, "pair": None})
        for name in ("peak_mb", "peak_gpu_mb"):
            checkpoint.most(name, row[name])
        traces += [{"layer": row["layer"], **point} for point in trace_rows(result)]
        if "learned" in result.info:
            numbers = {name: list(map(float, values)) for name, values in result.info["learned"].items()}
            learned[row["layer"]] = {"block": row["block"], "tap": row["tap"], **numbers}
        stored[row["layer"]] = layer_packing.parts_of(result, target, solver.dtype)
        targets[row["layer"]] = target
        del result
    with whole_file(checkpoint.file(index, "safetensors")) as part:
        shapes = {row["layer"]: (row["out"], row["in"]) for row in rows}
        packed_file.write(part, stored, shapes, solver.target, targets if solver.targets else {})
    write_atomic(checkpoint.file(index, "json"), json.dumps({"rows": rows, "traces": traces, "learned": learned}))


def join_blocks(
    checkpoint: Checkpoint, count: int, out: Path, columns: Mapping[str, Any], title: str
) -> dict[str, dict[str, Any]]:
    """Join the blocks of a checkpoint into the cell's tables and weights.

    columns: the columns of the spec, and the criterion of the trace. Returns what the method learned on each layer:
    layer -> block, tap and lists of numbers.
    """
    found = [json.loads(checkpoint.file(index, "json").read_text("utf-8")) for index in range(count)]
    own = {key: value for key, value in columns.items() if key != "criterion"}
    rows = [{**own, **row} for block in found for row in block["rows"]]
    traces = [{**columns, **point} for block in found for point in block["traces"]]
    for table, content in (("layers", rows), ("trace", traces)):
        with whole_file(out / f"{table}.parquet") as part:
            write_parquet(from_rows(content, {"trace": "traces"}.get(table, table), title), part)
    with whole_file(out / "weights.safetensors") as part:
        packed_file.join(part, [checkpoint.file(index, "safetensors") for index in range(count)])
    return {layer: numbers for block in found for layer, numbers in block["learned"].items()}
