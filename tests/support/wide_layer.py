"""A layer on which the bounds of a search are loose."""

import torch

from layerwise.contract.layer import Gram, Layer


def wide(inputs: int, seed: int) -> Layer:
    """Few directions that many inputs share, so that bounds are loose, two huge inputs, and means that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, inputs + 1).double() ** -0.5
    x = torch.randn(4 * inputs, inputs, generator=generator, dtype=torch.float64) * spectrum
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5 + 0.03
    x[:, :2] *= 20
    return Layer("wide", torch.randn(12, inputs, generator=generator), Gram((x.T @ x / len(x)).float(), len(x)))
