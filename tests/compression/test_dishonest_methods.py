"""Lies that an adapter can tell, each named by the runner with method and layer instead of being published."""

import json
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks import settings
from layerwise.checks.layer_cases import grid_of, regridded
from layerwise.compression import cell, score, verify
from layerwise.compression.score import output_error
from layerwise.compression.solver import Solver
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Gram, Layer, Method, Target
from layerwise.methods.rtn import RTN
from layerwise.numerics import dispatch, ops
from layerwise.runtime.errors import Diverged, InputError
from layerwise.storage.layer_packing import parts_of
from tests.compression.test_verify import BLOCK, DENSE, GRID, JOINT, NM, ROW, honest
from tests.support.typing_helpers import some

Lie = Callable[[Layer, Target, Compressed], Any]


@dataclass(frozen=True)
class Liar(Method):
    """Magnitude pruning, rounded to nearest, of which `lie` makes what it returns."""

    lie: Lie

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        return self.lie(layer, target, honest(layer, target))

    compress = solve  # asked at the dense target too, which the base class keeps from an adapter


def after(act: Callable[[Layer], object]) -> Lie:
    """The honest result, once something was done that must not be."""

    def lie(layer: Layer, target: Target, result: Compressed) -> Compressed:
        act(layer)
        return result

    return lie


def exchange(values: np.ndarray) -> None:
    """Two entries: no sum over all of them changes."""
    values[0, 0], values[1, 2] = values[1, 2], values[0, 0]


def descended(step: float, iterations: int = 60) -> Lie:
    """Gradient descent on the kept weights; with too large a step it diverges."""

    def lie(layer: Layer, target: Target, result: Compressed) -> Compressed:
        weight = result.weight
        for _ in range(iterations):
            weight = torch.where(some(result.mask), weight + step * (layer.weight - weight) @ layer.gram.matrix, 0.0)
        return replace(result, weight=weight)

    return lie


def true_error(layer: Layer, result: Compressed) -> float:
    return output_error(layer, result.weight)[0]


def told(objective: Callable[[float], float]) -> Lie:
    """A trace whose last objective is made of the true one."""

    def lie(layer: Layer, target: Target, result: Compressed) -> Compressed:
        error = true_error(layer, result)
        return replace(result, trace=((0, 0.0, 2 * error), (1, 0.5, objective(error))))

    return lie


def no_finite_weight(layer: Layer, target: Target, result: Compressed) -> Compressed:
    return replace(result, weight=torch.where(some(result.mask), torch.nan, 0.0))


class Named(torch.Tensor):
    """A tensor that is more than one."""


def traced(*rows: Any) -> Lie:
    return lambda layer, target, result: replace(result, trace=rows)


def informed(**info: Any) -> Lie:
    return lambda layer, target, result: replace(result, info=info)


@dataclass(frozen=True)
class Lies:
    target: Target
    lie: Lie
    sentence: str
    mask_only: bool = False
    criterion: str | None = None
    diverged: bool = False


TOLD = "promise 10: "
LIES: dict[str, Lies] = {
    # the inputs
    "exchanges two weights through numpy": Lies(
        ROW,
        after(lambda layer: exchange(layer.weight.numpy())),
        "promise 1: the inputs must be untouched. Got a changed weight",
    ),
    "exchanges two entries of the Gram through numpy": Lies(
        ROW,
        after(lambda layer: exchange(layer.gram.matrix.numpy())),
        "promise 1: the inputs must be untouched. Got a changed gram",
    ),
    "scales the Gram": Lies(
        ROW,
        after(lambda layer: layer.gram.matrix.mul_(0)),
        "promise 1: the inputs must be untouched. Got a changed gram",
    ),
    "writes into the sample": Lies(
        ROW,
        after(lambda layer: some(layer.statistics).sample.zero_()),
        "promise 1: the inputs must be untouched. Got a changed sample",
    ),
    # what comes back
    "nothing": Lies(ROW, lambda *_: None, "liar must return a Compressed on layer. Got NoneType instead"),
    "no tensor": Lies(
        ROW,
        lambda layer, target, r: replace(r, weight=r.weight.numpy()),
        "promise 1: weight must be a torch.Tensor. Got nda",
    ),
    "a subclass of Tensor": Lies(
        ROW,
        lambda layer, target, r: replace(r, weight=r.weight.as_subclass(Named)),
        "promise 1: weight must be a torch.T",
    ),
    "a Parameter": Lies(
        ROW,
        lambda layer, target, r: replace(r, weight=torch.nn.Parameter(r.weight)),
        "promise 1: weight must be a torch.Tensor. Got Parameter instead",
    ),
    "a tensor with a gradient": Lies(
        ROW,
        lambda layer, target, r: replace(r, weight=r.weight.clone().requires_grad_()),
        "promise 1: weight must not require a gradient",
    ),
    "a sparse mask": Lies(
        ROW,
        lambda layer, target, r: replace(r, mask=some(r.mask).to_sparse()),
        "promise 1: mask must be a dense tensor",
    ),
    "the layer's own weight": Lies(
        DENSE, lambda layer, target, r: Compressed(layer.weight), "promise 1: weight must have memory of its own"
    ),
    "a view of the layer's own weight": Lies(
        DENSE, lambda layer, target, r: Compressed(layer.weight.T.T), "promise 1: weight must have memory of its own"
    ),
    "the dense weight with a mask that says pruned": Lies(
        ROW,
        lambda layer, target, r: replace(r, weight=layer.weight.clone()),
        "promise 1: the weight must be zero where the mask is False. Got 768 nonzero entries instead",
    ),
    "a mask of exact counts that is another one": Lies(
        ROW,
        lambda layer, target, r: replace(r, mask=some(r.mask).roll(1, 0)),
        "promise 1: the weight must be zero where the",
    ),
    "a denormal number where the mask is False": Lies(
        ROW,
        lambda layer, target, r: replace(r, weight=torch.where(some(r.mask), r.weight, 1e-45)),
        "promise 1: the weight must be zero where the mask is False. Got 768 nonzero entries instead",
    ),
    "half of what it must prune": Lies(
        NM,
        lambda layer, target, r: honest(layer, Target(pattern="3:4")),
        "promise 2: the kept entries of 2:4 must be e",
    ),
    "codes of eight bits": Lies(
        GRID,
        lambda layer, target, r: honest(layer, Target(bits=8, group=16)),
        "promise 3: codes of 4 bits must lie in [0, 15]",
    ),
    "scales in float64": Lies(
        GRID,
        lambda layer, target, r: regridded(r, scales=grid_of(r).scales.double()),
        "promise 3: scales must be torch.float32. Got torch.float64 instead",
    ),
    "groups that count from the end": Lies(
        GRID,
        lambda layer, target, r: regridded(r, group_of=ops.groups_of(64, 16) - 4),
        "promise 3: group_of must be int64 [64], at least 0. Got torch.int64 [64], least -4 instead",
    ),
    "groups that are no whole numbers": Lies(
        GRID,
        lambda layer, target, r: regridded(r, group_of=ops.groups_of(64, 16).float()),
        "promise 3: group_of must be i",
    ),
    "weights that no code stands for": Lies(
        JOINT,
        lambda layer, target, r: replace(r, weight=torch.where(some(r.mask), layer.weight, 0.0)),
        "promise 3: scales * (codes - zeros) must equal the weight",
    ),
    "updated weights as mask-only": Lies(
        ROW,
        lambda layer, target, r: replace(r, weight=r.weight * (1 + 1e-6)),
        "promise 7: a mask-only method must leave what it keeps unchanged",
        mask_only=True,
    ),
    "blocks, updated, as mask-only": Lies(
        BLOCK, lambda layer, target, r: replace(r, weight=-r.weight), "promise 7: a mask-only method", mask_only=True
    ),
    # what becomes of it
    "raises": Lies(
        ROW,
        lambda layer, target, r: torch.linalg.cholesky(-torch.eye(3)),
        "LinAlgError: linalg.cholesky: The factorization could not be completed",
    ),
    "NaN": Lies(
        ROW,
        no_finite_weight,
        "promise 1: the weight must be finite. Got 768 entries of NaN or Inf instead",
        diverged=True,
    ),
    "a descent with too large a step": Lies(ROW, descended(0.3), "promise 1: the weight must be finite", diverged=True),
    "a descent that has not yet overflown": Lies(
        ROW, descended(4e-3, 8), "liar has diverged on layer: its output_error is", diverged=True
    ),
    "weights for a layer of zeros": Lies(
        ROW,
        lambda layer, target, r: replace(r, weight=some(r.mask).float()),
        "liar has diverged on layer: its output_error is inf",
        diverged=True,
    ),
    # what it says of it
    "a trace that ends below the result's error": Lies(
        ROW, told(lambda e: 0.9 * e), TOLD + "the trace's least error must be that of the result", criterion="error"
    ),
    "a trace that ends above it": Lies(
        ROW, told(lambda e: 1.1 * e), TOLD + "the trace's least error must be that of the result", criterion="error"
    ),
    "a trace on a grid that ends below it": Lies(
        JOINT, told(lambda e: 0.9 * e), TOLD + "the trace's least error must be that of the result", criterion="error"
    ),
    "NaN in the trace": Lies(ROW, told(lambda e: math.nan), TOLD + "the trace must be finite", diverged=True),
    "an infinite trace": Lies(ROW, told(lambda e: math.inf), TOLD + "the trace must be finite", diverged=True),
    "a trace of tensors": Lies(ROW, traced((0, 0.0, torch.tensor(1.0))), TOLD + "the trace must be rows of"),
    "a trace of pairs": Lies(ROW, traced((0, 1.0)), TOLD + "the trace must be rows of"),
    "a trace that goes back": Lies(ROW, traced((1, 0.0, 1.0), (0, 0.1, 1.0)), TOLD + "the iterations of a trace must"),
    "a trace that is a dict": Lies(
        ROW, lambda layer, target, r: replace(r, trace={0: 1.0}), TOLD + "trace and info must be a tuple and a dict"
    ),
    "NaN for damping": Lies(ROW, informed(damping=math.nan), TOLD + "info['damping'] must be a finite number"),
    "a damping below zero": Lies(ROW, informed(damping=-0.01), TOLD + "info['damping'] must be a finite number"),
    "a damping in words": Lies(ROW, informed(damping="0.01"), TOLD + "info['damping'] must be a finite number"),
    "a duality gap without a trace": Lies(ROW, informed(duality_gaps=(0.1,)), TOLD + "info['duality_gaps'] must be"),
    "a duality gap that is NaN": Lies(
        ROW,
        lambda layer, target, r: replace(r, trace=((0, 0.0, 1.0),), info={"duality_gaps": (math.nan,)}),
        TOLD + "the duality gaps must be finite",
        diverged=True,
    ),
    "steps in words": Lies(
        ROW, informed(learned={"steps": "1.0"}), TOLD + "info['learned']['steps'] must be a list of numbers. Got str"
    ),
    "steps of a tensor": Lies(
        ROW, informed(learned={"steps": torch.ones(2)}), TOLD + "info['learned']['steps'] must be a list of numbers"
    ),
    "steps without a name": Lies(ROW, informed(learned=[1.0]), TOLD + "info['learned'] must be a dict. Got list"),
    "a learned step that is NaN": Lies(
        ROW,
        informed(learned={"steps": [1.0, math.nan]}),
        TOLD + "info['learned']['steps'] must be finite",
        diverged=True,
    ),
    # the process
    "seeds torch": Lies(
        ROW,
        after(lambda _: torch.manual_seed(7)),
        "promise 4: global state must be left alone. Got a change of torch's",
    ),
    "draws from torch's generator": Lies(
        ROW, after(lambda _: torch.rand(1)), "promise 4: global state must be left alone"
    ),
    "seeds numpy": Lies(
        ROW, after(lambda _: np.random.seed(7)), "promise 4: global state must be left alone. Got a change of numpy's"
    ),
    "draws from Python's generator": Lies(
        ROW,
        after(lambda _: random.random()),
        "promise 4: global state must be left alone. Got a change of Python's global generator",
    ),
    "another default dtype": Lies(
        ROW,
        after(lambda _: torch.set_default_dtype(torch.float64)),
        "left alone. Got a change of the default dtype instead",
    ),
    "another default device": Lies(
        ROW, after(lambda _: torch.set_default_device("meta")), "left alone. Got a change of the default device instead"
    ),
    "another number of threads": Lies(
        ROW, after(lambda _: torch.set_num_threads(torch.get_num_threads() + 1)), "a change of the number of threads"
    ),
    "gradients": Lies(
        ROW,
        after(lambda _: torch.set_grad_enabled(not torch.is_grad_enabled())),
        "left alone. Got a change of whether gradients are recorded instead",
    ),
    "products of another precision": Lies(
        ROW, after(lambda _: torch.set_float32_matmul_precision("medium")), "a change of the precision of products"
    ),
    "a score of its own": Lies(
        ROW,
        after(lambda _: setattr(score, "output_error", lambda layer, weight: (0.0, 0.0))),
        "promise 4: global state must be left alone. Got a change of the runner's code instead",
    ),
    "a judge of its own": Lies(
        ROW, after(lambda _: setattr(verify, "_masked", lambda *_: None)), "a change of the runner's code"
    ),
}


@pytest.fixture
def left_alone():
    """The process as it was, whatever an adapter has done to it."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    settings = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    precision, judges = torch.get_float32_matmul_precision(), (score.output_error, verify._masked)
    yield
    torch.set_default_device(None)
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    torch.set_default_dtype(settings[0])
    torch.set_num_threads(settings[1])
    torch.set_grad_enabled(settings[2])
    torch.set_float32_matmul_precision(precision)
    score.output_error, verify._masked = judges


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_named_with_its_method_and_layer(name: str, left_alone):
    case = LIES[name]
    layer = layers.make(replace(layers.ORDINARY["correlated"], weights="zero" if "zeros" in name else "normal"))
    solver = Solver("liar", Liar(case.lie), case.target, 0, mask_only=case.mask_only, criterion=case.criterion)
    with pytest.raises(InputError) as caught:
        solver.solve(layer)
    sentence = str(caught.value)
    assert case.sentence in sentence, sentence
    assert "liar" in sentence and "layer" in sentence and "\n" not in sentence
    assert isinstance(caught.value, Diverged) == case.diverged


def expanded(layer: Layer, target: Target, result: Compressed) -> Compressed:
    """The same numbers in another layout."""
    return replace(result, weight=result.weight.T.contiguous().T, mask=some(result.mask).T.contiguous().T)


def minus_zero(layer: Layer, target: Target, result: Compressed) -> Compressed:
    return replace(result, weight=torch.where(some(result.mask), result.weight, -0.0))


def fewer(layer: Layer, target: Target, result: Compressed) -> Compressed:
    """A kept weight may be zero: achieved_sparsity counts it."""
    return replace(result, weight=result.weight.clone().index_fill_(0, torch.tensor([0]), 0.0))


def with_trace(layer: Layer, target: Target, result: Compressed) -> Compressed:
    return told(lambda error: error)(layer, target, result)


def warning(layer: Layer, target: Target, result: Compressed) -> Compressed:
    warnings.warn("a warning", stacklevel=3)  # of the runner, in which Python notes it
    return result


def in_numpy(layer: Layer, target: Target, result: Compressed) -> Compressed:
    error = true_error(layer, result)
    trace = ((np.int64(0), np.float32(0), np.float64(error)),)
    return replace(result, trace=trace, info={"damping": np.float32(0.5), "duality_gaps": (np.float32(0),)})


@pytest.mark.filterwarnings("ignore:a warning")
@pytest.mark.parametrize("lie", [expanded, minus_zero, fewer, with_trace, warning, in_numpy])
def test_odd_but_valid_input_is_accepted(lie: Lie):
    layer = layers.build("correlated")
    result, row = Solver("odd", Liar(lie), ROW, 0, criterion="error").solve(layer)
    assert row["output_error"] == output_error(layer, result.weight)[1]
    assert row["achieved_sparsity"] == (0.5 + 32 / 1536 if lie is fewer else 0.5)
    assert json.dumps([row, cell.trace_rows(result)])


def test_no_method_of_the_catalogue_is_named():
    """With the trace held to the result's error, kept weights to the layer's, and global state to what it was."""
    catalogue = Catalogue()
    for name, entry in catalogue.items():
        params = catalogue.complete(name, settings.defaults(entry), "the test")
        method = catalogue.build(name, params)
        for target in (ROW, NM, GRID, JOINT):
            if not catalogue.refusal(name, params, target):
                mask_only = entry.comparison(target) == "mask-only"
                solver = Solver(name, method, target, 0, mask_only=mask_only, criterion=entry.criterion)
                for compiled in (True, False):
                    with dispatch.reference() if not compiled else torch.no_grad():
                        solver.solve(layers.build("correlated"))


def test_the_score_is_that_of_the_weight_in_the_models_dtype():
    """SparseGPT's updated weights are stored and evaluated in bfloat16 where the model is, and so they are scored."""
    layer, method = layers.build("correlated"), Catalogue().build("sparsegpt", {})
    (_, full), (stored, half) = (Solver("sparsegpt", method, ROW, 0, dtype).solve(layer) for dtype in DTYPES)
    assert torch.equal(stored.weight, stored.weight.bfloat16().float())
    assert half["output_error"] == output_error(layer, stored.weight)[1] != full["output_error"]
    assert half["output_error"] == pytest.approx(full["output_error"], rel=0.01)


DTYPES = (torch.float32, torch.bfloat16)


def test_weights_beyond_float16_are_named():
    layer = replace(layer := layers.build("correlated"), weight=1e5 * layer.weight / layer.weight.abs().max())
    method = Catalogue().build("magnitude", {})
    with pytest.raises(Diverged, match="liar gives layer weights beyond float16: use dtype: bfloat16 or float32"):
        Solver("liar", method, ROW, 0, torch.float16).solve(replace(layer, name="layer"))
    Solver("liar", method, ROW, 0, torch.bfloat16).solve(layer)


def test_a_gram_that_is_no_second_moment_is_named():
    layer = layers.build("correlated")
    gram = layer.gram.matrix - 0.1 * float(layer.gram.largest_eigenvalue) * torch.eye(64)
    with pytest.raises(Diverged, match="The Gram of correlated has negative eigenvalues that rounding does not"):
        Solver("liar", Liar(after(lambda _: None)), ROW, 0).solve(replace(layer, gram=Gram(gram, 100)))


@pytest.mark.parametrize("fault", ["dense of half the inputs", "cross 100 times as large"])
def test_a_cross_gram_that_no_inputs_have_is_named(fault: str):
    """Of such a pair the squared asymmetric error is below zero; it was shown as a perfect 0."""
    layer = layers.make(layers.Recipe(out=12, inputs=64, drift=0.1), "drifted")
    gram = layer.gram
    rounded = Solver("rtn", RTN(), Target(bits=4, group=16), 0)
    assert 0 < rounded.solve(layer)[1]["asymmetric_error"] < 0.1
    cross, dense = (gram.cross, gram.dense / 4) if "half" in fault else (100 * gram.matrix, gram.dense)
    with pytest.raises(Diverged, match="The cross-Gram of drifted must be of the same inputs as its two Grams"):
        rounded.solve(replace(layer, gram=Gram(gram.matrix, gram.tokens, cross, dense)))


def test_a_reference_to_an_earlier_result_changes_nothing_that_is_stored():
    """Of a target that changes nothing the weight itself is stored: it must be a copy."""
    result = Compressed(torch.ones(2, 2))
    parts = parts_of(result, DENSE, torch.float32)
    result.weight.zero_()
    assert bool((parts[""] == 1).all())
