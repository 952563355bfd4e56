"""Calibration tokens through a model block by block, whatever its architecture passes to its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from workflow.scripts.models import check_tokens, find_blocks, linears
from workflow.scripts.runtime import InputError
from workflow.scripts.taps import Tap, TapRecorder

SEQUENCES_PER_BATCH = 8
TOKENS_PER_BATCH = 4096
HIDDEN = "hidden_states"


class _Stop(Exception):
    """Ends a forward pass at the last block of interest."""


@dataclass(frozen=True)
class Call:
    """What a block is called with besides its hidden states, replayed unchanged."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool  # hidden states came as a keyword, else as the first positional argument

    def replay(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Output hidden states of the block."""
        output = (
            block(*self.args, **{**self.kwargs, HIDDEN: hidden})
            if self.keyword
            else block(hidden, *self.args, **self.kwargs)
        )
        return output if isinstance(output, Tensor) else output[0]


def without_cache(value: Any) -> Any:
    """A cache would grow with every replay and let tokens attend to earlier batches."""
    return None if isinstance(value, Cache) else value


def same(first: Any, second: Any) -> bool:
    """Equality of what blocks are called with, down to the values of the tensors."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or (first.dtype == second.dtype and torch.equal(first, second))
    if type(first) is not type(second):
        return False
    if isinstance(first, Call):
        return same((first.args, first.kwargs), (second.args, second.kwargs))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(same, first, second))
    return first is second or bool(first == second)


def capture(model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor) -> tuple[Tensor, list[Call]]:
    """Run the model on tokens [sequences, length] up to the last of `blocks`, which need not be all of its blocks.

    Returns the hidden states that enter the first block and the call of each. Raises InputError when the model does
    not call every block once with a tensor of hidden states.
    """
    calls: dict[int, Call] = {}
    hidden: list[Tensor] = []

    def hook(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keyword = not args
        states = kwargs.get(HIDDEN) if keyword else args[0]
        if not isinstance(states, Tensor) or index in calls:
            raise InputError(f"{type(model).__name__} does not call each block once with its {HIDDEN}.")
        rest = {key: without_cache(value) for key, value in kwargs.items() if not (keyword and key == HIDDEN)}
        calls[index] = Call(tuple(map(without_cache, args[1:])), rest, keyword)
        if index == 0:
            hidden.append(states.clone())  # the block may write into it
        if index == len(blocks) - 1:
            raise _Stop

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: hook(index, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        with suppress(_Stop):
            model(input_ids=tokens, use_cache=False)
    if sorted(calls) != list(range(len(blocks))):
        raise InputError(f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks.")
    return hidden[0], [calls[index] for index in range(len(blocks))]


class Stream:
    """Calibration sequences on their way through a model, from one block to the next.

        for index in range(len(stream.blocks)):
            taps, outputs = stream.collect(index)
            stream.advance(index, outputs)    # shared statistics: one forward pass per model
            # or: replace the weights of stream.blocks[index], then stream.advance(index) for sequential ones

    name, blocks: the model's list of blocks. inputs: per batch, the hidden states [sequences, length, hidden] that
    enter the next block, on the CPU in the model's dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        sequences_per_batch: int = SEQUENCES_PER_BATCH,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> None:
        """Embed the tokens [samples, length]. Raises InputError when they, or the model's blocks, do not fit."""
        check_tokens(model, tokens)
        self.name, self.blocks = find_blocks(model)
        self.device = next(self.blocks.parameters()).device
        self.samples, self.length = tokens.shape
        self.inputs: list[Tensor] = []
        self._calls: list[list[Call]] = []  # per batch, of every block
        batch = max(1, min(sequences_per_batch, tokens_per_batch // self.length))
        with torch.no_grad():
            for part in tokens.split(batch):
                self._embed(model, part.to(self.device))

    def _embed(self, model: PreTrainedModel, tokens: Tensor) -> None:
        blocks = list(self.blocks)
        if len(self.inputs) < 2:  # two whole passes show whether the calls depend on more than the batch's shape
            hidden, calls = capture(model, blocks, tokens)
            if self.inputs and same(calls[0], self._calls[0][0]):
                if not same(calls, self._calls[0]):
                    raise InputError(f"{type(model).__name__} passes more than {HIDDEN} from block to block.")
                calls = self._calls[0]  # one copy in memory
        else:
            hidden, (first, *_) = capture(model, blocks[:1], tokens)
            calls = self._calls[0] if same(first, self._calls[0][0]) else capture(model, blocks, tokens)[1]
        self.inputs.append(hidden.to("cpu"))
        self._calls.append(calls)

    def _forward(self, index: int, batch: int) -> Tensor:
        """Output of a block for one batch, on the CPU."""
        with torch.no_grad():  # inference mode would keep no version counters, which tell the taps apart
            return self.replay(self.blocks[index], index, batch, self.inputs[batch]).to("cpu")

    def replay(self, block: Callable[..., Any], index: int, batch: int, hidden: Tensor) -> Tensor:
        """What `block` gives for hidden states when it is called as block `index` is for this batch, with gradients."""
        own = hidden.to(self.device, copy=True)  # a block may write into its input
        return self._calls[batch][index].replay(block, own)

    def collect(self, index: int) -> tuple[list[Tap], list[Tensor]]:
        """Taps of a block, with the statistics of the present inputs, and the block's outputs per batch.

        The inputs stay. Raises InputError naming block, tap and layers for activations that are not finite, and
        naming the layers that do not see every token once.
        """
        name = f"{self.name}.{index}"
        recorder = TapRecorder(name, linears(self.blocks[index], name), self.samples, self.length)
        outputs = []
        with recorder:
            for batch, inputs in enumerate(self.inputs):
                outputs.append(self._forward(index, batch))
                recorder.end_batch(len(inputs))
        return recorder.finish(), outputs

    def advance(self, index: int, outputs: list[Tensor] | None = None) -> None:
        """Make the block's outputs the inputs of the next: those given, else of running it again as it is now."""
        if outputs is None:
            outputs = [self._forward(index, batch) for batch in range(len(self.inputs))]
        self.inputs = outputs
