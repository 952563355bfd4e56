"""Each method's cost per layer, from the cards. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerwise.contract.catalogue import Catalogue
from layerwise.contract.method_file import Entry
from layerwise.study.cell import Cell

# A method's card gives its `cost`. A layer's peak memory is `weights` times its weight plus `grams` times its Gram, in
# float32, including weight and Gram themselves. A solution takes as long as `products` products of the two, with the
# default parameters or those of `products_where`; `products_per` are added for each iteration or step above the default
# number, and taken away for each below. The products come from docs/benchmark.md at 2048 x 2048; those of
# alps, admm and of Frank-Wolfe's pairwise step from whole solutions of layers of 576 x 576 to 576 x 1536. Warm
# starts and steps of a chain are added. Weights and Grams come from python -m tests.benchmarks.bench_memory at 4096 x
# 1024, 2048 x 2048 and 1024 x 2560, with 4 iterations; awq's without the first shape, the certificate's and
# Frank-Wolfe's pairwise 2:4 from the first alone. The values of chain and dense are estimates. Comparison with whole
# jobs (bench_streaming: 8 blocks, 2048 wide, vocabulary 32000, bfloat16, 4 sequences of 2048), estimate and peak in MB:
# calibration 1856, 1690; dense 1469, 1415; wanda, shared 1918, 1500; wanda, sequential 2095, 1648; sparsegpt, shared
# 1944, 1726.
CERTIFICATE = (40.0, 16.0, 400.0)


def of_method(catalogue: Catalogue, name: str, params: Mapping[str, Any]) -> tuple[float, float, float]:
    """(weights, grams, products) of a method with complete parameters, including its warm starts or chained methods.

    A method whose card gives no cost counts as the most demanding shipped method.
    """
    own = stated(catalogue[name], params) or most_demanding(catalogue)
    inner = [of_method(catalogue, inside, inside_params) for _, inside, inside_params in catalogue[name].inner(params)]
    w, g = (max(own[i], *(1 + one[i] for one in inner)) if inner else own[i] for i in (0, 1))
    return w, g, own[2] + sum(one[2] for one in inner)


def stated(entry: Entry, params: Mapping[str, Any] | None = None) -> tuple[float, float, float] | None:
    """(weights, grams, products) as the card gives them for complete parameters (default: its own), or None."""
    if entry.cost is None:
        return None
    params = params or entry.defaults
    given = entry.cost.get("products_where", {}).items()
    found = [of[value] for name, of in given if (value := str(params.get(name))) in of]
    if found:
        return entry.cost["weights"], entry.cost["grams"], found[0]
    each = entry.cost.get("products_per", {}).items()
    more = sum(per * (params[name] - entry.defaults[name]) for name, per in each if params.get(name) is not None)
    return entry.cost["weights"], entry.cost["grams"], max(0.0, entry.cost["products"] + more)


def most_demanding(catalogue: Catalogue) -> tuple[float, float, float]:
    """The largest weights, grams and products that a shipped method needs."""
    costs = [cost for entry in catalogue.values() if entry.shipped and (cost := stated(entry))]
    weights, grams, products = (max(column) for column in zip(*costs, strict=True))
    return weights, grams, products


def corrects_drift(catalogue: Catalogue, cell: Cell) -> bool:
    """Whether a cell's method uses the dense model's inputs, so that a block is run again for each of its taps."""
    method = cell.spec["method"]
    return cell.mode != "shared" and "cross_gram" in catalogue.needs(method["name"], method["params"])


def needs_cross(catalogue: Catalogue, cell: Cell) -> bool:
    """Whether a cell's job carries the dense model's activations along with the compressed model's."""
    scored = cell.mode != "shared" and cell.spec.get("asymmetric", False)
    return scored or corrects_drift(catalogue, cell)


def needs_fisher(catalogue: Catalogue, cell: Cell) -> bool:
    """Whether a cell's method needs gradients of the dense model's loss."""
    method = cell.spec["method"]
    return "fisher" in catalogue.needs(method["name"], method["params"])
