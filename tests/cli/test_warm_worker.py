"""Jobs that run in forks of a server: each must begin and end as in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from layerwise.cli import warm_worker
from layerwise.cli.warm_worker import FOLDER, LAUNCHER, Launcher
from layerwise.runtime.errors import STOPPED
from tests.support.paths import ROOT
from tests.support.typing_helpers import some

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the system has no descriptors of processes")

LONGEST = 60  # seconds
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
WORKER = [sys.executable, "-m", "layerwise", "worker"]
MODEL = json.dumps(
    {"name": "demo", "path": str(ROOT / "resources/demo"), "dtype": "float32", "trust_remote_code": False}
)
# A job that waits until something is written to what it reads.
WAITING = ("check-model", "--model", MODEL, "--fingerprint", "fingerprint", "--tokens", "absent", "--out", "check.json")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> Iterator[Launcher]:
    """A launcher in a folder that has a path of any length, as a run of Snakemake starts it."""
    folder = tmp_path_factory.mktemp("a study " + "x" * 120)
    here = Path.cwd()
    os.chdir(folder)  # sockets are found by their path from the run's folder
    try:
        launcher = Launcher()
        launcher.start()
        os.mkfifo("fingerprint")
        yield launcher
        launcher.close()
    finally:
        os.chdir(here)


def began(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*WORKER, *arguments], env=environment or ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def waiting() -> tuple[subprocess.Popen[str], psutil.Process]:
    """A job that waits, and the fork that runs it."""
    job = began(*WAITING)
    (fork,) = until(lambda: [child for server in servers() for child in server.children()])
    until(lambda: all(sleeps(fork) for _ in range(5)))
    return job, fork


def sleeps(process: psutil.Process) -> bool:
    time.sleep(0.02)
    return process.status() == psutil.STATUS_SLEEPING


def servers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "layerwise.cli.warm_worker" in child.cmdline()]


def until(found):
    end = time.monotonic() + LONGEST
    while not (value := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_job_ends_as_in_a_process_of_its_own(launcher, tmp_path):
    for arguments in (["figure", "--help"], ["figure"], ["figure", "method_ranks", "--out", "x.gif"]):
        warm, cold = began(*arguments), began(*arguments, environment={**ENVIRONMENT, "NUMBER": str(len(arguments))})
        assert warm.communicate(timeout=LONGEST) == cold.communicate(timeout=LONGEST)
        assert warm.returncode == cold.returncode


def test_one_server_serves_all_jobs_of_an_environment(launcher):
    assert began("figure", "--help").wait(LONGEST) == 0
    before = {server.pid for server in servers()}
    assert began("figure", "--help").wait(LONGEST) == 0
    assert {server.pid for server in servers()} == before and before


def test_no_more_servers_than_memory_is_for(launcher):
    for number in range(warm_worker.SERVERS + 2):
        job = began("figure", "--help", environment={**ENVIRONMENT, "OMP_NUM_THREADS": str(number + 1)})
        assert job.wait(LONGEST) == 0
    assert len(launcher.servers) == warm_worker.SERVERS


def test_a_server_imports_nothing_of_the_project(launcher):
    """Else an edit would not reach the jobs that it makes Snakemake run again."""
    packages = [name for names in warm_worker.PACKAGES.values() for name in names]
    modules = sorted({"layerwise.cli.warm_worker", *packages})
    code = f"import sys, importlib\nfor name in {modules}:\n    importlib.import_module(name)\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    own = {name for name in loaded.stdout.split() if name.split(".")[0] == "layerwise"}
    assert own == {"layerwise", "layerwise.cli", "layerwise.cli.warm_worker"}


def test_a_killed_job_leaves_no_fork(launcher):
    job, fork = waiting()
    job.kill()
    until(lambda: gone(fork))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_fork_ends_its_job_by_the_same_signal(launcher, number):
    job, fork = waiting()
    fork.send_signal(number)
    assert job.wait(LONGEST) == -number


def test_a_stopped_job_says_so(launcher):
    job, _ = waiting()
    job.terminate()
    _, error = job.communicate(timeout=LONGEST)
    assert job.returncode == 128 + signal.SIGTERM
    assert error == f"error: {STOPPED}.\n"


def test_a_killed_server_ends_its_jobs(launcher):
    job, fork = waiting()
    some(fork.parent()).kill()
    _, error = job.communicate(timeout=LONGEST)
    assert (job.returncode, error) == (1, warm_worker.ENDED + "\n")
    until(lambda: gone(fork))


def test_servers_end_with_the_run_and_finish_their_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fingerprint")
    own = Launcher()
    own.start()
    assert (FOLDER / LAUNCHER).exists()
    job = began(*WAITING)
    until(lambda: own.servers and psutil.Process(next(iter(own.servers.values())).pid).children())
    own.close()
    (server,) = own.servers.values()
    time.sleep(0.2)
    assert server.poll() is None and job.poll() is None
    Path("fingerprint").write_text("{")  # the job reads it and fails
    assert job.wait(LONGEST) != 0
    assert server.wait(LONGEST) == 0
    assert not FOLDER.exists()
