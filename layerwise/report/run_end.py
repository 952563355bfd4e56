"""The end of a run: a success leaves nothing stale, a failure leaves tables and figures of the finished cells."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from layerwise.figures.plot import FIGURES

PARTIAL = Path("results/partial")
FORMATS = ("pdf", "svg", "png")


def remove_stale_outputs(drawn: Iterable[str]) -> None:
    """After a success: no partial tables of an earlier failure, no figures of another study in this folder.

    drawn: names of the study's figures.
    """
    shutil.rmtree(PARTIAL, ignore_errors=True)
    for figure in FIGURES.keys() - set(drawn):
        for kind in FORMATS:
            Path(f"figures/{figure}.{kind}").unlink(missing_ok=True)


def write_partial_results(study: str, drawn: Iterable[str]) -> None:
    """After a failure: tables and figures of what exists in PARTIAL, the failed cells as rows with their reason.

    study: the config with its defaults, as JSON. Nothing but a sentence on stderr where the tables cannot be written.
    """
    shutil.rmtree(PARTIAL, ignore_errors=True)  # an earlier failure may have left others
    tables = PARTIAL / "tables"
    if not _worker("tables", "--study", study, "--out", tables, "--partial"):
        return
    _worker("published", "--study", study, "--tables", tables)
    svgs, folders = [], [part for folder in json.loads(study)["method_paths"] for part in ("--method-path", folder)]
    for figure in drawn:
        files = [PARTIAL / "figures" / f"{figure}.{kind}" for kind in FORMATS]
        _worker("figure", figure, "--tables", tables, *folders, "--out", *files)
        svgs += [path for path in files if path.suffix == ".svg" and path.is_file()]
    _worker("report-page", "--study", study, "--tables", tables, "--out", PARTIAL / "report.html", "--figures", *svgs)
    print(
        f"Some cells failed. {PARTIAL}/ has the finished cells and the reasons of the failed ones. "
        "The next run retries these.",
        file=sys.stderr,
    )


def _worker(name: str, *arguments: str | Path) -> bool:
    """Whether a worker of the command did its job; it reports on stderr why it did not."""
    command = [sys.executable, "-m", "layerwise", "worker", name, *map(str, arguments)]
    return not subprocess.run(command).returncode
