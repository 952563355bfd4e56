"""A job that is killed anywhere goes on from its last finished block, and what comes out is what would have."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from layerwise.calibration import block_calls, hidden_states
from layerwise.cli import compress as compress_worker
from layerwise.compression import cell as cell_module
from layerwise.compression import solver
from layerwise.compression.cell import CellJob
from layerwise.contract.layer import Target
from layerwise.evaluation import cache
from layerwise.runtime.checkpoint import Checkpoint
from layerwise.storage import layer_packing, packed_file
from layerwise.storage.packed_file import PackedFile
from tests.compression.test_cell import Case, rows

torch.set_num_threads(1)
HALF = Target(0.5)
MEASURED = ("seconds", "peak_mb")  # of two runs never the same
CELLS = [("sparsegpt", "sequential"), ("sparse_swaps", "shared"), ("sparse_swaps", "sequential")]  # with a trace
# Where a job may be killed: a function of the project, at one of its calls.
PLACES: dict[str, tuple[object, str]] = {
    "within a block": (solver.Solver, "solve"),
    "while a block is run": (block_calls.Call, "replay"),
    "before the states are known to be whole": (hidden_states, "write_atomic"),
    "while a block is written": (packed_file, "save_file"),
    "before a block counts as finished": (Checkpoint, "finish"),
    "while the blocks are joined": (packed_file, "join"),
    "before the evaluation": (compress_worker, "evaluate_ahead"),
    "before the record is written": (cell_module, "provenance"),
}


IN_A_STREAM = ("while a block is run", "before the states are known to be whole")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("resume"), family="gemma3").prepare()  # three blocks


@pytest.fixture(scope="module")
def whole(case: Case) -> dict[tuple[str, str], Path]:
    """The cells of jobs that nothing has stopped."""
    return {cell: case.run(cell[0], HALF, cell[1], f"whole/{cell[0]} {cell[1]}") for cell in CELLS}


def killed(run: Callable[[], Path], owner: object, name: str, call: int) -> bool:
    """Whether a run in a process of its own came to a call of a function, where it is killed."""
    process = os.fork()
    if process == 0:
        left, original = iter(range(call)), getattr(owner, name)

        def counted(*args, **kwargs):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, counted)
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def table(cell: Path, name: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows(cell, name)]


def assert_same(cell: Path, other: Path) -> None:
    for name in ("layers", "trace"):
        assert table(cell, name) == table(other, name)
    assert (cell / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    assert sorted(path.name for path in cell.iterdir()) == sorted(path.name for path in other.iterdir())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "cell",
    [CELLS[0], *(pytest.param(cell, marks=pytest.mark.long) for cell in CELLS[1:])],
    ids=[" ".join(cell) for cell in CELLS],
)
def test_a_killed_cell_goes_on(case: Case, whole, cell: tuple[str, str], place: str):
    """Killed again and again, at later and later calls, until it comes through."""
    out = f"killed/{' '.join(cell)} {place}"
    chance, deaths, call = random.Random(place), 0, 0
    while killed(lambda: case.run(cell[0], HALF, cell[1], out), *PLACES[place], call):
        deaths, call = deaths + 1, chance.randrange(0, 12)
        assert deaths < 60
    assert deaths or (cell[1] == "shared" and place in IN_A_STREAM)
    assert_same(case.folder / out, whole[cell])


STREAMS = [("gptaq", place) for place in (*IN_A_STREAM, "before a block counts as finished")]


@pytest.mark.parametrize(("method", "place"), [*STREAMS, ("gptq", STREAMS[0][1])])
def test_a_killed_cell_with_a_dense_stream_goes_on(case: Case, method: str, place: str):
    """The dense model's hidden states are kept beside the compressed one's, for the method or for the score."""
    scored, target = method == "gptq", Target(bits=3)
    run = lambda out: case.run(method, target, "sequential", f"beside/{method} {out}", asymmetric=scored)  # noqa: E731
    expected, deaths, call = run("whole"), 0, 0
    while killed(lambda: run(place), *PLACES[place], call):
        deaths, call = deaths + 1, call + (3 if place in IN_A_STREAM else 1)
        assert deaths < 60
    assert deaths > 1
    assert_same(case.folder / f"beside/{method} {place}", expected)


def test_finished_blocks_are_not_computed_again(case: Case, whole, monkeypatch, capfd):
    cell = ("sparse_swaps", "sequential")
    layers = len(rows(whole[cell])) // 3
    assert killed(lambda: case.run(*cell[:1], HALF, cell[1], "once"), solver.Solver, "solve", layers + 2)
    solved, original = [], solver.Solver.solve
    monkeypatch.setattr(solver.Solver, "solve", lambda self, layer: solved.append(layer.name) or original(self, layer))
    assert_same(case.run(cell[0], HALF, cell[1], "once"), whole[cell])
    assert "Resuming after 1 finished blocks." in capfd.readouterr().err
    assert len(solved) == 2 * layers and not any(".0." in name for name in solved)


def test_other_code_starts_over_and_says_so(case: Case, whole, monkeypatch, capfd):
    cell = ("sparse_swaps", "sequential")
    assert killed(lambda: case.run(cell[0], HALF, cell[1], "edited"), solver.Solver, "solve", 20)
    told, original = {}, CellJob.decisive
    monkeypatch.setattr(CellJob, "decisive", lambda job: original(job) | {"code": "edited"} | told)
    assert_same(case.run(cell[0], HALF, cell[1], "edited"), whole[cell])
    assert "finished blocks in" in (said := capfd.readouterr().err)
    assert "belong to another code: starting over." in said


def test_a_tuned_cell_that_is_killed_is_tuned_again(case: Case):
    stages = {"blocks": {"epochs": 1, "batch": 2, "weights": 1e-3, "grid": 1e-3}}
    target = Target(bits=4, group=8)
    expected = case.run("rtn", target, out="tuned whole", tune=stages)
    run = lambda: case.run("rtn", target, out="tuned", tune=stages)  # noqa: E731
    assert killed(run, packed_file, "save_file", 1)
    assert killed(run, packed_file, "join", 0)
    assert_same(run(), expected)


def test_a_state_that_cannot_be_read_starts_over(tmp_path, capsys):
    for content in ("", "[]", '{"done": 1}'):
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        (folder / "state.json").write_text(content)
        (folder / "block-000.json").write_text("{}")
        with Checkpoint(folder, {"code": 1}) as checkpoint:
            assert checkpoint.done == 0 and not (folder / "block-000.json").exists()
        assert "state.json cannot be read" in capsys.readouterr().err
        shutil.rmtree(folder, ignore_errors=True)


def test_one_process_at_a_time_has_a_checkpoint(tmp_path):
    """The second waits for the first, and finds nothing of it once it has removed its work."""
    reading, writing = os.pipe()
    with Checkpoint(tmp_path / "checkpoint", {}) as first:
        first.finish(0)
        process = os.fork()
        if process == 0:
            os.close(first._lock.fileno())  # a lock is shared with those who are forked
            os.write(writing, b"?")
            with Checkpoint(tmp_path / "checkpoint", {}) as second:
                os.write(writing, b"%d" % second.done)
            os._exit(0)
        assert os.read(reading, 1) == b"?"
        time.sleep(0.2)
        os.set_blocking(reading, False)
        with pytest.raises(BlockingIOError):
            os.read(reading, 1)
        first.remove()
    os.waitpid(process, 0)
    assert os.read(reading, 1) == b"0"


def test_joined_files_are_the_layers_of_all(tmp_path, case: Case, whole):
    for cell in whole.values():
        file = PackedFile(cell / "weights.safetensors")
        parts = []
        for block in range(3):
            names = [name for name in file.shapes if f".{block}." in name]
            stored = {name: layer_packing.parts_of(file.read(name), file.target, torch.float32) for name in names}
            parts.append(tmp_path / f"{block}.safetensors")
            packed_file.write(parts[-1], stored, {name: file.shapes[name] for name in names}, file.target)
        packed_file.join(tmp_path / "joined.safetensors", parts)
        joined = PackedFile(tmp_path / "joined.safetensors")
        assert joined.shapes == file.shapes and joined.target == file.target
        assert all(torch.equal(joined.read(name).weight, file.read(name).weight) for name in file.shapes)
        assert cache.sha256(tmp_path / "joined.safetensors") == cache.sha256(cell / "weights.safetensors")


def test_death_amid_the_removal_leaves_nothing_that_counts(tmp_path, monkeypatch):
    """The order in which a folder's files go is the file system's."""
    folder = tmp_path / "checkpoint"
    with Checkpoint(folder, {}) as checkpoint:
        checkpoint.file(0, "json").write_text("{}")
        checkpoint.finish(0)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda folder, ignore_errors: checkpoint.file(0, "json").unlink())
            checkpoint.remove()  # so far did it come
    with Checkpoint(folder, {}) as checkpoint:
        assert checkpoint.done == 0
