"""Plant faults one at a time in a copy of the project and run the tests that must catch them.

    python -m tests.mutants                    # all of tests/mutants.yaml; status 1 where one is not caught
    python -m tests.mutants --write            # and the verdicts into docs/testing.md
    python -m tests.mutants Holm damping       # those whose description has one of the words

A fault is caught when a test fails with it that passes without it. Tests that cannot run at all (a syntax error, no
test of the name) or do not end catch nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numba
import yaml

from tests.dag import share_compiled

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests/mutants.yaml"
PAGE = ROOT / "docs/testing.md"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"  # around the table of verdicts in PAGE
COMPILED = ".numba"
LEFT_OUT = (".git", ".venv", ".snakemake", ".pytest_cache", ".ruff_cache", ".hypothesis", "results", "logs", "figures")
LONGEST = 900  # seconds of the tests of a fault
FAILED = re.compile(r"^FAILED (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """In `file`, `now`, which stands there once, becomes `then`; tests: arguments of pytest."""

    fault: str
    file: str
    now: str
    then: str
    tests: str

    def planted(self, code: str) -> str:
        """The code with the fault. Raises ValueError where it cannot be planted."""
        if code.count(self.now) != 1 or self.now == self.then:
            raise ValueError(f"{self.file} should have once {self.now!r}, of the fault {self.fault!r}.")
        return code.replace(self.now, self.then)


def faults() -> list[Fault]:
    return [Fault(**entry) for entry in yaml.safe_load(TABLE.read_text("utf-8"))]


def failing(folder: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails in a copy of the project; nothing where all pass, None where they cannot be run."""
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb", "no"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    try:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / COMPILED)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return None
    found = FAILED.search(done.stdout)
    if done.returncode == 1 and found:
        return found[1]
    return "" if done.returncode == 0 else None


def verdict(folder: Path, fault: Fault) -> str:
    """The first test that fails with the fault, or nothing."""
    path = folder / fault.file
    code = path.read_text("utf-8")
    path.write_text(fault.planted(code), "utf-8")
    try:
        test = failing(folder, shlex.split(fault.tests))
    finally:
        path.write_text(code, "utf-8")
    return test or ""


def copy_to(folder: Path) -> Path:
    """A copy of the project with what is compiled: only the loops of a file with a fault are compiled anew."""
    share_compiled(Path(numba.config.CACHE_DIR), folder, within=folder / COMPILED)
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)


def judged(chosen: Sequence[Fault], workers: int) -> list[str]:
    """The test that catches each fault, nothing where none does. Raises SystemExit for one that fails without."""
    with tempfile.TemporaryDirectory(prefix="layerwise-mutants-") as place, ThreadPoolExecutor(workers) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(workers):
            free.put(copy_to(Path(place) / str(number)))

        def judge(fault: Fault) -> str:
            folder, start = free.get(), time.perf_counter()
            try:
                found = verdict(folder, fault)
            finally:
                free.put(folder)
            print(f"{time.perf_counter() - start:4.0f} s  {fault.fault}: {found or 'NOT CAUGHT'}", flush=True)
            return found

        caught = list(pool.map(judge, chosen))
        if any(caught) and (found := failing(free.get(), sorted(filter(None, caught)))) != "":
            told = f"this one fails: {found}" if found else "they cannot be run to their end"
            raise SystemExit(f"error: Without a fault the tests that catch one should pass, and {told}.")
        return caught


def write(chosen: Sequence[Fault], caught: Sequence[str]) -> None:
    """The verdicts into PAGE, beside those that stand there of other faults."""
    head, rest = PAGE.read_text("utf-8").split(BEGIN)
    old, tail = rest.split(END)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines()[2:]}
    for fault, test in zip(chosen, caught, strict=True):
        shown = test.removeprefix("tests/").partition("[")[0]
        rows[fault.fault] = f"| {fault.fault} | `{fault.file}` | {f'`{shown}`' if shown else '**nothing**'} |"
    known = [rows[fault.fault] for fault in faults() if fault.fault in rows]
    lines = ["| planted fault | in | caught by |", "|:--|:--|:--|", *known]
    PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + tail, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="faults with one of these in their description (default: all)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the verdicts into docs/testing.md")
    args = parser.parse_args()
    chosen = [fault for fault in faults() if not args.words or any(word in fault.fault for word in args.words)]
    start = time.perf_counter()
    caught = judged(chosen, args.workers)
    if args.write:
        write(chosen, caught)
    missed = [fault.fault for fault, test in zip(chosen, caught, strict=True) if not test]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults caught in {time.perf_counter() - start:.0f} s.")
    if missed:
        raise SystemExit(f"error: No test fails with: {'; '.join(missed)}.")


if __name__ == "__main__":
    main()
