"""What the products of packed weights share: checks, numbers packed into words, vectors in lanes, rows on threads.

Numbers of 4 bits are packed lowest bits first, as in the file of a compressed model; bfloat16 are kept as uint16.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerwise.kernels.rows import compiled

BLOCK = 16  # inputs per block, and per 64 bits of codes


@compiled()
def aligned(count):
    """Memory for `count` float32, aligned to a cache line: loads across two lines take twice as long."""
    room = np.empty(count + 16, np.float32)
    first = -room.ctypes.data % 64 // 4
    return room[first : first + count]


@compiled()
def in_blocks(x):
    """x [inputs] padded with zeros to blocks of 16."""
    entries = aligned(len(x) + -len(x) % BLOCK)
    entries[: len(x)] = x
    entries[len(x) :] = 0
    return entries


@compiled()
def in_lanes(x, blocks):
    """x [inputs] padded to blocks of 16, each in the order of simd.load_nibbles and divided by its powers."""
    entries = aligned(BLOCK * blocks)
    entries[:] = 0
    for column in range(len(x)):
        code = column % BLOCK
        power = code % 8
        entries[column - code + 2 * power + code // 8] = x[column] * np.float32(1.0 / 16.0**power)
    return entries


@compiled(fastmath=True)
def group_sums(x, length):
    """[groups], the sum of x over each run of `length` entries."""
    sums = np.empty(-(-len(x) // length), np.float32)
    for group in range(len(sums)):
        sums[group] = x[group * length : (group + 1) * length].sum()
    return sums


def on_threads(kernel: Callable, arrays: tuple, others: tuple, rows: int, threads: int) -> NDArray[np.float32]:
    """Run the kernel on one run of rows per thread; each thread writes its part of y [rows]."""
    y = np.empty(rows, np.float32)
    if threads == 1:
        kernel(*arrays, *others, y)
        return y
    bounds = np.linspace(0, rows, threads + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        runs = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        list(pool.map(lambda run: kernel(*(array[run] for array in arrays), *others, y[run]), runs))
    return y


def shape_of(values: Tensor) -> tuple[int, int]:
    """(rows, inputs) of a matrix. Raises ValueError for an empty one and for other tensors."""
    if values.dim() != 2 or not values.numel():
        raise ValueError(f"A weight must be [rows, inputs], with at least one of each. Got {kind(values)} instead.")
    return values.shape[0], values.shape[1]


def check_grid(codes: Tensor, scales: Tensor, zeros: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless codes and zeros are whole numbers in [0, 15], and scales and zeros [shape]."""
    for name, values in (("Scales", scales), ("Zeros", zeros)):
        if values.shape != shape:
            raise ValueError(f"{name} must be [{shape[0]}, {shape[1]}]. Got {kind(values)} instead.")
    for name, values in (("Codes", codes), ("Zeros", zeros)):
        if not ((values >= 0) & (values <= 15) & (values == values.round())).all():
            raise ValueError(f"{name} must be whole numbers from 0 to 15. Got other values instead.")


def check_bools(name: str, values: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless the values are bool [shape]."""
    if values.dtype != torch.bool or values.shape != shape:
        raise ValueError(f"{name} must be bool [{shape[0]}, {shape[1]}]. Got {kind(values)} instead.")


def checked_vector(x: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float32]:
    """x, if it is float32 [inputs] for a weight of this shape; otherwise raises ValueError."""
    if x.dtype != np.float32 or x.shape != shape[1:]:
        raise ValueError(f"The vector must be float32 [{shape[1]}]. Got {x.dtype} {list(x.shape)} instead.")
    return x


def kind(values: Tensor) -> str:
    """Dtype and shape of a tensor, for an error."""
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"


def bfloat16_bits(values: Tensor) -> NDArray[np.uint16]:
    """The bits of values that are exact in bfloat16. Raises ValueError for others."""
    rounded = values.to(torch.bfloat16)
    if not torch.equal(rounded.to(values.dtype), values):
        raise ValueError("Scales and values must be exact in bfloat16, as they are stored. Got other values instead.")
    return rounded.contiguous().view(torch.int16).numpy().view(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    """The values of the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def padded(values: np.ndarray, length: int) -> np.ndarray:
    """[rows, columns] padded with zeros to a multiple of `length` columns."""
    return np.pad(values, ((0, 0), (0, -values.shape[1] % length)))


def nibbles(numbers: np.ndarray) -> NDArray[np.uint8]:
    """Pack numbers [rows, columns] in [0, 15] into [rows, columns / 2] bytes; the first of each pair is in the low
    bits."""
    low, high = numbers[:, ::2].astype(np.uint8), numbers[:, 1::2].astype(np.uint8)
    return np.ascontiguousarray(low | high << 4, np.uint8)


def words(numbers: np.ndarray) -> NDArray[np.uint32]:
    """Pack numbers [rows, columns] in [0, 15] into [rows, columns / 8] words; the first number is in the lowest
    bits."""
    return nibbles(numbers).view("<u4")


def unpacked(packed: np.ndarray) -> NDArray[np.int64]:
    """The numbers that `nibbles` or `words` packed, flat, row by row."""
    octets = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    return np.stack([octets & 15, octets >> 4], 1).reshape(-1).astype(np.int64)
