"""`python -m website FOLDER`: write the site's pages and settings, from which MkDocs builds it."""

import argparse
import shutil
import sys
from pathlib import Path

from layerwise.runtime.errors import report_errors
from website.pages import write


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m website", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write to; its pages/ and html/ are written from nothing")
    folder: Path = parser.parse_args(argv).folder
    for old in ("pages", "html"):
        shutil.rmtree(folder / old, ignore_errors=True)
    print(write(folder))


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
