"""Where the GGUF file of a model's entry lies, what it says, and which content it has. Free of torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from layerwise.runtime.errors import InputError
from layerwise.runtime.files import sha256, write_atomic
from layerwise.runtime.project import locate
from layerwise.sources.gguf_header import Header, read_header
from layerwise.sources.gguf_models import check_model
from layerwise.sources.hub import Spec

SPLIT_NAME = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")  # how a file is called that is one of several
SETTLED = 2.0  # seconds after which a change of a file is sure to have another time


class Seen(NamedTuple):
    """A file as the file system has it: when any of these is another, so may be the content."""

    path: str
    inode: int
    size: int
    modified: int
    changed: int


def store() -> Path:
    """The folder of converted models, and of what was fetched for them; studies in other folders may share it."""
    shared = os.environ.get("LAYERWISE_CACHE")
    return Path(shared) / "gguf" if shared else Path("results/gguf")


def file_of(spec: Spec) -> Path:
    return locate(spec["gguf"])


def named(spec: Spec) -> str:
    """How sentences call the file."""
    return str(spec["gguf"])


def seen(path: Path) -> Seen:
    found = path.stat()
    return Seen(os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def header_of(spec: Spec) -> Header:
    """The header of an entry's file. Raises InputError, in one sentence, for a file that is absent or not read."""
    path, subject = file_of(spec), f"The GGUF file {named(spec)}"
    if split := SPLIT_NAME.search(path.name):
        if int(split[1]) > 1:
            raise InputError(
                f"{subject} must be a whole model. Got one of {int(split[1])} files instead: join them with llama.cpp's "
                "`llama-gguf-split --merge`."
            )
    if not path.is_file():
        raise InputError(f"{subject} does not exist.")
    return _header(seen(path), subject)


@functools.lru_cache(maxsize=64)
def _header(file: Seen, subject: str) -> Header:
    with open(file.path, "rb") as stream:
        header = read_header(stream, file.size, subject)
    check_model(header, subject)
    return header


def content(spec: Spec) -> str:
    """The SHA-256 of an entry's file.

    It is noted beside the converted models, under what the file system says of the file, so that no job hashes
    gigabytes that another has hashed. A file that was changed a moment ago may change again within the same tick of
    the clock, and is not noted.
    """
    path = file_of(spec)
    if not path.is_file():
        raise InputError(f"The GGUF file {named(spec)} does not exist.")
    before = seen(path)
    note = store() / "hashes" / hashlib.sha256(json.dumps(before).encode()).hexdigest()[:32]
    if note.is_file() and len(known := note.read_text("utf-8").strip()) == 64:
        return known
    found = sha256(path)
    if seen(path) != before:
        raise InputError(f"{path} was written to while it was hashed: run again when it is whole.")
    if time.time_ns() - before.changed > SETTLED * 1e9:
        write_atomic(note, f"{found}\n")
    return found
