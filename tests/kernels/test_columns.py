"""The compiled column loop, selection and grids against the plain torch ones, to the last bit."""

from dataclasses import fields

import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import output_error
from layerwise.contract.layer import Layer, Target
from layerwise.kernels import selection
from layerwise.methods.gptq import GPTQ
from layerwise.methods.magnitude import Magnitude
from layerwise.methods.rtn import RTN
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.methods.wanda import Wanda
from layerwise.numerics import dispatch, ops
from tests.support.typing_helpers import mask_of

GRID = Target(bits=4, group=16)
CASES = [
    (SparseGPT(), Target(0.5)),
    (SparseGPT(16), Target(0.6)),
    (SparseGPT(16), Target(0.5, "layer")),
    (SparseGPT(16, convention="official"), Target(0.5, "layer")),
    (SparseGPT(), Target(pattern="2:4")),
    (SparseGPT(20), Target(pattern="4:8", bits=4, group=16)),
    (SparseGPT(16), Target(0.5, bits=3)),
    (GPTQ(), GRID),
    (GPTQ(16), Target(bits=4, group=24)),
    (GPTQ(24), GRID),
    (GPTQ(act_order=True), Target(bits=2, group=16, symmetric=True)),
    (GPTQ(act_order=True, static_groups=True), Target(bits=3)),
    (Wanda(), Target(0.7)),
    (Wanda(), Target(pattern="1:3")),
    (Magnitude(), Target(0.3, "layer")),
    (RTN(), Target(bits=3, group=24)),
    (RTN(), Target(bits=4, symmetric=True)),
]
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
LINES = {
    "any": lambda: torch.randn(6, 301, generator=torch.Generator().manual_seed(1)),
    "ties": lambda: torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).round(),
    "one value": lambda: torch.zeros(3, 9),
    "both zeros and infinities": lambda: torch.tensor([[float("inf"), -float("inf"), 0.0, -0.0, 5.0, -5.0, 5.0, -5.0]]),
}


@pytest.mark.parametrize("name", layers.LAYERS)
@pytest.mark.parametrize(("method", "target"), CASES, ids=[f"{m}-{t.label}" for m, t in CASES])
def test_both_paths_give_the_same(name: str, method, target: Target):
    layer = layers.build(name)
    compiled = method.compress(layer, target, torch.Generator())
    with dispatch.reference():
        plain = method.compress(layer, target, torch.Generator())
    for field in fields(plain):
        expected = getattr(plain, field.name)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(getattr(compiled, field.name), expected), field.name


@FLOATS
@pytest.mark.parametrize("lines", LINES)
def test_selections_are_the_plain_ones(lines: str, dtype: torch.dtype):
    score = LINES[lines]().to(dtype)
    for pruned in range(score.shape[1]):
        compiled = ops.keep_largest(score, pruned)
        with dispatch.reference():
            assert torch.equal(compiled, ops.keep_largest(score, pruned))
    for kept, of in ((2, 4), (4, 8), (1, 3)):
        compiled = ops.keep_top_per_group(score, of, of - kept)
        with dispatch.reference():
            assert torch.equal(compiled, ops.keep_top_per_group(score, of, of - kept))


@FLOATS
@pytest.mark.parametrize("values", [10**9, 200, 1])  # few of them are ties
def test_of_a_long_line_the_plain_ones_are_kept(values: int, dtype: torch.dtype):
    """The cut lies where a sample says that it does, or, where every 19th entry is unlike the others, elsewhere."""
    rng = torch.Generator().manual_seed(5)
    score = torch.randint(-values, values, (307200,), generator=rng).to(dtype)
    misled = score.clone()
    misled[::19] = 2 * values
    for line in (score, misled):
        for pruned in (1, len(line) // 3, len(line) - 1):
            compiled = ops.keep_largest(line, pruned)
            with dispatch.reference():
                assert torch.equal(compiled, ops.keep_largest(line, pruned))


@pytest.mark.parametrize("inputs", [576, 600])
def test_a_sample_shows_the_cut_of_a_layer_whose_columns_differ_in_scale(inputs: int, monkeypatch: pytest.MonkeyPatch):
    """A distance between sampled entries that divides a multiple of the width would leave columns out: 21 does at
    576."""
    rng, passes, tally = torch.Generator().manual_seed(7), [], selection._tally
    score = torch.randn(576, inputs, generator=rng).abs() * torch.where(torch.arange(inputs) % 3 == 0, 8.0, 1.0)
    monkeypatch.setattr(selection, "_tally", lambda *args: (passes.append(args), tally(*args))[1])
    ops.keep_largest(score.flatten(), score.numel() // 2)
    assert len(passes) == 1


@pytest.mark.parametrize("values", [10**9, 200, 1])
def test_of_a_long_layer_the_plain_weights_are_kept(values: int):
    rng = torch.Generator().manual_seed(6)
    weight = torch.randint(-values, values, (512, 600), generator=rng).float()
    layer = Layer("long", weight, layers.build("correlated").gram)
    for target in (Target(0.3, "layer"), Target(1e-7, "layer")):
        compiled = Magnitude().compress(layer, target, rng)
        with dispatch.reference():
            plain = Magnitude().compress(layer, target, rng)
        assert torch.equal(compiled.weight, plain.weight) and torch.equal(mask_of(compiled), mask_of(plain))


@pytest.mark.parametrize("target", [GRID, Target(bits=2), Target(bits=3, group=100, symmetric=True)])
def test_the_shrunk_ranges_are_as_good_as_the_plain_ones(target: Target):
    """The sums of |error|^2.4 are added up in another order: of ranges that are equally good either may win."""
    weight = torch.randn(50, 500, generator=torch.Generator().manual_seed(3))
    errors = []
    for _, _, values in (ops.fit_and_round(weight, target, mse=True), reference_rounding(weight, target)):
        errors.append(float((values - weight).abs().double().pow(2.4).sum()))
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def reference_rounding(weight: torch.Tensor, target: Target):
    with dispatch.reference():
        return ops.fit_and_round(weight, target, mse=True)


def test_threads_change_nothing():
    weight = torch.randn(300, 257, generator=torch.Generator().manual_seed(4))
    found, threads = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append((ops.keep_largest(weight, 100), ops.fit_and_round(weight, GRID)[2]))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


def test_a_weight_that_is_not_finite_is_not_rounded_away():
    weight = torch.ones(2, 32)
    weight[1, 20] = float("nan")
    values = ops.fit_and_round(weight, GRID)[2]
    assert values[0].isfinite().all() and values[1, 16:].isnan().all()


WIDE = layers.Recipe(out=20, inputs=1100, sequences=8, length=100)  # more than two spans, and than INVERTED


@pytest.mark.parametrize(
    ("method", "target"),
    [
        (SparseGPT(), Target(0.5)),
        (SparseGPT(100), Target(pattern="2:4")),
        (SparseGPT(600), Target(0.5, "layer")),
        (GPTQ(), Target(bits=4, group=128)),
        (GPTQ(24, act_order=True), Target(bits=4, group=200)),
    ],
    ids=str,
)
def test_of_a_wide_layer_both_paths_give_the_same(method, target: Target):
    layer = layers.make(WIDE)
    compiled = method.compress(layer, target, torch.Generator())
    with dispatch.reference():
        assert torch.equal(compiled.weight, method.compress(layer, target, torch.Generator()).weight)


@pytest.mark.parametrize("damping", [0.01, 1e-4])
def test_of_a_wide_layer_later_columns_make_up_for_all_before_them(damping: float):
    """As the published loop in float64, whose blocks push their errors to all columns after them."""
    layer = layers.make(WIDE)
    found = SparseGPT(damping=damping).compress(layer, Target(0.5), torch.Generator())
    assert found.mask is not None
    gram = layer.gram.matrix.double()
    gram = gram + found.info["damping"] * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    weight = layer.weight.double()
    for j in range(len(gram)):
        final = torch.where(found.mask[:, j], weight[:, j], 0.0)
        weight = weight - torch.outer((weight[:, j] - final) / factor[j, j], factor[j])
        weight[:, j] = final
    assert output_error(layer, found.weight) == pytest.approx(output_error(layer, weight), rel=1e-4)
    torch.testing.assert_close(found.weight.double(), weight, rtol=0, atol=1e-5 * float(weight.abs().max()))


def test_a_nan_is_not_pruned_away_on_either_path():
    layer = layers.build("correlated")
    layer.weight[3, 5] = float("nan")
    for target in (Target(0.5), Target(0.5, "layer"), Target(pattern="2:4")):
        for method in (Magnitude(), Wanda()):
            assert method.compress(layer, target, torch.Generator()).weight.isnan().any()
            with dispatch.reference():
                assert method.compress(layer, target, torch.Generator()).weight.isnan().any()
