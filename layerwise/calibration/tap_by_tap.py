"""A block's taps one at a time, each with the inputs that come after the compression of the layers before it.

GPTAQ and Qronos fit the dense model's outputs, so each layer corrects the drift of its inputs. If all inputs of a block
were collected before its first layer is compressed, the layers after it would correct the same drift again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.taps import Tap
from layerwise.models.structure import Linear, linears


class DenseWeights:
    """Copies of the weights of a block's linear layers, made before they are compressed."""

    def __init__(self, layers: Iterable[Linear]) -> None:
        parameters = [layer.module.get_parameter(layer.parameter) for layer in layers]
        self.pairs = [(parameter, parameter.detach().clone()) for parameter in parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context in which the layers have the dense weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for place, (parameter, other) in enumerate(self.pairs):
            self.pairs[place] = parameter, parameter.data
            parameter.data = other


def tap_by_tap(stream: Stream, index: int, update: Callable[[], None]) -> Iterator[Tap]:
    """The taps of block `index` of a stream with dense states. The layers of a tap must be compressed before the next
    tap is asked for.

    update: gives the stream's block the weights of the block that is compressed, if it is a copy. Each tap takes a pass
    of the dense and one of the compressed block, up to its inputs; the first dense pass is whole.
    """
    dense = stream.dense
    assert dense is not None
    weights = DenseWeights(linears(stream.blocks[index], f"{stream.name}.{index}"))
    yield from stream.collect(index, drifted=index > 0, only=0)
    for number in range(1, stream.tap_count):
        update()
        yield stream.collect_again(index, number, dense, weights.in_place)
