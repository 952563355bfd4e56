"""What every script needs around its work: errors as sentences, files that are whole or absent."""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any


class InputError(Exception):
    """Something the user can mend, told in one sentence: what was expected, what came, where."""


class Diverged(InputError):
    """A method's numbers are not finite, or beyond all measure."""


class Stopped(BaseException):
    """The system, a scheduler or a person told this process to end (SIGTERM)."""


STOPPED = "the job was told to end before it was done; the next run goes on after its last finished block"
KILLED = (
    "the job was killed before it could say why: where no person and no scheduler did that, the machine had no memory "
    "left (`dmesg` says so), and fewer jobs at a time, --cores, take less"
)
# What a system says when it refuses to read or write a file, in words that follow the file's name and a colon.
REFUSALS = {
    errno.ENOSPC: "no space is left on the disk: free some, then run again",
    errno.EDQUOT: "the quota on this disk is used up: free some, then run again",
    errno.EFBIG: "files may not grow so large here (ulimit -f): raise the limit, then run again",
    errno.EROFS: "the disk is mounted read-only: make it writable, or work in another folder",
    errno.EACCES: "permission is denied: give yourself the right, or work in another folder",
    errno.EPERM: "the operation is not permitted: give yourself the right, or work in another folder",
    errno.EIO: "the disk reports an input/output error: run again, and look after the disk if it stays",
    errno.EMFILE: "too many files are open (ulimit -n): raise the limit, then run again",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def report_errors(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run a script's main; what the user can mend becomes a sentence on stderr and exit status 1.

    That is an InputError, what a disk refuses and a lack of memory. SIGTERM and Ctrl-C end the process in a sentence
    too, with what it has not finished removed, and with the exit status that a shell gives them.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        main(argv)
    except InputError as error:
        sys.exit(f"error: {error}")
    except (Stopped, KeyboardInterrupt) as error:
        print(f"error: {STOPPED}.", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(error, Stopped) else signal.SIGINT))
    except Exception as error:
        if sentence := refusal(error) or no_memory(error):
            sys.exit(f"error: {sentence}")
        raise  # a fault of the code, whose traceback says where
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise Stopped


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def refused(error: BaseException) -> OSError | None:
    """The error of the system, one of REFUSALS, that an error comes from."""
    for one in causes(error):
        if isinstance(one, OSError) and one.errno in REFUSALS:
            return one
        # Libraries written in Rust, such as safetensors, give it as text.
        number = re.search(r"\(os error (\d+)\)", str(one))
        if number and int(number[1]) in REFUSALS:
            return OSError(int(number[1]), os.strerror(int(number[1])))
    return None


def refusal(error: BaseException, path: Path | None = None) -> str | None:
    """One sentence about what a disk refused, or None for another error; path: the file, where the error names none."""
    own = refused(error)
    if own is None or own.errno is None:
        return None
    place = own.filename or path
    return f"{f'{place}: ' if place else ''}{REFUSALS[own.errno]}."


def no_memory(error: BaseException) -> str | None:
    """One sentence about a lack of memory, or None for another error."""
    if not out_of_memory(error):
        return None
    said = " ".join(str(error).split())
    return f"The job ran out of memory{f' ({said})' if said else ''}: give it more, or run fewer jobs at a time."


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes a file: what the disk refuses becomes an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if sentence := refusal(error, path):
            raise InputError(f"Cannot write {sentence}") from error
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name when the body ends without an error.

    By then the content is on the disk: a machine that loses its power leaves no file that is empty or cut off.
    Raises InputError when the disk refuses it.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
            aside_of(path).unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Where a damaged file is kept until the next one takes its place."""
    return path.with_name(f"{path.name}.damaged")


def set_aside(path: Path) -> str:
    """Rename a file that the workflow has made and that is damaged, so that the next run makes it anew.

    Returns the end of the sentence that says so.
    """
    aside = aside_of(path)
    try:
        path.replace(aside)
    except OSError:
        return f"delete {path}, and run again: it will be made anew"
    return f"it is now {aside}; run again, which makes it anew"


def read_made(path: Path) -> Any:
    """The content of a JSON file that the workflow has made. Raises InputError for a damaged one, and sets it aside."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        raise InputError(f"{path} is damaged: {set_aside(path)}.") from None


def check_weights(path: Path) -> str:
    """The hash of a cell's weights.

    Raises InputError when they are not those that the job wrote, and sets them aside.
    """
    found, record = sha256(path), path.with_name("cell.json")
    known = read_made(record).get("weights_sha256") if record.is_file() else None
    if known not in (None, found):
        raise InputError(f"{path} is damaged: it has changed since it was written; {set_aside(path)}.")
    return found


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
    if digest_of(read_made(code)) != code.name:
        raise InputError("The code was edited since this run began: run again.")
    return code.name


def write_atomic(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def record_failure(folder: Path, stage: str) -> Iterator[None]:
    """Around a cell's job: an error leaves failed-{stage}.json in the cell's folder and becomes an InputError.

    The record is no declared output, so the workflow counts the cell as failed and tries it again the next time.
    While the job runs it says that the job was killed, which a killed job cannot write.
    """
    record = Path(folder) / f"failed-{stage}.json"

    def write(status: str, reason: str, **more: str) -> None:
        text = json.dumps({"status": status, "reason": reason, "stage": stage, **more}, indent=2) + "\n"
        with contextlib.suppress(OSError):  # on a full disk: the reason is told on stderr as well
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(text, "utf-8")

    write("killed", KILLED + ".")
    try:
        yield
    except Exception as error:
        status, reason = status_of(error)
        write(status, reason, traceback=traceback.format_exc())
        raise InputError(f"{reason} (details: {record})") from error
    except BaseException:
        write("stopped", STOPPED + ".")
        raise
    with contextlib.suppress(OSError):
        record.unlink(missing_ok=True)


def status_of(error: Exception) -> tuple[str, str]:
    """(status word, one sentence) of an error."""
    text = " ".join(str(error).split())
    own = refused(error)
    status = "out of memory" if out_of_memory(error) else "disk full" if own and own.errno in FULL else "error"
    status = "diverged" if isinstance(error, Diverged) else status
    if isinstance(error, InputError):
        return status, text
    return status, refusal(error) or no_memory(error) or f"{type(error).__name__}: {text}"


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a lack of memory: Python's, a library's, or torch's on a device."""
    for one in causes(error):
        if isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError":
            return True
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:
            return True
        # On the processor torch raises a plain RuntimeError, and safetensors an error of its own.
        if any(words in str(one) for words in ("DefaultCPUAllocator", "std::bad_alloc", "(os error 12)")):
            return True
    return False


PROVENANCE = ("torch", "transformers", "numpy", "snakemake")  # distributions whose versions a row carries


def provenance(device: str, threads: int) -> dict[str, object]:
    """Where a result comes from: code, versions, machine."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "methods", "kernels", "workflow", "Snakefile") if commit else None
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
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
