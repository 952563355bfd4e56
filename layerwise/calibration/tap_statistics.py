"""The Gram and statistics of one distinct input, accumulated batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.contract.layer import Gram, Statistics
from layerwise.contract.second_moment import RUN, CrossMoment, SecondMoment, add_products, add_to, mirror
from layerwise.kernels.rows import array
from layerwise.kernels.tap_statistics import add_sums
from layerwise.numerics import dispatch

SAMPLE_ROWS = 512


class TapStatistics:
    """Accumulates the Gram and statistics of one tap, independently of the batching of the sequences.

    Products are float32 over at most RUN tokens, means float32 within a sequence; totals are float64.
    """

    def __init__(self, features: int, sequences: int, length: int, device: torch.device | str = "cpu") -> None:
        self.tokens, self.length = sequences * length, length
        count = min(SAMPLE_ROWS, self.tokens)
        self.stride, self.taken = max(1, self.tokens // SAMPLE_ROWS), 0  # stride of the sample's rows
        self.seen = 0
        self.moment = SecondMoment(features, device)
        # moments with, and of, the inputs in the dense model
        self.beside: tuple[CrossMoment, SecondMoment] | None = None
        self.sums = torch.zeros(3, features, dtype=torch.float64, device=device)  # mean, absmean, variance
        self.sample = torch.zeros(count, features, dtype=torch.float32, device=device)
        self.first_tokens: list[Tensor] = []  # [sequences of a batch, in] each, for the first SAMPLE_ROWS sequences
        self.firsts_left = SAMPLE_ROWS

    @property
    def gram(self) -> Tensor:
        """[in, in] float64, the sum of all runs except the current one, above the diagonal."""
        return self.moment.total

    def update(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add whole sequences: inputs [..., in] of any float dtype, with the tokens of a sequence in order.

        dense: the inputs in the dense model, of the same shape, for a cross-Gram. They must be given in every call or
        in none.
        """
        if dense is not None:
            self._update_beside(inputs.detach().flatten(0, -2), dense.detach().flatten(0, -2))
        sequences = inputs.detach().reshape(-1, self.length, inputs.shape[-1]).float()  # [sequences, length, in]
        flat = sequences.flatten(0, 1)  # [tokens, in]
        self.moment.update(flat)
        add_statistics(sequences, self.sums)
        rows = flat[self.taken * self.stride - self.seen :: self.stride][: len(self.sample) - self.taken]
        self.sample[self.taken : self.taken + len(rows)] = rows
        self.taken += len(rows)
        self.seen += len(flat)
        if self.firsts_left:
            firsts = sequences[: self.firsts_left, 0].clone()
            self.first_tokens.append(firsts)
            self.firsts_left -= len(firsts)

    def _update_beside(self, inputs: Tensor, dense: Tensor) -> None:
        """inputs, dense: [tokens, in]."""
        if dense.shape != inputs.shape:
            came = f"{list(dense.shape)} and {list(inputs.shape)}"
            raise ValueError(f"A layer's inputs in the two models must have the same shape. Got {came} instead.")
        if self.beside is None:
            size, device = inputs.shape[1], inputs.device
            self.beside = CrossMoment(size, device), SecondMoment(size, device)
        both, alone = self.beside
        both.update(dense, inputs)
        alone.update(dense)

    def finish(self) -> tuple[Gram, Statistics]:
        """The means over the tokens, in float32 on the device of the inputs; the accumulated sums are freed."""
        if self.seen != self.tokens:
            raise ValueError(f"TapStatistics must see {self.tokens} tokens. Got {self.seen} instead.")
        matrix = self.moment.finish()
        mean, absmean, variance = (self.sums * (self.length / self.tokens)).float()  # means over the sequences
        firsts = torch.cat(self.first_tokens)
        known = [moment.finish() for moment in self.beside or ()]
        return Gram(matrix, self.tokens, *known), Statistics(self.length, mean, absmean, variance, self.sample, firsts)


class RoutedStatistics:
    """The same for an expert, which sees some tokens of each sequence; their number is known only at the end.

    Means are over the tokens, and a sequence's variance is weighted by its number of tokens. The result equals that of
    TapStatistics if an expert sees every token. run: [in, in] float32 scratch memory, shared by experts of one width.
    """

    def __init__(self, features: int, length: int, run: Tensor) -> None:
        self.length, self.run = length, run
        self.seen = 0
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=run.device)  # above the diagonal
        self.sums = torch.zeros(3, features, dtype=torch.float64, device=run.device)
        self.stride = 1
        self.sample = torch.zeros(0, features, dtype=torch.float32, device=run.device)  # every stride-th token

    def update(self, inputs: Tensor) -> None:
        """Add the tokens [tokens, in] that the expert sees of one sequence, of any float dtype, at least one."""
        flat = inputs.detach().float()
        for part in flat.split(RUN):
            self.run.zero_()
            add_products(self.run, part)
            add_to(self.gram, self.run)
        own = torch.zeros_like(self.sums)
        add_statistics(flat[None], own)
        self.sums += own * len(flat)
        self.sample = torch.cat([self.sample, flat[-self.seen % self.stride :: self.stride]])
        while len(self.sample) > SAMPLE_ROWS:
            self.sample, self.stride = self.sample[::2].clone(), 2 * self.stride
        self.seen += len(flat)

    def finish(self) -> tuple[Gram, Statistics]:
        """As in TapStatistics. If there are more tokens than sample rows, the sample has between half and all of its
        rows."""
        matrix = self.gram.div_(self.seen).float()
        del self.gram, self.run
        mirror(matrix)
        mean, absmean, variance = (self.sums / self.seen).float()
        return Gram(matrix, self.seen), Statistics(self.length, mean, absmean, variance, self.sample)


def add_statistics(sequences: Tensor, sums: Tensor) -> None:
    """Add mean, mean magnitude and variance of each of sequences [sequences, length, in] to sums [3, in] float64."""
    if dispatch.use_compiled(sequences):
        # One thread takes about a tenth of the product's time. A thread pool would contend with torch's waiting
        # threads.
        add_sums(array(sequences), array(sums))
    else:
        add_sums_in_torch(sequences, sums)


def add_sums_in_torch(sequences: Tensor, sums: Tensor) -> None:
    """The plain reference of `layerwise.kernels.tap_statistics.add_sums`."""
    # Per sequence in float32: cascade summation loses no digits, and it is 16 times faster than summing in float64.
    means = sequences.mean(1, keepdim=True)
    sums[0] += means.sum((0, 1), dtype=torch.float64)
    sums[1] += sequences.abs().mean(1).sum(0, dtype=torch.float64)
    # Centred before squaring, because (mean of squares) - (square of the mean) loses digits when the mean is large.
    sums[2] += (sequences - means).square_().mean(1).sum(0, dtype=torch.float64)
