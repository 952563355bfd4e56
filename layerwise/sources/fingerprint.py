"""Identify a study's model: fetch it once, and hash its weights for the provenance of every row."""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import read_made, sha256, write_atomic
from layerwise.runtime.shared_stores import register
from layerwise.sources import checkpoint_files, gguf_conversion, gguf_files, hub


def weights_hash(hashes: list[str]) -> str:
    """For one file its SHA-256, as from sha256sum and the hub; for shards the SHA-256 of their hashes, in order."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


@functools.lru_cache(maxsize=4096)
def hash_at(path: Path, changed: int) -> str:
    """SHA-256 of a file with this modification time, computed once per process."""
    return sha256(path)


def check_unchanged(model: hub.Spec, fingerprint: Path) -> None:
    """Raise InputError when a model's files no longer match its fingerprint, because results would be attributed
    wrongly.

    Only files that have changed since, according to the file system, are hashed.
    """
    if not fingerprint.is_file():
        raise InputError(f"{fingerprint}, the fingerprint of this job's model, no longer exists: run again to make it.")
    told = read_made(fingerprint)
    if "gguf" in model and gguf_files.content(model) != told["model_sha256"]:  # before it is converted again
        raise InputError(edited(gguf_files.named(model), fingerprint))
    folder, own, later = checkpoint_files.model_folder(model), fingerprint.stat(), {}
    for name, known in told["files"].items():
        path = folder / name
        changed = path.stat().st_ctime_ns if path.is_file() else None
        if changed is None or (changed >= own.st_ctime_ns and hash_at(path, changed) != known):
            raise InputError(edited(path, fingerprint))
        if changed >= own.st_ctime_ns:
            later[path] = changed
    if later and all(path.stat().st_ctime_ns == at for path, at in later.items()):
        with contextlib.suppress(OSError):  # copied or linked again; later jobs need not hash them again
            os.utime(fingerprint, ns=(own.st_atime_ns, own.st_mtime_ns))  # Snakemake compares the modification time


def edited(path: Path | str, fingerprint: Path) -> str:
    """The message about a model's file that has changed."""
    return (
        f"{path} is no longer the file from which {fingerprint} was made; it may have been edited or damaged: restore "
        f"it, or delete {fingerprint} to study the changed file, and run again."
    )


@contextlib.contextmanager
def unchanging(model: hub.Spec, fingerprint: Path) -> Iterator[None]:
    """Context of a computation on a model: calls check_unchanged before and after it, also after an error."""
    check_unchanged(model, fingerprint)
    try:
        yield
    except Exception:
        check_unchanged(model, fingerprint)  # a change may explain the error
        raise
    check_unchanged(model, fingerprint)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    quantised = "gguf" in args.model
    folder = checkpoint_files.model_folder(args.model) if quantised else hub.fetch_model(args.model)
    weights = checkpoint_files.weight_files(args.model["name"], folder)
    rest = [path for path in checkpoint_files.model_files({"path": folder}) if path.suffix != ".safetensors"]
    before = {path: path.stat().st_ctime_ns for path in [*weights, *rest]}
    every = {path.name: sha256(path) for path in before}
    if changed := [path for path, at in before.items() if path.stat().st_ctime_ns != at]:
        raise InputError(f"{changed[0]} was written to while it was hashed: run again when it is complete.")
    if quantised:
        gguf_conversion.check_made(folder, every)
        register(folder, args.out, gguf_conversion.RECORD, "The converted files")
    hashes = [gguf_files.content(args.model)] if quantised else [every[path.name] for path in weights]
    found = {
        "model_source": gguf_files.named(args.model) if quantised else args.model.get("path") or args.model["hub"],
        # A snapshot's folder is named after the commit of the branch or tag.
        "model_revision": folder.name if "hub" in args.model else None,
        "model_sha256": weights_hash(hashes),  # for a GGUF file its own hash, as from sha256sum
        "model_quantisation": gguf_files.fetched_header(args.model).quantisation if quantised else None,
        "dtype": args.model["dtype"],
        # Not a column. Without it, this file would not change with an edited config or tokenizer, and results would be
        # stale.
        "files": every,
    }
    write_atomic(args.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
