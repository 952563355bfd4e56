"""The method that tries layers at candidate levels before a budget is spread."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.compression.solver import Solver
from layerwise.contract.allocator import Candidate
from layerwise.contract.layer import Layer, Method
from layerwise.contract.target import Target
from layerwise.runtime.errors import Diverged


@dataclass(frozen=True)
class Probe:
    """A method at a target that is the budget. candidates: the levels at which every layer's error is measured."""

    solver: Solver
    candidates: Sequence[Candidate] = ()

    @classmethod
    def of(
        cls, name: str, method: Method, candidates: Sequence[Candidate], target: Target, seed: int, dtype: torch.dtype
    ) -> Probe:
        """name: the allocator's name. dtype: the model's dtype."""
        return cls(Solver(f"{name}'s {type(method).__name__}", method, target, seed, dtype), candidates)

    def errors(self, layer: Layer) -> dict[Candidate, tuple[float, float]]:
        """Candidate -> (absolute, relative) output error of the layer, for candidates that give it factors of rank >=
        1.

        A candidate at which the method diverges is left out, and stderr says so. Raises Diverged at the budget itself.
        """
        budget = self.solver.target if self.solver.target.paired else self.solver.target.level
        found: dict[Candidate, tuple[float, float]] = {}
        out, inputs = layer.weight.shape
        for candidate in self.candidates:
            solver = self._at(candidate)
            if solver.without_factors({layer.name: (out, inputs)}):  # the rank is 0 in a small layer
                continue
            try:
                _, row = solver.solve(layer)
            except Diverged as error:
                if candidate == budget:
                    raise
                print(f"{layer.name} does not get {solver.target.label}: {error}", file=sys.stderr)
                continue
            found[candidate] = (row["absolute_error"], row["output_error"])
        return found

    def weight(self, layer: Layer, candidate: Candidate) -> Tensor:
        """The layer's weight [out, in] at a level."""
        return self._at(candidate).solve(layer)[0].weight

    def _at(self, candidate: Candidate) -> Solver:
        own = candidate if isinstance(candidate, Target) else self.solver.target.at(candidate)
        return replace(self.solver, target=own)
