"""`layerwise worker NAME ARGUMENTS`: one job of the workflow. Only the module of that job is imported."""

import importlib
import sys

from layerwise.runtime.errors import InputError, report_errors

WORKERS = {  # name -> module with main(argv)
    "allocate": "layerwise.compression.allocate",
    "calibrate": "layerwise.cli.calibrate",
    "certificate": "layerwise.compression.certificate",
    "check-model": "layerwise.evaluation.model_check",
    "compress": "layerwise.cli.compress",
    "dense-states": "layerwise.evaluation.dense_states",
    "docstring-tasks": "layerwise.demo.docstring_tasks",
    "docstrings": "layerwise.demo.docstrings",
    "evaluate": "layerwise.evaluation.cache",
    "export": "layerwise.export.save",
    "figure": "layerwise.figures.plot",
    "fisher": "layerwise.cli.fisher",
    "fingerprint": "layerwise.sources.fingerprint",
    "overlap": "layerwise.sources.overlap",
    "published": "layerwise.comparison.published",
    "report-page": "layerwise.report.page",
    "speed": "layerwise.compression.speed",
    "tables": "layerwise.results.collect",
    "tasks": "layerwise.evaluation.zero_shot",
    "tokens": "layerwise.sources.tokens",
    "train": "layerwise.demo.train",
}
HELP = f"""Usage: layerwise worker NAME [ARGUMENTS]

  Run one step of a job, as the rules of the workflow do.

Names: {", ".join(WORKERS)}.

`layerwise worker NAME --help` explains a worker's arguments."""


def run(argv: list[str]) -> None:
    """Run the job named by the first argument with the other arguments. Bad input ends the process with status 2."""
    if (argv or ["--help"])[0] in ("--help", "-h"):
        print(HELP)
    else:
        report_errors(_job, argv)


def _job(argv: list[str]) -> None:
    name, *arguments = argv
    if name not in WORKERS:
        raise InputError(f"The worker must be one of {', '.join(WORKERS)}. Got {name!r} instead.")
    sys.argv[0] = f"layerwise worker {name}"  # the name in the job's own help
    importlib.import_module(WORKERS[name]).main(arguments)
