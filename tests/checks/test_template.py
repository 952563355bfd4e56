"""The file of a new method keeps the contract as it stands, and a name that will not do is one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from layerwise.checks import battery, template
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.import_closure import METHODS
from layerwise.runtime.errors import InputError


def test_the_new_file_passes_the_whole_contract(tmp_path: Path):
    path = template.write("power_norm", tmp_path)
    assert path == tmp_path / "power_norm.py"
    report = battery.check_file(path)
    assert report.ok, report.render()
    assert len({row.promise for row in report.rows}) >= 13  # none but that of the grid has nothing to look at
    assert "power_norm keeps its contract" in report.render()


def test_the_new_file_is_a_method_of_its_folder(tmp_path: Path):
    template.write("power_norm", tmp_path)
    entry = Catalogue([tmp_path])["power_norm"]
    assert (entry.class_name, entry.card["title"], dict(entry.defaults)) == ("PowerNorm", "Power norm", {"power": 1.0})


def test_the_new_file_is_in_style(tmp_path: Path):
    path = template.write("power_norm", tmp_path)
    for command in (["check"], ["format", "--check"]):
        call = [sys.executable, "-m", "ruff", *command, "--config", str(METHODS.parent / "pyproject.toml"), str(path)]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["Power", "2nd", "my-method", "", "for", "a/b", "../up", "näher", "power.py"])
def test_a_name_that_is_no_identifier(name: str, tmp_path: Path):
    with pytest.raises(InputError, match="The name of a method must be a Python identifier") as caught:
        template.write(name, tmp_path)
    assert str(caught.value).endswith(f"Got {name!r} instead.")
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_shipped_method(tmp_path: Path):
    with pytest.raises(InputError, match="Got 'wanda' instead, which is a shipped method"):
        template.write("wanda", tmp_path)


@pytest.mark.parametrize("name", ["torch", "json"])
def test_the_name_of_a_package(name: str, tmp_path: Path):
    with pytest.raises(InputError, match=f"Got '{name}' instead, which is a Python package"):
        template.write(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_of_what_the_file_imports(tmp_path: Path):
    path = template.write("layer", tmp_path)
    assert "class MyLayer(Method):" in path.read_text()
    assert battery.case_at(path, "50% row").entry.class_name == "MyLayer"


def test_a_file_is_not_overwritten(tmp_path: Path):
    path = template.write("mine", tmp_path)
    path.write_text("x = 1\n")
    with pytest.raises(InputError, match=r"mine\.py must not exist yet"):
        template.write("mine", tmp_path)
    assert path.read_text() == "x = 1\n"


def test_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="cannot be written: no such file or directory"):
        template.write("mine", tmp_path / "absent")
