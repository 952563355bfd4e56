"""Measure how much of an evaluation its calibration has seen, by content, independent of the texts' names.

The result is stored with the tokens before any cell is computed. A large overlap is reported on stderr.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from layerwise.runtime.errors import report_errors
from layerwise.runtime.files import write_atomic
from layerwise.sources.ngrams import NGRAM, share, sketched_share
from layerwise.sources.tokens import read_sketch, read_tokens

# Shares above which a calibration counts as contaminated. Ordinary texts of one kind stay below them, even the
# docstrings of the embedded study, whose packages copy many from each other. In 12 draws of 128 sequences from its
# training text, a draw holds at most 0.6% (sequences of 512 tokens) or 2.4% (2048 tokens) of 64 windows of the test
# text, and all windows hold at most 1.2% of a draw. For a draw of 512 sequences from the test text, the windows hold
# all of it, and it holds 11% of 64 windows. 5% of the test text is in the training text.
MOST_TOKENS = 0.03
MOST_TEXT = 0.2


def overlap(calibration: Path, evaluation: Path) -> dict[str, Any]:
    """The overlap of a calibration's and an evaluation's tokens, from their files.

    overlap: share of the evaluation's n-grams in the calibration. reverse: share of the calibration's n-grams in the
    evaluation. text_overlap: share of one whole text in the other, the larger of the two directions. Each is 0 to 1, or
    None if unknown. contamination: a phrase that follows "calibration and evaluation" and names what they share, or
    None if they share little. Raises InputError for a file without tokens.
    """
    (drawn, drawn_info), (windows, info) = read_tokens(calibration), read_tokens(evaluation)
    sketches = read_sketch(calibration), read_sketch(evaluation)
    stream = windows.reshape(1, -1)  # the windows are consecutive in the text
    shares = share(stream, drawn), share(drawn, stream)
    parts = [sketched_share(*sketches), sketched_share(*reversed(sketches))]
    text = max((part for part in parts if part is not None), default=None)
    contamination = None
    if info["sha256"] == drawn_info["sha256"]:
        contamination = "draw from the same text"
    elif text is not None and text > MOST_TEXT:
        contamination = f"draw from texts of which one holds {100 * text:.0f}% of the other"
    elif any(each is not None and each > MOST_TOKENS for each in shares):
        contamination = f"share n-grams of {NGRAM} tokens"
    return {"overlap": shares[0], "reverse": shares[1], "text_overlap": text, "contamination": contamination}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="overlap", description=__doc__)
    parser.add_argument("--calibration", type=Path, required=True, help="file of the calibration's tokens")
    parser.add_argument("--evaluation", type=Path, required=True, help="file of the evaluation's tokens")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the overlap")
    args = parser.parse_args(argv)
    found = overlap(args.calibration, args.evaluation)
    if found["contamination"]:
        print(f"warning: {_sentence(args.calibration.stem, args.evaluation.stem, found)}", file=sys.stderr)
    write_atomic(args.out, json.dumps(found, indent=1) + "\n")


def _sentence(calibration: str, evaluation: str, found: dict[str, Any]) -> str:
    """calibration, evaluation: names of the files, such as "calibration-c-0123abcd"."""
    names = " and ".join(name.replace("-", " ", 1) for name in (calibration, evaluation))
    measured = ""
    if found["overlap"] is not None:
        measured = (
            f" ({100 * found['overlap']:.1f}% of the evaluation's n-grams of {NGRAM} tokens are in the calibration, "
            f"{100 * found['reverse']:.1f}% of the calibration's in the evaluation)"
        )
    return f"{names} {found['contamination']}{measured}: data-aware methods may look better than on unseen text."


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
