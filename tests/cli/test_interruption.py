"""Ctrl-C of Snakemake: jobs that a user stops are no faults, and the run says how far it is."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from snakemake.logging import ColorizingTextHandler

from layerwise.cli import interruption
from layerwise.cli.interruption import WAITING, Interruption
from tests.support.kill_study import heed
from tests.support.paths import ROOT
from tests.support.typing_helpers import some

# A job that ends at the first SIGINT, as one of this project does, or at the second.
JOB = """
import signal, sys, time

def stop(*_):
    if sys.argv[1] == "first":
        sys.exit(130)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

signal.signal(signal.SIGINT, stop)
open("started", "w").close()
time.sleep(600)
"""
SNAKEFILE = f"""
from layerwise.cli.interruption import Interruption

interruption = Interruption(logger)
interruption.watch()
interruption.progress = lambda: (3, 7)


rule job:
    output:
        "never",
    shell:
        "{sys.executable} job.py {{config[at]}}"


onerror:
    interruption.end_if_interrupted()
    print("Some cells failed.")
"""
SENTENCE = "The run was interrupted: 3 of 7 cells are done. The same command continues it.\n"


@pytest.fixture
def started(tmp_path: Path, request) -> Iterator[subprocess.Popen[str]]:
    """A run of Snakemake whose job has begun; request.param: the SIGINT that ends the job."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "job.py").write_text(JOB)
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--keep-going", "--config", f"at={request.param}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed,
        start_new_session=True,
    )
    try:
        while not (tmp_path / "started").exists():
            assert process.poll() is None, some_output(process)
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def some_output(process: subprocess.Popen[str]) -> str:
    return some(process.stdout).read()


def press(process: subprocess.Popen[str]) -> None:
    """Ctrl-C: a terminal sends SIGINT to the run and to its jobs."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize("started", ["first"], indirect=True)
def test_an_interrupted_run_reports_no_fault(started):
    press(started)
    output, _ = started.communicate(timeout=120)
    assert started.returncode == 130
    assert output.endswith(SENTENCE)
    assert not any(word in output for word in ("Error", "Traceback", "failed", "CalledProcess"))


@pytest.mark.parametrize("started", ["second"], indirect=True)
def test_a_second_interruption_ends_jobs_that_do_not_stop(started):
    press(started)
    lines = iter(some(started.stdout).readline, "")
    assert any(line == WAITING + "\n" for line in lines)  # the run waits for its job
    press(started)
    assert list(lines) == [SENTENCE]
    assert started.wait(timeout=120) == 130


def test_an_interruption_during_a_line_of_the_log_is_not_lost(monkeypatch):
    """Snakemake's handlers of log records catch what a signal raises."""
    sent = []
    monkeypatch.setattr(interruption, "AGAIN", 0.0)
    monkeypatch.setattr(interruption.os, "kill", lambda *signal: sent.append(signal))
    own = Interruption(logging.getLogger("a run"))
    handler = ColorizingTextHandler(stream=io.StringIO())
    monkeypatch.setattr(handler, "format", lambda record: own._interrupt(signal.SIGINT, sys._getframe()))
    handler.emit(logging.makeLogRecord({"msg": "a line"}))
    while not sent:
        time.sleep(0.01)
    assert sent == [(os.getpid(), signal.SIGINT)] and not own.happened
