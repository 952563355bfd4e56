"""Tuning stages after a method, for whatever it returned: kept weights and grids trained by gradients, masks fixed.

blocks: GQSA's BQPO (Zeng et al.), block by block: kept weights, scales and zeros, so that the block's output is that of
the dense model. end: its E2E-OQP, all blocks at once: scales and zeros, codes fixed, by the language-modelling loss on
the calibration tokens. What comes out is exact: on the pattern, and codes, scales and zeros give the weight.
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
from layerwise.contract.layer import Compressed, Layer, Target
from layerwise.models.structure import Linear, find_blocks, linears
from layerwise.numerics import ops
from layerwise.runtime.errors import Diverged

Solve = Callable[[Layer], tuple[Compressed, dict[str, Any]]]


def rounded(values: Tensor) -> Tensor:
    """Rounded half to even; the gradient passes straight through."""
    return values + (torch.round(values) - values).detach()


class Tunable:
    """A compressed layer with trainable kept weights (unless frozen), scales and zeros; the mask stays.

    What is trained starts at zero and has no unit, so that one learning rate fits all layers: weights move by multiples
    of the kept weights' root mean square, scales by powers of e, zeros by multiples of the number of codes. Zeros stay
    codes themselves and those of a symmetric grid do not move, so that nothing takes more bits than before.
    """

    def __init__(self, result: Compressed, target: Target, dense: Tensor | None) -> None:
        """dense: [out, in] what the method was given; None freezes the codes.

        A weight whose code is its own rounding starts from itself and not from the middle of its step.
        """
        self.result, self.target = result, target
        self.start, self.trained = result.weight, {}
        if target.bits is not None:
            assert result.codes is not None and result.scales is not None and result.zeros is not None
            default = ops.groups_of(result.weight.shape[1], target.group, result.weight.device)
            self.group_of = default if result.group_of is None else result.group_of
            self.input_scale = 1.0 if result.input_scale is None else result.input_scale
            self.most = 2**target.bits - 1
            self.trained["stretch"] = torch.zeros_like(result.scales, requires_grad=True)
            if not target.symmetric:
                self.trained["shift"] = torch.zeros_like(result.zeros, requires_grad=True)
        self.codes = result.codes if dense is None else None
        if dense is not None:
            self.trained["moved"] = torch.zeros_like(dense, requires_grad=True)
            kept = result.weight if result.mask is None else result.weight[result.mask]
            self.unit = float(kept.double().square().mean().sqrt()) if kept.numel() else 0.0
            if target.bits is not None:
                own = ops.Grid(result.scales, result.zeros, target.bits).codes(dense * self.input_scale, self.group_of)
                self.start = torch.where(own == result.codes, dense, self.start)

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(weight [out, in] float32, codes as float32, scales, zeros) as they stand now."""
        weight, result = self.start, self.result
        if "moved" in self.trained:
            weight = weight + self.unit * self.trained["moved"]
        codes = scales = zeros = None
        if self.target.bits is not None:
            scales = result.scales * self.trained["stretch"].exp()
            zeros = result.zeros
            if "shift" in self.trained:
                zeros = rounded(zeros + self.most * self.trained["shift"]).clamp(0, self.most)
            scale, zero = scales[:, self.group_of], zeros[:, self.group_of]
            if self.codes is None:
                codes = (rounded(weight * self.input_scale / scale) + zero).clamp(0, self.most)
            else:
                codes = self.codes.float()
            weight = scale * (codes - zero)
            weight = weight if result.input_scale is None else weight / result.input_scale
        return weight if result.mask is None else torch.where(result.mask, weight, 0.0), codes, scales, zeros

    @torch.no_grad()
    def compressed(self) -> Compressed:
        """What the method returned with the weight, codes, scales and zeros of now."""
        weight, codes, scales, zeros = self.parts()
        if codes is None or zeros is None:
            return replace(self.result, weight=weight)
        if self.result.mask is not None:  # the code of a pruned weight is the one that stands for zero
            codes = torch.where(self.result.mask, codes, zeros[:, self.group_of])
        return replace(self.result, weight=weight, codes=codes.to(torch.uint8), scales=scales, zeros=zeros)


def descend(
    tunables: Iterable[Tunable],
    loss: Callable[[int], Tensor],
    batches: int,
    settings: Mapping[str, Any],
    generator: torch.Generator,
) -> tuple[float, float]:
    """AdamW on what the tunables train; leaves them at the best of the start and the ends of all epochs.

    loss: of batch 0 to `batches`. settings: `epochs` and the learning rates `weights` and `grid`, which fall
    linearly to zero. Returns the mean loss over the batches before and after. Raises Diverged where it is not finite
    before.
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
    if not math.isfinite(first):  # no epoch could be told to be better
        raise Diverged(f"Tuning cannot begin: the loss of what was compressed is {first}.")
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
    """Parameter name -> the weight, or all experts' weights, as its module stores it; layers: by the layer's name."""
    found: dict[str, Tensor] = {}
    experts: defaultdict[str, list[Tensor]] = defaultdict(list)
    for name, (linear, tunable) in layers.items():
        weight = tunable.parts()[0].to(linear.module.get_parameter(linear.parameter).dtype)
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
        tuner.results   # layer -> what it is now, and its row of numbers from before

    stages: {"blocks": settings, "end": settings} or one of them (config/README.md). seed: of the order of the batches.
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
        self.given: dict[str, Tensor] = {}  # weights of the present block, where they are needed

    def keep(self, solve: Solve) -> Solve:
        """The solver, whose results are kept."""

        def solved(layer: Layer) -> tuple[Compressed, dict[str, Any]]:
            if "blocks" in self.stages:
                self.given[layer.name] = layer.weight
            self.results[layer.name] = solve(layer)
            return self.results[layer.name]

        return solved

    def walk(
        self, blocks: Iterable[tuple[int, Iterable[Tap]]], stream: Stream | None
    ) -> Iterator[tuple[int, Iterable[Tap]]]:
        """The blocks, each tuned when its layers have been solved.

        stream: what the blocks get in sequential mode; without it they get the dense model's activations. In either
        mode a block is to give what it gives in the dense model.
        """
        if "blocks" not in self.stages:
            yield from blocks
            return
        size = self.stages["blocks"]["batch"]
        dense = Stream(self.model, self.tokens, sequences_per_batch=size)
        for index, taps in blocks:
            inputs = dense.inputs
            dense.advance(index)
            yield index, taps
            if stream:  # which may pass through a model in another dtype
                inputs = torch.cat(stream.inputs).to(inputs[0].dtype).split(size)
            self._tune_block(dense, index, inputs)
            self.given.clear()

    def _tune_block(self, dense: Stream, index: int, inputs: Sequence[Tensor]) -> None:
        """BQPO on a block whose layers are solved; dense.inputs: what it should give."""
        block = dense.blocks[index]
        layers = {
            linear.inside: (linear, Tunable(self.results[linear.name][0], self.target, self.given[linear.name]))
            for linear in linears(block, f"{dense.name}.{index}")
        }

        total = sum(float(wanted.double().square().sum()) for wanted in dense.inputs) / len(inputs) or 1.0

        def loss(batch: int) -> Tensor:
            """Squared error of the output; the mean over the batches is relative to the output."""
            wanted = dense.inputs[batch].to(dense.device).float()
            came = dense.replay(substituted(block, weights(layers)), index, batch, inputs[batch]).float()
            return (came - wanted).square().sum() / total

        self._stage("blocks", layers, loss, len(inputs), index)

    def end(self) -> None:
        """E2E-OQP on the whole model, whose weights are those of the results."""
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
        """Train the layers, and write them into results and model."""
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
        tqdm.write(f"{what}: loss {before:.4g}, {after:.4g} once tuned", file=sys.stderr)


def substituted(module: nn.Module, parameters: dict[str, Tensor]) -> Callable[..., Any]:
    """The module with other parameters."""
    return lambda *args, **kwargs: functional_call(module, parameters, args, kwargs)
