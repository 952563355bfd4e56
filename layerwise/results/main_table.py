"""The main tables: methods as rows, grouped by what may be compared, targets as columns."""

import argparse
import statistics
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from layerwise.results.cell_results import ACCURACIES, MEAN, without_filter
from layerwise.results.comparisons import NO_DIFFERENCE
from layerwise.results.protocol import MARK, provenance_marks
from layerwise.results.table_text import Section, Table, TableEntry, latex, markdown
from layerwise.runtime.errors import report_errors
from layerwise.runtime.files import write_atomic
from layerwise.storage.frames import (
    column,
    distinct_values,
    groups,
    groups_by,
    matching,
    missing,
    rows,
    select,
    true_of_any,
    tuples,
)
from layerwise.storage.table_schema import COMPARISONS, read_table

UNSUPPORTED = "–"
WORDS = {"mean_output_error": "mean output error over the layers", "kl": "KL(dense || compressed), nats per token,"}
DISTANCES = tuple(WORDS)  # distances from the dense model, which itself has none
SIDES = ["label", "other"]
SCOPES = ("model", "calibration", "mode", "target", "cell", "token_scope")  # columns of `layers` that the notes need
# columns of `allocations` that the notes need
BUDGETS = ("model", "calibration", "target", "allocation", "sparsity", "pair", "budget", "mean_level")
MISSED = 0.001  # smallest distance of the levels' mean from the budget that a note states
COMPARED = {"mean_output_error": "output_error"}  # a metric's name in `comparisons`
METRICS = ("perplexity", "kl", *ACCURACIES, "mean_output_error")  # metrics with tables, in order


def task_title(task: Any, task_set: Any, filtered: str = "") -> Any:
    """The name of a task in a set, in the tables' titles and in `comparisons`; strings or columns of strings.

    filtered: lm-eval's filter for the answers, if any.
    """
    return task + " of " + task_set + (f", {filtered}" if filtered else "")


def number(value: float, metric: str) -> str:
    """A value as printed: perplexities to two decimals if these are significant, accuracies in percent, errors to three
    digits."""
    if metric in ACCURACIES:
        return f"{100 * value:.1f}"
    if metric != "perplexity":
        return "0" if value == 0 else f"{value:#.3g}".removesuffix(".")  # 0.0500 is as precise as 0.0501
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.4g}"


def spread(values: Sequence[float], metric: str) -> str:
    """Mean and sample standard deviation over several seeds, with the same decimals; a single value is printed
    alone."""
    centre = statistics.fmean(values)
    if len(values) < 2:
        return number(centre, metric)
    mean = number(centre, metric)
    deviation = statistics.stdev(values) * (100 if metric in ACCURACIES else 1)
    decimals = len(mean.partition(".")[2])
    return f"{mean} ± {deviation:.2g}" if "e" in mean else f"{mean} ± {deviation:.{decimals}f}"


def undecided(comparisons: pd.DataFrame, metric: str) -> set[tuple[str, ...]]:
    """(model, calibration, text, mode, target, label, other), in both orders, for pairs without a shown difference."""
    alike = matching(comparisons, metric=COMPARED.get(metric, metric), verdict=NO_DIFFERENCE)
    keys = ["model", "calibration", "text", "mode", "target"]
    filled = alike.assign(text=column(alike, "text").fillna(""))
    return {row for sides in (SIDES, SIDES[::-1]) for row in tuples(filled, [*keys, *sides])}


def _compared(comparisons: pd.DataFrame, metric: str, model: str, calibration: str, text: str) -> bool:
    """Whether methods were compared by this metric in this place."""
    here = matching(comparisons, metric=COMPARED.get(metric, metric), model=model, calibration=calibration)
    return true_of_any(column(here, "text").fillna("") == text)


def fallback(layers: pd.DataFrame, model: str, calibration: str) -> list[str]:
    """A sentence on the number of experts' layers calibrated on every token because few were routed to them, if any."""
    here = matching(layers, model=model, calibration=calibration)
    here = select(here, column(here, "target") != "dense")
    counts = []
    for mode, part in groups_by(here, "mode"):
        scopes = [column(cell, "token_scope") == "fallback" for _, cell in groups_by(part, "cell")]
        fallbacks = [int(scope.sum()) for scope in scopes]
        least, most = min(fallbacks), max(fallbacks)  # in sequential mode, routing depends on the cell
        if most:
            count = f"{least}" if least == most else f"{least} to {most}"
            counts.append(f"{count} of {max(map(len, scopes))} layers in {mode} mode")
    why = "Calibrated on every token, since fewer were routed to their expert than they have inputs"
    return [f"{why}: {', '.join(counts)}."] if counts else []


def missed_budgets(allocations: pd.DataFrame, model: str, calibration: str, targets: Collection[str]) -> list[str]:
    """A sentence for each spread target whose levels have another mean than the budget, such as n:m counts of unequal
    blocks."""
    here = matching(allocations, model=model, calibration=calibration)
    here = select(here, (column(here, "mean_level") - column(here, "budget")).abs() > MISSED)
    sentences = []
    for (target, allocation), part in groups(here, ["target", "allocation"]):
        if f"{target} {allocation}" in targets:
            first, means = rows(part)[0], distinct_values(part, "mean_level")  # one for each seed
            means = [_level(mean, first) for mean in (min(means), max(means))]
            got = " to ".join(dict.fromkeys(means))
            wanted = _level(first["budget"], first)
            sentences.append(f"{target} {allocation}: the levels' mean is {got}, not the budget of {wanted}.")
    return sentences


def _level(value: float, row: Mapping[str, Any]) -> str:
    """A level or budget of `allocations`, with its unit."""
    if row["sparsity"] > 0 and missing(row["pair"]):
        return f"{100 * value:.2f}%"
    return f"{value:.3f} bits{'' if missing(row['pair']) else ' per weight'}"


def tables(
    cells: pd.DataFrame,
    metric: str,
    comparisons: pd.DataFrame | None = None,
    layers: pd.DataFrame | None = None,
    allocations: pd.DataFrame | None = None,
) -> Iterator[Table]:
    """One table per model, calibration set and text or task of `cells`, in its order; the modes are its sections.

    Cells that differ only in the seed are shown as mean and standard deviation. comparisons: the table that marks the
    best entries and those not shown to differ from them; without it only entries with equal printed values count as
    equally good. layers: the table for a note about layers that were not calibrated on their own tokens. allocations:
    the table for notes about budgets that the levels miss.
    """
    equal = set() if comparisons is None else undecided(comparisons, metric)
    data = _of_metric(cells, metric)
    dense = select(data, column(data, "target") == "dense")
    pruned = select(data, column(data, "target") != "dense")
    for (model, calibration, text), part in groups(pruned, ["model", "calibration", "text"]):
        reference = matching(dense, model=model, text=text)
        marked, reasons = provenance_marks(pd.concat([part, reference]))
        tested = comparisons is not None and _compared(comparisons, metric, model, calibration, text)
        dense_note = _dense_note(reference, metric, marked)
        notes = [*dense_note, *_notes(part, metric, tested)]
        notes += [] if layers is None else fallback(layers, model, calibration)
        targets = distinct_values(part, "target")
        notes += [] if allocations is None else missed_budgets(allocations, model, calibration, targets)
        sections = []
        for mode, here in groups_by(part, "mode"):
            key = (model, calibration, text, mode)
            alike = {row[len(key) :] for row in equal if row[: len(key)] == key}
            sections.append(Section(mode, _groups(rows(here), targets, metric, alike, marked)))
        what = WORDS.get(metric, metric) + (f" on {text}" if text else "")
        name = "-".join(filter(None, (metric, model, calibration, text)))
        title = f"{model}, {what}, calibrated on {calibration}"
        note = " ".join([*notes, *reasons])
        yield Table(name, title, note, targets, sections, model, calibration, " ".join(dense_note))


def _of_metric(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The rows of a metric, with the task as their text for an accuracy, and "" without a text."""
    if metric not in ACCURACIES:
        data = matching(cells, metric=metric)
        return data.assign(text=column(data, "text").fillna(""))
    parts = []
    for own, mask in _measured(cells).items():
        base, filtered = without_filter(own)
        if base == metric:
            data = select(cells, mask)
            title = task_title(column(data, "task"), column(data, "task_set"), filtered)
            parts.append(data.assign(text=title.fillna("")))
    return pd.concat(parts) if parts else cells.iloc[:0].assign(text="")


def _measured(cells: pd.DataFrame) -> dict[str, pd.Series]:
    """Accuracy, with its filter -> the mask of its rows in `cells`, including rows of cells that lack it.

    A failed task set has one row per task, under the first metric, for any metric of the task; other cells tell the
    actual metric. A mean that no other cell of the set has belongs to no accuracy.
    """
    names, done = column(cells, "metric"), column(cells, "status") == "done"
    lost = (names == ACCURACIES[0]) & ~done
    sets = column(cells, "task_set")
    tasks = sets + "/" + column(cells, "task")
    unknown = lost & ~tasks.isin(tasks[done]) & ~((column(cells, "task") == MEAN) & sets.isin(sets[done]))
    found = {}
    for own in distinct_values(cells, "metric"):
        if without_filter(own)[0] in ACCURACIES:
            mask = ((names == own) & ~lost) | (lost & tasks.isin(tasks[done & (names == own)]))
            found[own] = mask | unknown if own == ACCURACIES[0] else mask
    return found


def _dense_note(reference: pd.DataFrame, metric: str, marked: Collection[tuple[str, str]]) -> list[str]:
    """A sentence with the dense model's value, except in tables of distances from it."""
    if metric in DISTANCES or reference.empty:
        return []
    row = rows(reference)[0]
    error = row["stderr"] if metric in ACCURACIES else None
    noise = "" if error is None or missing(error) else f" (standard error {number(error, metric)})"
    return [f"Dense: {entry_text([row], metric, marked)}{noise}."]


def _notes(part: pd.DataFrame, metric: str, tested: bool) -> list[str]:
    """Sentences on how to read a table; tested: whether its methods were compared."""
    better = "In percent, higher" if metric in ACCURACIES else "Lower"
    alike = ", and what is not shown to differ from it," if tested else ""
    notes = [f"{better} is better; the best of each group and column{alike} is bold where there is a choice."]
    repeats = len(distinct_values(part, "seed"))
    if repeats > 1:
        notes.append(f"Mean and standard deviation over {repeats} seeds.")
    elif tested:
        notes.append("One draw of the calibration; other draws may differ.")
    contaminated = select(part, column(part, "contaminated").eq(True).fillna(False))
    notes += [f"Calibration and evaluation {what}." for what in distinct_values(contaminated, "contamination")]
    return notes


def entry_text(rows: Sequence[Mapping[str, Any]], metric: str, marked: Collection[tuple[str, str]] = ()) -> str:
    """The rows of one setting's seeds as an entry; a missing value is shown and not averaged away."""
    if any((row["mode"], row["cell"]) in marked for row in rows):
        return entry_text(rows, metric) + MARK
    absent = [row for row in rows if missing(row["value"])]
    if not absent:
        return spread([float(row["value"]) for row in rows], metric)
    word = "diverged" if absent[0]["status"] == "done" else str(absent[0]["status"])
    return word if len(rows) == 1 else f"{word} ({len(absent)} of {len(rows)})"


def _groups(
    rows: Sequence[Mapping[str, Any]],
    targets: Sequence[str],
    metric: str,
    alike: Collection[tuple[str, ...]],
    marked: Collection[tuple[str, str]],
) -> list[tuple[str, list[tuple[str, list[TableEntry]]]]]:
    """(comparison, lines of a label and its entries). alike: (target, label, label) of pairs not shown to differ."""
    groups = []
    for comparison in COMPARISONS:
        cells: dict[str, dict[str, list[Mapping[str, Any]]]] = {}  # label -> target -> seeds
        for row in rows:
            if row["comparison"] == comparison:
                cells.setdefault(row["label"], {}).setdefault(row["target"], []).append(row)
        best = {
            target: _best({label: seeds[target] for label, seeds in cells.items() if target in seeds}, metric, alike)
            for target in targets
        }
        lines = []
        for label, by_target in cells.items():
            shown = {target: entry_text(seeds, metric, marked) for target, seeds in by_target.items()}
            lines.append((label, [TableEntry(shown.get(t, UNSUPPORTED), label in best[t]) for t in targets]))
        if lines:
            groups.append((comparison, lines))
    return groups


def _best(
    seeds: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, alike: Collection[tuple[str, ...]]
) -> set[str]:
    """Labels of the best methods of a target and of equally good ones. seeds: label -> rows. None for a single
    method."""
    choose = max if metric in ACCURACIES else min
    values = {
        label: statistics.fmean(row["value"] for row in rows)
        for label, rows in seeds.items()
        if not any(missing(row["value"]) for row in rows)
    }
    if len(values) < 2:
        return set()
    first = choose(values, key=values.__getitem__)
    target = seeds[first][0]["target"]
    # Values that are equal as printed count as equally good.
    printed = {label: number(value, metric) for label, value in values.items()}
    return {label for label in values if printed[label] == printed[first] or (target, label, first) in alike}


def document(
    cells: pd.DataFrame,
    render: Callable[[Table], str],
    comparisons: pd.DataFrame | None = None,
    layers: pd.DataFrame | None = None,
    allocations: pd.DataFrame | None = None,
) -> str:
    """The tables of perplexity, of KL from the dense model, of zero-shot tasks, then of the mean output error."""
    notes = (comparisons, layers, allocations)
    rendered = [render(table) for metric in METRICS for table in tables(cells, metric, *notes)]
    return "\n".join(rendered) or "No results yet.\n"


def write_main_table(
    cells: pd.DataFrame, comparisons: pd.DataFrame, layers: pd.DataFrame, allocations: pd.DataFrame, out: Path
) -> None:
    """Write main.md and main.tex to the folder `out`. Of layers and allocations only SCOPES and BUDGETS are read."""
    write_atomic(out / "main.md", document(cells, markdown, comparisons, layers, allocations))
    write_atomic(out / "main.tex", document(cells, latex, comparisons, layers, allocations))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tables", description=__doc__)
    parser.add_argument("--tables", type=Path, default=Path("results/tables"), help="folder of the tables")
    parser.add_argument("--out", type=Path, help="folder for main.md and main.tex (default: that of the tables)")
    args = parser.parse_args(argv)
    cells, comparisons = read_table(args.tables, "cells"), read_table(args.tables, "comparisons")
    layers, allocations = read_table(args.tables, "layers", SCOPES), read_table(args.tables, "allocations", BUDGETS)
    write_main_table(cells, comparisons, layers, allocations, args.out or args.tables)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
