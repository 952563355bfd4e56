"""From a config to the grid of cells: validated, defaults filled in, sweeps expanded. Free of torch."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from layerwise.contract.catalogue import Catalogue, CatalogueError
from layerwise.contract.target import CERTIFIED, Target
from layerwise.runtime.errors import InputError
from layerwise.runtime.project import ROOT
from layerwise.runtime.sentences import brief, place
from layerwise.sources import checkpoint_files, task_sets, text_files
from layerwise.study import config_file

SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text("utf-8"))
LONGEST_SENTENCE = 500  # of a catalogue's, which may quote values
LONGEST_NAME = 200  # of an entry with its swept values; file systems take 255 with a digest and a suffix
RESERVED = ("method", "targets", "tune")  # keys of a method's entry that are not its parameters

# What a study may sweep, besides a parameter of its methods: a column of the table `cells`.
SWEPT_TARGET = ("sparsity", "bits", "group")
SWEPT = (*SWEPT_TARGET, "calibration", "calibration_samples", "calibration_length", "calibration_seed")


def canonical(value: Any) -> str:
    """One JSON string for equal values, whatever the order of keys; numbers that are equal are spelled alike."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def identity(name: str, spec: Any) -> str:
    """`name-digest`: the digest, 8 hex digits of SHA-256 of the canonical JSON, changes with any value in the spec."""
    return f"{name}-{hashlib.sha256(canonical(spec).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Cell:
    """One method on one model at one target, with one calibration and mode. The names are the parts of its path."""

    model: str
    calib: str
    mode: str
    cell: str
    spec: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return f"results/cells/{self.model}/{self.calib}/{self.mode}/{self.cell}"

    @property
    def columns(self) -> dict[str, Any]:
        return dict(self.spec["columns"])

    @property
    def certificate(self) -> str | None:
        """Path of the bound that the cell's layers are held against: masks of a bounded pattern on the dense Grams."""
        columns, target = self.spec["columns"], Target(**self.spec["target"])
        if self.mode != "shared" or columns["comparison"] != "mask-only" or target.structure not in CERTIFIED:
            return None
        return (
            f"results/certificates/{self.model}/{self.calib}/{identity(_slug(target.label), target.as_dict())}.parquet"
        )

    @cached_property
    def params(self) -> str:
        """The spec as the one string that Snakemake tracks."""
        return canonical(self.spec)


@dataclass(frozen=True)
class Plan:
    """Everything that a study computes. models, calibrations, evaluations, tasks: id -> spec."""

    config: Mapping[str, Any]
    catalogue: Catalogue
    models: Mapping[str, Mapping[str, Any]]
    calibrations: Mapping[str, Mapping[str, Any]]
    evaluations: Mapping[str, Mapping[str, Any]]
    tasks: Mapping[str, Mapping[str, Any]]
    cells: list[Cell]
    skipped: list[dict[str, Any]]

    @cached_property
    def by_folder(self) -> dict[str, Cell]:
        return {cell.folder: cell for cell in self.cells}

    @cached_property
    def certificates(self) -> dict[str, Cell]:
        """Path of each bound that the study computes -> a cell that is held against it."""
        wanted = self.cells if self.config["certificates"] else []
        return {path: cell for cell in wanted if (path := cell.certificate)}

    @property
    def gives(self) -> set[str]:
        """What figures may need: `certificates`, `traces` that measure the error of the layer or a relaxed one, and
        `pairs` of methods that may be compared."""
        criteria = {self.catalogue[cell.columns["method"]].criterion for cell in self.cells}
        traced = criteria & {"error", "relaxed error"}
        keys = ("label", "model", "calibration", "mode", "comparison", "target")
        methods = {tuple(cell.columns[key] for key in keys) for cell in self.cells}
        pairs = len({one[1:] for one in methods}) < len(methods)
        found = {"certificates": self.certificates, "traces": traced, "pairs": pairs, "sweep": self.config.get("sweep")}
        return {name for name, there in found.items() if there}

    def warnings(self) -> list[str]:
        """Sentences about choices that make numbers flatter than they are."""
        texts = self.config["texts"]
        once: dict[str, tuple[str, Mapping[str, Any]]] = {}  # of the repeats of a calibration set the first
        for calib_id, calib in self.calibrations.items():
            once.setdefault(calib["name"], (calib_id, calib))
        pairs = itertools.product(once.values(), self.evaluations.items())
        return [
            f"calibration {calib_id} and evaluation {eval_id} draw from the same data set, "
            f"{text_files.dataset_of(texts[calib['text']])}: data-aware methods may look better than on unseen text."
            for (calib_id, calib), (eval_id, evaluation) in pairs
            if text_files.contaminated(texts[calib["text"]], texts[evaluation["text"]])
        ]


def validate(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with defaults filled in; raises InputError with one sentence that says where and what was expected."""
    config_file.check(config)
    errors = sorted(jsonschema.Draft202012Validator(SCHEMA).iter_errors(config), key=lambda e: list(map(str, e.path)))
    if errors:
        raise InputError(_sentence(errors[0]))
    full = _with_defaults(_plain(config), SCHEMA)  # 4.0 is an integer for JSON Schema, and for no label
    for kind in ("calibration", "evaluation"):
        for name, entry in full[kind].items():
            if entry["text"] not in full["texts"]:
                known = ", ".join(full["texts"])
                raise InputError(f"config: {kind}.{name}.text names {entry['text']!r}; the texts are {known}.")
    return full


def _sentence(error: jsonschema.ValidationError) -> str:
    where = place(error.absolute_path)
    if "propertyNames" in error.absolute_schema_path:
        name = brief(repr(error.instance))
        return f"config: {where}: the name {name} is wrong; names are letters, digits, '.', '_', '-'."
    if error.validator == "additionalProperties":
        known = ", ".join(error.schema["properties"])
        unknown = [key for key in error.instance if key not in error.schema["properties"]]
        return f"config: {where} has no key {brief(repr(unknown[0]))}; its keys are {known}."
    if error.validator == "oneOf" and "required" in canonical(error.validator_value):
        choices = " or ".join("+".join(choice["required"]) for choice in error.validator_value)
        return f"config: {where} must have either {choices}, got {brief(', '.join(error.instance)) or 'nothing'}."
    if error.validator == "type" and isinstance(error.instance, str) and _is_number(error.instance):
        advice = f"; YAML reads {error.instance} as text, write {float(error.instance)!r}"
    elif error.validator == "type" and where.endswith(".pattern") and isinstance(error.instance, int):
        advice = '; YAML reads 2:4 without quotes as a number, write "2:4"'
    else:
        advice = ""
    return f"config: {where} is wrong: {brief(error.message)}{advice}."


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
    """Expand a config into its cells; with check_sources, models and texts are looked at on disk too.

    Raises InputError with one sentence for anything that can be known to be wrong before a job runs.
    """
    full = validate(config)
    try:
        catalogue = Catalogue([Path(folder) for folder in full["method_paths"]])
        entries = [entry for label, raw in full["methods"].items() for entry in _entries(catalogue, label, raw or {})]
    except CatalogueError as error:
        raise InputError(brief(str(error), LONGEST_SENTENCE)) from None
    label, times = Counter(label for label, *_ in entries).most_common(1)[0]
    if times > 1:
        raise InputError(f"methods: two entries or values of a sweep are called {label}; give one another name.")
    targets = [_target(entry, f"targets.{i}") for i, entry in enumerate(full["targets"])]
    if check_sources:
        asked = [*targets, *(target for *_, own in entries for target in own or ())]
        for name, spec in full["models"].items():
            checkpoint_files.check_model(name, spec)
            for target, size in itertools.product(asked, checkpoint_files.layer_inputs(spec)):
                if target.group and size % target.group:
                    raise InputError(
                        f"targets: groups of {target.group} do not divide the {size} inputs that layers of the model "
                        f"{name!r} have."
                    )
            longest = checkpoint_files.longest_sequence(spec)
            for kind in ("calibration", "evaluation"):
                for set_name, entry in full[kind].items():
                    if longest is not None and entry["length"] > longest:
                        raise InputError(
                            f"{kind}.{set_name}: its length is {entry['length']}, but the model {name!r} takes at most "
                            f"{longest} tokens."
                        )
        used = {entry["text"] for kind in ("calibration", "evaluation") for entry in full[kind].values()}
        for name in sorted(used):
            text_files.check_text(name, full["texts"][name])
        for name, spec in full["tasks"].items():
            task_sets.check_tasks(name, spec)
    models = {identity(name, spec): {"name": name, **spec} for name, spec in full["models"].items()}
    calibrations, evaluations = (
        {
            identity(name, [spec, full["texts"][spec["text"]]]): {"name": name, **spec}
            for name, entry in full[kind].items()
            for spec in _repeats(entry)
        }
        for kind in ("calibration", "evaluation")
    )
    expanded = {name: task_sets.expanded(spec) for name, spec in full["tasks"].items()}
    tasks = {identity(name, spec): {"name": name, **spec} for name, spec in expanded.items()}
    seeds = {  # of the methods
        calib: spec["seed"] if "seeds" in full["calibration"][spec["name"]] else full["seed"]
        for calib, spec in calibrations.items()
    }
    cells, skipped = [], []
    for label, method, params, tune, own_targets in entries:
        settings = {"label": label, "method": method, "params": params}
        settings |= {"tune": tune} if tune else {}
        if catalogue[method].control and not catalogue[method].card["patterns"]:
            if tune:
                raise InputError(f"methods.{label}: {method} changes nothing, so that there is nothing to tune.")
            # A control that changes nothing is one cell of the model, whatever the calibration and mode.
            places = [(model, next(iter(calibrations)), full["modes"][0]) for model in models]
            cells += [_cell(catalogue, settings, Target(), models, calibrations, seeds, *place) for place in places]
            continue
        reached = 0
        for target in own_targets if own_targets is not None else targets:
            reason = catalogue.refusal(method, params, target)
            if not reason and "end" in tune and target.bits is None:
                reason = "tune.end trains scales and zeros, of which there are none without bits"
            if reason:
                skipped.append({"label": label, "method": method, "target": target.label, "reason": reason})
                continue
            reached += 1
            places = itertools.product(models, calibrations, full["modes"])
            cells += [_cell(catalogue, settings, target, models, calibrations, seeds, *place) for place in places]
        if not reached:
            reason = skipped[-1]["reason"] if skipped else "no target is given"
            raise InputError(f"methods.{label}: {method} reaches none of the targets ({reason}).")
    supported = {cell.spec["columns"]["target"] for cell in cells}
    unreached = [target.label for target in targets if target.label not in supported]
    if unreached and not all(catalogue[method].control for _, method, *_ in entries):
        reasons = [f" ({row['label']}: {row['reason']})" for row in skipped if row["target"] == unreached[0]]
        raise InputError(f"targets: no method of the study supports {unreached[0]}{''.join(reasons[:1])}.")
    sweep = full.get("sweep")
    if sweep is not None and sweep not in SWEPT and not any(sweep in params for _, _, params, *_ in entries):
        known = ", ".join(SWEPT)
        raise InputError(
            f"config: sweep must be {known} or a parameter of a method of the study. Got {sweep!r} instead."
        )
    unique = {cell.folder: cell for cell in cells}
    return Plan(full, catalogue, models, calibrations, evaluations, tasks, list(unique.values()), skipped)


def _entries(
    catalogue: Catalogue, label: str, raw: Mapping[str, Any]
) -> Iterator[tuple[str, str, dict, dict, list | None]]:
    """(label, method, complete params, tuning stages, own targets) of a config entry; lists of values are swept."""
    where = f"methods.{label}"
    named = [key for key in raw if key in catalogue.named_by]  # parameters that say which method it is
    if named and "method" in raw:
        raise CatalogueError(f"{where}: {named[0]} says the method. Got method: {raw['method']} beside it.")
    method = catalogue.named_by[named[0]] if named else raw.get("method", label)
    entry = catalogue.find(method, where)
    if not named and "named_by" in entry.card:
        key = entry.card["named_by"]
        raise CatalogueError(f"{where}: {method} needs its parameter {key}, which has no default in a config.")
    params = {key: value for key, value in raw.items() if key not in RESERVED}
    swept = [
        key
        for key, value in params.items()
        if isinstance(value, list) and entry.card["parameters"].get(key, {}).get("type") != "array"
    ]
    if any(not params[key] for key in swept):
        raise CatalogueError(f"{where}: a sweep needs at least one value, {swept[0]} has none.")
    own = raw.get("targets")
    targets = None if own is None else [_target(value, f"{where}.targets.{i}") for i, value in enumerate(own)]
    for values in itertools.product(*(params[key] for key in swept)):
        chosen = dict(zip(swept, values, strict=True))
        name = ".".join([label, *(f"{key}_{_slug(value)}" for key, value in chosen.items())])
        if len(name) > LONGEST_NAME:  # of a folder
            raise CatalogueError(
                f"{where}: a value of the sweep makes a name of {len(name)} characters, more than {LONGEST_NAME}: give "
                "it an entry of its own."
            )
        yield name, method, catalogue.complete(method, {**params, **chosen}, where), raw.get("tune", {}), targets


def _repeats(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A calibration set with seeds as one of each seed, which is what a study of that seed alone has."""
    rest = {key: value for key, value in entry.items() if key != "seeds"}
    return [{**rest, "seed": seed} for seed in entry["seeds"]] if "seeds" in entry else [rest]


def _slug(value: Any) -> str:
    text = value if isinstance(value, str) else canonical(value)
    return "".join(c if c.isascii() and c.isalnum() or c in "._-" else "_" for c in text).strip("_")


def _target(entry: Mapping[str, Any], where: str) -> Target:
    try:
        return Target(**entry)
    except ValueError as error:
        raise InputError(f"config: {where} is wrong: {error}") from None


def _cell(
    catalogue: Catalogue,
    settings: Mapping[str, Any],
    target: Target,
    models: Mapping[str, Any],
    calibrations: Mapping[str, Any],
    seeds: Mapping[str, int],
    model: str,
    calib: str,
    mode: str,
) -> Cell:
    name = identity(settings["label"], {**settings, "seed": seeds[calib], "target": target.as_dict()})
    tune = {"tune": settings["tune"]} if "tune" in settings else {}
    comparison = catalogue[settings["method"]].comparison(target)
    columns = {
        "model": models[model]["name"],
        "calibration": calibrations[calib]["name"],
        "mode": mode,
        "label": settings["label"],
        "method": settings["method"],
        "comparison": "tuned" if tune and comparison != "control" else comparison,
        "target": target.label,
        **target.as_dict(),
        "params": canonical({**settings["params"], **tune}),
        "seed": seeds[calib],
        "cell": name,
    }
    method = {"name": settings["method"], "params": settings["params"]}
    return Cell(model, calib, mode, name, {"columns": columns, "method": method, "target": target.as_dict(), **tune})
