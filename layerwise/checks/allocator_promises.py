"""The promises of an allocator (docs/allocation.md) as checks that hold for any allocator, budget and model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from layerwise.allocation.budget import BITS, excess
from layerwise.checks.allocator_cases import BLOCK, MODELS, ONE_LAYER, AllocatorCase, Model
from layerwise.checks.case import Finding, NothingToCheck, demand
from layerwise.compression.allocate import held_pairs, targets_of
from layerwise.contract.allocator import DenseLayer, Part, Proposal
from layerwise.contract.allocator_card import MOST
from layerwise.contract.layer import Method
from layerwise.contract.target import Target

AS_RELEASED = "its levels follow a released code and are not changed"
REPEATED = Model("a block twice", 7, (BLOCK,))


def untouched(case: AllocatorCase, name: str | Model) -> None:
    model = of(name)
    rng, again = (np.random.default_rng(model.seed) for _ in range(2))
    for index, block in enumerate(model.blocks):
        layers = list(model.layers(index, rng))
        values = list(case.allocator.measure(iter(layers)))
        expected = f"measure must return {len(block)} values, one for each layer of block {index}"
        demand(len(values) == len(block), model.name, expected, len(values))
        for given, before in zip(layers, model.layers(index, again), strict=True):
            demand(same(given, before), model.name, "weights and Grams must be left as they are", "different ones")


def candidates(case: AllocatorCase, name: str | Model) -> None:
    model = of(name)
    if not case.needs & {"errors", "trials"}:
        raise NothingToCheck("it does not try layers")
    method, options = case.allocator.candidates(case.target)
    demand(isinstance(method, Method), model.name, "candidates must name a Method", type(method).__name__)
    for option in [case.target, *options]:
        own = option if isinstance(option, Target) else case.target.at(option)
        # at the dense target the base class returns the weight unchanged
        refused = None if own.dense else method.refusal(own)
        demand(refused is None, model.name, f"the method of candidates must reach {own.label}", refused)


def budget(case: AllocatorCase, name: str | Model) -> None:
    model = of(name)
    parts, target = case.parts(model), case.target
    sizes = [part.size for part in parts]
    proposal = case.proposal(parts)
    check_scores(proposal, parts, model.name)
    if target.paired:
        pairs = held_pairs(parts, proposal.pairs or (), target)
        if case.needs & {"errors", "trials"}:
            unknown = set(pairs) - set(case.allocator.candidates(target)[1])
            demand(not unknown, model.name, "pairs must be among the candidates", [own.label for own in unknown])
        return
    if proposal.official:
        raise NothingToCheck(AS_RELEASED)
    levels = [own.level for own in targets_of(parts, proposal, target)]
    if target.budget == "bits":
        inside = all(level in range(BITS[0], BITS[1] + 1) for level in levels)
        demand(inside, model.name, "bits must be 2 to 8", levels)
    else:
        inside = all(0 <= level <= MOST for level in levels)
        demand(inside, model.name, "levels must be in [0, 0.99]", levels)
    if target.budget in ("row", "layer"):
        missed = abs(excess(levels, sizes, target))
        demand(missed <= 1, model.name, "levels must hold the budget to within one weight", f"{missed:g} weights")


def check_scores(proposal: object, parts: Sequence[Part], model: str) -> None:
    if not isinstance(proposal, Proposal):
        raise Finding(model, "an allocator must return a Proposal", type(proposal).__name__)
    demand(len(proposal.scores) == len(parts), model, f"scores must be {len(parts)}", len(proposal.scores))
    numbers = all(score is None or not math.isnan(score) for score in proposal.scores)
    demand(numbers, model, "scores must be numbers or None", proposal.scores)


def twice(case: AllocatorCase, name: str | Model) -> None:
    model, found = of(name), list[Proposal]()
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        found.append(case.proposal(case.parts(model)))
    demand(
        found[0] == found[1], model.name, "two calls with the same inputs must give the same proposal", "different ones"
    )


def equals(case: AllocatorCase, name: str | Model) -> None:
    if "splits_equals" in case.entry.card:
        raise NothingToCheck(f"equal layers may get two levels: {case.entry.card['splits_equals']}")
    if case.target.paired:
        raise NothingToCheck("pairs are not levels")
    model, parts = of(name), list[Part]()
    for index, seed in enumerate((7, 8, 7)):
        own = replace(model, seed=seed)
        parts += [replace(part, name=f"{index}.{part.name}", block=seed) for part in case.parts(own)]
    proposal = case.proposal(parts)
    if proposal.official:
        raise NothingToCheck(AS_RELEASED)
    levels = [own.level for own in targets_of(parts, proposal, case.target)]
    size = len(parts) // 3
    first, last = levels[:size], levels[2 * size :]
    demand(first == last, model.name, "equal layers must get equal levels", f"{first} and {last}")


def one_layer(case: AllocatorCase, name: str | Model) -> None:
    if case.target.paired and "trials" in case.needs:
        raise NothingToCheck("another pair may have a smaller divergence")
    model = of(name)
    parts = case.parts(model)
    if any(part.errors for part in parts):  # the budget's errors are zero, so that no candidate is better
        parts = [replace(part, errors=best_at(part.errors or {}, case.target)) for part in parts]
    (own,) = targets_of(parts, case.proposal(parts), case.target)
    asked = case.target
    held = own == asked if asked.paired else math.isclose(own.level, asked.level, abs_tol=1 / parts[0].size)
    demand(held, model.name, f"the only layer must get the budget, {asked.label}", own.label)


def best_at(errors: Mapping[Any, tuple[float, float]], target: Target) -> dict[Any, tuple[float, float]]:
    equal = target if target.paired else target.level
    return {option: (float(option != equal), float(option != equal)) for option in errors}


def of(name: str | Model) -> Model:
    return name if isinstance(name, Model) else {**MODELS, REPEATED.name: REPEATED}[name]


def same(one: DenseLayer, other: DenseLayer) -> bool:
    assert one.gram and other.gram
    return torch.equal(one.weight, other.weight) and torch.equal(one.gram.matrix, other.gram.matrix)


@dataclass(frozen=True)
class Check:
    """on(case, model's name) runs the check. asks: its demand, in a sentence. names: the models that it uses."""

    on: Callable[[AllocatorCase, str | Model], None]
    asks: str
    names: tuple[str, ...] = tuple(MODELS)

    def layers(self, case: AllocatorCase) -> tuple[str, ...]:
        return self.names


CHECKS = {
    "1 measure": Check(untouched, "Measures each layer of a block once, and leaves weights and Grams unchanged."),
    "2 candidates": Check(candidates, "Names a method that can reach every candidate.", (ONE_LAYER.name,)),
    "3 budget": Check(budget, "Proposes a level for each layer, and the levels can meet the budget within the limits."),
    "4 deterministic": Check(
        twice, "Gives the same levels for the same inputs, independent of the state of random generators."
    ),
    "5 equal layers": Check(equals, "Gives equal layers of one block's number equal levels.", (REPEATED.name,)),
    "6 one layer": Check(one_layer, "Gives the only layer of a model the budget.", (ONE_LAYER.name,)),
}
