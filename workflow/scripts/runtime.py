"""What every script needs around its work: errors as sentences, files that are whole or absent."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO


class InputError(Exception):
    """Something the user can mend, told in one sentence: what was expected, what came, where."""


class Diverged(InputError):
    """A method's numbers are not finite, or beyond all measure."""


def report_errors(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run a script's main; an InputError becomes its sentence on stderr and exit status 1."""
    try:
        main(argv)
    except InputError as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name when the body ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what processes that were killed have left of whole_file; nobody else may be at work in the folder."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


def digest_of(files: Iterable[str]) -> str:
    """Of names and contents of files of code: what results depend on."""
    content = json.dumps([(os.path.basename(file), sha256(Path(file))) for file in files])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged(code: Path) -> str:
    """The hash of the code that a file lists and is named after.

    Raises InputError when the code is no longer that: what this process has imported would pass for something else.
    """
    if digest_of(json.loads(code.read_text("utf-8"))) != code.name:
        raise InputError("The code was edited since this run began: run again.")
    return code.name


def write_atomic(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def record_failure(folder: Path, stage: str) -> Iterator[None]:
    """Around a cell's job: an error leaves failed-{stage}.json in the cell's folder and becomes an InputError.

    The record is no declared output, so the workflow counts the cell as failed and tries it again the next time.
    """
    record = Path(folder) / f"failed-{stage}.json"
    record.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        status, reason = status_of(error)
        text = {"status": status, "reason": reason, "stage": stage, "traceback": traceback.format_exc()}
        write_atomic(record, json.dumps(text, indent=2) + "\n")
        raise InputError(f"{reason} (details: {record})") from error


def status_of(error: Exception) -> tuple[str, str]:
    """(status word, one sentence) of an error."""
    text = " ".join(str(error).split())
    status = "out of memory" if out_of_memory(error) else "diverged" if isinstance(error, Diverged) else "error"
    if isinstance(error, InputError):
        return status, text
    if isinstance(error, MemoryError):
        return status, text or "the job ran out of memory."
    return status, f"{type(error).__name__}: {text}"


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a lack of memory: Python's, or torch's on a device or the processor."""
    while error is not None:
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        # On the processor torch raises a plain RuntimeError.
        if known or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)):
            return True
        error = error.__cause__
    return False


PROVENANCE = ("torch", "transformers", "numpy", "snakemake")  # distributions whose versions a row carries


def provenance(device: str, threads: int) -> dict[str, object]:
    """Where a result comes from: code, versions, machine."""
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain", "--", "methods", "workflow", "Snakefile")) if commit else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PROVENANCE},
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu": _cpu(),
        "threads": threads,
        "device": device,
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command about the project, or None where it is no git checkout."""
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def unlock_after_death(folder: Path) -> IO[str] | None:
    """Remove Snakemake's locks in its folder (.snakemake) if no run that put them there lives, as after a SIGKILL.

    Every run holds the file that is returned, which the system lets go of when the process dies, until its end.
    After a death on another host, of which some file systems let nobody know whether it lives, and where there are no
    locks of files (None is returned), a run that was killed needs `snakemake --unlock`, as ever.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / "layerwise.alive").open("a+")
        held.seek(0)
        host, own = held.read().strip(), socket.gethostname()
        with contextlib.suppress(BlockingIOError):  # another run lives, and its locks are its own
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for lock in (folder / "locks").glob("*.lock") if host in ("", own) else ():
                lock.unlink(missing_ok=True)
            if not any((folder / "locks").glob("*.lock")):  # else they are of a run on another host, which may live
                held.truncate(0)
                held.write(own)
                held.flush()
        fcntl.flock(held, fcntl.LOCK_SH)
        return held
    return None


def gram_stores() -> Path:
    """The folder of all Gram stores, which studies in other folders may share."""
    return Path(os.environ.get("LAYERWISE_CACHE") or "results/grams")


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes on macOS, kilobytes on Linux
