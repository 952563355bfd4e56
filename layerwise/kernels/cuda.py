"""The products of `packed_matvec.py` on CUDA, with Triton.

Import it only if CUDA is available: torch then brings Triton, which is not among the locked packages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from layerwise.kernels.packed_matvec import W4BlockSparse, W4Grouped
from layerwise.kernels.packing import BLOCK


def jit(function: Callable[..., Any]) -> Any:
    """Triton's `jit`, typed so that type checkers accept a launch on a grid."""
    return triton.jit(function)


class OnDevice:
    """A packed weight with its arrays on a device, in the layout described in `packed_matvec.py`."""

    def __init__(self, storage: W4Grouped | W4BlockSparse, device: str = "cuda") -> None:
        self.shape = storage.shape
        self.group = storage.group if isinstance(storage, W4Grouped) else None
        kinds = {"columns": np.int16, "codes": np.int32, "zeros": np.uint8, "scales": np.int16}
        self.arrays = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(storage, name)).view(kind)).to(device)
            for name, kind in kinds.items()
            if hasattr(storage, name)
        }
        self.arrays["scales"] = self.arrays["scales"].view(torch.bfloat16)

    def product(self, x: Tensor) -> Tensor:
        """[rows] float32, W x for x [inputs] float32 on the same device."""
        rows, inputs = self.shape
        y = torch.empty(rows, device=x.device)
        codes, scales, zeros = (self.arrays[name] for name in ("codes", "scales", "zeros"))
        if self.group is None:
            kept = scales.shape[1]
            columns = self.arrays["columns"]
            _w4_block_sparse_product[(rows,)](columns, codes, scales, zeros, x, y, kept, inputs, BLOCK=BLOCK)
        else:
            groups, blocks = scales.shape[1], codes.shape[1]
            # 1024 inputs of a row at a time
            _w4_grouped_product[(rows,)](codes, scales, zeros, x, y, groups, blocks, self.group, inputs, TILE=1024)
        return y


@jit
def _w4_block_sparse_product(columns, codes, scales, zeros, x, y, kept, inputs, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)[None, :]
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, kept, BLOCK):  # rows are padded to a multiple of sixteen blocks
        block = row * kept + start + tl.arange(0, BLOCK)
        column = tl.load(columns + block).to(tl.int32) & 0xFFFF
        scale = tl.load(scales + block).to(tl.float32)
        zero = (tl.load(zeros + block // 2).to(tl.int32) >> (block % 2 * 4).to(tl.int32)) & 15
        word = tl.load(codes + 2 * block[:, None] + lane // 8)
        code = (word >> (lane % 8 * 4)) & 15
        place = column[:, None] * BLOCK + lane
        entry = tl.load(x + place, mask=place < inputs, other=0.0)
        sums += scale[:, None] * (code - zero[:, None]).to(tl.float32) * entry
    tl.store(y + row, tl.sum(sums))


@jit
def _w4_grouped_product(codes, scales, zeros, x, y, groups, blocks, group, inputs, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((TILE,), tl.float32)
    for start in range(0, inputs, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < inputs
        number = place // group
        scale = tl.load(scales + row * groups + number, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(zeros + row * ((groups + 1) // 2) + number // 2, mask=inside, other=0).to(tl.int32)
        zero = (zero >> (number % 2 * 4)) & 15
        word = tl.load(codes + row * (2 * blocks) + place // 8, mask=inside, other=0)
        code = (word >> (place % 8 * 4)) & 15
        entry = tl.load(x + place, mask=inside, other=0.0)
        sums += scale * (code - zero).to(tl.float32) * entry
    tl.store(y + row, tl.sum(sums))
