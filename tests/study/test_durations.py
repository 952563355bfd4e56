"""How long jobs take, given how fast the machine is: against arithmetic of the model's own layers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from layerwise.models import structure
from layerwise.study import durations
from layerwise.study.durations import FORK, READ, SCORED, SOLVING, job_seconds, study_seconds
from layerwise.study.grid import plan
from layerwise.study.job_costs import CostModel, Job
from layerwise.study.speeds import Rates, Speeds, Trial, trial_key
from layerwise.study.work import JobCost, Work
from tests.support.model_families import VOCABULARY, build
from tests.support.paths import ROOT
from tests.support.typing_helpers import some
from tests.support.workflow_harness import tiny_study

RATES = Rates(start=7.0, word=3e-6, float32=2e-9, bfloat16=5e-9, float16=11e-9)
TRIAL = Trial(inputs=64, once=0.25, row=0.01)


def tiny_llama(folder, **entry: Any) -> tuple[CostModel, list[tuple[int, int]], int]:
    """The tiny study on a random Llama, the shapes (out, in) of its layers, and its width."""
    model = build("llama")
    model.save_pretrained(folder)
    own = CostModel(plan(tiny_study() | {"models": {"tiny": {"path": str(folder), **entry}}}))
    return own, [layer.shape for layer in structure.model_linears(model).values()], model.config.hidden_size


def job_of(model: CostModel, rule: str, **columns: str) -> Job:
    """The first job of a rule, of a cell with these columns."""
    return next(
        job
        for job in model.jobs()
        if job.rule == rule and (not columns or columns.items() <= dict(model.cell(job).columns).items())
    )


def seconds(model: CostModel, job: Job, speeds: Speeds) -> float:
    return job_seconds(model, job, some(model.cost(job)), speeds)


def evaluated(layers: list[tuple[int, int]], width: int, one: float = RATES.float32) -> float:
    """Seconds of the tiny study's evaluation, 4 windows of 16 tokens: its passes, two heads and the words of each."""
    tokens = 4 * 16
    passes = tokens * 2 * (sum(out * size for out, size in layers) + 2 * VOCABULARY * width)
    return passes * one + tokens * VOCABULARY * RATES.word


def test_a_cell_takes_its_start_its_evaluation_and_its_layers_by_the_trial(tmp_path):
    own, layers, width = tiny_llama(tmp_path)
    job = job_of(own, "compress", label="wanda", target="2:4", mode="shared")
    speeds = Speeds(RATES, {trial_key(own.plan, own.cell(job)): TRIAL})
    solved = 0.0
    for out, size in layers:
        once, row = (1.5, 1.5) if size < 64 else (3, 2)  # the powers that a larger layer's inputs count with
        solved += 0.25 * (size / 64) ** once + 0.01 * out * (size / 64) ** row
    assert seconds(own, job, speeds) == pytest.approx(FORK * 7 + evaluated(layers, width) + solved)


def test_a_method_that_was_not_tried_takes_what_its_card_says(tmp_path):
    own, layers, width = tiny_llama(tmp_path)
    job = job_of(own, "compress", label="wanda", target="2:4", mode="shared")
    other = job_of(own, "compress", label="magnitude", target="2:4", mode="shared")
    speeds = Speeds(RATES, {trial_key(own.plan, own.cell(other)): TRIAL})  # says nothing of wanda
    products = some(own.plan.catalogue["wanda"].cost)["products"] + SCORED
    solved = SOLVING * products * sum(2 * out * size**2 for out, size in layers) * RATES.float32
    assert seconds(own, job, speeds) == pytest.approx(FORK * 7 + evaluated(layers, width) + solved)


def test_passes_take_what_the_dtype_takes_that_they_are_computed_in(tmp_path):
    own, layers, width = tiny_llama(tmp_path, dtype="bfloat16", compute_dtype="native")
    job = job_of(own, "dense_states")
    tokens, weights = 4 * 16, sum(out * size for out, size in layers)
    assert seconds(own, job, Speeds(RATES)) == pytest.approx(FORK * 7 + 2 * tokens * weights * RATES.bfloat16)
    job = job_of(own, "gram")  # whose products are in float32
    taps = own.shape(next(iter(own.plan.models)))
    grams = tokens * some(taps).total(lambda block: sum(share * size**2 for size, share in block.taps))
    expected = FORK * 7 + 2 * tokens * weights * RATES.bfloat16 + grams * RATES.float32
    assert seconds(own, job, Speeds(RATES)) == pytest.approx(expected)


def test_sequential_cells_pass_the_calibration_twice_besides(tmp_path):
    own, layers, _ = tiny_llama(tmp_path)
    one, both = (job_of(own, "compress", label="wanda", target="2:4", mode=mode) for mode in ("shared", "sequential"))
    tokens, taps = 4 * 16, some(own.shape(next(iter(own.plan.models))))
    grams = tokens * taps.total(lambda block: sum(share * size**2 for size, share in block.taps))
    passes = 2 * tokens * 2 * sum(out * size for out, size in layers)
    more = seconds(own, both, Speeds(RATES)) - seconds(own, one, Speeds(RATES))
    assert more == pytest.approx((passes + grams) * RATES.float32)


def test_reading_an_evaluation_loads_no_torch(tmp_path):
    own, *_ = tiny_llama(tmp_path)
    assert seconds(own, job_of(own, "perplexity"), Speeds(RATES)) == READ * 7


def test_a_trial_s_law():
    """Smaller layers take more than operations say, larger ones as much: rows inputs^2, and inputs^3 without rows."""
    trial = Trial(inputs=100, once=8.0, row=2.0)
    assert trial.seconds(3, 100) == 8 + 2 * 3
    assert trial.seconds(3, 200) == 8 * 8 + 2 * 3 * 4
    assert trial.seconds(3, 25) == (8 + 2 * 3) / 8


# ------------------------------------------------------------------------------------------------------ jobs at a time


class Alone:
    """A model of whose cells none is done, whose jobs take what their costs' words say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(durations, "finished_seconds", lambda plan: {})
        monkeypatch.setattr(durations, "cell_kind", lambda cell: cell)
        monkeypatch.setattr(durations, "job_seconds", lambda model, job, cost, speeds: cost.work.words)
        self.plan, self.cell = None, lambda job: None
        self.start = 0.0  # seconds of a process that imports torch

    def seconds(self, jobs: list[tuple[str, float]], cores: int) -> float:
        costs = [(Job(rule, {}), JobCost(1, work=Work(words=taken))) for rule, taken in jobs]
        model: Any = self
        return study_seconds(model, costs, cores, Speeds(replace(RATES, start=self.start)))[0]


def test_cores_share_the_jobs(monkeypatch):
    alone = Alone(monkeypatch)
    cells = [("compress", 10.0)] * 12
    assert alone.seconds(cells, 1) == 120 and alone.seconds(cells, 2) == 60


def test_no_job_is_faster_than_on_its_own_threads_and_cells_wait_for_grams(monkeypatch):
    alone = Alone(monkeypatch)
    cells = [("compress", 10.0), ("compress", 30.0)]
    assert alone.seconds(cells, 64) == 30
    assert alone.seconds([("gram", 40.0), *cells], 64) == 40 / 4 + 30
    assert alone.seconds([("gram", 40.0), ("dense_states", 20.0), *cells], 64) == 40 / 4 + 30  # both at a time
    assert alone.seconds([("gram", 40.0), *cells], 4) == 40 / 2 + 30
    assert alone.seconds([("gram", 40.0), *cells], 2) == 40 + 30
    assert alone.seconds([("gram", 40.0), *cells, *cells, *cells], 2) == 160 / 2


def test_torch_is_imported_once_for_each_number_of_threads(monkeypatch):
    alone, cells = Alone(monkeypatch), [("compress", 10.0)] * 12
    alone.start = 6.0
    assert alone.seconds(cells, 2) == (120 + 6) / 2
    assert alone.seconds([("gram", 40.0), *cells, ("perplexity", 1.0)], 2) == (161 + 6) / 2
    assert alone.seconds([("gram", 40.0), *cells, ("perplexity", 1.0)], 4) == (161 + 2 * 6) / 4
    assert alone.seconds([("gram", 40.0), *cells], 1) == 160 + 6
    assert alone.seconds([("perplexity", 1.0)] * 2, 1) == 2 and alone.seconds([], 1) == 0


def test_rules_of_several_threads_are_those_of_the_workflow():
    files = (path.read_text("utf-8") for path in (ROOT / "workflow/rules").glob("*.smk"))
    rules = [rule for text in files for rule in re.split(r"^rule ", text, flags=re.M)[1:]]
    assert {rule.split(":")[0] for rule in rules if "    threads: MODEL_THREADS\n" in rule} == {*durations.MODEL_RULES}
    assert sum("    threads:" in rule for rule in rules) == len(durations.MODEL_RULES) + 1  # demo_model, in no study


def test_work_adds_up():
    one = Work(1, 2, 3, 4, {(5, 6): 7}, "bfloat16")
    assert one + Work(10, 20, 30, 40, {(8, 9): 1}) == replace(one, passes=11, grams=22, words=33, solving=44)
    assert one.operations == 1 + 2 + 400 * 3 + 4
