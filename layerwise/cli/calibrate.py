"""The job of a model's Grams: check the model, unless that was done before, then calibrate."""

import argparse
import json
import sys
from pathlib import Path

from layerwise.calibration import calibrate
from layerwise.evaluation.checked import ensure_checked
from layerwise.models.loading import set_threads
from layerwise.runtime.errors import report_errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=json.loads)
    parser.add_argument("--fingerprint", type=Path)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    args, _ = parser.parse_known_args(argv)
    if args.model and args.fingerprint and args.tokens:  # else calibrate says what is missing
        set_threads(args.threads)
        ensure_checked(args.model, args.fingerprint, args.tokens, args.device)
    calibrate.main(argv)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
