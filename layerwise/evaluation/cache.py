"""Evaluations by content: the result for the same weights, data and code is read instead of computed again.

The job that compresses a cell also evaluates it, while the model is in memory, and saves the results in STORE
(`evaluate_ahead`). The cell's own evaluation jobs read them there and need neither torch nor the model. Cells with
equal weights, such as those of a data-free method in both modes, share results. Missing evaluations are computed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.contract.import_closure import closure
from layerwise.models.compute_dtype import KEY, compute_dtype, tell
from layerwise.runtime.devices import take
from layerwise.runtime.errors import record_failure, report_errors
from layerwise.runtime.files import check_weights, read_made, sha256, write_atomic
from layerwise.sources.fingerprint import check_unchanged, unchanging
from layerwise.sources.task_sets import stay_offline, task_files

if TYPE_CHECKING:
    from layerwise.models.streaming import LazyBlocks

STORE = Path("results/evaluations")
# The module whose `evaluate_cell` computes each kind of evaluation, and libraries whose versions affect its result.
KINDS = {"perplexity": "layerwise.evaluation.perplexity", "tasks": "layerwise.evaluation.zero_shot"}
LIBRARIES = {
    "perplexity": ("torch", "transformers"),
    "tasks": ("torch", "transformers", "tokenizers", "datasets", "lm_eval"),
}


def code_of(kind: str) -> list[Path]:
    """Files of code on which a kind of evaluation depends."""
    return closure([KINDS[kind], __name__])


def hashes() -> dict[Path, str]:
    """SHA-256 of each file of code on which an evaluation depends."""
    return {path: sha256(path) for path in dict.fromkeys(path for kind in KINDS for path in code_of(kind))}


CODE = hashes()  # at the start of this process


@dataclass(frozen=True)
class Evaluation:
    """kind: perplexity or tasks. model: config entry. fingerprint: its fingerprint, from fingerprint.py. digest:
    SHA-256 of the weights' file. data: file of the tokens, or the tasks' description from `zero_shot data`. spec: spec
    of a task set. computed: dtype of the forward passes, as in models.loading.load. dense: record of the dense model's
    hidden states on the tokens, for the divergence."""

    kind: str
    model: Mapping[str, Any]
    fingerprint: Path
    weights: Path
    digest: str
    data: Path
    spec: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    name: str = "perplexity"
    computed: str | None = None
    dense: Path | None = None

    def file(self) -> Path:
        """The path of the result with this content."""
        content = {
            "kind": self.kind,
            "model": read_made(self.fingerprint)["files"],
            "loaded": {key: self.model.get(key) for key in ("dtype", "trust_remote_code")},
            "compute dtype": self.computed,
            "weights": self.digest,
            "data": sha256(self.data),
            "dense": read_made(self.dense)["sha256"] if self.dense else None,
            "files": [[path.as_posix(), sha256(path)] for path in (task_files(self.spec) if self.spec else ())],
            "spec": self.spec,
            "code": [CODE[path] for path in code_of(self.kind)],
            "versions": [importlib.metadata.version(library) for library in LIBRARIES[self.kind]],
            "device": self.device,
        }
        return STORE / f"{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}.json"

    def compute(self, blocks: LazyBlocks | None = None) -> str:
        """The result as text. blocks: the model's blocks, which get the cell's weights."""
        if blocks is None:
            blocks = self.blocks()
        found = importlib.import_module(KINDS[self.kind]).evaluate_cell(blocks, self)
        found[KEY] = str(blocks.model.dtype).removeprefix("torch.")
        return json.dumps(found, indent=1, allow_nan=False) + "\n"

    def blocks(self) -> LazyBlocks:
        """The model with the cell's stored weights."""
        from layerwise.evaluation.perplexity import apply_weights
        from layerwise.models.streaming import LazyBlocks

        blocks = LazyBlocks(self.model, self.device, self.computed)
        apply_weights(blocks, self.weights)
        return blocks


def evaluate_ahead(
    requested: Iterable[Mapping[str, Any]],
    model: Mapping[str, Any],
    fingerprint: Path,
    weights: Path,
    digest: str,
    device: str,
    computed: str | None,
) -> None:
    """Evaluate a model with the weights of a cell's file on all evaluations requested for the cell; save them in STORE.

    requested: {kind, data, dense, spec} of each evaluation; {model} in data and dense is a placeholder for the model's
    identity. digest: SHA-256 of the file of weights. computed: the dtype of the cell's forward passes. Evaluations that
    are in STORE, or lack data or dense states, are skipped. A failed evaluation is left to its own job, which reports
    the error.
    """
    if hashes() != CODE:  # edited during a long compression: the imported code may differ from the hashed code
        return
    blocks = None
    for entry in requested:
        places = (entry[key] and entry[key].replace("{model}", fingerprint.stem) for key in ("data", "dense"))
        data, dense = (path and Path(path) for path in places)
        if not all(path.is_file() for path in (data, dense) if path):
            continue
        evaluation = Evaluation(
            *(entry["kind"], model, fingerprint, weights, digest, data, entry["spec"], device),
            computed=computed,
            dense=dense,
        )
        try:
            file = evaluation.file()
            if known(file) is not None:
                continue
            if blocks is None:
                blocks = evaluation.blocks()
            text = evaluation.compute(blocks)
            check_unchanged(model, fingerprint)
            write_atomic(file, text)
        except Exception as error:  # of any kind; the evaluation's own job reports it
            print(
                f"{entry['kind']} of {data} could not be computed together with the compression: {error}",
                file=sys.stderr,
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--model", type=json.loads, required=True, help="the model's config entry, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="the model's fingerprint, from fingerprint.py")
    parser.add_argument("--weights", type=Path, required=True, help="a cell's weights.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="evaluation tokens, or the description of the tasks")
    parser.add_argument(
        "--dense", type=Path, help="record of the dense model's states on these tokens, from dense_states.py"
    )
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
            computed=computed_as(args.weights, args.model, args.device),
            dense=args.dense,
        )
        file = evaluation.file()
        text = known(file)
        if text is not None:
            print(f"The same weights are already evaluated: {file}", file=sys.stderr)
        else:
            with unchanging(args.model, args.fingerprint):
                text = computed(evaluation, args.threads)
            write_atomic(file, text)
    write_atomic(args.out, text)


def computed_as(weights: Path, model: Mapping[str, Any], device: str) -> str | None:
    """The dtype in which a cell was computed; it is evaluated in the same dtype on any machine.

    For weights that do not belong to a cell, the dtype in which this machine computes the config's model.
    """
    record = weights.with_name("cell.json")
    found = read_made(record)["provenance"].get(KEY) if record.is_file() else None
    return found or compute_dtype(model, device)


def known(file: Path) -> str | None:
    """The content of a file in STORE; None for an absent file, and for one that a crash left empty or truncated."""
    try:
        text = file.read_text("utf-8")
        json.loads(text)
    except (FileNotFoundError, ValueError):
        return None
    return text


def computed(evaluation: Evaluation, threads: int | None) -> str:
    """The result of an evaluation in a separate process."""
    take(evaluation.device)  # must precede the import of torch
    stay_offline(evaluation.spec)
    from layerwise.models.loading import set_threads

    set_threads(threads)
    tell(evaluation.model, evaluation.computed, evaluation.device)
    return evaluation.compute()


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
