"""The table of planted faults can be planted, and docs/testing.md tells of all of them that they are caught."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.mutants import BEGIN, END, PAGE, ROOT, Fault, faults, verdict
from tests.warm import ENDED_LATE, Warm


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.fault)
def test_a_fault_can_be_planted(fault: Fault):
    assert fault.planted((ROOT / fault.file).read_text("utf-8"))


def test_every_fault_is_told_as_caught():
    told = PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0]
    rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in told.splitlines()[2:]]
    assert [row[0] for row in rows] == [fault.fault for fault in faults()]
    for (_, file, caught), fault in zip(rows, faults(), strict=True):
        path, _, test = caught.strip("`").partition("::")
        assert file.strip("`") == fault.file and f"tests/{path}" in fault.tests.split()
        assert f"def {test}(" in (ROOT / "tests" / path).read_text("utf-8")
    assert len({fault.fault for fault in faults()}) == len(rows) >= 30


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Warm]:
    folder, begin = tmp_path_factory.mktemp("project"), "from code_under_test import *\n\ndef test_it():\n    "
    (folder / "code_under_test.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "test_weak.py").write_text(begin + "assert double(2) == 4\n")
    (folder / "test_strong.py").write_text(begin + "assert double(3) == 6\n")
    (folder / "test_endless.py").write_text("def test_it():\n    while True:\n        pass\n")
    with Warm(folder, packages=("pytest", "hypothesis")) as running:
        yield running


def test_a_fault_that_no_test_catches_is_told(project):
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


def test_tests_that_do_not_end_are_ended(project):
    assert project.pytest(["-q", "test_endless.py"], 0.5)[0] == ENDED_LATE
    status, output = project.pytest(["-q", "test_strong.py"], 60)
    assert status == 0 and "1 passed" in output
