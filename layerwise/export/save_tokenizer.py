"""The tokenizer of an exported folder: whoever loads it there gets the ids of the study."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from layerwise.runtime.files import write_atomic
from layerwise.sources.checkpoint_files import PIPELINE, TOKENIZER_CONFIG, TOKENIZER_FILES, model_folder
from layerwise.sources.hub import Spec, optional_json
from layerwise.sources.tokenizer_files import PROBE, by_class, load_and_tell

PLAIN = "PreTrainedTokenizerFast"  # the class that reads tokenizer.json as it is


def copy_tokenizer(model: Spec, folder: Path) -> None:
    """Copy a model's tokenizer files into a folder, so that AutoTokenizer of it gives the study's ids.

    If the class that the model's folder names would give other ids, the copy of tokenizer_config.json names the class
    that reads tokenizer.json as it is. For some model types transformers ignores that name; a line on stderr then says
    how to load the tokenizer. Raises InputError when it cannot be loaded.
    """
    source = model_folder(model)
    for name in (*TOKENIZER_FILES, "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    if not (source / PIPELINE).is_file():
        return
    tokenizer, replaced = load_and_tell(model)
    if not replaced:
        return
    path = folder / TOKENIZER_CONFIG
    config = optional_json(path)
    lacking = {name: token for name, token in tokenizer.special_tokens_map.items() if not config.get(name)}
    config |= {**lacking, "tokenizer_class": PLAIN}
    write_atomic(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    saved = by_class(model, folder)
    if saved(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        print(
            f"AutoTokenizer gives other ids for this export than the study used, because transformers takes "
            f"{type(saved).__name__} for this model type: load the tokenizer with {PLAIN}.from_pretrained.",
            file=sys.stderr,
        )
