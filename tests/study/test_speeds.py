"""What is measured of a machine, when it is measured again, and what replaces a measurement."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerwise.study import speeds
from layerwise.study.grid import Plan, plan
from layerwise.study.speeds import Rates, Trial
from tests.support.method_files import UNSOLVED
from tests.support.workflow_harness import tiny_study

RATES = {"start": 7.0, "word": 3e-9, "float32": 2e-11, "bfloat16": 5e-11, "float16": 6e-11}


class Worker:
    """Stands for the process that measures: answers at once, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, list[str]]] = []
        self.failing: set[str] = set()
        self.fault: str | None = None

    def __call__(self, request: Any) -> tuple[list[dict[str, Any]], str | None]:
        self.asked.append((request["rates"], [trial["label"] for trial in request["trials"]]))
        if self.fault:
            return [], self.fault
        answers: list[dict[str, Any]] = [{"rates": RATES}] if request["rates"] else []
        for trial in request["trials"]:
            bad = trial["method"] in self.failing
            answers.append({"key": trial["key"], **({"failed": "ValueError: no."} if bad else {"trial": [64, 1, 2]})})
        return answers, None


@pytest.fixture
def worker(tmp_path, monkeypatch) -> Iterator[Worker]:
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "cache"))
    worker = Worker()
    monkeypatch.setattr(speeds, "ask", worker)
    forget()
    yield worker
    forget()


def forget() -> None:
    """As another process begins."""
    speeds.machine.cache_clear()
    speeds._code.cache_clear()


def study(**changes: Any) -> Plan:
    return plan(tiny_study() | {"models": {"tiny": {"path": "nowhere"}}} | changes)


def test_each_method_and_kind_of_target_is_tried_once_and_kept(worker, capsys):
    found = speeds.measured(study())
    assert "Measuring this machine and 4 methods on a small layer" in capsys.readouterr().err
    rates, labels = worker.asked[0]
    assert rates and sorted(labels) == [
        "dense, dense",
        "magnitude, 2:4",
        "wanda, 2:4",
        "wanda, 50% row",
    ]  # the magnitude's bits are skipped, and both modes are one
    assert found.rates == Rates(**RATES) and set(found.trials.values()) == {Trial(64, 1, 2)} and not found.said
    assert speeds.measured(study()) == found == speeds.at_hand() and len(worker.asked) == 1
    assert not capsys.readouterr().err


def test_another_level_of_a_kind_of_target_is_not_tried_again(worker):
    speeds.measured(study())
    speeds.measured(study(targets=[{"sparsity": 0.7, "pattern": "row"}, {"pattern": "2:4"}]))
    assert len(worker.asked) == 1
    speeds.measured(study(targets=[{"sparsity": 0.7, "pattern": "layer"}]))
    assert worker.asked[1:] == [(False, ["wanda, 70% layer"])]


def test_other_parameters_are_tried(worker):
    methods = {"sparse_swaps": None}
    speeds.measured(study(methods=methods))
    speeds.measured(study(methods={"sparse_swaps": {"swaps": 7}}))
    assert [rates for rates, _ in worker.asked] == [True, False] and len(worker.asked[1][1]) == 2


@pytest.mark.parametrize("changed", ["processor", "libraries", "code"])
def test_another_processor_library_or_code_is_measured(worker, monkeypatch, tmp_path, changed):
    first = speeds.measured(study())
    if changed == "processor":
        monkeypatch.setattr(speeds, "processor", lambda: "another")
    elif changed == "libraries":
        monkeypatch.setattr(speeds.importlib.metadata, "version", lambda name: "another")
    else:
        (tmp_path / "own.py").write_text("")
        monkeypatch.setattr(speeds, "closure", lambda modules: [tmp_path / "own.py"])
    forget()
    assert speeds.kept() == (None, {})
    assert speeds.measured(study()) == first
    assert [rates for rates, _ in worker.asked] == [True, True] and worker.asked[0] == worker.asked[1]


def test_a_method_whose_code_changes_is_tried_again_alone(worker, tmp_path):
    (tmp_path / "methods").mkdir()
    own = {"method_paths": [str(tmp_path / "methods")], "methods": {"wanda": None, "first": None}}
    for text in (UNSOLVED, UNSOLVED + "\n# another\n"):
        (tmp_path / "methods/first.py").write_text(text)
        forget()
        speeds.measured(study(**own))
    assert worker.asked[1] == (False, ["first, 50% row"])
    (request,) = [trial for trial in speeds.trials_of(study(**own)).values() if trial["method"] == "first"]
    assert request["folders"] == [str(tmp_path / "methods")]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"rates": {}}',
        "[" * 100_000,
        json.dumps({"rates": RATES, "trials": []}),
        json.dumps({"rates": RATES | {"word": -1}, "trials": {}}),
        json.dumps({"rates": RATES | {"word": None}, "trials": {}}),
        json.dumps({"rates": RATES | {"another": 1}, "trials": {}}),
        json.dumps({"rates": RATES | {"start": float("nan")}, "trials": {}}),
        json.dumps({"rates": RATES, "trials": {"a": [64, 1]}}),
        json.dumps({"rates": RATES, "trials": {"a": [0, 1, 1]}}),
        json.dumps({"rates": RATES, "trials": {"a": [64, 1, -1]}}),
        json.dumps({"rates": RATES, "trials": {"a": "640"}}),
    ],
)
def test_a_broken_file_is_measured_again(worker, content):
    whole = speeds.measured(study())
    text = speeds.store().read_text("utf-8")
    speeds.store().write_text(content)
    assert speeds.at_hand().trials == {}
    assert speeds.measured(study()) == whole and worker.asked[0] == worker.asked[1]
    assert speeds.store().read_text("utf-8") == text


def test_a_folder_that_cannot_be_written_costs_only_the_keeping(worker, monkeypatch):
    whole = speeds.measured(study())
    monkeypatch.setenv("LAYERWISE_CACHE", "/proc/layerwise")
    for _ in range(2):
        found = speeds.measured(study())
        assert (found.rates, found.trials) == (whole.rates, whole.trials)
        (sentence,) = found.said
        assert sentence.startswith(
            "The speed of this machine will be measured again next time: /proc/layerwise/speeds/"
        )
    assert len(worker.asked) == 3


def test_a_method_that_fails_counts_as_its_card_says_in_a_sentence_and_is_tried_again(worker):
    worker.failing = {"wanda"}
    found = speeds.measured(study())
    assert len(found.trials) == 2 and sorted(found.said) == [
        f"The time of wanda, {target} is estimated from its method's card: it failed on a small layer: ValueError: no."
        for target in ("2:4", "50% row")
    ]
    worker.failing = set()
    assert not speeds.measured(study()).said and worker.asked[1] == (False, ["wanda, 50% row", "wanda, 2:4"])


def test_a_product_is_timed_where_nothing_else_can_be(worker, monkeypatch):
    worker.fault = "it died"
    monkeypatch.setattr(speeds, "operation", lambda: 1e-11)
    found = speeds.measured(study())
    assert found.rates == speeds.typical(1e-11) == speeds.at_hand().rates and found.trials == {}
    assert found.said[0] == "The speed of this machine could not be measured: it died." and len(found.said) == 5
    assert not speeds.store().exists()


def test_a_product_is_timed():
    assert 1e-14 < speeds.operation(1) < 1e-8


def test_a_thread_that_waits_for_others_does_not_slow_the_product(monkeypatch):
    """On a busy machine the threads of BLAS waited for each other: a study of 84 seconds was to take an hour."""
    waited = itertools.count(60, 60)
    monkeypatch.setattr(time, "process_time", lambda: time.thread_time() + next(waited))
    assert speeds.operation(1) < 1e-8


# ------------------------------------------------------------------------------------------------- the process's faults


ASKED = {"rates": True, "trials": [], "seconds": 1.0}


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("#!/bin/sh\necho first >&2; echo 'error: no more.' >&2; exit 3\n", "error: no more"),
        ("#!/bin/sh\nexit 3\n", "the process ended with status 3"),
        ("#!/bin/sh\nexec sleep 60\n", "the process took too long"),
        (None, "no process could be started"),
    ],
)
def test_a_process_that_ends_early_is_reported(tmp_path, monkeypatch, program, fault):
    executable = tmp_path / "python"
    if program:
        executable.write_text(program)
        executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))
    monkeypatch.setattr(speeds, "PATIENCE", 1.0)
    answers, found = speeds.ask(ASKED)
    assert answers == [] and fault in str(found)


def test_kills_before_the_first_job_count(tmp_path, monkeypatch):
    executable = tmp_path / "python"
    executable.write_text(
        '#!/bin/sh\nprintf \'{"key": "a", "trial": [64, 1, 2]}\\n{"key": "b", "tr\' > "$8"\nkill -9 $$\n'
    )
    executable.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(executable))
    answers, found = speeds.ask(ASKED)
    assert answers == [{"key": "a", "trial": [64, 1, 2]}] and found == "the process ended with status -9"


# --------------------------------------------------------------------------------------------------- a real measurement


def test_the_command_measures_once(tmp_path):
    """The whole of it: the command, the process, the file."""
    from tests.support.workflow_harness import tiny_project

    folder = tiny_project(tmp_path / "project")
    command = [sys.executable, "-m", "layerwise", "estimate", "config/tiny.yaml", "--cores", "2"]
    outputs = []
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and "card says" not in done.stdout, done.stdout + done.stderr
        (file,) = Path(folder / "results/speeds").iterdir()
        outputs.append(((file.read_bytes(), file.stat().st_mtime_ns), done.stdout.splitlines()[-1].split("; ")[-1]))
    assert outputs[0] == outputs[1] and outputs[0][1].startswith("a minute or two")
    content = json.loads(outputs[0][0][0])
    assert len(content["trials"]) == 4 and 0.5 < content["rates"]["start"] < 200
