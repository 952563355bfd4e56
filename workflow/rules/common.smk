# The study's plan, and code that the rules share. A job's inputs are in layerwise/study/job_inputs.py.
import json
import os
import shlex
import sys
from pathlib import Path

from snakemake_interface_common.exceptions import WorkflowError

from layerwise.evaluation.cache import KINDS
from layerwise.figures.plot import FIGURES
from layerwise.models.compute_dtype import HALVES, compute_dtype, slow_apart
from layerwise.report.run_end import FORMATS, remove_stale_outputs, write_partial_results
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import unlock_after_death, write_atomic
from layerwise.runtime.project import ROOT, from_here
from layerwise.cli.interruption import Interruption
from layerwise.cli.warm_worker import Launcher
from layerwise.sources.task_sets import DOCSTRING_TASKS
from layerwise.study import config_file
from layerwise.study.durations import MOST_THREADS, model_threads
from layerwise.study.job_costs import CostModel, Job
from layerwise.study.grid import plan
from layerwise.study.job_inputs import Code, JobInputs, as_json

# The interpreter that runs Snakemake has the locked packages.
WORKER = f"{shlex.quote(sys.executable)} -m layerwise worker"
# Files that rules make must not be `ancient` anywhere: where the rule that makes one has to run again, Snakemake (9.27,
# issue 4166) does not look at whether the jobs behind it have to, and leaves them out.
CHECKED = "results/checks/{model}/{calib}.json"
TASKS_CHECKED = "results/checks/{model}/tasks.json"
REQUESTED = "results/requested.json"  # the evaluations of every cell

interruption = Interruption(logger)
if workflow.is_main_process:
    interruption.watch()

# Held until the end of a run, so that the next knows whether it was killed.
ALIVE = unlock_after_death(Path(".snakemake")) if workflow.is_main_process else None
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads that wait leave their cores to compiled loops
# A job on a cluster has cores of its own.
CORES = workflow.resource_settings.cores if workflow.is_main_process else None
MODEL_THREADS = model_threads(CORES) if CORES else MOST_THREADS

warm_workers = Launcher()  # that jobs on this machine run in; started with the first of them

try:
    for path in workflow.configfiles if workflow.is_main_process else ():
        config_file.read(path)  # Snakemake itself keeps the last of two equal keys
    PLAN = plan(config, check_sources=True)
except InputError as error:
    raise WorkflowError(str(error)) from None
GIVEN = {name: own["device"] for name, own in workflow.resource_settings.overwrite_resources.items() if "device" in own}
DEVICES = {name: device.value for name, device in GIVEN.items() if not device.is_evaluable()}
JOBS = JobInputs(PLAN)
interruption.progress = JOBS.progress
CODE = Code()
for sentence in PLAN.warnings():
    logger.warning(f"warning: {sentence}")

# A figure that the study has nothing for is not drawn.
DRAWN = {name: drawing for name, drawing in FIGURES.items() if drawing.needs is None or drawing.needs in PLAN.gives}
STUDY = json.dumps(PLAN.config)  # in the order of the config, which is that of the tables
TABLES = [
    *(
        f"results/tables/{name}.{kind}"
        for name in (
            *("layers", "cells", "traces", "bounds", "allocations"),
            *("comparisons", "allocation_comparisons", "skipped"),
        )
        for kind in ("parquet", "csv")
    ),
    *(f"results/tables/main.{kind}" for kind in ("md", "tex")),
]
# Of a study with tasks, of each model.
TASKS_CHECKS = [TASKS_CHECKED.format(model=name) for name in sorted({cell.model for cell in PLAN.cells}) if PLAN.tasks]
PUBLISHED = [f"results/tables/published.{kind}" for kind in ("parquet", "csv", "md", "tex")]
PAGE = [from_here(path) for path in sorted((ROOT / "workflow/report").glob("**/*.*"))]


def whole_study(wildcards):
    """STUDY as a parameter: a text with braces, given as such, would be taken for one with wildcards."""
    return STUDY


def method_paths(wildcards):
    """Arguments for the study's folders of methods, whose cards say how figures draw them."""
    return [part for folder in PLAN.config["method_paths"] for part in ("--method-path", folder)]


def card_looks(wildcards):
    """How the cards draw the study's methods: a card that says otherwise draws the figures again."""
    methods = sorted({cell.columns["method"] for cell in PLAN.cells})
    return json.dumps({method: PLAN.catalogue[method].look for method in methods})


def computed_dtype(entry, rule):
    """The dtype that jobs of a rule compute a model in; a cluster's nodes may be slow where this machine is fast."""
    slow = slow_apart if workflow.local_exec else HALVES.__contains__
    return compute_dtype(entry, DEVICES.get(rule, "cpu"), slow)


COSTS = CostModel(PLAN, computed_dtype)


wildcard_constraints:
    code="[0-9a-f]+",
    model="|".join(map(re.escape, PLAN.models)),
    calib="|".join(map(re.escape, PLAN.calibrations)),
    evaluation="|".join(map(re.escape, PLAN.evaluations)),
    tasks="|".join(map(re.escape, PLAN.tasks)) or "(?!)",  # a study may have none
    mode="shared|sequential",
    cell=r"[^/]+",
    bound=r"[^/]+",
    allocation=r"[^/]+",


def model_mb(wildcards, attempt, rulename):
    """Megabytes that a job with a model asks for; a retry may need more than was estimated."""
    return attempt * COSTS.mem_mb(Job(rulename, wildcards))


def runtime_min(wildcards, attempt, rulename, threads):
    """Minutes that a cluster grants a job with a model; retries get more."""
    return attempt * COSTS.minutes(Job(rulename, wildcards), threads)


def cell_input(of, wildcards):
    """What a function of JOBS gives; a cluster's job may read a config that was edited since."""
    try:
        return of(wildcards)
    except InputError as error:
        raise WorkflowError(str(error)) from None


def cell_of(wildcards):
    return cell_input(JOBS.cell, wildcards)


def end_unfinished_run():
    """End a run that Ctrl-C interrupted in one sentence; collect what one with failed jobs has."""
    interruption.end_if_interrupted()
    write_partial_results(STUDY, DRAWN)


tasks_json = as_json(JOBS.task_set)
model_json = as_json(lambda wildcards: PLAN.models[wildcards.model])


include: "preflight.smk"
