"""Files that are complete or absent, and are identified by their content."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from layerwise.runtime.errors import Failure, InputError, system_refusal
from layerwise.runtime.project import located


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context for writing a file: a disk's refusal becomes a Failure that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if sentence := system_refusal(error, path):
            raise Failure(f"Cannot write {sentence}") from error
        raise


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, which is renamed to `path` when the body ends without an error.

    The content is on the disk before the rename, so that a power failure leaves no empty or truncated file.
    Raises Failure when the disk refuses it.
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
    """The path of a damaged file that is set aside, until the next one replaces it."""
    return path.with_name(f"{path.name}.damaged")


def set_aside(path: Path, again: str = "make") -> str:
    """Rename a damaged file of the workflow, so that the next run makes it again.

    again: what that run does to have it. Returns the end of the error's sentence.
    """
    aside = aside_of(path)
    try:
        path.replace(aside)
    except OSError:
        return f"delete {path}, and run again to {again} it"
    return f"it is now {aside}; run again to {again} it"


def read_made(path: Path) -> Any:
    """The content of a JSON file of the workflow. Raises InputError for a damaged file, and sets it aside."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        raise InputError(f"{path} is damaged: {set_aside(path)}.") from None


def check_weights(path: Path) -> str:
    """The hash of a cell's weights.

    Raises InputError when they have changed since the job wrote them, and sets them aside.
    """
    found, record = sha256(path), path.with_name("cell.json")
    known = read_made(record).get("weights_sha256") if record.is_file() else None
    if known not in (None, found):
        raise InputError(f"{path} is damaged: it has changed since it was written; {set_aside(path)}.")
    return found


def remove_parts(folder: Path) -> None:
    """Remove temporary files of whole_file left by killed processes; no other process may be working in the folder."""
    for path in folder.glob(".*.part"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `parent`, which is removed at the end; folders left by killed processes are removed first.

    Such a folder has this host in its name and is not locked; the system releases a lock when a process dies. If
    folders cannot be locked, only the process's own folder is removed.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        begins = f"{prefix}{socket.gethostname()}-"
        with _locked(parent, wait=True) as sole:  # no other process's folder exists before it is locked
            for left in sorted(parent.glob(f"{begins}*")) if sole else ():
                with _locked(left) as dead:
                    if dead:
                        shutil.rmtree(left, ignore_errors=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=begins)))
            stack.enter_context(_locked(folder))
        yield folder


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a folder; yields whether this succeeded. It waits for another process only if `wait` is set."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(held)


def digest_of(files: Iterable[str]) -> str:
    """Hash of the names (from `portable`) and contents of files of code on which results depend."""
    content = json.dumps([(os.path.basename(file), sha256(located(file))) for file in files])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Seen(NamedTuple):
    """A file's metadata in the file system; if any of these changes, the content may have changed."""

    path: str
    inode: int
    size: int
    modified: int
    changed: int


def seen(path: Path) -> Seen:
    found = path.stat()
    return Seen(os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def unchanged(code: Path) -> str:
    """The hash of the code that a file lists and is named after.

    Raises InputError when the code has changed, because the imported code would then not match the hash.
    """
    try:
        found = digest_of(read_made(code))
    except FileNotFoundError:
        found = None
    if found != code.name:
        raise InputError("The code was edited since this run began: run again.")
    return code.name


def write_atomic(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def unlock_after_death(folder: Path) -> IO[str] | None:
    """Remove Snakemake's locks in its folder (.snakemake) if the run that made them is dead, as after a SIGKILL.

    Every run keeps the returned file locked until its end; the system releases the lock when the process dies.
    `snakemake --unlock` is still needed after a death on another host, whose state some file systems do not show, and
    on file systems without locks, for which None is returned.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / "layerwise.alive").open("a+")
        held.seek(0)
        host, own = held.read().strip(), socket.gethostname()
        with contextlib.suppress(BlockingIOError):  # another run is alive and keeps its locks
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for lock in (folder / "locks").glob("*.lock") if host in ("", own) else ():
                lock.unlink(missing_ok=True)
            if not any((folder / "locks").glob("*.lock")):  # otherwise they may belong to a live run on another host
                held.truncate(0)
                held.write(own)
                held.flush()
        fcntl.flock(held, fcntl.LOCK_SH)
        return held
    return None


def gram_stores() -> Path:
    """The folder of all Gram stores, shared by studies in different folders."""
    return Path(os.environ.get("LAYERWISE_CACHE") or "results/grams")
