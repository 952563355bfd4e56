"""Random-signed block Hadamard transforms of a layer's inputs: W X = (W Q)(Q^T X) with Q orthogonal.

Q = D H: D has random signs on its diagonal. H is block-diagonal, and each block is a Hadamard matrix in Sylvester's
order divided by the root of its length. It is applied by sums and differences in float64, so that a result depends
neither on other rows nor on the device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from layerwise.contract.gram import Gram
from layerwise.contract.layer import Rotation

# Constants of SplitMix64 (Steele, Lea and Flood), whose outputs are the same on every machine and in every language.
STEP, FIRST, SECOND = (np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def block_of(inputs: int, largest: int | None = None) -> int:
    """The largest power of two that divides `inputs` and is at most `largest`, if that is given."""
    block = inputs & -inputs
    while largest is not None and block > largest:
        block //= 2
    return block


def signs(seed: int, inputs: int) -> Tensor:
    """[in] float64, 1 or -1: -1 where the highest bit of the input's SplitMix64(seed) output is set."""
    state = np.uint64(seed) + STEP * np.arange(1, inputs + 1, dtype=np.uint64)
    state = (state ^ (state >> np.uint64(30))) * FIRST
    state = (state ^ (state >> np.uint64(27))) * SECOND
    state = state ^ (state >> np.uint64(31))
    return torch.from_numpy(np.where(state >> np.uint64(63), -1.0, 1.0))


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., in] float64 times the block Hadamard matrix of runs of `block` inputs, which is its own inverse."""
    shape, length = x.shape, 1
    while length < block:
        pairs = x.reshape(*shape[:-1], -1, 2, length)
        first, second = pairs.unbind(-2)
        x = torch.stack([first + second, first - second], -2)
        length *= 2
    return x.reshape(shape) / block**0.5


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x Q [..., in] in float64, for x [..., in]."""
    return hadamard(x.double() * signs(rotation.seed, x.shape[-1]).to(x.device), rotation.block)


def rotate_back(x: Tensor, rotation: Rotation) -> Tensor:
    """x Q^T [..., in] in float64, for x [..., in]."""
    return hadamard(x.double(), rotation.block) * signs(rotation.seed, x.shape[-1]).to(x.device)


def rotated_gram(gram: Gram, rotation: Rotation) -> Gram:
    """The Gram of the rotated inputs, Q^T G Q; computed once for all layers that share the inputs.

    If the dense model's inputs are known, they are rotated too: the cross-Gram is Q^T C Q.
    """

    def turned(matrix: Tensor) -> Tensor:
        half = rotate(matrix, rotation)  # G Q
        return rotate(half.T, rotation).T

    def compute() -> Gram:
        matrix, *dense = map(turned, (gram.matrix, *((gram.dense,) if gram.apart else ())))
        symmetric = [((own + own.T) / 2).float() for own in (matrix, *dense)]
        if not gram.apart:
            return Gram(symmetric[0], gram.tokens, drifted=not gram.knows_dense)
        return Gram(symmetric[0], gram.tokens, turned(gram.cross).float().contiguous(), symmetric[1])

    return gram.once(("rotated", rotation), compute)
