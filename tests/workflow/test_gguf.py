"""A study of a GGUF file gives the numbers of the folder that it holds, and is run again when the file is another."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from layerwise.models.loading import load
from layerwise.sources.checkpoint_files import model_folder
from tests.support.gguf_files import write
from tests.support.workflow_harness import (
    TEXTS,
    WITHOUT_FIGURES,
    Run,
    copy_project,
    snakemake,
    tiny_study,
    words,
    write_config,
)

FILE = Path("it's a file; touch pwned.gguf")  # characters that a shell would act on
WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Study:
    folder: Path
    first: Run
    again: Run

    @property
    def cells(self) -> pd.DataFrame:
        return pd.read_parquet(self.folder / "results/tables/cells.parquet")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The file, and the folder that it is converted to as a model of its own, by two methods."""
    folder = copy_project(tmp_path_factory.mktemp("gguf") / "project")
    for seed, path in enumerate(TEXTS.values()):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(words(300, seed), "utf-8")
    write(folder / FILE, "Q4_1")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(model_folder({"gguf": str(FILE)}), folder / "folder")
    shutil.rmtree(folder / "results")
    config = tiny_study() | {
        "modes": ["shared"],
        "targets": [{"pattern": "2:4"}],
        "keep_weights": True,
        "certificates": False,
    }
    config |= {
        "models": {"file": {"gguf": str(FILE)}, "folder": {"path": "folder"}},
        "methods": {"dense": {}, "magnitude": {}},
    }
    write_config(folder, config)
    return Study(folder, snakemake(folder, *WITHOUT_FIGURES), snakemake(folder, *WITHOUT_FIGURES))


def test_its_numbers_are_those_of_the_folder(study: Study):
    assert study.first.status == 0, study.first.output
    timeless = study.cells[~study.cells["metric"].isin(["solve_seconds", "job_seconds"])]
    of = {name: rows.set_index(["label", "metric"])["value"] for name, rows in timeless.groupby("model")}
    assert len(of["file"]) == len(of["folder"]) > 4
    assert (of["file"] == of["folder"]).all() and (of["file"]["magnitude", "perplexity"] > 1)
    assert not list(study.folder.glob("pwned*"))


def test_its_rows_say_where_it_comes_from(study: Study):
    file, folder = (study.cells[study.cells["model"] == name] for name in ("file", "folder"))
    assert set(file["model_source"]) == {str(FILE)} and set(file["model_quantisation"]) == {"Q4_1 (16), F32 (5)"}
    assert folder["model_quantisation"].isna().all() and (folder["model_sha256"] != file["model_sha256"].iloc[0]).all()


def test_nothing_is_run_again(study: Study):
    assert study.again.status == 0 and not study.again.jobs, study.again.output


def test_a_cell_of_it_is_exported(study: Study):
    (cell,) = (study.folder / "results/cells").glob("file-*/*/shared/magnitude-*")
    command = ["-m", "layerwise", "export", str(cell), "--format", "dense", "--out", "out"]
    done = subprocess.run([sys.executable, *command], cwd=study.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    exported = load({"path": str(study.folder / "out")}).state_dict()
    dense = load({"path": str(study.folder / "folder")}).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (exported[name] == 0).float().mean() == 0.5 and (dense[name] == 0).float().mean() < 0.1
    assert torch.equal(exported["model.norm.weight"], dense["model.norm.weight"])


def test_another_file_is_another_model(study: Study):
    before = study.cells
    write(study.folder / FILE, "Q8_0")
    done = snakemake(study.folder, *WITHOUT_FIGURES)
    assert done.status == 0 and done.jobs["compress"] == 2, done.output
    for name, changed in (("file", True), ("folder", False)):
        old, new = (
            rows[(rows["model"] == name) & (rows["metric"] == "perplexity")]["value"].to_list()
            for rows in (before, study.cells)
        )
        assert (old != new) == changed
