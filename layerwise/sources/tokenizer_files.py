"""The tokenizer of a model, as its tokenizer.json says: the ids of a text are those that the file gives.

transformers 5 builds the tokenizer of a class that tokenizer_config.json or the model type names from the vocabulary
alone, with a pipeline of its own (transformers#45920): where the file cuts digits in threes, that class may not, and
every perplexity is another.
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
from layerwise.sources.checkpoint_files import PIPELINE, check_vocabulary, model_folder
from layerwise.sources.hub import Spec

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# What pipelines treat differently: digits, accents, emoji, blanks, line breaks, other scripts, code.
PROBE = (
    "In 1905 and 20260714, 3.14159 or 1,000,000? Don't, you'll; naïve café Ångström ﬁne  two   blanks\t\ttabs\n\n"
    "\n lines\r\n 你好，世界 こんにちは мир שלום ١٢٣ 😀👩‍👩‍👧 e\u0301 def f(x):\n        return x_1**2  # end   "
)
SAMPLE = 100_000  # characters of a study's text on which ids are compared


def load_tokenizer(model: Spec, documents: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder or hub repository; its pipeline is that of tokenizer.json, where there is one.

    What AutoTokenizer puts before and after a text stays, for published codes tokenise so: whether it comes of the
    file's post-processor, of the class or of tokenizer_config.json is the library's choice. So do tokens that the
    config adds to those of the file.
    documents: what will be tokenised, on the beginning of which ids are held against the file's.
    Raises InputError when it cannot be loaded, or gives other ids than its file does.
    """
    from transformers import AutoTokenizer

    folder = model_folder(model)
    check_vocabulary(f"The model {name_of(model)}", folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=bool(model.get("trust_remote_code")), local_files_only=True
        )
        file = pipeline_of(folder) if tokenizer.is_fast else None
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise InputError(f"The tokenizer of {name_of(model)} cannot be loaded: {reason}.") from error
    if file is not None:
        if replaced := use_pipeline(tokenizer, file):
            print(
                f"The tokenizer of {name_of(model)} is used as {PIPELINE} has it: {type(tokenizer).__name__} would "
                f"take another {' and '.join(replaced)}.",
                file=sys.stderr,
            )
        for text in (PROBE, beginning(documents)):
            check_ids(tokenizer, file, folder, text)
    return tokenizer


def name_of(model: Spec) -> str:
    """How sentences call a model whose tokenizer they are about."""
    return model["path"] if "path" in model else f"{model['hub']} at revision {model['revision']}"


def beginning(documents: Sequence[str]) -> str:
    """The first SAMPLE characters of documents, a line break after each."""
    characters = chain.from_iterable(part for document in documents for part in (document, "\n"))
    return "".join(islice(characters, SAMPLE))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> np.ndarray:
    """Token ids [n] int64 of a text, with the tokenizer's default special tokens unless told otherwise."""
    encoding = tokenizer(
        text, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )  # verbose=False: no warning that the text is longer than the model's context
    return np.asarray(encoding["input_ids"], dtype=np.int64)


def pipeline_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder's tokenizer.json, by the library that defines the format; None where there is none.

    It cuts and pads nothing, whatever the file says: neither does a study.
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
    """Give a tokenizer the parts of a file's pipeline that it has otherwise; the names of these parts."""
    backend = tokenizer.backend_tokenizer
    own, wanted = json.loads(backend.to_str()), json.loads(file.to_str())
    replaced = [part for part in ("normalizer", "pre_tokenizer", "model", "decoder") if own[part] != wanted[part]]
    for part in replaced:
        setattr(backend, part, getattr(file, part))
    return replaced


def check_ids(tokenizer: PreTrainedTokenizerBase, file: Tokenizer, folder: Path, text: str) -> None:
    """Raise InputError, naming the folder, when a tokenizer gives other ids for a text than its tokenizer.json.

    file: that tokenizer.json, as `pipeline_of` reads it. Special tokens before and after the text are left out.
    """
    expected = np.asarray(file.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    found = encode(tokenizer, text, special=False)
    if not np.array_equal(found, expected):
        both = min(len(found), len(expected))
        place = next(iter(np.flatnonzero(found[:both] != expected[:both])), both)
        came, wanted = found[place : place + 3].tolist(), expected[place : place + 3].tolist()
        raise InputError(
            f"The tokenizer of {folder} must give the ids of its {PIPELINE}. Got {came} instead of {wanted} from token "
            f"{place} on: does tokenizer_config.json or added_tokens.json have tokens of its own?"
        )


def check_prefix_token(tokenizer: PreTrainedTokenizerBase, model: Spec) -> None:
    """Raise InputError when a tokenizer has no token that a task can begin an empty context with, as lm-eval does."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of {name_of(model)} must have a bos_token or an eos_token for zero-shot tasks. Got neither "
            "instead: name one in its tokenizer_config.json, or leave the tasks out."
        )
