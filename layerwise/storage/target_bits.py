"""Kept weights and stored bits of a layer at a target, computed from its shape before compression."""

import math

import torch

from layerwise.contract.target import Target
from layerwise.numerics.patterns import kept_counts
from layerwise.storage.bits_per_weight import stored_bits


def kept_of(target: Target, out: int, inputs: int) -> int:
    """Number of weights that a layer [out, inputs] keeps."""
    if target.sparsity == 0:
        return out * inputs
    return int(kept_counts(torch.Size((out, inputs)), target).sum())


def bits_of(target: Target, out: int, inputs: int) -> int:
    """Bits that it takes (bits_per_weight.py), without parts that a method may add: input scales, reordered groups."""
    kept = kept_of(target, out, inputs) / (out * inputs)
    return round(math.fsum(stored_bits(target, kept, out, inputs).values()))
