"""The finished blocks of a job, kept one by one, so that a job that was killed goes on from there."""

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
STATES = "inputs-"  # how the files of hidden states begin (calibration/hidden_states.py)


class Checkpoint:
    """A folder with what a job has finished, which one process at a time holds.

        with Checkpoint(folder, fingerprint) as checkpoint:
            for index in range(checkpoint.done, blocks):
                ...                                             # write checkpoint.file(index, ...), whole or not at all
                checkpoint.finish(index)
            ...                                                 # make the job's outputs from these files
            checkpoint.remove()

    fingerprint: what decides the results; what is there of another one is thrown away, and said so. check: raises
    InputError where it is no longer what the job computes with; it is asked at the beginning, before a block counts as
    finished and after an error, which may come of that. what: how messages call what is finished one by one. done: how
    many are finished. seconds: that they took in earlier
    processes.
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
        self.hashes: dict[str, str] = {}  # of the finished blocks' files, by their paths in the folder
        self._start = time.perf_counter()

    def __enter__(self) -> Checkpoint:
        while not self._locked():  # who had the lock has removed the folder meanwhile
            self._lock.close()
        self._resume()
        try:
            self._check()
        except InputError:
            self.__exit__()
            raise
        if self.done:
            print(f"Going on after {self.done} finished {self._what}.", file=sys.stderr)
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
            print(f"{self.folder} is on a file system without locks ({error}): going on without.", file=sys.stderr)
        try:
            return path.stat().st_ino == os.fstat(self._lock.fileno()).st_ino
        except FileNotFoundError:
            return False

    def __exit__(self, kind: type | None = None, error: BaseException | None = None, trace: object = None) -> None:
        try:
            if isinstance(error, Exception):
                self._check()  # of which the error may come
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
                f"{done} finished {self._what} in {self.folder} are of another {', '.join(other)}: starting over.",
                file=sys.stderr,
            )
            return self._clear()
        if damaged := [name for name, value in hashes.items() if self._differs(self.folder / name, value)]:
            print(f"{self.folder / damaged[0]} is damaged: starting over.", file=sys.stderr)
            return self._clear()
        self.done, self.seconds, self._peaks, self.hashes = done, seconds, peaks, hashes

    @staticmethod
    def _differs(path: Path, known: str) -> bool:
        """Whether a file is not as it was when its block was finished; a block's that is not there was moved."""
        return sha256(path) != known if path.is_file() else path.name.startswith(STATES)

    def restart(self) -> None:
        """The checkpoint cannot be used."""
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
        """Where what is finished of a block belongs."""
        return self.folder / f"block-{index:03d}.{kind}"

    def finish(self, index: int) -> None:
        """The block's files are written, wherever in the folder, and the states that enter the next one."""
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
        """Of this process since it began and of those before it up to their last finished block."""
        return self.seconds + time.perf_counter() - self._start

    def most(self, name: str, value: float | None) -> float | None:
        """The largest value of that name, a peak, that any process of this work has had; kept by `finish`."""
        if value is not None:
            self._peaks[name] = max(value, self._peaks.get(name, value))
        return self._peaks.get(name)

    def _forget(self) -> None:
        """Nothing counts as finished from here on, also for who comes after a death amid the removal."""
        with contextlib.suppress(OSError):
            (self.folder / STATE).unlink()

    def remove(self) -> None:
        """Nothing of it is needed any more."""
        self._forget()
        shutil.rmtree(self.folder, ignore_errors=True)
