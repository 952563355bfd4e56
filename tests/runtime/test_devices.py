"""Devices under locks: without a GPU, for only the files and the names of devices count."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from layerwise.runtime import devices
from layerwise.runtime.devices import VISIBLE, available, free, take
from layerwise.runtime.errors import InputError
from tests.support.paths import ROOT
from tests.support.typing_helpers import some

TWO = {"0": "GPU-a", "1": "GPU-b"}
JOB = "from layerwise.runtime.devices import take; print(take('cuda', {devices}), flush=True); input()"
SMI = "GPU 0: NVIDIA H100 (UUID: GPU-aa-0)\nGPU 1: NVIDIA H100 (UUID: GPU-bb-1)\n"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A folder of locks, and no devices."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in (VISIBLE, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "HELD", [])
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "none")
    monkeypatch.setattr(devices, "unique_names", lambda: [])


def job(names: dict[str, str]) -> subprocess.Popen[str]:
    """A process that holds a device until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", JOB.format(devices=names)], cwd=ROOT, stdin=-1, stdout=-1, stderr=-1, text=True
    )


def test_a_device_has_one_job_until_it_is_killed(monkeypatch):
    first, second = job(TWO), job(TWO)
    try:
        assert {some(first.stdout).readline(), some(second.stdout).readline()} == {"0\n", "1\n"}
        assert free(TWO) is None
        first.send_signal(signal.SIGKILL)
        first.wait()
        waits = []
        assert take("cuda", TWO, waits.append) in TWO and not waits
        assert os.environ[VISIBLE] in TWO
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_job_waits_and_says_so(monkeypatch, capsys):
    monkeypatch.setenv(VISIBLE, "0")
    with job({"0": "0"}) as other:
        assert some(other.stdout).readline() == "0\n"
        waits = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if sum(waits) == 90:  # a minute and a half
                other.kill()
                other.wait()

        assert take("cuda", None, sleep) == "0"
        other.communicate()
    assert capsys.readouterr().err.splitlines() == ["Every GPU (0) has another job: waiting for one."] * 2
    assert sum(waits) == 90


def test_a_program_that_a_job_starts_does_not_hold_its_device():
    start = "import subprocess; print(subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL).pid)"
    code = f"from layerwise.runtime.devices import take; take('cuda', {TWO}); {start}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    try:
        assert free(TWO) == "0"
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


@pytest.mark.parametrize(
    ("visible", "smi", "found"),
    [
        ("0, 2", [], {"0": "0", "2": "2"}),
        ("1", ["GPU-a", "GPU-b"], {"1": "GPU-b"}),  # the same lock as that of a job that names it
        ("GPU-b", ["GPU-a", "GPU-b"], {"GPU-b": "GPU-b"}),
        ("1,-1,0", [], {"1": "1"}),
        (None, ["GPU-a"], {"GPU-a": "GPU-a"}),
    ],
)
def test_the_devices_are_those_that_are_visible(monkeypatch, visible, smi, found):
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    monkeypatch.setattr(devices, "unique_names", lambda: smi)
    assert available() == found


def test_devices_are_listed_without_torch(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && printf '{SMI}'\n".replace("\n'", "\\n'"), "utf-8")
    program.chmod(0o755)
    code = (
        "import sys; from layerwise.runtime.devices import unique_names; print(unique_names(), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert done.stdout == "['GPU-aa-0', 'GPU-bb-1'] False\n", done.stderr


def test_the_driver_s_folder_counts_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "gpus")
    for name in ("0000:17:00.0", "0000:65:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert available() == {"0": "0", "1": "1"}


@pytest.mark.parametrize(
    ("visible", "sentence"), [(None, "this machine has none"), ("", "hides all GPUs"), ("-1", "hides all GPUs")]
)
def test_no_device_is_said(monkeypatch, visible, sentence):
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    with pytest.raises(InputError, match=sentence):
        take("cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_another_device_takes_no_lock(device):
    assert take(device) is None and not devices.HELD and VISIBLE not in os.environ


def test_jobs_of_slurm_have_their_own_numbers(monkeypatch):
    """On nodes where each job sees its devices alone, every job has a device 0."""
    monkeypatch.setenv(VISIBLE, "0")
    with job({"0": "0"}) as other:
        assert some(other.stdout).readline() == "0\n"
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert take("cuda") == "0"
        other.kill()
        other.communicate()
