"""`layerwise worker NAME ARGUMENTS`: one job of the workflow. Only the module of that job is imported."""

import importlib
import sys

from layerwise.runtime.errors import report_errors

WORKERS = {  # name -> module with main(argv)
    "calibrate": "layerwise.calibration.calibrate",
    "certificate": "layerwise.compression.certificate",
    "check-model": "layerwise.evaluation.model_check",
    "compress": "layerwise.cli.compress",
    "dense-states": "layerwise.evaluation.dense_states",
    "docstring-tasks": "layerwise.demo.docstring_tasks",
    "docstrings": "layerwise.demo.docstrings",
    "evaluate": "layerwise.evaluation.cache",
    "export": "layerwise.export.save",
    "figure": "layerwise.figures.plot",
    "fingerprint": "layerwise.sources.fingerprint",
    "overlap": "layerwise.sources.overlap",
    "published": "layerwise.comparison.published",
    "report-page": "layerwise.report.page",
    "tables": "layerwise.results.collect",
    "tasks": "layerwise.evaluation.zero_shot",
    "tokens": "layerwise.sources.tokens",
    "train": "layerwise.demo.train",
}
HELP = f"""Usage: layerwise worker NAME [ARGUMENTS]

  Run one step of a job, as the rules of the workflow do.

Names: {", ".join(WORKERS)}.

`layerwise worker NAME --help` explains the arguments of one."""


def run(argv: list[str]) -> None:
    """Run the job that the first argument names with the others. Ends the process with status 2 for an unknown name."""
    name, *arguments = argv or ["--help"]
    if name in ("--help", "-h"):
        print(HELP)
        return
    if name not in WORKERS:
        print(f"error: The worker must be one of {', '.join(WORKERS)}. Got {name!r} instead.", file=sys.stderr)
        sys.exit(2)
    sys.argv[0] = f"layerwise worker {name}"  # as the job's own help calls it
    report_errors(lambda given: importlib.import_module(WORKERS[name]).main(given), arguments)
