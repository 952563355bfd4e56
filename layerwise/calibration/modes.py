"""The taps of each block in the two calibration modes, shared and sequential."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from torch import nn

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.gram_store import read_block, read_index
from layerwise.calibration.tap_by_tap import tap_by_tap
from layerwise.calibration.taps import Tap
from layerwise.models.stored_dtypes import round_as_stored
from layerwise.models.structure import Blocks


def shared_blocks(
    folder: Path, blocks: Blocks, start: int = 0, finished: Callable[[int], None] = lambda index: None
) -> Iterator[tuple[int, Iterator[Tap]]]:
    """The taps of each block in a Gram store, read one by one while the model's block is open.

    finished: called when a block is no longer needed.
    """
    for index in range(start, len(read_index(folder)["blocks"])):
        with blocks.open(index):
            yield index, read_block(folder, index, str(blocks.device))
        finished(index)


def sequential_blocks(
    stream: Stream,
    blocks: Blocks | None = None,
    start: int = 0,
    finished: Callable[[int], None] = lambda index: None,
    stays: Callable[[int], bool] = lambda index: False,
    renewed: bool = False,
) -> Iterator[tuple[int, Iterable[Tap]]]:
    """The taps of each block; after a block is compressed, it is run again to give the inputs of the next.

    blocks: the blocks to compress, if the stream passes through a copy of them in another dtype. finished: called
    when a block is no longer needed. stays: whether a block's weights stay as they are; it is then run only once,
    unless there are dense states or a copy. renewed: whether each tap has the inputs that come after the compression of
    the layers before it in the block, as in `tap_by_tap`; the stream must have dense states.
    """
    blocks = blocks or stream.source
    for index in range(start, len(blocks)):
        with blocks.open(index) as block, stream.source.open(index) as other:
            update = partial(copy_weights, block, other)
            last = index + 1 == len(blocks)
            once = stays(index) and not last and stream.dense is None and block is other
            if renewed:
                yield index, tap_by_tap(stream, index, update)
            else:
                yield index, in_turn(stream.collect(index, advance=once, drifted=index > 0))
            if not (last or once):
                update()
                stream.advance(index)
        finished(index)


def copy_weights(block: nn.Module, other: nn.Module) -> None:
    """Give the copy of a block, if it is another, the block's weights."""
    if block is not other:
        other.load_state_dict(block.state_dict())  # rounded to the copy's dtype
        round_as_stored(other)  # if the copy computes in a wider dtype


def in_turn(taps: list[Tap]) -> Iterator[Tap]:
    """The taps one by one; each is removed from the list when its turn comes."""
    while taps:
        yield taps.pop(0)
