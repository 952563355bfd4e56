"""Inputs of the workflow's rules for a job, from its wildcards: files, entries of the config, and code.

Wildcards are Snakemake's, with attributes `model`, `calib`, `mode`, `cell`, `evaluation`, `tasks`, `bound` and
`allocation`.
"""

import json
import os
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from layerwise.contract.import_closure import ALLOCATORS, METHODS, closure, file_of
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import digest_of
from layerwise.runtime.project import PACKAGE, ROOT, from_here, portable
from layerwise.sources import checkpoint_files, task_sets
from layerwise.sources import text_files as texts
from layerwise.study.cell import AllocationSpec, Cell, canonical
from layerwise.study.grid import Plan
from layerwise.study.method_costs import needs_fisher

Wildcards = Any
CELL = "results/cells/{model}/{calib}/{mode}/{cell}"
DENSE = "results/dense/{{model}}/{}.json"  # path for an evaluation, with the model as a wildcard
BOUND = "results/certificates/{model}/{calib}/{bound}.parquet"
LEVELS = "results/allocations/{model}/{calib}/{allocation}.parquet"
TOKENS = "results/tokens/{model}/calibration-{calib}.safetensors"
GRAM = "results/calibration/{model}/{calib}/gram.json"
FISHER = "results/calibration/{model}/{calib}/fisher.safetensors"


class Code:
    """Files named after the content of the code on which rules depend; they replace the code as the rules' input.

    An edit changes the input. A touched file, a fresh checkout, another location of the project or a link to it does
    not. A job has one input instead of fifty, each of which Snakemake would check for every job.
    """

    def __init__(self) -> None:
        self.files: dict[str, tuple[str, ...]] = {}  # digest -> files
        self._named = cache(self._name)

    def of(self, *modules: str, alone: str | None = None, files: tuple[Path, ...] = ()) -> str:
        """The file that represents the import closure of these modules of layerwise and further code.

        alone: a module that counts without its imports. files: further files.
        """
        return self._named(modules, (file_of(alone), *files) if alone else files)

    def _name(self, modules: tuple[str, ...], files: tuple[Path, ...]) -> str:
        paths = tuple(map(portable, dict.fromkeys([*closure(modules), *files])))
        digest = digest_of(paths)
        self.files[digest] = paths
        return f"results/code/{digest}"


class JobInputs:
    """The inputs and parameters of a study's jobs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._sources = cache(self._sources_of)  # Snakemake calls this for each of many thousands of jobs
        self._model_files = cache(lambda model: list(map(_given, checkpoint_files.model_files(plan.models[model]))))

    def cell(self, wildcards: Wildcards) -> Cell:
        """The job's cell. Raises InputError for a folder that is not a cell of the study."""
        folder = CELL.format(**wildcards)
        if folder not in self.plan.by_folder:  # a job on a cluster reads the config again
            raise InputError(f"{folder} must be a cell of this study: its config was edited during a run. Run again.")
        return self.plan.by_folder[folder]

    def results(self, cell: Cell) -> list[str]:
        """The files of a cell that the tables read."""
        names = ["layers.parquet", "trace.parquet", "cell.json"]
        names += [f"perplexity-{text}.json" for text in self.plan.evaluations]
        names += [f"tasks-{tasks}.json" for tasks in self.plan.tasks]
        return [f"{cell.folder}/{name}" for name in names]

    def progress(self) -> tuple[int, int]:
        """The number of cells that have all their results on the disk, and the number of all cells."""
        cells = self.plan.cells
        return sum(all(map(os.path.exists, self.results(cell))) for cell in cells), len(cells)

    def certified(self, wildcards: Wildcards) -> Cell:
        """A cell to whose layers the bound applies."""
        return self.plan.certificates[BOUND.format(**wildcards)]

    def levels(self, wildcards: Wildcards) -> list[str]:
        """The table of levels that a cell needs, if its budget is spread over the layers."""
        path = self.cell(wildcards).levels
        return [path] if path else []

    def fisher(self, wildcards: Wildcards) -> list[str]:
        """The file of the layers' fisher, if a cell's method needs it."""
        return [FISHER.format(**wildcards)] if needs_fisher(self.plan.catalogue, self.cell(wildcards)) else []

    def spread(self, wildcards: Wildcards) -> Cell:
        """A cell with the levels of an allocation. Raises InputError if the study has none."""
        path = LEVELS.format(**wildcards)
        if path not in self.plan.allocations:
            raise InputError(f"{path} must be of this study: its config was edited during a run. Run again.")
        return self.plan.allocations[path]

    def allocation(self, wildcards: Wildcards) -> AllocationSpec:
        """The input of the job that spreads a budget."""
        spec = self.spread(wildcards).spec.get("allocation")
        assert spec is not None
        return spec

    def allocation_columns(self, wildcards: Wildcards) -> dict[str, Any]:
        """Columns of the table of levels that the job does not know."""
        columns = self.spread(wildcards).columns
        return {key: columns[key] for key in ("model", "calibration")}

    def allocation_gram(self, wildcards: Wildcards) -> list[str]:
        """The store of the dense Grams, for an allocator that needs them."""
        return [GRAM.format(**wildcards)] if "gram" in self._needs(wildcards) else []

    def allocation_tokens(self, wildcards: Wildcards) -> list[str]:
        """The calibration sequences, for an allocator that tries the model."""
        return [TOKENS.format(**wildcards)] if "trials" in self._needs(wildcards) else []

    def _needs(self, wildcards: Wildcards) -> set[str]:
        spec = self.allocation(wildcards)
        return self.plan.allocators[spec["allocator"]].needs(spec["params"])

    def allocator_sources(self, wildcards: Wildcards) -> tuple[Path, ...]:
        """Code on which an allocation's levels depend: its allocator's file, its probes' files and their imports."""
        spec = self.allocation(wildcards)
        return tuple(self.plan.allocators.sources(spec["allocator"], spec["params"]))

    def allocator_folders(self, wildcards: Wildcards) -> list[str]:
        """Arguments for the external folders of the allocator and of the methods inside it."""
        spec = self.allocation(wildcards)
        own = self.plan.allocators[spec["allocator"]].path
        sources = [path for path in self.allocator_sources(wildcards) if not path.is_relative_to(PACKAGE)]
        folders = {from_here(path.parent) for path in sources if path != own}
        folders -= {from_here(METHODS), from_here(ALLOCATORS)}
        found = [part for folder in sorted(folders) for part in ("--method-path", folder)]
        mine = from_here(own.parent)
        return found if mine == from_here(ALLOCATORS) else [*found, "--allocator-path", mine]

    def method_sources(self, wildcards: Wildcards) -> tuple[Path, ...]:
        """Code on which a cell's numbers depend: its method's file, its warm starts' files and their imports."""
        method = self.cell(wildcards).spec["method"]
        return self._sources(method["name"], canonical(method["params"]))

    def _sources_of(self, name: str, params: str) -> tuple[Path, ...]:
        return tuple(self.plan.catalogue.sources(name, json.loads(params)))

    def method_folders(self, wildcards: Wildcards) -> list[str]:
        """Arguments for the external folders of the cell's method only, so that a folder added to a study does not
        change its cells."""
        outside = [path for path in self.method_sources(wildcards) if not path.is_relative_to(PACKAGE)]
        folders = {from_here(path.parent) for path in outside} - {from_here(METHODS)}
        return [part for folder in sorted(folders) for part in ("--method-path", folder)]

    def model_files(self, wildcards: Wildcards) -> list[str]:
        return self._model_files(wildcards.model)

    def forward_dtype(self, wildcards: Wildcards) -> list[str]:
        """Arguments for the dtype of a calibration's forward passes, if it is not the model's."""
        dtype = self.plan.calibrations[wildcards.calib].get("dtype")
        return ["--dtype", dtype] if dtype else []

    def calibration_text(self, wildcards: Wildcards) -> Mapping[str, Any]:
        """The entry of the text from which a calibration set is drawn."""
        return self.plan.config["texts"][self.plan.calibrations[wildcards.calib]["text"]]

    def evaluation_text(self, wildcards: Wildcards) -> Mapping[str, Any]:
        """The entry of the text from which an evaluation is cut."""
        return self.plan.config["texts"][self.plan.evaluations[wildcards.evaluation]["text"]]

    def text_files(self, entry: Callable[[Wildcards], Mapping[str, Any]]) -> Callable[[Wildcards], list[str]]:
        """A function of wildcards that returns the local files of a text's entry."""
        return lambda wildcards: list(map(str, texts.text_files(entry(wildcards))))

    def task_files(self, wildcards: Wildcards) -> list[str]:
        return list(map(str, task_sets.task_files(self.plan.tasks[wildcards.tasks])))

    def task_set(self, wildcards: Wildcards) -> dict[str, Any]:
        """The entry of a set of tasks, without its name."""
        return _unnamed(self.plan.tasks[wildcards.tasks])

    @cached_property
    def requested(self) -> list[dict[str, Any]]:
        """The evaluations of every cell, in the form that evaluation.cache.evaluate_ahead reads."""
        texts = [
            ("perplexity", f"results/tokens/{{model}}/evaluation-{name}.safetensors", DENSE.format(name), {})
            for name in self.plan.evaluations
        ]
        sets = [("tasks", f"results/tasks/{name}.json", None, _unnamed(spec)) for name, spec in self.plan.tasks.items()]
        return [dict(zip(("kind", "data", "dense", "spec"), entry, strict=True)) for entry in [*texts, *sets]]


def as_json(function: Callable[[Wildcards], Any]) -> Callable[[Wildcards], str]:
    """The result as one canonical string, because Snakemake compares params as sets, which lose the order."""
    return lambda wildcards: canonical(function(wildcards))


def _given(path: Path) -> str:
    """A model's file as named in the config, or a file of the package, relative to the working directory."""
    return from_here(path) if path.is_absolute() and path.is_relative_to(ROOT) else str(path)


def _unnamed(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "name"}
