"""What the folder of Gram stores holds is freed, but for what other studies use, and what goes is said."""

from __future__ import annotations

import pytest

from workflow.scripts import clean_cache, grams
from workflow.scripts.checkpoint import Checkpoint


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """Three stores, of this study, of another and of both, and two calibrations that were begun."""
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "grams"))
    for name, studies in (("own", [here]), ("theirs", [other]), ("both", [here, other])):
        store = tmp_path / "grams" / name
        store.mkdir(parents=True)
        (store / "index.json").write_text("{}")
        (store / "block-000.safetensors").write_bytes(bytes(2_000_000))
        for study in studies:
            grams.point_to(store, study / f"results/{name}.json")
    (tmp_path / "grams/.left.part").mkdir()
    (tmp_path / "grams/.left.part/block-000.safetensors").write_bytes(bytes(3_000_000))
    return tmp_path


def left(folder):
    return sorted(path.name for path in (folder / "grams").iterdir())


def test_what_nobody_else_uses_is_freed(stores, capsys):
    with Checkpoint(stores / "grams/.running.part", {}):
        clean_cache.main([])
        assert left(stores) == [".running.part", "both", "theirs"]
    said = capsys.readouterr().out
    assert f"freed 3.0 MB: {stores}/grams/.left.part" in said and f"freed 2.0 MB: {stores}/grams/own" in said
    assert (
        f"kept 2.0 MB: {stores}/grams/both (1 other studies use it, such as {stores}/other/results/both.json)" in said
    )
    assert ".running.part (a calibration is at work there)" in said and said.endswith(
        f"5.0 MB in all, of {stores}/grams.\n"
    )
    assert not (stores / "here/results/own.json").exists() and (stores / "here/results/both.json").exists()
    for name in ("theirs", "both"):  # once their study is gone
        (stores / f"other/results/{name}.json").unlink()
    clean_cache.main([])
    assert left(stores) == []


def test_a_dry_run_leaves_all(stores, capsys):
    before = left(stores)
    clean_cache.main(["--dry-run"])
    assert left(stores) == before and f"would free 2.0 MB: {stores}/grams/own" in capsys.readouterr().out
    assert (stores / "here/results/own.json").exists()


def test_a_study_that_has_moved_on_uses_a_store_no_more(stores):
    grams.point_to(stores / "grams/own", stores / "other/results/theirs.json")
    assert grams.users(stores / "grams/theirs") == []
    assert grams.users(stores / "grams/own") == [stores / "here/results/own.json", stores / "other/results/theirs.json"]
    grams.point_to(stores / "grams/own", stores / "other/results/theirs.json")
    assert len((stores / "grams/own/users.txt").read_text().splitlines()) == 2
