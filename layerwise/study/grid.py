"""Expand a config into the grid of cells. Does not import torch."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from layerwise.contract.cards import NO_DRIFT
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.target import Target
from layerwise.runtime.errors import InputError
from layerwise.sources import task_sets, text_files
from layerwise.sources.specs import CalibrationSpec, EvaluationSpec, ModelSpec, TaskSetSpec
from layerwise.study import allocation_entries, plan_checks
from layerwise.study.allocation_entries import UNIFORM, AllocationEntry, read_allocations
from layerwise.study.cell import (
    AllocationSpec,
    Cell,
    CellColumns,
    CellSpec,
    SkippedRow,
    TargetSpec,
    canonical,
    identity,
    name_of,
)
from layerwise.study.config_validation import validate
from layerwise.study.method_entries import MethodEntry, read_methods, target_of


@dataclass(frozen=True)
class Plan:
    """Everything that a study computes. models, calibrations, evaluations, tasks: id -> spec."""

    config: Mapping[str, Any]
    catalogue: Catalogue
    models: Mapping[str, ModelSpec]
    calibrations: Mapping[str, CalibrationSpec]
    evaluations: Mapping[str, EvaluationSpec]
    tasks: Mapping[str, TaskSetSpec]
    cells: list[Cell]
    skipped: list[SkippedRow]
    allocators: Catalogue

    @cached_property
    def by_folder(self) -> dict[str, Cell]:
        return {cell.folder: cell for cell in self.cells}

    @cached_property
    def certificates(self) -> dict[str, Cell]:
        """Path of each bound that the study computes -> a cell to which it applies."""
        wanted = self.cells if self.config["certificates"] else []
        return {path: cell for cell in wanted if (path := cell.certificate)}

    @cached_property
    def allocations(self) -> dict[str, Cell]:
        """Path of each table of levels that the study computes -> a cell that uses it."""
        return {path: cell for cell in self.cells if (path := cell.levels)}

    @property
    def gives(self) -> set[str]:
        """Kinds of results for figures: `certificates`, `allocations`, `traces` of the layer's error or of a relaxed
        error, and `pairs` of comparable methods."""
        criteria = {self.catalogue[cell.columns["method"]].criterion for cell in self.cells}
        traced = criteria & {"error", "relaxed error"}
        keys = ("label", "model", "calibration", "mode", "comparison", "target")
        methods = {tuple(cell.columns[key] for key in keys) for cell in self.cells}
        pairs = len({key[1:] for key in methods}) < len(methods)
        given = {
            "certificates": self.certificates,
            "allocations": self.allocations,
            "traces": traced,
            "pairs": pairs,
            "sweep": self.config.get("sweep"),
        }
        return {name for name, present in given.items() if present}

    def warnings(self) -> list[str]:
        """Sentences about choices that make results look better than they are, methods equal, or do nothing."""
        texts = self.config["texts"]
        once: dict[str, tuple[str, CalibrationSpec]] = {}  # the first repeat of each calibration set
        for calib_id, calib in self.calibrations.items():
            once.setdefault(name_of(calib), (calib_id, calib))
        pairs = itertools.product(once.values(), self.evaluations.items())
        same = [
            f"calibration {calib_id} and evaluation {eval_id} draw from {origin}: data-aware methods may look better "
            "than on unseen text."
            for (calib_id, calib), (eval_id, evaluation) in pairs
            if (origin := text_files.shared_origin(texts[calib["text"]], texts[evaluation["text"]]))
        ]
        still = dict.fromkeys(cell.columns["label"] for cell in self.cells if self._without_drift(cell))
        return [*same, *(f"methods.{label}: {NO_DRIFT}" for label in still), *self._idle()]

    def _idle(self) -> Iterator[str]:
        """Sentences about parameters that act at none of their entry's targets."""
        cells: dict[str, dict[tuple[str, bool], Cell]] = {}
        for cell in self.cells:
            key = canonical(cell.spec["target"]), "allocation" in cell.spec
            cells.setdefault(cell.columns["label"], {}).setdefault(key, cell)
        for label, own in cells.items():
            seen = [self._idle_of(cell) for cell in own.values()]
            places = [place for place in seen[0] if all(place in other for other in seen)]
            targets = ", ".join(dict.fromkeys(Target(**cell.spec["target"]).label for cell in own.values()))
            yield from (f"methods.{label}: {seen[0][place]}, so it does nothing at {targets}." for place in places)

    def _idle_of(self, cell: Cell) -> dict[str, str]:
        target, method = Target(**cell.spec["target"]), cell.spec["method"]
        if target.dense or (target.paired and "allocation" in cell.spec):  # a layer's own target may be of another kind
            return {}
        return self.catalogue.idle(method["name"], method["params"], target)

    def _without_drift(self, cell: Cell) -> bool:
        """Whether a cell's method compensates for drift, in shared mode, where there is none."""
        method = cell.spec["method"]
        return cell.mode == "shared" and "cross_gram" in self.catalogue.needs(method["name"], method["params"])


def plan(config: Mapping[str, Any], check_sources: bool = False) -> Plan:
    """Expand a config into its cells; with check_sources, also check models and texts on disk.

    Raises InputError with one sentence for every fault that can be detected before a job runs.
    """
    full = validate(config)
    catalogue, entries = read_methods(full)
    allocators, allocations = read_allocations(full, catalogue)
    targets = [target_of(entry, f"targets.{i}") for i, entry in enumerate(full["targets"])]
    if check_sources:
        plan_checks.check_sources(full, [*targets, *(target for entry in entries for target in entry.targets or ())])
    grid = _Grid.of(full, catalogue, allocators, allocations)
    cells: list[Cell] = []
    skipped: list[SkippedRow] = []
    for entry in entries:
        cells += grid.expand(entry, targets, skipped)
    plan_checks.check_modes(cells, catalogue)
    if check_sources:
        plan_checks.check_experts(cells, catalogue, grid.models)
        plan_checks.check_ranks(cells, grid.models)
        plan_checks.check_rotations(cells, catalogue, grid.models)
    plan_checks.check_targets(targets, entries, catalogue, cells, skipped)
    plan_checks.check_sweep(full.get("sweep"), entries)
    tasks = {name: task_sets.expanded(spec) for name, spec in full["tasks"].items()}
    named = {identity(name, spec): cast(TaskSetSpec, {"name": name, **spec}) for name, spec in tasks.items()}
    unique = {cell.folder: cell for cell in cells}
    evaluations = cast(dict[str, EvaluationSpec], _repeated(full, "evaluation"))
    places = (grid.models, grid.calibrations, evaluations, named)
    return Plan(full, catalogue, *places, list(unique.values()), skipped, allocators)


@dataclass(frozen=True)
class _Grid:
    """The places of cells: models x calibrations x modes. seeds: identity of a calibration -> seed of the methods.

    asymmetric: whether every cell in sequential mode collects the dense model's inputs.
    """

    catalogue: Catalogue
    models: Mapping[str, ModelSpec]
    calibrations: Mapping[str, CalibrationSpec]
    modes: Sequence[str]
    seeds: Mapping[str, int]
    allocators: Catalogue
    allocations: Sequence[AllocationEntry]
    asymmetric: bool

    @classmethod
    def of(
        cls,
        full: Mapping[str, Any],
        catalogue: Catalogue,
        allocators: Catalogue,
        allocations: Sequence[AllocationEntry],
    ) -> "_Grid":
        models = {
            identity(name, spec): cast(ModelSpec, {"name": name, **spec}) for name, spec in full["models"].items()
        }
        calibrations = cast(dict[str, CalibrationSpec], _repeated(full, "calibration"))
        seeds = {
            calib: spec["seed"] if "seeds" in full["calibration"][name_of(spec)] else full["seed"]
            for calib, spec in calibrations.items()
        }
        asymmetric = full["asymmetric"]
        return cls(catalogue, models, calibrations, full["modes"], seeds, allocators, allocations, asymmetric)

    def expand(self, entry: MethodEntry, targets: Sequence[Target], skipped: list[SkippedRow]) -> Iterator[Cell]:
        """The cells of an entry; unreachable targets are added to `skipped`.

        Raises InputError if it reaches none of its targets.
        """
        method = self.catalogue[entry.method]
        if method.control and not method.card["patterns"]:
            yield from self._unchanged(entry)
            return
        reason = "no target is given"
        reached = False
        asked = targets if entry.targets is None else entry.targets
        for target in asked:
            for allocation, refused in self._allocations(entry, target):
                if refused:
                    reason = refused
                    row: SkippedRow = {
                        "label": entry.label,
                        "method": entry.method,
                        "target": _label(target, allocation),
                        "allocation": UNIFORM if allocation is None else allocation.name,
                        "reason": reason,
                    }
                    skipped.append(row)
                    continue
                reached = True
                for model, calib, mode in itertools.product(self.models, self.calibrations, entry.modes or self.modes):
                    yield self._cell(entry, target, model, calib, mode, allocation)
        if not reached:
            raise InputError(f"methods.{entry.label}: {entry.method} supports none of the targets ({reason}).")

    def _unchanged(self, entry: MethodEntry) -> Iterator[Cell]:
        """A control that changes nothing is one cell per model, for any calibration and mode."""
        if entry.tune:
            raise InputError(f"methods.{entry.label}: {entry.method} changes nothing, so there is nothing to tune.")
        for model in self.models:
            yield self._cell(entry, Target(), model, next(iter(self.calibrations)), self.modes[0])

    def _allocations(self, entry: MethodEntry, target: Target) -> Iterator[tuple[AllocationEntry | None, str | None]]:
        """(allocation, why its levels cannot be used, or None); a refusal of the method itself is yielded only once."""
        if reason := self._refusal(entry, target):
            yield None, reason
            return
        for allocation in self.allocations:
            yield (
                allocation,
                allocation_entries.spread_refusal(self.allocators, self.catalogue, allocation, entry, target),
            )

    def _refusal(self, entry: MethodEntry, target: Target) -> str | None:
        """Why an entry cannot reach a target, or None."""
        reason = self.catalogue.refusal(entry.method, entry.params, target)
        if not reason and entry.tune and self.catalogue[entry.method].card.get("own_grid"):
            return f"tune trains grids of integer codes on a layer's own inputs, not those of {entry.method}"
        if not reason and entry.tune and target.rank:
            return "tune trains kept weights and grids, not low-rank factors"
        if not reason and entry.tune and target.format:
            return f"tune trains grids of integer codes, not {target.format}"
        if not reason and "end" in entry.tune and target.bits is None:
            return "tune.end trains scales and zeros, which do not exist without bits"
        return reason

    def _cell(
        self,
        entry: MethodEntry,
        target: Target,
        model: str,
        calib: str,
        mode: str,
        allocation: AllocationEntry | None = None,
    ) -> Cell:
        """allocation: None if there is nothing to spread."""
        asked, seed = cast(TargetSpec, target.as_dict()), self.seeds[calib]
        spread: AllocationSpec | None = None
        if allocation is not None and allocation.name != UNIFORM:
            spread = {
                "name": allocation.name,
                "allocator": allocation.allocator,
                "params": allocation_entries.asked_params(
                    self.allocators[allocation.allocator], allocation.params, target
                ),
                "target": asked,
                "seed": seed,
            }
        # Equal levels do not enter the identity: a study without allocations keeps its cells when some are added.
        decided = {**entry.settings(), "seed": seed, "target": asked}
        # Nor does what a method collects for itself.
        scored = {"asymmetric": True} if self._scored_apart(entry, mode) else {}
        name = identity(entry.label, decided | ({"allocation": spread} if spread else {}) | scored)
        comparison = self.catalogue[entry.method].comparison(target)
        columns: CellColumns = {
            "model": name_of(self.models[model]),
            "calibration": name_of(self.calibrations[calib]),
            "mode": mode,
            "label": entry.label,
            "method": entry.method,
            "comparison": "tuned" if entry.tune and comparison != "control" else comparison,
            "target": _label(target, allocation),
            "allocation": spread["name"] if spread else UNIFORM,
            "allocator": spread["allocator"] if spread else UNIFORM,
            "allocation_params": canonical(spread["params"] if spread else {}),
            **_columns_of(target),
            "params": canonical({**entry.params, **({"tune": entry.tune} if entry.tune else {})}),
            "seed": seed,
            "cell": name,
        }
        spec: CellSpec = {
            "columns": columns,
            "method": {"name": entry.method, "params": entry.params},
            "target": asked,
        }
        if entry.tune:
            spec["tune"] = entry.tune
        if spread:
            spec["allocation"] = spread
        if scored:
            spec["asymmetric"] = True
        return Cell(model, calib, mode, name, spec)

    def _scored_apart(self, entry: MethodEntry, mode: str) -> bool:
        """Whether a cell collects the dense model's inputs for the score alone."""
        changes = bool(self.catalogue[entry.method].card["patterns"])
        needs = self.catalogue.needs(entry.method, entry.params)
        return self.asymmetric and mode != "shared" and changes and "cross_gram" not in needs


def _columns_of(target: Target) -> TargetSpec:
    """The fields of a target with a column in tables; the format is part of the label."""
    return {
        "sparsity": target.sparsity,
        "pattern": target.pattern,
        "bits": target.bits,
        "group": target.group,
        "symmetric": target.symmetric,
    }


def _label(target: Target, allocation: AllocationEntry | None) -> str:
    """The target's short name, with the allocation's if layers differ: 60% row, 60% row owl."""
    return target.label if allocation is None or allocation.name == UNIFORM else f"{target.label} {allocation.name}"


def _repeated(full: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Identity -> spec of every calibration set for each seed, or of every evaluation."""
    return {
        identity(name, [spec, full["texts"][spec["text"]]]): {"name": name, **spec}
        for name, entry in full[kind].items()
        for spec in _repeats(entry)
    }


def _repeats(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A calibration set with seeds as one set per seed, each identical to that of a study with this seed alone."""
    rest = {key: value for key, value in entry.items() if key != "seeds"}
    return [{**rest, "seed": seed} for seed in entry["seeds"]] if "seeds" in entry else [rest]
