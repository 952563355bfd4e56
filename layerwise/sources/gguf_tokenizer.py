"""Write the tokenizer of a GGUF file as a tokenizer.json that splits texts as llama.cpp does.

transformers builds it from the file's tokens and merges, but supports only some ways of splitting a text before merges;
for the others it silently splits as GPT-2 does. Those are set here; for example, SmolLM2's splits every digit
separately.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.files import write_atomic
from layerwise.runtime.sentences import reason
from layerwise.sources.gguf_header import Header
from layerwise.sources.gguf_models import (
    BYTE_LEVEL,
    GPT2_SPLIT,
    PIECES,
    SINGLE_DIGITS,
    TOKENIZER,
    WHOLE_WORDS,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
BLANK = "\u2581"  # SentencePiece's character for a blank
GGUF_KEYS = ("tokens", "scores", "token_type", "merges")  # keys that transformers' builders read, by these names


def write_tokenizer(header: Header, subject: str, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of a file to a folder.

    Raises InputError for a tokenizer that cannot be built, or that has other tokens than the file.
    """
    try:
        tokenizer = build(header)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"The tokenizer of {subject} cannot be read: {reason(error)}.") from error
    tokens = header.metadata[f"{TOKENIZER}tokens"]
    if tokenizer.get_vocab_size() != len(tokens):
        raise InputError(
            f"The tokenizer of {subject} must have the {len(tokens)} tokens of the file. Got "
            f"{tokenizer.get_vocab_size()} instead."
        )
    write_atomic(folder / "tokenizer.json", tokenizer.to_str())
    write_atomic(folder / "tokenizer_config.json", json.dumps(settings(header), indent=2, ensure_ascii=False) + "\n")


def settings(header: Header) -> dict[str, Any]:
    """The content of tokenizer_config.json: special tokens, the longest text and the chat template."""
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    tokens = header.metadata[f"{TOKENIZER}tokens"]
    for name, key in SPECIAL.items():
        number = header.metadata.get(f"{TOKENIZER}{key}_token_id")
        if number is not None:
            found[name] = tokens[number]
    if isinstance(length := header.own("context_length"), int):
        found["model_max_length"] = length
    if isinstance(template := header.metadata.get("tokenizer.chat_template"), str):
        found["chat_template"] = template
    return found


def build(header: Header) -> Tokenizer:
    """The tokenizer of a file whose header has passed check_tokenizer."""
    from tokenizers import Regex, normalizers, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    own = {key: header.metadata.get(f"{TOKENIZER}{key}") for key in ("model", "pre", "add_space_prefix")}
    parts = {key: header.metadata[f"{TOKENIZER}{key}"] for key in GGUF_KEYS if f"{TOKENIZER}{key}" in header.metadata}
    parts |= {"tokenizer_type": own["model"], "pre_tokenizer_type": own["pre"]}
    tokenizer = convert_gguf_tokenizer(header.architecture, parts)[0]
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if own["model"] == BYTE_LEVEL:
        cut: dict[str, Any] = dict.fromkeys(GPT2_SPLIT, as_gpt2)
        digits = pre_tokenizers.Digits(individual_digits=True)
        cut |= dict.fromkeys(SINGLE_DIGITS, pre_tokenizers.Sequence([digits, as_gpt2]))
        split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
        cut["stablelm2"] = pre_tokenizers.Sequence([split, bytes_alone])
        if own["pre"] in cut:
            tokenizer.pre_tokenizer = cut[own["pre"]]
        if own["pre"] in WHOLE_WORDS:
            tokenizer.model.ignore_merges = True
    else:  # unlike SentencePiece, transformers' Metaspace puts no blank before a text that begins with one
        blanks: list[Any] = [normalizers.Replace(" ", BLANK)]
        prefixed = own["add_space_prefix"] is not False
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), *blanks] if prefixed else blanks)
        tokenizer.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]: the library accepts it
    tokenizer.post_processor = around(header)
    return tokenizer


def around(header: Header) -> Any:
    """The post-processing that adds BOS and EOS to a text, if the file, or llama.cpp for its kind of tokenizer, does
    so."""
    from tokenizers.processors import TemplateProcessing

    kind, pre = (header.metadata.get(f"{TOKENIZER}{key}") for key in ("model", "pre"))
    tokens = header.metadata[f"{TOKENIZER}tokens"]
    default = {"bos": kind == PIECES or pre in WHOLE_WORDS, "eos": False}
    wanted = {}
    for name, usual in default.items():
        number = header.metadata.get(f"{TOKENIZER}{name}_token_id")
        if number is not None and header.metadata.get(f"{TOKENIZER}add_{name}_token", usual):
            wanted[name] = (tokens[number], number)
    before, after = ([wanted[name][0]] if name in wanted else [] for name in ("bos", "eos"))
    single = [*before, "$A", *after]
    pair = [*single, *(f"{part}:1" for part in (*before, "$B", *after))]
    return TemplateProcessing(single=single, pair=pair, special_tokens=list(wanted.values()))
