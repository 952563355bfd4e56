"""Pytest in forks of a process that has imported what takes seconds: for many short runs, one after the other."""

from __future__ import annotations

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

# Other people's packages alone: of the project each run imports what stands in its folder by then.
PACKAGES = (
    *("torch", "transformers", "transformers.models.llama.modeling_llama", "tokenizers", "safetensors.torch", "numba"),
    *("scipy.optimize", "pandas", "pyarrow.parquet", "jsonschema", "yaml", "snakemake.api", "matplotlib.figure"),
    *("matplotlib.backends.backend_agg", "pytest", "hypothesis", "xdist"),
)
ENDED_LATE = 124  # as `timeout` says it


class Warm:
    """Runs of pytest in a folder whose files may change between them; no two at a time."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str] | None = None, packages: Sequence[str] = PACKAGES
    ) -> None:
        self.folder = folder
        self.output = Path(tempfile.mkstemp(prefix="layerwise-pytest-")[1])
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.output), *packages],
            cwd=folder,
            # What is compiled goes by a file's seconds and size, which a fault may leave as they were.
            env={**os.environ, **(environment or {}), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pytest(self, arguments: Sequence[str], longest: float) -> tuple[int, str]:
        """Exit status and output of `python -m pytest ...`; ENDED_LATE where it took more than `longest` seconds."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([list(arguments), longest]), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        return status, self.output.read_text("utf-8", "replace")

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # it ends where its orders end
        self.output.unlink()


def serve(output: str, *packages: str) -> None:
    for name in packages:
        importlib.import_module(name)
    sys.path[0] = os.getcwd()  # as `python -m` has it, in place of this file's folder
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        arguments, longest = json.loads(line)
        child = os.fork()
        if not child:
            os.setsid()
            file = os.open(output, os.O_WRONLY | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(file, 1)
            os.dup2(file, 2)
            status = int(sys.modules["pytest"].main(arguments))
            sys.stdout.flush()
            os._exit(status)
        print(waited(child, time.monotonic() + longest), file=answers, flush=True)


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
