"""One job per GPU of a machine: `--device cuda` takes a free one under a lock that the kernel gives back at its death.

All studies of a user on a machine keep their locks in one folder, so that several share the devices. What a user, or
SLURM, has put into CUDA_VISIBLE_DEVICES is all that is chosen from.
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
LOOK, TELL = 1, 60  # seconds between two looks at the locks, and between two lines about waiting
HELD: list[IO[str]] = []  # an open file is a held lock


def locks() -> Path:
    """The folder of the locks: this user's, or this job's of SLURM, which shares its devices with no other."""
    job = os.environ.get("SLURM_JOB_ID")
    return Path(tempfile.gettempdir()) / f"layerwise-{os.getuid()}" / (f"slurm-{job}" if job else "machine")


def available() -> dict[str, str]:
    """The devices that a job may take, as CUDA_VISIBLE_DEVICES spells each, with its lock's name; without torch.

    Raises InputError where there is none.
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
        raise InputError(f"A GPU was asked for, but {VISIBLE} is {given!r}, which hides all GPUs.")
    # A number and a unique name may be of one device.
    numbered = {str(number): name for number, name in enumerate(listed)}
    return {name: numbered.get(name, name) for name in names}


def unique_names() -> list[str]:
    """UUIDs of the machine's devices, in the order of nvidia-smi; none where it is absent or fails."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU .*\(UUID: (GPU-[0-9a-f-]+)\)", done.stdout, re.MULTILINE)


def take(
    device: str, devices: Mapping[str, str] | None = None, sleep: Callable[[float], None] = time.sleep
) -> str | None:
    """For the device `cuda`, hold one of the devices until this process ends, and see no other; returns its name.

    To be called before torch looks for devices. devices: as `available` gives them. Waits, with a line on stderr now
    and then, until one is free. Any other device, such as `cpu` or `cuda:1`, is taken at its word.
    Raises InputError where there is no device.
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
    """The first device whose lock nobody holds, held by this process from now on."""
    for name, lock in devices.items():
        file = (locks() / f"{re.sub('[^A-Za-z0-9-]', '_', lock)}.lock").open("a")  # programs started here do not get it
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
