"""Stores shared by studies in several folders: the users and the size of a store."""

from __future__ import annotations

import sys
from pathlib import Path

from layerwise.runtime.errors import InputError

USERS = "users.txt"  # file in a store that lists the studies' files that use it, one per line


def register(store: Path, user: Path, index: str, what: str) -> None:
    """Record in a store that a study's file uses it; if that cannot be written, a line on stderr says so.

    index: the file that every complete store has. what: the content, in the plural. Raises InputError if the store has
    been removed.
    """
    try:
        known = (store / USERS).read_text("utf-8") if (store / USERS).is_file() else ""
        if str(user.absolute()) not in known.splitlines():
            with (store / USERS).open("a", encoding="utf-8") as file:
                file.write(f"{user.absolute()}\n")
    except OSError as error:
        if not (store / index).is_file():
            raise InputError(f"{what} at {store} were removed meanwhile: run again.") from error
        print(f"{store / USERS} does not say that {user} uses it ({error.strerror}).", file=sys.stderr)


def registered(store: Path) -> list[Path]:
    """The existing files of studies that use a store."""
    try:
        known = map(Path, dict.fromkeys((store / USERS).read_text("utf-8").splitlines()))
    except FileNotFoundError:
        return []
    return [path for path in known if path.is_file()]


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())
