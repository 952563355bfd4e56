"""Errors that a user can fix, each as one sentence: bad input, refusals of the system, failed jobs."""

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
    """An error that the user can fix. The form of its message is "X must be Y. Got Z instead", where it fits."""

    status = 2  # exit status of the command or worker that it ends


class Failure(InputError):
    """A job that failed on good input, or a check that does not hold."""

    status = 1


class Diverged(Failure):
    """A method's numbers are not finite or far too large."""


class Stopped(BaseException):
    """The system, a scheduler or a person stopped this process (SIGTERM)."""


STOPPED = "the job was stopped before it finished; the next run resumes after its last finished block"
KILLED = (
    "the job was killed before it could report a reason: if neither a person nor a scheduler killed it, the machine "
    "ran out of memory (see `dmesg`); fewer jobs at a time (--cores) take less"
)
# Reasons why the system refuses to read or write a file, as text after the file's name and a colon.
REFUSALS = {
    errno.ENOSPC: "no space is left on the disk: free some, then run again",
    errno.EDQUOT: "the quota on this disk is used up: free some, then run again",
    errno.EFBIG: "the file exceeds the size limit (ulimit -f): raise the limit, then run again",
    errno.EROFS: "the disk is mounted read-only: make it writable, or work in another folder",
    errno.EACCES: "permission is denied: change the permissions, or work in another folder",
    errno.EPERM: "the operation is not permitted: change the permissions, or work in another folder",
    errno.EIO: "the disk reports an input/output error: run again, and check the disk if the error persists",
    errno.EMFILE: "too many files are open (ulimit -n): raise the limit, then run again",
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def report_errors(main: Callable[[list[str]], object], argv: list[str]) -> None:
    """Run a script's main, and report an error that the user can fix as one sentence on stderr and an exit status.

    An InputError ends with its class's status. Refusals of a disk and a lack of memory end with status 1. SIGTERM and
    Ctrl-C also end the process with a sentence, remove unfinished files, and give the usual exit status of a shell.
    A second Ctrl-C kills the process at once.
    """
    before = signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
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
        raise  # a bug: the traceback shows its place
    finally:
        signal.signal(signal.SIGTERM, before)
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ignore further signals
    raise Stopped


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one would give a traceback of the end of this process
    raise KeyboardInterrupt


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause's cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def refused(error: BaseException) -> OSError | None:
    """The system error in REFUSALS that caused an error, or None."""
    for one in causes(error):
        if isinstance(one, OSError) and one.errno in REFUSALS:
            return one
        # Libraries written in Rust, such as safetensors, report it as text.
        number = re.search(r"\(os error (\d+)\)", str(one))
        if number and int(number[1]) in REFUSALS:
            return OSError(int(number[1]), os.strerror(int(number[1])))
    return None


def system_refusal(error: BaseException, path: Path | None = None) -> str | None:
    """One sentence about a disk's refusal, or None for another error. path: the file, if the error names none."""
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
    """Context of a cell's job: an error writes failed-{stage}.json to the cell's folder and becomes an InputError of
    its own class or a Failure.

    The record is not a declared output, so the workflow counts the cell as failed and tries it again next time. While
    the job runs, the record says that it was killed, because a killed job could not write this.
    """
    record = Path(folder) / f"failed-{stage}.json"

    def write(status: str, reason: str, **more: str) -> None:
        text = json.dumps({"status": status, "reason": reason, "stage": stage, **more}, indent=2) + "\n"
        with contextlib.suppress(OSError):  # the disk may be full; the reason is also on stderr
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
    """Whether an error, or its cause, is a lack of memory: Python's, a library's, or torch's on a device."""
    for one in causes(error):
        if isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError":
            return True
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:
            return True
        # On a CPU torch raises a plain RuntimeError, and safetensors an error of its own.
        if any(words in str(one) for words in ("DefaultCPUAllocator", "std::bad_alloc", "(os error 12)")):
            return True
    return False
