"""The products of `storages.py` on CUDA, with Triton. Import it only where CUDA is available: Triton comes with torch
there, and is not among the locked packages."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from layerwise.kernels.packed_matvec import BLOCK, Blocks, Groups


class OnDevice:
    """A storage whose arrays lie on a device; `product` is its W x, with the layout that `storages.py` describes."""

    def __init__(self, storage: Groups | Blocks, device: str = "cuda") -> None:
        self.shape = storage.shape
        self.group = storage.group if isinstance(storage, Groups) else None
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
            _blocks_product[(rows,)](self.arrays["columns"], codes, scales, zeros, x, y, kept, inputs, BLOCK=BLOCK)
        else:
            groups, blocks = scales.shape[1], codes.shape[1]
            # 1024 inputs of a row at a time
            _groups_product[(rows,)](codes, scales, zeros, x, y, groups, blocks, self.group, inputs, TILE=1024)
        return y


@triton.jit
def _blocks_product(columns, codes, scales, zeros, x, y, kept, inputs, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, kept, BLOCK):  # rows are filled up to a multiple of sixteen blocks
        block = row * kept + start + tl.arange(0, BLOCK)
        column = tl.load(columns + block).to(tl.int32) & 0xFFFF
        scale = tl.load(scales + block).to(tl.float32)
        zero = (tl.load(zeros + block // 2).to(tl.int32) >> (block % 2 * 4).to(tl.int32)) & 15
        word = tl.load(codes + 2 * block[:, None] + lane // 8)
        code = (word >> (lane % 8 * 4)) & 15
        place = column[:, None] * BLOCK + lane
        entry = tl.load(x + place, mask=place < inputs, other=0.0)
        total += scale[:, None] * (code - zero[:, None]).to(tl.float32) * entry
    tl.store(y + row, tl.sum(total))


@triton.jit
def _groups_product(codes, scales, zeros, x, y, groups, blocks, group, inputs, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((TILE,), tl.float32)
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
        total += scale * (code - zero).to(tl.float32) * entry
    tl.store(y + row, tl.sum(total))
