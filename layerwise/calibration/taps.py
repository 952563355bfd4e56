"""Find the taps (the distinct inputs of a block's linear layers), and the Gram and statistics of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from layerwise.calibration.experts import ExpertRecorder, TapParts
from layerwise.calibration.tap_statistics import TapStatistics
from layerwise.contract.layer import Gram, Statistics
from layerwise.models.structure import Linear, few, find_blocks, linears
from layerwise.numerics.patterns import finite
from layerwise.runtime.errors import InputError


class Ended(Exception):
    """Ends a forward pass of a block when its last linear layer has seen its inputs."""


@dataclass(frozen=True)
class Tap:
    """One distinct input of a block: the layers that see it, and its calibration statistics."""

    # Last components of its layers' names, such as q_proj,k_proj,v_proj. Whole names are used if those are taken, and
    # for experts. An input shared by experts is named after their parameter, such as mlp.experts.gate_up_proj.
    name: str
    layers: tuple[str, ...]  # names in the model, in the order of their calls
    inside: tuple[str, ...]  # the same layers' names in the block
    gram: Gram
    statistics: Statistics
    scope: str = "all"  # tokens: all, routed (to an expert), or fallback (all, because too few were routed)


def tapped_linears(
    model: PreTrainedModel, blocks: Iterable[tuple[int, Iterable[Tap]]]
) -> Iterator[tuple[int, Tap, Linear]]:
    """Every linear layer of the blocks, with its block's number and its tap, in the order of their calls.

    A tap is released when its layers are done. Its Gram is freed, with everything that methods have cached on it.
    """
    name, modules = find_blocks(model)
    for index, taps in blocks:
        found = {linear.name: linear for linear in linears(modules[index], f"{name}.{index}")}
        for tap in taps:
            for layer in tap.layers:
                yield index, tap, found[layer]
            del tap


class TapRecorder:
    """Context in which every forward pass of a block updates the taps of its linear layers and of its experts.

    The first batch finds the taps: layers whose input is the same memory, not written in between, see the same input.
    Later batches reuse them. Call `end_batch` after each forward pass and `finish` at the end. Before `finish`, `again`
    says whether all forward passes must be repeated once.
    """

    def __init__(
        self,
        block: str,
        layers: Sequence[Linear],
        sequences: int,
        length: int,
        drifted: bool = False,
        only: int | None = None,
    ) -> None:
        """drifted: whether inputs may differ from the dense model's, which are recorded in passes within `of_dense`.
        only: number of the one tap that is wanted; None for all.
        """
        self.block, self.sequences, self.length, self.drifted = block, sequences, length, drifted
        self.layers = [layer for layer in layers if layer.expert is None]
        self.experts = ExpertRecorder(block, [layer for layer in layers if layer.expert is not None], sequences, length)
        self.first = True  # whether this is the first pass through the batches
        self.members: list[list[Linear]] = []  # layers of each tap, found on the first batch
        self.statistics: list[TapStatistics] = []
        self.leaders: dict[str, TapStatistics] | None = None  # first layer of each tap, once they are known
        self.only = only
        self.wanted: str | None = None  # the first layer of the one tap that is wanted, once it is known
        # The layer at whose inputs a pass may end, once it is known: the last of all, or `wanted`; None with experts.
        self.last: str | None = None
        self.ends = False  # whether the current pass ends there
        self.held: dict[tuple[Any, ...], tuple[int, Tensor]] = {}  # inputs kept alive, so that no memory is reused
        self.shows_dense = False  # whether the current pass is the dense model's
        self.copied: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # dense inputs kept alive, and copies of them
        self.dense: dict[str, Tensor] = {}  # by layer: its inputs in the dense model for the current batch
        self.calls: defaultdict[str, list[int]] = defaultdict(list)  # tokens of each call in this batch
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> TapRecorder:
        for layer in self.layers:

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: Linear = layer) -> None:
                self._see(layer, args[0] if args else kwargs["input"])

            self.handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        if self.experts.layers:
            self.experts.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.experts.layers:
            self.experts.__exit__(*error)
        for handle in self.handles:
            handle.remove()
        self.held.clear()
        self.copied.clear()

    @contextmanager
    def of_dense(self) -> Iterator[None]:
        """Context for a pass of the dense model through a batch; the compressed model's pass follows."""
        self.shows_dense = True
        try:
            yield
        finally:
            self.shows_dense = False

    @contextmanager
    def until_last(self) -> Iterator[None]:
        """Context for a pass whose output is not needed: from the second batch on it ends at the last layer wanted.

        It does not if that layer's inputs are not finite, so that the module which overflows is found.
        """
        self.ends = True
        try:
            yield
        except Ended:
            pass
        finally:
            self.ends = False

    def _see_dense(self, layer: Linear, inputs: Tensor) -> None:
        if self.wanted not in (None, layer.name):
            return
        key = identity(inputs)
        if key not in self.copied:
            self.copied[key] = inputs, inputs.detach().clone()  # the block may write into it
        self.dense[layer.name] = self.copied[key][1]

    def _see(self, layer: Linear, inputs: Tensor) -> None:
        if self.shows_dense:
            self._see_dense(layer, inputs)
        elif self.first:
            self._add(layer, inputs)
        if self.ends and layer.name == self.last and finite(inputs):
            raise Ended

    def _add(self, layer: Linear, inputs: Tensor) -> None:
        features = inputs.shape[-1]
        tokens = inputs.numel() // features
        self.calls[layer.name].append(tokens)
        if tokens == 0 or tokens % self.length:  # not whole sequences: end_batch refuses them
            return
        if self.leaders is not None:
            if layer.name in self.leaders and self.wanted in (None, layer.name):
                self.leaders[layer.name].update(inputs, self.dense.get(layer.name))
            return
        key = identity(inputs)
        if key not in self.held:
            self.held[key] = (len(self.members), inputs)
            self.members.append([])
            self.statistics.append(TapStatistics(features, self.sequences, self.length, inputs.device))
            self.statistics[-1].update(inputs, self.dense.get(layer.name))
        self.members[self.held[key][0]].append(layer)

    def end_batch(self, sequences: int) -> None:
        """Check the batch. Raises InputError when a layer did not see each of its tokens exactly once."""
        self.experts.end_batch()
        tokens = sequences * self.length
        wrong = [layer.name for layer in self.layers if self.calls[layer.name] not in ([], [tokens])]
        if wrong:
            seen = " + ".join(map(str, self.calls[sorted(wrong)[0]]))
            raise InputError(
                "Every linear layer of a block must see every token once, unless it is an expert's in transformers' "
                f"layout. Got {seen} of the {tokens} tokens of a batch in {few(wrong)} instead."
            )
        uncalled = [layer.name for layer in self.layers if not self.calls[layer.name]]
        if uncalled and self.wanted is None:  # otherwise the pass may have ended before them
            raise InputError(
                f"Models of this family are not supported: {few(uncalled)} {'were' if len(uncalled) > 1 else 'was'} "
                "never called as a module (the weight is used directly, if at all), so that its inputs cannot be seen."
            )
        if self.leaders is None:
            taps = zip(self.members, self.statistics, strict=True)
            self.leaders = {members[0].name: statistics for members, statistics in taps}
            self.last = None if self.experts.layers else next(reversed(self.calls), None)
            if self.only is not None:
                self.last = self.wanted = list(self.leaders)[self.only]
        self.calls.clear()
        self.held.clear()
        self.copied.clear()
        self.dense.clear()

    def again(self) -> bool:
        """Whether some experts were routed so few tokens that they must see all tokens in a second pass."""
        self.first = False
        return self.experts.all_tokens()

    def finish(self) -> list[Tap]:
        """The block's taps in the order of their inputs, then its experts' taps. Raises InputError for one that is not
        finite."""
        taps = []
        for name, scope, members, accumulated in chain(self._ordinary(), self.experts.found()):
            gram, statistics = accumulated.finish()
            if self.drifted and not gram.apart:
                gram = Gram(gram.matrix, gram.tokens, drifted=True)
            layers = tuple(layer.name for layer in members)
            matrices = [gram.matrix, *((gram.cross, gram.dense) if gram.apart else ())]
            if not all(torch.isfinite(matrix).all() for matrix in matrices):
                raise InputError(
                    f"The activations of {self.block}, tap {name}, are not finite: the inputs of "
                    f"{', '.join(layers)} have NaN, Inf or squares beyond float32."
                )
            taps.append(Tap(name, layers, tuple(layer.inside for layer in members), gram, statistics, scope))
        return taps

    def _ordinary(self) -> Iterator[TapParts]:
        """The taps of layers that are not experts, in the order of their inputs."""
        found = list(zip(tap_names(self.members), self.members, self.statistics, strict=True))
        for name, members, statistics in found if self.only is None else [found[self.only]]:
            yield name, "all", members, statistics


def identity(inputs: Tensor) -> tuple[Any, ...]:
    """The identity of a tensor [..., in]: equal for two only if they are the same memory, while both are alive."""
    flat = inputs.flatten(0, -2)  # some blocks flatten [sequences, length, in] for some of their layers
    strides = flat.stride() if flat.data_ptr() == inputs.data_ptr() else inputs.stride()  # flatten may have copied
    memory = (inputs.untyped_storage().data_ptr(), inputs.storage_offset(), inputs.dtype)
    return (*memory, tuple(flat.shape), strides, inputs._version)


def tap_names(members: Sequence[Sequence[Linear]]) -> list[str]:
    """Last name components joined by commas; names inside the block if two taps would get the same name."""
    short = [",".join(layer.inside.rpartition(".")[2] for layer in tap) for tap in members]
    whole = [",".join(layer.inside for layer in tap) for tap in members]
    return [w if short.count(s) > 1 else s for s, w in zip(short, whole, strict=True)]
