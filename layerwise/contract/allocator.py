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

Candidate = float | Target  # a level or, for a budget counted in bits, a layer's target


@dataclass(frozen=True)
class DenseLayer:
    """A linear layer of the dense model: weight [out, in] float32, and the Gram of its inputs if the card's `needs`
    include it."""

    name: str
    weight: Tensor
    gram: Gram | None = None


@dataclass(frozen=True)
class Part:
    """A layer, as an allocator sees it when levels are chosen.

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
        """Number of weights."""
        return self.out * self.inputs


@dataclass(frozen=True)
class Proposal:
    """An allocator's result, in the order of the parts.

    levels: share of zeros of each layer, or its bits; ignored if there are pairs. The runner enforces the budget: it
    adds one number to all levels that miss it, within limits (allocation/budget.py). scores: the numbers from which the
    levels were computed, for the table. official: the levels follow a released code and are used unchanged, even if
    they miss the budget.
    pairs: the target of each layer, for a budget that is `paired`. Their bits together must be at
    most those of the target itself (storage/bits_per_weight.py).
    error, uniform_error, bound: the weighted error of these levels, that of equal levels, and a lower bound for any
    levels, if the allocator knows them.
    """

    levels: tuple[float, ...]
    scores: tuple[float | None, ...]
    official: bool = False
    pairs: tuple[Target, ...] | None = None
    error: float | None = None
    uniform_error: float | None = None
    bound: float | None = None


class Trials(ABC):
    """Trials of the whole model with compressed layers, on the first windows of the calibration text.

    Layers are compressed by the method that `candidates` names, on the dense Grams. levels: one for each part, in the
    order of the parts; None leaves a layer unchanged. seed: seed for an allocator that draws random numbers.
    """

    seed: int

    @abstractmethod
    def divergence(self, levels: Sequence[Candidate | None], windows: int) -> float:
        """Mean KL from the dense model in nats per token, on this many windows; infinite if it is not finite, or if
        the probe diverges at a level."""

    @abstractmethod
    def profiles(self, levels: Sequence[Candidate | None], windows: int) -> Sequence[NDArray[np.float64]]:
        """Root mean square [in] of each layer's inputs, on this many windows, in the order of the parts; NaN if
        the probe diverges at a level."""


@dataclass(frozen=True)
class Allocator:
    """A frozen dataclass of parameters; its file also declares a literal CARD. Pure: it uses no files and no state, and
    draws random numbers only from the trials' seed."""

    def measure(self, layers: Iterator[DenseLayer]) -> Sequence[Any]:
        """The measurement of each layer of one block. Measurements are kept until levels are chosen; weights are
        not."""
        return [None for _ in layers]

    def candidates(self, target: Target) -> tuple[Method, Sequence[Candidate]]:
        """The method and the levels at which each layer's errors are measured, for a card that needs errors.

        Trials use this method too, at any levels.
        """
        raise NotImplementedError

    def allocate(self, parts: Sequence[Part], target: Target) -> Proposal:
        """Levels of the layers for a target, which is the budget: `target.level` is the level if all layers were
        equal."""
        raise NotImplementedError

    def search(self, parts: Sequence[Part], target: Target, trials: Trials) -> Proposal:
        """As `allocate`, with trials of the model; called instead of it if the card needs trials."""
        raise NotImplementedError
