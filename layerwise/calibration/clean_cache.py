"""Free the folder of Gram stores: remove stores that no other study uses, and the remains of killed calibrations.

Do not call it while a run of this study is reading the stores.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from layerwise.calibration.gram_store import users
from layerwise.runtime.shared_stores import size_of

# names of stores and of unfinished calibrations: nothing else is removed
NAMES = re.compile(r"[0-9a-f]{32}|\.[0-9a-f]{32}\.part")


@contextlib.contextmanager
def held(part: Path) -> Iterator[bool]:
    """Lock an unfinished calibration and yield whether no process works in it; none can start within the context."""
    with contextlib.ExitStack() as stack:
        free = True
        with contextlib.suppress(FileNotFoundError):
            lock = stack.enter_context((part / "lock").open("r+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                free = False
        yield free


def clean(folder: Path, here: Path, dry: bool = False) -> int:
    """Remove unused stores from a folder; returns the number of bytes freed. here: the working directory.

    This study's record of a store is removed with it, so that the next run that needs the store computes it again.
    """
    freed = 0
    for path in sorted(path for path in folder.glob("*") if NAMES.fullmatch(path.name) and path.is_dir()):
        pointers = users(path)
        others = [pointer for pointer in pointers if not pointer.is_relative_to(here / "results")]
        size = size_of(path)
        with held(path) as free:
            if others:
                print(f"kept {size / 1e6:.1f} MB: {path} ({len(others)} other studies use it, such as {others[0]})")
            elif not free:
                print(f"kept {size / 1e6:.1f} MB: {path} (a calibration is running there)")
            else:
                print(f"{'would free' if dry else 'freed'} {size / 1e6:.1f} MB: {path}")
                freed += size
                if not dry:
                    for pointer in pointers:
                        pointer.unlink(missing_ok=True)
                    shutil.rmtree(path)
    return freed
