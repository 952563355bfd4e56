"""Facts about the tools that the design rests on; when one of these fails, a comment somewhere has become wrong."""

import jsonschema
import pytest
import torch
import yaml

from layerwise.checks import layer_cases as layers


def test_cholesky_ex_flags_an_indefinite_matrix_without_raising():
    """Gram.factor asks cholesky_ex, and raises the damping when it says no."""
    factor, failed = torch.linalg.cholesky_ex(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64))
    assert failed and factor.shape == (2, 2)


def test_a_factor_of_a_matrix_with_nan_is_not_finite_or_flagged():
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 1] = torch.nan
    factor, failed = torch.linalg.cholesky_ex(matrix)
    assert bool(failed) or not torch.isfinite(factor).all()


def test_the_reversed_factor_is_the_factor_of_the_inverse():
    """One factorisation and one triangular inverse give what the official codes get with two and a full inverse."""
    matrix = layers.build("correlated").gram.matrix.double()
    lower = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
    ours = torch.linalg.solve_triangular(lower, torch.eye(64, dtype=torch.float64), upper=True)
    theirs = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_rounding_ties_of_bfloat16_weights_need_float32():
    """A symmetric grid puts the largest weight of a row at -(2^b - 1)/2 steps, a tie that float64 sees otherwise."""
    largest = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16().float().abs()
    scale = 2 * largest / 15
    steps, steps_in_float64 = -largest / scale, -largest.double() / scale.double()
    assert (steps == -7.5).float().mean() > 0.5
    assert (torch.round(steps) != torch.round(steps_in_float64)).float().mean() > 0.1


def test_rounding_is_half_to_even():
    assert torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]).round().tolist() == [0, 2, 2, 0, -2]


def test_a_stable_sort_breaks_ties_by_index():
    score = torch.zeros(3, 4096)
    score[:, 1::2] = 1
    order = torch.sort(score, dim=-1, stable=True).indices
    assert torch.equal(order[0], torch.cat([torch.arange(0, 4096, 2), torch.arange(1, 4096, 2)]))


def test_powers_of_four_scale_a_gram_exactly():
    """Why the masks of tied weights may be compared at such factors: scores and factors scale without rounding."""
    gram, scaled = layers.build("correlated").gram, layers.build("correlated").gram
    scaled.matrix.mul_(4.0**-10)
    assert torch.equal(scaled.inverse_factor(0.01)[0], 2.0**10 * gram.inverse_factor(0.01)[0])


@pytest.mark.parametrize(("text", "is_number"), [("1e-3", False), ("1.0e-3", True)])
def test_yaml_reads_an_exponent_without_a_point_as_a_string(text: str, is_number: bool):
    assert isinstance(yaml.safe_load(text), float) == is_number


def test_json_schema_takes_a_whole_float_for_an_integer():
    jsonschema.Draft202012Validator({"type": "integer"}).validate(128.0)


def test_json_schema_lets_nan_through_limits():
    jsonschema.Draft202012Validator({"type": "number", "exclusiveMinimum": 0}).validate(float("nan"))
