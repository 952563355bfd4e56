"""The report page's view of each cell: numbers with their files and logs, layers, provenance, gaps."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pandas as pd

from layerwise.comparison.folders import PROVENANCE, SPEC
from layerwise.report.fields import plain, short
from layerwise.results import main_table
from layerwise.results.cell_results import CELL_METRICS, PlannedCell
from layerwise.runtime.errors import InputError
from layerwise.storage.frames import groups as groups_of
from layerwise.storage.frames import rows as rows_of
from layerwise.storage.table_schema import columns

CELLS, LAYERS = list(columns("cells")), list(columns("layers"))
NUMBER = CELLS[len(SPEC) : CELLS.index("commit")]  # the columns that hold a number and what belongs to it
LAYER = LAYERS[LAYERS.index("layer") :]
SHAPE = LAYER[: LAYER.index("output_error")]  # columns that all cells of a model share


class Study(Protocol):
    """The parts of a plan that are used here."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def cells(self) -> Sequence[PlannedCell]: ...
    @property
    def evaluations(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]: ...
    def warnings(self) -> list[str]: ...


def origin(cell: PlannedCell, row: Mapping[str, Any], study: Study) -> tuple[str, str]:
    """(file, log) that a number of a cell, a row of the `cells` table, comes from."""
    logs = f"logs/{cell.folder.removeprefix('results/')}"
    if row["metric"] in CELL_METRICS:
        file = "cell.json" if row["metric"] == "job_seconds" else "layers.parquet"
        return f"{cell.folder}/{file}", f"{logs}/compress.log"
    kind, specs, name = "perplexity", study.evaluations, plain(row["text"])
    if plain(row["task"]) is not None:
        kind, specs, name = "tasks", study.tasks, plain(row["task_set"])
    found = [identity for identity, spec in specs.items() if spec["name"] == name]
    if not found:
        raise InputError(
            f"The tables must be those of the study in --study. Got a {kind} on {name} instead, which the study lacks."
        )
    identity = found[0]
    return f"{cell.folder}/{kind}-{identity}.json", f"{logs}/{kind}-{identity}.log"


def _log(cell: PlannedCell, row: Mapping[str, Any], study: Study) -> str:
    """The log that explains an absent number: that of the step which left its reason."""
    own, compress = origin(cell, row, study)[1], f"logs/{cell.folder.removeprefix('results/')}/compress.log"
    return compress if str(row["reason"]).startswith("compress") else own


def measured(row: Mapping[str, Any]) -> tuple[str, str]:
    """(metric, what it was measured on): the text, or the task of a set; nothing for the layers."""
    task = plain(row["task"])
    return row["metric"], plain(row["text"]) or ("" if task is None else main_table.task_title(task, row["task_set"]))


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(plain(row[name]) for name in names)


def cell_views(study: Study, data: Mapping[str, pd.DataFrame]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The drill-down's view of each cell, in the order of the `cells` table, and the distinct shapes of models.

    Raises InputError when the table has a cell that is not in the study.
    """
    names = [name for name in SPEC if study.cells and name in study.cells[0].columns]
    planned = {_key(cell.columns, names): cell for cell in study.cells}
    layers = data["layers"].assign(row=range(1, len(data["layers"]) + 1))
    of_layers = {_key(dict(zip(names, key, strict=True)), names): part for key, part in groups_of(layers, names, True)}
    shapes: list[dict[str, Any]] = []
    views = []
    for key, part in groups_of(data["cells"].assign(row=range(1, len(data["cells"]) + 1)), names, True):
        own = _key(dict(zip(names, key, strict=True)), names)
        if own not in planned:
            asked = " ".join(str(value) for value in own)
            raise InputError(
                "The tables must be those of the study in --study. "
                f"Got the cell {asked} instead, which the study lacks."
            )
        cell = planned[own]
        rows = rows_of(part)
        numbers = []
        for row in rows:
            file, log = origin(cell, row, study)
            numbers.append([row["row"], *(short(row[name]) for name in NUMBER), file, log])
        gaps = [row for row in rows if plain(row["reason"])]
        views.append(
            {
                "folder": cell.folder,
                "log": f"logs/{cell.folder.removeprefix('results/')}/compress.log",
                "spec": {name: plain(rows[0][name]) for name in SPEC},
                "numbers": numbers,
                "provenance": {name: plain(rows[0][name]) for name in PROVENANCE},
                "status": "done" if all(row["status"] == "done" for row in rows) else gaps[0]["status"],
                "gaps": [[*measured(row), row["status"], row["reason"], _log(cell, row, study)] for row in gaps],
                "layers": _layers_view(of_layers.get(own), shapes),
            }
        )
    return views, shapes


def _layers_view(rows: pd.DataFrame | None, shapes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Columns of a cell's layers; names and sizes, which many cells share, are stored once in `shapes`."""
    if rows is None or rows.empty:
        return None
    shape = {name: [plain(value) for value in rows[name]] for name in SHAPE}
    if shape not in shapes:
        shapes.append(shape)
    values = {name: [short(value) for value in rows[name]] for name in LAYER if name not in SHAPE}
    return {"shape": shapes.index(shape), "row": rows["row"].to_list(), **values}
