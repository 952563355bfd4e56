"""Taps, the distinct inputs of a block's linear layers: finding them, and the Gram and statistics of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kernels.rows import array
from kernels.sums import add_sums
from methods import paths
from methods.base import Gram, Statistics
from workflow.scripts.models import Linear, few, find_blocks, linears
from workflow.scripts.runtime import InputError

SAMPLE_ROWS = 512
RUN = 4096  # tokens whose products are summed in float32
NARROW_PANEL, WIDEST_PANEL, NARROW_BELOW = 128, 256, 2048  # of a symmetric product, and the inputs that ask for each


@dataclass(frozen=True)
class Tap:
    """One distinct input of a block: the layers that see it, and what calibration says of it."""

    name: str  # last components of its layers' names, such as q_proj,k_proj,v_proj; whole names if those are taken
    layers: tuple[str, ...]  # names in the model, in the order of their calls
    inside: tuple[str, ...]  # the same layers' names in the block
    gram: Gram
    statistics: Statistics


def tapped_linears(
    model: PreTrainedModel, blocks: Iterable[tuple[int, Iterable[Tap]]]
) -> Iterator[tuple[int, Tap, Linear]]:
    """Every linear layer of the blocks, with its block's number and its tap, in the order of their calls.

    A tap is let go of when its layers are done: with its Gram goes what methods have kept on it.
    """
    name, modules = find_blocks(model)
    for index, taps in blocks:
        found = {linear.name: linear for linear in linears(modules[index], f"{name}.{index}")}
        for tap in taps:
            for layer in tap.layers:
                yield index, tap, found[layer]
            del tap


class TapStatistics:
    """Accumulates the Gram and statistics of one tap, independently of how the sequences are batched.

    Products are float32 over at most RUN tokens, means float32 within a sequence; totals are float64.
    """

    def __init__(self, features: int, sequences: int, length: int, device: torch.device | str = "cpu") -> None:
        self.tokens, self.length = sequences * length, length
        count = min(SAMPLE_ROWS, self.tokens)
        self.stride, self.taken = max(1, self.tokens // SAMPLE_ROWS), 0  # of the sample's rows
        self.seen = 0
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)  # above the diagonal
        self.run = torch.zeros(features, features, dtype=torch.float32, device=device)  # what it lacks as yet
        self.in_run = 0  # tokens
        self.sums = torch.zeros(3, features, dtype=torch.float64, device=device)  # mean, absmean, variance
        self.sample = torch.zeros(count, features, dtype=torch.float32, device=device)

    def update(self, inputs: Tensor) -> None:
        """Add whole sequences: inputs [..., in] of any float dtype, tokens of a sequence one after the other."""
        sequences = inputs.detach().reshape(-1, self.length, inputs.shape[-1]).float()  # [sequences, length, in]
        flat = sequences.flatten(0, 1)  # [tokens, in]
        for part in flat.split(RUN):
            if self.in_run + len(part) > RUN:
                self._end_run()
            add_products(self.run, part)
            self.in_run += len(part)
        if paths.compiled(sequences):
            # In one thread, for some tenth of the product's time: a pool's would contend with torch's waiting ones.
            add_sums(array(sequences), array(self.sums))
        else:
            add_sums_in_torch(sequences, self.sums)
        rows = flat[self.taken * self.stride - self.seen :: self.stride][: len(self.sample) - self.taken]
        self.sample[self.taken : self.taken + len(rows)] = rows
        self.taken += len(rows)
        self.seen += len(flat)

    def _end_run(self) -> None:
        self.gram += self.run
        self.run.zero_()
        self.in_run = 0

    def finish(self) -> tuple[Gram, Statistics]:
        """The means over the tokens, in float32 on the device of the inputs; the accumulated sums are given up."""
        if self.seen != self.tokens:
            raise ValueError(f"TapStatistics awaited {self.tokens} tokens. Got {self.seen} instead.")
        self._end_run()
        matrix = self.run.copy_(self.gram.div_(self.tokens))
        del self.gram, self.run
        for start in range(0, len(matrix), WIDEST_PANEL):  # what lies below the diagonal is what lies above
            panel = matrix[start:, start : start + WIDEST_PANEL]
            upper = matrix[start : start + WIDEST_PANEL, start:]
            corner = upper[:, : len(upper)].triu()
            upper[:, : len(upper)] = corner + corner.triu(1).T
            panel.copy_(upper.T.clone())
        mean, absmean, variance = (self.sums * (self.length / self.tokens)).float()  # means over the sequences
        return Gram(matrix, self.tokens), Statistics(self.length, mean, absmean, variance, self.sample)


def add_products(total: Tensor, x: Tensor) -> None:
    """Add Xt X of x [tokens, in] to total [in, in], of which what lies below its diagonal is left undefined.

    Panel by panel from the diagonal on: half the work of the whole product, and what the panels have too much.
    """
    inputs = x.shape[1]
    width = NARROW_PANEL if inputs < NARROW_BELOW and x.device.type == "cpu" else WIDEST_PANEL
    for start in range(0, inputs, width):
        total[start : start + width, start:].addmm_(x[:, start : start + width].T, x[:, start:])


def add_sums_in_torch(sequences: Tensor, sums: Tensor) -> None:
    """The plain reference of `kernels.sums.add_sums`."""
    # Per sequence in float32, where cascade summation loses no digits, 16 times faster than summing in float64.
    means = sequences.mean(1, keepdim=True)
    sums[0] += means.sum((0, 1), dtype=torch.float64)
    sums[1] += sequences.abs().mean(1).sum(0, dtype=torch.float64)
    # Centred before squaring: the mean of squares less the square of the mean loses digits to a large mean.
    sums[2] += (sequences - means).square_().mean(1).sum(0, dtype=torch.float64)


class TapRecorder:
    """Context in which every forward pass of a block feeds the taps of its linear layers.

    The first batch finds the taps: layers that are given the same memory, not written to in between, see the same
    input. Later batches follow them. Call `end_batch` after each forward pass and `finish` after the last.
    """

    def __init__(self, block: str, layers: Sequence[Linear], sequences: int, length: int) -> None:
        self.block, self.layers, self.sequences, self.length = block, layers, sequences, length
        self.members: list[list[Linear]] = []  # of each tap, found on the first batch
        self.statistics: list[TapStatistics] = []
        self.leaders: dict[str, TapStatistics] | None = None  # first layer of each tap, once they are known
        self.held: dict[tuple[Any, ...], tuple[int, Tensor]] = {}  # inputs kept alive, so that no memory is reused
        self.calls: defaultdict[str, list[int]] = defaultdict(list)  # tokens of each call in this batch
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> TapRecorder:
        for layer in self.layers:

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: Linear = layer) -> None:
                self._see(layer, args[0] if args else kwargs["input"])

            self.handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.held.clear()

    def _see(self, layer: Linear, inputs: Tensor) -> None:
        features = inputs.shape[-1]
        tokens = inputs.numel() // features
        self.calls[layer.name].append(tokens)
        if tokens == 0 or tokens % self.length:  # no whole sequences: end_batch refuses them
            return
        if self.leaders is not None:
            if layer.name in self.leaders:
                self.leaders[layer.name].update(inputs)
            return
        key = identity(inputs)
        if key not in self.held:
            self.held[key] = (len(self.members), inputs)
            self.members.append([])
            self.statistics.append(TapStatistics(features, self.sequences, self.length, inputs.device))
            self.statistics[-1].update(inputs)
        self.members[self.held[key][0]].append(layer)

    def end_batch(self, sequences: int) -> None:
        """Check the batch. Raises InputError when a layer did not see each of its tokens exactly once."""
        tokens = sequences * self.length
        wrong = [layer.name for layer in self.layers if self.calls[layer.name] != [tokens]]
        if wrong:
            seen = " + ".join(map(str, self.calls[sorted(wrong)[0]])) or "none"
            raise InputError(
                "Every linear layer of a block must see every token once, which layers of a mixture of experts do "
                f"not, but {few(wrong)} saw {seen} of the {tokens} tokens of a batch."
            )
        if self.leaders is None:
            taps = zip(self.members, self.statistics, strict=True)
            self.leaders = {members[0].name: statistics for members, statistics in taps}
        self.calls.clear()
        self.held.clear()

    def finish(self) -> list[Tap]:
        """The block's taps in the order of their inputs. Raises InputError naming a tap that is not finite."""
        taps = []
        for name, members, accumulated in zip(tap_names(self.members), self.members, self.statistics, strict=True):
            gram, statistics = accumulated.finish()
            layers = tuple(layer.name for layer in members)
            if not torch.isfinite(gram.matrix).all():
                raise InputError(
                    f"The activations of {self.block}, tap {name}, are not finite: the inputs of "
                    f"{', '.join(layers)} have NaN, Inf or squares beyond float32."
                )
            taps.append(Tap(name, layers, tuple(layer.inside for layer in members), gram, statistics))
        return taps


def identity(inputs: Tensor) -> tuple[Any, ...]:
    """What two tensors [..., in] share only if they are the same values in the same memory, while both are alive."""
    flat = inputs.flatten(0, -2)  # some blocks flatten [sequences, length, in] for a part of their layers
    strides = flat.stride() if flat.data_ptr() == inputs.data_ptr() else inputs.stride()  # flatten may have copied
    memory = (inputs.untyped_storage().data_ptr(), inputs.storage_offset(), inputs.dtype)
    return (*memory, tuple(flat.shape), strides, inputs._version)


def tap_names(members: Sequence[Sequence[Linear]]) -> list[str]:
    """Last name components joined by commas; names inside the block where two taps would be called the same."""
    short = [",".join(layer.inside.rpartition(".")[2] for layer in tap) for tap in members]
    whole = [",".join(layer.inside for layer in tap) for tap in members]
    return [w if short.count(s) > 1 else s for s, w in zip(short, whole, strict=True)]
