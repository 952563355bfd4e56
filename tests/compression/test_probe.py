"""The method that tries layers for an allocator, where some levels cannot be reached."""

import pytest
import torch

from layerwise.compression.probe import Probe
from layerwise.contract.gram import Gram
from layerwise.contract.layer import Layer
from layerwise.contract.target import Target
from layerwise.methods.wanda import Wanda
from layerwise.runtime.errors import Diverged
from tests.support.typing_helpers import some


class Diverging(Wanda):
    """Wanda, without a finite weight at 60%."""

    def solve(self, layer, target, rng):
        found = super().solve(layer, target, rng)
        if target.sparsity == 0.6:
            found.weight[0, some(found.mask)[0]] = float("nan")
        return found


def probe(target):
    return Probe.of("knapsack", Diverging(), [0.4, 0.5, 0.6, 0.7], target, 0, torch.float32)


def layer():
    rng = torch.Generator().manual_seed(0)
    return Layer("a", torch.randn(4, 20, generator=rng), Gram(torch.eye(20), 10))


def test_a_level_that_diverges_is_left_out_in_that_layer_and_named(capsys):
    assert list(probe(Target(0.5)).errors(layer())) == [0.4, 0.5, 0.7]
    assert capsys.readouterr().err.startswith("a does not get 60% row: knapsack's Diverging broke its contract on a: ")


def test_a_budget_that_diverges_ends_the_job():
    with pytest.raises(Diverged, match="knapsack's Diverging broke its contract on a"):
        probe(Target(0.6)).errors(layer())
