"""Errors that a user can fix, each in one sentence: bad input, refusals of the system, failed jobs."""

import contextlib
import errno
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path


class InputError(Exception):
    """An error that the user can fix. Its message has one form: "X must be Y. Got Z instead."""

    status = 2  # exit status of the command or the worker that it ends


class Failure(InputError):
    """A job that failed on good input, or a check that does not hold."""

    status = 1


class Diverged(Failure):
    """A method's numbers are not finite, or far too large."""


class Stopped(BaseException):
    """The system, a scheduler or a person told this process to end (SIGTERM)."""


STOPPED = "the job was stopped before it was done; the next run goes on after its last finished block"
KILLED = (
    "the job was killed before it could say why: where no person and no scheduler did that, the machine had no memory "
    "left (`dmesg` says so), and fewer jobs at a time, --cores, take less"
)
# The system's reasons for refusing to read or write a file, in words that follow the file's name and a colon.
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


def report_errors(main: Callable[[list[str]], object], argv: list[str]) -> None:
    """Run a script's main, and turn an error that the user can fix into one sentence on stderr and an exit status.

    The status of an InputError is that of its kind; what a disk refuses and a lack of memory end with 1. SIGTERM and
    Ctrl-C end the process with a sentence too, remove what it has not finished, and set the exit status that a shell
    gives them.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        main(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except (Stopped, KeyboardInterrupt) as error:
        print(f"error: {STOPPED}.", file=sys.stderr)
        sys.exit(128 + (signal.SIGTERM if isinstance(error, Stopped) else signal.SIGINT))
    except Exception as error:
        if sentence := system_refusal(error) or no_memory(error):
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


def system_refusal(error: BaseException, path: Path | None = None) -> str | None:
    """One sentence about what a disk refused, or None for another error; path: the file, if the error names none."""
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
def record_failure(folder: Path, stage: str) -> Iterator[None]:
    """Around a cell's job: an error leaves failed-{stage}.json in the cell's folder and becomes an InputError, of
    its own kind or a Failure.

    The record is no declared output, so the workflow counts the cell as failed and tries it again the next time.
    While the job runs it says that the job was killed, which a killed job cannot write.
    """
    record = Path(folder) / f"failed-{stage}.json"

    def write(status: str, reason: str, **more: str) -> None:
        text = json.dumps({"status": status, "reason": reason, "stage": stage, **more}, indent=2) + "\n"
        with contextlib.suppress(OSError):  # on a full disk; the reason is on stderr as well
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(text, "utf-8")

    write("killed", KILLED + ".")
    try:
        yield
    except Exception as error:
        status, reason = status_of(error)
        write(status, reason, traceback=traceback.format_exc())
        kind = type(error) if isinstance(error, InputError) else Failure
        raise kind(f"{reason} (details: {record})") from error
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
    return status, system_refusal(error) or no_memory(error) or f"{type(error).__name__}: {text}"


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
