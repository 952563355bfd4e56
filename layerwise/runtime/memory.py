"""Memory of this machine: what a process may use, what is free, and giving back what it no longer uses."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

USAGE = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
RECLAIMED = ("inactive_file", "total_inactive_file")  # of files that were read: the system takes it back when asked


def machine_memory() -> float:
    """Bytes that this process may use: the machine's, or the least that a control group of it allows."""
    own = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float(min([own, *(limit for _, limit in limits())]))


def limits() -> Iterator[tuple[Path, int]]:
    """The limits, in bytes, that control groups set for this process, with their files."""
    for path in limit_files():
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit():  # "max" is none
            yield path, int(text)


def limit_files(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """Where control groups of both versions keep the limits of this process and of those around it."""
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
    """Bytes that this process may still take, of the machine's memory and of what its control groups allow.

    Files that are only held for later count as free.
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
    """Return to the system what was freed, of which glibc would keep some, more with each block of a model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
        if trim:
            trim(0)
