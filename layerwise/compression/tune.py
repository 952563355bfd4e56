"""Tuning stages after any method: kept weights and grids are trained by gradients, masks are fixed.

blocks: GQSA's BQPO (Zeng et al.). It trains kept weights, scales and zeros block by block, to match the block's output
in the dense model. end: GQSA's E2E-OQP. It trains the scales and zeros of all blocks at once, with fixed codes, on the
language-modelling loss of the calibration tokens. The result is exact: it is on the pattern, and its codes, scales and
zeros give the weight.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.taps import Tap
from layerwise.contract.layer import Compressed, Layer, Quantised, Target
from layerwise.models.structure import Linear, find_blocks, linears
from layerwise.numerics import ops
from layerwise.runtime.errors import Diverged

Solve = Callable[[Layer], tuple[Compressed, dict[str, Any]]]


def round_straight_through(values: Tensor) -> Tensor:
    """Rounded half to even; the gradient passes straight through."""
    return values + (torch.round(values) - values).detach()


class TunableGrid:
    """The codes, scales and zeros of a compressed layer during training. frozen: the codes are fixed.

    It adds its trainable tensors, `stretch` of the scales and `shift` of the zeros, to `trained`.
    """

    def __init__(
        self, quantised: Quantised, target: Target, bits: int, trained: dict[str, Tensor], frozen: bool
    ) -> None:
        self.quantised, self.bits, self.trained, self.frozen = quantised, bits, trained, frozen
        self.group_of = ops.grouping(quantised, target)
        trained["stretch"] = torch.zeros_like(quantised.scales, requires_grad=True)
        if not target.symmetric:
            trained["shift"] = torch.zeros_like(quantised.zeros, requires_grad=True)

    def keeps_codes_of(self, dense: Tensor) -> Tensor:
        """[out, in] bool: True where the code is that of the dense weight [out, in] rounded to this grid."""
        quantised = self.quantised
        grid = ops.Grid(quantised.scales, quantised.zeros, self.bits)
        return grid.codes(self._scaled(dense), self.group_of) == quantised.codes

    def parts(self, weight: Tensor) -> tuple[Tensor, Quantised]:
        """The value [out, in] of a weight [out, in] on the current grid, and the codes, scales and zeros in float32."""
        quantised, most = self.quantised, 2**self.bits - 1
        scales = quantised.scales * self.trained["stretch"].exp()
        zeros = quantised.zeros
        if "shift" in self.trained:
            zeros = round_straight_through(zeros + most * self.trained["shift"]).clamp(0, most)
        scale, zero = scales[:, self.group_of], zeros[:, self.group_of]
        codes = quantised.codes.float()
        if not self.frozen:
            codes = (round_straight_through(self._scaled(weight) / scale) + zero).clamp(0, most)
        weight = scale * (codes - zero)
        weight = weight if quantised.input_scale is None else weight / quantised.input_scale
        return weight, replace(quantised, codes=codes, scales=scales, zeros=zeros)

    def _scaled(self, weight: Tensor) -> Tensor:
        return weight if self.quantised.input_scale is None else weight * self.quantised.input_scale


class Tunable:
    """A compressed layer with trainable kept weights (unless frozen), scales and zeros; the mask is fixed.

    The trainable tensors start at zero and have no unit, so that one learning rate fits all layers: weights move by
    multiples of the kept weights' root mean square, scales by powers of e, zeros by multiples of the number of codes.
    Zeros remain codes, and the zeros of a symmetric grid do not move, so that nothing takes more bits than before.
    """

    def __init__(self, result: Compressed, target: Target, dense: Tensor | None) -> None:
        """dense: [out, in] the weight passed to the method; None freezes the codes.

        A weight whose code is its own rounding starts from its exact value, not from the centre of its step.
        """
        self.result, self.target = result, target
        self.start, self.trained = result.weight, {}
        self.grid = None
        if target.bits is not None and result.quantised is not None:
            self.grid = TunableGrid(result.quantised, target, target.bits, self.trained, frozen=dense is None)
        if dense is not None:
            self.trained["moved"] = torch.zeros_like(dense, requires_grad=True)
            kept = result.weight if result.mask is None else result.weight[result.mask]
            self.unit = float(kept.double().square().mean().sqrt()) if kept.numel() else 0.0
            if self.grid is not None:
                self.start = torch.where(self.grid.keeps_codes_of(dense), dense, self.start)

    def parts(self) -> tuple[Tensor, Quantised | None]:
        """The weight [out, in] float32, and the current codes (as float32), scales and zeros."""
        weight, quantised = self.start, None
        if "moved" in self.trained:
            weight = weight + self.unit * self.trained["moved"]
        if self.grid is not None:
            weight, quantised = self.grid.parts(weight)
        return weight if self.result.mask is None else torch.where(self.result.mask, weight, 0.0), quantised

    @torch.no_grad()
    def compressed(self) -> Compressed:
        """The method's result with the current weight, codes, scales and zeros."""
        weight, quantised = self.parts()
        if quantised is None:
            return replace(self.result, weight=weight)
        codes = quantised.codes
        if self.result.mask is not None:  # the code of a pruned weight is the one that represents zero
            codes = torch.where(self.result.mask, codes, quantised.zeros[:, ops.grouping(quantised, self.target)])
        return replace(self.result, weight=weight, quantised=replace(quantised, codes=codes.to(torch.uint8)))


def descend(
    tunables: Iterable[Tunable],
    loss: Callable[[int], Tensor],
    batches: int,
    settings: Mapping[str, Any],
    generator: torch.Generator,
) -> tuple[float, float]:
    """Run AdamW on the tunables; leave them in their best state among the start and the ends of all epochs.

    loss: the loss of a batch, numbered from 0 to `batches` - 1. settings: `epochs` and the learning rates `weights` and
    `grid`, which fall linearly to zero. Returns the mean loss over the batches before and after. Raises Diverged if the
    loss before is not finite.
    """
    trained = [(name, tensor) for tunable in tunables for name, tensor in tunable.trained.items()]
    rates = {"moved": settings.get("weights"), "stretch": settings["grid"], "shift": settings["grid"]}
    groups = [{"params": [tensor], "lr": rates[name]} for name, tensor in trained]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    steps = settings["epochs"] * batches
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)

    @torch.no_grad()
    def mean() -> float:
        return sum(float(loss(batch)) for batch in range(batches)) / batches

    first = least = mean()
    if not math.isfinite(first):  # no epoch could be compared with this
        raise Diverged(f"Tuning cannot begin: the loss of the compressed layers is {first}.")
    best = [tensor.detach().clone() for _, tensor in trained]
    for _ in range(settings["epochs"]):
        for batch in torch.randperm(batches, generator=generator).tolist():
            optimiser.zero_grad()
            loss(batch).backward()
            optimiser.step()
            schedule.step()
        now = mean()
        if now < least:
            least, best = now, [tensor.detach().clone() for _, tensor in trained]
    with torch.no_grad():
        for (_, tensor), value in zip(trained, best, strict=True):
            tensor.copy_(value)
    return first, least


def weights(layers: Mapping[str, tuple[Linear, Tunable]]) -> dict[str, Tensor]:
    """Parameter name -> the weight, or all experts' weights, as the module stores it. layers: keyed by layer name."""
    found: dict[str, Tensor] = {}
    experts: defaultdict[str, list[Tensor]] = defaultdict(list)
    for name, (linear, tunable) in layers.items():
        weight = linear.as_stored(tunable.parts()[0])
        weight = weight.T if linear.transposed else weight
        if linear.expert is None:
            found[linear.stored_in(name)] = weight
        else:
            experts[linear.stored_in(name)].append(weight)
    return found | {name: torch.stack(own) for name, own in experts.items()}


@dataclass
class Tuner:
    """The stages of one cell.

        for _ in visit(model, tuner.walk(blocks, stream), tuner.keep(solve), ...):
            pass
        tuner.end()
        tuner.results   # layer -> its current result, and its row of numbers before tuning

    stages: {"blocks": settings, "end": settings} or one of them (config/README.md). seed: seed of the order of the
    batches.
    history: a record of each stage and block with the loss before and after.
    """

    model: PreTrainedModel
    tokens: Tensor  # [sequences, length]
    stages: Mapping[str, Mapping[str, Any]]
    target: Target
    seed: int

    def __post_init__(self) -> None:
        self.results: dict[str, tuple[Compressed, dict[str, Any]]] = {}
        self.history: list[dict[str, Any]] = []
        self.given: dict[str, Tensor] = {}  # weights of the current block, if they are needed

    def keep(self, solve: Solve) -> Solve:
        """The solver, wrapped so that its results are recorded."""

        def solved(layer: Layer) -> tuple[Compressed, dict[str, Any]]:
            if "blocks" in self.stages:
                self.given[layer.name] = layer.weight
            self.results[layer.name] = solve(layer)
            return self.results[layer.name]

        return solved

    def walk(
        self, blocks: Iterable[tuple[int, Iterable[Tap]]], stream: Stream | None
    ) -> Iterator[tuple[int, Iterable[Tap]]]:
        """The blocks, each tuned once its layers are solved.

        stream: supplies the blocks' inputs in sequential mode. Without it they get the dense model's activations. In
        either mode a block is tuned to give its output in the dense model.
        """
        if "blocks" not in self.stages:
            yield from blocks
            return
        size = self.stages["blocks"]["batch"]
        dense = Stream(self.model, self.tokens, sequences_per_batch=size)
        for index, taps in blocks:
            inputs: Sequence[Tensor] = () if stream else dense.inputs  # memory for one copy less
            dense.advance(index)
            yield index, taps
            if stream:
                inputs = gathered(stream.inputs, len(self.tokens), dense.inputs[0].dtype).split(size)
            self._tune_block(dense, index, inputs)
            self.given.clear()

    def _tune_block(self, dense: Stream, index: int, inputs: Sequence[Tensor]) -> None:
        """Run BQPO on a block whose layers are solved. dense.inputs: the outputs it should give."""
        block = dense.blocks[index]
        layers = {
            linear.inside: (linear, Tunable(self.results[linear.name][0], self.target, self.given[linear.name]))
            for linear in linears(block, f"{dense.name}.{index}")
        }

        total = sum(float(wanted.double().square().sum()) for wanted in dense.inputs) / len(inputs) or 1.0

        def loss(batch: int) -> Tensor:
            """Squared error of the output, scaled so that the mean over the batches is relative to the output."""
            wanted = dense.inputs[batch].to(dense.device).float()
            came = dense.replay(substituted(block, weights(layers)), index, batch, inputs[batch]).float()
            return (came - wanted).square().sum() / total

        self._stage("blocks", layers, loss, len(inputs), index)

    def end(self) -> None:
        """Run E2E-OQP on the whole model, whose weights are those of the results."""
        if "end" not in self.stages:
            return
        prefix, blocks = find_blocks(self.model)
        layers = {
            linear.name: (linear, Tunable(self.results[linear.name][0], self.target, None))
            for index, block in enumerate(blocks)
            for linear in linears(block, f"{prefix}.{index}")
        }
        batches = self.tokens.to(next(self.model.parameters()).device).split(self.stages["end"]["batch"])

        def loss(batch: int) -> Tensor:
            """Mean negative log likelihood of the next token."""
            model = substituted(self.model, weights(layers))
            logits = model(input_ids=batches[batch], use_cache=False).logits  # [sequences, length, vocabulary]
            return cross_entropy(logits[:, :-1].flatten(0, 1).float(), batches[batch][:, 1:].flatten())

        self._stage("end", layers, loss, len(batches), None)

    def _stage(
        self,
        stage: str,
        layers: Mapping[str, tuple[Linear, Tunable]],
        loss: Callable[[int], Tensor],
        batches: int,
        block: int | None,
    ) -> None:
        """Train the layers, and write them to the results and the model."""
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed)
        before, after = descend((own for _, own in layers.values()), loss, batches, self.stages[stage], generator)
        for linear, tunable in layers.values():
            result = tunable.compressed()
            self.results[linear.name] = (result, self.results[linear.name][1])
            linear.replace(result.weight)
        seconds = time.perf_counter() - began
        self.history.append({"stage": stage, "block": block, "before": before, "after": after, "seconds": seconds})
        what = stage if block is None else f"block {block}"
        tqdm.write(f"{what}: loss {before:.4g}, {after:.4g} after tuning", file=sys.stderr)


def gathered(batches: Sequence[Tensor], sequences: int, dtype: torch.dtype) -> Tensor:
    """All batches in one tensor [sequences, length, hidden] of a dtype; at most one batch is in memory beside it."""
    whole = torch.empty(sequences, *batches[0].shape[1:], dtype=dtype, device=batches[0].device)
    start = 0
    for batch in batches:
        whole[start : start + len(batch)] = batch
        start += len(batch)
    return whole


def substituted(module: nn.Module, parameters: dict[str, Tensor]) -> Callable[..., Any]:
    """The module's call with other parameters."""
    return lambda *args, **kwargs: functional_call(module, parameters, args, kwargs)
