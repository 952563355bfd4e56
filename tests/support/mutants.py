"""Plant faults one at a time in a copy of the project and run the tests that must catch them.

    python -m tests.support.mutants                    # all of mutants.yaml; status 1 where one is not caught
    python -m tests.support.mutants --write            # and the verdicts into docs/testing.md
    python -m tests.support.mutants Holm damping       # those whose description has one of the words
    python -m tests.support.mutants --until 1800000000 # as many as begin before then (seconds since 1970), by chance

A fault is caught when a test fails with it that passes without it. Tests that cannot run at all (a syntax error, no
test of the name) or do not end catch nothing.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

from tests.support.compiled import compile_loops
from tests.support.fork_server import ForkServer
from tests.support.paths import ROOT
from tests.support.workflow_harness import compiled_folder, share_compiled

TABLE = ROOT / "tests/support/mutants.yaml"
PAGE = ROOT / "docs/testing.md"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"  # around the table of verdicts in PAGE
COMPILED = ".numba"
LEFT_OUT = (".git", ".venv", ".snakemake", ".pytest_cache", ".ruff_cache", ".hypothesis", "results", "logs", "figures")
LONGEST = 300  # seconds of the tests of a fault
FAILED = re.compile(r"^FAILED (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """In `file`, `now`, which occurs there once, becomes `then`; tests: arguments of pytest."""

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


def failing(project: ForkServer, tests: Sequence[str], longest: float = LONGEST) -> str | None:
    """The first test that fails in a copy of the project; nothing where all pass, None where they cannot be run."""
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb", "no", "-m", "not long"]
    status, output = project.pytest([*options, *tests], longest)
    found = FAILED.search(output)
    if status == 1 and found:
        return found[1]
    return "" if status == 0 else None


def verdict(project: ForkServer, fault: Fault) -> str:
    """The first test that fails with the fault, or nothing."""
    path = project.folder / fault.file
    code = path.read_text("utf-8")
    path.write_text(fault.planted(code), "utf-8")
    try:
        test = failing(project, shlex.split(fault.tests))
    finally:
        path.write_text(code, "utf-8")
    return test or ""


def generated(folder: str, names: Sequence[str]) -> set[str]:
    """Of what is in a folder what no copy needs; `results` and `figures` are rooms of the package too."""
    return set(names) & set(LEFT_OUT) if Path(folder) == ROOT else set()


def served_copy(folder: Path) -> ForkServer:
    """A copy of the project with what is compiled: only the loops of a file with a fault are compiled again."""
    share_compiled(compiled_folder(), folder, within=folder / COMPILED)
    shutil.copytree(ROOT, folder, symlinks=True, ignore=generated, dirs_exist_ok=True)
    return ForkServer(folder, {"NUMBA_CACHE_DIR": str(folder / COMPILED)})


def judged(chosen: Sequence[Fault], workers: int, until: float = math.inf) -> list[str | None]:
    """The test that catches each fault, nothing where none does, None where none was begun before `until`.

    Raises SystemExit for a test that fails without a fault.
    """
    compile_loops()  # a loop that is compiled with a fault in what it calls would keep it
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="layerwise-mutants-")))
        free: SimpleQueue[ForkServer] = SimpleQueue()
        for number in range(workers):
            free.put(stack.enter_context(served_copy(place / str(number))))
        pool = stack.enter_context(ThreadPoolExecutor(workers))

        def judge(fault: Fault) -> str | None:
            if time.time() > until:
                return None
            project, start = free.get(), time.perf_counter()
            try:
                found = verdict(project, fault)
            finally:
                free.put(project)
            print(f"{time.perf_counter() - start:4.0f} s  {fault.fault}: {found or 'NOT CAUGHT'}", flush=True)
            return found

        caught = list(pool.map(judge, chosen))
        if any(caught) and (found := failing(free.get(), sorted(filter(None, caught)), 3 * LONGEST)) != "":
            told = f"this one fails: {found}" if found else "they cannot be run to their end"
            raise SystemExit(f"error: Without a fault the tests that catch one should pass, and {told}.")
        return caught


def write(caught: Mapping[Fault, str]) -> None:
    """The verdicts into PAGE, beside those that are there of other faults."""
    head, rest = PAGE.read_text("utf-8").split(BEGIN)
    old, tail = rest.split(END)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in old.splitlines()[2:]}
    for fault, test in caught.items():
        shown = test.removeprefix("tests/").partition("[")[0]
        rows[fault.fault] = f"| {fault.fault} | `{fault.file}` | {f'`{shown}`' if shown else '**nothing**'} |"
    known = [rows[fault.fault] for fault in faults() if fault.fault in rows]
    lines = ["| planted fault | in | caught by |", "|:--|:--|:--|", *known]
    PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + tail, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="faults with one of these in their description (default: all)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--until", type=int, help="plant none after this time, in seconds since 1970; order by chance")
    parser.add_argument("--write", action="store_true", help="write the verdicts into docs/testing.md")
    args = parser.parse_args()
    chosen = [fault for fault in faults() if not args.words or any(word in fault.fault for word in args.words)]
    if not chosen:
        parser.error(f"no fault's description in {TABLE} has one of the words {', '.join(args.words)}")
    if args.until:
        random.Random(args.until).shuffle(chosen)
    start = time.perf_counter()
    verdicts = dict(zip(chosen, judged(chosen, args.workers, args.until or math.inf), strict=True))
    caught = {fault: test for fault, test in verdicts.items() if test is not None}
    if args.write:
        write(caught)
    missed = [fault.fault for fault, test in caught.items() if not test]
    left = [fault.fault for fault in chosen if fault not in caught]
    if left:
        print(f"Left out, as the time was over (--until): {'; '.join(left)}.")
    seconds = time.perf_counter() - start
    print(f"{len(caught) - len(missed)} of {len(caught)} faults caught in {seconds:.0f} s, {len(left)} left out.")
    if missed:
        raise SystemExit(f"error: No test fails with: {'; '.join(missed)}.")


if __name__ == "__main__":
    main()
