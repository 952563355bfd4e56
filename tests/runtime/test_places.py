"""Names of files of the project: the same wherever it lies, and through whatever links it is reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerwise.runtime import project
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import digest_of, unchanged
from layerwise.runtime.project import from_here, located, portable


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A clone with one module and one method, in which the package lies; beside it a study, in which the process is."""
    for name in ("clone/layerwise/room/module.py", "clone/methods/own.py", "study/mine.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(f"# {path.name}\n")
    monkeypatch.setattr(project, "PACKAGE", tmp_path / "clone/layerwise")
    monkeypatch.chdir(tmp_path / "study")
    return tmp_path / "clone"


FILES = ("layerwise/room/module.py", "methods/own.py")


def test_code_has_one_name_through_a_link_and_in_another_place(clone, tmp_path, monkeypatch):
    known = [portable(clone / name) for name in FILES]
    assert known == [f"layerwise:{name}" for name in FILES]
    (tmp_path / "link").symlink_to(clone)
    moved = clone.rename(tmp_path / "moved")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(moved)
    for place in (tmp_path / "link", moved):
        monkeypatch.setattr(project, "PACKAGE", place / "layerwise")
        assert [portable(place / name) for name in FILES] == known
        assert [portable(moved / name) for name in FILES] == known  # as methods/ is found, whose link is followed
        assert [located(name).read_text() for name in known] == ["# module.py\n", "# own.py\n"]


def test_other_files_are_named_from_the_working_directory(clone, tmp_path):
    assert portable(tmp_path / "study/mine.py") == portable("mine.py") == "mine.py" == from_here("mine.py")
    assert located("mine.py") == Path("mine.py")
    (tmp_path / "link").symlink_to(tmp_path / "clone")
    for place in ("clone", "link"):
        assert from_here(tmp_path / place / "methods/own.py") == "../clone/methods/own.py"


def test_a_file_that_is_a_link_keeps_its_own_name(clone, tmp_path):
    """A method is called as its file, wherever the file is a link to."""
    (tmp_path / "study/alias.py").symlink_to(tmp_path / "study/mine.py")
    assert portable("alias.py") == "alias.py"


def test_a_moved_clone_is_the_code_that_a_study_lists(clone, tmp_path, monkeypatch):
    names = [portable(clone / name) for name in FILES]
    code = tmp_path / "study" / digest_of(names)
    code.write_text(json.dumps(names))
    clone.rename(tmp_path / "moved")
    monkeypatch.setattr(project, "PACKAGE", tmp_path / "moved/layerwise")
    assert unchanged(code) == code.name
    (tmp_path / "moved/methods/own.py").write_text("# edited\n")
    with pytest.raises(InputError, match="The code was edited since this run began"):
        unchanged(code)
    (tmp_path / "moved/methods/own.py").unlink()
    with pytest.raises(InputError, match="The code was edited since this run began"):
        unchanged(code)
