"""Trials for allocators that look at the loss: the whole model with some layers compressed."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.gram_store import read_block
from layerwise.calibration.taps import tapped_linears
from layerwise.compression.probe import Probe
from layerwise.contract.allocator import Candidate, Part, Trials
from layerwise.contract.layer import Layer
from layerwise.contract.target import Target
from layerwise.evaluation.dense_states import write_dense_states
from layerwise.evaluation.divergence import DenseStates, Divergence
from layerwise.evaluation.perplexity import batch_size, to_last_block
from layerwise.models.loading import vocabulary
from layerwise.models.structure import Blocks, model_linears
from layerwise.runtime.errors import Diverged, InputError


class ModelTrials(Trials):
    """Trials of a model that is whole in memory, next to a copy of its layers.

    A layer is solved at a level when it is first requested, from the dense Grams, and its weights are stored in
    `folder`.
    """

    def __init__(
        self, blocks: Blocks, parts: Sequence[Part], grams: Path, tokens: Tensor, probe: Probe, folder: Path
    ) -> None:
        """blocks: blocks of the dense model; trials overwrite their weights. grams: store of the dense Grams. tokens:
        [windows, length] of the calibration text. folder: an empty folder for the solved weights."""
        self.seed, self._probe, self._folder = probe.solver.seed, probe, folder
        self._blocks, self._grams, self._tokens = blocks, grams, tokens
        self._block = {part.name: part.block for part in parts}
        self._order = list(self._block)
        self._linears = model_linears(blocks.model)
        self._dense = {name: own.stored().clone() for name, own in self._linears.items()}
        self._now: dict[str, Candidate | None] = dict.fromkeys(self._order)
        self._solved: set[tuple[str, Candidate]] = set()
        self._states: dict[int, DenseStates] = {}
        self._reached: dict[int, tuple[int, Sequence[Tensor]]] = {}  # windows -> a block, and what enters it if dense

    @torch.no_grad()
    def divergence(self, levels: Sequence[Candidate | None], windows: int) -> float:
        tokens = self._first(windows)
        if windows not in self._states:
            self._set([None] * len(self._order))
            record = self._folder / f"dense-{windows}.json"
            write_dense_states(self._blocks, tokens, record, {})
            self._states[windows] = DenseStates.read(record)
        if not self._succeeds(levels):
            return math.inf
        batch = batch_size(tokens.shape[1], vocabulary(self._blocks.model))
        stream = Stream(self._blocks, tokens, batch)
        divergence = Divergence(self._states[windows], stream, tokens)
        compressed = (self._block[name] for name, level in zip(self._order, levels, strict=True) if level is not None)
        for _ in to_last_block(stream, self._advance_dense(stream, windows, min(compressed, default=0))):
            pass
        for number, chunk in enumerate(tokens.split(batch)):
            divergence.add(number, chunk, stream.logits(number, chunk))
        found = divergence.result()["kl"]
        return math.inf if found is None else found

    @torch.no_grad()
    def profiles(self, levels: Sequence[Candidate | None], windows: int) -> Sequence[NDArray[np.float64]]:
        if not self._succeeds(levels):
            return [np.full(self._dense[name].shape[1], np.nan) for name in self._order]
        stream, found = Stream(self._blocks, self._first(windows)), dict[str, NDArray[np.float64]]()
        for index in range(len(self._blocks)):
            taps = stream.collect(index, advance=index + 1 < len(self._blocks))
            for _, tap, linear in tapped_linears(self._blocks.model, [(index, taps)]):
                found[linear.name] = tap.gram.diagonal.double().clamp(min=0).sqrt().cpu().numpy()
        return [found[name] for name in self._order]

    def _advance_dense(self, stream: Stream, windows: int, first: int) -> int:
        """Let the stream skip blocks before `first`, which are dense, as far as an earlier trial's states allow.

        Returns the block that the stream has reached. An allocator that compresses one layer after another needs every
        dense block once.
        """
        reached, states = self._reached.get(windows, (0, stream.inputs))
        if reached > first:
            return 0
        stream.inputs = states
        for index in range(reached, first):
            with self._blocks.open(index):
                stream.advance(index)
        self._reached[windows] = first, stream.inputs
        return first

    def _first(self, windows: int) -> Tensor:
        if windows > len(self._tokens):
            raise InputError(
                f"An allocator's windows must be at most the {len(self._tokens)} sequences of the calibration set. "
                f"Got {windows} instead."
            )
        return self._tokens[:windows]

    def _succeeds(self, levels: Sequence[Candidate | None]) -> bool:
        """Set the levels. Returns False, and stderr says so, if the probe diverges."""
        try:
            self._set(levels)
        except Diverged as error:
            print(f"A trial is left out: {error}", file=sys.stderr)
            return False
        return True

    def _set(self, levels: Sequence[Candidate | None]) -> None:
        """Set the layers' weights to those at these levels."""
        if len(levels) != len(self._order):
            raise ValueError(
                f"a trial must have {len(self._order)} levels, one for each layer. Got {len(levels)} instead"
            )
        wanted = dict(zip(self._order, levels, strict=True))
        changed = {name: level for name, level in wanted.items() if level != self._now[name]}
        self._solve({name: level for name, level in changed.items() if level is not None})
        for name, level in changed.items():
            weight = self._dense[name] if level is None else load_file(self._file(name, level))["weight"]
            self._linears[name].replace(weight)
            self._now[name] = level

    def _solve(self, levels: Mapping[str, Candidate]) -> None:
        """Solve the layers not yet solved at these levels, with the Grams of one block in memory at a time."""
        missing = defaultdict[int, set[str]](set)
        for name, level in levels.items():
            if (name, level) not in self._solved:
                missing[self._block[name]].add(name)
        for index, names in missing.items():
            for tap in read_block(self._grams, index, str(self._blocks.device)):
                for name in names.intersection(tap.layers):
                    dense = self._dense[name]
                    layer = Layer(name, dense.to(torch.float32, copy=True).contiguous(), tap.gram, tap.statistics)
                    weight = self._probe.weight(layer, levels[name])
                    save_file({"weight": weight.to(dense.dtype).cpu().contiguous()}, self._file(name, levels[name]))
                    self._solved.add((name, levels[name]))

    def _file(self, name: str, level: Candidate) -> Path:
        place = self._order.index(name)  # a number, because names may be long and experts many
        own = level.label.replace(" ", "_").replace(":", "of") if isinstance(level, Target) else float(level).hex()
        return self._folder / f"{place}-{own}.safetensors"
