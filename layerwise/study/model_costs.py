"""Memory, disk space and operations of a model's passes, from its shape.

No weights are read and torch is not imported. The constants say what the jobs' code holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from layerwise.contract.target import Target
from layerwise.models import compute_dtype
from layerwise.sources.shapes import BYTES, BlockShape, ModelShape
from layerwise.storage.bits_per_weight import stored_bits
from layerwise.study.work import Work

PROCESS = 650e6  # bytes of Python with torch, transformers and the compiled loops
OUTSIDE_HELD = 2  # copies of the parameters outside the blocks: themselves, and their mapped file during reading
BLOCKS_HELD = 3  # blocks of a streamed model in memory: the running one, the next, and its mapped file
# Bytes per entry of a Gram during summation: a float64 total and a float32 run. Experts of one width share the run
# unless they see every token.
GRAM_ENTRY = 12
BATCH_BYTES = 2**22  # bytes of a batch's widest activations, unless one sequence has more (block_stream.BATCH_BYTES)
ACTIVATIONS = 8  # number of tensors of that size in memory at a time
LOGITS_HELD = 2  # logits of a batch in memory: the cell's and the dense model's (divergence.Divergence)
# extra matrices for a method that needs them: the cross-Gram, and the Gram of the dense model's inputs
GRAMS_BESIDE = 2
LOGITS_BACK = 4  # float32 copies of a sequence's logits: logits, shifted logits, softmax, gradient
WORKING_BACK = 3  # memory of the backward pass, in units of a block's forward activations
HIDDEN_FILES = 2  # files of hidden states on disk: inputs and outputs of a block
LOGITS_AT_ONCE = 2**22  # logits of a batch of windows (perplexity.LOGITS_AT_ONCE)
ROWS = 1024  # tokens whose logits are converted to float32 at a time (perplexity.ROWS)
FITS = 0.7  # share of the free memory above which blocks are read whenever they are run (streaming.SHARE)
TASK_TOKENS = 1024  # tokens of the longest sequence in a zero-shot task
READ = 8  # float32 copies of a layer during unpacking from a cell's file
TUNED = 24  # bytes per parameter of all blocks during tuning: results, codes, gradients and moments
SAMPLE = 512  # largest number of input rows in a Gram store, and of first tokens (tap_statistics.SAMPLE_ROWS)


def here(entry: Mapping[str, Any], rule: str = "") -> str | None:
    """The dtype in which this machine's processor computes a model of the config, for any job."""
    return compute_dtype.compute_dtype(entry, "cpu", compute_dtype.slow_apart)


def summed(block: BlockShape, beside: bool = False) -> float:
    """Bytes of a block's Grams during summation, and of the stored rows of inputs.

    beside: whether to include the matrices for a method that needs the cross-Gram.
    """
    rows = sum(size for size, share in block.taps if share < 1)  # an expert may have twice as many
    more = (GRAM_ENTRY - 4 + GRAM_ENTRY * GRAMS_BESIDE * beside) * block.gram_entries
    return kept(block) + more + 4 * SAMPLE * rows


def kept(block: BlockShape) -> float:
    """Bytes of a block's Grams in float32, and of the rows of inputs stored with them."""
    return 4 * (block.gram_entries + 2 * SAMPLE * sum(size for size, _ in block.taps))


@dataclass(frozen=True)
class ModelCost:
    """A shape whose parameters take `size` bytes each when run; memory in bytes, work in operations.

    width: bytes of a stored parameter. entry: the config's entry, with its dtype. computed: returns the dtype in which
    an entry is run.
    """

    shape: ModelShape
    size: int
    width: int
    entry: Mapping[str, Any] = field(compare=False)
    computed: Callable[[Mapping[str, Any]], str | None] = field(compare=False)

    @classmethod
    def of(
        cls, spec: Mapping[str, Any], shape: ModelShape, computed: Callable[[Mapping[str, Any]], str | None] = here
    ) -> ModelCost:
        entry = {**spec, "dtype": spec.get("dtype") or shape.dtype}
        width = BYTES.get(entry["dtype"], BYTES[shape.dtype])
        return cls(shape, BYTES.get(computed(spec) or "", width), width, entry, computed)

    def at(self, dtype: str | None) -> ModelCost:
        """The same model, run in another dtype."""
        return self.of(compute_dtype.at(self.entry, dtype), self.shape, self.computed) if dtype else self

    @property
    def at_rest(self) -> ModelCost:
        """The same model in jobs that do not run it."""
        return replace(self, size=self.width)

    @property
    def block(self) -> int:
        """Parameters of the largest block."""
        return max((block.parameters for block in self.shape.blocks), default=0)

    @property
    def streamed(self) -> float:
        """Memory of the process with the blocks that it holds."""
        return PROCESS + BLOCKS_HELD * self.size * self.block

    @property
    def embedding(self) -> float:
        """Peak before the first block and after the last, when the parameters outside the blocks are read."""
        return self.streamed + OUTSIDE_HELD * self.size * self.shape.outside

    @property
    def whole(self) -> float:
        return self.size * self.shape.parameters

    def activations(self, length: int) -> float:
        return ACTIVATIONS * max(BATCH_BYTES, self.size * length * self.shape.widest)

    def calibrating(self, length: int, beside: bool = False) -> float:
        """Peak of a pass that sums the Grams of a block and, with `beside`, the cross-Gram."""
        grams = max((summed(block, beside) for block in self.shape.blocks), default=0)
        summing = self.streamed + (1 + beside) * self.activations(length) + grams  # includes the inputs of a batch
        return max(summing, self.embedding)

    def passing_back(self, length: int) -> float:
        """Peak of a sequence's forward and backward pass: the whole model, each block's inputs, one block's gradients.

        Before it the model is read whole, and weights that are not in float32 exist twice during conversion.
        """
        stored = self.width * self.shape.parameters
        reading = stored + OUTSIDE_HELD * self.width * self.shape.outside  # at once, which takes a third copy of these
        converting = self.whole + (stored if self.width != self.size else 0)
        kept = self.size * length * self.shape.hidden * (self.shape.depth + 1)
        inside = WORKING_BACK * ACTIVATIONS * self.size * length * self.shape.widest + self.size * self.block
        head = LOGITS_BACK * self.size * length * self.shape.vocabulary
        return PROCESS + max(reading, converting, self.whole + kept + max(inside, head))

    def evaluating(self, length: int, tokens: int) -> float:
        """Peak of the perplexity of `tokens` tokens in windows of `length`."""
        batch = max(length, min(tokens, LOGITS_AT_ONCE // self.shape.vocabulary))  # tokens
        in_float32 = 2 * 4 * min(ROWS, length)  # two copies of some rows
        logits = (LOGITS_HELD * self.size * batch + in_float32) * self.shape.vocabulary
        blocks = self.streamed + max(self.activations(batch), self.unpacked)
        scoring = self.streamed + self.size * self.shape.outside + logits
        return max(blocks, scoring, self.embedding)

    @property
    def unpacked(self) -> float:
        """Memory to unpack a layer of a cell's file."""
        return 4 * READ * math.prod(self.shape.largest_layer)

    def answering(self, batch: int) -> tuple[float, float]:
        """Peak of zero-shot tasks with all blocks in memory, and with each block read whenever it is run."""
        logits = batch * TASK_TOKENS * self.shape.vocabulary * (self.size + 8)
        running = max(self.activations(batch * TASK_TOKENS) + logits, self.unpacked)
        outside, blocks = self.size * self.shape.outside, self.whole - self.size * self.shape.outside
        fitting = max(blocks / FITS, blocks + 2 * self.size * self.block + running)
        minimum = max(self.streamed + outside + running, self.embedding)
        return max(PROCESS + outside + fitting, minimum), minimum

    def tuning(self, length: int, tokens: int, stages: Mapping[str, Any]) -> float:
        """Peak of the tuning stages, which hold the whole model and the gradients of one block or of all blocks.

        The stage `blocks` also holds the inputs and the dense outputs of a block for all tokens.
        """
        batch, depth = max(stage["batch"] for stage in stages.values()), self.shape.depth if "end" in stages else 1
        kept = 4 * batch * length * (ACTIVATIONS * self.shape.widest * depth + 3 * self.shape.vocabulary)
        kept += self.states(tokens) if "blocks" in stages else 0.0
        return PROCESS + self.whole + TUNED * (self.shape.parameters - self.shape.outside) + kept

    def states(self, tokens: int) -> float:
        """Bytes of the files of hidden states."""
        return HIDDEN_FILES * self.size * tokens * self.shape.hidden

    def stored(self, block: BlockShape, target: Target, changed: bool) -> float:
        """Bytes of a block's layers in a cell's file. changed: whether weights differ from the checkpoint's."""
        wide = max(BYTES[self.shape.dtype], self.width if changed else 0) / 2  # of an unquantised weight
        total = 0.0
        for out, inputs, _ in block.layers:
            parts = stored_bits(target, 1 - target.sparsity, out, inputs, input_scale=target.bits is not None)
            total += (sum(parts.values()) + parts.get("values", 0) * (wide - 1)) / 8
        return total

    def forward(self, tokens: int) -> float:
        return tokens * self.shape.total(lambda block: sum(2 * share * out * size for out, size, share in block.layers))

    def passes(self, tokens: int) -> Work:
        """Work of forward passes of this many tokens."""
        return Work(self.forward(tokens), dtype=self.computed(self.entry) or self.shape.dtype)

    @property
    def products(self) -> float:
        """Operations of one product of every layer's weight and Gram."""
        return sum(2.0 * times * out * size**2 for (out, size), times in self.layers.items())

    @property
    def layers(self) -> Mapping[tuple[int, int], int]:
        """(rows, inputs) -> number of layers of this shape in all blocks."""
        found: dict[tuple[int, int], int] = {}
        for block, times in self.shape.blocks.items():
            for out, size, _ in block.layers:
                found[out, size] = found.get((out, size), 0) + times
        return found

    def gram_work(self, tokens: int) -> float:
        """Work of Grams, of which only half is computed."""
        return tokens * self.shape.total(lambda block: sum(share * size**2 for size, share in block.taps))
