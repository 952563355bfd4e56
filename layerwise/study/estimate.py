"""The cost of a study before it starts: memory of each job, disk and time, from the config and the models' headers.

    layerwise estimate my-study.yaml

The Snakefile prints the short form before its first job, and refuses jobs that cannot fit. See docs/big-models.md.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.models import compute_dtype
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import gram_stores
from layerwise.runtime.memory import machine_memory
from layerwise.runtime.text_table import aligned
from layerwise.sources.shapes import ModelShape
from layerwise.sources.specs import ModelSpec
from layerwise.study.cell import name_of
from layerwise.study.durations import READING, study_seconds
from layerwise.study.grid import Plan
from layerwise.study.job_costs import CELL_FILES, UNKNOWN_MB, CostModel, Job
from layerwise.study.model_costs import ModelCost
from layerwise.study.speeds import Speeds, at_hand, measured
from layerwise.study.work import JobCost

# ---------------------------------------------------------------------------------------------------------- the machine


def disks(results: Path = Path("results")) -> tuple[float, float | None]:
    """Free bytes for results/ and for Gram stores; None for the stores if they are on the same disk."""
    homes = []
    for folder in (results, gram_stores()):
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        homes.append(folder)
    free = [float(shutil.disk_usage(home).free) for home in homes]
    return free[0], None if homes[0].stat().st_dev == homes[1].stat().st_dev else free[1]


# ------------------------------------------------------------------------------------------------------------ the study


@dataclass(frozen=True)
class Limits:
    """Limits in bytes. memory: for one job, None if unknown. whose: such as 'this machine has'. disk: free for
    results/. stores: free for Gram stores, None if they are on the same disk.

    given: rule -> the user's value for its jobs, which replaces the estimate; None for a value known only later.
    """

    memory: float | None
    whose: str
    disk: float
    stores: float | None = None
    given: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class JobTotals:
    """Totals of a set of jobs. largest: the job that needs most memory. disk, stores: growth of results/ and of the
    Gram stores in bytes, including transient files of running jobs. seconds: on this machine. measured: number of cells
    whose seconds come from finished cells of their kind. unknown: names of models that have not been fetched."""

    jobs: int
    largest: tuple[Job, JobCost] | None
    disk: float
    stores: float
    seconds: float
    measured: int
    unknown: tuple[str, ...]


def estimate_jobs(model: CostModel, jobs: Iterable[Job], cores: int, speeds: Speeds | None) -> JobTotals:
    """cores: threads of all jobs at a time. speeds: the machine's speeds; None, if it does not run them, gives no
    times."""
    jobs = list(jobs)
    costs = [(job, cost) for job in jobs if (cost := model.cost(job))]
    seconds, measured = study_seconds(model, costs, cores, speeds) if speeds else (0.0, 0)
    grams = [cost for job, cost in costs if job.rule == "gram"]
    stores = sum(cost.disk for cost in grams) + _largest((cost.transient for cost in grams), cores)
    disk, transient, waiting = 0.0, [], []
    for job, cost in costs:
        if job.rule == "gram":
            continue
        discarded = job.rule == "compress" and not model.plan.config["keep_weights"]
        kept = CELL_FILES if discarded else cost.disk
        disk += kept
        transient.append(cost.transient + cost.disk - kept)
        waiting.append(cost.disk - kept)  # weights kept for their readers while the next cells run
    disk += _largest(transient, cores) + _largest(waiting, cores)
    models = dict.fromkeys(job.wildcards["model"] for job in jobs if "model" in job.wildcards)
    unknown = tuple(name_of(model.plan.models[name]) for name in models if model.shape(name) is None)
    largest = max(costs, key=lambda pair: pair[1].minimum, default=None)
    return JobTotals(len(jobs), largest, disk, stores, seconds, measured, unknown)


def _largest(values: Iterable[float], count: int) -> float:
    """Sum of the `count` largest values."""
    return sum(sorted(values, reverse=True)[:count])


def limit_errors(model: CostModel, jobs: Iterable[Job], totals: JobTotals, limits: Limits) -> Iterator[str]:
    """A sentence about memory and one about disk, if the jobs need more than there is."""
    if limits.memory is not None and (largest := _beyond_memory(model, jobs, limits, limits.memory)):
        taken, job = largest
        yield (
            f"{job_title(model, job)} needs about {size(taken)} of memory, and {limits.whose} {size(limits.memory)}: "
            f"shorter sequences, dtype: bfloat16 and other methods take less. --set-resources {job.rule}:mem_mb=N "
            "replaces this estimate."
        )
    for place, taken, free in on_disks(totals, limits):
        if taken > free:
            yield (
                f"The jobs need about {size(taken)} of disk where {place}, and {size(free)} are free: make room, run "
                "in another folder (--directory), keep Gram stores elsewhere (LAYERWISE_CACHE), or run a part of the "
                "study first."
            )


def _beyond_memory(model: CostModel, jobs: Iterable[Job], limits: Limits, memory: float) -> tuple[float, Job] | None:
    """(bytes, job) of the largest job that takes more memory than there is."""
    largest: tuple[float, Job] | None = None
    for job in jobs:
        cost = model.cost(job)
        taken = limits.given.get(job.rule, cost.minimum) if cost else None
        if taken is not None and taken > memory and (largest is None or taken > largest[0]):
            largest = taken, job
    return largest


def on_disks(totals: JobTotals, limits: Limits) -> Iterator[tuple[str, float, float]]:
    """(content, bytes that the jobs take, free bytes) for each disk."""
    if limits.stores is None:
        yield "results/ is", totals.disk + totals.stores, limits.disk
    else:
        yield "results/ is", totals.disk, limits.disk
        yield "Gram stores are", totals.stores, limits.stores


# ------------------------------------------------------------------------------------------------------------- in words


def job_title(model: CostModel, job: Job) -> str:
    """A job's name in sentences."""
    title = f"{job.rule} of the model {name_of(model.plan.models[job.wildcards['model']])!r}"
    return title + (" ({label}, {target}, {mode})".format(**model.cell(job).columns) if job.rule == "compress" else "")


def size(count: float) -> str:
    """Bytes as MB, GB or TB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if count >= scale:
            return f"{count / scale:.{0 if count >= 100 * scale else 1}f} {unit}"
    return f"{count / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """A rough time in words."""
    for unit, scale in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * scale:
            return f"about {seconds / scale:.0f} {unit}"
    return "a minute or two"


def together(model: CostModel, planned: Iterable[Any], cores: int, memory: float) -> str | None:
    """A sentence if the jobs that run at a time on this many cores may need more memory than there is.

    planned: Snakemake's jobs, with `rule`, `wildcards_dict` and `threads`.
    """
    costs = [(model.cost(Job(job.rule.name, job.wildcards_dict)), job.threads) for job in planned]
    most, left = 0.0, cores
    for minimum, threads in sorted(((cost.minimum, threads) for cost, threads in costs if cost), reverse=True):
        if threads <= left:
            most, left = most + minimum, left - threads
    if most <= memory:
        return None
    return (
        f"Jobs that run at the same time on {cores} cores may need {size(most)} of memory, and this machine has "
        f"{size(memory)}: with --resources mem_mb={memory / 1e6:.0f} they wait for each other."
    )


def computed_wider(model: CostModel, jobs: Iterable[Job]) -> list[str]:
    """A sentence for each model whose dtype is slow on the processor, so that jobs compute in another one."""
    found: dict[str, None] = {}
    for job in jobs:
        if job.rule not in ("gram", "dense_states", "compress", *READING):
            continue
        spec, calib = model.plan.models[job.wildcards["model"]], job.wildcards.get("calib")
        own = model.plan.calibrations[calib].get("dtype") if calib and job.rule in ("gram", "compress") else None
        for entry in (spec, compute_dtype.at(spec, own)):
            computed = model.computed(entry, job.rule)
            if computed not in (None, entry.get("dtype")) and compute_dtype.KEY not in entry:
                found[
                    f"Forward passes of the model {name_of(spec)!r} are computed in {computed}, from weights rounded "
                    f"to {entry.get('dtype')}: matrix products in that dtype take more than {compute_dtype.RATIO:g} "
                    f"times as long on this processor."
                ] = None
    return list(found)


def short(model: CostModel, totals: JobTotals, limits: Limits, timed: bool = True) -> str:
    """The lines that a run prints before its first job. timed: whether it runs on this machine."""
    parts = []
    if totals.largest:
        job, cost = totals.largest
        most = f" of {size(limits.memory)}" if limits.memory else ""
        parts.append(f"{size(cost.minimum)}{most} of memory, for {job_title(model, job)}")
        parts += [
            f"{size(taken)} of {size(free)} of disk where {place}" for place, taken, free in on_disks(totals, limits)
        ]
        parts += [f"{duration(totals.seconds)}, roughly"] if timed else []
    if totals.unknown:
        parts.append(f"unknown until fetched: {', '.join(totals.unknown)}")
    return "Estimate: " + "; ".join(parts) + "."


def about(spec: ModelSpec, shape: ModelShape | None) -> str:
    """A line about a model."""
    if shape is None:
        return f"{name_of(spec)}: unknown until fetched; its jobs ask for {size(UNKNOWN_MB * 1e6)} of memory"
    model, (out, inputs), gram = ModelCost.of(spec, shape), shape.largest_layer, shape.largest_gram
    source = "" if shape.fetched else " (by its config.json)"
    return (
        f"{name_of(spec)}: {shape.parameters / 1e6:,.0f} M parameters{source}, {size(model.whole)} when run; "
        f"{shape.depth} blocks of {size(model.size * model.block)} at most; hidden size {shape.hidden}; largest layer "
        f"{out} x {inputs}, largest Gram {gram} x {gram} ({size(4 * gram**2)})"
    )


def fetching(named: str) -> str:
    """The command that fetches the models of a study and runs no other job. named: the study's name or file."""
    return f"`{shlex.join(['layerwise', 'run', named, '--until', 'model'])}`"


def table(model: CostModel, jobs: Iterable[Job]) -> list[str]:
    """A line per kind of job: the number of jobs, and the largest requested memory, least memory, lasting disk space
    and transient disk space of one job. No lines if no job's cost is known."""
    kinds: dict[tuple[str, str], list[JobCost]] = {}
    for job in jobs:
        if cost := model.cost(job):
            name = name_of(model.plan.models[job.wildcards["model"]])
            detail = ": {label}, {mode}".format(**model.cell(job).columns) if job.rule == "compress" else ""
            kinds.setdefault((name, f"{job.rule}{detail}"), []).append(cost)
    if not kinds:
        return []
    lines = [["model", "job", "jobs", "memory", "at least", "disk", "meanwhile"]]
    for (name, kind), costs in kinds.items():
        columns = (
            [cost.memory for cost in costs],
            [cost.minimum for cost in costs],
            [cost.disk for cost in costs],
            [cost.transient for cost in costs],
        )
        lines.append([name, kind, str(len(costs)), *(size(max(column)) for column in columns)])
    return aligned(lines, right=range(2, 7))


@dataclass(frozen=True)
class Estimate:
    """The cost of a study. lines: the text to print. exceeded: a sentence for each exceeded limit of the machine."""

    lines: list[str]
    exceeded: list[str]


def estimate(
    study: Plan, cores: int, memory: float | None = None, quick: bool = False, named: str = "STUDY"
) -> Estimate:
    """The cost of the study on this machine.

    named: the study's name or file, for the command that fetches its models. cores: jobs at a time. memory: bytes of
    the machine that will run it (default: this one's). quick: measure only a matrix product. Otherwise unknown speeds
    of this machine and of the study's methods are measured and stored. Raises InputError for fewer than one core, and
    for a memory that is not a number above 0.
    """
    if cores < 1:
        raise InputError(f"--cores must be at least 1. Got {cores} instead.")
    if memory is not None and not 0 < memory < math.inf:
        raise InputError(f"--mem-mb must be a number above 0. Got {memory / 1e6:g} instead.")
    model = CostModel(study)
    jobs = list(model.jobs())
    limit, whose = (memory, "--mem-mb gives") if memory is not None else (machine_memory(), "this machine has")
    limits = Limits(limit, whose, *disks())
    timed = any(model.shape(name) for name in study.models)  # otherwise there is no time to print
    speeds = measured(study) if timed and not quick else at_hand()
    totals = estimate_jobs(model, jobs, cores, speeds)
    lines = [about(spec, model.shape(name)) for name, spec in study.models.items()]
    if costs := table(model, jobs):
        lines += ["", *costs]
    lines += ["", short(model, totals, limits)]
    if totals.unknown:
        lines.append(f"{fetching(named)} fetches {' and '.join(totals.unknown)}; then estimate again.")
    lines += [*speeds.said, *computed_wider(model, jobs)]
    if totals.measured:
        lines.append(f"The time of {totals.measured} cells is taken from finished cells of their kind in this folder.")
    return Estimate(lines, list(limit_errors(model, jobs, totals, limits)))
