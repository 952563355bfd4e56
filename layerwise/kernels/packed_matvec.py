"""Stored weight formats, and the product y = W x with one vector for each of them (docs/decode.md).

Codes are packed as in the file of a compressed model: 4 bits each, consecutive, lowest bits first. Scales and
unquantised values are bfloat16. Vectors and all sums are float32; x is not quantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from layerwise.kernels import packing, simd
from layerwise.kernels.packing import BLOCK
from layerwise.kernels.rows import compiled

# factors that simd.load_nibbles leaves in the lanes
POWERS = np.array([16.0 ** (lane // 2) for lane in range(BLOCK)], np.float32)


# ----------------------------------------------------------------------------------------------------------- packed W4


@dataclass(frozen=True)
class W4Grouped:
    """4-bit codes with a scale and a zero for each group of consecutive inputs of a row: scale * (code - zero).

    codes: [rows, blocks, 2] uint32; scales: [rows, groups] uint16, the bits of bfloat16; zeros: [rows, groups / 2
    rounded up] uint8, two of 4 bits in a byte; group: inputs of a group, a multiple of 16.
    """

    codes: NDArray[np.uint32]
    scales: NDArray[np.uint16]
    zeros: NDArray[np.uint8]
    group: int
    shape: tuple[int, int]

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> W4Grouped:
        """Pack codes [rows, inputs] in [0, 15], scales [rows, groups] exact in bfloat16, and zeros [rows, groups].

        Raises ValueError for other shapes or values, in one sentence.
        """
        rows, inputs = packing.shape_of(codes)
        if group < 1 or group % BLOCK:
            raise ValueError(f"A group must be a multiple of {BLOCK} inputs. Got {group} instead.")
        packing.check_grid(codes, scales, zeros, (rows, -(-inputs // group)))
        packed = packing.words(packing.padded(codes.numpy(), BLOCK)).reshape(rows, -1, 2)
        return cls(
            packed,
            packing.bfloat16_bits(scales),
            packing.nibbles(packing.padded(zeros.numpy(), 2)),
            group,
            (rows, inputs),
        )

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def dequantised(self) -> NDArray[np.float64]:
        """The weights [rows, inputs] that it represents."""
        rows, inputs = self.shape
        group_of = np.arange(inputs) // self.group
        codes = packing.unpacked(self.codes).reshape(rows, -1)[:, :inputs]
        zeros = packing.unpacked(self.zeros).reshape(rows, -1)
        return packing.from_bfloat16(self.scales)[:, group_of] * (codes - zeros[:, group_of])

    def product(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """[rows], W x for x [inputs]."""
        entries = packing.in_lanes(packing.checked_vector(x, self.shape), self.codes.shape[1])
        sums = packing.group_sums(x, self.group)
        arrays = (self.codes, self.scales, self.zeros)
        return packing.on_threads(
            _w4_grouped_product, arrays, (self.group // BLOCK, entries, sums), self.shape[0], threads
        )


@compiled(fastmath=True)
def _w4_grouped_product(codes, scales, zeros, length, x, sums, y):
    """The sum of a group's code * x is scaled once; its zero costs one product with the sum of x."""
    blocks = codes.shape[1]
    words = codes.reshape(-1)
    for row in range(len(y)):
        sum_of_row, offset = simd.zeros(), np.float32(0)
        for group in range(scales.shape[1]):
            scale = simd.from_bfloat16(scales[row, group])
            zero = (zeros[row, group >> 1] >> (4 * (group & 1))) & 15
            offset += scale * np.float32(zero) * sums[group]
            one, other = simd.zeros(), simd.zeros()  # two sums, so that additions do not wait for each other
            first, last = group * length, min((group + 1) * length, blocks)
            for block in range(first, last - 1, 2):
                word, entry = 2 * (row * blocks + block), BLOCK * block
                one = simd.add(one, simd.mul(simd.load_nibbles(words, word), simd.load(x, entry)))
                word, entry = word + 2, entry + BLOCK
                other = simd.add(other, simd.mul(simd.load_nibbles(words, word), simd.load(x, entry)))
            if (last - first) % 2:
                word, entry = 2 * (row * blocks + last - 1), BLOCK * (last - 1)
                one = simd.add(one, simd.mul(simd.load_nibbles(words, word), simd.load(x, entry)))
            sum_of_row = simd.add(sum_of_row, simd.mul(simd.add(one, other), simd.splat(scale)))
        y[row] = simd.reduce_add(sum_of_row) - offset


# ------------------------------------------------------------------------------------------- packed W4, blocks dropped


@dataclass(frozen=True)
class W4BlockSparse:
    """4-bit codes of the kept 1x16 blocks of each row, each block with its column, scale and zero, as GQSA stores them.

    columns: [rows, kept] uint16, index of the block in its row; codes: [rows, kept, 2] uint32; scales: [rows, kept]
    uint16, the bits of bfloat16; zeros: [rows, kept / 8] uint32, eight per word. Rows are padded with blocks of scale
    zero to the longest row and a multiple of 16 blocks.
    """

    columns: NDArray[np.uint16]
    codes: NDArray[np.uint32]
    scales: NDArray[np.uint16]
    zeros: NDArray[np.uint32]
    shape: tuple[int, int]

    @classmethod
    def pack(cls, codes: Tensor, scales: Tensor, zeros: Tensor, kept: Tensor) -> W4BlockSparse:
        """Pack codes [rows, inputs] in [0, 15]; scales exact in bfloat16, zeros and kept (bool), all [rows, blocks].

        Raises ValueError for other shapes or values, in one sentence.
        """
        rows, inputs = packing.shape_of(codes)
        blocks = -(-inputs // BLOCK)
        packing.check_grid(codes, scales, zeros, (rows, blocks))
        packing.check_bools("Kept", kept, (rows, blocks))
        if blocks > 2**16:
            raise ValueError(f"The column of a block must fit in 16 bits. Got {blocks} blocks in a row instead.")
        where = kept.numpy()
        order = np.argsort(~where, axis=1, kind="stable")  # kept blocks first, in their order
        order = packing.padded(order[:, : where.sum(1).max()], BLOCK)
        real = np.arange(order.shape[1]) < where.sum(1, keepdims=True)
        order = np.where(real, order, 0)

        def of_kept(values: np.ndarray) -> np.ndarray:
            chosen = np.take_along_axis(values, order, 1)
            return np.where(real, chosen, np.zeros((), chosen.dtype))

        runs = packing.words(packing.padded(codes.numpy(), BLOCK)).reshape(rows, blocks, 2)
        return cls(
            order.astype(np.uint16),
            np.stack([of_kept(runs[:, :, word]) for word in range(2)], 2),
            of_kept(packing.bfloat16_bits(scales)),
            packing.words(of_kept(zeros.numpy())).reshape(rows, -1),
            (rows, inputs),
        )

    @property
    def nbytes(self) -> int:
        return self.columns.nbytes + self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def dequantised(self) -> NDArray[np.float64]:
        """The weights [rows, inputs] that it represents, zero in dropped blocks."""
        rows, inputs = self.shape
        codes = packing.unpacked(self.codes).reshape(*self.columns.shape, BLOCK)
        zeros = packing.unpacked(self.zeros).reshape(self.columns.shape)
        values = packing.from_bfloat16(self.scales)[..., None] * (codes - zeros[..., None])
        weight = np.zeros((rows, -(-inputs // BLOCK), BLOCK))
        np.add.at(weight, (np.arange(rows)[:, None], self.columns), values)  # padding adds zeros
        return weight.reshape(rows, -1)[:, :inputs]

    def product(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """[rows], W x for x [inputs]."""
        entries = packing.in_lanes(packing.checked_vector(x, self.shape), -(-self.shape[1] // BLOCK))
        arrays = (self.columns, self.codes, self.scales, self.zeros)
        return packing.on_threads(_w4_block_sparse_product, arrays, (entries, POWERS), self.shape[0], threads)


@compiled(fastmath=True)
def _w4_block_sparse_product(columns, codes, scales, zeros, x, powers, y):
    """Unpacks sixteen scales and zeros at once; then each of the sixteen blocks takes five vector instructions."""
    kept = columns.shape[1]
    words, all_scales, all_zeros = codes.reshape(-1), scales.reshape(-1), zeros.reshape(-1)
    grid = packing.aligned(2 * BLOCK)
    power = simd.load(powers, 0)
    inverse = simd.load(np.float32(1) / powers, 0)
    for row in range(len(y)):
        own = columns[row]
        low, high = simd.zeros(), simd.zeros()  # two sums, so that additions do not wait for each other
        for start in range(0, kept, BLOCK):
            first = row * kept + start
            simd.store(grid, 0, simd.load_bfloat16(all_scales, first))
            simd.store(grid, BLOCK, simd.mul(simd.load_nibbles(all_zeros, first >> 3), inverse))
            for block in range(8):  # also block + 8, whose zero is in the adjacent lane
                for half in (0, 1):
                    number = block + 8 * half
                    zero = simd.mul(power, simd.splat(grid[BLOCK + 2 * block + half]))
                    code = simd.sub(simd.load_nibbles(words, 2 * (first + number)), zero)
                    entry = simd.load(x, BLOCK * np.intp(own[np.uintp(start + number)]))
                    term = simd.mul(simd.mul(code, simd.splat(grid[number])), entry)
                    if half:
                        high = simd.add(high, term)
                    else:
                        low = simd.add(low, term)
        y[row] = simd.reduce_add(simd.add(low, high))


# ----------------------------------------------------------------------------------------------------------------- 2:4


@dataclass(frozen=True)
class Sparse24:
    """Two bfloat16 values for every four consecutive inputs, each with a position of 2 bits.

    values: [rows, halves] uint16, the bits of bfloat16; positions: [rows, halves / 16, 2] uint16, the low bits of
    sixteen positions, then their high bits. Rows are padded to a multiple of 32 inputs.
    """

    values: NDArray[np.uint16]
    positions: NDArray[np.uint16]
    shape: tuple[int, int]

    @classmethod
    def pack(cls, weight: Tensor, mask: Tensor) -> Sparse24:
        """Pack a weight [rows, inputs] exact in bfloat16, and a mask [rows, inputs], True for at most two of four.

        Raises ValueError for other shapes or values, in one sentence.
        """
        rows, inputs = packing.shape_of(weight)
        packing.check_bools("The mask", mask, (rows, inputs))
        kept = packing.padded(mask.numpy(), 2 * BLOCK).reshape(rows, -1, 4)
        if (kept.sum(2) > 2).any():
            raise ValueError("The mask must keep at most two of every four inputs. Got more instead.")
        values = np.where(
            kept, packing.padded(packing.bfloat16_bits(weight), 2 * BLOCK).reshape(kept.shape), np.uint16(0)
        )
        places = np.sort(np.argsort(~kept, axis=2, kind="stable")[:, :, :2], axis=2)
        stored = np.take_along_axis(values, places, 2).reshape(rows, -1)
        bits = places.reshape(rows, -1, 1, BLOCK) >> np.array([0, 1])[:, None] & 1  # [rows, sixteens, 2, 16]
        planes = np.packbits(bits.astype(bool), axis=3, bitorder="little").view("<u2")[..., 0]
        return cls(stored, planes, (rows, inputs))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.positions.nbytes

    def dequantised(self) -> NDArray[np.float64]:
        """The weights [rows, inputs] that it represents."""
        rows, inputs = self.shape
        bits = (self.positions[..., None] >> np.arange(BLOCK, dtype=np.uint16) & 1).astype(np.int64)
        places = (bits[:, :, 0] + 2 * bits[:, :, 1]).reshape(rows, -1, 2)  # [rows, fours, 2]
        weight = np.zeros((rows, places.shape[1], 4))
        np.put_along_axis(weight, places, packing.from_bfloat16(self.values).reshape(places.shape), 2)
        return weight.reshape(rows, -1)[:, :inputs]

    def product(self, x: NDArray[np.float32], threads: int = 1) -> NDArray[np.float32]:
        """[rows], W x for x [inputs]."""
        entries = _candidates(packing.checked_vector(x, self.shape), self.positions.shape[1])
        return packing.on_threads(_sparse24_product, (self.values, self.positions), (entries,), self.shape[0], threads)


@compiled(fastmath=True)
def _candidates(x, sixteens):
    """For each run of sixteen values, the four entries of x to which each could belong, [sixteens, 4, 16] flat."""
    entries = packing.aligned(64 * sixteens)
    entries[:] = 0
    for column in range(len(x)):
        place = 64 * (column // 32) + 16 * (column % 4) + 2 * (column % 32 // 4)
        entries[place] = entries[place + 1] = x[column]
    return entries


@compiled(fastmath=True)
def _sparse24_product(values, positions, x, y):
    sixteens = positions.shape[1]
    all_values = values.reshape(-1)
    for row in range(len(y)):
        one = simd.zeros()
        for part in range(sixteens):
            low, high, start = positions[row, part, 0], positions[row, part, 1], 64 * part
            lower = simd.select(low, simd.load(x, start + 16), simd.load(x, start))
            upper = simd.select(low, simd.load(x, start + 48), simd.load(x, start + 32))
            entry = simd.select(high, upper, lower)
            value = simd.load_bfloat16(all_values, BLOCK * (row * sixteens + part))
            one = simd.add(one, simd.mul(value, entry))
        y[row] = simd.reduce_add(one)
