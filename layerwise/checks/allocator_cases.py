"""Allocators at a budget, and the small synthetic models on which the battery asks them for levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from layerwise.contract.allocator import Allocator, Candidate, DenseLayer, Part, Proposal, Trials
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.gram import Gram
from layerwise.contract.method_file import Entry
from layerwise.contract.target import JOINT, LOW_RANK, SUM, Target

TARGETS = {  # by the kinds of budget that a card lists
    "row": [Target(0.5), Target(0.7), Target(0.95)],
    "layer": [Target(0.6, "layer")],
    "n:m": [Target(pattern="2:4"), Target(pattern="3:8"), Target(pattern="1:3")],
    "bits": [Target(bits=3), Target(bits=4, group=32)],
    JOINT: [Target(0.5, bits=4, group=8), Target(pattern="2:4", bits=3)],
    LOW_RANK: [Target(rank=0.6)],
    SUM: [Target(0.5, rank=0.3)],
}
Shapes = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Model:
    """Blocks of layer shapes [out, inputs]. seed: seed of their weights, Grams and errors.

    kind: "ordinary" (weights with heavy tails, Grams with an occasional dead input), or a degenerate kind: "constant"
    weights, only "dead" inputs, "tiny" weights.
    """

    name: str
    seed: int
    blocks: Shapes
    kind: str = "ordinary"

    def layers(self, index: int, rng: np.random.Generator) -> Iterator[DenseLayer]:
        """The layers of a block."""
        for place, (out, inputs) in enumerate(self.blocks[index]):
            weight = torch.from_numpy(rng.standard_t(2.5, (out, inputs)).astype(np.float32))
            diagonal = torch.from_numpy(rng.exponential(size=inputs).astype(np.float32)) * (rng.random() > 0.1)
            if self.kind == "constant":
                weight = torch.ones_like(weight)
            elif self.kind == "tiny":
                weight = weight * 1e-12
            elif self.kind == "dead":
                diagonal = torch.zeros_like(diagonal)
            yield DenseLayer(f"model.{index}.{place}", weight, Gram(torch.diag(diagonal), 100))


BLOCK = ((12, 16), (8, 12))
UNEQUAL: Shapes = (((24, 8), (3, 2)), ((4, 16),), ((2, 24), (16, 16), (1, 2)))


def random_model(seed: int) -> Model:
    """A model of one to four blocks, each of one to three layers of any small shape."""
    rng = np.random.default_rng(seed)
    blocks = tuple(
        tuple((int(rng.integers(1, 25)), int(rng.integers(2, 25))) for _ in range(rng.integers(1, 4)))
        for _ in range(rng.integers(1, 5))
    )
    return Model(f"random {seed}", seed, blocks)


ONE_LAYER = Model("one layer", 3, (((16, 24),),))
MODELS = {
    model.name: model
    for model in (
        Model("equal blocks", 0, (BLOCK,) * 3),
        Model("unequal blocks", 1, UNEQUAL),
        Model("one block", 2, (BLOCK,)),
        ONE_LAYER,
        Model("constant weights", 4, (BLOCK,) * 2, "constant"),
        Model("dead inputs", 5, UNEQUAL, "dead"),
        Model("tiny weights", 6, (BLOCK,) * 2, "tiny"),
        *map(random_model, range(10)),
    )
}


@dataclass(frozen=True)
class AllocatorCase:
    """An allocator, constructed, at a budget. params: changes to the defaults."""

    entry: Entry
    allocator: Allocator
    needs: frozenset[str]
    target: Target
    params: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False  # allocators have no second implementation

    @property
    def label(self) -> str:
        changed = ",".join(f"{key}={value}" for key, value in self.params.items())
        return f"{self.entry.name}({changed})" if changed else self.entry.name

    def parts(self, model: Model) -> list[Part]:
        """The layers of a model as the runner passes them, with errors that grow from candidate to candidate."""
        rng, parts = np.random.default_rng(model.seed), list[Part]()
        for index, block in enumerate(model.blocks):
            values = self.allocator.measure(model.layers(index, rng))
            for place, ((out, inputs), value) in enumerate(zip(block, values, strict=True)):
                parts.append(Part(f"model.{index}.{place}", index, out, inputs, value, self.errors(rng)))
        return parts

    def errors(self, rng: np.random.Generator) -> dict[Candidate, tuple[float, float]] | None:
        """Synthetic errors of a layer, if the allocator needs errors."""
        if "errors" not in self.needs:
            return None
        _, options = self.allocator.candidates(self.target)
        rising = np.sort(rng.exponential(size=len(options)))
        return {option: (float(error), float(error)) for option, error in zip(options, rising, strict=True)}

    def proposal(self, parts: Sequence[Part]) -> Proposal:
        """The proposal, requested as by the runner."""
        if "trials" in self.needs:
            return self.allocator.search(parts, self.target, MadeTrials(parts))
        return self.allocator.allocate(parts, self.target)


class MadeTrials(Trials):
    """Trials of a model in which each layer adds its strength times its squared level to the divergence.

    asked: the levels and windows of each trial so far.
    """

    def __init__(self, parts: Sequence[Part], seed: int = 0) -> None:
        self.seed, self.parts = seed, parts
        self.asked: list[tuple[list[Candidate | None], int]] = []
        self.strengths = [1.0 + part.block + 0.1 * (part.size % 7) for part in parts]

    def divergence(self, levels: Sequence[Candidate | None], windows: int) -> float:
        lost = self._lost(levels, windows)
        return sum(strength * own for strength, own in zip(self.strengths, lost, strict=True))

    def profiles(self, levels: Sequence[Candidate | None], windows: int) -> list[NDArray[np.float64]]:
        """Profiles whose norms differ more when the preceding layers have lost more."""
        lost = np.cumsum(self._lost(levels, windows))
        return [1 + own * np.arange(part.inputs) for part, own in zip(self.parts, lost, strict=True)]

    def _lost(self, levels: Sequence[Candidate | None], windows: int) -> list[float]:
        if len(levels) != len(self.parts):
            raise ValueError(f"a trial must have {len(self.parts)} levels. Got {len(levels)} instead")
        if windows < 1:
            raise ValueError(f"a trial must be on at least one window. Got {windows} instead")
        self.asked.append((list(levels), windows))
        return [0.0 if own is None else level_of(own) ** 2 for own in levels]


def level_of(own: Candidate) -> float:
    """A numeric level for a candidate."""
    return own.sparsity + (8 - (own.bits or 16)) / 8 - own.rank if isinstance(own, Target) else own


def cases_of(
    catalogue: Catalogue, name: str, variants: Sequence[Mapping[str, Any]], targets: Sequence[Target]
) -> Iterator[AllocatorCase]:
    """An allocator of the catalogue with each of these sets of parameters at each target that its card lists."""
    entry = catalogue[name]
    for params in variants:
        full = catalogue.complete(name, params, "the checks of allocators")
        allocator, needs = catalogue.allocator(name, full), frozenset(entry.needs(full))
        for target in targets:
            if target.budget in entry.card["budgets"]:
                yield AllocatorCase(entry, allocator, needs, target, params)
