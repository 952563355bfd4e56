"""Half-precision weights on a processor that multiplies them slowly: float32 passes from what the weights round to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from layerwise.evaluation import perplexity
from layerwise.models import compute_dtype
from layerwise.models.compute_dtype import slowdown as measured
from layerwise.models.loading import dtype_name, load
from layerwise.models.stored_dtypes import round_as_stored
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import linears, model_linears
from layerwise.runtime.errors import InputError
from tests.support.model_families import build, tokens

FAMILIES = ["llama", "gpt2", "gpt_oss", "deepseek_v3"]  # experts, [in, out], and a bias that bfloat16 models keep wide
HALF = {"dtype": "bfloat16"}


@pytest.fixture
def slow(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(compute_dtype, "slowdown", lambda dtype: 12.3)
    compute_dtype._print.cache_clear()
    yield
    compute_dtype._print.cache_clear()


def saved(folder: Path, family: str = "llama", **entry: str) -> dict[str, str]:
    """The entry of a float32 checkpoint, whose weights no half precision has."""
    build(family).save_pretrained(folder)
    return {"path": str(folder), **HALF, **entry}


def rounded(spec: dict[str, str]) -> PreTrainedModel:
    """A float32 model with the weights that transformers gives a bfloat16 one."""
    wide, half = load({**spec, "dtype": "float32"}), load(spec).state_dict()
    with torch.no_grad():
        for name, own in wide.state_dict().items():
            own.copy_(half[name])
    return wide


def held_by_bfloat16(weight: Tensor) -> bool:
    return torch.equal(weight, weight.bfloat16().float())


# ------------------------------------------------------------------------------------------------------------ decision


@pytest.mark.parametrize(
    ("entry", "device", "expected"),
    [
        (HALF, "cpu", "float32"),
        ({"dtype": "float16"}, "cpu", "float32"),
        ({"dtype": "float32"}, "cpu", "float32"),
        ({**HALF, "compute_dtype": "native"}, "cpu", "bfloat16"),
        ({**HALF, "compute_dtype": "float32"}, "cuda", "float32"),
        (HALF, "cuda", "bfloat16"),
        (HALF, "cuda:1", "bfloat16"),
        ({}, "cpu", None),
    ],
)
def test_where_products_are_slow_passes_are_in_float32(slow, entry, device, expected):
    assert compute_dtype.compute_dtype(entry, device) == expected


@pytest.mark.parametrize(("times", "expected"), [(compute_dtype.RATIO, "bfloat16"), (3.01, "float32")])
def test_slow_is_more_than_the_named_ratio(monkeypatch, times, expected):
    monkeypatch.setattr(compute_dtype, "slowdown", lambda dtype: times)
    assert compute_dtype.compute_dtype(HALF) == expected


def test_a_given_compute_dtype_is_not_measured(monkeypatch):
    def never(dtype: str) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(compute_dtype, "slowdown", never)
    for entry in ({"dtype": "float32"}, {**HALF, "compute_dtype": "native"}, {**HALF, "compute_dtype": "float32"}):
        compute_dtype.compute_dtype(entry)
    compute_dtype.compute_dtype(HALF, "cuda")


def test_the_measurement_is_of_both_products_and_made_once(monkeypatch):
    """Of a clock that gives bfloat16 8 and float32 2 seconds at best, with an outlier each."""
    measured.cache_clear()
    spans = [1.0, 1.0, 8.0, 2.0, 9.0, 2.0, 8.0, 50.0, 99.0, 3.0, 8.5, 2.5, 8.0, 2.0]
    ticks = cycle(tick for span in spans for tick in (0.0, span))
    monkeypatch.setattr(time, "thread_time", lambda: next(ticks))
    threads = torch.get_num_threads()
    assert measured("bfloat16") == 4.0 == measured("bfloat16") and torch.get_num_threads() == threads
    measured.cache_clear()
    monkeypatch.undo()
    assert 0 < measured("bfloat16") < 1e4
    measured.cache_clear()


# ------------------------------------------------------------------------------------------------------------ sentence


def test_the_sentence_names_both_dtypes_and_the_factor(slow, capsys):
    for _ in range(2):
        compute_dtype.tell(HALF, "float32")
    assert capsys.readouterr().err == (
        "Products in bfloat16 take 12 times as long as in float32 on this processor: forward passes are computed in "
        "float32, from weights rounded to bfloat16 (compute_dtype: native of the model prevents it).\n"
    )
    native = compute_dtype.sentence({**HALF, "compute_dtype": "native"}, "bfloat16") or ""
    assert native.endswith("and forward passes are computed in it: compute_dtype: native asks for it.")
    before = compute_dtype.sentence(HALF, "bfloat16") or ""  # a cell that was compressed where it is fast
    assert before.endswith("forward passes are computed in it: as before on another processor.")


def test_nothing_is_said_where_nothing_changes(slow, monkeypatch):
    assert compute_dtype.sentence(HALF, "bfloat16", "cuda") is None
    assert compute_dtype.sentence({"dtype": "float32"}, "float32") is None
    monkeypatch.setattr(compute_dtype, "slowdown", lambda dtype: 1.0)
    assert compute_dtype.sentence(HALF, "bfloat16") is None
    assert "computed in float32" in (compute_dtype.sentence(HALF, "float32") or "")


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_a_float32_model_with_rounded_weights(tmp_path, family):
    spec = saved(tmp_path, family)
    expected = perplexity.window_losses(rounded(spec), tokens(3), 2)
    for model in (LazyBlocks(spec, compute_dtype="float32"), load(spec, compute_dtype="float32")):
        assert torch.equal(perplexity.window_losses(model, tokens(3), 2), expected)
    assert not torch.equal(perplexity.window_losses(load({**spec, "dtype": "float32"}), tokens(3), 2), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_the_one_that_transformers_gives_the_half_model(tmp_path, family):
    spec = saved(tmp_path, family)
    half, wide = load(spec).state_dict(), load(spec, compute_dtype="float32")
    assert wide.dtype == torch.float32 and dtype_name(wide) == "bfloat16"
    for name, own in wide.state_dict().items():
        assert own.dtype == torch.float32 and torch.equal(own, half[name].float()), name


def test_a_float64_checkpoint_has_the_same_weights_by_way_of_float32(tmp_path):
    spec = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    between = 1 + 2**-8 + 2**-40  # a little more than half way between two values of bfloat16, in float32 half way
    wide = {name: torch.full(own.shape, between, dtype=torch.float64) for name, own in load_file(file).items()}
    save_file(wide, file, metadata={"format": "pt"})
    half, lazy = load(spec).state_dict(), LazyBlocks(spec, compute_dtype="float32")
    for name, own in load(spec, compute_dtype="float32").state_dict().items():
        assert torch.equal(own, half[name].float())
    with lazy.open(0) as block:
        for name, own in block.state_dict().items():
            assert torch.equal(own, half[f"{lazy.name}.0.{name}"].float())


@pytest.mark.parametrize("family", FAMILIES)
def test_written_weights_are_rounded_to_the_model_dtype(tmp_path, family):
    spec = saved(tmp_path, family)
    wide, half = model_linears(load(spec, compute_dtype="float32")), model_linears(load(spec))
    for name, linear in wide.items():
        new = torch.randn(linear.shape, generator=torch.Generator().manual_seed(0)) / 3
        assert not held_by_bfloat16(new)
        linear.replace(new)
        half[name].replace(new)
        assert held_by_bfloat16(linear.weight()) and torch.equal(linear.weight(), half[name].weight())
        assert torch.equal(linear.as_stored(new), linear.stored())


def test_weights_are_rounded_when_a_block_is_read(tmp_path):
    lazy = LazyBlocks(saved(tmp_path), compute_dtype="float32")

    def write(index: int, block: nn.Module) -> None:
        for linear in linears(block, f"{lazy.name}.{index}"):
            linear.replace(torch.full(linear.shape, 1 / 3))

    lazy.change(write)
    with lazy.open(1) as block:
        assert {float(linear.weight()[0, 0]) for linear in linears(block, "")} == {0.333984375}


def test_a_model_that_is_computed_as_it_is_stored_is_left_alone(tmp_path):
    spec = saved(tmp_path)
    for model in (load(spec), load(spec, compute_dtype="bfloat16"), LazyBlocks(spec, compute_dtype="bfloat16").model):
        assert model.dtype == torch.bfloat16 and dtype_name(model) == "bfloat16"
    wide = load({**spec, "dtype": "float32"}, compute_dtype="float32")
    before = {name: own.clone() for name, own in wide.state_dict().items()}
    round_as_stored(wide)
    assert all(torch.equal(own, before[name]) for name, own in wide.state_dict().items())


def test_a_weight_that_the_stored_dtype_cannot_hold_is_named(tmp_path):
    model = build("llama")
    model.get_submodule("model.layers.1.mlp.up_proj").get_parameter("weight").data[2, 3] = 1e5
    model.save_pretrained(tmp_path)
    spec = {"path": str(tmp_path), "dtype": "float16"}
    said = r"must be finite. Got NaN or Inf in model\.layers\.1\.mlp\.up_proj\.weight instead"
    with pytest.raises(InputError, match=said):
        load(spec, compute_dtype="float32")
    lazy = LazyBlocks(spec, compute_dtype="float32")
    with pytest.raises(InputError, match=said), lazy.open(1):
        pass
