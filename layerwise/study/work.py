"""The cost of one job of a study: memory, disk and computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

KL_WORK = 400  # time of the divergence per vocabulary entry and token, in operations; measured in float64


@dataclass(frozen=True)
class Work:
    """passes: operations of linear layers in forward passes, in `dtype`. grams: operations of Grams, in float32. words:
    vocabulary size times evaluated tokens. solving: operations of methods, from their cards. layers: (rows, inputs) ->
    number of layers solved by a compress job."""

    passes: float = 0.0
    grams: float = 0.0
    words: float = 0.0
    solving: float = 0.0
    layers: Mapping[tuple[int, int], int] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def operations(self) -> float:
        return self.passes + self.grams + KL_WORK * self.words + self.solving

    def __add__(self, other: Work) -> Work:
        """The sum of both, with this one's layers and dtype."""
        return replace(
            self,
            passes=self.passes + other.passes,
            grams=self.grams + other.grams,
            words=self.words + other.words,
            solving=self.solving + other.solving,
        )


@dataclass(frozen=True)
class JobCost:
    """memory: largest number of bytes. disk: lasting bytes, in the folder of Gram stores for a store, otherwise in
    results/. transient: further bytes during the job. work: its computations. minimum: bytes of memory with which the
    job still completes, more slowly (default: memory)."""

    memory: float
    disk: float = 0.0
    transient: float = 0.0
    work: Work = Work()
    minimum: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "minimum", self.minimum or self.memory)
