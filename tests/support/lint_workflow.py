"""`snakemake --lint`, with the advice that this workflow does not take, each with its reason. Part of `make lint`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

PLACE = re.compile(r"Lints for (\S+ \S+?):?(?: \(.*)?$")
ADVICE = re.compile(r"    \* (.*?)\.?:$")
# (what advice begins with, the rule or file that it is for, or None for all): the reason why it is not taken.
EXCEPTIONS = {
    ("Specify a conda environment or container", None): (
        "Every rule runs in the interpreter of Snakemake, with the locked packages, on which numbers depend."
    ),
    ("Shell command directly uses variable WORKER", None): (
        "The interpreter's place decides no result. As a parameter, a venv that is moved would run everything again."
    ),
    ("No log directive defined", "rule code"): "It writes one line, and has nothing to report.",
    ("Environment variable PYTHONPATH used but not asserted", "snakefile Snakefile"): (
        "The variable may be absent: the Snakefile adds a checkout to it, and reads it for no other purpose."
    ),
}


def advice(output: str) -> Iterator[tuple[str, str]]:
    """(advice, place) pairs in what `snakemake --lint` prints; a place is `rule NAME` or `snakefile PATH`."""
    place = ""
    for line in output.splitlines():
        if found := PLACE.match(line):
            kind, name = found[1].split(" ", 1)
            place = f"{kind} {Path(name).relative_to(ROOT) if Path(name).is_relative_to(ROOT) else name}"
        elif found := ADVICE.match(line):
            yield found[1], place


def taken(found: tuple[str, str]) -> bool:
    """Whether advice must be followed: no exception is made for it."""
    text, place = found
    return not any(text.startswith(begin) and where in (None, place) for begin, where in EXCEPTIONS)


def unused(found: list[tuple[str, str]]) -> list[tuple[str, str | None]]:
    """Exceptions of which there is no case any more."""
    return [
        (begin, where)
        for begin, where in EXCEPTIONS
        if not any(text.startswith(begin) and where in (None, place) for text, place in found)
    ]


def lint() -> list[tuple[str, str]]:
    """All advice on the workflow. Raises RuntimeError where Snakemake ends without any."""
    command = [sys.executable, "-m", "snakemake", "--lint", "text", "--snakefile", str(ROOT / "Snakefile")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = list(advice(done.stdout + done.stderr))
    if done.returncode and not found:
        raise RuntimeError(f"snakemake --lint must end with advice or none. Got this instead:\n{done.stderr}")
    return found


def main() -> None:
    found = lint()
    wrong = [f"{place}: {text}" for text, place in found if taken((text, place))]
    wrong += [f"tests/support/lint_workflow.py: no case of the exception {exception}" for exception in unused(found)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
