"""What git says of the code, and what is told where it says nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from layerwise.runtime import provenance

KNOWN = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
NAMED = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A git checkout with one commit, in which the project is."""
    folder = tmp_path / "a clone"
    (folder / "layerwise").mkdir(parents=True)
    (folder / "layerwise/module.py").write_text("a = 1\n")
    for name, value in KNOWN.items():
        monkeypatch.setenv(name, value)
    for command in (["init", "-q"], ["add", "."], [*NAMED, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    monkeypatch.setattr(provenance, "ROOT", folder)
    monkeypatch.setattr(provenance, "PACKAGE", folder / "layerwise")
    provenance._warn.cache_clear()
    return folder


def told(capsys) -> str:
    """What is on stderr after two cells have been recorded."""
    for _ in range(2):
        found = provenance.provenance("cpu", 1)
        assert (found["commit"], found["dirty"]) == (None, None)
    return capsys.readouterr().err


def test_a_commit_and_changes_to_it(clone, capsys):
    head = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert provenance.read_clone() == provenance.Clone(head.stdout.strip(), False)
    (clone / "layerwise/module.py").write_text("a = 2\n")
    found = provenance.provenance("cpu", 1)
    assert (found["commit"], found["dirty"]) == (head.stdout.strip(), True)
    assert capsys.readouterr().err == ""


def test_a_clone_of_another_user_is_reported_once_with_its_remedy(clone, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    said = told(capsys)
    assert said == (
        f"warning: git refuses to read the clone {clone}, which another user owns: the columns commit and dirty stay "
        f"empty until `git config --global --add safe.directory '{clone}'`.\n"
    )
    remedy = said.partition("`")[2].partition("`")[0]
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "config"))
    subprocess.run(remedy, shell=True, check=True)
    assert provenance.read_clone().commit and not provenance.read_clone().unread


def test_a_clone_without_a_commit_is_reported(clone, capsys):
    (clone / ".git/HEAD").write_text("ref: refs/heads/nothing\n")
    said = told(capsys)
    assert said.startswith(f"warning: git cannot read the clone {clone} (fatal: ") and said.count("\n") == 1


def test_a_machine_without_git_is_reported(clone, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert told(capsys) == (
        f"warning: Without git the clone {clone} cannot be read: the columns commit and dirty stay empty until it is "
        "installed.\n"
    )


def test_a_folder_that_is_no_clone_is_no_warning(clone, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (clone / ".git").rename(tmp_path / "elsewhere")
    assert told(capsys) == ""
    monkeypatch.setattr(provenance, "ROOT", clone / "layerwise/shipped")  # installed
    assert provenance.read_clone() == provenance.Clone()
