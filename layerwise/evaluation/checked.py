"""Checks of models by content: a model that has passed the same code is not checked again.

Every job that calibrates requests the check of its model first, so that the order of jobs does not matter. torch is
imported only when a model is checked.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.contract.import_closure import closure
from layerwise.runtime.files import digest_of, read_made, write_atomic
from layerwise.sources.fingerprint import unchanging

STORE = Path("results/checks/passed")
CHECK = "layerwise.evaluation.model_check"
LIBRARIES = ("torch", "transformers", "safetensors")
CODE = digest_of(map(str, closure([CHECK])))  # when this process starts


def ensure_checked(model: Mapping[str, Any], fingerprint: Path, tokens: Path, device: str = "cpu") -> dict[str, Any]:
    """The record of the check that a config's model has passed; the check is run if there is no record.

    fingerprint: the model's fingerprint, from fingerprint.py. tokens: a file of calibration tokens, whose first window
    is run. Raises InputError for a model that does not pass.
    """
    file = STORE / f"{_content(model, fingerprint)}.json"
    if file.is_file():
        return read_made(file)
    import torch

    from layerwise.evaluation.model_check import check_model
    from layerwise.runtime.devices import take
    from layerwise.sources.tokens import read_tokens

    with unchanging(model, fingerprint):
        take(device)
        found = check_model(model, torch.from_numpy(read_tokens(tokens)[0]), device)
    write_atomic(file, json.dumps(found, indent=2) + "\n")
    return found


def _content(model: Mapping[str, Any], fingerprint: Path) -> str:
    """A hash of everything that affects the result: the model's files, whether its own code runs, the check's code."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    trusted = bool(model.get("trust_remote_code"))
    content = {"files": read_made(fingerprint)["files"], "trusted": trusted, "code": CODE, **versions}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
