"""The certificate job: a row per layer in units of output_error, and a fault that names its layer."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from layerwise.calibration.calibrate import write_gram
from layerwise.calibration.modes import shared_blocks
from layerwise.calibration.taps import tapped_linears
from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import best_error
from layerwise.checks.layer_cases import Recipe
from layerwise.compression import certificate
from layerwise.compression.score import output_error
from layerwise.contract.layer import Gram, Layer, Target
from layerwise.methods.magnitude import Magnitude
from layerwise.models.structure import Blocks
from layerwise.runtime.errors import InputError
from layerwise.sources import fingerprint
from tests.support.model_families import build, tokens


def test_a_row_is_in_units_of_output_error():
    layer, target = layers.make(Recipe(out=5, inputs=9)), Target(0.5)
    row = certificate.row(layer, target)
    assert 0.25 * best_error(layer, target, False) < row["lower_bound"] <= best_error(layer, target, False)
    _, reached = output_error(layer, Magnitude().compress(layer, target, torch.Generator()).weight)
    assert row["lower_bound"] <= reached and row["bound_gap"] < 0.01 * row["lower_bound"]
    scaled = replace(layer, weight=1e4 * layer.weight, gram=Gram(1e-3 * layer.gram.matrix, 1))
    assert certificate.row(scaled, target)["lower_bound"] == pytest.approx(row["lower_bound"], rel=1e-3)


def test_a_layer_with_nothing_to_lose_has_the_bound_zero():
    row = certificate.row(layers.build("all inputs dead"), Target(0.5))
    assert row["lower_bound"] == row["plain_bound"] == row["bound_gap"] == 0


def test_a_fault_names_the_layer():
    layer = layers.build("correlated")
    with pytest.raises(InputError, match="The bound on correlated failed: ValueError: .*must be finite"):
        certificate.row(replace(layer, weight=layer.weight / 0), Target(0.5))


def test_the_job_bounds_every_layer_of_a_model_as_it_was_fingerprinted(tmp_path):
    model = build("llama").eval()
    model.save_pretrained(tmp_path / "model")
    write_gram(tmp_path / "gram", Blocks(model), tokens(4, 16), {})
    out = tmp_path / "bounds.parquet"
    arguments = {
        "columns": {"model": "tiny", "calibration": "words", "seed": 0},
        "target": Target(pattern="2:4").as_dict(),
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
    }
    fingerprint.main(
        ["--model", json.dumps(arguments["model"] | {"name": "tiny"}), "--out", str(tmp_path / "model.json")]
    )
    given = [part for name, value in arguments.items() for part in (f"--{name}", json.dumps(value))]
    given += ["--fingerprint", str(tmp_path / "model.json"), "--gram", str(tmp_path / "gram")]
    certificate.main([*given, "--out", str(out)])
    found = pq.read_table(out).to_pylist()
    expected = list(tapped_linears(model, shared_blocks(tmp_path / "gram", Blocks(model))))
    assert [row["layer"] for row in found] == [linear.name for _, _, linear in expected]
    for row, (_, tap, linear) in zip(found, expected, strict=True):
        layer = Layer(linear.name, linear.weight(), tap.gram)
        assert row["lower_bound"] == pytest.approx(certificate.row(layer, Target(pattern="2:4"))["lower_bound"])
        assert (row["target"], row["sparsity"], row["pattern"]) == ("2:4", 0.5, "2:4")
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json is no longer the file from which"):  # whatever is wrong with it
        certificate.main([*given, "--out", str(tmp_path / "other.parquet")])
