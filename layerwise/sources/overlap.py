"""How much of an evaluation its calibration has seen, by content: what texts are called is not asked.

Written beside the tokens before any cell is computed. A large overlap is reported on stderr.
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

# Shares beyond which a calibration counts as contaminated. They leave ordinary texts of one kind alone, even docstrings
# of the embedded study, whose packages copy many from each other: of 12 draws of 128 sequences from its training text
# none holds more of 64 windows of its test text than 0.6% (sequences of 512 tokens) or 2.4% (of 2048), nor all its
# windows more of a draw than 1.2%. Of a draw of 512 from the test text they hold all, and it holds 11 % of 64 windows.
# Of the test text 5% is in the training text.
MOST_TOKENS = 0.03
MOST_TEXT = 0.2


def overlap(calibration: Path, evaluation: Path) -> dict[str, Any]:
    """The overlap of a calibration's and an evaluation's tokens, from their files.

    overlap: share of the evaluation's n-grams that the calibration holds; reverse: the other way round;
    text_overlap: share of the text that is more of a part of the other; each 0 to 1, None where it is unknown.
    contamination: what the two have in common, in words that follow "calibration and evaluation", None where that is
    little. Raises InputError for a file that is none of tokens.
    """
    (drawn, drawn_info), (windows, info) = read_tokens(calibration), read_tokens(evaluation)
    sketches = read_sketch(calibration), read_sketch(evaluation)
    stream = windows.reshape(1, -1)  # one window follows the other in the text
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
    parser.add_argument("--out", type=Path, required=True, help="JSON file for what they have in common")
    args = parser.parse_args(argv)
    found = overlap(args.calibration, args.evaluation)
    if found["contamination"]:
        print(f"warning: {_sentence(args.calibration.stem, args.evaluation.stem, found)}", file=sys.stderr)
    write_atomic(args.out, json.dumps(found, indent=1) + "\n")


def _sentence(calibration: str, evaluation: str, found: dict[str, Any]) -> str:
    """calibration, evaluation: names of the files, "calibration-c-0123abcd"."""
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
