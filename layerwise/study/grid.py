"""Turn a config into the grid of cells: validate it, fill in defaults, expand sweeps. Does not import torch."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict, cast

import jsonschema
import yaml

from layerwise.contract.catalogue import Catalogue
from layerwise.contract.target import Target
from layerwise.runtime.errors import InputError
from layerwise.runtime.project import ROOT
from layerwise.runtime.sentences import brief, place, schema_fault
from layerwise.sources import checkpoint_files, task_sets, text_files
from layerwise.sources.shapes import shape_of
from layerwise.sources.specs import CalibrationSpec, EvaluationSpec, ModelSpec, TaskSetSpec
from layerwise.study import allocation_entries, config_file
from layerwise.study.allocation_entries import UNIFORM, AllocationEntry, read_allocations
from layerwise.study.cell import AllocationSpec, Cell, CellColumns, CellSpec, TargetSpec, canonical, identity, plain
from layerwise.study.method_costs import needs_cross, needs_fisher
from layerwise.study.method_entries import MethodEntry, read_methods, target_of

SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text("utf-8"))
TEXT_USERS = ("calibration", "evaluation")  # sections of the config whose entries name a text

# Columns of the table `cells` that a study may sweep, besides parameters of its methods.
SWEPT_TARGET = ("sparsity", "bits", "group")
SWEPT = (*SWEPT_TARGET, "calibration", "calibration_samples", "calibration_length", "calibration_seed")


class SkippedRow(TypedDict):
    """A row of the table `skipped`: an entry, a target that it cannot reach, and the reason."""

    label: str
    method: str
    target: str
    allocation: str
    reason: str


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
        """Sentences about choices that make results look better than they are, or methods equal."""
        texts = self.config["texts"]
        once: dict[str, tuple[str, CalibrationSpec]] = {}  # the first repeat of each calibration set
        for calib_id, calib in self.calibrations.items():
            once.setdefault(name_of(calib), (calib_id, calib))
        pairs = itertools.product(once.values(), self.evaluations.items())
        return [
            f"calibration {calib_id} and evaluation {eval_id} draw from {origin}: data-aware methods may look better "
            "than on unseen text."
            for (calib_id, calib), (eval_id, evaluation) in pairs
            if (origin := text_files.shared_origin(texts[calib["text"]], texts[evaluation["text"]]))
        ] + [
            f"methods.{label}: in shared mode the inputs have not drifted, so what compensates for their drift does "
            "nothing: gptaq and qronos are gptq there."
            for label in dict.fromkeys(cell.columns["label"] for cell in self.cells if self._without_drift(cell))
        ]

    def _without_drift(self, cell: Cell) -> bool:
        """Whether a cell's method compensates for drift, in shared mode, where there is none."""
        method = cell.spec["method"]
        return cell.mode == "shared" and "cross_gram" in self.catalogue.needs(method["name"], method["params"])


def validate(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults filled in; raises InputError with one sentence that names the place and the expected
    value."""
    config_file.check(config)
    errors = sorted(jsonschema.Draft202012Validator(SCHEMA).iter_errors(config), key=lambda e: list(map(str, e.path)))
    if errors:
        raise InputError(_sentence(errors[0]))
    full = _with_defaults(plain(config), SCHEMA)  # JSON Schema accepts 4.0 as an integer, labels do not
    for kind in TEXT_USERS:
        for name, entry in full[kind].items():
            if entry["text"] not in full["texts"]:
                known = ", ".join(full["texts"])
                raise InputError(f"config: {kind}.{name}.text names {entry['text']!r}; the texts are {known}.")
    return full


def _sentence(error: jsonschema.ValidationError) -> str:
    where, instance = place(error.absolute_path), cast(Any, error.instance)
    schema, expected = cast(Mapping[str, Any], error.schema), cast(Any, error.validator_value)
    if "propertyNames" in error.absolute_schema_path:
        name = brief(repr(instance))
        return f"config: {where}: the name {name} is wrong; names are letters, digits, '.', '_', '-'."
    if error.validator == "additionalProperties":
        known = ", ".join(schema["properties"])
        unknown = [key for key in instance if key not in schema["properties"]]
        return f"config: {where} has no key {brief(repr(unknown[0]))}; its keys are {known}."
    if error.validator == "oneOf" and "required" in canonical(expected):
        choices = " or ".join("+".join(choice["required"]) for choice in expected)
        return f"config: {where} must have either {choices}. Got {brief(', '.join(instance)) or 'nothing'} instead."
    if error.validator == "type" and isinstance(instance, str) and _is_number(instance):
        advice = f"; YAML reads {instance} as text: write {float(instance)!r}"
    elif error.validator == "type" and where.endswith(".pattern") and isinstance(instance, int):
        advice = '; YAML reads 2:4 without quotes as a number: write "2:4"'
    else:
        advice = ""
    return f"config: {where} {schema_fault(str(error.validator), expected, instance, error.message)}{advice}."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _with_defaults(value: Any, schema: Mapping[str, Any]) -> Any:
    if "$ref" in schema:
        return _with_defaults(value, SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]])
    if not isinstance(value, Mapping):
        return value
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties") or {}
    full = {key: _with_defaults(item, properties.get(key, others)) for key, item in value.items()}
    return {**{key: sub["default"] for key, sub in properties.items() if "default" in sub and key not in full}, **full}


def plan(config: Mapping[str, Any], check_sources: bool = False) -> Plan:
    """Expand a config into its cells; with check_sources, also check models and texts on disk.

    Raises InputError with one sentence for every fault that can be detected before a job runs.
    """
    full = validate(config)
    catalogue, entries = read_methods(full)
    allocators, allocations = read_allocations(full, catalogue)
    targets = [target_of(entry, f"targets.{i}") for i, entry in enumerate(full["targets"])]
    if check_sources:
        _check_sources(full, [*targets, *(target for entry in entries for target in entry.targets or ())])
    grid = _Grid.of(full, catalogue, allocators, allocations)
    cells: list[Cell] = []
    skipped: list[SkippedRow] = []
    for entry in entries:
        cells += grid.expand(entry, targets, skipped)
    _check_modes(cells, catalogue)
    if check_sources:
        _check_experts(cells, catalogue, grid.models)
        _check_ranks(cells, grid.models)
        _check_rotations(cells, catalogue, grid.models)
    _check_targets(targets, entries, catalogue, cells, skipped)
    _check_sweep(full.get("sweep"), entries)
    tasks = {name: task_sets.expanded(spec) for name, spec in full["tasks"].items()}
    named = {identity(name, spec): cast(TaskSetSpec, {"name": name, **spec}) for name, spec in tasks.items()}
    unique = {cell.folder: cell for cell in cells}
    evaluations = cast(dict[str, EvaluationSpec], _repeated(full, "evaluation"))
    places = (grid.models, grid.calibrations, evaluations, named)
    return Plan(full, catalogue, *places, list(unique.values()), skipped, allocators)


def _check_sources(full: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Raise InputError if models, texts or tasks are absent, damaged or unsuitable for the study."""
    for name, spec in full["models"].items():
        checkpoint_files.check_checkpoint(name, spec)
        _check_groups(name, spec, targets)
        _check_lengths(name, spec, full)
    for name in _used_texts(full):
        text_files.check_text(name, full["texts"][name])
    for name, spec in full["tasks"].items():
        task_sets.check_tasks(name, spec)


def _used_texts(full: Mapping[str, Any]) -> list[str]:
    """Names of the texts that the study reads."""
    return sorted({entry["text"] for kind in TEXT_USERS for entry in full[kind].values()})


def check_text_files(config: Mapping[str, Any]) -> None:
    """Raise InputError if a local text that a plan's config reads does not exist and no rule of the workflow writes
    it."""
    for name in _used_texts(config):
        text_files.check_file(name, config["texts"][name])


def _check_groups(name: str, spec: ModelSpec, targets: Sequence[Target]) -> None:
    """Raise InputError if the groups of a target do not divide the inputs of a model's layers."""
    for target, size in itertools.product(targets, checkpoint_files.layer_inputs(spec)):
        if target.group and size % target.group:
            raise InputError(
                "targets: a group must divide the inputs of every layer. "
                f"Got groups of {target.group} instead, and layers of {size} inputs in the model {name!r}."
            )


def _check_lengths(name: str, spec: ModelSpec, full: Mapping[str, Any]) -> None:
    """Raise InputError if sequences are longer than a model allows."""
    longest = checkpoint_files.longest_sequence(spec)
    if longest is None:
        return
    for kind in TEXT_USERS:
        for set_name, entry in full[kind].items():
            if entry["length"] > longest:
                raise InputError(
                    f"{kind}.{set_name}: its length must be at most {longest} tokens for the model {name!r}. Got "
                    f"{entry['length']} instead."
                )


def _check_experts(cells: Sequence[Cell], catalogue: Catalogue, models: Mapping[str, ModelSpec]) -> None:
    """Raise InputError if a method needs the cross-Gram of a model that is known to have experts."""
    asking = {cell.model: cell for cell in reversed(cells) if needs_cross(catalogue, cell)}
    for model, cell in asking.items():
        shape = shape_of(models[model])
        if shape and shape.has_experts:
            if cell.spec.get("asymmetric"):
                raise InputError(
                    "config: asymmetric must be false for a model with experts: the dense and the compressed model may "
                    f"route different tokens to an expert. Got true for {cell.columns['model']!r} instead."
                )
            raise InputError(
                f"methods.{cell.columns['label']}: {cell.columns['method']} must have a model without experts in "
                "sequential mode: it needs the cross-Gram of the same tokens in the dense and in the compressed model, "
                f"which may route different tokens to an expert. Got {cell.columns['model']!r} instead: give the "
                "method modes: [shared]."
            )


def _check_modes(cells: Sequence[Cell], catalogue: Catalogue) -> None:
    """Raise InputError if a method needs the dense model's loss in a mode that runs compressed blocks."""
    for cell in cells:
        if cell.mode != "shared" and needs_fisher(catalogue, cell):
            raise InputError(
                f"methods.{cell.columns['label']}: {cell.columns['method']} must run in shared mode: its fisher is of "
                f"the dense model's loss. Got {cell.mode} mode instead: give the method modes: [shared]."
            )


def _check_ranks(cells: Sequence[Cell], models: Mapping[str, ModelSpec]) -> None:
    """Raise InputError if the rank of a target is 0 in a layer of a model whose shape is known."""
    asked = dict.fromkeys(
        (cell.model, Target(**cell.spec["target"])) for cell in cells if "rank" in cell.spec["target"]
    )
    shapes = {model: shape_of(models[model]) for model, _ in asked}
    for model, target in asked:
        shape, name = shapes[model], f"a layer of the model {name_of(models[model])!r}"
        for out, inputs in [layer[:2] for block in shape.blocks for layer in block.layers] if shape else ():
            if target.rank_of(out, inputs) < 1:
                raise InputError(f"targets: {target.without_factors((out, inputs), name)}")


def _check_rotations(cells: Sequence[Cell], catalogue: Catalogue, models: Mapping[str, ModelSpec]) -> None:
    """Raise InputError if a method rotates a layer with an odd number of inputs, of a model whose shape is known."""
    rotating = {
        cell.model: cell
        for cell in reversed(cells)
        if _rotates(catalogue, cell.spec["method"]["name"], cell.spec["method"]["params"])
    }
    for model, cell in rotating.items():
        shape = shape_of(models[model])
        odd = [size for block in shape.blocks for _, size, _ in block.layers if size % 2] if shape else []
        if odd:
            raise InputError(
                f"methods.{cell.columns['label']}: {cell.columns['method']} must have layers with an even number of "
                f"inputs: with an odd one it only changes signs. Got {odd[0]} inputs in a layer of the model "
                f"{cell.columns['model']!r} instead."
            )


def _rotates(catalogue: Catalogue, name: str, params: Mapping[str, Any]) -> bool:
    """Whether a method, or a method inside it, rotates the inputs of a layer."""
    inner = catalogue[name].inner(params)
    return "rotation_seed" in params or any(_rotates(catalogue, inside, own) for _, inside, own in inner)


def _check_targets(
    targets: Sequence[Target],
    entries: Sequence[MethodEntry],
    catalogue: Catalogue,
    cells: Sequence[Cell],
    skipped: Sequence[SkippedRow],
) -> None:
    """Raise InputError for a target that no method reaches, unless the study has only controls."""
    supported = {canonical(cell.spec["target"]) for cell in cells}
    unreached = [target.label for target in targets if canonical(target.as_dict()) not in supported]
    if unreached and not all(catalogue[entry.method].control for entry in entries):
        reasons = [
            f" ({row['label']}: {row['reason']})"
            for row in skipped
            if f"{row['target']} ".startswith(f"{unreached[0]} ")
        ]
        raise InputError(f"targets: no method of the study supports {unreached[0]}{''.join(reasons[:1])}.")


def _check_sweep(sweep: str | None, entries: Sequence[MethodEntry]) -> None:
    """Raise InputError if the study's swept quantity belongs to none of its entries."""
    if sweep is not None and sweep not in SWEPT and not any(sweep in entry.params for entry in entries):
        known = ", ".join(SWEPT)
        raise InputError(
            f"config: sweep must be {known} or a parameter of a method of the study. Got {sweep!r} instead."
        )


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


def name_of(spec: ModelSpec | CalibrationSpec | EvaluationSpec | TaskSetSpec) -> str:
    """The config's name of a spec that a plan identifies by hash."""
    return spec["name"]  # pyright: ignore[reportTypedDictNotRequiredAccess]: a plan's specs have a name


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
