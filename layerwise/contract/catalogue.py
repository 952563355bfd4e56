"""Catalogues of methods and allocators: their entries, what a config may ask of them, and how they are built.

A file in methods/, or in a folder of the config's `method_paths`, is a method (`contract/method_file.py`). Allocators
work the same way, in allocators/ and `allocator_paths` (docs/allocation.md).
"""

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from layerwise.contract.cards import ACTS, ALLOCATOR, METHOD, Kind, acts, needed
from layerwise.contract.import_closure import FOLDERS
from layerwise.contract.method_file import SHARED_SOURCES, CatalogueError, Entry, read_entry
from layerwise.contract.target import Target
from layerwise.runtime.sentences import did_you_mean, schema_fault

if TYPE_CHECKING:
    from layerwise.contract.allocator import Allocator
    from layerwise.contract.layer import Method


class UnknownName(CatalogueError):
    """An entry names a method or an allocator that no file of the catalogue defines."""

    def __init__(self, where: str, kind: Kind, name: str, known: Iterable[str]) -> None:
        self.where, self.kind, self.name, self.known = where, kind, name, sorted(known)
        super().__init__(self.sentence())

    def sentence(self, more: str = "") -> str:
        """The refusal. more: another possibility than the known names."""
        if self.kind is METHOD and self.name in Catalogue(kind=ALLOCATOR):
            told = "is an allocator, not a method: a study names it under `allocations` (docs/allocation.md)."
            return f"{self.name} {told}" if self.where == METHOD.word else f"{self.where}: {self.name} {told}"
        subject = f"{self.where}: the {self.kind.word}" if self.where != self.kind.word else f"The {self.where}"
        near, known = did_you_mean(self.name, self.known), ", ".join(self.known)
        return f"{subject} must be one of {known}{more}. Got {self.name!r} instead{near}."

    def of_config(self) -> str:
        """The refusal of an entry in a config, which may list folders of files."""
        return self.sentence(f", or a file in a folder of {self.kind.paths}")


class Catalogue(Mapping[str, Entry]):
    """All methods of the given folders by name, or all files of another kind."""

    def __init__(
        self, folders: list[Path] | None = None, kind: Kind = METHOD, methods: "Catalogue | None" = None
    ) -> None:
        """methods: the catalogue for parameters of the format `method`, if the files are of another kind."""
        self.kind, self.methods = kind, methods or self
        self._entries: dict[str, Entry] = {}
        for folder in [FOLDERS[kind.folder], *(folders or [])]:
            try:
                files = sorted(folder.glob("*.py")) if folder.is_dir() else None
            except OSError:  # for example, a name that is too long
                files = None
            if files is None:
                raise CatalogueError(f"{kind.paths} must be folders. Got {str(folder)!r} instead.")
            for path in files:
                self.add(path)

    def add(self, path: Path) -> Entry | None:
        """Add a file and return its entry, or None for a file without a CARD; raises CatalogueError for a wrong
        file."""
        entry = read_entry(path, self.kind)
        if entry is not None:
            if entry.name in self._entries:
                other = self._entries[entry.name].path
                raise CatalogueError(f"Two files define the {self.kind.word} {entry.name}: {other} and {path}.")
            self._entries[entry.name] = entry
            self._check_names()
        return entry

    @property
    def named_by(self) -> dict[str, str]:
        """Parameter by which a config names a method -> the method."""
        return {entry.card["named_by"]: entry.name for entry in self.values() if "named_by" in entry.card}

    def _check_names(self) -> None:
        """Raise CatalogueError for a parameter that in a config names another method."""
        named_by = self.named_by
        for entry in self.values():
            for key in named_by.keys() & entry.card["parameters"].keys():
                if named_by[key] != entry.name:
                    raise CatalogueError(
                        f"{entry.path}: the parameter {key} must have another name: in a config it names the method "
                        f"{named_by[key]}."
                    )

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str, where: str) -> Entry:
        """The entry, or an UnknownName that lists the known ones."""
        if name not in self._entries:
            raise UnknownName(where, self.kind, name, self)
        return self._entries[name]

    def complete(self, name: str, params: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The method's parameters with defaults filled in, warm starts as {name: {params}}; raises CatalogueError."""
        return self._complete(name, params, where, ())

    def _complete(self, name: str, params: Mapping[str, Any], where: str, outer: tuple[str, ...]) -> dict[str, Any]:
        """`complete` for a warm start inside the `outer` methods, which must not occur again."""
        entry = self.find(name, where)
        unknown = [key for key in params if key not in entry.card["parameters"]]
        if unknown:
            known = ", ".join(entry.card["parameters"]) or "none"
            raise CatalogueError(f"{where}: {name} has no parameter {unknown[0]!r}; its parameters are: {known}.")
        full = {key: params.get(key, entry.defaults[key]) for key in entry.card["parameters"]}
        for key, schema in entry.card["parameters"].items():
            inside = () if key in params else (*outer, name)
            if schema.get("format") == "method":
                if full[key] is None and schema.get("optional"):
                    continue
                full[key] = self.methods._complete_warm_start(full[key], f"{where}.{key}", inside)
                continue
            if key in entry.chains and isinstance(full[key], list):
                steps = enumerate(full[key])
                full[key] = [self._complete_warm_start(step, f"{where}.{key}.{i}", inside) for i, step in steps]
            if isinstance(full[key], float) and not math.isfinite(full[key]):  # NaN passes any limit
                raise CatalogueError(f"{where}: {name}'s {key} is wrong: {full[key]} is not finite.")
            errors = list(jsonschema.Draft202012Validator(schema).iter_errors(full[key]))
            if errors:
                advice = _advice(full[key], schema)
                raise CatalogueError(f"{where}: {name}'s {key} {schema_fault(errors[0])}{advice}.{_meaning(schema)}")
            if isinstance(full[key], float) and schema.get("type") in ("integer", ["integer", "null"]):
                # JSON Schema accepts 128.0 as an integer, range() does not.
                full[key] = int(full[key])
        return full

    def _complete_warm_start(self, value: Any, where: str, outer: tuple[str, ...]) -> dict[str, Any]:
        name, params = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
        if not isinstance(name, str) or not isinstance(params or {}, dict):
            # In a config's entry the parameter may stand for the method; inside another method it may not.
            key = self[name].card.get("named_by") if isinstance(name, str) and name in self else None
            advice = f": write {{{name}: {{{key}: [...]}}}}" if key and isinstance(params, list) else ""
            raise CatalogueError(
                f"{where} must be a method's name or {{name: {{parameters}}}}. Got {value!r} instead{advice}."
            )
        if name in outer:
            raise CatalogueError(
                f"{where}: warm starts must not form a cycle. Got {' -> '.join([*outer, name])} instead."
            )
        return {name: self._complete(name, params or {}, where, outer)}

    def refusal(self, name: str, params: Mapping[str, Any], target: Target) -> str | None:
        """Why the method with these complete parameters, including warm starts, cannot reach the target, or None."""
        entry = self[name]
        own = entry.refusal(target, params)
        if own:
            return own
        if entry.chains:
            return self._chain_refusal([(name, inside) for _, name, inside in entry.inner(params)], target)
        for key, inner, inner_params in entry.inner(params):
            schema, card = entry.card["parameters"][key], self[inner].card
            asked = schema.get("asked")
            part = target if asked is None else getattr(target, asked)
            if asked == "unrounded" and card.get("sparse_factor"):
                return f"its {key} cannot be used: {inner} gives a sparse factor"
            if asked in ("pruning", "grid") and part.dense:
                continue
            if "gives" in schema and (lacking := self.needs(inner, inner_params) - set(schema["gives"])):
                return (
                    f"its {key} cannot quantise: {inner} needs {', '.join(sorted(lacking))}, which {name} does not give"
                )
            if asked != "pruning" and card.get("own_grid"):
                return f"its {key} cannot quantise: {inner} has a grid of its own"
            if reason := self.refusal(inner, inner_params, part):
                return f"its {key} cannot be used: {reason}"
            if asked == "grid" and target.sparsity and not card.get("keeps_zeros"):
                return f"its {key} cannot be used: {inner} does not keep zeros"
        return None

    def _chain_refusal(self, steps: list[tuple[str, Mapping[str, Any]]], target: Target) -> str | None:
        """Why a chain of two methods cannot prune and quantise to the target, or None."""
        quantises = [self.refusal(*step, target.grid) for step in steps]
        if None not in quantises:
            return f"none of its methods quantises: {quantises[0]}, {quantises[1]}"
        prunes = [self.refusal(*step, target.pruning) for step in steps]
        # If both can quantise, the first one prunes, unless only the second can prune.
        prunes_first = quantises[1] is None and not (quantises[0] is None and prunes[0] and not prunes[1])
        pruner, quantiser = steps if prunes_first else steps[::-1]
        cannot = prunes[0 if prunes_first else 1]
        if cannot:
            return f"{quantiser[0]} quantises, and the other method cannot prune: {cannot}"
        if not self[quantiser[0]].card.get("keeps_zeros"):
            return f"{quantiser[0]} does not keep the zeros of {pruner[0]}"
        if not prunes_first and self[pruner[0]].card["updates_weights"]:
            return f"{pruner[0]} changes the weights that {quantiser[0]} has quantised"
        return None

    def needs(self, name: str, params: Mapping[str, Any]) -> set[str]:
        """The needs of a method with these complete parameters, and of the methods inside it, from their cards.

        A chain only passes its layer to its methods, so it needs what they need.
        """
        own = set() if self[name].chains else set(needed(self[name].card, params))
        return own.union(*(self.methods.needs(inner, own_params) for _, inner, own_params in self[name].inner(params)))

    def idle(self, name: str, params: Mapping[str, Any], target: Target) -> dict[str, str]:
        """Parameters of the method, or of a method inside it, that are not the defaults and do nothing at the target.

        Place of the parameter, such as start.acceleration -> the sentence's beginning, which says where it acts.
        """
        entry, found = self[name], {}
        defaults = self.complete(name, {}, name)
        changed = [key for key in params if params[key] != defaults[key]]
        for key in changed:
            word = acts(entry.card["parameters"][key], params[key])
            if word and not ACTS[word][1](target):
                found[key] = f"{name}'s {key} acts only at targets {ACTS[word][0]}"
        for key, inner, own in entry.inner(params):
            if key not in changed or key in found or inner not in self:
                continue
            asked = entry.card["parameters"][key].get("asked")
            parts = (
                [target.pruning, target.grid] if key in entry.chains else [getattr(target, asked) if asked else target]
            )
            seen = [self.idle(inner, own, part) for part in parts if not (part.dense or self.refusal(inner, own, part))]
            common = [place for place in seen[0] if all(place in other for other in seen)] if seen else []
            found |= {f"{key}.{place}": seen[0][place] for place in common}
        return found

    def rotates(self, name: str, params: Mapping[str, Any]) -> bool:
        """Whether the method with these complete parameters, or a method inside it, rotates the inputs of a layer."""
        inner = self[name].inner(params)
        return "rotation_seed" in params or any(self.rotates(held, own) for _, held, own in inner if held in self)

    def sources(self, name: str, params: Mapping[str, Any]) -> list[Path]:
        """Files of the code that decides the method's results: its own and their imports, its warm starts', the shared
        ones."""
        own = [self[name].path, *self[name].imports]
        for _, inner, inner_params in self[name].inner(params):
            own += [p for p in self.methods.sources(inner, inner_params) if p not in SHARED_SOURCES]
        return [*dict.fromkeys(own), *SHARED_SOURCES]

    def build(self, name: str, params: Mapping[str, Any]) -> "Method":
        """Import the method's file (and with it torch) and construct the method with complete parameters."""
        return self._build(name, params)

    def allocator(self, name: str, params: Mapping[str, Any]) -> "Allocator":
        """The same for a catalogue of allocators."""
        return self._build(name, params)

    def _build(self, name: str, params: Mapping[str, Any]) -> Any:
        entry = self[name]
        values = dict(params)
        for key in entry.chains:
            if key in values:
                values[key] = ()
        for key, inner, inner_params in entry.inner(params):
            built = self.methods.build(inner, inner_params)
            values[key] = (*values[key], built) if key in entry.chains else built
        return getattr(_import(entry), entry.class_name)(**values)


def odd_inputs(method: str, size: int, layer: str) -> str:
    """The error sentence for a method that rotates and a layer with an odd number of inputs."""
    return (
        f"{method} must have layers with an even number of inputs: with an odd one it only changes signs. "
        f"Got {size} inputs in {layer} instead."
    )


def _meaning(schema: Mapping[str, Any]) -> str:
    return f" It means: {schema['description']}" if "description" in schema else ""


def _advice(value: Any, schema: Mapping[str, Any]) -> str:
    """Advice on a number that YAML reads as text, such as 1e-3."""
    with contextlib.suppress(ValueError):
        if isinstance(value, str) and schema.get("type") in ("number", "integer"):
            return f"; YAML reads {value} as text: write {float(value)!r}"
    return ""


def _import(entry: Entry):
    if entry.shipped:
        return importlib.import_module(f"layerwise.{entry.kind.folder}.{entry.name}")
    name = _module_name(entry.path)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, entry.path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look up their own module
        spec.loader.exec_module(module)
    return sys.modules[name]


def forget(path: Path) -> None:
    """Import the file outside methods/ again when its method is next built, because it may have been edited."""
    sys.modules.pop(_module_name(path), None)


def _module_name(path: Path) -> str:
    return f"layerwise_method_{path.resolve()}"  # the path, because another folder may hold a method of the same name
