"""How long the jobs of a study take, from what they compute and how fast the machine is. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from layerwise.study.cell import Cell
from layerwise.study.cost_model import CostModel, Job
from layerwise.study.grid import Plan
from layerwise.study.speeds import Rates, Speeds, Trial, trial_key
from layerwise.study.work import JobCost

READING = ("perplexity", "zero_shot")  # rules that mostly read what a cell's first job has left (evaluation/cache.py)
READ = 0.1  # of a job's start: such a job imports no torch
# A product of a method's card takes so many times as long as its operations in a forward pass: SmolLM2's
# layers by Frank-Wolfe and SparseSwaps, on an AMD EPYC with AVX2.
SOLVING = 1.6
SCORED = 1.5  # products that the runner takes besides to verify, score and store what a method returns
THREADS = {
    "gram": 4,
    "fisher": 4,
    "dense_states": 4,
    "check_model": 4,
}  # of rules that take more than one
FIRST = ("check_model", "dense_states", "gram", "fisher", "allocate")  # rules that cells wait for
FINISHED = 3  # cells of a model, method and mode whose seconds are looked at


def study_seconds(
    model: CostModel, costs: Iterable[tuple[Job, JobCost]], cores: int, speeds: Speeds
) -> tuple[float, int]:
    """Seconds of jobs on so many cores, and of how many cells they are those of earlier cells of their kind.

    The cores share all that is to be done, but no job is faster than on its own threads, and cells wait for Grams.
    """
    finished = finished_seconds(model.plan)
    total, measured = 0.0, 0
    longest = {True: 0.0, False: 0.0}  # of the jobs that cells wait for, and of the rest
    for job, cost in costs:
        seconds = finished.get(kind_of(model.cell(job))) if job.rule == "compress" else None
        measured += seconds is not None
        if seconds is None:
            seconds = job_seconds(model, job, cost, speeds)
        total += seconds
        alone = seconds / min(THREADS.get(job.rule, 1), cores)
        longest[job.rule in FIRST] = max(longest[job.rule in FIRST], alone)
    return max(total / cores, sum(longest.values())), measured


def job_seconds(model: CostModel, job: Job, cost: JobCost, speeds: Speeds) -> float:
    """Seconds of a job on one thread."""
    rates, work = speeds.rates, cost.work
    if job.rule in READING:
        return READ * rates.start
    trial = speeds.trials.get(trial_key(model.plan, model.cell(job))) if job.rule == "compress" else None
    computed = work.passes * rates.passes(work.dtype) + work.grams * rates.float32 + work.words * rates.word
    return rates.start + computed + solving_seconds(cost, rates, trial)


def solving_seconds(cost: JobCost, rates: Rates, trial: Trial | None) -> float:
    """Seconds of a job in its method: by a trial of it, else by its card and what the runner does besides."""
    work = cost.work
    if trial:
        return sum(times * trial.seconds(*layer) for layer, times in work.layers.items())
    scored = SCORED * sum(2.0 * times * out * inputs**2 for (out, inputs), times in work.layers.items())
    return SOLVING * (work.solving + scored) * rates.float32


def kind_of(cell: Cell) -> tuple[str, str, str]:
    return cell.model, cell.spec["columns"]["label"], cell.mode


def finished_seconds(study: Plan) -> dict[tuple[str, str, str], float]:
    """(model, label, mode) -> mean seconds of some first jobs of cells of that kind that are done in this folder."""
    by_kind: dict[tuple[str, str, str], list[float]] = {}
    for cell in study.cells:
        seconds, folder = by_kind.setdefault(kind_of(cell), []), Path(cell.folder)
        if len(seconds) < FINISHED and (folder / "cell.json").is_file() and (folder / "benchmark.tsv").is_file():
            seconds.append(float((folder / "benchmark.tsv").read_text().splitlines()[1].split()[0]))
    return {kind: sum(seconds) / len(seconds) for kind, seconds in by_kind.items() if seconds}
