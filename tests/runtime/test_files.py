"""Folders for what a job keeps meanwhile."""

import os
import signal
import subprocess
import sys

import pytest

from layerwise.runtime.files import scratch_folder

KILLED = """
import os, signal, sys
from pathlib import Path
from layerwise.runtime.files import scratch_folder

with scratch_folder(Path(sys.argv[1]), ".trials-") as folder:
    (folder / "weights").write_text("much")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_has_left_goes_and_what_a_living_one_holds_stays(tmp_path):
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert ended.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    (tmp_path / ".trials-another.host-abc").mkdir()  # nobody here knows whether its process lives
    with scratch_folder(tmp_path, ".trials-") as first:
        assert first.is_dir() and left not in names(tmp_path)
        with scratch_folder(tmp_path, ".trials-") as second:
            assert first != second and {first.name, second.name} < set(names(tmp_path))
        assert names(tmp_path) == sorted([".trials-another.host-abc", first.name])
    assert names(tmp_path) == [".trials-another.host-abc"]


def test_a_folder_goes_with_its_files_when_the_body_fails(tmp_path):
    with pytest.raises(KeyError), scratch_folder(tmp_path / "new", ".trials-") as folder:
        (folder / "weights").write_text("much")
        raise KeyError
    assert names(tmp_path / "new") == []


def test_nothing_of_others_is_removed_where_folders_cannot_be_locked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    with scratch_folder(tmp_path, ".trials-") as first:
        monkeypatch.setattr("layerwise.runtime.files.fcntl.flock", refuse)
        with scratch_folder(tmp_path, ".trials-") as second:
            assert os.path.isdir(first) and os.path.isdir(second)
