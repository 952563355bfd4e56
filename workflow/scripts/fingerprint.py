"""Which model a study computes with: fetched once, and the hash of its weights for the provenance of every row."""

import argparse
import hashlib
import json
import sys
from pathlib import Path

from workflow.scripts import sources
from workflow.scripts.runtime import InputError, read_made, report_errors, sha256, write_atomic


def weights_hash(hashes: list[str]) -> str:
    """Of one file its SHA-256, as sha256sum and the hub give it; of shards the SHA-256 of theirs, in order."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def check_unchanged(model: sources.Spec, fingerprint: Path) -> None:
    """Raise InputError when a model's files are no longer those of its fingerprint: numbers would pass for theirs.

    Only files that the file system has seen a change of since are hashed.
    """
    folder, since = sources.model_folder(model), fingerprint.stat().st_ctime_ns
    for name, known in read_made(fingerprint)["files"].items():
        path = folder / name
        if not path.is_file() or (path.stat().st_ctime_ns >= since and sha256(path) != known):
            raise InputError(
                f"{path} is no longer the file that {fingerprint} was made of, as if it had been edited or damaged: "
                f"put it back, or delete {fingerprint} to study it as it is, and run again."
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    folder = sources.fetch_model(args.model)
    weights = sources.weight_files(args.model["name"], folder)
    hashes = {path.name: sha256(path) for path in weights}
    rest = {path.name: sha256(path) for path in sources.model_files({"path": folder}) if path.suffix != ".safetensors"}
    found = {
        "model_source": args.model.get("path") or args.model["hub"],
        # A snapshot's folder is named after the commit that a branch or tag stood for.
        "model_revision": folder.name if "hub" in args.model else None,
        "model_sha256": weights_hash(list(hashes.values())),
        "dtype": args.model["dtype"],
        # Not a column. Without it an edited config or tokenizer leaves this file as it was, and results out of date.
        "files": {**hashes, **rest},
    }
    write_atomic(args.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
