"""The job of a cell: if its model passes the check, compress it, and evaluate it while the model is in memory."""

import argparse
import json
import sys
from pathlib import Path

from layerwise.compression.cell import CellJob, run
from layerwise.evaluation.cache import evaluate_ahead
from layerwise.evaluation.checked import ensure_checked
from layerwise.models.loading import set_threads
from layerwise.runtime.devices import take
from layerwise.runtime.errors import record_failure, report_errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="compress", description=__doc__)
    parser.add_argument("--cell", type=json.loads, required=True, help="spec of the cell, as JSON")
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="the model's fingerprint")
    parser.add_argument("--tokens", type=Path, required=True, help="calibration tokens")
    parser.add_argument("--gram", type=Path, help="store of the Grams (shared mode)")
    parser.add_argument("--fisher", type=Path, help="file of each layer's fisher, if the method needs it")
    parser.add_argument("--levels", type=Path, help="table of the layers' levels, if a budget is spread")
    parser.add_argument("--code", type=Path, help="file named after the hash of the code on which the result depends")
    parser.add_argument("--dtype", help="dtype of the forward passes that give the Grams (default: the model's)")
    parser.add_argument("--method-path", type=Path, action="append", default=[], help="further folder of methods")
    parser.add_argument("--requested", type=Path, help="file of the evaluations that the study requests for every cell")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cell")
    args = parser.parse_args(argv)
    set_threads(args.threads)
    job = CellJob(
        spec=args.cell,
        model=args.model,
        fingerprint=args.fingerprint,
        tokens=args.tokens,
        out=args.out,
        gram=args.gram,
        fisher=args.fisher,
        levels=args.levels,
        code=args.code,
        dtype=args.dtype,
        method_paths=tuple(args.method_path),
        device=args.device,
    )

    def evaluate(weights: Path, digest: str) -> None:
        requested = json.loads(args.requested.read_text("utf-8")) if args.requested else []
        evaluate_ahead(requested, job.model, job.fingerprint, weights, digest, job.device, job.computed)

    with record_failure(args.out, "compress"):
        ensure_checked(args.model, args.fingerprint, args.tokens, args.device)
        take(args.device)
        run(job, then=evaluate)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
