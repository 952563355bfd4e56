"""Turn a library's refusal of a config.json into a sentence that names the file, the key and the value.

The libraries report it in terms of their code, such as `KeyError: 'nonesuch'`. The faulty key is found by building the
model, without weights, from the config with one key left out at a time. torch is imported only when this is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from layerwise.runtime.errors import InputError, out_of_memory
from layerwise.runtime.sentences import place, reason
from layerwise.sources.hub import read_json
from layerwise.sources.model_config import check_config, must_be

FIELD = re.compile(r"Validation error for field '([^']+)'")  # message of huggingface_hub's strict dataclasses
EXPECTED = re.compile(r"expected (?:an? )?(one of \(.*?\)|\w+)")
KINDS = {"int": "an integer", "float": "a floating-point number", "bool": "true or false", "str": "a string"}
KINDS |= {"None": "null", "list": "a list", "tuple": "a list", "Sequence": "a list", "dict": "an object"}
KINDS |= {"NoneType": "null"}


def config_fault(folder: Path, error: Exception, trust_remote_code: bool = False) -> InputError | None:
    """The error that names the faulty value in the config.json of a model that could not be loaded, or None.

    None: config.json is not at fault. error: the libraries' exception. The model is built on the meta device, without
    weights, once or twice for each key of the config. A model with its own code is not built, because its code would
    run. Raises InputError for impossible sizes, as `check_config` does.
    """
    if isinstance(error, (OSError, ImportError)):  # an error of the disk, or a missing library of the model
        return None
    file = folder / "config.json"
    if not file.is_file():  # a folder with only a tokenizer
        return None
    config = read_json(file)
    if config.get("auto_map") and trust_remote_code:
        return None
    check_config(file, config)
    if fault := type_fault(file, config) or field_fault(file, config, error):
        return fault
    with quiet():
        why = build_fault(config)
        found = why and culprit(config)
    if why is None:
        return None
    from transformers import __version__

    kind = f"with which transformers {__version__} can build a model of type {config['model_type']!r}"
    if not found:
        return InputError(f"{file} must have values {kind}: {why}.")
    value = within(config, found)
    return must_be(file, place(found), f"a value {kind}", value, "" if why == repr(value) else why)


def type_fault(file: Path, config: Mapping[str, Any]) -> InputError | None:
    """The error about a model_type that is absent, unknown, or not a language model's."""
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if "model_type" not in config:
        return InputError(f"{file} must name its model_type. Got none instead.")
    found, code = config["model_type"], config.get("auto_map")
    if not isinstance(found, str) or found not in CONFIG_MAPPING:
        why = "the model has its own code, which runs only with trust_remote_code: true" if code else ""
        return must_be(file, "model_type", f"one that transformers {__version__} knows", found, why)
    if config_class(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return must_be(file, "model_type", "that of a decoder-only language model", found)
    return None


def field_fault(file: Path, config: Mapping[str, Any], error: Exception) -> InputError | None:
    """The error about a value whose type the config's class does not allow, from a message of two lines."""
    field = FIELD.match(str(error))
    if field is None:
        return None
    name = getattr(config_class(config), "attribute_map", {}).get(field[1])
    parts = [key for key, value in config.items() if isinstance(value, dict)]  # for example text_config
    for path in [(field[1],), (name,), *((part, field[1]) for part in parts)]:
        if path[-1] in (holder := config[path[0]] if path[1:] else config):
            kinds = dict.fromkeys(KINDS.get(kind, kind) for kind in map(str, EXPECTED.findall(str(error))))
            what = " or ".join(kinds) or "a value of another type"
            return must_be(file, place(path), what, holder[path[-1]])
    return None  # a value that the class derives from others


def config_class(config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]]


@contextmanager
def quiet() -> Iterator[None]:
    """Context in which transformers logs only errors."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def build_fault(config: Mapping[str, Any]) -> str | None:
    """The libraries' reason for not building a model from a config; None if they build it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with TemporaryDirectory(prefix="layerwise-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), "utf-8")
        try:
            own = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"), no_init_weights():
                AutoModelForCausalLM.from_config(own, dtype=own.dtype, trust_remote_code=False)
        except Exception as error:
            if out_of_memory(error):
                raise
            return reason(error)
    return None


def culprit(config: Mapping[str, Any], inside: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The path of keys to a value whose removal, or replacement by 1, lets the model be built.

    It is empty if there is none, for example if several values are wrong. inside: path of the object to search.
    """
    own = within(config, inside)
    for one in (False, True):
        for key in [key for key in own if key != "model_type" and (not one or type(own[key]) is int)]:
            changed = deepcopy(config)
            part = within(changed, inside)
            del part[key]
            if one:
                part[key] = 1
            if build_fault(changed) is None:
                found = (*inside, key)
                return (isinstance(own[key], dict) and culprit(config, found)) or found
    return ()


def within(config: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """The value at a path of keys."""
    value: Any = config
    for key in keys:
        value = value[key]
    return value
