"""Evaluations by content: one of the same weights, on the same data, by the same code is read, not computed again.

The job that compresses a cell evaluates it at once, while it has the model in memory, and leaves the results in STORE
(`foresee`). The cell's own evaluation jobs then find them there and need neither torch nor the model. So do cells whose
weights come out the same, as those of a method without data do in both modes. What is not in STORE is computed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.contract.catalogue import SHARED_SOURCES
from layerwise.evaluation.zero_shot import stay_offline
from layerwise.runtime.devices import take
from layerwise.runtime.errors import record_failure, report_errors
from layerwise.runtime.files import check_weights, read_made, sha256, write_atomic
from layerwise.runtime.project import PACKAGE
from layerwise.sources.fingerprint import check_unchanged, unchanging
from layerwise.sources.task_sets import task_files

if TYPE_CHECKING:
    from layerwise.models.streaming import LazyBlocks

STORE = Path("results/evaluations")
MODEL = (
    *("evaluation/perplexity", "sources/tokens", "models/loading", "models/streaming"),
    *("storage/packed_weights", "storage/bits_per_weight"),
)
# Scripts that decide the result of each kind of evaluation, and libraries whose versions do.
SCRIPTS = {
    "perplexity": (
        *("evaluation/cache", "sources/task_sets", *MODEL),
        *("calibration/block_stream", "calibration/taps", "calibration/hidden_states"),
    ),
    "tasks": ("evaluation/cache", "evaluation/zero_shot", "sources/task_sets", *MODEL),
}


def code() -> dict[Any, str]:
    """The hash of each file of code; the shared files of methods decide what packed.py reads."""
    names = dict.fromkeys(script for kind in SCRIPTS.values() for script in kind)
    own = {script: sha256(PACKAGE / f"{script}.py") for script in names}
    return own | {path: sha256(path) for path in SHARED_SOURCES}


CODE = code()  # when this process starts
LIBRARIES = {
    "perplexity": ("torch", "transformers"),
    "tasks": ("torch", "transformers", "tokenizers", "datasets", "lm_eval"),
}
# What a cell of this run will be asked for: a list of {kind, data, spec}, {model} in data standing for the model's
# identity. An environment variable and no parameter of the compress rule: a cell's weights do not depend on it.
ASKED = "LAYERWISE_EVALUATIONS"


@dataclass(frozen=True)
class Evaluation:
    """kind: perplexity or tasks; model: config entry; fingerprint: what fingerprint.py wrote of it; digest: SHA-256 of
    the weights' file, which whoever has read it knows; data: file of the tokens, or what `zero_shot data` wrote of the
    tasks; spec: of a set of tasks."""

    kind: str
    model: Mapping[str, Any]
    fingerprint: Path
    weights: Path
    digest: str
    data: Path
    spec: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    name: str = "perplexity"

    def file(self) -> Path:
        """Where the result of this content is, or belongs."""
        content = {
            "kind": self.kind,
            "model": read_made(self.fingerprint)["files"],
            "loaded": {key: self.model.get(key) for key in ("dtype", "trust_remote_code")},
            "weights": self.digest,
            "data": sha256(self.data),
            "files": [[path.as_posix(), sha256(path)] for path in (task_files(self.spec) if self.spec else ())],
            "spec": self.spec,
            "code": [CODE[script] for script in SCRIPTS[self.kind]] + [CODE[path] for path in SHARED_SOURCES],
            "versions": [importlib.metadata.version(library) for library in LIBRARIES[self.kind]],
            "device": self.device,
        }
        return STORE / f"{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}.json"

    def compute(self, blocks: LazyBlocks | None = None) -> str:
        """The result as text; blocks: of the model, which get the cell's weights."""
        from layerwise.evaluation.perplexity import apply_weights, evaluate_text
        from layerwise.models.streaming import LazyBlocks

        if blocks is None:
            blocks = LazyBlocks(self.model, self.device)
            apply_weights(blocks, self.weights)
        if self.kind == "perplexity":
            found = evaluate_text(blocks, self.data, self.weights.with_name(f".states-{self.data.stem}"), self.name)
        else:
            from layerwise.evaluation.zero_shot import evaluate_tasks

            found = evaluate_tasks(blocks, self.model, self.spec)
        return json.dumps(found, indent=1, allow_nan=False) + "\n"


def foresee(entry: Mapping[str, Any], fingerprint: Path, weights: Path, digest: str, device: str) -> None:
    """Evaluate a model with the weights of a cell's file on all that the cell will be asked for, into STORE.

    digest: SHA-256 of that file. What is in STORE or has no data yet is left out. What fails is left to the
    evaluation's own job, which fails loudly.
    """
    from layerwise.evaluation.perplexity import apply_weights
    from layerwise.models.streaming import LazyBlocks

    if code() != CODE:  # edited during a compression of hours: what is imported now may not be what was hashed
        return
    blocks = None
    for asked in json.loads(os.environ.get(ASKED, "[]")):
        data = Path(asked["data"].replace("{model}", fingerprint.stem))
        if not data.is_file():
            continue
        evaluation = Evaluation(asked["kind"], entry, fingerprint, weights, digest, data, asked["spec"], device)
        try:
            file = evaluation.file()
            if known(file) is not None:
                continue
            if blocks is None:
                blocks = LazyBlocks(entry, device)
                apply_weights(blocks, weights)  # as they are stored, which is what the cell's own job would read
            text = evaluation.compute(blocks)
            check_unchanged(entry, fingerprint)
            write_atomic(file, text)
        except Exception as error:  # of whatever kind: it is that job's to tell
            print(f"{asked['kind']} of {data} could not be computed beside the compression: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="recall", description=__doc__)
    parser.add_argument("kind", choices=list(SCRIPTS))
    parser.add_argument("--model", type=json.loads, required=True, help="the model's config entry, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="what fingerprint.py wrote of the model")
    parser.add_argument("--weights", type=Path, required=True, help="a cell's weights.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="evaluation tokens, or the description of the tasks")
    parser.add_argument("--tasks", type=json.loads, default={}, help="the set's config entry, as JSON")
    parser.add_argument("--name", default="perplexity", help="label of the progress bar")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    args = parser.parse_args(argv)
    with record_failure(args.out.parent, args.out.name.removesuffix(".json")):
        evaluation = Evaluation(
            kind=args.kind,
            model=args.model,
            fingerprint=args.fingerprint,
            weights=args.weights,
            digest=check_weights(args.weights),
            data=args.data,
            spec=args.tasks,
            device=args.device,
            name=args.name,
        )
        file = evaluation.file()
        text = known(file)
        if text is not None:
            print(f"The same weights were evaluated before: {file}", file=sys.stderr)
        else:
            with unchanging(args.model, args.fingerprint):
                text = computed(evaluation, args.threads)
            write_atomic(file, text)
    write_atomic(args.out, text)


def known(file: Path) -> str | None:
    """What STORE has there; None for no file and for one that a crash of the machine has left empty or cut."""
    try:
        text = file.read_text("utf-8")
        json.loads(text)
    except (FileNotFoundError, ValueError):
        return None
    return text


def computed(evaluation: Evaluation, threads: int | None) -> str:
    """The result of an evaluation in a process of its own."""
    take(evaluation.device)  # before torch is imported
    stay_offline(evaluation.spec)
    from layerwise.models.loading import set_threads

    set_threads(threads)
    return evaluation.compute()


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
