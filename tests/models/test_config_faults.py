"""A model with a broken config.json is refused in one sentence that names the file, the key and the value."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import AutoConfig, BertConfig, BertModel

from layerwise.models.loading import load
from layerwise.models.streaming import LazyBlocks
from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief
from layerwise.sources.checkpoint_files import check_checkpoint
from layerwise.sources.config_faults import config_fault
from layerwise.sources.model_config import check_config
from layerwise.sources.tokenizer_files import load_tokenizer
from tests.support.model_families import build
from tests.support.paths import ROOT

BUILD = "a value with which transformers .* can build a model of type '.*'"
SIZE = "a positive integer"
# Family, key, value, and what the sentence says that the value must be.
BROKEN: tuple[tuple[str, str, Any, str], ...] = (
    ("llama", "hidden_act", "nonesuch", BUILD),
    ("llama", "hidden_act", 3, "a string"),
    ("llama", "model_type", "nonesuch", "one that transformers .* knows"),
    ("llama", "model_type", None, "one that transformers .* knows"),
    ("llama", "model_type", "t5", "that of a decoder-only language model"),
    ("llama", "rope_parameters.rope_type", "nonesuch", BUILD),
    ("llama", "rope_parameters.rope_type", "linear", BUILD),
    ("llama", "rope_parameters", "x", "an object or null"),
    ("llama", "num_attention_heads", 0, BUILD),
    ("llama", "num_attention_heads", 6, BUILD),
    ("llama", "num_attention_heads", -4, SIZE),
    ("llama", "num_key_value_heads", 3, "a divisor of num_attention_heads, 4"),
    ("llama", "num_key_value_heads", 0, BUILD),
    *(("llama", "hidden_size", value, SIZE) for value in ("a", -3, 0, 1.5, True)),
    ("llama", "hidden_size", None, "an integer"),
    ("llama", "hidden_size", 10**30, BUILD),
    ("llama", "num_hidden_layers", "2", SIZE),
    ("llama", "num_hidden_layers", None, "an integer"),
    ("llama", "dtype", "nonesuch", BUILD),
    ("llama", "dtype", 3, BUILD),
    ("llama", "dtype", "int8", BUILD),
    ("llama", "vocab_size", "x", SIZE),
    ("llama", "tie_word_embeddings", "yes", "true or false"),
    ("llama", "rms_norm_eps", "a", "a floating-point number"),
    ("llama", "max_position_embeddings", None, "an integer"),
    ("llama", "layer_types", ["full_attention"] * 5, BUILD),
    ("llama", "layer_types", ["nonesuch"] * 2, BUILD),
    ("llama", "pad_token_id", 10**6, BUILD),
    ("llama", "head_dim", 0, BUILD),
    ("llama", "text_config", 3, "an object"),
    ("llama", "quantization_config", 3, BUILD),
    ("llama", "id2label", 3, BUILD),
    ("mistral", "sliding_window", "x", "an integer or null"),
    ("mixtral", "num_experts_per_tok", 9, "from 1 to num_local_experts, 4"),
    ("mixtral", "num_experts", "x", BUILD),
    ("qwen2_moe", "num_experts_per_tok", 9, "from 1 to num_experts, 4"),
    ("qwen2_moe", "decoder_sparse_step", 0, BUILD),
    ("gpt2", "activation_function", "nonesuch", BUILD),
    ("gpt2", "n_head", 5, BUILD),
    ("gpt2", "n_embd", "a", SIZE),
    ("gpt2", "n_positions", None, "an integer"),
    ("gpt2", "resid_pdrop", 7, BUILD),
    ("falcon", "activation", "nonesuch", BUILD),
)
LIBRARY_WORDS = ("KeyError", "Error:", "alidation error", "<class", "Traceback")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder of a model that is whole; a test that breaks its config.json mends it."""
    found = {family: tmp_path_factory.mktemp(family) for family, *_ in BROKEN}
    for family, folder in found.items():
        build(family).save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes((ROOT / "resources/demo/tokenizer.json").read_bytes())
        load({"path": str(folder)})
    return found


def broken(folder: Path, key: str, value: Any) -> dict[str, Any]:
    """The config.json of a folder with another value."""
    config = json.loads((folder / "config.json").read_text())
    *outer, last = key.split(".")
    part = config
    for name in outer:
        part = part[name]
    part[last] = value
    return config


def sentences(folder: Path, config: Any, steps: Any = (load, LazyBlocks)) -> set[str]:
    """What a model is refused with that has this config.json, which is mended afterwards."""
    file = folder / "config.json"
    before = file.read_text()
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    told = set[str]()
    try:
        for step in steps:
            with pytest.raises(InputError) as refused:
                step({"path": str(folder)})
            told.add(str(refused.value))
    finally:
        file.write_text(before)
    assert all(one.endswith(".") and one.isprintable() for one in told)
    return told


@pytest.mark.parametrize(("family", "key", "value", "wanted"), BROKEN, ids=lambda part: str(part)[:40])
def test_a_broken_value_is_named(folders: dict[str, Path], family: str, key: str, value: Any, wanted: str):
    folder = folders[family]
    (told,) = sentences(folder, broken(folder, key, value))
    assert str(folder / "config.json") in told
    assert not any(words in told for words in LIBRARY_WORDS)
    assert re.match(rf"{re.escape(key)} in \S*config.json must be {wanted}\. Got .* instead(: .*)?\.$", told)
    assert brief(json.dumps(value), 80) in told


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt2"])
def test_every_value_of_a_config_may_be_of_another_type(folders: dict[str, Path], family: str):
    """What no model notices may pass; what is refused is refused in a sentence of this project."""
    folder, file = folders[family], folders[family] / "config.json"
    before = file.read_text()
    refused = 0
    for key, own in json.loads(before).items():
        file.write_text(json.dumps(broken(folder, key, [] if isinstance(own, str) else "nonesuch")))
        try:
            LazyBlocks({"path": str(folder)})
        except InputError as error:
            refused += 1
            assert f"{key} in {file} must be " in str(error) and str(error).isprintable()
            assert not any(words in str(error) for words in LIBRARY_WORDS)
        finally:
            file.write_text(before)
    assert refused >= 10


def test_a_value_that_is_no_config_is_refused(folders: dict[str, Path]):
    folder = folders["llama"]
    for text, wanted in {"[1]": "must hold a JSON object", "{": "is not valid JSON", "{}": "model_type"}.items():
        (told,) = sentences(folder, text)
        assert told.startswith(str(folder / "config.json")) and wanted in told


def test_a_size_that_no_model_has_is_refused_before_any_job(folders: dict[str, Path]):
    folder = folders["llama"]
    check_checkpoint("m", {"path": str(folder)})
    (told,) = sentences(folder, broken(folder, "hidden_size", "a"), [lambda spec: check_checkpoint("m", spec)])
    assert told == f'hidden_size in {folder / "config.json"} must be a positive integer. Got "a" instead.'


def test_a_window_of_no_tokens_is_refused_unless_it_is_not_used(folders: dict[str, Path]):
    folder = folders["llama"]
    (told,) = sentences(folder, broken(folder, "sliding_window", 0), [lambda spec: check_checkpoint("m", spec)])
    assert "sliding_window in" in told and "must be a positive integer, or null for none. Got 0 instead" in told
    for config in ({"sliding_window": 0, "use_sliding_window": False}, {"sliding_window": None}, {"sliding_window": 1}):
        check_config(folder / "config.json", config)


def test_the_tokenizer_s_step_says_it_too(folders: dict[str, Path]):
    folder = folders["llama"]
    (told,) = sentences(folder, broken(folder, "rms_norm_eps", "a"), [load_tokenizer])
    assert told == f'rms_norm_eps in {folder / "config.json"} must be a floating-point number. Got "a" instead.'


def test_a_model_of_own_code_is_not_run_to_explain_it(folders: dict[str, Path]):
    folder = folders["llama"]
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "own.py").write_text("raise SystemExit('it was run')")
    (told,) = sentences(folder, json.loads((folder / "config.json").read_text()) | own)
    assert 'Got "own" instead: the model has its own code' in told and "trust_remote_code: true" in told


@pytest.mark.parametrize(("key", "default"), [("hidden_size", 4096), ("num_hidden_layers", 32)])
def test_a_size_that_is_left_to_a_default_is_named(folders: dict[str, Path], key: str, default: int):
    config = json.loads((folders["llama"] / "config.json").read_text())
    del config[key]
    (told,) = sentences(folders["llama"], config)
    assert told.endswith(f"; its config.json leaves {key} ({default}) to transformers' defaults.")


def test_a_value_of_the_language_part_is_named_with_its_place(tmp_path: Path):
    whole = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "rms_norm_eps": "a"}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(Exception, match="rms_norm_eps") as raised:
        AutoConfig.from_pretrained(tmp_path)
    told = str(config_fault(tmp_path, cast(Exception, raised.value)))
    wanted = 'must be a floating-point number. Got "a" instead.'
    assert told == f"text_config.rms_norm_eps in {tmp_path / 'config.json'} {wanted}"


def test_an_encoder_is_called_one(tmp_path: Path):
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    BertModel(BertConfig(vocab_size=96, **small)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lack tensors of BertLMHeadModel.*says that they are of BertModel\.$"):
        load({"path": str(tmp_path)})
