# The study's plan, and the helpers that rules name. Rules stand in the other files.
import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from snakemake_interface_common.exceptions import WorkflowError

from layerwise.contract.catalogue import PACKAGES, SHARED_SOURCES
from layerwise.evaluation import cache as recall
from layerwise.sources import hub as sources
from layerwise.sources import task_sets
from layerwise.study import config_file as documents
from layerwise.study.grid import canonical, plan
from layerwise.study.cost_model import Job, Needs
from layerwise.figures.plot import FIGURES
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import digest_of, unlock_after_death

PYTHON = shlex.quote(sys.executable)  # the interpreter that runs Snakemake has the locked packages
FORMATS = ("pdf", "svg", "png")

# Held until the end of a run, so that the next knows whether it was killed.
ALIVE = unlock_after_death(Path(".snakemake")) if workflow.is_main_process else None

try:
    for path in workflow.configfiles if workflow.is_main_process else ():
        documents.read(path)  # Snakemake itself keeps the last of two equal keys
    PLAN = plan(config, check_sources=True)
except InputError as error:
    raise WorkflowError(str(error)) from None
NEEDS = Needs(PLAN)
for sentence in PLAN.warnings():
    logger.warning(f"warning: {sentence}")

# A figure that the study has nothing for is not drawn.
DRAWN = {name: drawing for name, drawing in FIGURES.items() if drawing.needs is None or drawing.needs in PLAN.gives}
STUDY = json.dumps(PLAN.config)  # in the order of the config, which is that of the tables
TABLES = [
    *(
        f"results/tables/{name}.{kind}"
        for name in ("layers", "cells", "traces", "bounds", "comparisons", "skipped")
        for kind in ("parquet", "csv")
    ),
    *(f"results/tables/main.{kind}" for kind in ("md", "tex")),
]
PUBLISHED = [f"results/tables/published.{kind}" for kind in ("parquet", "csv", "md", "tex")]


def whole_study(wildcards):
    """STUDY as a parameter: a text with braces, given as such, would be taken for one with wildcards."""
    return STUDY


wildcard_constraints:
    code="[0-9a-f]+",
    model="|".join(map(re.escape, PLAN.models)),
    calib="|".join(map(re.escape, PLAN.calibrations)),
    evaluation="|".join(map(re.escape, PLAN.evaluations)),
    tasks="|".join(map(re.escape, PLAN.tasks)) or "(?!)",  # a study may have none
    mode="shared|sequential",
    cell=r"[^/]+",
    bound=r"[^/]+",


def scripts(*names):
    """Script files, listed because Snakemake does not see what a script imports."""
    return [from_here(f"{workflow.basedir}/layerwise/{name}.py") for name in names]


def kernels(*names):
    return [from_here(f"{PACKAGES['layerwise.kernels']}/{name}.py") for name in names]


CODE = {}  # digest -> files


@cache
def code(*files):
    """A file named after the content of the files of code that a rule depends on, its input in their place.

    An edit is another input. Neither a touched file nor a fresh checkout is, and a job has one input instead of thirty,
    of which Snakemake would look at each for every job.
    """
    digest = digest_of(files)
    CODE[digest] = files
    return f"results/code/{digest}"


def from_here(path):
    """The path from the working directory: a project that is moved has nothing to compute again."""
    return os.path.relpath(path)


# Scripts that decide the Grams.
WALK = (
    "calibration/block_stream",
    "calibration/taps",
    "calibration/tap_statistics",
    "calibration/experts",
    "models/loading",
    "models/streaming",
    "calibration/hidden_states",
    "runtime/checkpoint",
)
CALIBRATING = ("calibration/calibrate", "calibration/gram_store", *WALK)

# Drawing is cheap: an edit to what draws one figure draws all.
FIGURE_CODE = code(
    *scripts(
        "results/seeds",
        "storage/table_schema",
        *sorted(f"figures/{path.stem}" for path in Path(workflow.basedir).glob("layerwise/figures/*.py")),
    )
)
PAGE = [from_here(str(path)) for path in sorted(Path(workflow.basedir).glob("workflow/report/**/*.*"))]
# It decides the columns of what cells and tables write.
TABLE_SCHEMA = from_here(f"{workflow.basedir}/workflow/schemas/tables.schema.yaml")


def cell_of(wildcards):
    folder = "results/cells/{model}/{calib}/{mode}/{cell}".format(**wildcards)
    if folder not in PLAN.by_folder:  # a cluster's job reads the config again
        raise WorkflowError(f"{folder} is no cell of this study: if its config was edited during a run, run again.")
    return PLAN.by_folder[folder]


def certified(wildcards):
    """A cell whose layers are held against the bound."""
    return PLAN.certificates["results/certificates/{model}/{calib}/{bound}.parquet".format(**wildcards)]


def method_sources(wildcards):
    """Code that decides a cell's numbers: its method's file, its warm starts' files and the shared ones."""
    method = cell_of(wildcards).spec["method"]
    return paths_of_method(method["name"], canonical(method["params"]))


@cache  # Snakemake asks for every job of many thousands
def paths_of_method(name, params):
    return list(map(from_here, PLAN.catalogue.sources(name, json.loads(params))))


def method_folders(wildcards):
    """Arguments for the folders of others that the cell's method comes from, and no others: a folder that is added to
    a study leaves its cells as they are."""
    folders = {os.path.dirname(file) for file in method_sources(wildcards)} - set(map(from_here, PACKAGES.values()))
    return [part for folder in sorted(folders) for part in ("--method-path", folder)]


def model_files(wildcards):
    return paths_of_model(wildcards.model)


@cache
def paths_of_model(model):
    return list(map(str, sources.model_files(PLAN.models[model])))


def model_mb(wildcards, attempt, rulename):
    """Megabytes that a job with a model asks for; a retry may need more than was estimated."""
    return attempt * NEEDS.mem_mb(Job(rulename, wildcards))


def runtime_min(wildcards, attempt, rulename, threads):
    """Minutes that a cluster grants a job with a model; retries get more."""
    return attempt * NEEDS.minutes(Job(rulename, wildcards), threads)


def forward_dtype(wildcards):
    """Arguments for the dtype of a calibration's forward passes, if it is not the model's."""
    dtype = PLAN.calibrations[wildcards.calib].get("dtype")
    return ["--dtype", dtype] if dtype else []


def text_of(kind):
    """Function of wildcards that gives the text entry of a calibration or an evaluation."""

    def entry(wildcards):
        specs, name = {
            "calibration": lambda: (PLAN.calibrations, wildcards.calib),
            "evaluation": lambda: (PLAN.evaluations, wildcards.evaluation),
        }[kind]()
        return PLAN.config["texts"][specs[name]["text"]]

    return entry


def text_files(kind):
    return lambda wildcards: list(map(str, sources.text_files(text_of(kind)(wildcards))))


def json_of(function):
    """As one canonical string: Snakemake compares the set of a param's values, in which order and swaps are lost."""
    return lambda wildcards: canonical(function(wildcards))


def task_files(wildcards):
    return list(map(str, task_sets.task_files(PLAN.tasks[wildcards.tasks])))


def asked():
    """What every cell is to be evaluated on, as recall.foresee reads it."""
    texts = [f"results/tokens/{{model}}/evaluation-{evaluation}.safetensors" for evaluation in PLAN.evaluations]
    sets = [("tasks", f"results/tasks/{identity}.json", unnamed(spec)) for identity, spec in PLAN.tasks.items()]
    found = [("perplexity", text, {}) for text in texts] + sets
    return [dict(zip(("kind", "data", "spec"), one, strict=True)) for one in found]


def unnamed(spec):
    return {key: value for key, value in spec.items() if key != "name"}


os.environ[recall.ASKED] = json.dumps(asked())
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's threads that wait leave their cores to compiled loops


tasks_json = json_of(lambda wildcards: unnamed(PLAN.tasks[wildcards.tasks]))
model_json = json_of(lambda wildcards: PLAN.models[wildcards.model])


def forget_what_is_over():
    """After a success: no partial tables of an earlier failure, no figures of another study in this folder."""
    shutil.rmtree("results/partial", ignore_errors=True)
    for figure in FIGURES.keys() - DRAWN.keys():
        for format in FORMATS:
            Path(f"figures/{figure}.{format}").unlink(missing_ok=True)


def gather_partial():
    """After a failure: tables and figures of what exists, the failed cells as rows with their reason."""
    out = "results/partial"
    shutil.rmtree(out, ignore_errors=True)  # what an earlier failure left is not of this one
    command = [
        sys.executable,
        "-m",
        "layerwise.results.collect",
        "--study",
        STUDY,
        "--out",
        f"{out}/tables",
        "--partial",
    ]
    if subprocess.run(command).returncode:
        return
    beside = ["-m", "layerwise.comparison.published", "--study", STUDY, "--tables", f"{out}/tables"]
    subprocess.run([sys.executable, *beside])
    for figure in DRAWN:
        files = [f"{out}/figures/{figure}.{kind}" for kind in FORMATS]
        drawing = [sys.executable, "-m", "layerwise.figures.plot", figure, "--tables", f"{out}/tables", "--out", *files]
        subprocess.run(drawing)
    svgs = [path for figure in DRAWN if Path(path := f"{out}/figures/{figure}.svg").is_file()]
    page = ["--study", STUDY, "--tables", f"{out}/tables", "--out", f"{out}/report.html", "--figures", *svgs]
    subprocess.run([sys.executable, "-m", "layerwise.report.page", *page])
    logger.error(f"Some cells failed. What is done, with the reasons of the rest, is in {out}/; the next run retries.")


include: "preflight.smk"
