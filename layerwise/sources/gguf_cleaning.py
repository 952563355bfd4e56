"""Free the store of converted GGUF files: remove files that no other study uses, their wheels, and the remains of
killed conversions. A job that needs a removed file makes it again.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from layerwise.runtime.shared_stores import registered, size_of
from layerwise.sources.gguf_conversion import RECORD
from layerwise.sources.gguf_files import stamp

NAMES = re.compile(r"[0-9a-f]{32}")  # names of converted files; nothing else is removed
PARTS = re.compile(r"\.[0-9a-f]{32}\.\d+\.part|\.[0-9a-f]{64}\.whl\..*\.part")
DAMAGED = re.compile(r"[0-9a-f]{64}\.whl\.damaged")  # wheels that were set aside
LIVELY = 3600.0  # seconds during which a started conversion may still be running


def clean(folder: Path, here: Path, dry: bool = False) -> int:
    """Remove unused files from a store; returns the number of bytes freed. here: the working directory."""
    freed, kept = 0, set[str]()
    for path in sorted(path for path in folder.glob("*") if NAMES.fullmatch(path.name) and path.is_dir()):
        others = [study for study in registered(path) if not study.is_relative_to(here / "results")]
        if others:
            kept.add(_wheel(path))
            print(
                f"kept {size_of(path) / 1e6:.1f} MB: {path} ({len(others)} other studies use it, such as {others[0]})"
            )
        else:
            freed += _free(path, dry)
    for path in sorted((folder / "wheels").glob("*.whl*")):
        if DAMAGED.fullmatch(path.name) or (path.suffix == ".whl" and path.stem not in kept):
            freed += _free(path, dry)
    begun = [*folder.glob(".*.part"), *(folder / "wheels").glob(".*.part")]
    for path in sorted(path for path in begun if PARTS.fullmatch(path.name)):
        if stamp(folder) - path.stat().st_mtime_ns > LIVELY * 1e9:
            freed += _free(path, dry)
        else:
            print(f"kept {size_of(path) / 1e6:.1f} MB: {path} (a job may be using it)")
    return freed


def _wheel(folder: Path) -> str:
    """The hash of the wheel that held a converted file; empty without a wheel."""
    try:
        return json.loads((folder / RECORD).read_text("utf-8")).get("wheel") or ""
    except (OSError, ValueError):
        return ""


def _free(path: Path, dry: bool) -> int:
    size = size_of(path)
    print(f"{'would free' if dry else 'freed'} {size / 1e6:.1f} MB: {path}")
    if not dry:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return size
