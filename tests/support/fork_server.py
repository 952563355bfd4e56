"""Pytest in forks of a process that has imported what takes seconds: for many short runs, one after the other."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

# Other people's packages alone: of the project each run imports what is in its folder by then.
PACKAGES = (
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "tokenizers", "safetensors.torch", "numba"),
    *("scipy.optimize", "pandas", "pyarrow.parquet", "jsonschema", "yaml", "snakemake.api", "matplotlib.figure"),
    *("matplotlib.backends.backend_agg", "pytest", "hypothesis", "xdist"),
)
ENDING = (signal.SIGTERM, signal.SIGHUP)
ENDED_LATE = 124  # as `timeout` says it


class ForkServer:
    """Runs of pytest in a folder whose files may change between them; no two at a time. A context."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str] | None = None, packages: Sequence[str] = PACKAGES
    ) -> None:
        self.folder = folder
        self.command = [sys.executable, "-P", __file__, *packages]
        # What is compiled goes by a file's seconds and size, which a fault may leave as they were.
        self.environment = {**os.environ, **(environment or {}), "PYTHONDONTWRITEBYTECODE": "1"}

    def __enter__(self) -> ForkServer:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command, cwd=self.folder, env=self.environment, stdin=pipe, stdout=pipe, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # it ends where its orders end

    def pytest(self, arguments: Sequence[str], longest: float) -> tuple[int, str]:
        """Exit status and output of `python -m pytest ...`; ENDED_LATE where it took more than `longest` seconds.

        Raises RuntimeError where the process has ended.
        """
        assert self.process.stdin and self.process.stdout
        with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
            try:
                print(json.dumps([list(arguments), longest, output.name]), file=self.process.stdin, flush=True)
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                raise RuntimeError(f"The process that runs the tests of {self.folder} ended: {self.process.wait()}.")
            return int(answer), output.read()


def serve(*packages: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else may stand among the answers
    for number in ENDING:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    for name in packages:
        importlib.import_module(name)
    sys.path.insert(0, os.getcwd())  # as `python -m` has it
    for line in sys.stdin:
        arguments, longest, output = json.loads(line)
        child = os.fork()
        if not child:
            answers.close()
            run(arguments, output)
        try:
            status = waited(child, time.monotonic() + longest)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and whatever its tests have left running
        print(status, file=answers, flush=True)


def run(arguments: Sequence[str], output: str) -> NoReturn:
    os.setsid()
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number, target in enumerate((os.open(os.devnull, os.O_RDONLY), file, file)):
        os.dup2(target, number)
    status = 1
    try:
        status = int(sys.modules["pytest"].main(arguments))
        sys.stdout.flush()
    finally:
        os._exit(status)


def waited(child: int, until: float) -> int:
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return ENDED_LATE


if __name__ == "__main__":
    serve(*sys.argv[1:])
