"""One job per GPU of a machine: `--device cuda` takes a free GPU under a lock that the kernel releases at process end.

All studies of a user on a machine keep their locks in one folder, so that they can share devices. If a user or SLURM
has set CUDA_VISIBLE_DEVICES, only those devices are used.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from layerwise.runtime.errors import InputError

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER = Path("/proc/driver/nvidia/gpus")
LOOK, TELL = 1, 60  # seconds between two checks of the locks, and between two messages about waiting
HELD: list[IO[str]] = []  # an open file is a held lock


def locks() -> Path:
    """The folder of the locks: this user's, or the SLURM job's, because a job shares its devices with no other."""
    job = os.environ.get("SLURM_JOB_ID")
    return Path(tempfile.gettempdir()) / f"layerwise-{os.getuid()}" / (f"slurm-{job}" if job else "machine")


def available() -> dict[str, str]:
    """The devices that a job may take, as spelled in CUDA_VISIBLE_DEVICES -> the lock's name; torch is not imported.

    Raises InputError if there is none.
    """
    given, listed = os.environ.get(VISIBLE), unique_names()
    if given is None:
        numbers = range(len(list(DRIVER.glob("*"))))
        names = listed or [str(number) for number in numbers]
        if not names:
            raise InputError(
                "A GPU was requested, but this machine has none: nvidia-smi and NVIDIA's driver list no device."
            )
        return {name: name for name in names}
    names = [name.strip() for name in given.split(",") if name.strip()]
    if "-1" in names:  # CUDA ignores what follows
        names = names[: names.index("-1")]
    if not names:
        raise InputError(f"A GPU was requested, but {VISIBLE} is {given!r}, which hides all GPUs.")
    # A number and a UUID may name the same device.
    numbered = {str(number): name for number, name in enumerate(listed)}
    return {name: numbered.get(name, name) for name in names}


def unique_names() -> list[str]:
    """UUIDs of the machine's devices, in the order of nvidia-smi; empty if it is absent or fails."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU .*\(UUID: (GPU-[0-9a-f-]+)\)", done.stdout, re.MULTILINE)


def take(
    device: str, devices: Mapping[str, str] | None = None, sleep: Callable[[float], None] = time.sleep
) -> str | None:
    """For the device `cuda`, lock a GPU until this process ends, and hide all others; returns its name.

    Call it before torch looks for devices. devices: from `available`. It waits until one is free, with occasional
    messages on stderr. Any other device, such as `cpu` or `cuda:1`, is used as given.
    Raises InputError if there is no device.
    """
    if device != "cuda" or HELD:
        return None
    devices = available() if devices is None else devices
    locks().mkdir(mode=0o700, parents=True, exist_ok=True)
    waited = 0
    while (name := free(devices)) is None:
        if waited % TELL == 0:
            print(f"Every GPU ({', '.join(devices)}) has another job: waiting for one.", file=sys.stderr, flush=True)
        sleep(LOOK)
        waited += LOOK
    os.environ[VISIBLE] = name
    return name


def free(devices: Mapping[str, str]) -> str | None:
    """Lock and return the first device whose lock is free."""
    for name, lock in devices.items():
        # child processes do not inherit the lock
        file = (locks() / f"{re.sub('[^A-Za-z0-9-]', '_', lock)}.lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        HELD.append(file)
        return name
    return None


def peak_gpu_mb(device: str) -> float | None:
    """Largest memory of this process's tensors on a GPU so far, in MB; None on another device."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.max_memory_allocated(device) / 1e6
