"""Read a cell's folder: its layers, trace and numbers, or the reason why there are none."""

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from layerwise.results.contamination import contamination
from layerwise.results.significance import Floats, bootstrap_interval, itself
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import aside_of
from layerwise.sources.text_files import shared_origin
from layerwise.storage.table_schema import first_line, from_rows, read_parquet, typed, unusable

# from the dense model, by evaluation.divergence; stored with a perplexity
DIVERGENCES = ("kl", "kl_p99", "top1_agreement")
# means over windows, and the keys of the windows' values
WINDOWED = {"kl": "kl_windows", "top1_agreement": "top1_windows"}
ACCURACIES = ("acc", "acc_norm", "exact_match")  # zero-shot metrics, means over items; higher is better
MEAN = "mean"  # name of the row with the mean accuracy over the tasks of a set
CELL_METRICS = ("mean_output_error", "achieved_sparsity", "bits_per_weight", "solve_seconds", "job_seconds")
LARGEST_LOSS = 700.0  # nats per window; exp of more would exceed float64, so there is no interval
COMPRESSED = {"cell.json", "layers.parquet", "trace.parquet"}  # files of the compress job that this module reads
NEVER_RAN = "no result and no failure record: an earlier step failed (see logs/), or the job was killed or never ran"
BROKEN = (ValueError, OSError, KeyError, TypeError, AttributeError, pa.ArrowException, InputError)


class PlannedCell(Protocol):
    """The parts of a planned cell that this module uses."""

    @property
    def folder(self) -> str: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...
    @property
    def certificate(self) -> str | None: ...
    def overlap(self, evaluation: str) -> str: ...


@dataclass(frozen=True)
class TextEvaluation:
    """identity: part of the result's file name. text: name in the config. shared_with: config name of each calibration
    set that draws from the same file or data set -> that origin, as named by `shared_origin`."""

    identity: str
    text: str
    shared_with: Mapping[str, str]


@dataclass(frozen=True)
class TaskSet:
    """identity: part of the result's file name. name: the set's name in the config. tasks: the tasks requested from
    lm-eval."""

    identity: str
    name: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Gap:
    """The reason why a result does not exist. status: failed or missing."""

    status: str
    reason: str


@dataclass(frozen=True)
class Compression:
    """Results of a cell's compress job: typed layers and trace, provenance and the job's seconds."""

    layers: pa.Table
    trace: pa.Table
    provenance: dict[str, Any]
    seconds: float


def evaluations(config: Mapping[str, Any], specs: Mapping[str, Mapping[str, Any]]) -> list[TextEvaluation]:
    """The evaluations of a plan, each with the calibration sets that draw from the same file or data set.

    config: the whole config with defaults. specs: id -> spec with its name, as in Plan.evaluations.
    """
    texts, calibrations = config["texts"], config["calibration"]
    evaluated = []
    for identity, spec in specs.items():
        text = texts[spec["text"]]
        origins = {name: shared_origin(texts[calib["text"]], text) for name, calib in calibrations.items()}
        shared = {name: origin for name, origin in origins.items() if origin}
        evaluated.append(TextEvaluation(identity, spec["name"], shared))
    return evaluated


def task_sets(specs: Mapping[str, Mapping[str, Any]]) -> list[TaskSet]:
    """The task sets of a plan. specs: id -> spec with its name, as in Plan.tasks."""
    return [TaskSet(identity, spec["name"], tuple(spec["tasks"])) for identity, spec in specs.items()]


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a job wrote. Raises ValueError when the file holds something else."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it must be an object. Got {type(content).__name__} instead")
    return content


def read_compression(folder: Path, columns: Mapping[str, Any]) -> Compression:
    """The results of the compress job in a cell's folder. Raises InputError, which names the file, for a broken
    file."""
    name = "cell.json"
    try:
        record = read_record(folder / name)
        if record["columns"]["cell"] != columns["cell"]:
            raise ValueError(f"it belongs to cell {record['columns']['cell']!r}")
        provenance, seconds = dict(record["provenance"]), float(record["seconds"])
        if not math.isfinite(seconds):
            raise ValueError(f"its seconds are {seconds}")
        from_rows([{**columns, "metric": "", "status": "done", **provenance}], "cells", "its provenance")
        name = "layers.parquet"
        layers = _of_cell(read_parquet(folder / name), "layers", columns)
        name = "trace.parquet"
        trace = _of_cell(read_parquet(folder / name), "traces", columns)
    except BROKEN as error:
        raise unusable(folder / name, error) from None
    return Compression(layers, trace, provenance, seconds)


def _of_cell(data: pa.Table, table: str, columns: Mapping[str, Any]) -> pa.Table:
    """The rows with the plan's spec columns, after a check that they belong to this cell."""
    for name in (name for name in columns if name not in data.column_names):  # an earlier version had no such column
        data = data.append_column(name, pa.repeat(pa.scalar(columns[name]), len(data)))
    data = typed(data, table, "it")
    strangers = set(data.column("cell").unique().to_pylist()) - {columns["cell"]}
    if strangers:
        raise ValueError(f"it holds rows of cell {min(strangers)!r}")
    # The plan decides the columns that are not part of a cell's identity, such as the name of its model.
    for name, value in columns.items():
        position = data.schema.get_field_index(name)
        field = data.schema.field(position)
        data = data.set_column(position, field, pa.repeat(pa.scalar(value, field.type), len(data)))
    return data


def failure(folder: Path, present: set[str], stages: Sequence[str]) -> Gap:
    """The failure record of the first stage that left one, as a gap; status missing if none did."""
    for stage in stages:
        name = f"failed-{stage}.json"
        if name not in present:
            continue
        try:
            record = read_record(folder / name)
            status, reason = str(record["status"]), " ".join(str(record["reason"]).split())
        except BROKEN as error:
            return Gap("failed", f"{stage} failed, and {folder / name} cannot be used: {first_line(error)}")
        return Gap("failed", f"{stage}: {reason}" if status == "error" else f"{stage}, {status}: {reason}")
    outputs = COMPRESSED if list(stages) == ["compress"] else {f"{stage}.json" for stage in stages}
    if damaged := sorted(name for name in outputs if aside_of(folder / name).name in present):
        aside = aside_of(folder / damaged[0])
        return Gap("failed", f"{folder / damaged[0]} was damaged, and is now {aside.name}: run again to make it")
    return Gap("missing", NEVER_RAN)


def layer_metrics(compression: Compression) -> dict[str, float | None]:
    """The metrics of CELL_METRICS, with sparsity and bits weighted by the layers' sizes; None if there is no layer."""
    layers = compression.layers
    size = layers.column("out").to_numpy() * layers.column("in").to_numpy()
    values: list[float | None] = [None, None, None]
    if len(size):
        weights = {"output_error": None, "achieved_sparsity": size, "bits_per_weight": size}
        values = [float(np.average(layers.column(name).to_numpy(), weights=by)) for name, by in weights.items()]
    values += [float(layers.column("seconds").to_numpy().sum()), compression.seconds]
    return dict(zip(CELL_METRICS, values, strict=True))


def read_perplexity(folder: Path, evaluation: TextEvaluation) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """The rows of a perplexity and its divergences, and metric -> its values per window (no values if one is not
    finite).

    Raises InputError, which names the file, for a broken file.
    """
    path = folder / f"perplexity-{evaluation.identity}.json"
    try:
        record = read_record(path)
        value = math.nan if record["perplexity"] is None else float(record["perplexity"])
        losses = [math.nan if loss is None else float(loss) for loss in record["losses"]]
        found = {name: record["divergence"][name] for name in (*DIVERGENCES, *WINDOWED.values())}
        if not all(math.isfinite(x) for own in found.values() if own is not None for x in np.atleast_1d(own)):
            raise ValueError("it has divergences that are not finite")
        windows = {metric: [float(x) for x in found[name]] for metric, name in WINDOWED.items()}
        common = {
            "status": "done",
            "eval_length": int(record["length"]),
            "eval_windows": int(record["windows"]),
            "eval_sha256": record["text"].get("sha256"),
            "eval_normalised": record["text"].get("normalised"),
            **_computed(record),
        }
    except BROKEN as error:
        raise unusable(path, error) from None
    row: dict[str, Any] = {"metric": "perplexity", **common, "value": value}
    if not math.isfinite(value):
        reason = record.get("reason") or f"the model has diverged: its perplexity is {value}"
        row |= {"value": None, "reason": reason}
    elif max(losses, default=0.0) <= LARGEST_LOSS:
        row |= _interval(losses, np.exp)
        windows = {"perplexity": losses, **windows}
    lost = record["divergence"].get("reason") or row.get("reason") or "the file has no value"
    rows = [row]
    for metric in DIVERGENCES:
        own = {"metric": metric, **common, "value": found[metric], **_interval(windows.get(metric, ()))}
        rows.append(own if own["value"] is not None else own | {"reason": lost})
    return rows, windows


def _interval(windows: Sequence[float], statistic: Callable[[Floats], Floats] = itself) -> dict[str, float | None]:
    """The interval columns for a function of the mean over windows; empty for fewer than two windows."""
    low, high = bootstrap_interval(windows, statistic) or (None, None)
    return {"low": low, "high": high}


def _computed(record: Mapping[str, Any]) -> dict[str, str]:
    """The dtype in which an evaluation was computed; if it is absent, the row takes its cell's dtype."""
    return {"compute_dtype": str(record["compute_dtype"])} if "compute_dtype" in record else {}


def without_filter(metric: str) -> tuple[str, str]:
    """(exact_match, strict-match) of "exact_match,strict-match": the metric and lm-eval's filter, or "" without one."""
    own, _, filtered = metric.partition(",")
    return own, filtered


def item_scores(record: Mapping[str, Any]) -> dict[tuple[str, str], list[float]]:
    """(task or group of tasks, metric) -> the score of every item, for accuracies that are means of item scores."""
    by_task = {}
    for row in record["rows"]:
        members = record["groups"].get(row["task"], [row["task"]])
        samples = [record["samples"][task].get(row["metric"]) for task in members]
        if without_filter(row["metric"])[0] not in ACCURACIES or row["value"] is None or not all(samples):
            continue
        scores = [float(score) for items in samples for score in items]
        if math.isclose(statistics.fmean(scores), row["value"], abs_tol=1e-9):  # a group may weigh its tasks
            by_task[row["task"], row["metric"]] = scores
    return by_task


def read_tasks(path: Path) -> tuple[list[dict[str, Any]], dict[tuple[str, str], list[float]]]:
    """Rows and item scores of a file of tasks. Raises InputError, which names the file, for a broken file."""
    try:
        record = read_record(path)
        common = {"status": "done", "lm_eval": record["lm_eval"], **_computed(record)}
        rows = [{**row, **common} for row in record["rows"]]
        if not rows or any(not row["task"] or not row["metric"] for row in rows):
            raise ValueError("it has no rows that name a task and a metric")
        if not all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float)):
            raise ValueError("it has numbers that are not finite")
        return rows, item_scores(record)
    except BROKEN as error:
        raise unusable(path, error) from None


def task_rows(folder: Path, tasks: TaskSet) -> tuple[list[dict[str, Any]], dict[tuple[str, str], list[float]]]:
    """The value columns of every task and metric in a set, and (task, metric) -> the score of every item.

    Raises InputError, which names the file, for a broken file.
    """
    rows, scores = read_tasks(folder / f"tasks-{tasks.identity}.json")
    for row in rows:
        items = scores.get((row["task"], row["metric"]))
        if interval := items and bootstrap_interval(items):
            row["low"], row["high"] = interval
    return [*rows, *_mean_of_tasks(rows)], scores


def _mean_of_tasks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The mean of `acc` over the tasks of a set, as printed in papers; no row if a task lacks it or is alone."""
    accuracies = [row for row in rows if row["metric"] == "acc"]
    if len(accuracies) < 2 or {row["task"] for row in accuracies} < {row["task"] for row in rows}:
        return []
    row: dict[str, Any] = {"task": MEAN, "metric": "acc", "items": sum(row["items"] for row in accuracies)}
    row |= {"status": "done", "lm_eval": accuracies[0]["lm_eval"], **_computed(accuracies[0])}
    if lost := [row for row in accuracies if row["value"] is None]:
        return [row | {"value": None, "reason": f"{lost[0]['task']} has no accuracy"}]
    if all(row.get("stderr") is not None for row in accuracies):
        row["stderr"] = math.hypot(*(row["stderr"] for row in accuracies)) / len(accuracies)
    return [row | {"value": statistics.fmean(row["value"] for row in accuracies)}]


@dataclass
class Results:
    """All results of a cell: its compression, its rows of the `cells` table, the first gap, and the values behind the
    means. windows: (metric, text) -> the values of the text's windows (losses for the perplexity). scores: (name of the
    set, task, metric) -> the items' scores."""

    compression: Compression | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    gap: Gap | None = None
    windows: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    scores: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)


def gather_cell(
    cell: PlannedCell, evaluations: Sequence[TextEvaluation], root: Path = Path(), tasks: Sequence[TaskSet] = ()
) -> Results:
    """Read the results of a cell's jobs."""
    folder = CellFolder.of(root / cell.folder)
    results = Results()
    results.compression, results.gap = _compression(folder, cell)
    failed = results.gap  # without a compression there are no other results
    common = dict(cell.columns) | (results.compression.provenance if results.compression else {})
    for evaluation in evaluations:
        rows, gap = _perplexity_rows(folder, evaluation, results, failed)
        results.gap = results.gap or gap
        seen: dict[str, Any] = {}
        try:
            origin = evaluation.shared_with.get(cell.columns["calibration"])
            seen = contamination(origin, root / cell.overlap(evaluation.identity))
        except InputError as error:
            results.gap = results.gap or Gap("failed", str(error))
        results.rows += [common | row | seen for row in rows]
    for task_set in tasks:
        rows, gap = _task_rows(folder, task_set, results, failed)
        results.gap = results.gap or gap
        results.rows += [{**common, "task_set": task_set.name, **row} for row in rows]
    results.rows += [common | row for row in _metric_rows(results.compression, failed)]
    return results


@dataclass(frozen=True)
class CellFolder:
    """A cell's folder and the names of the files in it."""

    path: Path
    present: set[str]

    @classmethod
    def of(cls, path: Path) -> "CellFolder":
        return cls(path, set(os.listdir(path)) if path.is_dir() else set())

    def failure(self, *stages: str) -> Gap:
        """The known reason why a result of these stages is absent."""
        return failure(self.path, self.present, stages)


def _compression(folder: CellFolder, cell: PlannedCell) -> tuple[Compression | None, Gap | None]:
    """The results of a cell's compress job, or why there are none."""
    if not folder.present >= COMPRESSED:
        return None, folder.failure("compress")
    try:
        return read_compression(folder.path, cell.columns), None
    except InputError as error:
        return None, Gap("failed", str(error))


def _perplexity_rows(
    folder: CellFolder, evaluation: TextEvaluation, results: Results, failed: Gap | None
) -> tuple[list[dict[str, Any]], Gap | None]:
    """The rows of a perplexity and its divergences, and why they have no value, if they have none. The values of
    windows are added to `results`.

    failed: the gap in the cell's compression, if any.
    """
    stage, gap, text = f"perplexity-{evaluation.identity}", failed, {"text": evaluation.text}
    if not gap and f"{stage}.json" in folder.present:
        try:
            rows, windows = read_perplexity(folder.path, evaluation)
            results.windows |= {(metric, evaluation.text): values for metric, values in windows.items()}
            return [text | row for row in rows], None
        except InputError as error:
            gap = Gap("failed", str(error))
    gap = gap or folder.failure(stage, "perplexity")
    absent = {**text, "status": gap.status, "reason": gap.reason}
    return [{"metric": metric, **absent} for metric in ("perplexity", *DIVERGENCES)], gap


def _task_rows(
    folder: CellFolder, task_set: TaskSet, results: Results, failed: Gap | None
) -> tuple[list[dict[str, Any]], Gap | None]:
    """The rows of a task set, and why they have no value, if they have none. The items' scores are added to
    `results`."""
    stage, gap = f"tasks-{task_set.identity}", failed
    if not gap and f"{stage}.json" in folder.present:
        try:
            rows, scores = task_rows(folder.path, task_set)
            results.scores |= {(task_set.name, *measured): items for measured, items in scores.items()}
            return rows, None
        except InputError as error:
            gap = Gap("failed", str(error))
    gap = gap or folder.failure(stage)
    names = [*task_set.tasks, MEAN] if len(task_set.tasks) > 1 else task_set.tasks
    absent = {"metric": ACCURACIES[0], "status": gap.status, "reason": gap.reason}
    return [{**absent, "task": task} for task in names], gap


def _metric_rows(compression: Compression | None, gap: Gap | None) -> list[dict[str, Any]]:
    """A row for each of CELL_METRICS. gap: why there is no compression."""
    metrics = layer_metrics(compression) if compression else dict.fromkeys(CELL_METRICS)
    rows = []
    for metric, value in metrics.items():
        row: dict[str, Any] = {"metric": metric, "value": value, "status": gap.status if gap else "done"}
        if value is None:
            row["reason"] = gap.reason if gap else "the cell has no compressed layer"
        rows.append(row)
    return rows
