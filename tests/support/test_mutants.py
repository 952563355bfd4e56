"""The table of planted faults can be planted, and docs/testing.md tells of all of them that they are caught."""

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.support import mutants, time_budget
from tests.support.fork_server import ENDED_LATE, ForkServer
from tests.support.mutants import BEGIN, END, PAGE, Fault, faults, generated, verdict
from tests.support.paths import ROOT


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.fault)
def test_a_fault_can_be_planted(fault: Fault):
    assert fault.planted((ROOT / fault.file).read_text("utf-8"))


def test_every_fault_is_reported_as_caught():
    told = PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0]
    rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in told.splitlines()[2:]]
    assert [row[0] for row in rows] == [fault.fault for fault in faults()]
    for (_, file, caught), fault in zip(rows, faults(), strict=True):
        path, _, test = caught.strip("`").partition("::")
        assert file.strip("`") == fault.file and f"tests/{path}" in fault.tests.split()
        assert f"def {test}(" in (ROOT / "tests" / path).read_text("utf-8")
    assert len({fault.fault for fault in faults()}) == len(rows) >= 30


def test_a_copy_leaves_out_results_and_no_room_of_that_name():
    assert generated(str(ROOT), ["layerwise", "results", "figures", ".git"]) == {"results", "figures", ".git"}
    assert generated(str(ROOT / "layerwise"), ["results", "figures"]) == set()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[ForkServer]:
    folder, begin = tmp_path_factory.mktemp("project"), "from code_under_test import *\n\ndef test_it():\n    "
    (folder / "code_under_test.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "test_weak.py").write_text(begin + "assert double(2) == 4\n")
    (folder / "test_strong.py").write_text(begin + "assert double(3) == 6\n")
    (folder / "test_endless.py").write_text(
        "import pathlib, subprocess\n\ndef test_it():\n    child = subprocess.Popen(['sleep', '1000'])\n"
        "    pathlib.Path('child').write_text(str(child.pid))\n    child.wait()\n"
    )
    with ForkServer(folder, packages=("pytest", "hypothesis")) as running:
        yield running


def test_a_fault_that_no_test_catches_is_reported(project):
    fault = Fault("a sum for a product", "code_under_test.py", "2 * x", "2 + x", "test_weak.py")
    strong = replace(fault, tests="test_strong.py")
    assert verdict(project, strong) == "test_strong.py::test_it"
    assert verdict(project, fault) == ""
    assert verdict(project, replace(strong, then="x * 2")) == ""
    assert verdict(project, replace(strong, then="2 *")) == ""  # no test can run
    assert verdict(project, replace(strong, tests="test_absent.py")) == ""
    assert (project.folder / "code_under_test.py").read_text() == "def double(x):\n    return 2 * x\n"
    with pytest.raises(ValueError, match="should have once"):
        fault.planted("nothing of the kind")


def test_tests_that_do_not_end_are_ended_with_what_they_started(project):
    assert project.pytest(["-q", "test_endless.py"], 12)[0] == ENDED_LATE
    child = int((project.folder / "child").read_text())
    ended = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < ended:
            os.kill(child, 0)
            time.sleep(0.05)
    status, output = project.pytest(["-q", "test_strong.py"], 60)
    assert status == 0 and "1 passed" in output


def test_an_end_of_the_process_is_no_verdict(tmp_path):
    with ForkServer(tmp_path, packages=("no_such_package",)) as project, pytest.raises(RuntimeError, match="ended: 1"):
        project.pytest([], 60)


def test_no_fault_is_planted_after_the_time(monkeypatch):
    monkeypatch.setattr(mutants, "compile_loops", lambda: None)
    monkeypatch.setattr(mutants, "served_copy", lambda folder: nullcontext())
    assert mutants.judged(faults(), 2, until=time.time() - 1) == [None] * len(faults())


# --------------------------------------------------------------------------------------------- tests that have no time


def begun(end: int | None) -> bool:
    item = cast(pytest.Item, SimpleNamespace(config=SimpleNamespace(getoption=lambda name: end)))
    try:
        time_budget.pytest_runtest_setup(item)
    except pytest.skip.Exception:
        return False
    return True


def test_no_test_is_begun_after_the_time():
    now = int(time.time())
    assert begun(None) and begun(now + 60) and not begun(now - 1)


def test_files_come_by_chance_where_the_time_is_short():
    items: list[Any] = [SimpleNamespace(path=Path(f"test_{number // 3}.py"), number=number) for number in range(30)]

    def order(end: int | None) -> list[int]:
        ours = items.copy()
        config = cast(pytest.Config, SimpleNamespace(getoption=lambda name: end))
        time_budget.pytest_collection_modifyitems(config, ours)
        return [item.number for item in ours]

    assert order(None) == list(range(30)) != order(7) == order(7) != order(8)
    for first, *others in (order(7)[at : at + 3] for at in range(0, 30, 3)):
        assert others == [first + 1, first + 2]  # tests of a file follow one another as they stand
