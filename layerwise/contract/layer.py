"""The layer contract: a method's inputs, its result and its promises (docs/contract.md).

For a weight W [out, in] and inputs X [in, tokens] with G = X X^T / tokens, every method approximately solves

    minimise tr((W - W_hat) G (W - W_hat)^T)   subject to W_hat being sparse, quantised, of low rank, or a sum S + B A
                                               of a sparse or quantised part and a low-rank one, as the target says.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from layerwise.contract.gram import Gram
from layerwise.contract.target import Target, refusal

__all__ = ["Compressed", "Gram", "Layer", "LowRank", "Method", "Quantised", "Statistics", "Target", "UnsupportedTarget"]


class UnsupportedTarget(ValueError):
    """A method was asked for a target that its card does not list."""


@dataclass(frozen=True)
class Statistics:
    """Statistics of one distinct input (tap) that a Gram does not hold. A card's `needs` names the ones that a method
    uses."""

    length: int  # tokens per calibration sequence
    mean: Tensor  # [in] mean activation
    absmean: Tensor  # [in] mean absolute activation (AWQ)
    sequence_variance: Tensor  # [in] mean over sequences of the within-sequence biased variance (DSnoT)
    sample: Tensor  # [<= 512, in] equally spaced rows of X (AWQ's clipping)
    # [<= 512, in] rows of X for the first token of each sequence; None for an expert, which may not see them.
    first_tokens: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One linear layer: weight [out, in] float32 and the Gram of its inputs.

    keep: [out, in] bool, False where an earlier method has pruned and the weight must stay zero. A method whose card
    says `keeps_zeros` respects it. fisher: [out] float32, at least 0, mean squared gradients of the dense model's loss
    summed over each row (calibration/fisher.py), for a method whose card needs it.
    """

    name: str
    weight: Tensor
    gram: Gram
    statistics: Statistics | None = None
    keep: Tensor | None = None
    fisher: Tensor | None = None


@dataclass(frozen=True)
class Rotation:
    """Signs and blocks of a random-signed block Hadamard transform of a layer's inputs (numerics.rotations).

    seed: seed of the signs, in [0, 2^31 - 1]. block: a power of two that divides the number of inputs.
    """

    seed: int
    block: int


@dataclass(frozen=True)
class Quantised:
    """The codes of a layer [out, in] and their grid.

    The value of a code is scales[i, g] * (codes[i, j] - zeros[i, g]) / input_scale[j], with g = group_of[j]. For a
    format, and with levels, it is scales[i, g] / divisor * levels[codes[i, j]] / input_scale[j].

    codes:  [out, in] uint8, in [0, 2^bits - 1].
    scales: [out, groups] float32, positive and finite; numbers of the target's format, if it has one.
    zeros:  [out, groups] float32, whole numbers in [0, 2^bits - 1]; 2^(bits - 1) where the target is symmetric; 0 in a
            format and with levels.
    group_of: [in] int64, group of each input. None when groups are runs of `target.group` consecutive inputs.
    input_scale: [in] float32, positive and finite (AWQ). None when every input has the scale one.
    divisor: [1] float32, positive and finite, divides all scales of the layer in nvfp4. None otherwise.
    levels: [2^bits] float32, finite: the layer's own code book, if codes do not represent integers. None otherwise.
            With levels a scale may be 0.
    rotation: the rotation Q if the values are those of W Q; Q^T rotates them back to the weight. None without rotation.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor | None = None
    input_scale: Tensor | None = None
    divisor: Tensor | None = None
    levels: Tensor | None = None
    rotation: Rotation | None = None

    @property
    def own_grid(self) -> bool:
        """Whether the codes represent the layer's own levels, or a rotated weight."""
        return self.levels is not None or self.rotation is not None


@dataclass(frozen=True)
class LowRank:
    """Two factors B and A of a layer, and the remaining part S: W_hat = S + B A, summed in float64.

    left:  B [out, r] float32. right: A [r, in] float32; r is given by `Target.rank_of`.
    rest:  S [out, in] float32. None if the target has factors alone.
    kept:  [out, r] bool, False where a sparse B is zero. Then r may be larger, as long as entries and positions take no
           more bits than the target's share of the weights. None for a dense B.
    left_codes, right_codes: integer codes of B and A on the grid `Target.factors`; None for factors of 16 bits.
    """

    left: Tensor
    right: Tensor
    rest: Tensor | None = None
    kept: Tensor | None = None
    left_codes: Quantised | None = None
    right_codes: Quantised | None = None


@dataclass(frozen=True)
class Compressed:
    """A method's result for a layer.

    weight: [out, in] float32: zero where mask is False; otherwise, in a quantised layer, the value of its code. With
            factors it is the sum S + B A, and mask and quantised belong to S.
    mask:   [out, in] bool, True where kept. None when the target prunes nothing.
    quantised, low_rank: codes and grid; factors and S. None when the target has no bits, or no rank.
    trace:  (iteration, seconds, objective) rows of an iterative method.
    info:   further facts: `damping`, which has a column in the layers table; `learned`, lists of numbers for cell.json.
    """

    weight: Tensor
    mask: Tensor | None = None
    quantised: Quantised | None = None
    low_rank: LowRank | None = None
    trace: tuple[tuple[int, float, float], ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rest(self) -> Compressed | None:
        """The part S beside the factors, as a result of its own. Without factors, the result itself. None if S is
        None."""
        if self.low_rank is None:
            return self
        if self.low_rank.rest is None:
            return None
        return Compressed(self.low_rank.rest, self.mask, self.quantised)


@dataclass(frozen=True)
class Method(ABC):
    """A frozen dataclass of hyperparameters with one pure call, `compress`; its file declares a literal CARD beside it.

    An adapter implements `solve`. The runner, warm starts and chains call `compress`, which checks the target first.
    """

    _name: ClassVar[str] = ""  # name of the adapter's file
    _card: ClassVar[Mapping[str, Any] | None] = None  # the CARD in the class's file

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        module = sys.modules.get(cls.__module__)
        card = getattr(module, "CARD", None)
        if card is not None:
            cls._name, cls._card = Path(getattr(module, "__file__", None) or cls.__name__).stem, card

    @classmethod
    def refusal(cls, target: Target) -> str | None:
        """Why the card refuses the target, in one sentence; None if it lists the target, and for a class without a
        card."""
        return refusal(cls._name, cls._card, target) if cls._card is not None else None

    def compress(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        """Compress one layer; the dense target (no sparsity, bits or rank) gives a copy of the weight.

        Raises UnsupportedTarget, with the card's sentence, when the card does not list the target.
        """
        if target.dense:
            return Compressed(layer.weight.clone())
        reason = self.refusal(target)
        if reason is not None:
            raise UnsupportedTarget(f"{reason}. Got the target {target.label} instead.")
        return self.solve(layer, target, rng)

    def rank_of(self, target: Target, out: int, inputs: int) -> int:
        """The rank of the method's factors for a layer [out, in] at a target with a rank."""
        return target.rank_of(out, inputs)

    @abstractmethod
    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        """Compress one layer to a target that the card lists; never called for the dense target.

        rng: the only source of randomness. No scoring, timing, logging, seeding, saving or change of the inputs.
        """
