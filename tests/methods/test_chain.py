"""Chains: what the first method leaves is what the second works on, and its zeros or its grid stay exactly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.checks import layer_cases as layers
from layerwise.checks.layer_cases import grid_of
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Layer, Target
from layerwise.methods.awp import AWP
from layerwise.methods.chain import Chain
from layerwise.methods.rtn import RTN
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.methods.wanda import Wanda
from layerwise.numerics import ops

TARGETS = [
    Target(0.5, bits=4, group=16),
    Target(0.6, "layer", bits=3, group=16),
    Target(pattern="2:4", bits=4, symmetric=True),
    Target(0.5, "1x4", bits=2, group=16),
]
LAYERS = ["correlated", "two blocks of 128", "50 inputs", "dead inputs", "bfloat16 weights", "one output"]
FORGETFUL = '''"""Rounds, and does not do what its card says."""
from dataclasses import dataclass, replace

from layerwise.contract.layer import Compressed, Method
from layerwise.methods.rtn import RTN

CARD = {
    "title": "Forgetful",
    "patterns": ["dense"],
    "bits": [4],
    "updates_weights": True,
    "needs": [],
    "keeps_zeros": True,
    "parameters": {},
}


@dataclass(frozen=True)
class Forgetful(Method):
    def solve(self, layer, target, rng):
        result = RTN().compress(replace(layer, weight=layer.weight + 1), target, rng)
        return CHANGED
'''


def compress(chain: tuple[Any, Any], layer: Layer, target: Target) -> Compressed:
    return Chain(chain).compress(layer, target, torch.Generator())


def on_the_grid(result: Compressed, target: Target) -> Tensor:
    """[out, in] what the codes represent, pruned ones too."""
    return ops.quantised_values(grid_of(result), target)


@pytest.mark.parametrize(
    "chain", [(Wanda(), RTN()), (RTN(), Wanda()), (SparseGPT(), AWP(Wanda())), (AWP(Wanda()), RTN())]
)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", LAYERS)
def test_zeros_are_exact_and_so_are_those_of_the_codes(name: str, target: Target, chain: tuple[Any, Any]):
    if isinstance(chain[0], SparseGPT) and target.block:
        pytest.skip("SparseGPT prunes no blocks")
    result = compress(chain, layers.build(name), target)
    assert result.mask is not None and (result.weight[~result.mask] == 0).all()
    assert torch.equal(on_the_grid(result, target), result.weight)
    assert result.trace == ()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_pruned_first_the_second_rounds_what_is_left(target: Target):
    layer = layers.build("correlated")
    pruned = Wanda().compress(layer, target.pruning, torch.Generator())
    rounded = RTN().compress(replace(layer, weight=pruned.weight), target.grid, torch.Generator())
    result = compress((Wanda(), RTN()), layer, target)
    assert pruned.mask is not None and torch.equal(result.mask, pruned.mask)  # type: ignore[arg-type]
    assert torch.equal(result.weight, rounded.weight)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_quantised_first_the_second_prunes_what_is_rounded(target: Target):
    layer = layers.build("correlated")
    rounded = RTN().compress(layer, target.grid, torch.Generator())
    pruned = Wanda().compress(replace(layer, weight=rounded.weight), target.pruning, torch.Generator())
    result = compress((RTN(), Wanda()), layer, target)
    assert torch.equal(result.weight, pruned.weight)
    assert torch.equal(grid_of(result).scales, grid_of(rounded).scales)


def test_the_orders_differ():
    layer, target = layers.build("correlated"), TARGETS[0]
    first, second = compress((Wanda(), RTN()), layer, target), compress((RTN(), Wanda()), layer, target)
    assert not torch.equal(first.weight, second.weight)


def test_a_method_that_does_both_prunes_where_the_other_quantises():
    layer, target = layers.build("correlated"), TARGETS[0]
    pruned = AWP(Wanda()).compress(layer, target.pruning, torch.Generator())
    assert torch.equal(compress((AWP(Wanda()), RTN()), layer, target).mask, pruned.mask)  # type: ignore[arg-type]
    rounded = AWP(Wanda()).compress(layer, target.grid, torch.Generator())
    result = compress((AWP(Wanda()), Wanda()), layer, target)
    assert torch.equal(grid_of(result).scales, grid_of(rounded).scales)


def test_facts_of_both_methods_are_kept():
    result = compress((SparseGPT(damping=0.1), RTN()), layers.build("correlated"), TARGETS[0])
    assert result.info == {"damping": 0.1}


def test_nothing_asked_is_nothing_changed():
    layer = layers.build("correlated")
    assert torch.equal(compress((Wanda(), RTN()), layer, Target()).weight, layer.weight)


def test_a_chain_from_the_catalogue_passes_parameters_on():
    catalogue, layer, target = Catalogue(), layers.build("correlated"), TARGETS[0]
    masks = []
    for swaps in (0, 3):
        entry = {"chain": [{"sparse_swaps": {"swaps": swaps, "warm_start": "magnitude"}}, "rtn"]}
        method = catalogue.build("chain", catalogue.complete("chain", entry, "test"))
        masks.append(method.compress(layer, target, torch.Generator()).mask)
    magnitude = catalogue.build("magnitude", catalogue.complete("magnitude", {}, "test"))
    start = magnitude.compress(layer, target.pruning, torch.Generator()).mask
    assert start is not None and torch.equal(masks[0], start)
    assert 1 <= int((masks[1] != start).sum()) <= 2 * 3 * len(layer.weight)


BROKEN = {
    "zeros that come back": ("result", ["wanda", "forgetful"]),
    "a grid without a zero": (
        "replace(result, quantised=replace(result.quantised, zeros=result.quantised.zeros + 0.5))",
        ["forgetful", "wanda"],
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_method_that_breaks_its_promise_is_named_by_an_error(kind: str, tmp_path: Path):
    changed, chain = BROKEN[kind]
    (tmp_path / "forgetful.py").write_text(FORGETFUL.replace("CHANGED", changed))
    catalogue = Catalogue([tmp_path])
    method = catalogue.build("chain", catalogue.complete("chain", {"chain": chain}, "test"))
    with pytest.raises(ValueError, match="must keep its zeros on the grid"):
        method.compress(layers.build("correlated"), TARGETS[0], torch.Generator())
