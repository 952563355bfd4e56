"""Cells of half-precision models on a slow processor: what is stored, and what their records and checkpoints say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.calibration.calibrate import write_gram
from layerwise.calibration.gram_store import computed_in, content
from layerwise.compression import cell as cells
from layerwise.compression.cell import CellJob
from layerwise.contract.target import Target
from layerwise.evaluation import cache
from layerwise.evaluation.perplexity import apply_weights
from layerwise.models import compute_dtype
from layerwise.models.loading import load
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Linear, model_linears
from layerwise.runtime.files import sha256
from tests.compression.test_cell import Case, rows
from tests.support.model_families import tokens

ROW = Target(0.5)
LINE = "forward passes are computed in float32, from weights rounded to bfloat16"


@pytest.fixture
def speed(monkeypatch) -> Callable[[float], None]:
    """Sets how many times as long as in float32 products in half precision take."""

    def set_to(times: float) -> None:
        compute_dtype._print.cache_clear()
        monkeypatch.setattr(compute_dtype, "slowdown", lambda dtype: times)

    return set_to


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("half"), dtype="bfloat16").prepare()


def provenance(cell: Path) -> dict[str, Any]:
    return json.loads((cell / "cell.json").read_text("utf-8"))["provenance"]


def stored(case: Case, cell: Path) -> dict[str, torch.Tensor]:
    """The weights of a cell as an evaluation on a slow processor takes them."""
    model = load(case.spec, compute_dtype="float32")
    apply_weights(model, cell / "weights.safetensors")
    return {name: linear.weight() for name, linear in model_linears(model).items()}


@pytest.mark.parametrize("mode", ["shared", "sequential"])
def test_a_slow_dtype_is_computed_in_float32_and_stored_as_it_is(case, speed, capsys, monkeypatch, mode):
    """What is compressed on, what the next block sees and what is stored are the same values, which bfloat16 has."""
    speed(12.0)
    left: dict[str, torch.Tensor] = {}
    replace = Linear.replace

    def noting(self: Linear, weight: torch.Tensor) -> None:
        replace(self, weight)
        left[self.name] = self.weight()

    monkeypatch.setattr(Linear, "replace", noting)
    cell = case.run("sparsegpt", ROW, mode, f"cells/slow-{mode}")
    compressed = dict(left)
    assert capsys.readouterr().err.count(LINE) == 1
    weights = stored(case, cell)
    assert compressed.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, compressed[name]) and torch.equal(weight, weight.bfloat16().float())
    dense = {name: linear.weight() for name, linear in model_linears(load(case.spec)).items()}
    assert any(bool((weights[name] != dense[name])[weights[name] != 0].any()) for name in weights)  # it updates them
    found = provenance(cell)
    assert (found["dtype"], found["compute_dtype"]) == ("bfloat16", "float32")


def test_a_fast_dtype_is_computed_in(case, speed, capsys):
    speed(1.0)
    found = provenance(case.run("sparsegpt", ROW, "sequential", "cells/fast"))
    assert {found[f"{of}{name}"] for of in ("", "calibration_") for name in ("dtype", "compute_dtype")} == {"bfloat16"}
    assert "computed in" not in capsys.readouterr().err


def test_the_record_says_what_was_computed_in_and_not_what_would_be(case, speed, monkeypatch):
    """Of shared Grams the dtype of whoever left them; of sequential ones that of the stream's own model."""
    speed(12.0)
    seen: list[torch.dtype] = []
    stream = cells.Stream

    def noted(source: Any, *given: Any, **named: Any) -> Any:
        made = stream(source, *given, **named)
        seen.extend(inputs.dtype for inputs in made.inputs)
        return made

    monkeypatch.setattr(cells, "Stream", noted)
    assert computed_in(case.folder / "gram") == "bfloat16"  # Case.prepare's, where nothing is slow
    found = provenance(case.run("magnitude", ROW, "shared", "cells/record-shared"))
    assert (found["compute_dtype"], found["calibration_compute_dtype"]) == ("float32", "bfloat16") and not seen
    found = provenance(case.run("magnitude", ROW, "sequential", "cells/record-sequential"))
    assert (found["compute_dtype"], found["calibration_compute_dtype"]) == ("float32", "float32")
    assert set(seen) == {torch.float32}


def test_a_store_of_grams_says_what_it_was_computed_in(case, tmp_path):
    write_gram(tmp_path / "gram", LazyBlocks(case.spec, compute_dtype="float32"), tokens(4), {})
    assert computed_in(tmp_path / "gram") == "float32"


def test_sequential_grams_of_a_narrower_copy_are_of_weights_that_it_holds(tmp_path, speed, monkeypatch):
    """A float32 model calibrated in bfloat16: each compressed block is rounded when its copy takes it over."""
    speed(12.0)
    plain = Case(tmp_path, dtype="float32").prepare()
    seen: list[bool] = []
    advance = cells.Stream.advance

    def noted(self: Any, index: int) -> None:
        linears = model_linears(self.blocks[index : index + 1])
        seen.extend(torch.equal(one.weight(), one.weight().bfloat16().float()) for one in linears.values())
        advance(self, index)

    monkeypatch.setattr(cells.Stream, "advance", noted)
    found = provenance(plain.run("sparsegpt", ROW, "sequential", dtype="bfloat16"))
    assert seen and all(seen)
    assert (found["dtype"], found["compute_dtype"]) == ("float32", "float32")
    assert (found["calibration_dtype"], found["calibration_compute_dtype"]) == ("bfloat16", "float32")


def test_tuned_weights_are_rounded_too(case, speed):
    speed(12.0)
    stages = {"blocks": {"epochs": 1, "batch": 2, "weights": 1e-3, "grid": 1e-3}}
    cell = case.run("magnitude", ROW, "sequential", "cells/tuned", tune=stages)
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in stored(case, cell).values())
    assert all(row["output_error"] < 0.5 for row in rows(cell))


def job(case: Case, **changed: Any) -> CellJob:
    spec = {"columns": {"mode": "sequential", "seed": 0}}
    return CellJob(spec, case.spec, case.folder / "model.json", case.folder / "tokens.safetensors", Path(), **changed)


def test_checkpoints_and_stores_of_another_compute_dtype_are_others(case, speed):
    speed(1.0)
    fast = job(case).decisive()
    speed(12.0)
    slow = job(case).decisive()
    assert [key for key in fast if fast[key] != slow[key]] == ["compute dtype"]
    assert job(case, dtype="float32").decisive()["compute dtype"] == ["float32", "float32"]
    files = case.folder / "model.json", case.spec, case.folder / "tokens.safetensors"
    one, other = (content(*files, computed, "code", "cpu") for computed in ("bfloat16", "float32"))
    assert [key for key in one if one[key] != other[key]] == ["compute dtype"]


def evaluated(case: Case, cell: Path, **changed: Any) -> dict[str, Any]:
    """The result of the job that evaluates a cell on its calibration tokens."""
    model = {"name": "tiny", **case.spec, **changed}
    given = ["perplexity", "--model", json.dumps(model), "--fingerprint", str(case.folder / "model.json")]
    given += ["--weights", str(cell / "weights.safetensors"), "--data", str(case.folder / "tokens.safetensors")]
    cache.main([*given, "--out", str(cell / "out.json")])
    return json.loads((cell / "out.json").read_text("utf-8"))


def test_a_cell_is_evaluated_in_the_dtype_that_it_was_compressed_in(case, speed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, said = {}, {}
    for name, here, there in (("slow", 12.0, 1.0), ("fast", 1.0, 12.0)):
        speed(here)
        cell = case.run("magnitude", ROW, "sequential", f"cells/evaluated-{name}")
        capsys.readouterr()
        speed(there)
        found[name], said[name] = evaluated(case, cell), capsys.readouterr().err
    assert (found["slow"]["compute_dtype"], found["fast"]["compute_dtype"]) == ("float32", "bfloat16")
    assert f"As before on another processor {LINE}." in said["slow"]
    assert "computed in it: as before on another processor." in said["fast"]
    wide, half = found["slow"]["losses"], found["fast"]["losses"]
    assert wide != half and wide == pytest.approx(half, rel=0.02)


def test_evaluations_of_another_compute_dtype_are_not_read(case, speed):
    given = case.folder / "model.json", case.folder / "tokens.safetensors", sha256(case.folder / "tokens.safetensors")
    files = {
        cache.Evaluation("perplexity", case.spec, given[0], given[1], given[2], given[1], computed=computed).file()
        for computed in ("float32", "bfloat16")
    }
    assert len(files) == 2
