"""The calls of a model's blocks: their arguments besides the hidden states, recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from layerwise.runtime.errors import InputError

HIDDEN = "hidden_states"


class _Stop(Exception):
    """Ends a forward pass at the last block of interest."""


@dataclass(frozen=True)
class Call:
    """A block's further arguments, besides its hidden states; they are replayed unchanged."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool  # whether hidden states are a keyword argument; otherwise they are the first positional argument

    def replay(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Output hidden states of the block."""
        output = (
            block(*self.args, **{**self.kwargs, HIDDEN: hidden})
            if self.keyword
            else block(hidden, *self.args, **self.kwargs)
        )
        return output if isinstance(output, Tensor) else output[0]


def without_cache(value: Any) -> Any:
    """The value without a cache, which would grow with every replay and let tokens attend to earlier batches."""
    return None if isinstance(value, Cache) else value


def same(first: Any, second: Any) -> bool:
    """Whether two arguments of blocks are equal, including the values of tensors."""
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
    """Record of a pass through the model: the hidden states that enter the first block, and each block's call.

    returned: for each block in the pass, 0 for a tensor, n for a tuple of n. extra: whether a block returned more than
    the hidden states.
    """

    hidden: Tensor
    calls: list[Call]
    returned: list[int]
    extra: bool


def capture(model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor, skip: Sequence[int] = ()) -> Pass:
    """Run the model on tokens [sequences, length] up to the last of `blocks`, which need not be all of its blocks.

    skip: the return types of the first blocks. These blocks are not run and pass on their input.
    Raises InputError when the model does not call every block once with a tensor of hidden states.
    """
    calls: dict[int, Call] = {}
    hidden: list[Tensor] = []
    returned: list[int] = []
    extra: list[bool] = []

    def hook(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keyword = not args
        states = kwargs.get(HIDDEN) if keyword else args[0]
        if not isinstance(states, Tensor) or index in calls:
            raise InputError(f"{type(model).__name__} does not call each block once with its {HIDDEN}.")
        if states.ndim != 3:  # Gemma 3n's states have a leading dimension for its four streams
            raise InputError(
                f"{type(model).__name__} must pass {HIDDEN} [sequences, length, width] from block to block. Got "
                f"{list(states.shape)} for {tokens.shape[0]} sequences of {tokens.shape[1]} tokens instead."
            )
        rest = {key: without_cache(value) for key, value in kwargs.items() if not (keyword and key == HIDDEN)}
        calls[index] = Call(tuple(map(without_cache, args[1:])), rest, keyword)
        if index == 0:
            hidden.append(states.clone())  # the block may write to it
        if index == len(blocks) - 1:
            raise _Stop

    def note(output: Any) -> None:
        returned.append(0 if isinstance(output, Tensor) else len(output))
        extra.append(not isinstance(output, Tensor) and any(item is not None for item in output[1:]))

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(
                lambda _, args, kwargs, index=index: hook(index, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
            stack.callback(block.register_forward_hook(lambda _, args, output: note(output)).remove)
        for block, length in zip(blocks, skip, strict=False):
            stack.enter_context(passing_on(block, length))
        with suppress(_Stop):
            model(input_ids=tokens, use_cache=False)
    if sorted(calls) != list(range(len(blocks))):
        raise InputError(
            f"{type(model).__name__} must call each of its {len(blocks)} blocks once. It calls {len(calls)} of them "
            "instead, so it cannot be run block by block."
        )
    return Pass(hidden[0], [calls[index] for index in range(len(blocks))], returned, any(extra))


@contextmanager
def passing_on(block: nn.Module, length: int, instead: Tensor | None = None) -> Iterator[None]:
    """Context in which the block is not run and returns its input hidden states, or `instead`.

    length: 0 for a tensor, n for a tuple of n.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = instead if instead is not None else args[0] if args else kwargs[HIDDEN]
        return (states, *[None] * (length - 1)) if length else states

    own = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
