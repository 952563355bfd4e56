"""Free the folder of Gram stores: all that no other study uses, and what killed calibrations have left there."""

from __future__ import annotations

import argparse
import fcntl
import re
import shutil
import sys
from pathlib import Path

from workflow.scripts.grams import cache, users
from workflow.scripts.runtime import report_errors

NAMES = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.part")  # of stores and of calibrations: nothing else is touched


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def in_use(part: Path) -> bool:
    """Whether a process works in what a calibration has begun."""
    try:
        with (part / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def clean(folder: Path, here: Path, dry: bool = False) -> int:
    """Remove what may go from a folder of stores; returns the bytes. here: the working directory.

    With a store goes what says that this study has it, so that the next run that needs it computes it anew.
    """
    freed = 0
    for path in sorted(path for path in folder.glob("*") if NAMES.fullmatch(path.name) and path.is_dir()):
        pointers = users(path)
        others = [pointer for pointer in pointers if not pointer.is_relative_to(here)]
        size = size_of(path)
        if others:
            kept = f"{len(others)} other studies use it, such as {others[0]}"
        elif path.name.startswith(".") and in_use(path):
            kept = "a calibration is at work there"
        else:
            print(f"{'would free' if dry else 'freed'} {size / 1e6:.1f} MB: {path}")
            freed += size
            if not dry:
                for pointer in pointers:
                    pointer.unlink(missing_ok=True)
                shutil.rmtree(path)
            continue
        print(f"kept {size / 1e6:.1f} MB: {path} ({kept})")
    return freed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="say what would go, and leave it")
    args = parser.parse_args(argv)
    freed = clean(cache(), Path.cwd(), args.dry_run)
    print(f"{freed / 1e6:.1f} MB in all, of {cache()}.")


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
