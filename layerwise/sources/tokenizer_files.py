"""Load a model's tokenizer so that it gives the ids of its tokenizer.json.

transformers 5 builds a tokenizer's class, named by tokenizer_config.json or the model type, from the vocabulary alone,
with the class's own pipeline (transformers#45920). If the file splits digits in threes, the class may not, and every
perplexity changes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief, reason
from layerwise.sources.checkpoint_files import PIPELINE, TOKENIZER_CONFIG, check_vocabulary, model_folder, own_code
from layerwise.sources.config_faults import config_fault
from layerwise.sources.hub import Spec, optional_json, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# A text that different pipelines split differently: digits, accents, emoji, blanks, line breaks, other scripts, code.
PROBE = (
    "In 1905 and 20260714, 3.14159 or 1,000,000? Don't, you'll; naïve café Ångström ﬁne  two   blanks\t\ttabs\n\n"
    "\n lines\r\n 你好，世界 こんにちは мир שלום ١٢٣ 😀👩‍👩‍👧 e\u0301 def f(x):\n        return x_1**2  # end   "
)
BACKEND = "instantiate the backend tokenizer"  # part of transformers' error if no class reads the present files
PARTS = ("normalizer", "pre_tokenizer", "model", "decoder")  # parts of a pipeline, apart from tokens around a text
SAMPLE = 100_000  # characters of a study's text for the comparison of ids
ADDED = "added_tokens.json"
ADDING = (TOKENIZER_CONFIG, "special_tokens_map.json", ADDED)  # files that may add tokens to those of tokenizer.json


def load_tokenizer(model: Spec, documents: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder or hub repository, with the pipeline of tokenizer.json if there is one.

    Tokens before and after a text then come from the file's post-processor, regardless of `add_bos_token`: BOS for
    Llama 2 and 3 and Gemma, and none for GPT-2, Qwen and DeepSeek files with a ByteLevel post-processor. Without the
    file they come from the class and `add_bos_token`, as for OPT, which begins with </s>. Tokens added by
    tokenizer_config.json, special_tokens_map.json or added_tokens.json are kept. Tokens that only the class adds by
    default would get ids beyond the vocabulary, and are left out.
    documents: the text to tokenise. The ids of its beginning are compared with the file's.
    Raises InputError when it cannot be loaded, or gives other ids than its file.
    """
    return load_and_tell(model, documents)[0]


def load_and_tell(model: Spec, documents: Sequence[str] = ()) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The same, and the names of the parts and special tokens that were replaced because its class differs; also on
    stderr."""
    folder = model_folder(model)
    check_vocabulary(f"The model {name_of(model)}", folder)
    try:
        tokenizer = by_class(model, folder)
        file = pipeline_of(folder) if compared(tokenizer, folder) else None
        surplus = [] if file is None else class_defaults(tokenizer, file, folder)
        if surplus:
            tokenizer = by_class(model, folder, **dict.fromkeys(surplus))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        if fault := config_fault(folder, error, bool(model.get("trust_remote_code"))):
            raise fault from error
        raise InputError(f"The tokenizer of {name_of(model)} cannot be loaded: {fault_of(folder, error)}.") from error
    if file is None:
        check_vocabulary_is_taken(tokenizer, folder)
        return tokenizer, []
    if dropout := getattr(file.model, "dropout", None):
        raise InputError(
            f"The tokenizer of {name_of(model)} must give a text the same ids every time, with a dropout of 0 or null "
            f""
            f"in {PIPELINE}. Got {dropout:g} instead: it omits merges at random."
        )
    replaced = [*(use_pipeline(tokenizer, file) if tokenizer.is_fast else []), *surplus]
    if replaced:
        print(
            f"The tokenizer of {name_of(model)} is used as {PIPELINE} has it: {type(tokenizer).__name__} would take "
            f"another {' and '.join(replaced)}.",
            file=sys.stderr,
        )
    add_named(file, tokenizer, folder)
    for text in (PROBE, beginning(documents)):
        check_ids(tokenizer, file, folder, text)
    return tokenizer, replaced


def check_vocabulary_is_taken(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise InputError when the tokenizer of a folder without tokenizer.json has not used the folder's vocabulary.

    A class of another kind reads other files, and then builds a vocabulary of only its special tokens.
    """
    if own_code(folder):
        return
    if (folder / "vocab.json").is_file():
        name, wanted = "vocab.json", read_json(folder / "vocab.json")
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text("utf-8").split("\n")
        name, wanted = "vocab.txt", {line: number for number, line in enumerate(lines) if line}
    else:
        return
    own = tokenizer.get_vocab()
    other = next((token for token, number in wanted.items() if own.get(token) != number), None)
    if other is not None:
        raise InputError(
            f"The tokenizer of {folder} must have the tokens of its {name}. Got {own.get(other)} instead of "
            f"{wanted[other]} for {brief(repr(other))} from {type(tokenizer).__name__}: add the publisher's {PIPELINE}."
        )


def by_class(model: Spec, folder: Path, **special: None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder as transformers builds it. special: names of special tokens to leave out."""
    from transformers import AutoTokenizer

    trusted = bool(model.get("trust_remote_code"))
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True, **special)


def compared(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether tokenizer.json, if there is one, determines the ids; not if the folder's own Python never reads it."""
    return bool(tokenizer.is_fast) or not own_code(folder)


def class_defaults(tokenizer: PreTrainedTokenizerBase, file: Tokenizer, folder: Path) -> list[str]:
    """Names of the special tokens, such as unk_token, that the class adds and no file of the folder contains."""
    if own_code(folder):
        return []
    named = set().union(*(_strings(optional_json(folder / name)) for name in ADDING))
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return [name for name, token in tokens.items() if file.token_to_id(token) is None and token not in named]


def _strings(value: Any) -> set[str]:
    """All strings and keys in a JSON value."""
    if isinstance(value, dict):
        return set(value).union(*map(_strings, value.values()))
    if isinstance(value, list):
        return set().union(*map(_strings, value))
    return {value} if isinstance(value, str) else set()


def fault_of(folder: Path, error: Exception) -> str:
    """Why the library cannot load a tokenizer from a folder, as text after a colon. error: its exception."""
    try:
        pipeline_of(folder)
    except Exception as damaged:
        return f"{folder / PIPELINE} must be a file of the tokenizers library, which reports {reason(damaged)!r}"
    if isinstance(error, KeyError):
        return f"one of its own files lacks the key {reason(error)}"
    if BACKEND in str(error):  # a message of four lines that recommends sentencepiece or tiktoken, which would not help
        config = folder / TOKENIZER_CONFIG
        named = optional_json(config).get("tokenizer_class")
        return (
            f"without {PIPELINE} the tokenizer_class in {config} must be one that reads the other files. Got "
            f"{brief(json.dumps(named), 80)} instead"
        )
    return reason(error)


def name_of(model: Spec) -> str:
    """A model's name in sentences about its tokenizer."""
    own = model.get("path") or model.get("gguf")
    return str(own) if own else f"{model['hub']} at revision {model['revision']}"


def beginning(documents: Sequence[str]) -> str:
    """The first SAMPLE characters of the documents, each followed by a line break."""
    characters = chain.from_iterable(part for document in documents for part in (document, "\n"))
    return "".join(islice(characters, SAMPLE))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> np.ndarray:
    """Token ids [n] int64 of a text, with the tokenizer's default special tokens if `special` is set."""
    encoding = tokenizer(
        text, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )  # verbose=False: no warning that the text is longer than the model's context
    return np.asarray(encoding["input_ids"], dtype=np.int64)


def pipeline_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder's tokenizer.json, by the library that defines the format; None if there is none.

    Truncation and padding are disabled, even if the file sets them, because a study uses neither.
    """
    from tokenizers import Tokenizer

    path = folder / PIPELINE
    if not path.is_file():
        return None
    file = Tokenizer.from_file(str(path))
    file.no_truncation()
    file.no_padding()
    return file


def use_pipeline(tokenizer: Any, file: Tokenizer) -> list[str]:
    """Replace the parts of a tokenizer that differ from a file's pipeline; returns the names of these parts.

    A post-processor that puts the same tokens around a text counts as equal, even if offsets differ.
    """
    backend = tokenizer.backend_tokenizer
    own, wanted = json.loads(backend.to_str()), json.loads(file.to_str())
    replaced = [part for part in PARTS if own[part] != wanted[part]]
    around = backend.encode("").ids
    for part in (*replaced, "post_processor"):
        setattr(backend, part, getattr(file, part))
    if backend.encode("").ids != around:
        replaced.append("post_processor")
    return replaced


def add_named(file: Tokenizer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Add the tokens that other files of the folder define to a file's tokenizer, except tokens that get another id."""
    listed = optional_json(folder / TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
    ids = {token["content"]: int(number) for number, token in listed.items()} | optional_json(folder / ADDED)
    for number, token in sorted(tokenizer.added_tokens_decoder.items()):
        if file.token_to_id(token.content) is None and ids.get(token.content, number) == number:
            file.add_tokens([token])


def check_ids(tokenizer: PreTrainedTokenizerBase, file: Tokenizer, folder: Path, text: str) -> None:
    """Raise InputError, which names the folder, when a tokenizer gives other ids for a text than its tokenizer.json.

    file: the tokenizer.json, from `pipeline_of`. Special tokens before and after the text are left out.
    """
    expected = np.asarray(file.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    found = encode(tokenizer, text, special=False)
    if not np.array_equal(found, expected):
        both = min(len(found), len(expected))
        place = next(iter(np.flatnonzero(found[:both] != expected[:both])), both)
        came, wanted = found[place : place + 3].tolist(), expected[place : place + 3].tolist()
        raise InputError(
            f"The tokenizer of {folder} must give the ids of its {PIPELINE}. Got {came} instead of {wanted} from token "
            f"{place} on: load_tokenizer of layerwise.sources.tokenizer_files uses the file's pipeline, unless "
            f""
            f"{TOKENIZER_CONFIG} or {ADDED} has tokens that contradict it."
        )


def check_loaded(tokenizer: object, text: str) -> None:
    """The same for a tokenizer that a caller has loaded from a folder, also on the probe. Others cannot be compared."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.name_or_path:
        return
    folder = Path(tokenizer.name_or_path)
    if compared(tokenizer, folder) and (file := pipeline_of(folder)):
        add_named(file, tokenizer, folder)
        check_ids(tokenizer, file, folder, f"{PROBE}\n{text[:SAMPLE]}")


def check_task_tokens(tokenizer: PreTrainedTokenizerBase, model: Spec, words: int, generating: Sequence[str]) -> None:
    """Raise InputError when a tokenizer lacks a token that lm-eval needs, or the model does not embed it.

    An empty context begins with BOS, or EOS without BOS. Generated texts end at EOS, and are padded with the padding
    token, the unknown token or EOS. words: number of tokens that the model embeds. generating: names of the tasks that
    generate text.
    """
    subject = f"The tokenizer of {name_of(model)}"
    mend = f"name one in its {TOKENIZER_CONFIG}, or leave the tasks out."
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            f"{subject} must have a bos_token or an eos_token for zero-shot tasks. Got neither instead: {mend}"
        )
    if generating and tokenizer.eos_token_id is None:
        wanted = f"an eos_token for tasks that generate text, such as {generating[0]}"
        raise InputError(f"{subject} must have {wanted}. Got none instead: {mend}")
    used = [("bos_token", "eos_token")]
    if generating:
        used += [("eos_token",), ("pad_token", "unk_token", "eos_token")]
    for names in used:
        name = next(name for name in names if getattr(tokenizer, f"{name}_id") is not None)
        if not 0 <= (number := getattr(tokenizer, f"{name}_id")) < words:
            raise InputError(
                f"{subject} must have a {name} that the model embeds, from 0 to {words - 1}, for zero-shot tasks. Got "
                f"{getattr(tokenizer, name)!r}, {number}, instead: {mend}"
            )
