"""Save the finished blocks of a job one by one, so that a killed job resumes there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.files import sha256, write_atomic, writing

STATE = "state.json"
STATES = "inputs-"  # prefix of the files of hidden states (calibration/hidden_states.py)


class Checkpoint:
    """A folder with a job's finished parts, locked by one process at a time.

        with Checkpoint(folder, fingerprint) as checkpoint:
            for index in range(checkpoint.done, blocks):
                ...                                             # write checkpoint.file(index, ...) atomically
                checkpoint.finish(index)
            ...                                                 # make the job's outputs from these files
            checkpoint.remove()

    fingerprint: everything on which the results depend. Parts with another fingerprint are deleted, with a message.
    check: raises InputError if the fingerprint no longer holds. It is called at the beginning, before a block counts as
    finished, and after an error, which this may explain. what: the name of the parts in messages. done: number of
    finished parts. seconds: time that earlier processes spent on them.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        check: Callable[[], None] = lambda: None,
        what: str = "blocks",
    ) -> None:
        self.folder, self.fingerprint = Path(folder), json.loads(json.dumps(fingerprint))
        self._check, self._what = check, what
        self.done, self.seconds = 0, 0.0
        self._peaks: dict[str, float] = {}
        self.hashes: dict[str, str] = {}  # hashes of the finished blocks' files, by path in the folder
        self._start = time.perf_counter()

    def __enter__(self) -> Checkpoint:
        while not self._locked():  # the previous owner of the lock has removed the folder
            self._lock.close()
        self._resume()
        try:
            self._check()
        except InputError:
            self.__exit__()
            raise
        if self.done:
            print(f"Resuming after {self.done} finished {self._what}.", file=sys.stderr)
        return self

    def _locked(self) -> bool:
        path = self.folder / "lock"
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = path.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process dies
        except BlockingIOError:
            print(f"Another process works in {self.folder}: waiting for it.", file=sys.stderr)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            print(
                f"{self.folder} is on a file system without locks ({error}): continuing without a lock.",
                file=sys.stderr,
            )
        try:
            return path.stat().st_ino == os.fstat(self._lock.fileno()).st_ino
        except FileNotFoundError:
            return False

    def __exit__(self, kind: type | None = None, error: BaseException | None = None, trace: object = None) -> None:
        try:
            if isinstance(error, Exception):
                self._check()  # a change may explain the error
        finally:
            if not self.done:
                self.remove()
            self._lock.close()

    def _resume(self) -> None:
        try:
            state = json.loads((self.folder / STATE).read_text("utf-8"))
            known, done, seconds = dict(state["fingerprint"]), int(state["done"]), float(state["seconds"])
            peaks, hashes = dict(state["peaks"]), dict(state["hashes"])
        except FileNotFoundError:
            return self._clear()
        except (ValueError, KeyError, TypeError) as error:
            print(f"{self.folder / STATE} cannot be read ({error}): starting over.", file=sys.stderr)
            return self._clear()
        other = [key for key in {**known, **self.fingerprint} if known.get(key) != self.fingerprint.get(key)]
        if other:
            print(
                f"{done} finished {self._what} in {self.folder} belong to another {', '.join(other)}: starting over.",
                file=sys.stderr,
            )
            return self._clear()
        if damaged := [name for name, value in hashes.items() if self._differs(self.folder / name, value)]:
            print(f"{self.folder / damaged[0]} is damaged: starting over.", file=sys.stderr)
            return self._clear()
        self.done, self.seconds, self._peaks, self.hashes = done, seconds, peaks, hashes

    @staticmethod
    def _differs(path: Path, known: str) -> bool:
        """Whether a file has changed since its block was finished; a block's absent file counts as moved, not
        changed."""
        return sha256(path) != known if path.is_file() else path.name.startswith(STATES)

    def restart(self) -> None:
        """Discard the checkpoint and start over."""
        self._clear()
        self.done, self.seconds, self.hashes = 0, 0.0, {}

    def _clear(self) -> None:
        self._forget()
        for path in self.folder.iterdir():
            if path.name == "lock":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def file(self, index: int, kind: str) -> Path:
        """The path for a finished file of a block."""
        return self.folder / f"block-{index:03d}.{kind}"

    def finish(self, index: int) -> None:
        """Mark a block as finished, after its files and the next block's input states are written to the folder."""
        self._check()
        self.done = index + 1
        states = self.folder.glob(f"{STATES}*{self.done:03d}.*")  # of each kind
        self.hashes = {name: own for name, own in self.hashes.items() if not name.startswith(STATES)}
        for path in sorted([*self.folder.rglob(f"block-{index:03d}.*"), *states]):
            self.hashes[path.relative_to(self.folder).as_posix()] = sha256(path)
        state = {"fingerprint": self.fingerprint, "done": self.done, "seconds": self.total_seconds()}
        state |= {"peaks": self._peaks, "hashes": self.hashes}
        write_atomic(self.folder / STATE, json.dumps(state) + "\n")

    def total_seconds(self) -> float:
        """Seconds of this process so far, plus those of earlier processes up to their last finished block."""
        return self.seconds + time.perf_counter() - self._start

    def most(self, name: str, value: float | None) -> float | None:
        """The largest value of this name, a peak, over all processes of this job; saved by `finish`."""
        if value is not None:
            self._peaks[name] = max(value, self._peaks.get(name, value))
        return self._peaks.get(name)

    def _forget(self) -> None:
        """Mark nothing as finished, so that this holds even if the process dies during the removal."""
        with contextlib.suppress(OSError):
            (self.folder / STATE).unlink()

    def remove(self) -> None:
        """Remove the checkpoint, which is no longer needed."""
        self._forget()
        shutil.rmtree(self.folder, ignore_errors=True)
