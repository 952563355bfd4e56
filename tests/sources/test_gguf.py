"""A GGUF file becomes a folder of its model and tokenizer, once; one that would not is refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from layerwise.models.loading import load
from layerwise.runtime.errors import InputError
from layerwise.sources import fingerprint, gguf_conversion, gguf_files, gguf_models
from layerwise.sources.checkpoint_files import (
    check_checkpoint,
    layer_inputs,
    longest_sequence,
    model_files,
    model_folder,
)
from layerwise.sources.gguf_header import TYPES, read_header
from layerwise.sources.shapes import shape_of
from layerwise.sources.tokenizer_files import load_tokenizer
from layerwise.study.config_validation import validate
from tests.support import gguf_files as made
from tests.support.gguf_files import TOKENS, dequantised, entry, expected, write
from tests.support.typing_helpers import some

FILE = "tiny.gguf"


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAYERWISE_CACHE", raising=False)
    yield


def unconverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file be converted any more."""

    def refuse(*_: object) -> None:
        raise AssertionError("a file was converted")

    monkeypatch.setattr(gguf_conversion, "convert", refuse)


# ---------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize(("kind", "tied"), [("Q4_1", True), ("Q8_0", False), ("Q4_0", False), ("F16", True)])
def test_the_folder_holds_what_the_file_does(tmp_path: Path, kind: str, tied: bool):
    """Against an own reader of each type, queries and keys in the order of transformers' heads; bit for bit."""
    own = expected(write(tmp_path / FILE, kind, tied), kind)
    found = load(entry(tmp_path / FILE))
    for name, value in own.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name
    tokens = torch.arange(40)[None] * 7 % len(TOKENS)
    assert torch.equal(own(tokens).logits, found(tokens).logits)


def test_the_folder_is_what_transformers_reads(tmp_path: Path):
    write(tmp_path / FILE, "Q4_1")
    tokens = torch.arange(40)[None] * 7 % len(TOKENS)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=torch.float32)(tokens).logits
    assert torch.equal(load(entry(tmp_path / FILE))(tokens).logits, theirs)


@pytest.mark.parametrize(("kind", "stored"), [("F16", torch.float16), ("F32", torch.float32), ("Q8_0", torch.float32)])
def test_weights_take_no_more_room_than_the_file_has_bits(tmp_path: Path, kind: str, stored: torch.dtype):
    write(tmp_path / FILE, kind)
    weights = load_file(model_folder(entry(tmp_path / FILE)) / "model.safetensors")
    assert {weight.dtype for weight in weights.values() if weight.ndim == 2} == {stored}


def test_shape_and_sizes_are_known_from_the_header(tmp_path: Path):
    write(tmp_path / FILE, "Q4_1")
    known, lengths = shape_of(entry(tmp_path / FILE)), layer_inputs(entry(tmp_path / FILE))
    assert not (tmp_path / "results").exists()  # nothing was converted for it
    local = {"path": str(model_folder(entry(tmp_path / FILE)))}
    assert known == shape_of(local) and some(known).fetched and lengths == layer_inputs(local)
    assert longest_sequence(entry(tmp_path / FILE)) == longest_sequence(local) == made.CONTEXT
    assert model_files(entry(tmp_path / FILE)) == [tmp_path / FILE]


# -------------------------------------------------------------------------------------------------------- the tokenizer


def pieces(path: Path, text: str) -> list[str]:
    tokenizer = load_tokenizer(entry(path))
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in tokenizer(text)["input_ids"]]


@pytest.mark.parametrize(("pre", "cut"), [("smollm", ["Ġ", "1", "9", "0"]), ("gpt-2", ["Ġ", "190"])])
def test_digits_are_cut_as_the_file_says(tmp_path: Path, pre: str, cut: list[str]):
    write(tmp_path / FILE, changes={"tokenizer.ggml.pre": pre})
    assert pieces(tmp_path / FILE, " 190") == cut
    assert pieces(tmp_path / FILE, "   the²")[:3] == ["ĠĠ", "Ġth", "e"]


@pytest.mark.parametrize(("pre", "adds"), [("smollm", False), ("llama-bpe", True)])
@pytest.mark.parametrize("said", [True, False, None])
def test_a_text_begins_as_the_file_says_or_its_kind_does(tmp_path: Path, pre: str, adds: bool, said: bool | None):
    write(tmp_path / FILE, changes={"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": said})
    begins = pieces(tmp_path / FILE, "a") == ["<|im_start|>", "a"]
    assert begins == (adds if said is None else said)


@pytest.mark.parametrize(("prefix", "first"), [(None, ["<s>", "▁a", "▁▁", "b"]), (False, ["<s>", "a", "▁▁", "b"])])
def test_blanks_of_a_sentencepiece_vocabulary(tmp_path: Path, prefix: bool | None, first: list[str]):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "▁", "▁▁", "▁a"]
    tokens += [f"<extra_{number}>" for number in range(len(TOKENS) - len(tokens))]
    own = {"model": "llama", "pre": None, "merges": None, "tokens": tokens, "add_bos_token": None}
    own |= {"scores": [-float(number) for number in range(len(tokens))], "add_space_prefix": prefix}
    own |= {"token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259), "unknown_token_id": 0}
    write(tmp_path / FILE, changes={f"tokenizer.ggml.{key}": value for key, value in own.items()})
    assert pieces(tmp_path / FILE, "a  b") == first
    assert pieces(tmp_path / FILE, "é")[-2:] == ["<0xC3>", "<0xA9>"]


def test_special_tokens_and_the_template_of_a_chat_come_along(tmp_path: Path):
    write(tmp_path / FILE, changes={"tokenizer.chat_template": "{{ messages }}"})
    tokenizer = AutoTokenizer.from_pretrained(model_folder(entry(tmp_path / FILE)))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template == "{{ messages }}" and tokenizer("a<|im_end|>")["input_ids"][-1] == 2


# ----------------------------------------------------------------------------------------------------- made once, whole


def test_a_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / FILE)
    folder = model_folder(entry(tmp_path / FILE))
    unconverted(monkeypatch)
    shutil.copy(tmp_path / FILE, tmp_path / "copy.gguf")
    assert model_folder(entry(tmp_path / FILE)) == folder == model_folder(entry(tmp_path / "copy.gguf"))
    assert {path.parent for path in (tmp_path / "results/gguf").iterdir()} == {tmp_path / "results/gguf"}


def test_another_content_at_the_same_path_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the same size and with the same time of modification, after the first one's hash was noted."""
    monkeypatch.setattr(gguf_files, "SETTLED", 0.0)
    first = write(tmp_path / FILE, "F32", seed=0)
    before = (tmp_path / FILE).stat()
    folder = model_folder(entry(tmp_path / FILE))
    assert list((tmp_path / "results/gguf/hashes").iterdir())
    time.sleep(0.02)  # the file system's clock has a tick of some milliseconds
    second = write(tmp_path / FILE, "F32", seed=1)
    os.utime(tmp_path / FILE, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (tmp_path / FILE).stat().st_size == before.st_size
    assert model_folder(entry(tmp_path / FILE)) != folder
    name = "model.layers.1.self_attn.k_proj.weight"
    found = load(entry(tmp_path / FILE)).state_dict()[name]
    assert torch.equal(found, second.state_dict()[name]) and not torch.equal(found, first.state_dict()[name])


def test_a_hash_is_noted_of_a_file_that_has_settled_alone(tmp_path: Path):
    write(tmp_path / FILE)
    gguf_files.content(entry(tmp_path / FILE))
    assert not (tmp_path / "results/gguf/hashes").exists()


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / FILE)
    monkeypatch.setattr(gguf_conversion, "save_weights", fail)
    with pytest.raises(InputError, match="no space is left on the disk"):
        model_folder(entry(tmp_path / FILE))
    assert [path.name for path in (tmp_path / "results/gguf").iterdir()] == []


def test_a_folder_that_lost_a_file_is_made_again(tmp_path: Path):
    write(tmp_path / FILE)
    folder = model_folder(entry(tmp_path / FILE))
    (folder / "tokenizer.json").unlink()
    assert model_folder(entry(tmp_path / FILE)) == folder and (folder / "tokenizer.json").is_file()


# ------------------------------------------------------------------------------------------------------- the provenance


def fingerprinted(path: Path) -> dict[str, Any]:
    fingerprint.main(["--model", json.dumps(entry(path)), "--out", "results/models/tiny.json"])
    return json.loads(Path("results/models/tiny.json").read_text("utf-8"))


@pytest.mark.parametrize(("kind", "told"), [("Q4_1", "Q4_1 (16), F32 (5)"), ("F16", "F16 (16), F32 (5)")])
def test_rows_say_what_the_file_was_quantised_to(tmp_path: Path, kind: str, told: str):
    write(tmp_path / FILE, kind)
    facts = fingerprinted(tmp_path / FILE)
    assert facts["model_quantisation"] == told and facts["model_source"] == str(tmp_path / FILE)
    assert facts["model_sha256"] == fingerprint.sha256(tmp_path / FILE)
    assert set(facts["files"]) == {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}


def test_a_file_that_is_edited_meanwhile_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / FILE)
    fingerprinted(tmp_path / FILE)
    fingerprint.check_unchanged(entry(tmp_path / FILE), Path("results/models/tiny.json"))
    write(tmp_path / FILE, seed=1)
    unconverted(monkeypatch)
    with pytest.raises(
        InputError, match="tiny.gguf is no longer the file from which results/models/tiny.json was made"
    ):
        fingerprint.check_unchanged(entry(tmp_path / FILE), Path("results/models/tiny.json"))


def test_a_converted_folder_that_was_damaged_is_not_taken(tmp_path: Path):
    write(tmp_path / FILE)
    weights = model_folder(entry(tmp_path / FILE)) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="model.safetensors is damaged: it has changed since the conversion"):
        fingerprinted(tmp_path / FILE)
    fingerprinted(tmp_path / FILE)  # it was made again


# ------------------------------------------------------------------------------------------------------ what is refused


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def cut_in_header(path: Path) -> None:
    os.truncate(path, 300)


def other_magic(path: Path) -> None:
    path.write_bytes(b"GGML" + path.read_bytes()[4:])


def big_endian(path: Path) -> None:
    path.write_bytes(b"GGUF\0\0\0\3" + path.read_bytes()[8:])


def version_one(path: Path) -> None:
    path.write_bytes(b"GGUF\1\0\0\0" + path.read_bytes()[8:])


def unknown_type(path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    content = bytearray(path.read_bytes())
    place = content.index(name) + len(name) + 4 + 2 * 8  # after its dimensions
    content[place : place + 4] = (38).to_bytes(4, "little")
    path.write_bytes(content)


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (cut, "is cut off: it has"),
    (cut_in_header, "is cut off: it has 300 bytes, which end in its header"),
    (other_magic, "is not a GGUF file"),
    (big_endian, "must be little-endian"),
    (version_one, "must be GGUF of version 2 or 3. Got version 1"),
    (unknown_type, "Got blk.0.attn_q.weight of type 38 instead"),
    (lambda path: path.unlink(), "does not exist"),
    (lambda path: path.write_bytes(b""), "is not a GGUF file"),
]


@pytest.mark.parametrize(("damage", "sentence"), BROKEN)
def test_a_broken_file_is_refused_before_any_job(tmp_path: Path, damage: Callable[[Path], object], sentence: str):
    write(tmp_path / FILE)
    damage(tmp_path / FILE)
    with pytest.raises(InputError, match=sentence) as caught:
        check_checkpoint("tiny", entry(tmp_path / FILE))
    assert FILE in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", range(20))
def test_a_file_that_ends_anywhere_is_refused(tmp_path: Path, share: int):
    write(tmp_path / FILE)
    os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size * share // 20)
    with pytest.raises(InputError):
        check_checkpoint("tiny", entry(tmp_path / FILE))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": "bert"}, "must be of a decoder that transformers reads .* Got 'bert' instead"),
    ({"general.architecture": "t5"}, "Got 't5' instead"),
    ({"llama.rope.scaling.type": "yarn"}, "Got llama.rope.scaling.type: yarn instead"),
    ({"llama.attention.key_length": 32}, "Got llama.attention.key_length: 32 instead"),
    ({"llama.expert_count": 4}, "Got llama.expert_count: 4 instead"),
    ({"llama.attention.sliding_window": 8}, "Got llama.attention.sliding_window: 8 instead"),
    ({"llama.block_count": None}, "must have llama.block_count, a positive integer. Got None instead"),
    ({"split.count": 3}, "must be a whole model. Got one of 3 files instead"),
    ({"tokenizer.ggml.model": None}, "has no tokenizer"),
    ({"tokenizer.ggml.model": "bert"}, "must be of the kind gpt2 or llama. Got 'bert' instead"),
    ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
    ({"tokenizer.ggml.tokens": TOKENS[:-1]}, f"must embed the tokens of its tokenizer, {len(TOKENS) - 1}"),
    ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, "must have every token once"),
    ({"tokenizer.ggml.merges": None}, "must have merges"),
    ({"tokenizer.ggml.pre": "hieroglyphs"}, "in a known way: .* Got 'hieroglyphs' as tokenizer.ggml.pre"),
    ({"tokenizer.ggml.pre": None}, "Got None as tokenizer.ggml.pre"),
    ({"tokenizer.ggml.token_type": [1]}, "must have token_type of each token"),
    ({"tokenizer.ggml.bos_token_id": 9999}, "must have a bos_token_id from 0 to"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_a_file_that_would_not_be_read_as_it_is(tmp_path: Path, changes: dict[str, Any], sentence: str):
    write(tmp_path / FILE, changes=changes)
    with pytest.raises(InputError, match=sentence):
        check_checkpoint("tiny", entry(tmp_path / FILE))


@pytest.mark.parametrize("key", ["attention.key_length", "attention.value_length"])
def test_a_key_that_says_what_is_so_anyway_is_no_reason(tmp_path: Path, key: str):
    write(tmp_path / FILE, changes={f"llama.{key}": made.HIDDEN // made.HEADS, "llama.rope.scaling.type": "none"})
    check_checkpoint("tiny", entry(tmp_path / FILE))


def test_one_of_several_files_is_named_by_its_name(tmp_path: Path):
    write(tmp_path / "tiny-00001-of-00003.gguf")
    with pytest.raises(InputError, match="must be a whole model. Got one of 3 files instead"):
        check_checkpoint("tiny", entry(tmp_path / "tiny-00001-of-00003.gguf"))


@pytest.mark.parametrize(
    ("name", "sentence"), [("rope_freqs.weight", "scales its rotary frequencies"), ("x.weight", "")]
)
def test_a_tensor_that_no_weight_is_made_of(tmp_path: Path, name: str, sentence: str):
    own = made.model()
    tensors = {
        made.name_in_file(key): (made.turned(key, value.numpy()), "F32") for key, value in own.state_dict().items()
    }
    made.write_file(tmp_path / FILE, {**tensors, name: (tensors["output_norm.weight"][0], "F32")}, made.METADATA)
    with pytest.raises(InputError, match=sentence or "must have no tensors that LlamaForCausalLM does not use. Got 1"):
        check_checkpoint("tiny", entry(tmp_path / FILE))
        model_folder(entry(tmp_path / FILE))


def test_a_tensor_that_the_model_needs(tmp_path: Path):
    own = made.model()
    tensors = {
        made.name_in_file(key): (made.turned(key, value.numpy()), "F32") for key, value in own.state_dict().items()
    }
    del tensors["blk.1.attn_k.weight"]
    made.write_file(tmp_path / FILE, tensors, made.METADATA)
    with pytest.raises(
        InputError, match="must have every tensor of LlamaForCausalLM, .* such as model.layers.1.self_attn"
    ):
        model_folder(entry(tmp_path / FILE))


def test_sizes_of_types_are_those_of_gguf():
    import gguf

    for number, (name, *sizes) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and tuple(sizes) == gguf.GGML_QUANT_SIZES[kind]


def test_keys_are_those_that_transformers_takes():
    names = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
    for kind, keys in gguf_models.TAKEN.items():
        mapped = GGUF_CONFIG_MAPPING[names.get(kind, kind)]
        assert {key for key, value in mapped.items() if value} == set(keys), kind


def test_types_are_read_as_gguf_reads_them():
    """The truth of these tests beside the library's own reader."""
    import gguf
    import numpy as np

    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    for kind in ("Q8_0", "Q4_1", "Q4_0", "F16"):
        theirs = gguf.quants.dequantize(gguf.quants.quantize(values, made.KINDS[kind]), made.KINDS[kind])
        assert np.allclose(dequantised(values, kind), theirs, rtol=1e-6, atol=1e-7)


def test_a_damaged_header_takes_no_memory(tmp_path: Path):
    content = b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") * 2
    (tmp_path / FILE).write_bytes(content + b"\xff" * 64)
    with (tmp_path / FILE).open("rb") as stream, pytest.raises(InputError, match="is cut off"):
        read_header(stream, (tmp_path / FILE).stat().st_size, "The file")


# ----------------------------------------------------------------------------------------------------------- the config

STUDY = {
    "texts": {"t": {"path": "t.txt"}},
    "calibration": {"c": {"text": "t", "samples": 1, "length": 8, "seed": 0}},
    "evaluation": {"e": {"text": "t", "length": 8}},
    "targets": [{"sparsity": 0.5, "pattern": "row"}],
    "methods": {"magnitude": {}},
}


def test_an_entry_of_the_config():
    full = validate({**STUDY, "models": {"tiny": {"gguf": "tiny.gguf"}}})
    assert full["models"]["tiny"] == {"gguf": "tiny.gguf", "dtype": "float32", "trust_remote_code": False}
    for other in ({"path": "x"}, {"hub": "x", "revision": "y"}):
        with pytest.raises(InputError, match="models.tiny must have either path or hub.revision or gguf"):
            validate({**STUDY, "models": {"tiny": {"gguf": "tiny.gguf", **other}}})
