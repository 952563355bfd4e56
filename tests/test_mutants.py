"""The table of planted faults can be planted, and docs/testing.md tells of all of them that they are caught."""

import pytest

from tests.mutants import BEGIN, END, PAGE, ROOT, Fault, faults, verdict


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


def test_a_fault_that_no_test_catches_is_told(tmp_path):
    test = "from code_under_test import *\n"
    (tmp_path / "code_under_test.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_weak.py").write_text(f"{test}\ndef test_weak():\n    assert double(2) == 4\n")
    (tmp_path / "test_strong.py").write_text(f"{test}\ndef test_strong():\n    assert double(3) == 6\n")
    fault = Fault("a sum for a product", "code_under_test.py", "2 * x", "2 + x", "test_weak.py")
    assert verdict(tmp_path, Fault(**{**vars(fault), "tests": "test_strong.py"})).startswith("test_strong.py::")
    assert verdict(tmp_path, fault) == ""
    assert verdict(tmp_path, Fault(**{**vars(fault), "then": "x * 2", "tests": "test_strong.py"})) == ""
    assert verdict(tmp_path, Fault(**{**vars(fault), "then": "2 *", "tests": "test_strong.py"})) == ""
    assert (tmp_path / "code_under_test.py").read_text() == "def double(x):\n    return 2 * x\n"
    with pytest.raises(ValueError, match="should have once"):
        fault.planted("nothing of the kind")
