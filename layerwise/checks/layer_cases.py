"""Layers on which methods are tried: ordinary ones, and all kinds of difficult ones.

A layer is identified by its name and built at every call, so that no tensor is shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from layerwise.contract.layer import Compressed, Gram, Layer, Quantised, Statistics


@dataclass(frozen=True)
class Recipe:
    """A random layer with correlated inputs, two of which are outliers."""

    out: int = 24
    inputs: int = 64
    sequences: int = 8
    length: int = 32  # tokens per sequence
    dead: tuple[int, ...] = ()  # inputs that are zero on every token
    weight_scale: float = 0.05
    input_scale: float = 1.0  # the Gram scales with the square of this
    weights: str = "normal"  # or constant, zero, bfloat16
    correlated: bool = True
    seed: int = 0
    drift: float = 0.0  # relative difference between the inputs in the dense model and the layer's own


ORDINARY = {
    "correlated": Recipe(),
    "two blocks of 128": Recipe(out=10, inputs=160, length=64, seed=1),
}
HARD = {
    "dead inputs": Recipe(dead=(4, 5, 6, 7, 20, 63)),
    "all inputs dead": Recipe(dead=tuple(range(64))),
    "fewer tokens than inputs": Recipe(sequences=2, length=10),
    "one token": Recipe(sequences=1, length=1),
    "one output": Recipe(out=1),
    "one input": Recipe(inputs=1),
    "3 inputs": Recipe(inputs=3),
    "50 inputs": Recipe(inputs=50),  # not a multiple of 4, 8, 16 or 128
    "201 inputs": Recipe(out=6, inputs=201),
    "constant weights": Recipe(weights="constant"),
    "zero weights": Recipe(weights="zero"),
    "bfloat16 weights": Recipe(weights="bfloat16"),
    "weights of 1e-12": Recipe(weight_scale=1e-12),
    "weights of 1e6": Recipe(weight_scale=1e6),
    "Gram of 1e-12": Recipe(input_scale=1e-6),
    "Gram of 1e12": Recipe(input_scale=1e6),
}
LAYERS = {**ORDINARY, **HARD}
# Inputs of a compressed model whose inputs in the dense model are also known, for methods that use both.
DRIFTED = {
    "drifted inputs": Recipe(drift=0.2),
    "drifted inputs, some dead": Recipe(dead=(4, 5, 6, 7, 20, 63), drift=0.2),
    "drifted inputs, fewer tokens than inputs": Recipe(sequences=2, length=10, drift=0.2),
    "drifted inputs, 201 inputs": Recipe(out=6, inputs=201, drift=0.2),
    "drifted inputs, Gram of 1e-12": Recipe(input_scale=1e-6, drift=0.2),
}
# Small enough to try every mask. Two outputs and four inputs if the whole layer is one group.
SMALL_ROWS = {f"3 outputs, 8 inputs, seed {seed}": Recipe(out=3, inputs=8, seed=seed) for seed in range(5)}
SMALL_WHOLE = {f"2 outputs, 4 inputs, seed {seed}": Recipe(out=2, inputs=4, seed=seed) for seed in range(5)}
UNCORRELATED = ", G diagonal"  # suffix of a layer's name: the same layer with its Gram reduced to its diagonal
EQUAL = "equal weights, equal inputs"


def build(name: str) -> Layer:
    """The layer of that name; no tensor is shared between two calls. Raises KeyError for an unknown name."""
    if name == EQUAL:
        return _equal()
    layer = make({**LAYERS, **DRIFTED, **SMALL_ROWS, **SMALL_WHOLE}[name.removesuffix(UNCORRELATED)], name)
    if not name.endswith(UNCORRELATED):
        return layer
    return replace(layer, gram=Gram(torch.diag(layer.gram.diagonal), layer.gram.tokens))


def _equal() -> Layer:
    """All weights are equal, and no method can distinguish two inputs: every choice is a tie."""
    one = torch.ones(64)
    statistics = Statistics(32, one, one, one, torch.ones(32, 64))
    return replace(build("constant weights"), name=EQUAL, gram=Gram(torch.eye(64), 1000), statistics=statistics)


def make(recipe: Recipe, name: str = "layer") -> Layer:
    generator = torch.Generator().manual_seed(recipe.seed)
    weight = recipe.weight_scale * torch.randn(recipe.out, recipe.inputs, generator=generator)
    if recipe.weights == "constant":
        weight = torch.full_like(weight, 0.05)
    elif recipe.weights == "zero":
        weight = torch.zeros_like(weight)
    elif recipe.weights == "bfloat16":
        weight = weight.bfloat16().float()
    size = recipe.inputs
    x = torch.randn(recipe.sequences, recipe.length, size, generator=generator, dtype=torch.float64)
    if recipe.correlated:
        mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
        x = x + 2 * x @ mixing
        x[..., torch.randperm(size, generator=generator)[: min(2, size - 1)]] *= 20
    x = recipe.input_scale * x
    x[..., list(recipe.dead)] = 0
    rows = x.flatten(0, 1)
    gram = Gram((rows.T @ rows / len(rows)).float(), len(rows), *dense_moments(rows, recipe, generator))
    statistics = Statistics(
        recipe.length,
        rows.mean(0).float(),
        rows.abs().mean(0).float(),
        x.var(1, correction=0).mean(0).float(),
        rows[:512].float(),
        x[:512, 0].float(),
    )
    return Layer(name, weight, gram, statistics, fisher=fisher_of(rows, recipe))


def fisher_of(rows: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """[out] float32, as for outputs with gradients of different sizes; one of several outputs has no gradient."""
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    sizes = torch.randn(recipe.out, generator=generator, dtype=torch.float64).exp()
    sizes[1:2] = 0
    return (sizes * rows.square().sum(1).mean()).float()


def dense_moments(rows: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Cross-Gram and second moment of the inputs in the dense model, which differ from rows [tokens, in] by the drift.

    Inputs that are dead in the compressed model are alive in the dense one.
    """
    if not recipe.drift:
        return ()
    size = recipe.inputs
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64) * recipe.input_scale
    turned = rows @ torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    dense = rows + recipe.drift * (noise + turned)
    return tuple((dense.T @ other / len(rows)).float() for other in (rows, dense))


def tensors(layer: Layer) -> dict[str, torch.Tensor]:
    """All tensors passed to a method, by name."""
    found = {"weight": layer.weight, "gram": layer.gram.matrix}
    if layer.gram.apart:
        found |= {"cross": layer.gram.cross, "dense": layer.gram.dense}
    if layer.fisher is not None:
        found["fisher"] = layer.fisher
    if layer.statistics:
        found |= {key: value for key, value in vars(layer.statistics).items() if isinstance(value, torch.Tensor)}
    return found


def grid_of(result: Compressed) -> Quantised:
    """The codes and the grid of a result that must have them."""
    assert result.quantised is not None
    return result.quantised


def regridded(result: Compressed, **parts: object) -> Compressed:
    """The result with other codes, scales, zeros, group_of or input_scale."""
    return replace(result, quantised=replace(grid_of(result), **parts))  # pyright: ignore[reportArgumentType]
