"""The contract of an allocator: it gives each layer of a model a level, from one budget for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layerwise.contract.gram import Gram
from layerwise.contract.layer import Method
from layerwise.contract.target import Target

__all__ = ["Allocator", "Candidate", "DenseLayer", "Part", "Proposal", "Target", "Trials"]

Candidate = float | Target  # a level, or, of a budget counted in bits, what a layer is asked instead


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer of the dense model: weight [out, in] float32, and the Gram of its inputs where the card's `needs`
    name it."""

    name: str
    weight: Tensor
    gram: Gram | None = None


@dataclass(frozen=True)
class Part:
    """A layer when levels are chosen.

    block: index of its block. out, inputs: of its weight. measured: what `measure` gave for it. errors: of each
    candidate (absolute, relative) output error, where the card's `needs` name errors; but not of a rank that would be
    0 in the layer.
    """

    name: str
    block: int
    out: int
    inputs: int
    measured: Any = None
    errors: Mapping[Candidate, tuple[float, float]] | None = None

    @property
    def size(self) -> int:
        """Weights."""
        return self.out * self.inputs


@dataclass(frozen=True)
class Proposal:
    """An allocator's result, in the order of the parts.

    levels: share of zeros of each layer, or its bits; not read where it gives pairs. The runner holds the budget:
    levels that miss it are all moved by one number, and kept within limits (allocation/budget.py). scores: what the
    levels come from, for the table. official: the levels stand as they are, though they may miss the budget, because a
    released code has them so.
    pairs: of a target that is `paired`: what each layer is asked. The bits that these take together must be at
    most those of the target itself (storage/bits_per_weight.py).
    error, uniform_error, bound: weighted errors of the levels, of equal levels, and the least that any levels can have,
    of an allocator that knows them.
    """

    levels: tuple[float, ...]
    scores: tuple[float | None, ...]
    official: bool = False
    pairs: tuple[Target, ...] | None = None
    error: float | None = None
    uniform_error: float | None = None
    bound: float | None = None


class Trials(ABC):
    """The whole model with layers compressed for a try, on the first windows of the calibration text.

    Layers are compressed by the method that `candidates` names, on the dense Grams. levels: one for each part, in their
    order; None leaves a layer as it is. seed: of the draws of an allocator that makes some.
    """

    seed: int

    @abstractmethod
    def divergence(self, levels: Sequence[Candidate | None], windows: int) -> float:
        """Mean KL from the dense model in nats per token, on so many windows; infinite where it is not finite."""

    @abstractmethod
    def profiles(self, levels: Sequence[Candidate | None], windows: int) -> Sequence[NDArray[np.float64]]:
        """Root mean square [in] of each input of each layer, on so many windows, in the order of the parts."""


@dataclass(frozen=True)
class Allocator:
    """A frozen dataclass of parameters; its file declares a literal CARD beside it. Pure: no file, state or draw,
    but for those of the trials' seed."""

    def measure(self, layers: Iterator[DenseLayer]) -> Sequence[Any]:
        """The measurement of each layer of one block. It is kept until levels are chosen; the weights are not."""
        return [None for _ in layers]

    def candidates(self, target: Target) -> tuple[Method, Sequence[Candidate]]:
        """The method, and the levels, of which the errors of each layer are wanted; for a card that needs errors.

        The method is that of trials, too, whatever the levels.
        """
        raise NotImplementedError

    def allocate(self, parts: Sequence[Part], target: Target) -> Proposal:
        """Levels of the layers for a target, which is the budget: `target.level` is what each layer would give."""
        raise NotImplementedError

    def search(self, parts: Sequence[Part], target: Target, trials: Trials) -> Proposal:
        """The same with the model to be tried; called instead where the card needs trials."""
        raise NotImplementedError
