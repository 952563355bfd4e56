"""AlphaPruning: blocks whose weights have heavier-tailed spectra keep more (Lu et al.)."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from layerwise.contract.allocator import Allocator, DenseLayer, Part, Proposal, Target

CARD = {
    "title": "AlphaPruning",
    "paper": "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large "
    "Language Models",
    "arxiv": "2410.10912",
    "code": "https://github.com/haiquanlu/AlphaPruning",
    "needs": ["weight"],
    "budgets": ["row", "layer"],
    "parameters": {
        "epsilon": {
            "type": "number",
            "minimum": 0,
            "exclusiveMaximum": 1,
            "description": "Levels lie within 1 - epsilon to 1 + epsilon times a common one. The paper uses 0.3 with "
            "Wanda, 0.2 with SparseGPT and 0.5 with magnitude.",
        },
        "mapping": {
            "enum": ["block", "layer"],
            "description": "block: one level per block, from the mean exponent of its layers. layer: one level per "
            "layer.",
        },
        "window": {
            "enum": ["official", "intended"],
            "description": "Lower limit for the start of the tail. intended: 0.95 times the peak of the spectrum. "
            "official: the logarithm of that, which the released code compares with eigenvalues, so that the limit "
            "almost never binds.",
        },
    },
}
BINS = 100


@dataclass(frozen=True)
class AlphaPruning(Allocator):
    """Prunes a block more if the power laws fitted to the spectra of its layers have a larger mean exponent.

    A spectrum consists of the squared singular values. The allocator sees only the weights.
    """

    epsilon: float = 0.3
    mapping: str = "block"
    window: str = "official"

    def measure(self, layers: Iterator[DenseLayer]) -> Sequence[float]:
        """The exponent of each layer. A layer that gets 0, and so is pruned least, is named on stderr."""
        found = list[float]()
        for layer in layers:
            found.append(self.exponent(torch.linalg.svdvals(layer.weight).square().cpu().numpy()))
            if not found[-1]:
                print(f"{layer.name} has the exponent 0: no power law fits its singular values", file=sys.stderr)
        return found

    def exponent(self, eigenvalues: NDArray[np.float32]) -> float:
        """The exponent of the power law that best fits the tail of eigenvalues [n], by the Kolmogorov-Smirnov distance.

        A tail begins at an eigenvalue near the peak of the histogram of their logarithms, never at the largest. The
        result is 0 if no tail can be fitted, as for a layer of zeros.
        """
        values = np.sort(eigenvalues.astype(np.float64))
        values = values[values > 0]
        if len(values) < 2:
            return 0.0
        low, high = self._window(values)
        logs = np.log(values)
        best, found = np.inf, 0.0
        for start in np.flatnonzero((values >= low) & (values <= high)):
            count = len(values) - int(start)
            if count < 2 or logs[start] == logs[-1]:
                continue
            alpha = 1 + count / (logs[start:].sum() - count * logs[start])
            fitted = 1 - (values[start:] / values[start]) ** (1 - alpha)
            distance = np.abs(fitted - np.arange(count) / count).max()
            if distance < best:
                best, found = float(distance), float(alpha)
        return found

    def _window(self, values: NDArray[np.float64]) -> tuple[float, float]:
        """Least and largest eigenvalue at which a tail may begin, around the lower edge of the fullest bin."""
        counts, edges = np.histogram(np.log10(values), BINS)
        peak = float(10 ** edges[int(np.argmax(counts))])
        return (float(np.log10(0.95 * peak)) if self.window == "official" else 0.95 * peak), 1.5 * peak

    def allocate(self, parts: Sequence[Part], target: Target) -> Proposal:
        own = np.array([float(part.measured) for part in parts])
        if self.mapping == "block":
            blocks = np.array([part.block for part in parts])
            means = {block: own[blocks == block].mean() for block in dict.fromkeys(blocks.tolist())}
            values = np.array([means[part.block] for part in parts])
        else:
            values = own
        range_ = values.max() - values.min()
        relative = (values - values.min()) / range_ * 2 - 1 if range_ > 0 else np.zeros(len(values))
        factors = 1 + self.epsilon * relative
        sizes = np.array([part.size for part in parts], dtype=np.float64)
        levels = target.level * factors * sizes.sum() / (factors @ sizes)
        return Proposal(tuple(levels.tolist()), tuple(own.tolist()))
