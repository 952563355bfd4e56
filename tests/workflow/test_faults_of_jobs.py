"""What the machine does to a job ends in a sentence, leaves no file that looks whole, and the next run finishes right.

Jobs run in processes of their own; whole studies under the same faults are in test_faults_of_runs.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from layerwise.calibration import calibrate, gram_store
from layerwise.compression import cell as compress
from layerwise.compression import solver
from layerwise.contract.layer import Target
from layerwise.results.bounds import read_bounds
from layerwise.results.cell_results import failure
from layerwise.runtime import files
from layerwise.runtime.errors import InputError, report_errors, status_of
from layerwise.runtime.files import check_weights, read_made, sha256, whole_file
from layerwise.sources import tokens
from layerwise.sources.documents import documents
from layerwise.sources.fingerprint import check_unchanged
from layerwise.storage.table_schema import read_parquet, write_parquet
from tests.compression.test_cell import OUTPUTS, Case
from tests.runtime.test_checkpoint import assert_same, killed
from tests.support.paths import ROOT

HALF = Target(0.5)
CELL = ("sparsegpt", HALF, "sequential")


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("faults")).prepare()


@pytest.fixture(scope="module")
def whole(case: Case) -> Path:
    """The cell of a job that nothing has disturbed."""
    return case.run(*CELL, out="whole")


def ended(run: Callable[[], object]) -> tuple[int, str]:
    """(exit status, stderr) of a job that runs in a process of its own."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            sys.stderr = os.fdopen(writing, "w", buffering=1)
            report_errors(lambda _: run() and None, [])
            status = 0
        except SystemExit as error:
            if isinstance(error.code, int):
                status = error.code
            else:
                print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said


def assert_told(said: str, words: str) -> None:
    """The last line is a sentence with these words, and no traceback is shown."""
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and re.search(words, last), said
    assert "Traceback" not in said


def assert_nothing_looks_whole(cell: Path) -> None:
    assert not [path for path in cell.rglob("*") if path.name in OUTPUTS or path.name.endswith(".part")]


def flip(path: Path, place: int = -4) -> None:
    """Change one bit, of the last number's last digit, as a disk may: the file's times stay."""
    times, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@contextlib.contextmanager
def put_back(path: Path) -> Iterator[None]:
    """The file is again what it was, whatever was done to it in between."""
    before = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(before)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# -------------------------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize("limit", [100, 3_000, 8_000])
def test_a_file_that_may_not_grow(case: Case, whole, limit: int):
    """A substitute for a full disk where nothing may be mounted."""
    out = case.folder / f"limit {limit}"

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        case.run(*CELL, out=out.name)

    status, said = ended(run)
    assert status == 1
    assert_told(said, "Cannot write .*: the file exceeds the size limit")
    assert_nothing_looks_whole(out)
    assert_same(case.run(*CELL, out=out.name), whole)


@pytest.fixture
def disk(case: Case) -> Iterator[Path]:
    """A disk of its own, small, below the case's folder."""
    folder = case.folder / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


@pytest.mark.parametrize("left", [0, 8, 24, 48])
def test_a_full_disk(case: Case, whole, disk: Path, left: int):
    """left: KB that are free when the job starts."""
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - left * 1024)
    status, said = ended(lambda: case.run(*CELL, out="disk/cell"))
    assert status == 1
    assert_told(said, "no space is left on the disk: free some, then run again")
    assert_nothing_looks_whole(disk)
    filler.unlink()
    assert_same(case.run(*CELL, out="disk/cell"), whole)


def test_a_read_only_disk(case: Case, whole, disk: Path):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    status, said = ended(lambda: case.run(*CELL, out="disk/cell"))
    assert status == 1
    assert_told(said, "disk/cell.*: the disk is mounted read-only: make it writable")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert_same(case.run(*CELL, out="disk/cell"), whole)


def test_a_folder_of_another_user():
    """Told where the right to write is denied; root, who has it, becomes another user."""

    def run() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        with whole_file(folder / "results/cell.json") as part:
            part.write_text("{}")

    with tempfile.TemporaryDirectory() as name:  # where others may look, unlike in tmp_path
        folder = Path(name)
        folder.chmod(0o555)
        status, said = ended(run)
    assert status == 1
    assert_told(said, "Cannot write .*: permission is denied: change the permissions")


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """Else a machine that loses its power could leave an empty file."""
    order, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append("fsync") or sync(file))
    monkeypatch.setattr(Path, "replace", lambda self, other: order.append("replace") or replace(self, other))
    files.write_atomic(tmp_path / "file", "text")
    assert order == ["fsync", "replace"]


def test_a_file_that_is_written_to_half_keeps_its_old_content(tmp_path):
    path = tmp_path / "file"
    files.write_atomic(path, "old")
    with pytest.raises(ArithmeticError), whole_file(path) as part:
        part.write_text("ha")
        raise ArithmeticError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_code_is_known_by_its_content_and_its_names_alone(tmp_path):
    def digest(folder, *code):
        (tmp_path / folder).mkdir()
        for name, content in code:
            (tmp_path / folder / name).write_text(content)
        return files.digest_of([str(tmp_path / folder / name) for name, _ in code])

    first, second = ("own.py", "a = 1"), ("other.py", "b = 1")
    known = digest("here", first, second)
    assert known == digest("moved", first, second)
    changed = [(first,), (("own.py", "a = 2"), second), (first, ("other.py", "b = 2")), (("new.py", "a = 1"), second)]
    assert len({known, *(digest(f"changed-{number}", *code) for number, code in enumerate(changed))}) == 5


# ------------------------------------------------------------------------------------------------------------- memory


def torch_memory() -> None:
    torch.empty(2**40)


def numpy_memory() -> None:
    np.ones(2**40)


def arrow_memory() -> None:
    pa.allocate_buffer(2**45)


@pytest.mark.parametrize("allocate", [torch_memory, numpy_memory, arrow_memory])
def test_memory_that_is_not_there(case: Case, whole, allocate: Callable[[], None]):
    out = case.folder / allocate.__name__

    def run() -> None:
        own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (own + 2**31, own + 2**31))
        # It returns nothing, for it never gets there.
        solver.Solver.solve = lambda self, layer: allocate()  # pyright: ignore[reportAttributeAccessIssue]
        case.run(*CELL, out=out.name)

    status, said = ended(run)
    assert status == 1
    assert_told(said, "The job ran out of memory .*: give it more, or run fewer jobs at a time")
    assert json.loads((out / "failed-compress.json").read_text())["status"] == "out of memory"
    assert_nothing_looks_whole(out)
    assert_same(case.run(*CELL, out=out.name), whole)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (SafetensorError("I/O error: Cannot allocate memory (os error 12)"), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full"),
        (OSError(errno.EIO, "Input/output error"), "error"),
    ],
)
def test_faults_of_the_machine_have_a_word_and_a_sentence(error: Exception, status: str):
    word, sentence = status_of(error)
    assert word == status and sentence.endswith(".") and type(error).__name__ not in sentence.split(" (")[0]


def test_a_fault_of_the_code_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        report_errors(lambda _: 1 / 0, [])


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_job_that_gets_sigterm(case: Case, whole, by: signal.Signals, code: int):
    out, original = case.folder / by.name, compress.write_block

    def run() -> None:
        def write(checkpoint, index, *rest):
            if index == 1:
                os.kill(os.getpid(), by)
            original(checkpoint, index, *rest)

        compress.write_block = write
        signal.signal(signal.SIGINT, signal.default_int_handler)
        case.run(*CELL, out=out.name)

    status, said = ended(run)
    assert status == code
    assert_told(said, "the job was stopped before it finished; the next run resumes after")
    assert_nothing_looks_whole(out)
    assert "was stopped" in failure(out, set(os.listdir(out)), ["compress"]).reason
    assert json.loads((out / ".checkpoint/state.json").read_text())["done"] == 1
    assert_same(case.run(*CELL, out=out.name), whole)


def test_a_killed_job_is_known_by_its_files(case: Case, whole):
    out = case.folder / "killed"
    assert killed(lambda: case.run(*CELL, out=out.name), solver.Solver, "solve", 9)
    gap = failure(out, set(os.listdir(out)), ["compress"])
    assert gap.status == "failed" and gap.reason.startswith(
        "compress, killed: the job was killed before it could report"
    )
    assert_same(case.run(*CELL, out=out.name), whole)


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", [flip, halve])
def test_damaged_grams(tmp_path, damage: Callable[[Path], None]):
    """The store is given up, with what says that the study has it, so that the workflow makes it again."""
    own = Case(tmp_path).prepare()
    store, pointer = own.folder / "gram", own.folder / "pointer.json"
    gram_store.point_to(store, pointer)
    damage(store / gram_store.block_file(1))
    with pytest.raises(InputError, match=r"block-001.safetensors of .*; run again to compute these Grams"):
        own.run("wanda", HALF, out="cell")
    assert not pointer.exists() and not (store / gram_store.INDEX).exists()
    assert_nothing_looks_whole(own.folder / "cell")


def test_damaged_grams_that_a_method_stumbles_over_are_not_its_fault(tmp_path):
    own = Case(tmp_path).prepare()
    store, pointer = own.folder / "gram", own.folder / "pointer.json"
    gram_store.point_to(store, pointer)
    path = store / gram_store.block_file(1)
    tensors = load_file(path)
    next(value for name, value in tensors.items() if name.endswith("/gram")).fill_(torch.nan)
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"block-001.safetensors of .* is damaged: it has changed; run again"):
        own.run("sparsegpt", HALF, out="cell")
    assert not pointer.exists() and not (store / gram_store.INDEX).exists()
    with pytest.raises(InputError, match="found damaged during this run: run again"):
        gram_store.store_of(pointer)


@pytest.mark.parametrize("damage", [lambda path: flip(path, -8), halve])
def test_damaged_tokens(tmp_path, damage: Callable[[Path], None]):
    path, drawn = tmp_path / "tokens.safetensors", np.arange(32).reshape(2, 16)
    info = {"dataset": "words", "tokens_sha256": tokens.tokens_hash(drawn)}
    save_file({"tokens": torch.from_numpy(drawn)}, path, metadata={"info": json.dumps(info)})
    assert (tokens.read_tokens(path)[0] == drawn).all()
    damage(path)
    with pytest.raises(InputError, match=r"it is now .*\.damaged; run again to make it"):
        tokens.read_tokens(path)
    assert not path.exists()


def test_a_damaged_model(case: Case, whole):
    """Whoever edits it, or a disk: what was computed with it would pass for the model of the fingerprint."""
    model, fingerprint = json.loads(case.model), case.folder / "model.json"
    check_unchanged(model, fingerprint)
    path = case.folder / "model/model.safetensors"
    with put_back(path):
        flip(path)
        with pytest.raises(
            InputError, match="is no longer the file from which .* restore it, or delete .*, and run again"
        ):
            case.run(*CELL, out="edited")
        assert_nothing_looks_whole(case.folder / "edited")
    assert_same(case.run(*CELL, out="edited"), whole)


NO_LONGER = "is no longer the file from which .* was made"


@pytest.mark.parametrize("block", [0, 1])
def test_a_model_that_is_edited_while_a_cell_is_computed(case: Case, whole, monkeypatch, capfd, block: int):
    """The block at which it is noticed does not count; those before it do."""
    own = f"edited-{block}"
    path, write_block = case.folder / "model/model.safetensors", compress.write_block

    def edited(checkpoint, index, *rest):
        write_block(checkpoint, index, *rest)
        if index == block:
            flip(path)

    monkeypatch.setattr(compress, "write_block", edited)
    with put_back(path), pytest.raises(InputError, match=NO_LONGER):
        case.run(*CELL, out=own)
    monkeypatch.undo()
    assert_nothing_looks_whole(case.folder / own)
    capfd.readouterr()
    assert_same(case.run(*CELL, out=own), whole)
    assert ("Resuming after 1 finished blocks." in capfd.readouterr().err) == (block == 1)


def test_a_model_that_is_edited_between_two_jobs(case: Case, whole, capfd):
    """What is finished waits for the model that it is of."""
    own, path = "edited between", case.folder / "model/model.safetensors"
    assert killed(lambda: case.run(*CELL, out=own), compress, "join_blocks", 0)
    blocks = sorted((case.folder / own / ".checkpoint").glob("block-*"))
    with put_back(path):
        flip(path)
        with pytest.raises(InputError, match=NO_LONGER):
            case.run(*CELL, out=own)
    assert blocks and sorted((case.folder / own / ".checkpoint").glob("block-*")) == blocks
    assert "Going on" not in capfd.readouterr().err
    assert_same(case.run(*CELL, out=own), whole)
    assert "Resuming after 2 finished blocks." in capfd.readouterr().err


def test_a_method_that_stumbles_over_an_edited_model_is_not_named(case: Case, monkeypatch):
    path = case.folder / "model/model.safetensors"

    def stumble(*_):
        flip(path)
        raise InputError("The method failed.")

    monkeypatch.setattr(compress, "write_block", stumble)
    with put_back(path), pytest.raises(InputError, match=NO_LONGER):
        case.run(*CELL, out="edited")


def test_a_model_that_is_edited_during_a_calibration(case: Case, monkeypatch):
    path, stores = case.folder / "model/model.safetensors", case.folder / "stores"
    save = calibrate.save_file
    monkeypatch.setenv("LAYERWISE_CACHE", str(stores))
    given = {
        "model": case.model,
        "fingerprint": case.folder / "model.json",
        "tokens": case.folder / "tokens.safetensors",
    }
    given |= {"out": case.folder / "own.json"}
    arguments = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(calibrate, "save_file", lambda *args: (save(*args), flip(path)))
    with put_back(path), pytest.raises(InputError, match=NO_LONGER):
        calibrate.main(arguments)
    assert not list(stores.iterdir()) and not (case.folder / "own.json").exists()
    monkeypatch.setattr(calibrate, "save_file", save)
    calibrate.main(arguments)
    assert (case.folder / "own.json").is_file()


def test_a_fingerprint_that_is_gone_is_one_sentence(case: Case, tmp_path):
    with pytest.raises(InputError, match=r"gone\.json, the fingerprint of this job's model, no longer exists"):
        check_unchanged(json.loads(case.model), tmp_path / "gone.json")


def test_a_clock_that_was_set_back_has_a_model_hashed_once_in_a_job(case: Case, monkeypatch):
    """The files' changes stay later than a fingerprint that cannot be touched."""
    model, fingerprint = json.loads(case.model), case.folder / "model.json"
    path, hashed = case.folder / "model/config.json", []
    newest = max(file.stat().st_ctime_ns for file in path.parent.iterdir())
    while fingerprint.stat().st_ctime_ns <= newest:  # tests before this one wrote to the model; a clock tick is coarse
        time.sleep(0.01)
        os.utime(fingerprint)
    monkeypatch.setattr("layerwise.sources.fingerprint.os.utime", lambda *_, **__: None)
    monkeypatch.setattr("layerwise.sources.fingerprint.sha256", lambda path: hashed.append(path) or sha256(path))
    path.write_bytes(path.read_bytes())
    for _ in range(3):
        check_unchanged(model, fingerprint)
    assert hashed == [path]


def test_a_model_that_is_copied_again_is_hashed_once(case: Case, monkeypatch):
    model, fingerprint = json.loads(case.model), case.folder / "model.json"
    path, at = case.folder / "model/config.json", fingerprint.stat().st_mtime_ns
    path.write_bytes(path.read_bytes())
    time.sleep(0.05)  # a tick of the file system's clock
    check_unchanged(model, fingerprint)
    monkeypatch.setattr("layerwise.sources.fingerprint.sha256", lambda path: pytest.fail("it was hashed again"))
    check_unchanged(model, fingerprint)
    assert fingerprint.stat().st_mtime_ns == at


@pytest.mark.parametrize("damage", [flip, halve])
def test_damaged_weights_of_a_cell(case: Case, damage: Callable[[Path], None]):
    path = case.run("magnitude", HALF, out=f"weights {damage.__name__}") / "weights.safetensors"
    check_weights(path)
    damage(path)
    with pytest.raises(InputError, match="has changed since it was written; it is now .*; run again"):
        check_weights(path)
    assert not path.exists()


@pytest.mark.parametrize("damage", [flip, halve])
def test_a_damaged_block_of_a_checkpoint_starts_over(case: Case, whole, capfd, damage: Callable[[Path], None]):
    out = case.folder / f"checkpoint {damage.__name__}"
    assert killed(lambda: case.run(*CELL, out=out.name), compress, "join_blocks", 0)
    damage(out / ".checkpoint/block-000.safetensors")
    assert_same(case.run(*CELL, out=out.name), whole)
    assert "block-000.safetensors is damaged: starting over." in capfd.readouterr().err


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink])
def test_damaged_states_of_a_checkpoint_start_over(case: Case, capfd, damage: Callable[[Path], None]):
    cell = ("wanda", HALF, "sequential")
    out, whole = case.folder / f"states {damage.__name__}", case.run(*cell, out="states whole")
    assert killed(lambda: case.run(*cell, out=out.name), solver.Solver, "solve", 9)
    damage(out / ".checkpoint/inputs-001.bin")
    assert_same(case.run(*cell, out=out.name), whole)
    assert "inputs-001.bin is damaged: starting over." in capfd.readouterr().err


@pytest.mark.parametrize("place", [0, 0.25, 0.5])
def test_a_bit_of_a_table_is_missed(tmp_path, place: float):
    """By the checksums of its pages, which are before the description at its end."""
    path, data = tmp_path / "bounds.parquet", pa.table({"value": np.random.default_rng(0).random(4000)})
    write_parquet(data, path)
    assert read_parquet(path).equals(data)
    flip(path, int(200 + place * path.stat().st_size))
    with pytest.raises(
        InputError, match="bounds.parquet cannot be used: .*; it is now .*damaged; run again to make it"
    ):
        read_bounds(path)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b'{"store": "resul', b"\xff\xfe{}"])
def test_a_small_file_of_the_workflow_that_is_cut_off(tmp_path, content: bytes):
    path = tmp_path / "gram.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="gram.json is damaged: it is now .*gram.json.damaged; run again"):
        gram_store.named(path)
    assert not path.exists()
    path.write_text('{"store": "results/grams/a"}')
    assert read_made(path) == {"store": "results/grams/a"}


def test_a_text_that_is_cut_off(tmp_path):
    path = tmp_path / "text.parquet"
    write_parquet(pa.table({"text": ["words"] * 100}), path)
    halve(path)
    with pytest.raises(InputError, match=f"{path} cannot be read: "):
        documents({"path": str(path)})


# ------------------------------------------------------------------------------------------------------------- clocks


def test_no_duration_is_taken_from_a_clock_that_may_be_set():
    root = ROOT
    own = [path for part in ("methods", "allocators", "layerwise") for path in (root / part).rglob("*.py")]
    wall = re.compile(r"\btime\.time(_ns)?\(|datetime\.now|utcnow|from time import .*\btime\b")
    assert len(own) > 50 and [path.name for path in own if wall.search(path.read_text("utf-8"))] == []
