"""The cost of one job of a study: memory, disk and computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

KL_WORK = 400  # operations that the divergence takes as long as, for a word of a token; in float64, by its measurement


@dataclass(frozen=True)
class Work:
    """passes: operations of linear layers in forward passes, in `dtype`. grams: of Grams, in float32. words: words of
    the vocabulary times tokens that are evaluated. solving: operations of methods, by their cards. layers: (rows,
    inputs) -> how many are solved, by a compress job."""

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
        """Both, the layers and the dtype being this one's."""
        return replace(
            self,
            passes=self.passes + other.passes,
            grams=self.grams + other.grams,
            words=self.words + other.words,
            solving=self.solving + other.solving,
        )


@dataclass(frozen=True)
class JobCost:
    """memory: bytes at most. disk: bytes that stay, of a Gram store in the folder of all stores, else in results/.
    transient: further bytes while the job runs. work: what it computes. minimum: bytes of memory with which the job
    still completes, more slowly (default: memory)."""

    memory: float
    disk: float = 0.0
    transient: float = 0.0
    work: Work = Work()
    minimum: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "minimum", self.minimum or self.memory)
