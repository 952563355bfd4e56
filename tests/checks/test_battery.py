"""The battery on a file: a mistake is named with its promise, layer and how to repeat it; what is no method, too."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from layerwise.checks import battery, layer_cases, template
from layerwise.checks.case import Finding
from layerwise.checks.report import BROKEN, KEPT, KNOWN, NOTE, NOTHING, Report
from layerwise.contract.import_closure import METHODS
from layerwise.runtime.errors import InputError
from layerwise.runtime.project import PACKAGE

RESULT = "        return ops.pruned(layer, importance, target)\n"
# mistake: (what the template's last line becomes, the check, the layer, part of what was expected, part of what came)
MISTAKES = {
    "one kept weight too many": (
        """        result = ops.pruned(layer, importance, target)
        result.mask[0, int((~result.mask[0]).nonzero()[0])] = True
        return ops.masked(layer, result.mask, target)
""",
        ("2 pattern", "correlated", "row 0 must have 32 pruned entries", "31"),
    ),
    "writes into its input": (
        """        result = ops.pruned(layer, importance, target)
        layer.weight.mul_(result.mask)
        return result
""",
        ("1 inputs untouched", "correlated", "the weight must be left unchanged", "a changed weight"),
    ),
    "uses a global generator": (
        "        return ops.pruned(layer, importance * torch.rand(layer.weight.shape), target)\n",
        ("4 deterministic", "correlated", "torch's global generator must be left alone", "a changed state"),
    ),
    "returns float64": (
        """        result = ops.pruned(layer, importance, target)
        return Compressed(result.weight.double(), result.mask)
""",
        ("1 tensors", "correlated", "the weight's dtype must be torch.float32", "torch.float64"),
    ),
    "divides by a dead input": (
        """        result = ops.pruned(layer, importance, target)
        norm = layer.gram.diagonal.sqrt()
        return Compressed(result.weight * norm / norm, result.mask)
""",
        ("6 hard layers", "dead inputs", "the weight must be finite", "NaN"),
    ),
    "forgets the mask": (
        "        return Compressed(ops.pruned(layer, importance, target).weight)\n",
        ("1 tensors", "correlated", "a pruned layer must have a mask", "None"),
    ),
    "returns a tensor": (
        "        return ops.pruned(layer, importance, target).weight\n",
        ("1 tensors", "correlated", "a method's result must be a Compressed", "Tensor"),
    ),
    "raises": (
        "        return ops.pruned(layer, importance.reshape(3, 5), target)\n",
        ("1 tensors", "correlated", "compress must return a result", "RuntimeError in line"),
    ),
}


def written(folder: Path) -> Path:
    """The template, of one pattern alone, which is sooner checked."""
    path = template.write("mine", folder)
    path.write_text(path.read_text().replace('["row", "layer", "n:m", "1xb"]', '["row"]'))
    return path


def edited(folder: Path, old: str, new: str) -> Path:
    path = written(folder)
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))
    return path


def broken(report: Report) -> dict[str, str]:
    return {row.promise: row.layer for row in report.first(BROKEN)}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_promise_and_layer(mistake: str, tmp_path: Path):
    change, (promise, layer, expected, came) = MISTAKES[mistake]
    report = battery.check_file(edited(tmp_path, RESULT, change), quick=True)
    assert not report.ok
    first = {row.promise: row for row in report.first(BROKEN)}[promise]
    assert (first.layer, first.target) == (layer, "50% row")
    assert expected in first.expected and came in first.came
    assert first.sentence == f"{layer}: {first.expected}. Got {first.came} instead."
    text = report.render()
    assert f'Promise {promise} is broken by mine at 50% row on the layer "{layer}"' in text
    assert f"Expected:  {first.expected}." in text and f"Got:       {first.came}." in text


def test_the_three_lines_repeat_the_breach(tmp_path: Path):
    change, (promise, *_) = MISTAKES["one kept weight too many"]
    text = battery.check_file(edited(tmp_path, RESULT, change), quick=True).render()
    lines = text[text.index(f"Promise {promise}") :].partition("To repeat:\n")[2].splitlines()[:3]
    with pytest.raises(Finding, match=r"row 0 must have 32 pruned entries. Got 31 instead\."):
        exec("\n".join(line.strip() for line in lines))


def test_an_edited_file_is_read_again(tmp_path: Path):
    """In one process, such as a notebook's."""
    path = edited(tmp_path, RESULT, "        return Compressed(layer.weight)\n")
    assert not battery.check_file(path, quick=True).ok
    path.write_text(path.read_text().replace("Compressed(layer.weight)\n", "ops.pruned(layer, importance, target)\n"))
    assert battery.check_file(path, quick=True).ok


def test_the_values_that_a_card_lists_are_tried(tmp_path: Path):
    parameters = """    "parameters": {
        "double": {"type": "boolean"},
        "way": {"enum": ["sum", "crash"]},
"""
    fields = '    double: bool = False\n    way: str = "sum"\n    power'
    path = edited(tmp_path, '    "parameters": {  # a JSON Schema of each field below\n', parameters)
    text = path.read_text().replace("    power", fields, 1)
    path.write_text(text.replace(RESULT, f'        assert self.way == "sum", "no way"\n{RESULT}'))
    report = battery.check_file(path)
    assert {row.method for row in report.rows} == {"mine", "mine(double=True)", "mine(way=crash)"}
    assert {row.method for row in report.rows if not row.ok} == {"mine(way=crash)"}
    assert "battery.case_at(" in report.render() and "{'way': 'crash'}" in report.render()
    assert {row.method for row in battery.check_file(path, quick=True).rows} == {"mine"}


CHECKS = """    "checks": {
        "defaults": {"power": 0.5},
        "variants": [{"power": 0.25}],
        "known_failures": {"PROMISE": {"targets": ["70% row"], "reason": "it is no loss"}},
    },
    "parameters": {"""


def test_a_card_says_what_is_tried(tmp_path: Path):
    """A known failure is one of what represents the defaults alone; of a variant it is worth a note."""
    report = battery.check_file(edited(tmp_path, '    "parameters": {', CHECKS.replace("PROMISE", "9 brute force")))
    assert {row.method for row in report.rows} == {"mine(power=0.5)", "mine(power=0.25)"}
    found = {
        status: {(row.method, row.target) for row in report.rows if row.status == status} for status in (KNOWN, NOTE)
    }
    assert found[KNOWN] == {("mine(power=0.5)", "70% row")} and ("mine(power=0.25)", "70% row") in found[NOTE]


def test_no_promise_but_the_ninth_may_be_known_to_fail(tmp_path: Path):
    path = edited(tmp_path, '    "parameters": {', CHECKS.replace("PROMISE", "2 pattern"))
    with pytest.raises(InputError, match="known_failures'] is wrong: '2 pattern' does not match"):
        battery.check_file(path)


def test_widths_that_no_usual_target_has_are_checked(tmp_path: Path):
    """Or else a method of 8 bits alone would pass unseen."""
    path = edited(tmp_path, '["row"],', '["row", "dense"],')
    path.write_text(path.read_text().replace('"bits": [],', '"bits": [8],'))
    report = battery.check_file(path, quick=True)
    assert broken(report)["3 grid"] == "correlated"
    assert {row.target for row in report.rows if not row.ok} >= {"8b g16", "50% row 8b g16"}


def test_a_choice_that_is_not_the_best_is_noted_and_no_breach(tmp_path: Path):
    """Where G is diagonal the best mask is known; a score of another kind, such as RIA's, may want another one."""
    report = battery.check_file(edited(tmp_path, "power: float = 1.0", "power: float = 0.5"))
    assert report.ok
    assert [row.promise for row in report.first(NOTE)] == ["9 brute force"]
    assert "Worth knowing, 9 brute force: mine at 70% row" in report.render()


def test_a_shipped_file_is_checked_with_its_known_failures():
    report = battery.check_file(METHODS / "ria.py", quick=True)
    assert report.ok
    assert {row.status for row in report.rows} == {KEPT, KNOWN, NOTHING}
    assert {row.target for row in report.rows if row.status == KNOWN} == {"50% row", "2:4"}


def test_a_method_beside_the_file_can_be_its_warm_start(tmp_path: Path):
    template.write("first", tmp_path)
    (tmp_path / "notes.py").write_text("CARD = {")  # no concern of this file
    path = edited(tmp_path, '    "parameters": {', '    "parameters": {\n        "start": {"format": "method"},')
    path.write_text(path.read_text().replace("    power: float", '    start: str = "first"\n    power: float'))
    assert battery.check_file(path, quick=True).ok


def test_an_optional_warm_start_may_be_absent(tmp_path: Path):
    start = '    "parameters": {\n        "start": {"format": "method", "optional": True},'
    path = edited(tmp_path, '    "parameters": {', start)
    path.write_text(path.read_text().replace("    power: float", "    start: object = None\n    power: float"))
    assert battery.check_file(path, quick=True).ok


def test_progress_is_printed(tmp_path: Path):
    told = []
    battery.check_file(written(tmp_path), quick=True, progress=lambda *now: told.append(now))
    assert [done for done, _, _ in told] == list(range(told[-1][1] + 1))
    assert told[0][2] == "mine at dense: 7 unchanged"


def test_the_caller_keeps_its_generators(tmp_path: Path):
    path = written(tmp_path)
    before = torch.get_rng_state().tolist(), np.random.get_state(legacy=False)["state"]["pos"], random.getstate()
    battery.check_file(path, quick=True)
    after = torch.get_rng_state().tolist(), np.random.get_state(legacy=False)["state"]["pos"], random.getstate()
    assert after == before


NO_METHODS = {
    "absent": (None, r"cannot be read: No such file"),
    "no Python": ("def", "is not valid Python"),
    "no card": ("x = 1", "must hold a method, with a literal CARD. Got a file without one instead"),
    "a card without a title": ("CARD = {}", "CARD must have the key title. Got nothing instead"),
}


@pytest.mark.parametrize("kind", NO_METHODS)
def test_a_value_that_is_no_method_is_one_sentence(kind: str, tmp_path: Path):
    text, sentence = NO_METHODS[kind]
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=sentence) as caught:
        battery.check_file(path)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_file_that_cannot_be_imported_is_one_sentence(tmp_path: Path):
    path = edited(tmp_path, "import torch\n", "import torch\nimport no_such_module\n")
    with pytest.raises(InputError, match=r"must make a Mine. Got ModuleNotFoundError in line 6 of mine.py .*instead\."):
        battery.check_file(path)


def test_the_name_of_a_shipped_method_is_taken(tmp_path: Path):
    path = written(tmp_path).rename(tmp_path / "wanda.py")
    with pytest.raises(InputError, match="Two files define the method wanda"):
        battery.check_file(path)


def test_an_unknown_target_is_one_sentence(tmp_path: Path):
    with pytest.raises(InputError, match="target must be one of dense, 50% row, .*. Got '40% row' instead"):
        battery.case_at(written(tmp_path), "40% row")


def test_the_battery_needs_no_test_suite():
    code = "import sys, layerwise.checks.battery, layerwise.checks.template\n"
    code += "assert not {'pytest', 'hypothesis', 'tests'} & set(sys.modules), sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*layer_cases.LAYERS, layer_cases.EQUAL, *layer_cases.SMALL_ROWS])
def test_each_call_builds_the_layer_again(name: str):
    first, second = (layer_cases.tensors(layer_cases.build(name)) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in second)
    assert all(first[key].data_ptr() != second[key].data_ptr() for key in second)
