"""What the folder of Gram stores holds is freed, but for what other studies use, and what goes is said."""

from __future__ import annotations

import pytest

from layerwise.calibration import gram_store
from layerwise.cli.app import app
from layerwise.runtime.checkpoint import Checkpoint

OWN, THEIRS, BOTH, LEFT, RUNNING = (letter * 32 for letter in "abcde")  # named as stores are


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """Three stores, of this study, of another and of both, and two calibrations that were begun."""
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "grams"))
    for name, studies in ((OWN, [here]), (THEIRS, [other]), (BOTH, [here, other])):
        store = tmp_path / "grams" / name
        store.mkdir(parents=True)
        (store / "index.json").write_text("{}")
        (store / "block-000.safetensors").write_bytes(bytes(2_000_000))
        for study in studies:
            gram_store.point_to(store, study / f"results/{name}.json")
    (tmp_path / f"grams/.{LEFT}.part").mkdir()
    (tmp_path / f"grams/.{LEFT}.part/block-000.safetensors").write_bytes(bytes(3_000_000))
    return tmp_path


def left(folder):
    return sorted(path.name for path in (folder / "grams").iterdir())


def test_unused_stores_are_freed(stores, capsys):
    with Checkpoint(stores / f"grams/.{RUNNING}.part", {}):
        app(["clean-cache"], standalone_mode=False)
        assert left(stores) == [f".{RUNNING}.part", THEIRS, BOTH]
    said = capsys.readouterr().out
    assert f"freed 3.0 MB: {stores}/grams/.{LEFT}.part" in said and f"freed 2.0 MB: {stores}/grams/{OWN}" in said
    assert f"kept 2.0 MB: {stores}/grams/{BOTH} (1 other studies use it, such as {stores}/other/results" in said
    assert f".{RUNNING}.part (a calibration is running there)" in said and said.endswith(
        f"\nFreed 5.0 MB in {stores}/grams.\n"
    )
    assert not (stores / f"here/results/{OWN}.json").exists() and (stores / f"here/results/{BOTH}.json").exists()
    for name in (THEIRS, BOTH):  # once their study is gone
        (stores / f"other/results/{name}.json").unlink()
    app(["clean-cache"], standalone_mode=False)
    assert left(stores) == []
    capsys.readouterr()
    app(["clean-cache"], standalone_mode=False)
    assert capsys.readouterr().out == f"There is nothing to free in {stores}/grams.\n"


def test_a_dry_run_leaves_all(stores, capsys):
    before = left(stores)
    app(["clean-cache", "--dry-run"], standalone_mode=False)
    said = capsys.readouterr().out
    assert left(stores) == before and f"would free 2.0 MB: {stores}/grams/{OWN}" in said
    assert "\nWould free " in said and said.endswith(f" MB in {stores}/grams.\n")
    assert (stores / f"here/results/{OWN}.json").exists()


def test_a_study_that_has_moved_on_uses_a_store_no_more(stores):
    gram_store.point_to(stores / f"grams/{OWN}", stores / f"other/results/{THEIRS}.json")
    assert gram_store.users(stores / f"grams/{THEIRS}") == []
    both = [stores / f"here/results/{OWN}.json", stores / f"other/results/{THEIRS}.json"]
    assert gram_store.users(stores / f"grams/{OWN}") == both
    gram_store.point_to(stores / f"grams/{OWN}", stores / f"other/results/{THEIRS}.json")
    assert len((stores / f"grams/{OWN}/users.txt").read_text().splitlines()) == 2


def test_a_folder_of_another_kind_is_left_alone(stores):
    """LAYERWISE_CACHE may name a folder that holds more than stores."""
    (stores / "grams/thesis").mkdir()
    (stores / "grams/thesis/chapter.tex").write_text("all of it")
    app(["clean-cache"], standalone_mode=False)
    assert (stores / "grams/thesis/chapter.tex").is_file()
