"""A study whose project is reached through a link, or lies elsewhere, has nothing to run again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from layerwise.study.grid import plan
from tests.support.paths import ROOT
from tests.support.workflow_harness import (
    CONFIG,
    MODEL,
    TEXTS,
    copy_project,
    snakemake,
    tiny_study,
    words,
    write_config,
    write_model,
    write_tokenizer,
)

NOTHING = "Nothing to be done"


@pytest.fixture
def study(tmp_path) -> tuple[Path, list[str]]:
    """A study in a folder of its own of which the tokens are there, and what asks for them."""
    folder = tmp_path / "study"
    for path in (*TEXTS.values(), CONFIG):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    train = words(600, seed=0)
    for path in TEXTS.values():
        (folder / path).write_text(train, "utf-8")
    write_model(folder / MODEL, write_tokenizer(folder / MODEL, train))
    config = tiny_study()
    config["models"]["demo"] = {"path": "resources/demo"}  # which ships
    write_config(folder, config)
    models = plan(config).models
    wanted = [
        f"results/tokens/{name}/calibration-{calib}.safetensors"
        for name in models
        for calib in plan(config).calibrations
    ]
    return folder, [*wanted, "--configfile", str(CONFIG)]


def test_a_project_in_another_place_has_nothing_to_run_again(study, tmp_path):
    folder, asked = study
    done = snakemake(folder, *asked, "--snakefile", ROOT / "Snakefile")
    assert done.status == 0 and done.jobs["code"] >= 2, done.output
    (tmp_path / "link").symlink_to(ROOT)
    (tmp_path / "here").symlink_to(folder)
    for place, project in ((folder, ROOT), (folder, tmp_path / "link"), (tmp_path / "here", tmp_path / "link")):
        again = snakemake(place, *asked, "-n", "--snakefile", project / "Snakefile")
        assert NOTHING in again.output, (place, project, again.output)
    elsewhere = copy_project(tmp_path / "deep/er/clone")
    shutil.copytree(ROOT / "resources/demo", elsewhere / "resources/demo")
    asked.remove(next(name for name in asked if "/demo-" in name))  # its model's files lie in the other clone
    again = snakemake(folder, *asked, "-n", "--snakefile", elsewhere / "Snakefile")
    assert NOTHING in again.output, again.output
    moved = folder.rename(tmp_path / "deep/study")
    again = snakemake(moved, *asked, "-n", "--snakefile", elsewhere / "Snakefile")
    assert NOTHING in again.output, again.output
