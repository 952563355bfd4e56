"""A study of a GGUF file gives the numbers of the folder that it holds, and is run again when the file is another."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
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

pytestmark = pytest.mark.xdist_group("gguf")  # one worker runs the study
FILE = Path("it's a file; touch pwned.gguf")  # characters that a shell would act on
WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Study:
    folder: Path
    first: Run
    again: Run

    def rows(self, model: str) -> list[dict[str, Any]]:
        """The rows of `cells` of a model."""
        table = pq.read_table(self.folder / "results/tables/cells.parquet").to_pylist()
        return [row for row in table if row["model"] == model]


def values(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(label, metric) -> value, of what is no time."""
    return {(row["label"], row["metric"]): row["value"] for row in rows if not row["metric"].endswith("seconds")}


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
    found = values(study.rows("file"))
    assert found == values(study.rows("folder")) and len(found) > 4 and found["magnitude", "perplexity"] > 1
    assert not list(study.folder.glob("pwned*"))


def test_its_rows_say_where_it_comes_from(study: Study):
    for row in study.rows("file"):
        assert row["model_source"] == str(FILE) and row["model_quantisation"] == "Q4_1 (16), F32 (5)"
        assert all(row["model_sha256"] != other["model_sha256"] for other in study.rows("folder"))
    assert {row["model_quantisation"] for row in study.rows("folder")} == {None}


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


@pytest.mark.long
def test_another_file_is_another_model(study: Study):
    before = {name: values(study.rows(name)) for name in ("file", "folder")}
    write(study.folder / FILE, "Q8_0")
    done = snakemake(study.folder, *WITHOUT_FIGURES)
    assert done.status == 0 and done.jobs["compress"] == 2, done.output
    assert values(study.rows("folder")) == before["folder"]
    assert values(study.rows("file"))["dense", "perplexity"] != before["file"]["dense", "perplexity"]
