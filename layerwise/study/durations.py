"""Durations of a study's jobs, from their computations and the machine's speed. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from layerwise.study.cell import Cell
from layerwise.study.grid import Plan
from layerwise.study.job_costs import CostModel, Job
from layerwise.study.speeds import Rates, Speeds, Trial, trial_key
from layerwise.study.work import JobCost

READING = ("perplexity", "zero_shot")  # rules that mostly read results of a cell's first job (evaluation/cache.py)
# In units of the start of a process that imports torch:
READ = 0.1  # a job that does not import it
FORK = 0.06  # a job in a fork of a process that has imported it (cli/warm_worker.py): 0.3 s where the import took 5 s
# Time of a product on a method's card, relative to the same operations in a forward pass: measured with Frank-Wolfe and
# SparseSwaps on SmolLM2's layers, on an AMD EPYC with AVX2.
SOLVING = 1.6
SCORED = 1.5  # further products with which the runner verifies, scores and stores a result
MODEL_RULES = ("check_model", "dense_states", "gram", "fisher")  # run the dense model; all others have one thread
MOST_THREADS = 4
FIRST = (*MODEL_RULES, "allocate")  # rules that cells wait for
FINISHED = 3  # number of finished cells per model, method and mode whose seconds are averaged


def model_threads(cores: int) -> int:
    """Threads of a job that runs the dense model.

    Half of the cores: a job that needs all of them at once waits while cells, of one thread each, keep one busy, and
    the others are idle.
    """
    return min(max(cores // 2, 1), MOST_THREADS)


def study_seconds(
    model: CostModel, costs: Iterable[tuple[Job, JobCost]], cores: int, speeds: Speeds
) -> tuple[float, int]:
    """Seconds of jobs on this many cores, and the number of cells with times taken from finished cells of their kind.

    The cores share all work, but no job is faster than on its own threads, and cells wait for Grams. Jobs are forks of
    one process per number of threads, which starts with the first of them.
    """
    finished = finished_seconds(model.plan)
    total, measured, threads = 0.0, 0, set[int]()
    longest = {True: 0.0, False: 0.0}  # longest job among those that cells wait for, and among the rest
    for job, cost in costs:
        seconds = finished.get(cell_kind(model.cell(job))) if job.rule == "compress" else None
        measured += seconds is not None
        if seconds is None:
            seconds = job_seconds(model, job, cost, speeds)
        total += seconds
        used = model_threads(cores) if job.rule in MODEL_RULES else 1
        if job.rule not in READING:
            threads.add(used)
        longest[job.rule in FIRST] = max(longest[job.rule in FIRST], seconds / used)
    started = speeds.rates.start * len(threads)
    return max((total + started) / cores, sum(longest.values())), measured


def job_seconds(model: CostModel, job: Job, cost: JobCost, speeds: Speeds) -> float:
    """Seconds of a job on one thread."""
    rates, work = speeds.rates, cost.work
    if job.rule in READING:
        return READ * rates.start
    trial = speeds.trials.get(trial_key(model.plan, model.cell(job))) if job.rule == "compress" else None
    computed = work.passes * rates.passes(work.dtype) + work.grams * rates.float32 + work.words * rates.word
    return FORK * rates.start + computed + solving_seconds(cost, rates, trial)


def solving_seconds(cost: JobCost, rates: Rates, trial: Trial | None) -> float:
    """Seconds that a job spends in its method, from a trial, otherwise from its card and the runner's own work."""
    work = cost.work
    if trial:
        return sum(times * trial.seconds(*layer) for layer, times in work.layers.items())
    scored = SCORED * sum(2.0 * times * out * inputs**2 for (out, inputs), times in work.layers.items())
    return SOLVING * (work.solving + scored) * rates.float32


def cell_kind(cell: Cell) -> tuple[str, str, str]:
    return cell.model, cell.spec["columns"]["label"], cell.mode


def finished_seconds(study: Plan) -> dict[tuple[str, str, str], float]:
    """(model, label, mode) -> mean seconds of the first finished cells of this kind in this folder."""
    by_kind: dict[tuple[str, str, str], list[float]] = {}
    for cell in study.cells:
        seconds, folder = by_kind.setdefault(cell_kind(cell), []), Path(cell.folder)
        if len(seconds) < FINISHED and (folder / "cell.json").is_file() and (folder / "benchmark.tsv").is_file():
            seconds.append(float((folder / "benchmark.tsv").read_text().splitlines()[1].split()[0]))
    return {kind: sum(seconds) / len(seconds) for kind, seconds in by_kind.items() if seconds}
