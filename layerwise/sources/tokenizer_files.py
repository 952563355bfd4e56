"""The tokenizer of a model, as its tokenizer.json says: the ids of a text are those that the file gives.

transformers 5 builds the tokenizer of a class that tokenizer_config.json or the model type names from the vocabulary
alone, with a pipeline of its own (transformers#45920): where the file cuts digits in threes, that class may not, and
every perplexity is another.
"""

from __future__ import annotations

import json
import sys
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


def load_tokenizer(model: Spec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder or hub repository; its pipeline is that of tokenizer.json, where there is one.

    What AutoTokenizer puts before and after a text stays, for published codes tokenise so: whether it comes of the
    file's post-processor, of the class or of tokenizer_config.json is the library's choice. So do tokens that the
    config adds to those of the file.
    Raises InputError when it cannot be loaded, or gives other ids than its file does.
    """
    from transformers import AutoTokenizer

    name = model["path"] if "path" in model else f"{model['hub']} at revision {model['revision']}"
    folder = model_folder(model)
    check_vocabulary(f"The model {name}", folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=bool(model.get("trust_remote_code")), local_files_only=True
        )
        file = pipeline_of(folder) if tokenizer.is_fast else None
    except Exception as error:  # the tokenizers library raises bare Exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise InputError(f"The tokenizer of {name} cannot be loaded: {reason}.") from error
    if file is not None:
        if replaced := use_pipeline(tokenizer, file):
            print(
                f"The tokenizer of {name} is used as {PIPELINE} has it: {type(tokenizer).__name__} would take another "
                f"{' and '.join(replaced)}.",
                file=sys.stderr,
            )
        check_ids(tokenizer, model, PROBE)
    return tokenizer


def pipeline_of(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder's tokenizer.json, by the library that defines the format; None where there is none."""
    from tokenizers import Tokenizer

    path = folder / PIPELINE
    return Tokenizer.from_file(str(path)) if path.is_file() else None


def use_pipeline(tokenizer: Any, file: Tokenizer) -> list[str]:
    """Give a tokenizer the parts of a file's pipeline that it has otherwise; the names of these parts."""
    backend = tokenizer.backend_tokenizer
    own, wanted = json.loads(backend.to_str()), json.loads(file.to_str())
    replaced = [part for part in ("normalizer", "pre_tokenizer", "model", "decoder") if own[part] != wanted[part]]
    for part in replaced:
        setattr(backend, part, getattr(file, part))
    return replaced


def check_ids(tokenizer: PreTrainedTokenizerBase, model: Spec, text: str) -> None:
    """Raise InputError when a tokenizer gives other ids than the model's tokenizer.json for the beginning of a text.

    Special tokens before and after the text apart; nothing is compared where there is no such file.
    """
    folder = model_folder(model)
    file = pipeline_of(folder) if tokenizer.is_fast else None
    if file is None:
        return
    file.no_truncation()
    file.no_padding()
    sample = text[:SAMPLE]
    expected = file.encode(sample, add_special_tokens=False).ids
    found = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
    if found != expected:
        lengths = min(len(found), len(expected))
        differing = np.flatnonzero(np.asarray(found[:lengths]) != np.asarray(expected[:lengths]))
        place = int(differing[0]) if len(differing) else lengths
        raise InputError(
            f"The tokenizer of {folder} must give the ids of its {PIPELINE}. Got {found[place : place + 3]} instead of "
            f"{expected[place : place + 3]} from token {place} on: does tokenizer_config.json or "
            "added_tokens.json have tokens of its own?"
        )


def check_prefix_token(tokenizer: PreTrainedTokenizerBase, model: Spec) -> None:
    """Raise InputError when a tokenizer has no token that a task can begin an empty context with, as lm-eval does."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of {model.get('path') or model['hub']} must have a bos_token or an eos_token for zero-shot "
            "tasks. Got neither instead: name one in its tokenizer_config.json, or leave the tasks out."
        )
