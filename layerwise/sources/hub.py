"""Models and texts from local paths or the Hugging Face hub, checked before any job runs.

Imported while the Snakefile is parsed: without torch or transformers, and huggingface_hub only for a hub entry.
A model's spec is {path} or {hub, revision}; a text's is {path} or {hub, revision, files}, each with further keys.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.project import locate
from layerwise.runtime.sentences import brief

Spec = Mapping[str, Any]

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# Files of a model's repository to fetch: only files that are read, no copies in other formats.
MODEL_PATTERNS = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.py", "*.jinja")


def fetch_model(spec: Spec) -> Path:
    """Local folder of the model; a hub model is fetched at the spec's revision.

    Raises InputError when it cannot be fetched.
    """
    if "path" in spec:
        return locate(spec["path"])
    from huggingface_hub import snapshot_download

    with hub_errors(spec):
        folder = Path(snapshot_download(spec["hub"], revision=spec["revision"], allow_patterns=list(MODEL_PATTERNS)))
    if not any(folder.glob("*.safetensors")):
        download = f"hf download {spec['hub']} --revision {spec['revision']} --local-dir FOLDER"
        raise InputError(
            f"{spec['hub']} at revision {spec['revision']} has no safetensors weights. Pickles are not read, because "
            f"they can run code. If you trust the model, run `{download}` and give FOLDER as `path`: the message on "
            "that folder says how to convert it."
        )
    return folder


def offline() -> bool:
    """Whether the environment forbids fetching from the hub, by huggingface_hub's rules."""
    value = next((os.environ[name] for name in OFFLINE_VARIABLES if os.environ.get(name)), "")
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def check_hub(subject: str, spec: Spec, files: list[str], repo_type: str) -> None:
    """Raise InputError when a hub entry has no revision, or is not in the cache while fetching is forbidden."""
    if not spec.get("hub"):
        raise InputError(f"{subject} needs a `path`, or a `hub` name with a `revision`.")
    if not spec.get("revision"):
        raise InputError(f"{subject} ({spec['hub']} on the hub) must name its `revision`: the hub's files may change.")
    from huggingface_hub import try_to_load_from_cache

    with hub_errors(spec):
        cached = {file: try_to_load_from_cache(spec["hub"], file, None, spec["revision"], repo_type) for file in files}
    absent = [file for file, path in cached.items() if not isinstance(path, str)]
    if absent and offline():
        raise InputError(_forbidden(f"{subject} ({', '.join(absent)} of {spec['hub']} at {spec['revision']})"))


@contextmanager
def hub_errors(spec: Spec) -> Iterator[None]:
    """Context in which a failure to fetch from the hub becomes one sentence (InputError)."""
    from huggingface_hub import errors

    # huggingface_hub takes HTTPError from whichever HTTP library it uses, so that it is not exported.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    hub, what = spec["hub"], f"{spec['hub']} at revision {spec['revision']}"
    try:
        yield
    except errors.HFValidationError:
        raise InputError(f"A hub name must be 'organisation/name'. Got {hub!r} instead.") from None
    except errors.GatedRepoError:
        raise InputError(
            f"{hub} is gated on the hub: request access there, then log in with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"The hub has no public repository {hub}: is the name right, or a login missing?") from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"The repository {hub} on the hub has no revision {spec['revision']}; a commit must be given in full."
        ) from None
    except errors.RemoteEntryNotFoundError as error:
        raise InputError(f"{what} lacks a required file: {_cause(error)}") from None
    except (OSError, HTTPError, errors.XetDownloadError) as error:
        if offline():
            raise InputError(_forbidden(what)) from None
        raise InputError(
            f"{what} is not in the local cache and could not be fetched, so check the network: {_cause(error)}"
        ) from None


def _forbidden(subject: str) -> str:
    return (
        f"{subject} is not in the local cache and HF_HUB_OFFLINE forbids fetching: download it before "
        "(`hf download`), unset HF_HUB_OFFLINE, or give a local `path`."
    )


def _cause(error: BaseException) -> str:
    """First line of the original error."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def readable(subject: str) -> Iterator[None]:
    """Context in which a system error about an inaccessible path becomes one sentence (InputError)."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{subject} cannot be read: {brief(str(error.filename))}: {error.strerror}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError when the file holds something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not valid JSON.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object. Got another value instead.")
    return content


def optional_json(path: Path) -> dict[str, Any]:
    """The same, empty if there is no file."""
    return read_json(path) if path.is_file() else {}
