"""The divergence of a compressed model's predictions from the dense model's: KL(dense || compressed) per token.

The dense model's logits are never stored. Its hidden states after the last block are stored, once per model and
evaluation (dense_states.py). The compressed model's own forward pass, with its blocks skipped, computes logits from
them, a batch at a time. This works because nothing outside the blocks is compressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.hidden_states import StoredStates
from layerwise.models.loading import computed_dtype
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import read_made, set_aside, sha256

# Logits converted to float64 at a time. Half a MB stays in a core's cache: a token with a vocabulary of 4096 takes 55
# us. With 1024 rows at a time it takes 255 us, and in float32 230 us, with errors of 4e-8 in the mean and 2e-6 per
# token. GPUs use larger pieces.
AT_ONCE = {"cpu": 2**16}
AT_ONCE_ELSEWHERE = 2**24
DECIMALS = 9  # decimals written; the divergence at 8 bits is about 1e-5 nats
TAIL = 0.99  # the percentile over tokens
METRICS = ("kl", "kl_p99", "top1_agreement")  # the first and the last are means over tokens


def kl(dense: Tensor, compressed: Tensor) -> Tensor:
    """KL(dense || compressed) [n] float64, in nats, of the distributions that logits [n, vocabulary] represent.

    NaN if either model's logits contain NaN; infinite if only the compressed model gives a word zero probability.
    """
    rows = max(1, AT_ONCE.get(dense.device.type, AT_ONCE_ELSEWHERE) // dense.shape[1])
    parts = zip(dense.split(rows), compressed.split(rows), strict=True)
    return torch.cat([_kl(*(logits.double().log_softmax(-1) for logits in pair)) for pair in parts])


def _kl(dense: Tensor, compressed: Tensor) -> Tensor:
    """The same for log-probabilities in float64."""
    share = dense.exp()
    terms = share * (dense - compressed)
    terms[share == 0] = 0.0  # a word that is masked in both models: 0 * (inf - inf)
    return terms.sum(-1).clamp(min=0)  # for equal distributions, rounding can give a value below zero


@dataclass(frozen=True)
class DenseStates:
    """A file of a dense model's hidden states after its last block, on every window of an evaluation.

    path: the record's path; the values are next to it. record: dtype and shape (length, hidden), `windows`, `returned`
    (0 if the last block returns a tensor, n for a tuple of n), `sha256`, and the sources: hashes of the `tokens` and of
    the `model`'s files.
    """

    path: Path
    record: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> DenseStates:
        """Read a record. Raises InputError for a damaged record, and sets it aside."""
        return cls(path, read_made(path))

    @property
    def values(self) -> Path:
        return values_of(self.path)

    def check(self, tokens: str, model: Mapping[str, str]) -> None:
        """Raise InputError unless the states belong to these tokens (a hash) and to these model files (name ->
        hash)."""
        for what, other, own in (("tokens", "other tokens", tokens), ("model", "another model", dict(model))):
            if self.record[what] != own:
                raise InputError(
                    f"{self.path} must be of the {what} that the cell is evaluated with. Got states of {other} "
                    "instead: delete it, and run again."
                )

    def batches(self, stream: Stream, tokens: Tensor) -> StoredStates:
        """The states for the batches of a stream of these tokens [n, length].

        Raises InputError if they are damaged, in another dtype than the stream's model, or belong to other windows.
        """
        wanted, found = list(tokens.shape), [self.record["windows"], self.record["shape"][0]]
        if found != wanted:
            raise InputError(f"{self.path} must hold [windows, tokens] = {wanted}. Got {found} instead.")
        own = computed_dtype(stream.model)
        if self.record["dtype"] != own:
            raise InputError(
                f"{self.path} must hold hidden states in {own}, in which the cell is computed. Got "
                f"{self.record['dtype']} instead: run the rule dense_states on the same kind of device as the cells."
            )
        if not self.values.is_file() or sha256(self.values) != self.record["sha256"]:
            raise InputError(f"{self.values} is damaged: it has changed since it was written; {set_aside(self.path)}.")
        return StoredStates((self.values, self.path), [len(inputs) for inputs in stream.inputs])


def values_of(record: Path) -> Path:
    """Path of the values that a record describes."""
    return record.with_suffix(".bin")


class Divergence:
    """The divergence of a model's predictions from the dense model's, for all tokens except the last of each window."""

    def __init__(self, dense: DenseStates, stream: Stream, tokens: Tensor) -> None:
        """stream: the compressed model's stream, at its first block. tokens: [n, length], all windows.

        Raises InputError if the states are not the dense model's on these tokens.
        """
        self._stream, self._states = stream, dense.batches(stream, tokens)
        self._returned = int(dense.record["returned"])
        self._kl = torch.empty(len(tokens), tokens.shape[1] - 1, dtype=torch.float64)
        self._same = torch.empty(len(tokens), tokens.shape[1] - 1, dtype=torch.bool)
        self._done = 0

    def add(self, batch: int, tokens: Tensor, logits: Tensor) -> None:
        """Add the compressed model's logits [sequences, length, vocabulary] of the next batch, given its tokens."""
        after = self._states[batch]
        for dense, compressed in zip(self._stream.logits(batch, tokens, after, self._returned), logits, strict=True):
            dense, compressed = dense[:-1], compressed[:-1]  # the token after the last one is unknown
            self._kl[self._done] = kl(dense, compressed)
            self._same[self._done] = dense.argmax(-1) == compressed.argmax(-1)
            self._done += 1

    def result(self) -> dict[str, Any]:
        """METRICS over all tokens, and per window: kl_windows and top1_windows; None if KL is not finite."""
        windows, same = self._kl.mean(1), self._same.double().mean(1)
        found = {
            "kl": float(windows.mean()),
            "kl_p99": float(np.quantile(self._kl.numpy(), TAIL)),
            "top1_agreement": float(same.mean()),
        }
        if lost := int((~torch.isfinite(windows)).sum()):
            reason = f"the divergence of {lost} of {len(windows)} windows from the dense model is not finite"
            return dict.fromkeys(METRICS) | {"kl_windows": [], "top1_windows": [], "reason": reason}
        by_window = {"kl_windows": _rounded(windows), "top1_windows": _rounded(same)}
        return {name: round(value, DECIMALS) for name, value in found.items()} | by_window


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DECIMALS) for value in values.tolist()]
