"""Jobs that run in forks of a server: each must begin and end as in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from layerwise.cli import warm_worker
from layerwise.cli.warm_worker import FOLDER, LAUNCHER, Launcher
from layerwise.runtime.errors import STOPPED
from tests.support.kill_study import heed
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


def began(
    *arguments: str, environment: dict[str, str] | None = None, before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    pipe, command = subprocess.PIPE, [*before, *WORKER, *arguments]
    return subprocess.Popen(
        command, env=environment or ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed
    )


def waiting(*before: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A job that waits, and the fork that runs it; before: the words of a command that starts the job."""
    job = began(*WAITING, before=before)
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


def test_a_second_interruption_kills_a_job_and_its_fork(launcher):
    """The fork may be in a compiled loop, which notices the first one only at its end."""
    job, fork = waiting()
    job.send_signal(signal.SIGINT)
    until(lambda: not catches(job.pid, signal.SIGINT))
    assert job.poll() is None and not gone(fork)
    job.send_signal(signal.SIGINT)
    assert job.wait(LONGEST) == -signal.SIGINT
    until(lambda: gone(fork))


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_job_killed_with_its_fork_leaves_the_server_to_others(launcher):
    job, fork = waiting()
    server = some(fork.parent())
    server.suspend()  # so that it sees both ends at once, that of the fork first
    fork.kill()
    until(lambda: gone(fork))
    job.kill()
    job.wait(LONGEST)
    server.resume()
    job, fork = waiting()
    assert fork.parent() == server
    job.kill()
    until(lambda: gone(fork))


def test_a_fork_ignores_the_signals_that_its_job_ignores(launcher):
    """Else a run under nohup would lose its jobs with the terminal."""
    job, fork = waiting("sh", "-c", "trap '' HUP; exec \"$@\"", "sh")
    fork.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert not gone(fork)
    job.kill()
    until(lambda: gone(fork))


def test_a_killed_server_ends_its_jobs(launcher):
    job, fork = waiting()
    some(fork.parent()).kill()
    _, error = job.communicate(timeout=LONGEST)
    assert (job.returncode, error) == (1, warm_worker.ENDED + "\n")
    until(lambda: gone(fork))


@pytest.fixture
def own_launcher(tmp_path, monkeypatch) -> Iterator[Launcher]:
    monkeypatch.chdir(tmp_path)
    own = Launcher()
    own.start()
    yield own
    own.close()


def test_a_job_that_ends_as_its_server_starts_holds_up_no_other(own_launcher):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as job:
        job.connect(str(FOLDER / LAUNCHER))
        job.send(json.dumps({**ENVIRONMENT, "NUMBER": "1"}).encode())
    until(lambda: own_launcher.servers)
    assert began("figure", "--help").wait(LONGEST) == 0
    assert len(own_launcher.servers) == 2


def test_a_package_that_cannot_be_imported_is_the_fault_of_its_job_alone(own_launcher, tmp_path):
    package = tmp_path / "packages/matplotlib"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('broken')")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{package.parent}:{ROOT}"}
    assert began("figure", "--help", environment=environment).wait(LONGEST) == 0
    (server,) = own_launcher.servers.values()
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(2)


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
