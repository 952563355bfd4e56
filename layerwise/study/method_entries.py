"""The entries of a config's `methods`, with complete parameters and expanded sweeps. Does not import torch."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.contract.catalogue import Catalogue, UnknownName
from layerwise.contract.method_file import CatalogueError
from layerwise.contract.target import Target
from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief
from layerwise.study.cell import slug

LONGEST_SENTENCE = 500  # characters of a catalogue's sentence, which may quote values
# characters of an entry's name with swept values; file systems allow 255 including digest and suffix
LONGEST_NAME = 200
RESERVED = ("method", "targets", "modes", "tune")  # keys of a method's entry that are not its parameters


@dataclass(frozen=True)
class MethodEntry:
    """An entry of the config's `methods`, with one value of each sweep.

    params: complete parameters. tune: stage -> its settings, empty without tuning. targets, modes: the entry's own, or
    None for the study's.
    """

    label: str
    method: str
    params: Mapping[str, Any]
    tune: Mapping[str, Mapping[str, Any]]
    targets: Sequence[Target] | None
    modes: Sequence[str] | None = None

    def settings(self) -> dict[str, Any]:
        """The part of its cells' identity other than seed and target."""
        settings = {"label": self.label, "method": self.method, "params": self.params}
        return settings | ({"tune": self.tune} if self.tune else {})


def read_methods(full: Mapping[str, Any]) -> tuple[Catalogue, list[MethodEntry]]:
    """The methods that the config may name, and its entries, whose labels are distinct."""
    try:
        catalogue = Catalogue([Path(folder) for folder in full["method_paths"]])
        entries = [entry for label, raw in full["methods"].items() for entry in _entries(catalogue, label, raw or {})]
    except CatalogueError as error:
        raise in_config(error) from None
    label, times = Counter(entry.label for entry in entries).most_common(1)[0]
    if times > 1:
        raise InputError(
            f"methods: entries and values of a sweep must have different names. Got two called {label} instead."
        )
    return catalogue, entries


def in_config(error: CatalogueError) -> InputError:
    """The error for the author of a config."""
    text = error.of_config() if isinstance(error, UnknownName) else str(error)
    return InputError(brief(text, LONGEST_SENTENCE))


def _entries(catalogue: Catalogue, label: str, raw: Mapping[str, Any]) -> Iterator[MethodEntry]:
    """The entries that a config entry represents: lists of values are expanded."""
    where = f"methods.{label}"
    named = [key for key in raw if key in catalogue.named_by]  # parameters that name the method
    if named and "method" in raw:
        raise CatalogueError(
            f"{where}: method must be left out, because {named[0]} already names it. Got {raw['method']} instead."
        )
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
        raise CatalogueError(f"{where}: a sweep must have at least one value. Got none for {swept[0]} instead.")
    listed = raw.get("targets")
    targets = None if listed is None else [target_of(value, f"{where}.targets.{i}") for i, value in enumerate(listed)]
    for values in itertools.product(*(params[key] for key in swept)):
        chosen = dict(zip(swept, values, strict=True))
        name = ".".join([label, *(f"{key}_{slug(value)}" for key, value in chosen.items())])
        if len(name) > LONGEST_NAME:  # length limit of a folder's name
            raise CatalogueError(
                f"{where}: a value of the sweep makes a name of {len(name)} characters, more than {LONGEST_NAME}: give "
                "it an entry of its own."
            )
        complete = catalogue.complete(method, {**params, **chosen}, where)
        yield MethodEntry(name, method, complete, raw.get("tune", {}), targets, raw.get("modes"))


def target_of(entry: Mapping[str, Any], where: str) -> Target:
    """A target as a config writes it; raises InputError, which names `where`, for anything else."""
    try:
        return Target(**entry)
    except ValueError as error:
        raise InputError(f"config: {where} is wrong: {error}") from None
