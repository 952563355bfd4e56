"""Gather the cells of a study into tables: layers, cells, traces, bounds, comparisons, skipped, main.

Rows stand in the order of the plan, columns in the order of workflow/schemas/tables.schema.yaml, so that two CSVs of
one study can be compared by eye. The tables appear together, or, when anything is wrong, not at all.
"""

import argparse
import csv
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from layerwise.results import main_table
from layerwise.results.bounds import read_bounds, with_bounds
from layerwise.results.cell_results import (
    Compression,
    Evaluation,
    Gap,
    PlannedCell,
    Results,
    TaskSet,
    evaluations,
    gather_cell,
    task_sets,
)
from layerwise.results.comparisons import ERRORS, Measure, Observation, accuracy, compare, perplexity
from layerwise.results.protocol import Protocol
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import whole_file
from layerwise.storage.table_schema import arrow_schema, from_rows, read_table, to_frame
from layerwise.study.grid import plan

TABLES = ("layers", "cells", "traces", "bounds", "comparisons", "skipped")
FLOAT_FORMAT = "%.9g"
ROWS_AT_ONCE = 200_000  # rows held in memory before they are written


class TableWriter:
    """Writes a table piece by piece as parquet and CSV, holding few rows in memory."""

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
    """Write, or without header append, a table; empty fields for what is not there."""
    mode = "w" if header else "a"
    texts = [column for column in data.columns if pa.types.is_string(column.type)]
    # Of characters that end a line the csv module of Python 3.11 and 3.12 quotes just the one that is written.
    returns = any(pc.any(pc.match_substring(text, "\r")).as_py() for text in texts)
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
    """What a cell was measured on: the errors of its layers, the losses of each text's windows, the scores of items."""
    errors = (compression.layers.column(name).to_pylist() for name in ("layer", "output_error"))
    values: dict[Measure, dict[Any, float]] = {ERRORS: dict(zip(*errors, strict=True))}
    for text, losses in results.losses.items():
        values[perplexity(text)] = dict(enumerate(losses))
    for (tasks, task, metric), scores in results.scores.items():
        values[accuracy(metric, main_table.task_title(task, tasks))] = dict(enumerate(scores))
    return Observation(columns, values)


def refuse_others(results: Results, protocol: Protocol) -> None:
    """Take away what was computed under another protocol than the cells before it: rows that say so are left."""
    for row in results.rows:
        if sentence := protocol.difference(row):
            row |= {"value": None, "stderr": None, "low": None, "high": None, "status": "failed", "reason": sentence}
            results.gap = results.gap or Gap("failed", sentence)
            results.losses.pop(row.get("text"), None)
            results.scores.pop((row.get("task_set"), row.get("task"), row["metric"]), None)
    if results.rows and all(row["status"] == "failed" for row in results.rows):
        results.compression = None


def collect(
    cells: Sequence[PlannedCell],
    skipped: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    out: Path,
    partial: bool = False,
    root: Path = Path(),
    certificates: Collection[str] = (),
    swept: str | None = None,
    tasks: Sequence[TaskSet] = (),
) -> int:
    """Write the tables of the cells into folder `out` and return how many cells are not whole.

    Raises InputError when a cell is failed, missing or broken, unless `partial`: then it is a row with its reason.
    root: folder that the cells' folders are relative to; certificates: paths, relative to it, of the bounds that the
    study computes; with `partial`, one that is absent, broken or out of date leaves the layers without bounds; swept:
    what the study varies, the same in every row of `cells`.
    """
    gaps: list[tuple[str, Gap]] = []
    observations: list[Observation] = []
    unless_partial = suppress(InputError) if partial else nullcontext()
    bounds: dict[str, pa.Table] = {}
    protocol = Protocol()
    for path in certificates:
        with unless_partial:
            bounds[path] = read_bounds(root / path)
    with ExitStack() as stack:
        files = {
            (table, suffix): stack.enter_context(whole_file(out / f"{table}.{suffix}"))
            for table in TABLES
            for suffix in ("parquet", "csv")
        }
        writers = {table: TableWriter(table, files[table, "parquet"], files[table, "csv"]) for table in TABLES}
        for writer in writers.values():
            stack.callback(writer.parquet.close)  # after an error too: before the unfinished files are removed
        for cell in cells:
            results = gather_cell(cell, evaluations, root, tasks)
            refuse_others(results, protocol)
            compression = results.compression
            if results.gap:
                gaps.append((cell.folder, results.gap))
            if gaps and not partial:
                continue  # only counting what is wrong
            if compression:
                layers = compression.layers
                if cell.certificate in bounds:
                    with unless_partial:
                        layers = with_bounds(layers, bounds[cell.certificate], root / cell.certificate)
                writers["layers"].add(layers)
                writers["traces"].add(compression.trace)
                observations.append(observe(cell.columns, compression, results))
            writers["cells"].add(from_rows([{**row, "swept": swept} for row in results.rows], "cells", cell.folder))
        if gaps and not partial:
            folder, gap = gaps[0]
            raise InputError(
                f"Expected results of all {len(cells)} cells, {len(gaps)} are failed or missing; "
                f"the first is {folder} ({gap.status}: {gap.reason.rstrip('.')})."
            )
        for table in bounds.values():
            writers["bounds"].add(table)
        compared = compare(observations)
        writers["comparisons"].add(from_rows(compared, "comparisons", "the comparisons"))
        writers["skipped"].add(from_rows([dict(row) for row in skipped], "skipped", "the plan"))
        for writer in writers.values():
            writer.close()
    return len(gaps)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="collect", description=__doc__)
    parser.add_argument("--study", required=True, type=json.loads, help="the whole config as JSON")
    parser.add_argument("--out", type=Path, default=Path("results/tables"), help="folder for the tables")
    parser.add_argument("--partial", action="store_true", help="gather what exists; the rest are rows with a reason")
    args = parser.parse_args(argv)
    planned = plan(args.study)
    absent = collect(
        planned.cells,
        planned.skipped,
        evaluations(planned.config, planned.evaluations),
        args.out,
        args.partial,
        certificates=planned.certificates,
        swept=planned.config.get("sweep"),
        tasks=task_sets(planned.tasks),
    )
    layers = read_table(args.out, "layers", main_table.SCOPES)
    main_table.write(read_table(args.out, "cells"), read_table(args.out, "comparisons"), layers, args.out)
    print(f"{len(planned.cells)} cells, {absent} not whole, {len(planned.skipped)} skipped -> {args.out}")


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
