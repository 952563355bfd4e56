"""Run calibration tokens through a model block by block, for any arguments that its architecture passes to blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerwise.calibration.block_calls import HIDDEN, Call, capture, passing_on, same
from layerwise.calibration.hidden_states import DENSE, StoredStates, files_of, store
from layerwise.calibration.taps import Tap, TapRecorder
from layerwise.models.loading import check_tokens, vocabulary
from layerwise.models.structure import Blocks, Linear, linears
from layerwise.numerics.patterns import finite
from layerwise.runtime.errors import Diverged, InputError

PROBE = 8  # tokens in the passes that find out what a block's call depends on
# Size of a batch's widest activations. On a CPU they stay in its caches, and the allocator reuses their memory without
# system calls. A GPU needs larger batches to be busy.
BATCH_BYTES = {"cpu": 2**22}
BATCH_BYTES_ELSEWHERE = 2**28


def refuse_experts(layers: Iterable[Linear]) -> None:
    """Raise InputError if a layer is an expert's: the dense model may route other tokens to it."""
    found = next((layer.name for layer in layers if layer.expert is not None), None)
    if found:
        raise InputError(
            "The cross-Gram must be of layers that see the same tokens in the dense and in the compressed model. Got "
            f"the expert {found} instead, to which the two models may route different tokens: use the mode shared, or "
            "another method."
        )


class Stream:
    """Sequences that pass through a model from block to block.

        for index in range(len(stream.blocks)):
            with stream.source.open(index):
                taps = stream.collect(index, advance=True)     # shared statistics: one forward pass per model
                # or: taps = stream.collect(index), new weights for stream.blocks[index], and stream.advance(index)

    name, blocks: the model's list of blocks. source: reads the blocks when they are opened. inputs: per batch, the
    hidden states [sequences, length, hidden] that enter the next block, on the CPU or in files, in the model's dtype.
    dense: with `beside` the same states in the dense model, otherwise None.
    """

    def __init__(
        self,
        model: PreTrainedModel | Blocks,
        tokens: Tensor,
        sequences_per_batch: int | None = None,
        folder: Path | None = None,
        start: int = 0,
        beside: bool = False,
    ) -> None:
        """Embed the tokens [samples, length], by default in batches sized by `BATCH_BYTES`.

        folder: holds files of hidden states (default: in memory). It keeps the states that enter the current block, and
        those that entered the previous one, in case its work must be repeated. start: the next block, whose inputs are
        stored. beside: whether to carry the dense model's hidden states along with those of the compressed blocks.
        Raises InputError when tokens or the model's blocks do not fit, and for experts with `beside`.
        """
        self.source = model if isinstance(model, Blocks) else Blocks(model)
        self.model, self.name, self.blocks = self.source.model, self.source.name, self.source.modules
        check_tokens(self.model, tokens)
        self.device = self.source.device
        self.samples, self.length = tokens.shape
        self.folder = folder
        self.overflow: str | None = None  # a sentence about the first block output that is not finite
        self.tap_count = 0  # of the block whose taps were collected last, its experts' aside
        self._lost: tuple[int, int, Tensor] | None = None  # block, batch and inputs of that output
        self._calls: list[list[Call]] = []  # per batch, the call of every block
        if beside:
            refuse_experts(linears(self.blocks, self.name))
        parts = tokens.split(sequences_per_batch or self._batch())
        self.inputs: Sequence[Tensor] = []
        self.dense: Sequence[Tensor] | None = None
        with torch.no_grad(), self.source.outside():
            self._skip = self._probe(tokens)  # per block except the last; empty if all must be run
            self._first = len(parts[0])
            hidden = (self._embed(part.to(self.device)) for part in parts)
            if start and folder:
                deque(hidden, maxlen=0)  # runs only to record the calls
                sizes = [len(part) for part in parts]
                self.inputs = StoredStates(files_of(folder, start), sizes)
                self.dense = StoredStates(files_of(folder, start, DENSE), sizes) if beside else None
            else:
                self._keep(0, hidden)
                self.dense = self.inputs if beside else None  # nothing is compressed before the first block

    def _keep(self, index: int, hidden: Iterable[Tensor]) -> None:
        """Store these as the inputs of a block."""
        self.inputs = store(self.folder, index, hidden) if self.folder else list(hidden)

    def _batch(self) -> int:
        """Number of sequences whose widest activations fill a batch."""
        widest = max(max(layer.shape) for layer in linears(self.blocks, self.name))
        size = next(self.blocks.parameters()).element_size()
        return max(1, BATCH_BYTES.get(self.device.type, BATCH_BYTES_ELSEWHERE) // (self.length * widest * size))

    def _probe(self, tokens: Tensor) -> list[int]:
        """The blocks' return types, if their calls can be recorded without running them; otherwise an empty list.

        Two passes of a few tokens show whether the calls depend on more than the batch's shape. One block of each class
        is run to see what it returns.
        """
        few, blocks = tokens[:1, :PROBE].to(self.device), list(self.blocks)
        skip: list[int] = []
        kinds: dict[type, int] = {}
        extra = False
        for index, block in enumerate(blocks[:-1]):
            if type(block) not in kinds:
                found = capture(self.model, blocks[: index + 2], few, skip)
                kinds[type(block)], extra = found.returned[index], extra or found.extra
            skip.append(kinds[type(block)])

        def calls(skip: Sequence[int]) -> list[list[Call]]:
            """The blocks' calls in the two passes."""
            return [capture(self.model, blocks, x, skip).calls for x in (few, (few + 1) % vocabulary(self.model))]

        one, other = calls(skip)
        if not same(one[0], other[0]):
            return []
        # A block's extra results may be arguments of the next block.
        run, another = calls(()) if extra else (one, other)
        if not (same(one, other) and same(run, another)):
            raise InputError(
                f"{type(self.model).__name__} must pass only {HIDDEN} from block to block. Got further outputs instead."
            )
        return skip if same(one, run) else []

    def _embed(self, tokens: Tensor) -> Tensor:
        """The hidden states that enter the first block; the blocks' calls are recorded."""
        blocks = list(self.blocks)
        # Only for batches of one size: the first block's mask may fit any batch where a later block's does not (CWM).
        if self._calls and len(tokens) == self._first:
            first = capture(self.model, blocks[:1], tokens)
            if same(first.calls[0], self._calls[0][0]):  # so share one copy
                self._calls.append(self._calls[0])
                return first.hidden.to("cpu")
        whole = capture(self.model, blocks, tokens, self._skip)
        self._calls.append(whole.calls)
        return whole.hidden.to("cpu")

    def _forward(self, index: int, batch: int, inputs: Tensor) -> Tensor:
        """Output of a block for one batch, on the CPU."""
        with torch.no_grad():  # inference mode has no version counters, which distinguish the taps
            output = self.replay(self.blocks[index], index, batch, inputs).to("cpu")
        if self._lost is None and not finite(output):
            self._lost = index, batch, inputs
        return output

    def _locate(self) -> None:
        """Name the first module whose output is not finite, by a second pass through its open block."""
        if self._lost is None or self.overflow:
            return
        index, batch, inputs = self._lost
        found = [f"{self.name}.{index}"]

        def hook(_: nn.Module, args: Any, output: Any, name: str) -> None:
            if len(found) == 1 and isinstance(output, Tensor) and output.is_floating_point() and not finite(output):
                found.append(name)

        with ExitStack() as stack:
            for name, module in self.blocks[index].named_modules(prefix=found[0]):
                if not list(module.children()):
                    handle = module.register_forward_hook(partial(hook, name=name))
                    stack.callback(handle.remove)
            self._forward(index, batch, inputs)
        dtype = str(inputs.dtype).removeprefix("torch.")
        advice = ", use dtype: bfloat16 or float32" if inputs.dtype == torch.float16 else ""
        self.overflow = f"the output of {found[-1]} has NaN or Inf in {dtype}{advice}"

    def _refuse(self, expert: str | None = None) -> None:
        """expert: the first layer of an expert whose inputs are not finite."""
        if self.overflow:
            also = f", and so have the inputs of {expert}" if expert else ""
            raise Diverged(f"The activations of the calibration are not finite: {self.overflow}{also}.")

    def replay(self, block: Callable[..., Any], index: int, batch: int, hidden: Tensor) -> Tensor:
        """The output of `block` for hidden states, with gradients and the arguments of block `index` for this batch."""
        own = hidden.to(self.device, copy=True)  # a block may write into its input
        return self._calls[batch][index].replay(block, own)

    def collect(
        self, index: int, advance: bool = False, drifted: bool | None = None, only: int | None = None
    ) -> list[Tap]:
        """Taps of a block, with the statistics of the current inputs.

        advance: whether the block's outputs become the inputs of the next block. Otherwise the inputs stay, because the
        block's weights will change, and only the dense states advance. An output that is not needed is computed for the
        first batch alone. drifted: whether a block before this one may be compressed (default: in all blocks but the
        first, unless they advance). only: number of the one tap that is wanted. Raises Diverged, which names the
        module, for an output that is not finite. Raises InputError, which names block, tap and layers, for Grams that
        are not finite and for layers that do not see every token once.
        """
        self._refuse()  # checks the output of a compressed block
        name = f"{self.name}.{index}"
        if drifted is None:
            drifted = index > 0 and not advance  # nothing is compressed before the first block
        recorder = TapRecorder(name, linears(self.blocks[index], name), self.samples, self.length, drifted, only)
        before, dense = self.inputs, self.dense if drifted else None
        carried = self.dense is not None and index + 1 < len(self.blocks)  # the dense model's states

        def outputs() -> Iterator[Tensor]:
            """Outputs of the block, in the dense model if its states are carried along; its inputs if no output is
            needed."""
            for batch, inputs in enumerate(before):
                output = inputs
                if dense is not None:
                    with recorder.of_dense():
                        output = self._forward(index, batch, dense[batch])
                elif advance or carried:
                    output = self._forward(index, batch, inputs)
                if output is inputs or dense is not None:
                    with recorder.until_last():
                        self._forward(index, batch, inputs)
                yield output
                recorder.end_batch(len(inputs))

        with recorder:
            if advance:
                self._keep(index + 1, outputs())
            elif carried:
                self.dense = store(self.folder, index + 1, outputs(), DENSE) if self.folder else list(outputs())
            else:
                deque(outputs(), maxlen=0)
            if recorder.again():  # some experts were routed too few tokens
                for batch, inputs in enumerate(before):
                    self._forward(index, batch, inputs)
        self._locate()
        self._refuse(recorder.experts.overflown())
        self.tap_count = len(recorder.members)
        return recorder.finish()

    def collect_again(
        self, index: int, only: int, dense: Sequence[Tensor], as_dense: Callable[[], AbstractContextManager[None]]
    ) -> Tap:
        """One tap of a block, some of whose layers are compressed by now; all states stay.

        only: the tap's number. dense: the states that enter the block in the dense model. as_dense: context in which
        the block has the dense weights. Raises as `collect`.
        """
        name = f"{self.name}.{index}"
        recorder = TapRecorder(name, linears(self.blocks[index], name), self.samples, self.length, True, only)
        with recorder:
            for batch, inputs in enumerate(self.inputs):
                with as_dense(), recorder.until_last(), recorder.of_dense():
                    self._forward(index, batch, dense[batch])
                with recorder.until_last():
                    self._forward(index, batch, inputs)
                recorder.end_batch(len(inputs))
        self._locate()
        self._refuse()
        [tap] = recorder.finish()
        return tap

    def advance(self, index: int) -> None:
        """Make the current block's outputs the inputs of the next block."""
        self._keep(index + 1, self.outputs(index))
        self._locate()

    def outputs(self, index: int) -> Iterator[Tensor]:
        """Outputs [sequences, length, hidden] of the block for each batch that enters it, on the CPU."""
        for batch, inputs in enumerate(self.inputs):
            yield self._forward(index, batch, inputs)

    def logits(self, batch: int, tokens: Tensor, after: Tensor | None = None, returned: int = 0) -> Tensor:
        """Logits [sequences, length, vocabulary] of a batch whose states have reached the last block, given its tokens.

        Blocks before the last are not run, unless the model's blocks must be run. after: hidden states to use as the
        last block's output, which is then not run. returned: 0 if the last block returns a tensor, n for a tuple of n.
        """
        with ExitStack() as stack:
            for index, (block, length) in enumerate(zip(self.blocks, self._skip, strict=False)):
                inside = after is None and index == len(self.blocks) - 2
                stack.enter_context(passing_on(block, length, self.inputs[batch].to(self.device) if inside else None))
            if after is not None:
                stack.enter_context(passing_on(self.blocks[-1], returned, after.to(self.device)))
            return self.model(input_ids=tokens.to(self.device), use_cache=False).logits
