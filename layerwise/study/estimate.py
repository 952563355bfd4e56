"""What a study takes before it starts: memory of each job, disk and time, from its config and its models' headers.

    layerwise estimate my-study.yaml

The Snakefile prints the short form before its first job, and refuses what cannot fit. docs/big-models.md explains it.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.files import gram_stores
from layerwise.runtime.memory import machine_memory
from layerwise.sources.shapes import Shape
from layerwise.study.cost_model import CELL_FILES, UNKNOWN_MB, Job, Model, Need, Needs
from layerwise.study.grid import Cell, Plan

STARTUP = 6.0  # seconds of a job besides its work
BELOW_PEAK = 3.0  # times as long as products of large matrices take for as many operations
FINISHED = 3  # cells of a model, method and mode whose seconds are looked at
EVALUATE = ("perplexity", "zero_shot")  # rules that mostly read what a cell's first job has left (recall.py)

# ---------------------------------------------------------------------------------------------------------- the machine


def disks(results: Path = Path("results")) -> tuple[float, float | None]:
    """Bytes that are free for results/ and for Gram stores, None for these where they are on the same disk."""
    homes = []
    for folder in (results, gram_stores()):
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        homes.append(folder)
    free = [float(shutil.disk_usage(home).free) for home in homes]
    return free[0], None if homes[0].stat().st_dev == homes[1].stat().st_dev else free[1]


def operations_per_second(rounds: int = 5) -> float:
    """That this machine reaches in products of float32 matrices, on the threads that numpy takes; in milliseconds."""
    import numpy as np

    matrix, seconds = np.ones((768, 768), np.float32), math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        matrix @ matrix
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * len(matrix) ** 3 / seconds


# ------------------------------------------------------------------------------------------------------------ the study


@dataclass(frozen=True)
class Limits:
    """Bytes. memory: of one job, None where nothing says. whose: such as 'this machine has'. disk: free for results/.
    stores: free for Gram stores, None where they are on the same disk.

    given: rule -> what the user says its jobs take, in the place of the estimate; None for what is known only later.
    """

    memory: float | None
    whose: str
    disk: float
    stores: float | None = None
    given: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Total:
    """Of a set of jobs. largest: the one that needs most memory. disk, stores: bytes that results/ and the folder of
    Gram stores grow by, with what passes while jobs run. seconds: on this machine. measured: cells whose seconds are
    those of earlier ones of their kind. unknown: names of models that have not been fetched."""

    jobs: int
    largest: tuple[Job, Need] | None
    disk: float
    stores: float
    seconds: float
    measured: int
    unknown: tuple[str, ...]


def total(needs: Needs, jobs: Iterable[Job], cores: int, rate: float) -> Total:
    """cores: jobs at a time. rate: operations per second of the machine."""
    jobs, told = list(jobs), finished_seconds(needs.plan)
    taking = [(job, need) for job in jobs if (need := needs.need(job))]
    seconds, disk, stores, measured, running, waiting, stored = 0.0, 0.0, 0.0, 0, [], [], []
    for job, need in taking:
        own = told.get(kind_of(needs.cell(job))) if job.rule == "compress" else None
        measured += own is not None
        work = 0.0 if job.rule in EVALUATE else need.work
        seconds += own / cores if own is not None else STARTUP / cores + BELOW_PEAK * work / rate
        if job.rule == "gram":
            stores += need.disk
            stored.append(need.passing)
            continue
        stays = need.disk
        if job.rule == "compress" and not needs.plan.config["keep_weights"]:
            stays = CELL_FILES
        disk += stays
        running.append(need.passing + need.disk - stays)
        waiting.append(need.disk - stays)  # weights for those who read them, while the next cells run
    disk += sum(sum(sorted(own, reverse=True)[:cores]) for own in (running, waiting))
    stores += sum(sorted(stored, reverse=True)[:cores])
    models = dict.fromkeys(job.wildcards["model"] for job in jobs if "model" in job.wildcards)
    unknown = tuple(needs.plan.models[model]["name"] for model in models if needs.shape(model) is None)
    largest = max(taking, key=lambda one: one[1].least, default=None)
    return Total(len(jobs), largest, disk, stores, seconds, measured, unknown)


def kind_of(cell: Cell) -> tuple[str, str, str]:
    return cell.model, cell.spec["columns"]["label"], cell.mode


def finished_seconds(study: Plan) -> dict[tuple[str, str, str], float]:
    """(model, label, mode) -> mean seconds of some first jobs of cells of that kind that are done in this folder."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for cell in study.cells:
        own, folder = found.setdefault(kind_of(cell), []), Path(cell.folder)
        if len(own) < FINISHED and (folder / "cell.json").is_file() and (folder / "benchmark.tsv").is_file():
            own.append(float((folder / "benchmark.tsv").read_text().splitlines()[1].split()[0]))
    return {kind: sum(own) / len(own) for kind, own in found.items() if own}


def refusals(needs: Needs, jobs: Iterable[Job], found: Total, limits: Limits) -> Iterator[str]:
    """A sentence for memory and for disk if the jobs cannot have what they take."""
    worst: tuple[float, Job] | None = None
    for job in jobs if limits.memory is not None else ():
        need = needs.need(job)
        taken = limits.given.get(job.rule, need.least) if need else None
        if taken is not None and taken > limits.memory and (worst is None or taken > worst[0]):
            worst = taken, job
    if worst:
        taken, job = worst
        yield (
            f"{described(needs, job)} needs about {size(taken)} of memory, and {limits.whose} {size(limits.memory)}: "
            f"docs/big-models.md says what takes less, and --set-resources {job.rule}:mem_mb=N puts a figure of yours "
            "in the place of this estimate."
        )
    for place, taken, free in on_disks(found, limits):
        if taken > free:
            yield (
                f"The jobs need about {size(taken)} of disk where {place}, and {size(free)} are free: make room, run "
                "in another folder (--directory), keep Gram stores elsewhere (LAYERWISE_CACHE), or run a part of the "
                "study first."
            )


def on_disks(found: Total, limits: Limits) -> Iterator[tuple[str, float, float]]:
    """(what is there, bytes that the jobs take, bytes that are free) of each disk."""
    if limits.stores is None:
        yield "results/ is", found.disk + found.stores, limits.disk
    else:
        yield "results/ is", found.disk, limits.disk
        yield "Gram stores are", found.stores, limits.stores


# ------------------------------------------------------------------------------------------------------------- in words


def described(needs: Needs, job: Job) -> str:
    """How a sentence calls a job."""
    of = f"{job.rule} of the model {needs.plan.models[job.wildcards['model']]['name']!r}"
    return of + (" ({label}, {target}, {mode})".format(**needs.cell(job).columns) if job.rule == "compress" else "")


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
            return f"some {seconds / scale:.0f} {unit}"
    return "a minute or two"


def together(needs: Needs, planned: Iterable[Any], cores: int, memory: float) -> str | None:
    """A sentence where the jobs that so many cores run at a time may need more memory than there is.

    planned: Snakemake's jobs, with `rule`, `wildcards_dict` and `threads`.
    """
    taking = [(needs.need(Job(job.rule.name, job.wildcards_dict)), job.threads) for job in planned]
    each = sorted(((need.least, threads) for need, threads in taking if need), reverse=True)
    most, left = 0.0, cores
    for least, threads in each:
        if threads <= left:
            most, left = most + least, left - threads
    if most <= memory:
        return None
    return (
        f"{cores} cores run jobs at a time that may need {size(most)} of memory, and this machine has {size(memory)}: "
        f"with --resources mem_mb={memory / 1e6:.0f} they wait for each other."
    )


def short(needs: Needs, found: Total, limits: Limits, timed: bool = True) -> str:
    """What a run prints before its first job; timed: whether it runs on this machine."""
    parts = []
    if found.largest:
        job, need = found.largest
        most = f" of {size(limits.memory)}" if limits.memory else ""
        parts.append(f"{size(need.least)}{most} of memory, for {described(needs, job)}")
        parts += [
            f"{size(taken)} of {size(free)} of disk where {place}" for place, taken, free in on_disks(found, limits)
        ]
        parts += [f"{duration(found.seconds)}, roughly"] if timed else []
    if found.unknown:
        parts.append(f"unknown until fetched: {', '.join(found.unknown)}")
    return "Estimate: " + "; ".join(parts) + "."


def about(spec: Mapping[str, Any], shape: Shape | None) -> str:
    """A line about a model."""
    if shape is None:
        return f"{spec['name']}: unknown until fetched; its jobs ask for {size(UNKNOWN_MB * 1e6)} of memory"
    model, (out, inputs), gram = Model.of(spec, shape), shape.largest_layer, shape.largest_gram
    source = "" if shape.fetched else " (by its config.json)"
    return (
        f"{spec['name']}: {shape.parameters / 1e6:,.0f} M parameters{source}, {size(model.whole)} as they are run; "
        f"{shape.depth} blocks of {size(model.size * model.block)} at most; hidden size {shape.hidden}; largest layer "
        f"{out} x {inputs}, largest Gram {gram} x {gram} ({size(4 * gram**2)})"
    )


def table(needs: Needs, jobs: Iterable[Job]) -> list[str]:
    """A line per kind of job: how many, and the most that one asks for and needs at least of memory, and takes of disk
    for good and meanwhile."""
    kinds: dict[tuple[str, str], list[Need]] = {}
    for job in jobs:
        if need := needs.need(job):
            name = needs.plan.models[job.wildcards["model"]]["name"]
            detail = ": {label}, {mode}".format(**needs.cell(job).columns) if job.rule == "compress" else ""
            kinds.setdefault((name, f"{job.rule}{detail}"), []).append(need)
    lines = [("model", "job", "jobs", "memory", "at least", "disk", "meanwhile")]
    for (name, kind), own in kinds.items():
        most = [size(max(getattr(need, what) for need in own)) for what in ("memory", "least", "disk", "passing")]
        lines.append((name, kind, str(len(own)), *most))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(word.ljust(width) if place < 2 else word.rjust(width) for place, (word, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]


@dataclass(frozen=True)
class Estimate:
    """What a study takes. lines: for people to read. refusals: why the machine cannot hold it, a sentence each."""

    lines: list[str]
    refusals: list[str]


def estimate(study: Plan, cores: int, memory: float | None = None) -> Estimate:
    """What the study takes on this machine.

    cores: jobs at a time. memory: bytes of the machine that will run it (default: this one's). Raises InputError for
    fewer than one core.
    """
    if cores < 1:
        raise InputError(f"--cores must be at least 1. Got {cores} instead.")
    needs = Needs(study)
    jobs = list(needs.jobs())
    limit, whose = (memory, "--mem-mb gives") if memory is not None else (machine_memory(), "this machine has")
    limits = Limits(limit, whose, *disks())
    found = total(needs, jobs, cores, operations_per_second())
    lines = [about(spec, needs.shape(model)) for model, spec in study.models.items()]
    lines += ["", *table(needs, jobs), "", short(needs, found, limits)]
    if found.measured:
        lines.append(f"The time of {found.measured} cells is that of cells of their kind that are done in this folder.")
    return Estimate(lines, list(refusals(needs, jobs, found, limits)))
