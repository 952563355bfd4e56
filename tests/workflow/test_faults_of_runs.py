"""Whole studies under what a machine and its users do to them: a sentence, and tables as of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tests.support.kill_study import assert_same_tables, disturbed, heed, kill_tree
from tests.support.workflow_harness import WITHOUT_FIGURES, Run, snakemake, tiny_project, tiny_study, write_config

pytestmark = pytest.mark.long

CELLS = WITHOUT_FIGURES[0]


def small_study() -> dict:
    """Two cells. (A study of both modes, with certificates, is killed in test_kill.py.)"""
    small = {"modes": ["shared"], "certificates": False, "targets": [{"pattern": "2:4"}]}
    return tiny_study() | small | {"methods": {"magnitude": None, "wanda": None}}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> Path:
    """A project where nothing has run; its kernels are compiled."""
    folder = tiny_project(tmp_path_factory.mktemp("fresh"))
    write_config(folder, small_study())
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import layerwise.methods.wanda, layerwise.kernels.rows, layerwise.kernels.tap_statistics",
        ],
        cwd=folder,
        check=True,
    )
    return folder


@pytest.fixture(scope="module")
def undisturbed(fresh: Path, tmp_path_factory) -> Path:
    folder = copy(fresh, tmp_path_factory.mktemp("undisturbed") / "study")
    done = run(folder)
    assert done.status == 0, done.output
    return folder


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to, symlinks=True))


def run(folder: Path, *arguments: str, **environment: str) -> Run:
    return snakemake(folder, *WITHOUT_FIGURES, *arguments, **environment)


def assert_told(done: Run, *sentences: str) -> None:
    assert done.status == 1, done.output
    assert "Traceback" not in done.output
    assert all(sentence in done.output for sentence in sentences), done.output


def assert_finishes(folder: Path, undisturbed: Path) -> Run:
    done = run(folder)
    assert done.status == 0, done.output
    assert_same_tables(folder, undisturbed)
    assert not list(folder.glob("results/**/*.part")) and not list(folder.rglob("failed-*.json"))
    return done


def start(folder: Path, log: Path) -> subprocess.Popen:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("SNAKEMAKE")}
    command = [sys.executable, "-m", "snakemake", "--cores", "1", *WITHOUT_FIGURES]
    return subprocess.Popen(
        command, cwd=folder, stdout=log.open("w"), stderr=subprocess.STDOUT, env=clean, preexec_fn=heed
    )


def wait_for(process: subprocess.Popen, here: Callable[[], bool]) -> None:
    while not here():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.fixture
def disk(fresh: Path, tmp_path: Path):
    """A project whose results are on a small disk of their own."""
    folder = copy(fresh, tmp_path / "study")
    results = folder / "results"
    results.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", results], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", results], check=True)


def begun(folder: Path, log: Path, fault: Callable[[], object]) -> Run:
    """A run that a fault meets after its first jobs."""
    process = start(folder, log)
    wait_for(process, lambda: any(folder.glob("results/tokens/*/*.safetensors")))
    fault()
    return Run(process.wait(), log.read_text(), 0)


def test_a_disk_that_cannot_be_written_and_one_that_fills_up(disk: Path, undisturbed: Path, tmp_path: Path):
    results, filler = disk / "results", disk / "results/filler"
    subprocess.run(["mount", "-o", "remount,ro", results], check=True)
    assert_told(run(disk), "results cannot be written: the disk is mounted read-only, or permission is denied.")
    subprocess.run(["mount", "-o", "remount,rw", results], check=True)

    def fill() -> None:
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    assert_told(begun(disk, tmp_path / "log", fill), "no space is left on the disk: free some, then run again")
    assert_told(run(disk), "The jobs need about", "of disk where results/ is, and 0 MB are free: make room")
    filler.unlink()
    assert_finishes(disk, undisturbed)


def test_a_truncated_result_and_damaged_grams(undisturbed: Path, tmp_path: Path):
    """The next plain run tells what is damaged, and the one after that has computed it again."""
    folder = copy(undisturbed, tmp_path / "study")
    (path,) = folder.glob("results/cells/*/*/*/wanda-*/layers.parquet")
    os.truncate(path, path.stat().st_size // 2)
    shutil.rmtree(folder / "results/tables")
    assert_told(run(folder), "layers.parquet cannot be used: ", "run again to make it")
    (path,) = folder.glob("results/grams/*/block-001.safetensors")
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    done = run(folder)
    assert_told(done, "block-001.safetensors", "is damaged", "run again to compute these Grams")
    assert done.jobs["compress"] == 1  # the other cell is still whole
    assert assert_finishes(folder, undisturbed).jobs["gram"] == 1
    assert not list(folder.rglob("*.damaged"))


def test_two_studies_that_share_their_grams(fresh: Path, undisturbed: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "grams"))
    folders = [copy(fresh, tmp_path / name) for name in ("one", "other")]
    runs = [start(folder, folder / "log") for folder in folders]
    for folder, process in zip(folders, runs, strict=True):
        assert process.wait() == 0, (folder / "log").read_text()
        assert_same_tables(folder, undisturbed)
    assert len(list((tmp_path / "grams").iterdir())) == 1


@pytest.mark.parametrize("clock", ["back", "ahead", "stopped"])
def test_a_clock_that_jumps(undisturbed: Path, tmp_path: Path, clock: str):
    """Times of files say in what order they were written; a clock that is set makes them lie."""
    folder, now = copy(undisturbed, tmp_path / "study"), time.time()
    for number, path in enumerate(sorted(folder.glob("results/**/*"))):
        own = {"back": now - 1e6 - 60 * number, "ahead": now + 1e6 + 60 * number, "stopped": now}[clock]
        os.utime(path, (own, own))
    os.remove(folder / "results/tables/layers.csv")
    assert_finishes(folder, undisturbed)
    seconds = pd.read_parquet(folder / CELLS).query("metric in ('solve_seconds', 'job_seconds')")["value"]
    assert len(seconds) and bool((seconds >= 0).all())


def test_two_runs_in_a_folder_and_a_config_that_is_edited(fresh: Path, undisturbed: Path, tmp_path: Path):
    """The first run goes on with what it read; the next, once it is alone, computes what the config then says."""
    folder = copy(fresh, tmp_path / "study")
    first = start(folder, tmp_path / "log")
    wait_for(first, lambda: any(folder.glob("results/models/*.json")))
    assert_told(run(folder), "Directory cannot be locked", "no other Snakemake process")
    assert first.poll() is None
    write_config(folder, small_study() | {"targets": [{"sparsity": 0.5}], "methods": {"wanda": None}})
    assert first.wait() == 0, (tmp_path / "log").read_text()
    assert_same_tables(folder, undisturbed)
    done = run(folder)
    assert done.status == 0, done.output
    cells = pd.read_parquet(folder / CELLS)
    assert set(cells["label"]) == {"wanda"} and set(cells["target"]) == {"50% row"}


def test_a_method_that_is_edited_during_a_run(fresh: Path, undisturbed: Path, tmp_path: Path):
    """Its cells are refused, for they would pass for those of the code that the run began with."""
    folder = copy(fresh, tmp_path / "study")
    path = folder / "methods/wanda.py"
    before = path.read_text("utf-8")
    first = start(folder, tmp_path / "log")
    wait_for(first, lambda: any(folder.glob("results/models/*.json")))
    path.write_text(before + "# edited\n", "utf-8")
    assert first.wait() == 1
    said = (tmp_path / "log").read_text()
    assert "The code was edited since this run began: run again." in said and "Traceback" not in said
    path.write_text(before, "utf-8")
    assert_finishes(folder, undisturbed)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_study_that_gets_sigterm(fresh: Path, undisturbed: Path, tmp_path: Path, by: signal.Signals):
    folder = copy(fresh, tmp_path / "study")
    process = start(folder, tmp_path / "log")
    wait_for(process, lambda: any(folder.glob("results/cells/*/*/*/*/failed-*.json")))  # there while a cell is computed
    kill_tree(process, by)
    assert process.returncode != 0
    (record,) = folder.glob("results/cells/*/*/*/*/failed-*.json")
    assert json.loads(record.read_text())["status"] == "stopped"
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    if by == signal.SIGINT:
        assert process.returncode == 130
        assert said.endswith("The run was interrupted: 0 of 2 cells are done. The same command continues it.\n")
        assert "Error" not in said and "cells failed" not in said and not (folder / "results/partial").exists()
    told = disturbed(folder, WITHOUT_FIGURES, 1, 10, random.Random(1), by)  # also in Snakemake's own beginning
    # Ctrl-C before Snakemake reads the Snakefile shows its own.
    assert by == signal.SIGINT or not any("Traceback" in text for text in told)
    assert_same_tables(folder, undisturbed)
