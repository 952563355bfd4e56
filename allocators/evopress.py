"""EvoPress: random exchanges of levels between layers; those that reduce the divergence are kept (Sieberling et
al.)."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import cast

from layerwise.allocation.budget import BITS
from layerwise.contract.allocator import Allocator, Candidate, Part, Proposal, Target, Trials
from layerwise.contract.allocator_card import MOST
from layerwise.contract.layer import Method

CARD = {
    "title": "EvoPress",
    "paper": "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search",
    "arxiv": "2410.14649",
    "code": "https://github.com/IST-DASLab/EvoPress",
    "needs": ["trials"],
    "budgets": ["row", "layer", "n:m", "bits"],
    "passes": [["windows"], ["generations", "offspring", "screen"], ["generations", "survivors", "windows"]],
    "at_most": {"survivors": "offspring"},
    "splits_equals": "exchanges are drawn at random",
    "parameters": {
        "probe": {
            "format": "method",
            "asked": "pruning",
            "description": "Method that compresses layers for the trials, if the target prunes.",
        },
        "quantiser": {"format": "method", "asked": "bits", "description": "The same for a target with bits."},
        "generations": {"type": "integer", "minimum": 0, "description": "Rounds of the search."},
        "offspring": {"type": "integer", "minimum": 1, "description": "Mutations of the best model in each round."},
        "survivors": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of mutations, the best on `screen` windows, that are tried on all `windows`.",
        },
        "exchanges": {
            "type": "integer",
            "minimum": 1,
            "description": "Largest number of steps that one mutation exchanges.",
        },
        "steps": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of steps on each side of a budget of zeros. For a layer of median size, all steps "
            "span the share `width` of the distance to the nearer limit. A step is as many weights in every layer.",
        },
        "width": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "description": "See steps."},
        "screen": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of calibration sequences in the first comparison.",
        },
        "windows": {
            "type": "integer",
            "minimum": 1,
            "description": "Number of calibration sequences in the second comparison.",
        },
    },
}


@dataclass(frozen=True)
class Steps:
    """The levels a layer may get: the budget plus `unit` times a whole number of steps from `lowest` to `highest`.

    group: layers of one group exchange steps of the same number of weights, or bits.
    """

    group: int
    unit: float
    lowest: int
    highest: int


@dataclass(frozen=True)
class EvoPress(Allocator):
    """One layer takes a step up and another a step down; the model nearest to the dense one survives.

    The budget is met at every step: a step is the same number of weights in every layer, or layers of equal size
    exchange whole numbers.
    """

    probe: Method | str = "wanda"
    quantiser: Method | str = "rtn"
    generations: int = 40
    offspring: int = 16
    survivors: int = 4
    exchanges: int = 3
    steps: int = 8
    width: float = 0.5
    screen: int = 2
    windows: int = 8

    def candidates(self, target: Target) -> tuple[Method, Sequence[Candidate]]:
        return cast(Method, self.quantiser if target.budget == "bits" else self.probe), ()

    def search(self, parts: Sequence[Part], target: Target, trials: Trials) -> Proposal:
        """scores: the divergence of the model at all chosen levels, in nats per token, repeated for every layer."""
        steps, rng = self.steps_of(parts, target), Random(trials.seed)  # noqa: S311 (no secret)
        if len({step.group for step in steps}) == len(parts):
            print(f"The levels of {target.label} stay equal: no two layers have the same size", file=sys.stderr)

        def divergence(places: Sequence[int], windows: int) -> float:
            return trials.divergence(levels_of(places, steps, target), windows)

        best = (0,) * len(parts)
        least = divergence(best, self.windows)
        if not math.isfinite(least):
            raise ValueError(f"the divergence at equal levels must be finite. Got {least} instead")
        for _ in range(self.generations):
            found = {self.mutated(best, steps, rng) for _ in range(self.offspring)} - {best}
            ranked = sorted((divergence(own, self.screen), own) for own in found)
            for _, own in ranked[: self.survivors]:
                reached = divergence(own, self.windows)
                if reached < least:
                    best, least = own, reached
        return Proposal(tuple(levels_of(best, steps, target)), (least,) * len(parts))

    def mutated(self, places: Sequence[int], steps: Sequence[Steps], rng: Random) -> tuple[int, ...]:
        """A neighbour: up to `exchanges` steps move from one layer to another; small numbers are more frequent."""
        own = list(places)
        for _ in range(min(rng.randint(1, self.exchanges), rng.randint(1, self.exchanges))):
            givers = [i for i, step in enumerate(steps) if own[i] < step.highest]
            rng.shuffle(givers)
            for giver in givers:
                takers = [
                    i
                    for i, step in enumerate(steps)
                    if i != giver and step.group == steps[giver].group and own[i] > step.lowest
                ]
                if takers:
                    own[giver] += 1
                    own[rng.choice(takers)] -= 1
                    break
        return tuple(own)

    def steps_of(self, parts: Sequence[Part], target: Target) -> list[Steps]:
        """The steps of every layer."""
        if target.budget == "bits" or target.n_of_m:
            of = target.n_of_m[1] if target.n_of_m else 1
            middle = round(target.level * of)
            least, most = (0, of - 1) if target.n_of_m else BITS
            return [Steps(part.size, 1 / of, least - middle, most - middle) for part in parts]
        median = sorted(part.size for part in parts)[len(parts) // 2]
        step = max(1, int(self.width * min(target.level, 1 - target.level) / self.steps * median))
        room = [(int(target.level * part.size / step), int((MOST - target.level) * part.size / step)) for part in parts]
        return [
            Steps(0, step / part.size, -min(self.steps, down), min(self.steps, up))
            for part, (down, up) in zip(parts, room, strict=True)
        ]


def levels_of(places: Sequence[int], steps: Sequence[Steps], target: Target) -> list[float]:
    """The level of each layer at these numbers of steps from the budget."""
    return [target.level + place * step.unit for place, step in zip(places, steps, strict=True)]
