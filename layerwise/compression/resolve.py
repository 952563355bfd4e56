"""Convert a Python caller's arguments to the runner's form: a target from its label, a method from its name or file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.compression.solver import Solver
from layerwise.contract.cards import needed
from layerwise.contract.catalogue import Catalogue, odd_inputs
from layerwise.contract.layer import Compressed, Layer, Method, UnsupportedTarget
from layerwise.contract.method_file import CatalogueError, Entry, read_entry
from layerwise.contract.target import Target
from layerwise.runtime.errors import InputError

ELSEWHERE = ("gram", "cross_gram", "fisher")  # needs of a card that are not fields of Statistics
MethodLike = str | Path | Mapping[str, Any] | Method


@dataclass(frozen=True)
class Resolved:
    """A method that can be run. entry: its catalogue entry, or None for a class without a card. catalogue: holds the
    methods inside it."""

    name: str
    method: Method
    params: Mapping[str, Any]
    entry: Entry | None
    catalogue: Catalogue

    def asker(self, asked: Sequence[str]) -> str:
        """The innermost method that needs all of these, in words: awq, or awq, inside code_swaps,."""
        own = next(own for own in reversed(held(self.method)) if {*asked} <= {*needs(own)})
        entry = entry_of(own)
        name = entry.name if entry else type(own).__name__
        return self.name if own is self.method else f"{name}, inside {self.name},"

    def idle(self, target: Target) -> list[str]:
        """Sentences about parameters that do nothing at the target."""
        if self.entry is None or target.dense:
            return []
        found = self.catalogue.idle(self.name, self.params, target).values()
        return [f"{sentence}, so it does nothing at {target.label}." for sentence in found]

    def check_inputs(self, target: Target, sizes: Mapping[str, int]) -> None:
        """Raise ValueError if the method would rotate a layer with an odd number of inputs. sizes: name -> in."""
        if self.entry is None or target.dense or not self.catalogue.rotates(self.name, self.params):
            return
        for layer, size in sizes.items():
            if size % 2:
                raise ValueError(odd_inputs(self.name, size, layer))

    def solver(self, target: Target, seed: int, dtype: torch.dtype) -> Solver:
        """The method as the runner calls it. dtype: dtype of the weights that it replaces."""
        mask_only = self.entry is not None and self.entry.comparison(target) == "mask-only"
        return Solver(self.name, self.method, target, seed, dtype, mask_only, self.entry and self.entry.criterion)


def as_target(target: Target | str) -> Target:
    """The target itself, or the target of a label. Raises ValueError for anything else."""
    return target if isinstance(target, Target) else Target.parse(target)


def resolve(method: MethodLike, parameters: Mapping[str, Any], target: Target) -> Resolved:
    """The method that a name, {name: {parameters}}, the path of a method's file or an instance represents.

    Raises CatalogueError (a ValueError) for an unknown name or parameter and a faulty file, UnsupportedTarget for a
    method that cannot reach the target.
    """
    if isinstance(method, Method):
        if parameters:
            came = ", ".join(parameters)
            raise ValueError(f"Parameters must be given with a method's name. Got {came} beside an instance instead.")
        return of_instance(method, target)
    name, given, catalogue = named(method)
    params = catalogue.complete(name, {**given, **as_json(parameters)}, "method")
    refuse(catalogue.refusal(name, params, target), target)
    return Resolved(name, built(catalogue, name, params), params, catalogue[name], catalogue)


def of_instance(method: Method, target: Target) -> Resolved:
    """The instance, checked as its name and parameters would be, with the methods that it names built.

    A class without a card is not checked, nor is a parameter that holds an instance of one.
    """
    entry, catalogue = entry_of(method), Catalogue()
    if entry is None:
        return Resolved(type(method).__name__, method, params_of(method), None, catalogue)
    for known in filter(None, map(entry_of, held(method))):
        if known.path.resolve() not in [shipped.path for shipped in catalogue.values()]:
            catalogue.add(known.path)
    own = {field.name: getattr(method, field.name) for field in fields(method)}
    unknown = {key: value for key, value in own.items() if None in map(entry_of, inside(value))}
    method = replace(method, **{key: whole(value) for key, value in unknown.items()})
    given = params_of(method)
    full = catalogue.complete(entry.name, {key: given[key] for key in given if key not in unknown}, "method")
    checked = {key: value for key, value in full.items() if key not in unknown}
    unsure = unknown.keys() & {*entry.chains}
    refuse(entry.refusal(target, checked) if unsure else catalogue.refusal(entry.name, checked, target), target)
    params = {**full, **{key: given[key] for key in unknown}}
    return Resolved(entry.name, completed(method, checked, catalogue), params, catalogue[entry.name], catalogue)


def whole(value: Any) -> Any:
    """A parameter's method, or its list of methods, as instances, each checked apart from any target."""
    if isinstance(value, list | tuple):
        return tuple(resolve(step, {}, Target()).method for step in value)
    return resolve(value, {}, Target()).method


def held(method: Method) -> list[Method]:
    """The method and all methods inside it."""
    return [method, *(own for field in fields(method) for own in inside(getattr(method, field.name)))]


def inside(value: Any) -> list[Method]:
    """All methods inside the value of a parameter."""
    steps = value if isinstance(value, list | tuple) else [value]
    return [own for step in steps if isinstance(step, Method) for own in held(step)]


def completed(method: Method, params: Mapping[str, Any], catalogue: Catalogue) -> Method:
    """The instance with these complete parameters; the methods in it remain instances of their own classes."""
    entry = entry_of(method)
    assert entry is not None  # the caller leaves out instances of classes without a card

    def part(own: Any, spelled: Mapping[str, Any]) -> Method:
        [(name, inner)] = spelled.items()
        return completed(own, inner, catalogue) if isinstance(own, Method) else built(catalogue, name, inner)

    values = dict(params)
    for key in params:
        own = getattr(method, key)
        if key in entry.warm_starts and own is not None:
            values[key] = part(own, params[key])
        elif key in entry.chains and own is not None:
            values[key] = tuple(part(step, spelled) for step, spelled in zip(own, params[key], strict=True))
        elif isinstance(own, list | tuple):
            values[key] = own
    return replace(method, **values)


def refuse(reason: str | None, target: Target) -> None:
    """Raise UnsupportedTarget if there is a reason, except for the dense target, which every method accepts."""
    if reason and not target.dense:
        raise UnsupportedTarget(f"{reason}. Got the target {target.label} instead.")


def named(method: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any], Catalogue]:
    """Name and parameters of a method, and a catalogue that holds it."""
    if isinstance(method, Mapping) and len(method) == 1:
        name, given = next(iter(method.items()))
        if isinstance(name, str) and isinstance(given, Mapping | None):
            return name, as_json(given or {}), Catalogue()
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith(".py")):
        return Path(method).stem, {}, with_file(Path(method))
    if isinstance(method, str):
        return method, {}, Catalogue()
    raise ValueError(
        f"method must be a name, {{name: {{parameters}}}}, the path of a method's file or a Method. "
        f"Got {method!r} instead."
    )


def with_file(path: Path) -> Catalogue:
    """The shipped methods and the method of a file, which may be one of them."""
    catalogue = Catalogue()
    if path.resolve() not in [entry.path for entry in catalogue.values()] and catalogue.add(path) is None:
        raise CatalogueError(f"{path} must define a method: it has no CARD.")
    return catalogue


def built(catalogue: Catalogue, name: str, params: Mapping[str, Any]) -> Method:
    try:
        return catalogue.build(name, params)
    except Exception as error:  # raised by the method's own code
        said = " ".join(str(error).split())
        raise InputError(f"The method {name} cannot be made: {type(error).__name__}: {said}") from error


def entry_of(method: Method) -> Entry | None:
    """The entry for the file of an instance's class; None if the file has no card or its card is another class's."""
    file = getattr(sys.modules.get(type(method).__module__), "__file__", None)
    entry = read_entry(Path(file)) if file else None
    return entry if entry and entry.class_name == type(method).__name__ else None


def params_of(method: Method) -> dict[str, Any]:
    """The parameters of an instance as a config spells them, warm starts as {name: {parameters}}."""
    return as_json({field.name: getattr(method, field.name) for field in fields(method)})


def as_json(value: Any) -> Any:
    """A value as a config spells it: numbers of NumPy and torch as Python's, a method as {name: {parameters}}."""
    if isinstance(value, np.generic | torch.Tensor) and value.ndim == 0:
        return value.item()
    if isinstance(value, Method):
        entry = entry_of(value)
        return {entry.name if entry else type(value).__name__: params_of(value)}
    if isinstance(value, Mapping):
        return {key: as_json(own) for key, own in value.items()}
    return [as_json(own) for own in value] if isinstance(value, list | tuple) else value


def needed_statistics(method: Method) -> list[str]:
    """Names of the fields of Statistics that a method, or a method inside it, needs; see `needs`."""
    return [name for name in needs(method) if name not in ELSEWHERE]


def needs(method: Method) -> list[str]:
    """The needs of a method and of the methods inside it, from their cards.

    A chain only passes its layer to its methods, so it needs what they need.
    """
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    held = list(values.values())
    steps = [step for value in held if isinstance(value, Sequence) for step in value if isinstance(step, Method)]
    inner = [value for value in held if isinstance(value, Method)]
    card = getattr(sys.modules.get(type(method).__module__), "CARD", {})
    found = [] if steps or not card else needed(card, values)
    return list(dict.fromkeys([*found, *(name for own in (*steps, *inner) for name in needs(own))]))


def solve(solver: Solver, layer: Layer) -> tuple[Compressed, dict[str, Any]]:
    """As Solver.solve, but a target that the method itself refuses raises UnsupportedTarget."""
    try:
        return solver.solve(layer)
    except InputError as error:
        if isinstance(error.__cause__, UnsupportedTarget):
            raise UnsupportedTarget(str(error.__cause__)) from error
        raise
