"""Parts of a sum S + B A as they are stored, and its product S x + B (A x) with one vector (docs/decode.md).

Formats of S are also those of `packed_matvec.py`; factors are bfloat16 or 4-bit codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layerwise.kernels import packing, simd
from layerwise.kernels.packed_matvec import Sparse24, W4BlockSparse, W4Grouped
from layerwise.kernels.packing import BLOCK
from layerwise.kernels.rows import compiled

# ---------------------------------------------------------------------------------------------------- dense and pruned


@dataclass(frozen=True)
class Dense16:
    """A matrix in bfloat16, such as a factor. values: [rows, inputs padded to blocks of 16] uint16, its bits."""

    values: NDArray[np.uint16]
    shape: tuple[int, int]

    @classmethod
    def pack(cls, weight: Tensor) -> Dense16:
        """Pack a weight [rows, inputs] exact in bfloat16. Raises ValueError for another, in one sentence."""
        shape = packing.shape_of(weight)
        return cls(packing.padded(packing.bfloat16_bits(weight), BLOCK), shape)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def dequantised(self) -> NDArray[np.float64]:
        """The weights [rows, inputs] that it represents."""
        return packing.from_bfloat16(self.values)[:, : self.shape[1]]

    def product(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """[rows], W x for x [inputs]."""
        entries = packing.in_blocks(packing.checked_vector(x, self.shape))
        return packing.on_threads(_dense16_product, (self.values,), (entries,), self.shape[0], threads)


@compiled(fastmath=True)
def _dense16_product(values, x, y):
    columns = values.shape[1]
    every = values.reshape(-1)
    for row in range(len(y)):
        first = row * columns
        one, other = simd.zeros(), simd.zeros()  # two sums, so that additions do not wait for each other
        for column in range(0, columns - BLOCK, 2 * BLOCK):
            one = simd.add(one, simd.mul(simd.load_bfloat16(every, first + column), simd.load(x, column)))
            column += BLOCK
            other = simd.add(other, simd.mul(simd.load_bfloat16(every, first + column), simd.load(x, column)))
        if columns // BLOCK % 2:
            last = columns - BLOCK
            one = simd.add(one, simd.mul(simd.load_bfloat16(every, first + last), simd.load(x, last)))
        y[row] = simd.reduce_add(simd.add(one, other))


@dataclass(frozen=True)
class RowSparse:
    """Kept bfloat16 values, as many in every row, and a bitmap with one bit for each weight.

    values: [rows, kept] uint16, followed in memory by one more block that no product uses; bitmap: [rows, blocks of 16
    inputs] uint16, the first input in the lowest bit.
    """

    values: NDArray[np.uint16]
    bitmap: NDArray[np.uint16]
    shape: tuple[int, int]

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> RowSparse:
        """Pack a weight [rows, inputs] exact in bfloat16, and a mask [rows, inputs], True for as many in every row.

        Raises ValueError for other shapes or values, in one sentence.
        """
        rows, inputs = packing.shape_of(weight)
        packing.check_bools("The mask", mask, (rows, inputs))
        kept = mask.sum(1)
        if (kept != kept[0]).any():
            raise ValueError(
                f"The mask must keep equally many weights in every row. Got {int(kept.min())} to {int(kept.max())} "
                "instead."
            )
        count = rows * int(kept[0])
        room = np.zeros(count + BLOCK, np.uint16)
        room[:count] = packing.bfloat16_bits(weight)[mask.numpy()]
        bits = np.packbits(packing.padded(mask.numpy(), BLOCK), axis=1, bitorder="little")
        return cls(room[:count].reshape(rows, -1), bits.view("<u2"), (rows, inputs))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.bitmap.nbytes

    def dequantised(self) -> NDArray[np.float64]:
        """The weights [rows, inputs] that it represents."""
        bits = np.unpackbits(self.bitmap.view(np.uint8), axis=1, count=self.shape[1], bitorder="little")
        weight = np.zeros(self.shape)
        weight[bits.astype(bool)] = packing.from_bfloat16(self.values).reshape(-1)
        return weight

    def product(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """[rows], W x for x [inputs]."""
        entries = packing.in_blocks(packing.checked_vector(x, self.shape))
        arrays = (self.values, self.bitmap)
        return packing.on_threads(_row_sparse_product, arrays, (entries, simd.EXPANSION), self.shape[0], threads)


@compiled(fastmath=True)
def _row_sparse_product(values, bitmap, x, places, y):
    """Of each sixteen inputs, the kept values are moved to the lanes of their inputs."""
    blocks, kept = bitmap.shape[1], values.shape[1]
    every = values.reshape(-1)
    for row in range(len(y)):
        total, place = simd.zeros(), row * kept
        for block in range(blocks):
            bits = bitmap[row, block]
            value = simd.expand_bfloat16(every, place, bits, places)
            total = simd.add(total, simd.mul(value, simd.load(x, BLOCK * block)))
            place += simd.count_bits(bits)
        y[row] = simd.reduce_add(total)


# ---------------------------------------------------------------------------------------------------------------- sums


@dataclass(frozen=True)
class SumOfParts:
    """S + B A as its parts: factors B `left` [rows, r] and A `right` [r, inputs], and S `rest`, None without one."""

    left: Dense16 | W4Grouped
    right: Dense16 | W4Grouped
    rest: RowSparse | Sparse24 | W4BlockSparse | W4Grouped | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for parts whose shapes do not belong together."""
        (rows, rank), (inner, inputs) = self.left.shape, self.right.shape
        if rank != inner:
            raise ValueError(f"The right factor must be [{rank}, inputs]. Got [{inner}, {inputs}] instead.")
        if self.rest is not None and self.rest.shape != (rows, inputs):
            raise ValueError(f"The part S must be [{rows}, {inputs}]. Got {list(self.rest.shape)} instead.")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes + (0 if self.rest is None else self.rest.nbytes)

    def dequantised(self) -> NDArray[np.float64]:
        """The weights [rows, inputs] that it represents."""
        product = self.left.dequantised() @ self.right.dequantised()
        return product if self.rest is None else self.rest.dequantised() + product

    def product(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """[rows], S x + B (A x) for x [inputs]: B A is never formed."""
        y = self.left.product(self.right.product(x, threads), threads)
        if self.rest is not None:
            y += self.rest.product(x, threads)
        return y
