"""Lay the perplexities and accuracies of a study beside the published ones: ours, difference, tolerance, verdict.

The dense model is compared first: if our value is not the published one, the evaluations differ, and no compressed
model can be judged. Fields of the protocol that differ are named in every row.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from layerwise.comparison import published_page
from layerwise.comparison.published_rows import DENSE, ERRORS, FILE, Row, read_published, target_of, tolerance
from layerwise.contract.method_file import CatalogueError
from layerwise.results.cell_results import ACCURACIES
from layerwise.results.collect import write_csv
from layerwise.results.main_table import task_title
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import whole_file
from layerwise.runtime.sentences import brief
from layerwise.sources.specs import EvaluationSpec, ModelSpec, TextSpec
from layerwise.sources.text_files import dataset_of
from layerwise.storage.frames import missing
from layerwise.storage.frames import rows as rows_of
from layerwise.storage.table_schema import from_rows, read_table, to_frame, write_parquet
from layerwise.study.allocation_entries import UNIFORM
from layerwise.study.cell import Cell, name_of
from layerwise.study.grid import Plan, plan
from layerwise.study.method_entries import LONGEST_SENTENCE

# Perplexities at other lengths, and accuracies after other numbers of examples, are other numbers.
NOT_COMPARABLE = ("evaluation_length", "evaluation_windows", "fewshot")
KEYS = ("model", "calibration", "mode", "cell")
METRICS = ("perplexity", *ACCURACIES)


@dataclass(frozen=True)
class Pair:
    """A planned cell and an evaluation that a published row may be compared with; text: its name, or a task's title;
    differs: field -> (theirs, ours); unsaid: fields of the protocol that the source leaves open."""

    cell: Cell
    metric: str
    text: str
    differs: Mapping[str, tuple[Any, Any]]
    unsaid: Sequence[str] = ()

    @property
    def key(self) -> tuple[str, ...]:
        return (*(self.cell.columns[name] for name in KEYS), self.metric, self.text)


def text_name(spec: TextSpec) -> str:
    """Name under which published.csv knows a text of the config: wikitext2, c4, c4-validation or its data set's."""
    files = spec.get("files", ())
    if spec.get("hub") == "Salesforce/wikitext" and all(file.startswith("wikitext-2-raw-v1/test") for file in files):
        return "wikitext2"
    if spec.get("hub") == "allenai/c4":
        return "c4-validation" if any("validation" in file for file in files) else "c4"
    return dataset_of(spec)


def hub_name(model: ModelSpec) -> str | None:
    """Name on the hub of a model of the config; `known_as` gives that of a local folder."""
    return model.get("known_as") or model.get("hub")


def pairs(study: Plan, row: Row, model: str) -> list[Pair]:
    """The cells and evaluations of a model (its id) that a published row describes, those nearest to its protocol."""
    method, params = row["our_method"], json.loads(row["our_params"] or "{}")
    try:
        wanted = study.catalogue.complete(method, params, f"{FILE.name}, {row['paper']}")
        spread = _allocation(study, row)
    except CatalogueError as error:
        raise InputError(brief(str(error), LONGEST_SENTENCE)) from None
    # Which of two equal entries goes first, a convention, is left to the study where the row does not name it.
    same = [name for name in wanted if name != "convention" or name in params]
    target = target_of(row).as_dict()
    candidates = []
    for cell in study.cells:
        asked, own = cell.spec["method"], cell.spec.get("allocation")
        if cell.model != model or asked["name"] != method or cell.spec["target"] != target or "tune" in cell.spec:
            continue
        if (own and {own["allocator"]: own["params"]}) != spread:
            continue
        if all(asked["params"][name] == wanted[name] for name in same):
            candidates += _pairs_of(study, row, cell)
    fewest = min((len(pair.differs) for pair in candidates), default=0)
    return [pair for pair in candidates if len(pair.differs) == fewest]


def _allocation(study: Plan, row: Row) -> dict[str, Any] | None:
    """{allocator: complete parameters} of what spreads the target of a published row; None where all layers are alike.

    Raises CatalogueError for an allocator or a parameter that the study does not know.
    """
    spread = json.loads(row["our_allocation"] or "{}")
    where = f"{FILE.name}, {row['paper']}"
    return {name: study.allocators.complete(name, params, where) for name, params in spread.items()} or None


def _pairs_of(study: Plan, row: Row, cell: Cell) -> Iterator[Pair]:
    """A cell with each evaluation on the text, or set of tasks with the task, of a published row."""
    if row["our_metric"] in ACCURACIES:
        for spec in study.tasks.values():
            if (task := row["evaluation_text"]) in spec["tasks"]:
                items = spec.get("items")
                differs = {} if items is None else {"items": ("all", items)}
                unsaid = ["fewshot"] if row["fewshot"] is None else []
                yield Pair(cell, row["our_metric"], task_title(task, name_of(spec)), differs, unsaid)
        return
    for spec in study.evaluations.values():
        if text_name(study.config["texts"][spec["text"]]) == row["evaluation_text"]:
            ours = our_protocol(study, row, cell, spec)
            unsaid = [name for name in ours if row[name] is None]
            yield Pair(cell, "perplexity", name_of(spec), protocol_differences(row, ours, spec), unsaid)


def our_protocol(study: Plan, row: Row, cell: Cell, evaluation: EvaluationSpec) -> dict[str, Any]:
    """Field of published.csv -> what a cell and evaluation do, of the fields that matter to the row's method."""
    calibration = study.calibrations[cell.calib]
    ours: dict[str, Any] = {"evaluation_length": evaluation["length"]}
    if study.catalogue[row["our_method"]].card["needs"]:
        ours |= {
            "mode": cell.mode,
            "calibration_text": text_name(study.config["texts"][calibration["text"]]),
            "calibration_samples": calibration["samples"],
            "calibration_length": calibration["length"],
        }
    return ours


def protocol_differences(row: Row, ours: Row, evaluation: EvaluationSpec) -> dict[str, tuple[Any, Any]]:
    """Field -> (published, ours) of each field of the paper's protocol that is different in this cell."""
    differs = {name: (row[name], here) for name, here in ours.items() if row[name] is not None and row[name] != here}
    samples = evaluation.get("samples")
    if samples is not None:
        differs["evaluation_windows"] = ("all", samples)
    return differs


def dense_references(rows: Sequence[Row], row: Row) -> list[Row]:
    """The published dense values to compare a row with: its own paper's, then others' of the same protocol."""
    same = ("hub", "our_metric", "evaluation_text", "evaluation_length", "fewshot")
    dense = [other for other in rows if other["our_method"] == "dense" and other["not_joined"] is None]
    dense = [other for other in dense if all(other[name] == row[name] for name in same)]
    of_paper = [other for other in dense if other["paper"] == row["paper"]]
    # Without a length, another paper's dense perplexity may be of another one.
    said = row["evaluation_length"] or row["our_metric"] in ACCURACIES
    others = [other for other in dense if other["status"] == "primary"] if said else []
    return [*of_paper, *(other for other in others if other["paper"] != row["paper"])]


def published_comparisons(study: Plan, rows: Sequence[Row], cells: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Rows of the table `published`: the published numbers that a cell is compared with, and the other numbers of these
    papers for the same model, with the reason why they are not compared.

    cells: the table of that name, or None where nothing has been run.
    """
    done = {} if cells is None else _measured(cells)
    compared = []
    for name, model in study.models.items():
        known = [row for row in rows if row["hub"] and row["hub"] == hub_name(model)]
        entries = [
            entry
            for row in sorted(known, key=lambda row: row["our_method"] != "dense")
            if row["our_metric"] in METRICS
            for entry in _entries(study, rows, row, name, done)
        ]
        # Of a paper of which the study has more than the dense model, what it does not have is listed too.
        papers = {entry["paper"] for entry in entries if entry.get("cell") and entry["method"] != "dense"}
        compared += [entry for entry in entries if entry.get("cell") or entry["paper"] in papers]
    return compared


def _measured(cells: pd.DataFrame) -> dict[tuple[str, ...], Row]:
    """Pair.key -> row of `cells`, of the perplexities and accuracies."""
    return {
        (*(row[name] for name in KEYS), row["metric"], _text(row)): row
        for row in rows_of(cells)
        if row["metric"] in METRICS
    }


def _text(row: Row) -> str:
    """The text or task of a row of `cells`, named as in a pair."""
    return row["text"] if missing(row.get("task")) else task_title(row["task"], row["task_set"])


def _entries(
    study: Plan, rows: Sequence[Row], row: Row, model: str, done: Mapping[tuple[str, ...], Row]
) -> Iterator[dict[str, Any]]:
    """One entry per cell that the row is compared with, or one that says why there is none."""
    entry = {
        "model": name_of(study.models[model]),
        "paper": row["paper"],
        "paper_table": row["table"],
        "printed_method": row["method"],
        "printed_setting": row["setting"],
        "metric": row["our_metric"],
        "text": None,
        "published": row["number"],
        "deviation": row["deviation"],
        "assumed": row["assumed"],
        "source_status": row["status"],
        "source": row["source"],
    }
    if row["not_joined"]:
        yield entry | {"verdict": "not run", "reason": row["not_joined"]}
        return
    entry |= {
        "method": row["our_method"],
        "target": target_of(row).label,
        "allocation": next(iter(json.loads(row["our_allocation"] or "{}")), UNIFORM),
    }
    chosen = pairs(study, row, model)
    if not chosen:
        yield entry | {"verdict": "not run", "reason": _absent(study, row)}
        return
    references = dense_references(rows, row)
    for pair in chosen:
        yield entry | _compared(study, row, pair, references, done)


def _compared(
    study: Plan, row: Row, pair: Pair, references: Sequence[Row], done: Mapping[tuple[str, ...], Row]
) -> dict[str, Any]:
    """The columns of `published` about a row and the cell that it is compared with."""
    columns, result = pair.cell.columns, done.get(pair.key, {})
    pair = replace(pair, differs={**pair.differs, **_found(row, result)})
    ours, error = _number(result), _number(result, "stderr")
    allowed = None if ours is None and row["our_metric"] in ACCURACIES else tolerance(row, error)
    compared = {
        name: columns[name] for name in ("calibration", "mode", "label", "target", "allocation", "seed", "cell")
    }
    compared |= {"text": pair.text, "ours": ours, "ours_stderr": error, "tolerance": allowed}
    differs = "; ".join(f"{name}: published {theirs}, ours {here}" for name, (theirs, here) in pair.differs.items())
    compared |= {"differs": differs or None, "unsaid": ", ".join(pair.unsaid) or None}
    if ours is None or allowed is None:
        reason = result.get("reason")
        reason = reason if isinstance(reason, str) else "it has not been run"
        return compared | {"verdict": "not run", "reason": reason}
    difference = ours - row["number"]
    verdict, reason = "within" if abs(difference) <= allowed else "outside", None
    if row["our_method"] != "dense":
        dense = next(_dense(study, pair, done), {})
        compared |= {"dense_published": references[0]["number"] if references else None, "dense_ours": _number(dense)}
        verdict, reason = _checked(verdict, references, dense)
    verdict, reason = _under_protocol(verdict, reason, pair)
    return compared | {"difference": difference, "verdict": verdict, "reason": reason}


def _found(row: Row, result: Row) -> dict[str, tuple[Any, Any]]:
    """Field -> (published, ours) of what only the result says: examples before an item, types of a quantised file."""
    differs = {}
    shots, types = result.get("fewshot"), result.get("model_quantisation")
    if row["fewshot"] is not None and shots is not None and not missing(shots) and int(shots) != row["fewshot"]:
        differs["fewshot"] = (row["fewshot"], int(shots))
    if types is not None and not missing(types):
        differs["model_quantisation"] = ("none", types)
    return differs


def _number(result: Row, name: str = "value") -> float | None:
    """A number of a row of `cells`, accuracies in percent as papers print them; None where there is none."""
    value = result.get(name)
    if value is None or missing(value):
        return None
    return 100 * float(value) if result["metric"] in ACCURACIES else float(value)


def _under_protocol(verdict: str, reason: str | None, pair: Pair) -> tuple[str, str | None]:
    """The verdict, given the differences between the protocols."""
    if apart := [name for name in NOT_COMPARABLE if name in pair.differs]:
        return "protocol differs", reason or f"{apart[0]} is another"
    if verdict == "outside" and pair.differs:  # within, a difference of the calibration did no harm
        return "protocol differs", reason or f"{' and '.join(pair.differs)} may explain it"
    return verdict, reason


def _checked(verdict: str, references: Sequence[Row], result: Row) -> tuple[str, str | None]:
    """The verdict on a compressed model, given the dense one, and its reason."""
    if not references:
        return "not checked", "no dense value is published with it"
    dense, error = _number(result), _number(result, "stderr")
    first, metric = references[0], references[0]["our_metric"]
    if dense is None:
        return "not checked", f"our dense model has no {metric}"
    same = [other for other in references if abs(dense - other["number"]) <= tolerance(other, error)]
    allowed = f"{ERRORS} standard errors" if metric in ACCURACIES else f"{DENSE:.1%}"
    if not same:
        return "protocol differs", (
            f"our dense {metric} {dense:.4g} is not within {allowed} of the published {first['number']:g} "
            f"({first['paper']})"
        )
    if first in same:
        return verdict, None
    # Papers contradict each other at one length: a misprint, or a length that is not what it says.
    return verdict, (
        f"{first['paper']} prints {first['number']:g} for the dense model, {same[0]['paper']} "
        f"{same[0]['number']:g} as here ({dense:.4g})"
    )


def _dense(study: Plan, pair: Pair, done: Mapping[tuple[str, ...], Row]) -> Iterator[Row]:
    """Our results of the dense model of a pair's model, by its metric on its text or task."""
    for cell in study.cells:
        if cell.model == pair.cell.model and cell.spec["method"]["name"] == "dense":
            result = done.get(replace(pair, cell=cell).key, {})
            if _number(result) is not None:
                yield result


def _absent(study: Plan, row: Row) -> str:
    """Why no cell of the study can be compared with a row."""
    if row["our_metric"] in ACCURACIES:
        if all(row["evaluation_text"] not in spec["tasks"] for spec in study.tasks.values()):
            return f"the study has no task {row['evaluation_text']}"
        return f"the study has no cell of {row['our_method']} at this target with these parameters"
    texts = {text_name(study.config["texts"][spec["text"]]) for spec in study.evaluations.values()}
    if row["evaluation_text"] not in texts:
        return f"the study has no evaluation on {row['evaluation_text']}"
    spread = "".join(f" by {name}" for name in json.loads(row["our_allocation"] or "{}"))
    return f"the study has no cell of {row['our_method']} at this target{spread} with these parameters"


def write_published(entries: Sequence[Row], out: Path) -> None:
    """Write published.parquet, .csv, .md and .tex into folder `out`."""
    table = from_rows([dict(entry) for entry in entries], "published", "the published numbers")
    with whole_file(out / "published.parquet") as parquet, whole_file(out / "published.csv") as text:
        write_parquet(table, parquet)
        write_csv(table, text)
    published_page.write_pages(to_frame(table), out)


def compare_with_published(study: Plan, tables: Path, out: Path | None = None, unrun: bool = False) -> str:
    """Write the study's numbers beside the published ones into a folder. Returns a line that counts the verdicts.

    tables: folder of the study's tables. out: folder to write to (default: that one). unrun: what the study would be
    compared with; no tables are read. Raises InputError when the tables cannot be read.
    """
    entries = published_comparisons(study, read_published(), None if unrun else read_table(tables, "cells"))
    write_published(entries, out or tables)
    return f"{published_page.summary(pd.DataFrame(entries))} -> {out or tables}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="published", description=__doc__)
    parser.add_argument("--study", required=True, type=json.loads, help="the whole config as JSON")
    parser.add_argument("--tables", type=Path, default=Path("results/tables"), help="folder of the tables")
    args = parser.parse_args(argv)
    print(compare_with_published(plan(args.study), args.tables))


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
