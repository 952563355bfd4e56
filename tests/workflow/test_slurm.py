"""The tiny study through sbatch, on a cluster that these tests set up: the same tables, whatever dies on the way."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pandas as pd
import pytest
import yaml

from layerwise.storage.frames import select
from tests.support.slurm_cluster import Cluster, missing
from tests.support.workflow_harness import CONFIG, snakemake, tiny_project, tiny_study, write_config
from tests.workflow.test_workflow import FRAGILE

TABLES = ("layers", "cells", "bounds", "comparisons", "skipped")
OWN = ["seconds", "peak_mb", "peak_gpu_mb", "cpu", "threads"]  # columns of a run, or of the machine that it was on
PLUGIN = "snakemake_executor_plugin_slurm"
LACKING = [*missing(), *([] if importlib.util.find_spec(PLUGIN) else [PLUGIN])]

pytestmark = [
    pytest.mark.long,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)} (docs/cluster.md)"),
]


Found = TypeVar("Found")


class Submitted:
    """A run of Snakemake that submits its jobs; ended at the latest with the context."""

    def __init__(self, cluster: Cluster, folder: Path, *arguments: str) -> None:
        # squeue, because sacct needs a database; the rest is haste.
        command = "--workflow-profile profiles/slurm --slurm-status-command squeue --latency-wait 5"
        command += (
            f" --slurm-init-seconds-before-status-checks 2 --seconds-between-status-checks 1 --configfile {CONFIG}"
        )
        self.cluster, self.log = cluster, folder / "submitted.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "snakemake", *command.split(), *arguments],
                cwd=folder,
                env={**os.environ, **cluster.environment, "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Submitted:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def end(self) -> tuple[int, str]:
        """Status and output."""
        return self.process.wait(1800), self.log.read_text("utf-8")

    def once(self, look: Callable[[], Found | None]) -> Found:
        """What `look` finds while the run goes on."""
        while self.process.poll() is None:
            found = look()
            if found:
                return found
            time.sleep(0.02)
        raise AssertionError(f"The run ended before what was awaited:\n{self.log.read_text('utf-8')}")


def step(folder: Path, script: str) -> Callable[[], str | None]:
    """Finds the process of a script, which is a step of a job, that writes into the folder."""

    def look() -> str | None:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                here = (process / "cwd").readlink() == folder
            except OSError:  # it has ended by now, or is another user's
                continue
            if here and f"layerwise.{script}".encode() in words and b"-m" in words:
                return process.name
        return None

    return look


def running_cell(cluster: Cluster, without: list[str]) -> Callable[[], tuple[str, str] | None]:
    """Finds (job, node) of a cell's job that runs."""

    def look() -> tuple[str, str] | None:
        rows = cluster.ask("squeue", "--noheader", "--states=R", "--format=%i %N %k").splitlines()
        found = [row.split() for row in rows if "rule_cell" in row]
        return next(((job, node) for job, node, *_ in found if job not in without), None)

    return look


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny project with three cells; its texts' names are such as the commands of remote jobs quote."""
    folder = tiny_project(tmp_path_factory.mktemp("slurm") / "project").resolve()
    study = tiny_study()
    for name, text in study["texts"].items():
        shutil.copy(folder / text["path"], folder / f"{name} text.txt")
        study["texts"][name] = {"path": f"{name} text.txt"}
    methods = dict.fromkeys(("dense", "magnitude", "wanda"))
    write_config(folder, study | {"modes": ["shared"], "methods": methods, "targets": [{"pattern": "2:4"}]})
    return folder


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Every table without what is a run's own."""
    read = {name: pd.read_parquet(folder / f"results/tables/{name}.parquet") for name in TABLES}
    cells = read["cells"]
    read["cells"] = select(cells, ~cells["metric"].str.endswith("seconds")).reset_index(drop=True)
    return {name: table.drop(columns=OWN, errors="ignore") for name, table in read.items()}


def test_tables_equal_a_local_run_s_though_jobs_die(cluster, project):
    folder = project.with_name("submitted")
    shutil.copytree(project, folder)
    with Submitted(cluster, folder, "--until", "tables") as run:
        os.kill(int(run.once(step(folder, "calibrate"))), signal.SIGKILL)  # as by a lack of memory
        run.once(step(folder, "compress"))
        cancelled, _ = run.once(running_cell(cluster, []))
        cluster.ask("scancel", cancelled)
        requeued, node = run.once(running_cell(cluster, [cancelled]))
        run.once(step(folder, "compress"))
        cluster.kill_node(node)
        status, output = run.end()
    assert status == 0, output
    assert output.count("Trying to restart job") == 2  # SLURM itself starts the node's job again, under its number
    assert output.count(f"SLURM jobid {requeued} ") == 1
    assert "status is: 'FAILED'" in output
    assert "Group job cell" in output and output.count("has been submitted with SLURM jobid") == 2 + 2 + 4 + 1

    local = project.with_name("local")
    shutil.copytree(project, local)
    here = snakemake(local, "--configfile", CONFIG, "--until", "tables")
    assert here.status == 0, here.output
    expected, came = tables(local), tables(folder)
    for name in TABLES:
        pd.testing.assert_frame_equal(came[name], expected[name], rtol=1e-6, atol=0)
    assert not list(folder.rglob("failed-*.json"))


def test_a_failing_cell_leaves_the_others_and_status_1(cluster, project):
    folder = project.with_name("failing")
    shutil.copytree(project, folder)
    (folder / "own").mkdir()
    (folder / "own/fragile.py").write_text(FRAGILE, "utf-8")
    study = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
    write_config(folder, study | {"methods": {"dense": None, "fragile": None}, "method_paths": ["own"]})
    with Submitted(cluster, folder, "--retries", "0") as run:
        status, output = run.end()
    assert status == 1, output
    cells = pd.read_parquet(folder / "results/partial/tables/cells.parquet")
    perplexity = cells[cells["metric"] == "perplexity"].set_index("label")
    assert perplexity["status"].to_dict() == {"dense": "done", "fragile": "failed"}
    assert "ArithmeticError: no pivot is left" in perplexity.loc["fragile", "reason"]
    assert not (folder / "results/tables").exists()
