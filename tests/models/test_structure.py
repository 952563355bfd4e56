"""Models of every family: found by structure, written back unchanged, loaded whole or refused with a sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from layerwise.models.loading import load
from layerwise.models.structure import Linear, find_blocks, linears
from layerwise.runtime.errors import InputError
from tests.support.model_families import FAMILIES, HIDDEN, build, tokens
from tests.support.paths import ROOT
from tests.support.typing_helpers import some

torch.set_num_threads(1)
DOCUMENT = ROOT / "docs/models.md"
every_family = pytest.mark.parametrize("family", FAMILIES)


def logits(model, batch=None):
    with torch.no_grad():
        return model(input_ids=tokens(3) if batch is None else batch, use_cache=False).logits


def every_linear(model) -> list[Linear]:
    name, blocks = find_blocks(model)
    return [layer for index, block in enumerate(blocks) for layer in linears(block, f"{name}.{index}")]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(spec: dict | Path) -> str:
    with pytest.raises(InputError) as error:
        load({"path": str(spec)} if isinstance(spec, Path) else spec)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


# -------------------------------------------------------------------------------------------------------- structure


@every_family
def test_blocks_and_layers_are_found(family):
    model = build(family)
    name, blocks = find_blocks(model)
    assert model.get_submodule(name) is blocks
    assert len(blocks) == model.config.num_hidden_layers
    found = every_linear(model)
    assert len({layer.name for layer in found}) == len(found)
    for layer in found:
        assert model.get_parameter(layer.stored_in(layer.name)) is layer.module.get_parameter(layer.parameter)
        assert layer.name.endswith(f".{layer.inside}")
    inside = [layer.inside.rpartition(".")[2] for layer in linears(blocks[0], f"{name}.0")]
    expected = ",".join(FAMILIES[family].taps).split(",")
    assert sorted(inside) == sorted(layer.rpartition(".")[2] for layer in expected)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replacing_each_weight_with_itself_changes_no_logit(family, dtype):
    model = build(family, dtype=dtype)
    before = logits(model)
    for layer in every_linear(model):
        layer.replace(layer.weight())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_is_a_float32_copy_that_multiplies_the_inputs(family):
    model = build(family)
    inputs = torch.randn(5, HIDDEN)
    layer = next(layer for layer in every_linear(model) if layer.inside.endswith(("q_proj", "c_attn")))
    weight = layer.weight()
    assert layer.transposed == (family == "gpt2")
    assert weight.shape == layer.shape and weight.is_contiguous() and weight.dtype == torch.float32
    outputs = layer.module(inputs) - layer.module(torch.zeros_like(inputs))  # without the bias
    torch.testing.assert_close(outputs, inputs @ weight.T)
    weight.zero_()
    assert layer.weight().count_nonzero() > 0
    layer.replace(weight)
    assert layer.weight().count_nonzero() == 0


def test_a_weight_of_another_shape_is_refused():
    layer = every_linear(build("llama"))[0]
    with pytest.raises(ValueError, match="The new weight of .* must be"):
        layer.replace(torch.zeros(1, HIDDEN))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_names_its_layer(value):
    layer = every_linear(build("gpt2"))[1]
    layer.module.get_parameter("weight")[0, 0] = value
    with pytest.raises(InputError, match=r"transformer\.h\.0\.attn\.c_proj must be finite"):
        layer.weight()


def test_the_outermost_list_with_most_linear_parameters_holds_the_blocks():
    experts = [nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)] * 4)}) for _ in range(2)]
    model = nn.ModuleDict(
        {
            "embeddings": nn.ModuleList([nn.Embedding(1000, 8)]),
            "vision": nn.ModuleList([nn.Linear(8, 4)]),
            "text": nn.ModuleList(experts),
        }
    )
    assert find_blocks(model) == ("text", model["text"])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(InputError, match="no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


@every_family
def test_nothing_but_the_layers_weights_is_written_to(family):
    model = build(family)
    before = {name: value.clone() for name, value in model.named_parameters()}
    layers = every_linear(model)
    for layer in layers:
        layer.replace(torch.zeros(layer.shape))
    written = {layer.stored_in(layer.name) for layer in layers}
    for name, value in model.named_parameters():
        assert value.count_nonzero() == 0 if name in written else torch.equal(value, before[name])
    assert not any(name.endswith("bias") or "norm" in name or "embed" in name for name in written)


@every_family
def test_the_document_has_the_family(family):
    rows = [line.split("|")[1:4] for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("| ")]
    told = {name.strip(): (taps.strip(), particular) for name, taps, particular in rows if name.strip() != "family"}
    taps, particular = told[family]
    own = dict.fromkeys(re.sub(r"experts\.\d+", "experts.*", tap).replace(",", ", ") for tap in FAMILIES[family].taps)
    assert taps == "; ".join(own)
    model = build(family)
    tied = some(model.get_output_embeddings()).weight is model.get_input_embeddings().weight
    assert ("tied embeddings" in particular) == tied
    assert ("experts" in particular) == any(layer.expert is not None for layer in every_linear(model))
    assert ("[in, out]" in particular) == any(layer.transposed for layer in every_linear(model))
    assert ("sliding window" in particular) == bool(getattr(model.config, "sliding_window", None))


# ---------------------------------------------------------------------------------------------------------- loading


@every_family
@pytest.mark.parametrize("shards", [False, True])
def test_a_saved_model_is_loaded_as_it_was(family, shards, tmp_path):
    model = build(family)
    options: dict[str, Any] = {"max_shard_size": "10KB"} if shards else {}
    model.save_pretrained(tmp_path, **options)
    assert shards == (len(list(tmp_path.glob("*.safetensors"))) > 1)
    loaded = load({"path": str(tmp_path), "dtype": "float32"})
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits(loaded), logits(model))


def test_the_dtype_is_the_entrys_or_the_saved_one(saved):
    assert load({"path": saved, "dtype": "bfloat16"}).dtype == torch.bfloat16
    build("llama", dtype=torch.bfloat16).save_pretrained(saved)
    assert load({"path": saved}).dtype == torch.bfloat16


def test_a_missing_folder_is_named(tmp_path):
    assert refused(tmp_path / "absent") == f"The model folder {tmp_path / 'absent'} does not exist."


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    told = {"config.json": "has no config.json", "model.safetensors": "has no weights: model.safetensors or"}
    assert told[name] in refused(saved)


def test_missing_tensors_are_named(saved):
    tensors = load_file(saved / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name and "lm_head" not in name}
    save_file(left, saved / "model.safetensors", {"format": "pt"})
    sentence = refused(saved)
    assert "lack tensors of" in sentence
    assert "lm_head.weight, model.layers.1.mlp.down_proj.weight" in sentence and "and 1 more" in sentence


def test_a_missing_shard_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-0*.safetensors"))[-1]
    assert torch.equal(logits(load({"path": tmp_path})), logits(build("llama")))
    shard.unlink()
    assert shard.name in refused(tmp_path)


def test_truncated_weights_are_refused(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors is cut off: it has" in refused(saved)


def test_weights_of_another_shape_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    sentence = refused(saved)
    assert "Got 6 tensors of another shape instead: model.layers.0.mlp.down_proj.weight" in sentence


def test_a_config_that_is_not_understood_is_refused(saved):
    (saved / "config.json").write_text("{")
    assert refused(saved) == f"{saved}/config.json is not valid JSON."
    (saved / "config.json").write_text('{"model_type": "unheard_of"}')
    known = f"model_type in {saved}/config.json must be one that transformers"
    assert refused(saved).startswith(known) and refused(saved).endswith('knows. Got "unheard_of" instead.')


def test_a_quantised_model_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (saved / "config.json").write_text(json.dumps(config))
    assert "already quantised" in refused(saved)


def test_weights_that_are_not_finite_are_named(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    assert "Got NaN or Inf in model.norm.weight instead" in refused(saved)


def test_a_hub_model_without_network_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    sentence = refused({"hub": "nobody/no-such-model", "revision": "0" * 40})
    assert sentence.startswith(f"nobody/no-such-model at revision {'0' * 40} is not in the local cache")
