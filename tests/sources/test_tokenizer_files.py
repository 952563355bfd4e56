"""The ids of a text are those that the model's tokenizer.json gives, whatever class its config names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as cut
from transformers import AutoTokenizer

from layerwise.runtime.errors import InputError
from layerwise.sources import tokenizer_files, tokens
from layerwise.sources.checkpoint_files import MODEL_VOCABULARIES, check_model
from layerwise.sources.tokenizer_files import PROBE, check_ids, check_prefix_token, load_tokenizer, pipeline_of
from tests.support.typing_helpers import some

TEXT = PROBE * 3 + "".join(f"river item {i * 7919} costs {i * 104729} coins in year {1900 + i}.\n" for i in range(60))
SPECIAL = ["<s>", "</s>", "<unk>"]
DIGITS = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+| ?\p{L}+|\s+"


def byte_level() -> Tokenizer:
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = cut.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return own


def digits_in_threes() -> Tokenizer:
    own = byte_level()
    split = cut.Split(Regex(DIGITS), "isolated")
    own.pre_tokenizer = cut.Sequence([split, cut.ByteLevel(add_prefix_space=False, use_regex=False)])
    return own


def single_digits() -> Tokenizer:
    own = byte_level()
    own.pre_tokenizer = cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)])
    own.normalizer = normalizers.NFC()
    return own


def metaspace() -> Tokenizer:
    own = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return own


def word_piece() -> Tokenizer:
    own = Tokenizer(models.WordPiece(unk_token="<unk>"))
    own.normalizer, own.pre_tokenizer = normalizers.NFD(), cut.BertPreTokenizer()
    return own


def unigram() -> Tokenizer:
    own = Tokenizer(models.Unigram())
    own.normalizer, own.pre_tokenizer = normalizers.NFKC(), cut.Metaspace()
    return own


TRAINERS: dict[str, Callable[..., Any]] = {
    "BPE": trainers.BpeTrainer,
    "WordPiece": trainers.WordPieceTrainer,
    "Unigram": trainers.UnigramTrainer,
}
PIPELINES = (byte_level, digits_in_threes, single_digits, metaspace, word_piece, unigram)
CLASSES = ("GPT2Tokenizer", "LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None)
TYPES = ("llama", "qwen2", "qwen3", "gpt2", "smollm3", "starcoder2", "exaone4", "olmo2", "deepseek_v3", "gemma2")


def write(folder: Path, make: Callable[[], Tokenizer], model_type: str = "llama", **config: Any) -> Tokenizer:
    """The tokenizer of a model's folder; config: of tokenizer_config.json."""
    own = make()
    kind = type(own.model).__name__
    sizes = {"vocab_size": 420, "special_tokens": SPECIAL, "show_progress": False}
    sizes |= {"unk_token": "<unk>"} if kind == "Unigram" else {}
    if make in (byte_level, digits_in_threes, single_digits):
        sizes["initial_alphabet"] = cut.ByteLevel.alphabet()
    own.train_from_iterator([TEXT], TRAINERS[kind](**sizes))
    folder.mkdir(exist_ok=True)
    own.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    told = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in told.items() if value}))
    return own


def ids(tokenizer: Any, special: bool = False) -> list[int]:
    return tokenizer(TEXT, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("make", PIPELINES)
def test_the_file_decides_and_not_the_class(tmp_path: Path, make, kind: str | None):
    own = write(tmp_path, make, tokenizer_class=kind)
    assert ids(load_tokenizer({"path": str(tmp_path)})) == own.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize("model_type", TYPES)
def test_the_file_decides_and_not_the_model_type(tmp_path: Path, model_type: str):
    own = write(tmp_path, digits_in_threes, model_type)
    assert ids(load_tokenizer({"path": str(tmp_path)})) == own.encode(TEXT, add_special_tokens=False).ids


def test_a_class_that_would_cut_otherwise_is_told(tmp_path: Path, capsys):
    write(tmp_path, digits_in_threes, tokenizer_class="GPT2Tokenizer")
    load_tokenizer({"path": str(tmp_path)})
    told = capsys.readouterr().err
    assert "is used as tokenizer.json has it: GPT2Tokenizer would take another pre_tokenizer" in told
    write(tmp_path / "plain", byte_level, tokenizer_class="PreTrainedTokenizerFast")
    load_tokenizer({"path": str(tmp_path / "plain")})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("added", [True, False])
def test_tokens_around_a_text_are_those_of_the_library(tmp_path: Path, kind: str | None, added: bool):
    write(tmp_path, digits_in_threes, tokenizer_class=kind, add_bos_token=added)
    path = tmp_path / "tokenizer.json"
    own = Tokenizer.from_file(str(path))
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    own.save(str(path))
    library = AutoTokenizer.from_pretrained(tmp_path)
    around = len(library("a")["input_ids"]) - len(library("a", add_special_tokens=False)["input_ids"])
    tokenizer = load_tokenizer({"path": str(tmp_path)})
    assert ids(tokenizer, special=True) == [0] * around + ids(tokenizer)
    if kind == "PreTrainedTokenizerFast":
        assert around == 1


def test_tokens_that_the_config_adds_are_kept(tmp_path: Path):
    added = {"600": {"content": "<|tool|>", "special": True}}
    write(tmp_path, digits_in_threes, tokenizer_class="GPT2Tokenizer", added_tokens_decoder=added)
    tokenizer = load_tokenizer({"path": str(tmp_path)})
    (token,) = tokenizer("<|tool|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(token) == "<|tool|>"


def test_other_ids_than_the_files_are_refused(tmp_path: Path, monkeypatch):
    write(tmp_path, digits_in_threes, tokenizer_class="GPT2Tokenizer")
    spec = {"path": str(tmp_path)}
    monkeypatch.setattr(tokenizer_files, "use_pipeline", lambda *_: [])
    with pytest.raises(
        InputError, match=r"must give the ids of its tokenizer.json. Got \[.*\] instead of \[.*\] from to"
    ):
        load_tokenizer(spec)
    monkeypatch.setattr(tokenizer_files, "PROBE", "no digit")
    tokenizer, file = load_tokenizer(spec), some(pipeline_of(tmp_path))
    check_ids(tokenizer, file, tmp_path, "no digit")
    with pytest.raises(InputError, match="from token"):
        check_ids(tokenizer, file, tmp_path, TEXT)
    assert load_tokenizer(spec, ["no digit"])
    with pytest.raises(InputError, match="from token"):
        load_tokenizer(spec, ["no digit", TEXT])
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(InputError, match="must give the ids of its tokenizer.json"):
        tokens.tokens(spec, {"path": str(text)}, {"length": 16}, "evaluation")


@pytest.mark.parametrize("name", MODEL_VOCABULARIES)
def test_a_vocabulary_that_is_not_read_is_named_before_any_job(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(b"\n\x0e")
    for call in (lambda: check_model("m", {"path": str(tmp_path)}), lambda: load_tokenizer({"path": str(tmp_path)})):
        with pytest.raises(InputError, match=f"has its tokenizer as {name} without tokenizer.json"):
            call()


def test_tasks_need_a_token_to_begin_with(tmp_path: Path):
    spec = {"path": str(tmp_path)}
    write(tmp_path, byte_level)
    check_prefix_token(load_tokenizer(spec), spec)
    write(tmp_path, byte_level, bos_token=None, eos_token=None, tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(InputError, match="must have a bos_token or an eos_token for zero-shot tasks. Got neither"):
        check_prefix_token(load_tokenizer(spec), spec)
