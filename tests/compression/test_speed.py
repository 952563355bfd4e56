"""The process that measures the machine: what a trial is, and what it says of a method that fails."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from layerwise.compression import speed
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.target import Target
from tests.support.method_files import UNSOLVED

HALF = asdict(Target(0.5))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Layers of which a trial takes milliseconds."""
    monkeypatch.setattr(speed, "INPUTS", 64)
    monkeypatch.setattr(speed, "TRIED", (2, 64))


def trial(method="magnitude", target=HALF, key="a", folders=()):
    params = Catalogue().complete(method, {}, "here") if method in Catalogue() else {}
    return {"key": key, "method": method, "params": params, "target": target, "folders": list(folders)}


@pytest.fixture
def clock(monkeypatch):
    """A clock that a solution moves on by 0.5 seconds and 0.25 a row; the rows of what was solved."""
    rows, now = [], [0.0]

    def solve(self, layer):
        rows.append(len(layer.weight))
        now[0] += 0.5 + len(layer.weight) / 4
        return None, {}

    monkeypatch.setattr(speed.Solver, "solve", solve)
    monkeypatch.setattr(speed, "parts_of", lambda *given: {})
    monkeypatch.setattr(speed.time, "process_time", lambda: now[0])
    monkeypatch.setattr(speed.Catalogue, "build", lambda self, name, params: None)
    return rows


def test_a_trial_separates_rows_from_the_rest(clock, monkeypatch):
    monkeypatch.setattr(speed, "LONGEST", 1e9)
    assert speed.tried(trial()) == [64, 0.5, 0.25] and clock == list(speed.ROWS)


def test_a_slow_method_solves_no_more_rows(clock):
    """16 rows take 4.5 seconds, so that 64 would take 18."""
    assert speed.tried(trial()) == [64, 0.0, 4.5 / 16] and clock == [8, 16]


@pytest.mark.parametrize(
    ("target", "inputs"),
    [
        (Target(0.5), 64),
        (Target(bits=4, group=24), 48),
        (Target(0.5, "1x5"), 60),
        (Target(0.5, "2:4", bits=4, group=10), 60),
    ],
)
def test_a_layer_has_whole_groups(target, inputs):
    assert speed.inputs_of(target) == inputs


def test_a_method_that_fails_is_reported_and_the_next_is_tried(tmp_path):
    (tmp_path / "first.py").write_text(UNSOLVED)
    wide = asdict(Target(bits=4, group=65))
    asked = [trial("first", key="a", folders=[tmp_path]), trial("rtn", wide, "b"), trial("absent", key="c")]
    dense = trial("dense", asdict(Target()), "d")
    first, second, third, last = speed.answers({"rates": False, "seconds": 60, "trials": [*asked, dense]})
    assert first == {"key": "a", "failed": "InputError: first failed on trial: NotImplementedError: "}
    assert second == {"key": "b", "failed": "ValueError: groups of 65 inputs are larger than the layer"}
    assert third["failed"].startswith("KeyError")
    assert last["key"] == "d" and last["trial"][0] == 64 and last["trial"][2] >= 0


def test_no_trial_begins_when_the_time_is_up():
    assert list(speed.answers({"rates": False, "seconds": -1, "trials": [trial()]})) == []


def test_a_line_for_each_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "rates", lambda: {"start": 1.0})
    request, out = tmp_path / "request.json", tmp_path / "out.jsonl"
    dense = trial("dense", asdict(Target()))
    request.write_text(json.dumps({"rates": True, "seconds": 60, "trials": [dense]}))
    speed.main(["--request", str(request), "--out", str(out)])
    rates, solved = map(json.loads, out.read_text().splitlines())
    assert rates == {"rates": {"start": 1.0}} and solved["key"] == "a" and len(solved["trial"]) == 3


def test_the_operations_of_the_forward_pass_are_those_of_its_linear_layers(monkeypatch):
    counted = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w: counted.append(2 * x.shape[:-1].numel() * w.numel()) or linear(x, w)
    )
    run, operations = speed.forward_pass()
    run()
    assert sum(counted) == operations
