"""Memory of this machine: limits, free memory, and the release of unused memory."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

USAGE = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
RECLAIMED = ("inactive_file", "total_inactive_file")  # page cache of files, which the system reclaims on demand


def machine_memory() -> float:
    """Bytes that this process may use: the machine's memory, or the smallest limit of its control groups."""
    own = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float(min([own, *(limit for _, limit in limits())]))


def limits() -> Iterator[tuple[Path, int]]:
    """(file, limit in bytes) of each control group of this process."""
    for path in limit_files():
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():  # "max" means no limit
            yield path, int(text)


def limit_files(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """Files with the limits of this process's control groups and their parents, for both versions of cgroups."""
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        kinds = {"": (root, "memory.max"), "memory": (root / "memory", "memory.limit_in_bytes")}
        if controllers not in kinds:
            continue
        top, name = kinds[controllers]
        for folder in (Path(place), *Path(place).parents):
            yield top / folder.relative_to("/") / name


def free_memory() -> int:
    """Bytes that this process can still allocate, within the machine's memory and its control groups.

    The page cache counts as free.
    """
    info = Path("/proc/meminfo")
    if not info.is_file():
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = dict(line.split(":") for line in info.read_text().splitlines())
    free = [int(found["MemAvailable"].split()[0]) * 1024]
    for path, limit in limits():
        said = dict(line.split() for line in path.with_name("memory.stat").read_text().splitlines())
        held = next((int(said[name]) for name in reversed(RECLAIMED) if name in said), 0)
        free.append(limit - int(path.with_name(USAGE[path.name]).read_text()) + held)
    return max(0, min(free))


def give_back_memory() -> None:
    """Return freed memory to the system; glibc would keep some of it, and more with each block of a model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # exists only in glibc
        if trim:
            trim(0)
