"""Where a result comes from: code, versions, machine, and what it took."""

import importlib.metadata
import platform
import resource
import subprocess
import sys
from pathlib import Path

from layerwise.runtime.project import PACKAGE, ROOT

PROVENANCE = ("torch", "transformers", "numpy", "snakemake")  # distributions whose versions a row carries


def provenance(device: str, threads: int) -> dict[str, object]:
    """Where a result comes from: code, versions, machine."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", "layerwise", "methods", "workflow", "Snakefile") if commit else None
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PROVENANCE},
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpu": _cpu(),
        "threads": threads,
        "device": device,
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command about the project, or None where it is no git checkout."""
    if ROOT.is_relative_to(PACKAGE):  # installed: the repository around it, if any, is another project's
        return None
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes on macOS, kilobytes on Linux
