"""Gather the cells of a study into tables: layers, cells, traces, bounds, allocations, comparisons (of methods),
allocation_comparisons, skipped, main.

Rows are in the order of the plan, columns in the order of workflow/schemas/tables.schema.yaml, so that two CSVs of
one study can be compared by eye. All tables appear together or, if anything is wrong, none appears.
"""

import argparse
import csv
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from layerwise.results import main_table
from layerwise.results.bounds import read_bounds, read_levels, with_bounds
from layerwise.results.cell_results import (
    Compression,
    Gap,
    PlannedCell,
    Results,
    TaskSet,
    TextEvaluation,
    evaluations,
    gather_cell,
    task_sets,
    without_filter,
)
from layerwise.results.comparisons import (
    LAYER_ERRORS,
    Measure,
    Observation,
    accuracy_measure,
    compare_allocations,
    compare_methods,
    layer_errors,
    window_measure,
)
from layerwise.results.protocol import Protocol
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import whole_file
from layerwise.storage.table_schema import arrow_schema, from_rows, holds, read_table, to_frame
from layerwise.study.grid import Plan, plan

TABLES = ("layers", "cells", "traces", "bounds", "allocations", "comparisons", "allocation_comparisons", "skipped")
FLOAT_FORMAT = "%.9g"
ROWS_AT_ONCE = 200_000  # rows held in memory before they are written


class TableWriter:
    """Writes a table in pieces as parquet and CSV, with few rows in memory."""

    def __init__(self, table: str, parquet: Path, csv: Path) -> None:
        self.schema, self.csv, self.first = arrow_schema(table), csv, True
        self.parquet = pq.ParquetWriter(parquet, self.schema, write_page_checksum=True)
        self.waiting: list[pa.Table] = []
        self.rows = 0

    def add(self, rows: pa.Table) -> None:
        self.waiting.append(rows)
        self.rows += len(rows)
        if self.rows >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        if not self.waiting and not self.first:
            return
        data = pa.concat_tables([self.schema.empty_table(), *self.waiting]).combine_chunks()
        self.waiting, self.rows = [], 0
        self.parquet.write_table(data)
        write_csv(data, self.csv, header=self.first)
        self.first = False

    def close(self) -> None:
        self.flush()
        self.parquet.close()


def write_csv(data: pa.Table, path: Path, header: bool = True) -> None:
    """Write a table, or append it if `header` is False; missing values are empty fields."""
    mode = "w" if header else "a"
    texts = [column for column in data.columns if pa.types.is_string(column.type)]
    # Among line-ending characters, the csv module of Python 3.11 and 3.12 quotes only its own line terminator.
    returns = any(holds(text, "\r") for text in texts)
    to_frame(data).to_csv(
        path,
        mode=mode,
        header=header,
        index=False,
        float_format=FLOAT_FORMAT,
        lineterminator="\n",
        encoding="utf-8",
        quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL,
    )


def observe(columns: Mapping[str, Any], compression: Compression, results: Results) -> Observation:
    """The units of a cell's measures: layer errors, values of each text's windows, item scores."""
    errors = (compression.layers.column(name).to_pylist() for name in ("layer", *LAYER_ERRORS))
    values: dict[Measure, Mapping[Any, float]] = {**layer_errors(*errors)}
    for (metric, text), windows in results.windows.items():
        values[window_measure(metric, text)] = dict(enumerate(windows))
    for (tasks, task, metric), scores in results.scores.items():
        own, filtered = without_filter(metric)
        values[accuracy_measure(own, main_table.task_title(task, tasks, filtered))] = dict(enumerate(scores))
    return Observation(columns, values)


def refuse_other_protocols(results: Results, protocol: Protocol) -> None:
    """Remove values computed under another protocol than the cells before; the rows keep the reason."""
    for row in results.rows:
        if sentence := protocol.difference(row):
            row |= {"value": None, "stderr": None, "low": None, "high": None, "status": "failed", "reason": sentence}
            results.gap = results.gap or Gap("failed", sentence)
            results.windows.pop((row["metric"], row.get("text") or ""), None)
            results.scores.pop((row.get("task_set") or "", row.get("task") or "", row["metric"]), None)
    if results.rows and all(row["status"] == "failed" for row in results.rows):
        results.compression = None


@dataclass(frozen=True)
class StudyInputs:
    """The inputs of the tables. evaluations, tasks: common to all cells. certificates, allocations: paths, relative to
    the root, of the bounds and levels that the study computes. swept: the varied quantity, the same in every row of
    `cells`."""

    cells: Sequence[PlannedCell]
    skipped: Sequence[Mapping[str, Any]]
    evaluations: Sequence[TextEvaluation]
    tasks: Sequence[TaskSet] = ()
    certificates: Collection[str] = ()
    swept: str | None = None
    allocations: Collection[str] = ()

    @classmethod
    def of(cls, planned: Plan) -> "StudyInputs":
        """The inputs for a plan."""
        texts = evaluations(planned.config, planned.evaluations)
        sets, swept = task_sets(planned.tasks), planned.config.get("sweep")
        return cls(planned.cells, planned.skipped, texts, sets, planned.certificates, swept, planned.allocations)


def collect(study: StudyInputs, out: Path, partial: bool = False, root: Path = Path()) -> int:
    """Write the tables of the cells to the folder `out`; returns the number of incomplete cells.

    Raises InputError when a cell is failed, missing or broken, unless `partial` is set. With `partial` such a cell is a
    row with its reason, and layers have no bounds if a bound is absent, broken or out of date.
    root: the folder to which the cells' folders are relative.
    """
    bounds = _read_bounds(study.certificates, root, partial)
    with ExitStack() as stack:
        writers = _open_tables(out, stack)
        gaps, observations = _write_cells(study, writers, bounds, partial, root)
        if gaps and not partial:
            folder, gap = gaps[0]
            raise InputError(
                f"All {len(study.cells)} cells must have results. Got {len(gaps)} that failed or are missing; "
                f"the first is {folder} ({gap.status}: {gap.reason.rstrip('.')})."
            )
        for rows in bounds.values():
            writers["bounds"].add(rows)
        for path in study.allocations:
            with _unless(partial):
                writers["allocations"].add(read_levels(root / path))
        writers["comparisons"].add(from_rows(compare_methods(observations), "comparisons", "the comparisons"))
        spread = from_rows(compare_allocations(observations), "allocation_comparisons", "the allocations' comparisons")
        writers["allocation_comparisons"].add(spread)
        writers["skipped"].add(from_rows([dict(row) for row in study.skipped], "skipped", "the plan"))
        for writer in writers.values():
            writer.close()
    return len(gaps)


def _read_bounds(certificates: Collection[str], root: Path, partial: bool) -> dict[str, pa.Table]:
    """Path -> rows of `bounds`; with `partial`, unreadable files are left out."""
    bounds = {}
    for path in certificates:
        with _unless(partial):
            bounds[path] = read_bounds(root / path)
    return bounds


def _unless(partial: bool) -> AbstractContextManager[None]:
    """A context that suppresses InputError if `partial` is set."""
    return suppress(InputError) if partial else nullcontext()


def _open_tables(out: Path, stack: ExitStack) -> dict[str, TableWriter]:
    """A writer for each table; its files appear when the stack is left without an error."""
    writers = {}
    for table in TABLES:
        parquet, text = (stack.enter_context(whole_file(out / f"{table}.{suffix}")) for suffix in ("parquet", "csv"))
        writers[table] = TableWriter(table, parquet, text)
    for writer in writers.values():
        stack.callback(writer.parquet.close)  # also after an error, before the unfinished files are removed
    return writers


def _write_cells(
    study: StudyInputs, writers: Mapping[str, TableWriter], bounds: Mapping[str, pa.Table], partial: bool, root: Path
) -> tuple[list[tuple[str, Gap]], list[Observation]]:
    """Write layers, traces and rows of every cell; returns (folder, gap) of incomplete cells, and the observations."""
    gaps: list[tuple[str, Gap]] = []
    observations: list[Observation] = []
    protocol = Protocol()
    for cell in study.cells:
        results = gather_cell(cell, study.evaluations, root, study.tasks)
        refuse_other_protocols(results, protocol)
        if results.gap:
            gaps.append((cell.folder, results.gap))
        if gaps and not partial:
            continue  # only counts faults from here on
        if compression := results.compression:
            writers["layers"].add(_bounded(cell, compression.layers, bounds, partial, root))
            writers["traces"].add(compression.trace)
            observations.append(observe(cell.columns, compression, results))
        rows = [{**row, "swept": study.swept} for row in results.rows]
        writers["cells"].add(from_rows(rows, "cells", cell.folder))
    return gaps, observations


def _bounded(
    cell: PlannedCell, layers: pa.Table, bounds: Mapping[str, pa.Table], partial: bool, root: Path
) -> pa.Table:
    """The layers of a cell, with their bounds if the study computes any."""
    path = cell.certificate
    if path is not None and path in bounds:
        with _unless(partial):
            return with_bounds(layers, bounds[path], root / path)
    return layers


def write_tables(config: Mapping[str, Any], out: Path, partial: bool = False) -> None:
    """Write all tables of a study and the main table to `out`; results are in the working directory."""
    planned = plan(config)
    absent = collect(StudyInputs.of(planned), out, partial)
    layers = read_table(out, "layers", main_table.SCOPES)
    allocations = read_table(out, "allocations", main_table.BUDGETS)
    main_table.write_main_table(read_table(out, "cells"), read_table(out, "comparisons"), layers, allocations, out)
    print(f"{len(planned.cells)} cells, {absent} incomplete, {len(planned.skipped)} skipped -> {out}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="collect", description=__doc__)
    parser.add_argument("--study", required=True, type=json.loads, help="the whole config as JSON")
    parser.add_argument("--out", type=Path, default=Path("results/tables"), help="folder for the tables")
    parser.add_argument(
        "--partial", action="store_true", help="gather the results that exist; the others are rows with a reason"
    )
    args = parser.parse_args(argv)
    write_tables(args.study, args.out, args.partial)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
