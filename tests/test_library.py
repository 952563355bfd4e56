"""The library as a user calls it: against brute force, plain formulas, a forward pass and the workflow's own cells."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import layerwise
from layerwise import Gram, InputError, Layer, Target, UnsupportedTarget
from layerwise.calibration import fisher
from layerwise.checks import layer_cases
from layerwise.checks.brute_force import best_error
from layerwise.compression.model import calibration_tokens
from layerwise.contract.catalogue import Catalogue
from layerwise.methods.awp import AWP
from layerwise.methods.awq import AWQ
from layerwise.methods.chain import Chain
from layerwise.methods.code_swaps import CodeSwaps
from layerwise.methods.fwsvd import FWSVD
from layerwise.methods.gptaq import GPTAQ
from layerwise.methods.gptq import GPTQ
from layerwise.methods.qronos import Qronos
from layerwise.methods.rocket import ROCKET
from layerwise.methods.rotated import Rotated
from layerwise.methods.rtn import RTN
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.methods.turboquant import TurboQuant
from layerwise.models.structure import model_linears
from layerwise.sources.tokens import tokens as drawn_tokens
from tests.compression.test_cell import LENGTH, SAMPLES, Case, rows, weights
from tests.support.model_families import build, tokens
from tests.support.paths import ROOT

FAULTY = '''"""Magnitude pruning that fails one layer."""

from dataclasses import dataclass

from layerwise.contract.layer import Method
from layerwise.numerics import ops

CARD = {
    "title": "Faulty",
    "patterns": ["row", "n:m"],
    "bits": [],
    "updates_weights": False,
    "needs": [],
    "parameters": {"share": {"type": "number", "minimum": 0}},
}


@dataclass(frozen=True)
class Faulty(Method):
    share: float = 1.0

    def solve(self, layer, target, rng):
        if layer.name.endswith("layers.1.mlp.up_proj"):
            raise RuntimeError("it is late")
        return ops.pruned(layer, layer.weight.abs() * self.share, target)
'''


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------------------- package


def test_the_import_and_the_cards_load_no_torch():
    loaded = "{name for name in ('torch', 'transformers', 'pandas') if name in sys.modules}"
    code = f"import sys, layerwise; assert not {loaded}; layerwise.Target.parse('2:4'); layerwise.InputError; "
    code += f"layerwise.__version__; len(layerwise.methods()); assert not {loaded}; layerwise.Gram; print({loaded})"
    assert "'torch'" in run(code)


def test_every_name_is_there_and_documented():
    assert set(layerwise.__all__) <= set(dir(layerwise))
    for name in layerwise.__all__:
        assert getattr(layerwise, name), name
        assert name == "__version__" or inspect.getdoc(getattr(layerwise, name)), name
    assert re.fullmatch(r"\d+(\.\d+)*.*", layerwise.__version__)
    with pytest.raises(AttributeError, match="module 'layerwise' has no attribute 'compres'"):
        layerwise.compres  # noqa: B018


def test_methods_are_a_function_beside_their_folder():
    code = "import layerwise; first = repr(layerwise.methods()); import layerwise.methods.random as random; "
    code += "from layerwise.methods import rtn; assert layerwise.methods.random is random; "
    code += "assert repr(layerwise.methods()) == first; print(len(layerwise.methods()))"
    assert int(run(code)) == len(list((ROOT / "methods").glob("*.py")))


def test_methods_of_further_folders(tmp_path: Path):
    source = (ROOT / "methods/magnitude.py").read_text("utf-8")
    (tmp_path / "smallest.py").write_text(source, "utf-8")
    assert all("smallest" in [card.name for card in layerwise.methods(own)] for own in (str(tmp_path), [tmp_path]))


def test_a_card_of_the_table():
    table = layerwise.methods()
    assert [card.name for card in table] == sorted(card.name for card in table)
    gptq = table["gptq"]
    assert (gptq.title, gptq.arxiv, gptq.bits) == ("GPTQ", "2210.17323", (2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4"))
    defaults = {own.name: own.default for own in gptq.parameters}
    assert defaults["blocksize"] == 128 and "damping = 0.01: Added to the Gram" in repr(gptq)
    assert re.search(r"^gptq +GPTQ +dense +2-8, nvfp4, mxfp4 +yes +gram +blocksize=128", repr(table), re.MULTILINE)
    with pytest.raises(KeyError, match="A method must be one of admm, .*Got 'gptk' instead .did you mean 'gptq'"):
        table["gptk"]


def test_no_parameter_of_a_method_is_hidden_by_an_argument():
    taken = {name for own in (layerwise.compress_layer, layerwise.compress_model) for name in parameters(own)}
    assert not {(card.name, own.name) for card in layerwise.methods() for own in card.parameters if own.name in taken}


def parameters(function: Any) -> list[str]:
    return [name for name, own in inspect.signature(function).parameters.items() if own.kind != own.VAR_KEYWORD]


def test_the_documented_code_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), names)
    assert len(blocks[0].strip().splitlines()) <= 6 and "LayerResult(sparsegpt to 2:4" in capsys.readouterr().out
    for layer in model_linears(names["model"]).values():
        assert float((layer.stored() == 0).float().mean()) >= 0.5


# ------------------------------------------------------------------------------------------------------------- targets

PATTERNS = st.one_of(
    st.builds(
        lambda share, pattern: {"sparsity": share / 10_000, "pattern": pattern},
        st.integers(1, 9_999),
        st.one_of(st.sampled_from(["row", "layer"]), st.integers(1, 512).map("1x{}".format)),
    ),
    st.integers(2, 64).flatmap(lambda m: st.integers(1, m - 1).map(lambda n: {"pattern": f"{n}:{m}"})),
    st.just({}),
)
RANKS = st.one_of(st.just({}), st.integers(1, 9_999).map(lambda share: {"rank": share / 10_000}))
GRIDS = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"bits": st.integers(2, 8), "group": st.none() | st.integers(1, 4096), "symmetric": st.booleans()}
    ),
)


@given(PATTERNS, GRIDS, RANKS)
def test_a_label_is_read_as_the_target_that_it_is_of(pattern: dict, grid: dict, rank: dict):
    target = Target(**pattern, **grid, **rank)
    assert Target.parse(target.label) == target


@given(st.floats(0, 0.999, exclude_min=True), st.sampled_from(["row", "layer", "1x16"]))
def test_a_label_that_drops_digits_is_read_literally(sparsity: float, pattern: str):
    label = Target(sparsity, pattern).label
    read = Target.parse(label)
    assert read.label == label and read.sparsity == pytest.approx(sparsity, rel=1e-5)


def test_a_third_is_read_digit_by_digit():
    assert Target(1 / 3).label == "33.3333% row"
    assert Target.parse("33.3333% row").sparsity == 0.333333
    assert Target.parse(" 2:4  4b   g128 ") == Target(pattern="2:4", bits=4, group=128)
    assert Target.parse("nvfp4 g16") == Target(format="nvfp4")  # its own group


LABELS = [
    "",
    "60%",
    "row",
    "60 % row",
    "60%row",
    "-5% row",
    "2:44b",
    "4b 2:4",
    "4b sym g128",
    "dense 4b",
    "b",
    "nan% row",
]


@pytest.mark.parametrize("label", [*LABELS, 4, None])
def test_an_invalid_label_is_one_sentence(label: Any):
    with pytest.raises(ValueError, match=r"^A target's label must be like '60% row'.* Got .* instead\."):
        Target.parse(label)


@pytest.mark.parametrize("label", ["60%", "60 % row", "60% rows", " 60%  4b", "60%row"])
def test_a_share_without_a_pattern_is_told_of_patterns(label: str):
    with pytest.raises(ValueError) as caught:
        Target.parse(label)
    told = f"Got {label!r} instead. A sparsity needs a pattern, such as '60% row' or '60% layer'."
    assert str(caught.value).endswith(told)


@pytest.mark.parametrize("label", ["60% row 4 bits", "60% 1x16 1x16", "4 bits"])
def test_other_faults_of_a_label_are_not_told_of_patterns(label: str):
    with pytest.raises(ValueError, match=r"^A target's label must be .* Got '[^']+' instead\.$"):
        Target.parse(label)


@pytest.mark.parametrize("label", ["100% row", "9b", "4:4", "4b g0", "nvfp4 g32", "nvfp4 sym", "mxfp4 g32 sym"])
def test_an_impossible_target_has_no_label(label: str):
    with pytest.raises(ValueError, match=r"^Target\..* Got .* instead\.$"):
        Target.parse(label)


# --------------------------------------------------------------------------------------------------------------- Grams


@pytest.mark.parametrize("shape", [(1, 3), (5000, 6), (3, 7, 6), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gram_is_the_mean_of_products(shape: tuple[int, ...], dtype: torch.dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = x.double().numpy().reshape(-1, shape[-1])
    gram = Gram.from_inputs(x)
    assert gram.tokens == len(flat) and gram.matrix.dtype == torch.float32
    np.testing.assert_allclose(gram.matrix.numpy(), flat.T @ flat / len(flat), rtol=1e-5, atol=1e-6)
    assert torch.equal(gram.matrix, gram.matrix.T)


def test_a_gram_keeps_what_float32_sums_lose():
    """Half a million small squares beside a few large ones, in units of which each run of them is nothing."""
    x = torch.ones(2**19 + 2**12, 2)
    x[: 2**12] = 2**13
    expected = (2**38 + 2**19) / len(x)
    assert float(Gram.from_inputs(x).matrix[0, 1]) == pytest.approx(expected, rel=1e-7)


def test_calibrate_gives_the_same_gram_and_plain_statistics():
    x = torch.randn(5, 900, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gram, statistics = layerwise.calibrate(x)
    plain = x.detach().double().numpy()
    assert torch.equal(gram.matrix, Gram.from_inputs(x).matrix) and gram.tokens == 4500 and statistics.length == 900
    assert not gram.matrix.requires_grad
    np.testing.assert_allclose(statistics.mean, plain.mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(statistics.absmean, abs(plain).mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(statistics.sequence_variance, plain.var(1).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(statistics.sample, plain.reshape(-1, 12)[::8][:512])
    np.testing.assert_array_equal(statistics.first_tokens, plain[:, 0])


X = torch.ones(4, 3)
WRONG_INPUTS = {
    "x must be floating point. Got torch.int64 instead.": X.long(),
    "x must be a tensor [tokens, in] or [..., in] that is not empty. Got [3] instead.": X[0],
    "x must be a tensor [tokens, in] or [..., in] that is not empty. Got [0, 3] instead.": X[:0],
    "x must be a tensor [tokens, in] or [..., in] that is not empty. Got ndarray instead.": X.numpy(),
    "x must be finite, and so must its squares in float32. Got NaN or Inf instead.": X / 0,
    "x must be a dense tensor that holds values. Got torch.sparse_coo instead.": X.to_sparse(),
    "x must be a dense tensor that holds values. Got a tensor on the meta device instead.": X.to("meta"),
    "x must be finite, and so must its squares in float32. Got squares beyond float32 instead.": X * 1e30,
}


@pytest.mark.parametrize("sentence", WRONG_INPUTS)
def test_wrong_inputs_are_one_sentence(sentence: str):
    with pytest.raises(ValueError) as caught:
        Gram.from_inputs(WRONG_INPUTS[sentence])
    assert str(caught.value) == sentence
    with pytest.raises(ValueError, match=r"x must be .* Got .* instead\.$"):
        x = WRONG_INPUTS[sentence]
        layerwise.calibrate(x[None] if isinstance(x, torch.Tensor) else x)


# --------------------------------------------------------------------------------------------------------------- layers


def small(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W [3, 8] and correlated inputs [40, 8]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    return torch.randn(3, 8, generator=generator), x


@pytest.mark.parametrize("target", ["2:4", "50% row", "25% row"])
def test_no_mask_beats_the_bound_and_no_method_beats_brute_force(target: str):
    weight, x = small()
    gram, goal = Gram.from_inputs(x), Target.parse(target)
    layer = Layer("layer", weight, gram)
    best, refitted = best_error(layer, goal, refit=False), best_error(layer, goal, refit=True)
    bound = layerwise.lower_bound(weight, gram, target)
    assert 0 < bound.output_error <= best
    masked = layerwise.compress_layer(weight, gram, target, "sparse_swaps", warm_start="wanda")
    assert best * (1 - 1e-9) <= masked.output_error <= 1.5 * best
    updated = layerwise.compress_layer(weight, gram, target, "sparsegpt")
    assert refitted * (1 - 1e-9) <= updated.output_error
    whole = float(torch.trace(weight.double() @ gram.matrix.double() @ weight.double().T))
    assert bound.absolute_error == pytest.approx(bound.output_error * whole, rel=1e-12)
    assert updated.absolute_error == pytest.approx(updated.output_error * whole, rel=1e-12)


def test_the_bound_of_a_rank_is_reached():
    weight, x = small()
    gram = Gram.from_inputs(x)
    bound = layerwise.lower_bound(weight, gram, "rank 60%")
    best = layerwise.compress_layer(weight, gram, "rank 60%", "svd_llm")
    plain = layerwise.compress_layer(weight, gram, "rank 60%", "svd")
    assert bound.gap == 0 and bound.output_error == pytest.approx(best.output_error, rel=1e-4)
    assert bound.output_error <= best.output_error < plain.output_error
    assert best.compressed.low_rank is not None and best.compressed.low_rank.left.shape == (3, 1)
    assert best.bits_per_weight == 16 * 11 / 24 <= 16 * 0.6


def of_a_rank() -> list[tuple[str, str]]:
    """Every method that gives factors, with its defaults, at each kind of target."""
    catalogue = Catalogue()
    targets = ("rank 10%", "50% row rank 10%", "4b rank 10%")
    full = {name: catalogue.complete(name, {}, "test") for name in catalogue if name != "chain"}
    found = [(n, t) for n, own in full.items() for t in targets if not catalogue.refusal(n, own, Target.parse(t))]
    assert len(found) >= 7
    return found


@pytest.mark.parametrize(("name", "target"), of_a_rank())
def test_a_rank_of_zero_is_one_sentence(name: str, target: str):
    """10% of [3, 8] are .2 columns and rows."""
    weight, x = small()
    gram, statistics = layerwise.calibrate(x[None])
    with pytest.raises(UnsupportedTarget) as caught:
        layerwise.compress_layer(weight, gram, target, name, statistics=statistics, fisher=torch.ones(3))
    told = f"The rank of {target} must be at least 1 in every layer. Got 0 in the layer [3, 8] instead."
    assert str(caught.value) == told


def test_rocket_is_refused_a_rank_of_zero_by_its_own_count():
    """46% of [3, 8] are 11.04 entries: one column and row, but no place for three bits of positions."""
    weight, x = small()
    gram = Gram.from_inputs(x)
    assert Target(rank=0.46).rank_of(3, 8) == 1
    assert layerwise.compress_layer(weight, gram, "rank 46%", "svd").bits_per_weight == 16 * 11 / 24
    with pytest.raises(
        UnsupportedTarget, match=r"The rank of rank 46% must be at least 1 .* Got 0 in the layer \[3, 8"
    ):
        layerwise.compress_layer(weight, gram, "rank 46%", "rocket")
    assert layerwise.compress_layer(weight, gram, "rank 47%", "rocket").bits_per_weight == (16 * 11 + 3) / 24


def test_a_fisher_is_needed_and_looked_at():
    weight, x = small()
    gram = Gram.from_inputs(x)
    cases = {
        "fisher must be given: fwsvd needs the mean squared gradients of the model's loss, summed over each row of the "
        "weight. Got None instead.": None,
        "fisher must be [out] = [3]. Got [8] instead.": torch.ones(8),
        "fisher must be a tensor [out]. Got list instead.": [1.0, 1.0, 1.0],
        "fisher must be torch.float32. Got torch.float64 instead.": torch.ones(3).double(),
        "fisher must be finite. Got NaN or Inf instead.": torch.ones(3) / 0,
        "fisher must be at least 0, because it is a sum of squares. Got -1 instead.": -torch.ones(3),
    }
    for sentence, own in cases.items():
        with pytest.raises(ValueError) as caught:
            layerwise.compress_layer(weight, gram, "rank 60%", "fwsvd", fisher=own)  # pyright: ignore[reportArgumentType]
        assert str(caught.value) == sentence
    fisher = torch.tensor([1.0, 0.0, 4.0])
    result = layerwise.compress_layer(weight, gram, "rank 60%", "fwsvd", fisher=fisher)
    u, sizes, v = np.linalg.svd((weight * fisher.sqrt()[:, None]).double().numpy(), full_matrices=False)
    kept = (u[:, :1] * sizes[:1] @ v[:1])[[0, 2]] / np.array([[1.0], [2.0]])
    np.testing.assert_allclose(result.weight[[0, 2]].numpy(), kept, atol=1e-3)  # factors in 16 bits


def test_a_convention_that_the_runner_refuses_is_one_sentence():
    weight, x = small()
    asked: list[tuple[Any, dict[str, Any]]] = [
        ("rocket", {"convention": "official"}),
        (ROCKET(convention="official"), {}),
    ]
    for method, parameters in asked:
        with pytest.raises(
            UnsupportedTarget, match=r"^rocket's convention official counts no positions, .* instead\.$"
        ):
            layerwise.compress_layer(weight, Gram.from_inputs(x), "rank 60%", method, **parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_error_is_that_of_the_outputs(dtype: torch.dtype):
    weight, x = small(2)
    linear = torch.nn.Linear(8, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    before, gram = linear.weight.detach().clone(), Gram.from_inputs(x)
    result = layerwise.compress_layer(linear, gram, "2:4", "wanda")
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad
    assert result.weight.dtype == dtype and not result.weight.requires_grad
    full, lost = (x.double() @ w.double().T for w in (before, before - result.weight))
    expected = float((lost**2).sum() / (full**2).sum())
    assert result.output_error == pytest.approx(expected, rel=1e-5)
    assert layerwise.output_error(before, result.weight, gram) == pytest.approx(expected, rel=1e-5)
    metric = (before.float().abs() * gram.matrix.diagonal().sqrt()).reshape(3, 2, 4)
    kept = metric >= metric.sort(-1, descending=True).values[..., 1:2]
    assert result.mask is not None and torch.equal(result.mask, kept.reshape(3, 8))
    assert torch.equal(result.weight, torch.where(result.mask, before, 0)) and result.achieved_sparsity == 0.5


def test_a_result_in_words():
    weight, x = small()
    result = layerwise.compress_layer(weight, Gram.from_inputs(x), "2:4", "sparsegpt")
    words = (
        r"LayerResult\(sparsegpt to 2:4, weight \[3, 8\] float32: output_error 0\.\d+, 50% zeros, \S+ bits per weight, "
    )
    assert re.fullmatch(words + r"\S+ s, damping 0.01\)", repr(result)) and result.trace == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.seconds = 0.0  # type: ignore[misc]


def test_a_method_is_a_name_an_entry_a_file_or_an_instance(tmp_path: Path):
    layer = layer_cases.build("correlated")
    weight, gram = layer.weight, layer.gram

    def compress(method: Any, **given: Any) -> torch.Tensor:
        return layerwise.compress_layer(weight, gram, "2:4", method, **given).weight

    expected = SparseGPT(damping=0.1).compress(layer, Target(pattern="2:4"), torch.Generator()).weight
    ways = [("sparsegpt", {"damping": 0.1}), ({"sparsegpt": {"damping": 0.1}}, {}), (SparseGPT(damping=0.1), {})]
    ways += [(ROOT / "methods/sparsegpt.py", {"damping": 0.1}), (str(ROOT / "methods/sparsegpt.py"), {"damping": 0.1})]
    assert all(torch.equal(compress(method, **given), expected) for method, given in ways)
    assert not torch.equal(compress({"sparsegpt": None}), expected)
    (tmp_path / "faulty.py").write_text(FAULTY, "utf-8")
    magnitude = compress("magnitude")
    assert torch.equal(compress(tmp_path / "faulty.py", share=2), magnitude)
    assert not torch.equal(compress("random", seed=0), compress("random", seed=1))
    assert torch.equal(compress("random", seed=1), compress("random", seed=1))


def test_an_instance_may_name_the_methods_inside_it():
    """And is then the same as the name with its parameters."""
    weight, x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), layer_inputs(32)
    gram, statistics = layerwise.calibrate(x[None])
    pairs: list[tuple[str, Any, Any]] = [
        ("3b g16", CodeSwaps(), "code_swaps"),
        ("3b g16", Rotated("rtn", block=8), {"rotated": {"under": "rtn", "block": 8}}),
        ("3b g16", Rotated(CodeSwaps("rtn")), {"rotated": {"under": {"code_swaps": {"start": "rtn"}}}}),
        ("50% row", AWP(iterations=3), {"awp": {"iterations": 3}}),
        ("50% row 3b", AWP({"sparsegpt": {"damping": 0.1}}, iterations=cast(Any, 3.0)), {"awp": {
            "warm_start": {"sparsegpt": {"damping": 0.1}}, "iterations": 3}}),
        ("2:4 3b", Chain(("sparsegpt", RTN(mse=True))), {"chain": {"chain": ["sparsegpt", {"rtn": {"mse": True}}]}}),
    ]  # fmt: skip
    for target, instance, named in pairs:
        results = [
            layerwise.compress_layer(weight, gram, target, own, statistics=statistics) for own in (instance, named)
        ]
        assert torch.equal(results[0].weight, results[1].weight) and results[0].method == results[1].method


def layer_inputs(inputs: int) -> torch.Tensor:
    return torch.randn(99, inputs, generator=torch.Generator().manual_seed(1))


class Uncarded(layerwise.Method):
    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> layerwise.Compressed:
        return RTN().solve(layer, target, rng)


def test_an_instance_is_checked_as_its_name_is():
    weight, gram = torch.randn(8, 32), Gram.from_inputs(layer_inputs(32))
    cases: dict[str, Any] = {
        "its start cannot quantise: gptaq needs cross_gram, which code_swaps does not give. Got the target 3b": (
            CodeSwaps(GPTAQ())
        ),
        "its grid_from cannot quantise: qronos needs cross_gram, which awp does not give. Got": AWP(grid_from=Qronos()),
        "its under cannot quantise: awq needs absmean, sample, which rotated does not give. Got": Rotated(AWQ()),
        "method: rotated's block must be at least 2. Got 0 instead. It means": Rotated(GPTQ(), block=0),
        "method: turboquant's block must be at least 2. Got -4 instead. It means": TurboQuant(block=-4),
        "method.under: gptq's damping must be above 0. Got 0 instead. It means": Rotated(GPTQ(damping=0)),
        "method.start: the method must be one of admm, ": CodeSwaps("gptk"),
        "method: code_swaps's max_changes must be at least 0. Got -1 instead.": CodeSwaps(Uncarded(), max_changes=-1),
    }
    for sentence, instance in cases.items():
        with pytest.raises(ValueError) as caught:
            layerwise.compress_layer(weight, gram, "3b", instance)
        assert str(caught.value).startswith(sentence), sentence
    result = layerwise.compress_layer(weight, gram, "3b", CodeSwaps(Uncarded()))
    assert torch.equal(result.weight, layerwise.compress_layer(weight, gram, "3b", "code_swaps", start="rtn").weight)
    chained = layerwise.compress_layer(weight, gram, "2:4 3b", Chain(("magnitude", Uncarded())))
    assert chained.mask is not None


@pytest.mark.parametrize("method", ["rotated", "turboquant", Rotated(), {"awp": {"grid_from": "rtn"}}])
def test_a_rotation_of_an_odd_number_of_inputs_is_refused(method: Any):
    weight, gram = torch.randn(4, 33), Gram.from_inputs(layer_inputs(33))
    if isinstance(method, dict):  # which rotates nothing
        assert layerwise.compress_layer(weight, gram, "3b", method).output_error < 1
        return
    name = method if isinstance(method, str) else "rotated"
    with pytest.raises(ValueError) as caught:
        layerwise.compress_layer(weight, gram, "3b", method)
    assert str(caught.value) == (
        f"{name} must have layers with an even number of inputs: with an odd one it only changes signs. Got 33 inputs "
        "in the layer instead."
    )
    assert torch.equal(layerwise.compress_layer(weight, gram, "dense", method).weight, weight)


def test_a_cross_gram_that_no_inputs_have_is_refused():
    weight, x = torch.randn(4, 32), layer_inputs(32)
    x[:, 0], x[:, 1], tiny = 0, x[:, 1] * 1e-25, torch.linspace(0.5, 2, 32)
    for dense_inputs in (x, -3 * x, x * tiny, x.flip(0), x.flip(1), x.bfloat16().float(), x * 1e-20, x * 1e15):
        both = Gram.from_inputs(x, dense_inputs=dense_inputs)
        layerwise.output_error(weight, weight, both)
    own = Gram.from_inputs(layer_inputs(32)).matrix  # without dead inputs
    for cross in (torch.randn(32, 32, generator=torch.Generator().manual_seed(2)) * 4, 1.01 * own):
        with pytest.raises(ValueError) as caught:
            layerwise.compress_layer(weight, Gram(own, 99, cross, own), "3b", "gptaq")
        assert re.fullmatch(
            r"gram\.cross must be a mean of x0 xt, so that C_ij\^2 is at most dense_ii G_jj\. Got a C_ij of \S+ times "
            r"the root of that instead\.",
            str(caught.value),
        )


def test_a_parameter_that_does_nothing_at_the_target_is_told():
    weight, gram = torch.randn(4, 32), Gram.from_inputs(layer_inputs(32))
    told = r"^awp's warm_start acts only at targets that prune, so it does nothing at 3b g16\.$"
    cases: list[tuple[Any, dict[str, Any]]] = [("awp", {"warm_start": "ria"}), (AWP("ria"), {})]
    for method, own in cases:
        with pytest.warns(UserWarning, match=told):
            layerwise.compress_layer(weight, gram, "3b g16", method, **own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layerwise.compress_layer(weight, gram, "50% row 3b", "awp", warm_start="ria")
        layerwise.compress_layer(weight, gram, "dense", "awp", warm_start="ria")


def test_a_gram_of_drifted_inputs_alone_is_refused_where_the_dense_ones_are_needed():
    weight, x = torch.randn(4, 32), layer_inputs(32)
    gram = Gram(Gram.from_inputs(x).matrix, 99, drifted=True)
    for method, name in (("gptaq", "gptaq"), (Rotated("qronos"), "qronos, inside rotated,")):
        with pytest.raises(ValueError) as caught:
            layerwise.compress_layer(weight, gram, "3b", method)
        assert str(caught.value) == (
            f"gram must have the cross-Gram, from Gram.from_inputs(x, dense_inputs=x0): {name} needs it. Got drifted "
            "inputs alone instead."
        )
    assert layerwise.compress_layer(weight, gram, "3b", "gptaq", alpha=0).output_error < 1


def test_statistics_are_asked_for_where_a_method_needs_them():
    x = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    gram, statistics = layerwise.calibrate(x)
    cases = [("awq", "4b g16", {}, "awq needs absmean and sample")]
    cases += [("dsnot", "2:4", {}, "dsnot needs mean and sequence_variance")]
    cases += [("chain", "2:4 4b g16", {"chain": ["wanda", "awq"]}, "awq, inside chain, needs absmean and sample")]
    cases += [("code_swaps", "4b g16", {"start": "awq"}, "awq, inside code_swaps, needs absmean and sample")]
    for method, target, own, names in cases:
        with pytest.raises(ValueError, match=rf"^statistics must be given: {names}, .* Got None instead"):
            layerwise.compress_layer(weight, gram, target, method, **own)
        result = layerwise.compress_layer(weight, gram, target, method, statistics=statistics, **own)
        assert 0 < result.output_error < 1
    assert layerwise.compress_layer(weight, gram, "2:4 4b g16", "chain").mask is not None  # wanda, rtn: the Gram is all


def test_wrong_arguments_of_a_layer_are_one_sentence(tmp_path: Path):
    weight, x = torch.randn(4, 64), torch.randn(8, 64)
    gram, other = Gram.from_inputs(x), Gram.from_inputs(torch.randn(8, 32))
    _, narrow = layerwise.calibrate(torch.randn(2, 4, 32))
    empty = tmp_path / "empty.py"
    empty.write_text("", "utf-8")
    good: dict[str, Any] = {"weight": weight, "gram": gram, "target": "2:4", "method": "wanda"}
    cases = {
        "gram must be [in, in] = [64, 64]. Got [32, 32] instead.": {"gram": other},
        "gram must be a layerwise.Gram, such as Gram.from_inputs(x). Got Tensor instead.": {"gram": gram.matrix},
        "gram must be finite. Got NaN or Inf instead.": {"gram": Gram(gram.matrix / 0, 8)},
        "gram must be a tensor [in, in]. Got NoneType instead.": {"gram": Gram(cast(Any, None), 8)},
        "gram must be a dense tensor that holds values. Got torch.sparse_coo": {
            "gram": Gram(gram.matrix.to_sparse(), 8)
        },
        "gram must have a diagonal of at least 0, means of squares. Got -1 instead.": {"gram": Gram(-torch.eye(64), 8)},
        "gram must be symmetric. Got two entries that differ by ": {"gram": Gram(gram.matrix.triu(), 8)},
        "weight must be a dense tensor that holds values. Got a tensor on the meta": {"weight": weight.to("meta")},
        "gram must be torch.float32. Got torch.float64 instead.": {"gram": Gram(gram.matrix.double(), 8)},
        "statistics.mean must be [in] = [64]. Got [32] instead.": {"statistics": narrow},
        "weight must be [out, in] and not empty. Got [64] instead.": {"weight": weight[0]},
        "weight must be floating point. Got torch.int64 instead.": {"weight": weight.long()},
        "weight must be finite in float32. Got NaN or Inf instead.": {"weight": weight / 0},
        "weight must be a tensor [out, in] or a torch Linear. Got list instead.": {"weight": weight.tolist()},
        "A target's label must be like": {"target": "2-4"},
        "owl is an allocator, not a method: a study names it": {"method": "owl"},
        "seed must be a whole number, at least 0. Got -1 instead.": {"seed": -1},
        "The method must be one of admm, ": {"method": "wand"},
        "method: sparsegpt has no parameter 'dampin'": {"method": "sparsegpt", "dampin": 1},
        "method must be a name, {name: {parameters}}, the path": {"method": {"a": 1, "b": 2}},
        f"{tmp_path}/none.py cannot be read": {"method": tmp_path / "none.py"},
        f"{empty} must define a method: it has no CARD.": {"method": empty},
        "Parameters must be given with a method's name. Got damping": {"method": SparseGPT(), "damping": 1},
    }
    for sentence, wrong in cases.items():
        with pytest.raises(ValueError) as caught:
            layerwise.compress_layer(**{**good, **wrong})
        assert str(caught.value).startswith(sentence) and str(caught.value).endswith("."), sentence
    with pytest.raises(ValueError, match=r"^weight_hat must be \[out, in\] = \[4, 64\]. Got \[3, 64\] instead.$"):
        layerwise.output_error(weight, weight[:3], gram)
    for target in ("4b", "50% 1x16", "2:4 rank 10%", "4b rank 10%"):
        with pytest.raises(ValueError, match="lower bound"):
            layerwise.lower_bound(weight, gram, target)


@pytest.mark.parametrize("method", ["gptq", {"gptq": {}}, layerwise.methods()["gptq"].path])
def test_a_target_that_a_method_does_not_reach(method: Any):
    weight, x = small()
    with pytest.raises(UnsupportedTarget, match=r"^gptq does not prune\. Got the target 2:4 instead\.$"):
        layerwise.compress_layer(weight, Gram.from_inputs(x), "2:4", method)


def test_a_broken_promise_names_the_method():
    class Liar(layerwise.Method):
        def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> layerwise.Compressed:
            layer.weight.zero_()
            return layerwise.Compressed(layer.weight.clone(), torch.zeros_like(layer.weight, dtype=torch.bool))

    weight, x = small()
    with pytest.raises(
        InputError, match="^Liar broke its contract on the layer: promise 1: the inputs must be untouched"
    ):
        layerwise.compress_layer(weight, Gram.from_inputs(x), "2:4", Liar())
    assert weight.any()


def test_an_error_of_nothing():
    zero = torch.zeros(3, 8)
    gram = Gram.from_inputs(small()[1])
    assert layerwise.output_error(zero, zero, gram) == 0 and math.isinf(layerwise.output_error(zero, zero + 1, gram))


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("api")).prepare()


@pytest.mark.parametrize("mode", ["shared", "sequential"])
@pytest.mark.parametrize(("method", "target"), [("sparsegpt", "2:4"), ("awq", "4b g8"), ("random", "50% row")])
def test_a_model_is_compressed_as_a_cell_is(case: Case, method: str, target: str, mode: str):
    """To the last bit: every column that both have, and every weight."""
    cell = case.run(method, Target.parse(target), mode)
    model = build("llama")
    table = layerwise.compress_model(model, tokens(SAMPLES, LENGTH), target, method, mode=mode, progress=False)
    expected = rows(cell)
    same = set(table.columns) - {"seconds", "peak_mb", "peak_gpu_mb"}
    assert same >= {"output_error", "absolute_error", "layer", "tap", "bits_per_weight", "damping", "params", "seed"}
    found = table.astype(object).where(table.notna(), None).to_dict("records")
    assert [{key: row[key] for key in same} for row in found] == [{key: row[key] for key in same} for row in expected]
    saved = weights(cell)
    for name, layer in model_linears(model).items():
        assert torch.equal(layer.weight(), saved[name]), name


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_model_of_another_family_is_compressed_as_a_cell_is(tmp_path: Path, family: str):
    other = Case(tmp_path, family).prepare()
    cell, model = other.run("wanda", Target(0.5), "sequential"), build(family)
    if family == "mixtral":
        model.config._experts_implementation = "batched_mm"
    table = layerwise.compress_model(
        model, tokens(SAMPLES, LENGTH), "50% row", "wanda", mode="sequential", progress=False
    )
    assert list(table["output_error"]) == [row["output_error"] for row in rows(cell)]
    if family == "mixtral":
        assert model.config._experts_implementation == "batched_mm"


def test_the_error_of_a_model_is_that_of_its_forward_pass():
    """From the outputs of each layer of the dense model, seen by hooks."""
    model, batch = build("llama"), tokens(2, LENGTH)
    dense = {name: layer.weight().double() for name, layer in model_linears(model).items()}
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, layer in model_linears(model).items():

        def hook(_: torch.nn.Module, args: tuple[torch.Tensor, ...], own: str = name) -> None:
            seen[own] = args[0].double()

        handles.append(layer.module.register_forward_pre_hook(hook))
    model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    table = layerwise.compress_model(model, batch, "2:4", "sparsegpt", progress=False).set_index("layer")
    for name, layer in model_linears(model).items():
        lost, full = seen[name] @ (dense[name] - layer.weight().double()).T, seen[name] @ dense[name].T
        expected = float((lost**2).sum() / (full**2).sum())
        assert table.loc[name, "output_error"] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fisher_of_a_model_is_that_of_its_values_in_float32(dtype: torch.dtype):
    model, batch = build("llama", dtype=dtype), tokens(2, LENGTH)
    found = fisher.of_model(copy.deepcopy(model).float(), batch)
    dense, before = {name: own.weight() for name, own in model_linears(model).items()}, state(model)
    layerwise.compress_model(model, batch, "rank 40%", "fwsvd", progress=False)
    assert state(model) == before
    for name, own in model_linears(model).items():
        layer = dataclasses.replace(layer_cases.build("correlated"), weight=dense[name], fisher=found[name])
        expected = FWSVD().compress(layer, Target(rank=0.4), torch.Generator()).low_rank
        assert expected is not None
        product = expected.left.to(torch.float16).double() @ expected.right.to(torch.float16).double()
        torch.testing.assert_close(
            own.weight().double(), product, atol=4e-3 * float(dense[name].abs().max()), rtol=0.01
        )


def state(model: Any) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "gradients": [own.requires_grad for own in model.parameters()],
        "places": [(own.dtype, own.device, own.data_ptr()) for own in model.parameters()],
        "config": model.config.to_dict(),
        "hooks": [(len(module._forward_pre_hooks), "forward" in vars(module)) for module in model.modules()],
    }


def test_a_model_s_asymmetric_errors_are_known_where_they_are_asked_for():
    asked: dict[str, Any] = {"target": "3b", "method": "gptq", "mode": "sequential", "progress": False}
    alone, scored = (
        layerwise.compress_model(build("llama"), tokens(SAMPLES, LENGTH), asymmetric=value, **asked)
        for value in (False, True)
    )
    assert list(alone["asymmetric_error"].notna()) == list(alone["block"] == 0)
    assert list(scored["output_error"]) == list(alone["output_error"])
    for row in scored.to_dict("records"):
        assert math.isfinite(row["asymmetric_error"])
        assert row["block"] == 0 or row["asymmetric_error"] != row["output_error"]


@pytest.mark.parametrize("mode", ["shared", "sequential"])
def test_a_model_is_left_as_it_was_but_for_its_weights(tmp_path: Path, mode: str):
    (tmp_path / "faulty.py").write_text(FAULTY, "utf-8")
    model = build("opt", dtype=torch.bfloat16).train().requires_grad_(True)
    model.get_submodule("model.decoder.layers.0").eval()
    model.config.use_cache = True
    before, others = state(model), {k: v.clone() for k, v in model.state_dict().items() if "layers" not in k}
    chosen = ["*.fc1", "*.fc2"]
    table = layerwise.compress_model(
        model, tokens(2, LENGTH), "2:4", "magnitude", mode=mode, layers=chosen, progress=False
    )
    assert state(model) == before and all(torch.equal(model.state_dict()[key], own) for key, own in others.items())
    assert list(table["kind"]) == ["fc1", "fc2"] * 2 and str(table["block"].dtype) == "Int64"
    for name, layer in model_linears(model).items():
        zeros = float((layer.stored() == 0).double().mean())
        assert zeros == 0.5 if layer.name.endswith(("fc1", "fc2")) else zeros < 0.1, name
    # An error, midway.
    llama = build("llama").train()
    before = state(llama)
    dense = {name: layer.weight() for name, layer in model_linears(llama).items()}
    with pytest.raises(InputError) as caught:
        layerwise.compress_model(
            llama, tokens(2, LENGTH), "2:4", tmp_path / "faulty.py", mode=mode, layers="*_proj", progress=False
        )
    said = str(caught.value)
    assert said.startswith("faulty failed on model.layers.1.mlp.up_proj: RuntimeError: it is late (12 of 14 layers ")
    assert "model.layers.0.self_attn.q_proj, " in said and said.endswith("model.layers.1.mlp.gate_proj).")
    assert state(llama) == before
    changed = {name for name, layer in model_linears(llama).items() if not torch.equal(layer.weight(), dense[name])}
    assert changed == set(said[said.index(": model.") + 2 : -2].split(", "))


def test_the_text_is_drawn_as_a_study_draws_it(tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "resources/demo")
    words = [f"Line {i} of a text that is long enough.\n" * 9 for i in range(40)]
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(words), "utf-8")
    model, cut = build("llama"), {"samples": 5, "length": 32, "seed": 3}
    expected, _ = drawn_tokens({"path": str(ROOT / "resources/demo")}, {"path": str(path)}, cut, "calibration")
    for text in (path, str(path), path.read_text("utf-8"), words):
        found = calibration_tokens(model, tokenizer, text, 5, 32, "stream", 3)
        assert torch.equal(found, torch.from_numpy(expected))
    assert calibration_tokens(model, tokenizer, words, 2, None, "documents", 0).shape == (2, 64)  # what it takes


def test_wrong_arguments_of_a_model_are_one_sentence():
    model, batch = build("llama"), tokens(2, LENGTH)
    dense = {name: own.clone() for name, own in model.state_dict().items()}
    good: dict[str, Any] = {"model": model, "tokenizer_or_tokens": batch, "target": "2:4", "method": "wanda"}
    cases: dict[str, dict[str, Any]] = {
        "mode must be 'shared' or 'sequential'. Got 'both' instead.": {"mode": "both"},
        "The rank of rank 1% must be at least 1 in every layer. Got 0 in model.layers.0.self_attn.q_proj [32, 32] "
        "instead.": {"target": "rank 1%", "method": "svd_llm"},
        "mode must be 'shared' for fwsvd, whose fisher is of the dense model's loss. Got 'sequential' instead.": {
            **{"target": "rank 40%", "method": "fwsvd", "mode": "sequential"}
        },
        "sampling must be 'stream' or 'documents'. Got 'windows' instead.": {"sampling": "windows"},
        "model must be a loaded transformers model. Got str instead.": {"model": "gpt2"},
        "LlamaModel must give logits, as a model of AutoModelForCausalLM does. Got BaseModelOutputWithPast instead.": {
            "model": build("llama").model
        },
        "text must be given with a tokenizer. Got it with tokens instead.": {"text": "words"},
        "text must be given with a tokenizer: a text, documents or a file. Got None instead.": {
            "tokenizer_or_tokens": print
        },
        "text must hold at least one document, each a str. Got none instead.": {
            "tokenizer_or_tokens": print,
            "text": [],
        },
        "text must hold whole characters. Got half of one, the lone surrogate '\\ud800', as character 1 of document 2 "
        "instead.": {"tokenizer_or_tokens": print, "text": ["words", "a\ud800"]},
        "samples must be a whole number, at least 1. Got 0 instead.": {
            "tokenizer_or_tokens": print,
            "text": "words",
            "samples": 0,
        },
        "The second argument must be tokens [sequences, length] or a tokenizer. Got list instead.": {
            "tokenizer_or_tokens": [1]
        },
        "layers must fit names such as model.layers.0.self_attn.q_proj. Got '*.fc1' instead.": {"layers": "*.fc1"},
        "layers must choose at least one of the 14 linear layers. Got none instead.": {"layers": lambda name: False},
        "Tokens must be int32 or int64 [sequences, length], of at least one sequence and two tokens. Got torch.float32 "
        "[2, 24] instead.": {"tokenizer_or_tokens": batch.float()},
        "Tokens must be int32 or int64 [sequences, length], of at least one sequence and two tokens. Got torch.uint8 "
        "[2, 24] instead.": {"tokenizer_or_tokens": batch.to(torch.uint8)},
        "seed must be a whole number, at least 0. Got 'one' instead.": {"seed": "one"},
        "seed must be a whole number, at least 0. Got 1.5 instead.": {"seed": 1.5},
        "layers must be patterns, or a function of a layer's name. Got 3 instead.": {"layers": 3},
        "layers must be patterns, or a function of a layer's name. Got 4 instead.": {"layers": [4]},
        "text must be a text, a list of documents or a file's path. Got 3 instead.": {
            "tokenizer_or_tokens": print,
            "text": 3,
        },
        "The tokens must be 0 to 95, which the model embeds. Got 3 to 200 instead": {
            "tokenizer_or_tokens": batch.clone().fill_(3).index_fill_(1, torch.tensor([0]), 200)
        },
        "The sequences must have at most 64 tokens for this model. Got 65 instead.": {
            "tokenizer_or_tokens": tokens(1, 65)
        },
        "gptq does not prune. Got the target 2:4 instead.": {"method": "gptq"},
        "words.txt cannot be read: ": {"tokenizer_or_tokens": print, "text": "words.txt"},
    }
    for sentence, wrong in cases.items():
        with pytest.raises((ValueError, InputError)) as caught:
            layerwise.compress_model(**{**good, "progress": False, **wrong})
        assert str(caught.value).startswith(sentence), sentence
    assert all(torch.equal(own, dense[name]) for name, own in model.state_dict().items())
    assert isinstance(layerwise.compress_model(**good), pd.DataFrame)


def test_numbers_of_numpy_and_torch_are_python_s():
    batch = tokens(SAMPLES, LENGTH)
    plain = layerwise.compress_model(build("llama"), batch, "2:4", "sparsegpt", damping=0.5, blocksize=8, seed=1)
    same = layerwise.compress_model(
        *(build("llama"), batch, "2:4", "sparsegpt"),
        **{"damping": np.float32(0.5), "blocksize": np.int64(8), "seed": torch.tensor(1)},
    )
    pd.testing.assert_frame_equal(plain.drop(columns="seconds"), same.drop(columns="seconds"))


def test_a_model_of_odd_inputs_is_not_rotated(monkeypatch):
    model, batch = build("llama"), tokens(2, LENGTH)
    shapes = {name: own.shape for name, own in model_linears(model).items()}
    monkeypatch.setattr("layerwise.models.structure.Linear.shape", property(lambda own: (32, 31)))
    with pytest.raises(
        ValueError, match=r"^rotated must have layers with an even .* Got 31 inputs in model\.layers\.0"
    ):
        layerwise.compress_model(model, batch, "3b", "rotated", progress=False)
    assert not any(own[1] % 2 for own in shapes.values())


def test_a_model_in_shared_mode_says_that_nothing_has_drifted():
    batch, told = tokens(2, LENGTH), r"^gptaq: in shared mode the inputs have not drifted, .* are gptq there\.$"
    with pytest.warns(UserWarning, match=told):
        layerwise.compress_model(build("llama"), batch, "3b", "gptaq", layers="*.0.*.q_proj", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases: list[tuple[Any, dict[str, Any]]] = [("sequential", {}), ("shared", {"alpha": 0})]
        for mode, own in cases:
            layerwise.compress_model(
                build("llama"), batch, "3b", "gptaq", mode=mode, layers="*.0.*.q_proj", progress=False, **own
            )


def test_in_shared_mode_a_layer_does_not_depend_on_the_others():
    batch = tokens(SAMPLES, LENGTH)
    whole = layerwise.compress_model(build("llama"), batch, "2:4", "ria", progress=False)
    part = layerwise.compress_model(
        build("llama"), batch, "2:4", "ria", layers=lambda name: ".1." in name, progress=False
    )
    assert list(whole["output_error"][7:]) == list(part["output_error"])
