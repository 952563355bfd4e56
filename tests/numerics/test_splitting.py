"""The step of ALPS and ADMM against the papers' updates of B, D and V, and its products in float32 against float64."""

from __future__ import annotations

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from layerwise.contract.layer import Target
from layerwise.numerics import ops, splitting
from layerwise.numerics.splitting import Splitting, precision, resolvent_of

LAYER = Target(0.5, "layer")


def problem(outliers: float, tokens: int, inputs: int = 96) -> tuple[Tensor, Tensor]:
    """W [40, in] and A [in, in] float64 with a diagonal of about one; two inputs are so many times as large."""
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(inputs, inputs, generator=rng, dtype=torch.float64)
    mixing *= torch.arange(1, inputs + 1).double().rsqrt()[:, None]  # the spectrum falls by a power
    x = torch.randn(tokens, inputs, generator=rng, dtype=torch.float64) @ mixing
    x[:, :2] *= outliers
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(inputs) * (tokens > inputs)
    norm = damped.diagonal().sqrt()
    return torch.randn(40, inputs, generator=rng, dtype=torch.float64) * norm / norm.mean(), damped / norm / norm[
        :, None
    ]


def begin(weight: Tensor, a: Tensor, rho: float) -> Splitting:
    mask = ops.prune_mask(weight.abs(), LAYER)
    values, vectors = torch.linalg.eigh(a)
    return Splitting(weight, weight * mask, mask, rho, partial(resolvent_of, values.clamp(min=0), vectors))


def in_dtype(dtype: torch.dtype) -> mock._patch:
    return mock.patch.object(splitting, "precision", lambda rho: dtype)


def test_steps_are_the_papers_updates_with_a_penalty_that_changes():
    weight, a = problem(outliers=30.0, tokens=400)
    with in_dtype(torch.float64):
        split = begin(weight, a, 0.1)
        w, g = weight.numpy(), a.numpy()
        b, d, v, rho = w, (weight * split.mask).numpy(), np.zeros_like(w), 0.1
        for penalty in (0.1, 0.1, 0.13, 0.13, 0.026, 5.0, 5e3):
            split.set_penalty(penalty)
            split.step()
            split.mask = ops.prune_mask(split.both.abs(), LAYER)
            rho = penalty
            b = np.linalg.solve(g + rho * np.eye(len(g)), (w @ g - v + rho * d).T).T
            d = (b + v / rho) * split.mask.numpy()
            v = v + rho * (b - d)
            np.testing.assert_allclose(split.weight.numpy(), b, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(split.sparse.numpy(), d, rtol=1e-7, atol=1e-9)
        split.restart(weight * split.mask, split.mask)
        split.step()
        b = np.linalg.solve(g + rho * np.eye(len(g)), (w @ g + rho * w * split.mask.numpy()).T).T
        np.testing.assert_allclose(split.weight.numpy(), b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("outliers", "tokens"), [(1.0, 400), (1e4, 400), (1.0, 20)])
@pytest.mark.parametrize("rho", [1e-5, 0.1, 10.0, 1e3])
def test_float32_has_the_error_of_float64(rho: float, outliers: float, tokens: int):
    """Even with outliers, and where A is singular (20 tokens of 96 inputs, without damping)."""
    weight, a = problem(outliers, tokens)
    losses = []
    for dtype in (torch.float32, torch.float64):
        with in_dtype(dtype):
            split = begin(weight, a, rho)
            for _ in range(30):
                split.step()
                split.mask = ops.prune_mask(split.both.abs(), LAYER)
        assert split.sparse.dtype == dtype
        lost = weight - split.sparse.double()
        losses.append(float(ops.inner(lost @ a, lost).sum()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def balance(split: Splitting, weight: Tensor, a: Tensor) -> float:
    """After a step, by how much rho (B - D + U) differs from (W - B) A, which it equals at the minimum."""
    sparse, multiplier = split.sparse.double(), (split.both - split.sparse).double()
    split.step()
    pull, force = split.rho * (split.weight.double() - sparse + multiplier), (weight - split.weight.double()) @ a
    return float((pull - force).norm() / force.norm())


def test_a_large_penalty_needs_float64():
    """There the distance of B and D is of the size of float32's rounding."""
    assert precision(1e3) == torch.float32 and precision(1.001e3) == torch.float64
    weight, a = problem(outliers=1.0, tokens=400)
    split = begin(weight, a, 500.0)
    assert balance(split, weight, a) < 1e-2 and split.weight.dtype == torch.float32
    split.set_penalty(1e6)
    assert balance(split, weight, a) < 1e-6 and split.weight.dtype == split.both.dtype == torch.float64
    with in_dtype(torch.float32):
        split.set_penalty(1.1e6)
        assert balance(split, weight, a) > 1e-2
    split.set_penalty(5.0)
    assert balance(split, weight, a) < 1e-4 and split.matrix.dtype == torch.float32
