"""The exit status of a command or a worker says what kind of error ended it."""

import os
import signal
import subprocess
import sys

import pytest

from layerwise.runtime.errors import STOPPED, Diverged, Failure, InputError, record_failure, report_errors
from tests.support.paths import ROOT

# A job that does what its end needs for a long time.
SLOW_END = """
import atexit, signal, time
from layerwise.runtime.errors import report_errors

def job(argv):
    print("started", flush=True)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(lambda: (print("ending", flush=True), time.sleep(60)))
report_errors(job, [])
"""


@pytest.mark.parametrize(("kind", "status"), [(InputError, 2), (Failure, 1), (Diverged, 1)])
def test_bad_input_is_status_two_and_what_fails_on_good_input_one(kind, status, tmp_path, capsys):
    def ended_by_it(argv: list[str]) -> None:
        raise kind("It is told.")

    def in_a_cell(argv: list[str]) -> None:
        with record_failure(tmp_path, "compress"):
            ended_by_it(argv)

    for job, end in ((ended_by_it, ""), (in_a_cell, f" (details: {tmp_path / 'failed-compress.json'})")):
        with pytest.raises(SystemExit) as ended:
            report_errors(job, [])
        assert ended.value.code == status and capsys.readouterr().err == f"error: It is told.{end}\n"


def test_a_disk_error_or_a_bug_makes_a_cell_fail(tmp_path):
    for error in (OSError(28, "No space left on device"), ZeroDivisionError("division by zero")):
        with pytest.raises(Failure), record_failure(tmp_path, "compress"):
            raise error


def test_a_second_interruption_ends_a_job_without_a_traceback():
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen([sys.executable, "-c", SLOW_END], env=environment, stdout=pipe, stderr=pipe, text=True)
    assert job.stdout and job.stderr
    for line in ("started\n", "ending\n"):
        assert job.stdout.readline() == line
        job.send_signal(signal.SIGINT)
    assert job.wait(timeout=60) == -signal.SIGINT
    assert job.stderr.read() == f"error: {STOPPED}.\n"
