"""Tokenizers of every kind of pipeline, trained on one text, and the files of a model's folder that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as cut

from layerwise.sources.tokenizer_files import PROBE

TEXT = PROBE * 3 + "".join(f"river item {i * 7919} costs {i * 104729} coins in year {1900 + i}.\n" for i in range(60))
SPECIAL = ["<s>", "</s>", "<unk>"]
SIZE = 420  # of every vocabulary here
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


def write(folder: Path, make: Callable[[], Tokenizer], model_type: str = "llama", **config: Any) -> Tokenizer:
    """The tokenizer of a model's folder; config: of tokenizer_config.json."""
    own = make()
    kind = type(own.model).__name__
    sizes = {"vocab_size": SIZE, "special_tokens": SPECIAL, "show_progress": False}
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


def set_config(folder: Path, **values: Any) -> None:
    """Set keys of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def ids(tokenizer: Any, special: bool = False) -> list[int]:
    return tokenizer(TEXT, add_special_tokens=special)["input_ids"]
