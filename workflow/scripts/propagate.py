"""Calibration tokens through a model block by block, whatever its architecture passes to its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from workflow.scripts.models import check_tokens, find_blocks, linears, vocabulary
from workflow.scripts.runtime import InputError
from workflow.scripts.taps import Tap, TapRecorder

HIDDEN = "hidden_states"
PROBE = 8  # tokens of the passes that show what a block's call depends on
# The widest activations of a batch: on a processor they stay in its caches, and in memory that is taken and given back
# without asking the system; a device wants more to do at once.
BATCH_BYTES = {"cpu": 2**22}
BATCH_BYTES_ELSEWHERE = 2**28


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


@dataclass(frozen=True)
class Pass:
    """What a pass through the model shows: the hidden states that enter the first block, and each block's call.

    returned: of all blocks but the last, which is not run: 0 for a tensor, n for a tuple of n that holds nothing
    besides the hidden states, None for anything else.
    """

    hidden: Tensor
    calls: list[Call]
    returned: list[int | None]


def capture(
    model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor, skip: Sequence[int | None] = ()
) -> Pass:
    """Run the model on tokens [sequences, length] up to the last of `blocks`, which need not be all of its blocks.

    skip: of an earlier pass, what each block returns; they are then not run, and pass on what they are given.
    Raises InputError when the model does not call every block once with a tensor of hidden states.
    """
    calls: dict[int, Call] = {}
    hidden: list[Tensor] = []
    returned: list[int | None] = []

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

    def note(output: Any) -> None:
        nothing_else = isinstance(output, tuple) and all(item is None for item in output[1:])
        returned.append(0 if isinstance(output, Tensor) else len(output) if nothing_else else None)

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: hook(index, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
            stack.callback(block.register_forward_hook(lambda _, args, output: note(output)).remove)
        for block, length in zip(blocks, skip, strict=False):
            stack.enter_context(passing_on(block, length or 0))
        with suppress(_Stop):
            model(input_ids=tokens, use_cache=False)
    if sorted(calls) != list(range(len(blocks))):
        raise InputError(f"{type(model).__name__} called {len(calls)} of its {len(blocks)} blocks.")
    return Pass(hidden[0], [calls[index] for index in range(len(blocks))], returned)


@contextmanager
def passing_on(block: nn.Module, length: int) -> Iterator[None]:
    """Within it the block returns the hidden states that it is given, as a tensor or in a tuple of that length."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs[HIDDEN]
        return (states, *[None] * (length - 1)) if length else states

    own = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


class Stream:
    """Calibration sequences on their way through a model, from one block to the next.

        for index in range(len(stream.blocks)):
            taps, outputs = stream.collect(index)
            stream.advance(index, outputs)    # shared statistics: one forward pass per model
            # or: replace the weights of stream.blocks[index], then stream.advance(index) for sequential ones

    name, blocks: the model's list of blocks. inputs: per batch, the hidden states [sequences, length, hidden] that
    enter the next block, on the CPU in the model's dtype.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, sequences_per_batch: int | None = None) -> None:
        """Embed the tokens [samples, length], by default in batches of the size that `BATCH_BYTES` gives.

        Raises InputError when they, or the model's blocks, do not fit.
        """
        check_tokens(model, tokens)
        self.name, self.blocks = find_blocks(model)
        self.device = next(self.blocks.parameters()).device
        self.samples, self.length = tokens.shape
        self.inputs: list[Tensor] = []
        self._calls: list[list[Call]] = []  # per batch, of every block
        with torch.no_grad():
            skip = self._probe(model, tokens)
            for part in tokens.split(sequences_per_batch or self._batch()):
                self._embed(model, part.to(self.device), skip)

    def _batch(self) -> int:
        """Sequences whose widest activations fill what a batch may take."""
        widest = max(max(layer.shape) for layer in linears(self.blocks, self.name))
        size = next(self.blocks.parameters()).element_size()
        return max(1, BATCH_BYTES.get(self.device.type, BATCH_BYTES_ELSEWHERE) // (self.length * widest * size))

    def _probe(self, model: PreTrainedModel, tokens: Tensor) -> list[int | None]:
        """What the blocks return, if their calls can be had without running them; else nothing.

        Two passes of a few tokens show whether the calls depend on more than the batch's shape.
        """
        few = tokens[:1, :PROBE].to(self.device)
        one, other = (capture(model, list(self.blocks), probe) for probe in (few, (few + 1) % vocabulary(model)))
        if not same(one.calls[0], other.calls[0]):
            return []
        if not same(one.calls, other.calls):
            raise InputError(f"{type(model).__name__} passes more than {HIDDEN} from block to block.")
        return [] if None in one.returned else one.returned

    def _embed(self, model: PreTrainedModel, tokens: Tensor, skip: Sequence[int | None]) -> None:
        blocks = list(self.blocks)
        if self.inputs:
            first = capture(model, blocks[:1], tokens)
            if same(first.calls[0], self._calls[0][0]):  # one copy in memory
                self.inputs.append(first.hidden.to("cpu"))
                self._calls.append(self._calls[0])
                return
        whole = capture(model, blocks, tokens, skip)
        self.inputs.append(whole.hidden.to("cpu"))
        self._calls.append(whole.calls)

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
            if recorder.again():  # experts that were routed too few tokens
                for batch in range(len(self.inputs)):
                    self._forward(index, batch)
        return recorder.finish(), outputs

    def advance(self, index: int, outputs: list[Tensor] | None = None) -> None:
        """Make the block's outputs the inputs of the next: those given, else of running it again as it is now."""
        if outputs is None:
            outputs = [self._forward(index, batch) for batch in range(len(self.inputs))]
        self.inputs = outputs
