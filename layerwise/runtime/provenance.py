"""The provenance of a result: code, versions, machine and resources used."""

import importlib.metadata
import os
import platform
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from layerwise.runtime.project import PACKAGE, ROOT

DUBIOUS = "dubious ownership"  # part of git's message if another user owns a clone
PROVENANCE = ("torch", "transformers", "numpy", "snakemake")  # distributions whose versions are stored in each row


def provenance(device: str, threads: int) -> dict[str, object]:
    """The provenance of a result: code, versions, machine. If the code's state is unknown, stderr says why, once."""
    code = read_clone()
    if code.unread:
        _warn(code.unread)
    return {
        "commit": code.commit,
        "dirty": code.dirty,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PROVENANCE},
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu": processor(),
        "threads": threads,
        "device": device,
    }


@dataclass(frozen=True)
class Clone:
    """The state of the project's code from git. unread: a sentence if git cannot read the clone."""

    commit: str | None = None
    dirty: bool | None = None
    unread: str | None = None


def read_clone() -> Clone:
    """The project's commit, and whether the code differs from it; empty if the project is not a git checkout."""
    if ROOT.is_relative_to(PACKAGE):  # installed: a surrounding repository belongs to another project
        return Clone()
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--", "layerwise", "methods", "allocators", "workflow", "Snakefile")
    except (OSError, subprocess.SubprocessError) as error:
        return Clone(unread=_unread(error) if os.path.lexists(ROOT / ".git") else None)
    return Clone(commit, bool(changes))


def _git(*arguments: str) -> str:
    """The output of a git command in the project."""
    # (messages in English, because one of them is searched for)
    done = subprocess.run(
        ["git", "-C", ROOT, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
        env={**os.environ, "LC_ALL": "C"},
    )
    return done.stdout.strip()


def _unread(error: OSError | subprocess.SubprocessError) -> str:
    """A sentence about why git cannot read the project's clone, and the remedy."""
    empty = "the columns commit and dirty stay empty"
    if isinstance(error, FileNotFoundError):
        return f"Without git the clone {ROOT} cannot be read: {empty} until it is installed."
    if isinstance(error, subprocess.CalledProcessError):
        said = [line.strip() for line in error.stderr.splitlines() if line.strip()]
        if any(DUBIOUS in line for line in said):
            return (
                f"git refuses to read the clone {ROOT}, which another user owns: {empty} until "
                f"`git config --global --add safe.directory {shlex.quote(str(ROOT.resolve()))}`."
            )
        why = said[0].rstrip(".") if said else f"exit status {error.returncode}"
    else:
        why = "it took too long" if isinstance(error, subprocess.TimeoutExpired) else str(error)
    return f"git cannot read the clone {ROOT} ({why}): {empty} until it does."


@cache
def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes on macOS, kilobytes on Linux
