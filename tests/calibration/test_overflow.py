"""Weights and activations beyond the model's dtype: detected, the module named, the dtype advised."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from layerwise.calibration.block_stream import Stream
from layerwise.compression.tune import Tunable, descend
from layerwise.contract.layer import Compressed
from layerwise.contract.target import Target
from layerwise.evaluation import perplexity
from layerwise.models import loading
from layerwise.models.streaming import LazyBlocks
from layerwise.runtime.errors import Diverged, InputError
from tests.compression.test_cell import Case, rows
from tests.support.model_families import build, tokens

ROW = Target(0.5)
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
ADVICE = ", use dtype: bfloat16 or float32"


def overflowing(name: str, dtype: torch.dtype = torch.float16) -> PreTrainedModel:
    """A Llama whose float16 activations overflow in one linear layer of its first block, and in no other dtype."""
    model = build("llama", dtype=dtype).eval()
    weight = model.get_submodule(name).get_parameter("weight").data
    weight.mul_(6e4 / float(weight.abs().max()))
    if name == DOWN:
        model.get_submodule(UP).get_parameter("weight").data.mul_(50)
    else:  # what comes back to the residual stream is small
        model.get_submodule(DOWN).get_parameter("weight").data.mul_(1e-3)
    return model


@pytest.fixture(scope="module", params=[UP, DOWN])
def saved(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("overflow")
    overflowing(request.param).save_pretrained(folder / "model")
    return request.param, folder


def sentence(name: str) -> str:
    return f"the output of {name} has NaN or Inf in float16{ADVICE}"


@pytest.mark.parametrize("advance", [True, False], ids=["shared", "sequential"])
def test_activations_that_overflow_name_the_module(saved, advance):
    name, folder = saved
    stream = Stream(LazyBlocks({"path": str(folder / "model")}), tokens(4, 16))
    with pytest.raises(Diverged) as caught, stream.source.open(0):
        stream.collect(0, advance=advance)
    assert str(caught.value) == f"The activations of the calibration are not finite: {sentence(name)}."


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_dtype_that_is_advised_goes_through(saved, dtype):
    name, folder = saved
    stream = Stream(LazyBlocks({"path": str(folder / "model"), "dtype": dtype}), tokens(4, 16))
    for index in range(len(stream.blocks)):
        with stream.source.open(index):
            assert all(torch.isfinite(tap.gram.matrix).all() for tap in stream.collect(index, advance=True))
    found = perplexity.evaluate(LazyBlocks({"path": str(folder / "model"), "dtype": dtype}), tokens(4, 16))
    assert math.isfinite(found["perplexity"])


def test_a_perplexity_that_overflows_names_the_module(saved):
    name, folder = saved
    found = perplexity.evaluate(LazyBlocks({"path": str(folder / "model")}), tokens(4, 16))
    assert found["perplexity"] is None and set(found["losses"]) == {None}
    assert found["reason"].startswith("the model has diverged: The perplexity is not finite")
    assert found["reason"].endswith(f"In the forward pass, {sentence(name)}.")


def test_a_compressed_block_that_overflows_is_named_before_the_next(tmp_path):
    """Sequential mode: the dense block is finite, what the method has made of it is not."""
    model = build("llama", dtype=torch.float16).eval()
    stream = Stream(model, tokens(4, 16))
    stream.collect(0)
    model.get_submodule(UP).get_parameter("weight").data.mul_(6e4)
    model.get_submodule(DOWN).get_parameter("weight").data.mul_(6e4)
    stream.advance(0)
    with pytest.raises(Diverged, match=r"model\.layers\.0\..* has NaN or Inf in float16, use dtype"):
        stream.collect(1)


def test_no_advice_where_none_helps():
    model = build("llama").eval()
    model.get_submodule(UP).get_parameter("weight").data.fill_(3e38)
    with pytest.raises(Diverged, match=f"the output of {UP} has NaN or Inf in float32\\.$"):
        Stream(model, tokens(4, 16)).collect(0)


def test_tuning_does_not_begin_without_a_loss():
    tunable = Tunable(Compressed(torch.ones(4, 4)), ROW, torch.ones(4, 4))
    settings = {"epochs": 1, "weights": 1e-3, "grid": 1e-3}
    with pytest.raises(Diverged, match="Tuning cannot begin: the loss of the compressed layers is nan"):
        descend([tunable], lambda batch: torch.tensor(torch.nan), 2, settings, torch.Generator())


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path, name, value):
    build("llama", dtype=torch.float16).save_pretrained(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[3] = value
    save_file(weights, file, metadata={"format": "pt"})
    spec = {"path": str(tmp_path / "model")}
    expected = rf"must be finite. Got NaN or Inf in {name} instead"
    with pytest.raises(InputError, match=expected):
        loading.load(spec)
    blocks = LazyBlocks(spec)
    with pytest.raises(InputError, match=expected), blocks.outside(), blocks.open(0):
        pass


# --------------------------------------------------------------------------------------------------------------- cells


def test_a_half_precision_model_is_compressed_and_scored_as_it_is_stored(tmp_path):
    case = Case(tmp_path, dtype="float16").prepare()
    for method in ("magnitude", "sparsegpt"):
        cell = case.run(method, ROW, "sequential")
        assert all(row["output_error"] < 0.5 for row in rows(cell))
        assert json.loads((cell / "cell.json").read_text())["provenance"]["dtype"] == "float16"
