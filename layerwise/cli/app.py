"""The user's commands. Each imports its modules when it runs, so that help and completion start quickly."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from layerwise.runtime.errors import Failure, InputError, report_errors, system_refusal
from layerwise.study import config_file

if TYPE_CHECKING:
    from layerwise.contract.target import Target
    from layerwise.study.grid import Plan

TABLES = Path("results/tables")
TOLERANCE = 0.02  # relative; equals comparison.folders.TOLERANCE, whose module would import pandas


class Commands(TyperGroup):
    """The group of all commands: bad input gives one sentence on stderr, without usage text, and exit status 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> int:
        """Run a command line and end the process with its exit status.

        standalone_mode: if False, the status is returned and errors are raised.
        """
        given = list(sys.argv[1:] if args is None else args)
        own = {**extra, "prog_name": "layerwise", "complete_var": complete_var, "standalone_mode": False}
        if not standalone_mode:
            return super().main(args=given, **own) or 0
        report_errors(lambda argv: sys.exit(self._status(argv or ["--help"], own)), given)
        return 0  # not reached: the process has ended

    def _status(self, args: list[str], options: dict[str, Any]) -> int:
        try:
            return super().main(args=args, **options) or 0
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.status
        except typer.Abort:
            sentence = "The command was stopped."
        except OSError as error:
            if system_refusal(error) or not error.filename:
                raise
            sentence = f"{error.filename} cannot be used: {error.strerror}."
        except Exception as error:
            refused = getattr(error, "format_message", None)  # from the command-line parser
            if refused is None:
                raise
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "layerwise"
            sentence = f"{' '.join(refused().split()).rstrip('.')} (`{command} --help` explains it)."
        print(f"error: {sentence}", file=sys.stderr)
        return InputError.status


app = typer.Typer(
    cls=Commands,
    help="Compress large language models layer by layer, and measure the loss.",
    epilog="Begin with: layerwise run embedded. `layerwise COMMAND --help` explains a command.",
    context_settings={"max_content_width": 100},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}


def _version(asked: bool) -> None:
    if asked:
        from layerwise import __version__

        print(f"layerwise {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself; it has only --version."""


def studies(incomplete: str) -> Iterator[str]:
    """Names of the shipped studies, for shell completion."""
    return (name for name in config_file.shipped_studies() if name.startswith(incomplete))


def methods_known(incomplete: str) -> Iterator[str]:
    """Names of the shipped methods, for shell completion."""
    from layerwise.cli import cards

    return (name for name in cards.catalogue() if name.startswith(incomplete))


Study = Annotated[
    str,
    typer.Argument(help="A study's file, or the name of a shipped study.", metavar="STUDY", autocompletion=studies),
]
Tolerance = Annotated[float, typer.Option(help="Largest relative difference between numbers that agree.")]
Tables = Annotated[Path, typer.Option(help="Folder of the study's tables.")]
MethodPath = Annotated[list[Path], typer.Option(help="A further folder of methods. Can be given several times.")]
Cores = Annotated[str | None, typer.Option(help="Jobs at a time, or `all`. [default: one for each processor]")]


def _plan(study: str, check_sources: bool = False) -> Plan:
    """The plan of a study. Raises InputError for a wrong study."""
    from layerwise.study.grid import plan

    return plan(config_file.read(config_file.study_file(study)), check_sources=check_sources)


def _fail_if(sentence: str | None) -> None:
    """Raise Failure if there is a sentence."""
    if sentence:
        raise Failure(sentence)


# --------------------------------------------------------------------------------------------------------- run a study


@app.command(
    context_settings=FORWARD,
    epilog="Example: layerwise run pruning --cores 8 -n shows what would run. Further arguments are Snakemake's own.",
)
def run(context: typer.Context, study: Study, cores: Cores = None) -> None:
    """Run a study in this folder, and write results/ and figures/."""
    from layerwise.cli import workflow

    study, passed_on = workflow.study_and_rest([study, *context.args])
    workflow.run(study, cores, passed_on)


@app.command(context_settings=FORWARD, epilog="Example: layerwise report embedded, then open results/report.html.")
def report(context: typer.Context, study: Study = "", cores: Cores = None) -> None:
    """Write a study as one HTML page, results/report.html. Cells without results are run first.

    STUDY may be left out where the results are of the embedded study. Arguments that begin with a dash are passed to
    Snakemake and must follow STUDY.
    """
    from layerwise.cli import workflow

    study, passed_on = workflow.study_and_rest([*filter(None, [study]), *context.args], default="")
    workflow.run(study or workflow.study_of_results(passed_on), cores, passed_on, targets=["report_page"])


@app.command(epilog="Example: layerwise estimate my-study.yaml --cores 8 --mem-mb 64000")
def estimate(
    study: Study = config_file.EMBEDDED,
    cores: Annotated[int, typer.Option(help="Jobs at a time.")] = os.cpu_count() or 1,
    mem_mb: Annotated[float | None, typer.Option(help="Memory of the machine. [default: this one's]")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not try methods: estimate the time from their cards.")
    ] = False,
) -> None:
    """Print the memory, disk and time that a study takes. Nothing is started.

    The speed of this machine, and of each method on a small layer, is measured once and stored.
    """
    from layerwise.study import estimate as module

    memory = None if mem_mb is None else mem_mb * 1e6
    found = module.estimate(_plan(study, check_sources=True), cores, memory, quick, study)
    print(*found.lines, sep="\n")
    _fail_if(" ".join(found.exceeded))


@app.command("check-study", epilog="Example: layerwise check-study strangers-study.yaml")
def check_study(
    studies: Annotated[
        list[str], typer.Argument(help="Files of studies, or names of shipped studies.", autocompletion=studies)
    ],
) -> None:
    """Validate studies and count their cells. Nothing in them is run.

    Local texts must exist, unless the workflow writes them. `layerwise estimate` also checks models and texts of the
    hub.
    """
    from layerwise.study.plan_checks import check_text_files

    for study in studies:
        planned = _plan(study)
        check_text_files(planned.config)
        print(f"{study}: {len(planned.cells)} cells")


# -------------------------------------------------------------------------------------------------------------- methods


@app.command(epilog="Example: layerwise methods sparsegpt")
def methods(
    name: Annotated[str | None, typer.Argument(help="A method.", autocompletion=methods_known)] = None,
    method_path: MethodPath = [],  # noqa: B006 (typer copies the list)
) -> None:
    """List the methods, or print the card of one. A card has its paper, targets and parameters."""
    from layerwise.cli import cards

    known = cards.catalogue(method_path)
    print(cards.card(cards.find(known, name)) if name is not None else cards.table(known))


@app.command("new-method", epilog="Example: layerwise new-method shrink --folder my-methods")
def new_method(
    name: Annotated[str, typer.Argument(help="Name of the method and of its file.")],
    folder: Annotated[Path, typer.Option(help="Where to write the file.")] = Path(),
) -> None:
    """Write the file of a new method. It passes `layerwise check-method` without changes."""
    from layerwise.checks import template
    from layerwise.cli.workflow import check_writable

    check_writable(folder)
    path = template.write(name, folder)
    print(f"{path} is a working method. Change it, then run layerwise check-method {path}")


@app.command("check-method", epilog="Example: layerwise check-method my-methods/shrink.py")
def check_method(
    file: Annotated[Path, typer.Argument(help="File of the method, or of an allocator.")],
    quick: Annotated[bool, typer.Option("--quick", help="Check only the defaults, at fewer targets.")] = False,
) -> None:
    """Check that a method or an allocator keeps its contract. Exit status 1 if it breaks one."""
    if not file.is_file():
        raise InputError(f"The method must be a file. Got {str(file)!r} instead.")
    from layerwise.checks import battery

    result = battery.check_file(file, quick=quick, progress=_progress if sys.stderr.isatty() else None)
    print(result.render(), end="")
    if not result.ok:
        raise typer.Exit(1)


def _progress(done: int, of: int, label: str) -> None:
    """Overwrite the progress line on a terminal."""
    print(f"\r{done} of {of}  {label[:80]:80}" if done < of else f"\r{'':100}\r", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- compare numbers


Accepted = Annotated[Path | None, typer.Option(help="Folder of accepted numbers. [default: results/accepted/STUDY]")]


@app.command(epilog="Example: layerwise regression pruning, after layerwise run pruning")
def regression(
    study: Study = config_file.EMBEDDED,
    tables: Tables = TABLES,
    accepted: Accepted = None,
    tolerance: Tolerance = TOLERANCE,
) -> None:
    """Compare a study's numbers with the accepted ones. Exit status 1 if a number has moved or is missing.

    If nothing has been accepted in this folder, the accepted numbers shipped with the study are used.
    """
    from layerwise.comparison import regression as module

    if not module.check(tables, accepted or module.accepted_folder(study), tolerance):
        raise typer.Exit(1)


@app.command(epilog="Example: layerwise accept pruning")
def accept(study: Study = config_file.EMBEDDED, tables: Tables = TABLES, accepted: Accepted = None) -> None:
    """Accept a study's numbers. `layerwise regression` compares later ones with them."""
    from layerwise.comparison import regression as module

    print(*module.accept(tables, accepted or module.folder_of(study)), sep="\n")


@app.command(epilog="Example: layerwise compare old/results new/results --tolerance 0.05")
def compare(
    older: Annotated[Path, typer.Argument(help="The older result folder.")],
    newer: Annotated[Path, typer.Argument(help="The newer result folder.")],
    tolerance: Tolerance = TOLERANCE,
) -> None:
    """List the numbers that differ between two result folders. Exit status 1 if a number has moved or is missing."""
    from layerwise.comparison import folders

    if not folders.compare_folders(older, newer, tolerance):
        raise typer.Exit(1)


@app.command(epilog="Example: layerwise merge machine1/results machine2/results --out merged")
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Result folders, at least two.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged tables.")],
    tolerance: Tolerance = TOLERANCE,
) -> None:
    """Merge the tables of several machines. Inconsistent numbers are refused."""
    from layerwise.comparison import folders as module

    print(module.merge_folders(folders, out, tolerance))


@app.command(epilog="Example: layerwise leaderboard small=run1/results large=run2/results --out leaderboard.html")
def leaderboard(
    folders: Annotated[
        list[str],
        typer.Argument(help="Result folders, also merged ones, each as FOLDER or NAME=FOLDER.", metavar="FOLDER..."),
    ],
    out: Annotated[Path, typer.Option(help="Page to write, .html.")] = Path("leaderboard.html"),
) -> None:
    """Rank the methods of several studies on one page. Differences in protocol are marked."""
    from layerwise.cli.workflow import check_writable
    from layerwise.report import leaderboard_page as module

    check_writable(out.parent)
    print(module.write_leaderboard(folders, out))


@app.command(epilog="Example: layerwise published paper-wanda-llama2 --unrun --out coverage")
def published(
    study: Study,
    tables: Tables = TABLES,
    out: Annotated[Path | None, typer.Option(help="Folder to write to. [default: the tables' folder]")] = None,
    unrun: Annotated[bool, typer.Option(help="Show what would be compared, without reading tables.")] = False,
) -> None:
    """Compare a study's perplexities with those printed in papers."""
    from layerwise.comparison import published as module

    print(module.compare_with_published(_plan(study), tables, out, unrun))


# --------------------------------------------------------------------------------------------------- compressed models


@app.command(epilog="Example: layerwise export results/cells/MODEL/CALIBRATION/shared/CELL --format packed --out saved")
def export(
    cell: Annotated[Path, typer.Argument(help="Folder of a cell with weights (keep_weights in the config).")],
    form: Annotated[str, typer.Option("--format", help="dense, packed or compressed-tensors.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
) -> None:
    """Save a compressed model as a folder for other tools. The cell's record names the model."""
    if not cell.is_dir():
        raise InputError(f"The cell must be a folder. Got {str(cell)!r} instead.")
    from layerwise.export import save

    if form not in save.FORMATS:
        raise InputError(f"--format must be one of {', '.join(save.FORMATS)}. Got {form!r} instead.")
    save.export(cell, form, out)


@app.command(epilog='Example: layerwise audit saved, or layerwise audit folder-of-another-tool --target "4b g128"')
def audit(
    folder: Annotated[Path, typer.Argument(help="A cell's folder, or a folder saved by export or another tool.")],
    target: Annotated[
        str | None, typer.Option(help='The expected target, such as "2:4", "50% row" or "4b g128".')
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
) -> None:
    """Verify pattern, grid and counts of a saved model's layers. Exit status 1 if a layer is wrong."""
    if not folder.is_dir():
        raise InputError(f"The folder {folder} does not exist.")
    wanted = None if target is None else _target(target)
    from layerwise.export import audit as module

    form, expected, lines = module.audit(folder, wanted, trust_remote_code)
    print(module.table(lines), module.summary(form, expected, lines), sep="\n\n")
    _fail_if(module.fault_of(folder, lines))


def _target(label: str) -> Target:
    from layerwise.contract.target import Target

    try:
        return Target.parse(label)
    except ValueError as error:
        raise InputError(f"--target is wrong: {error}") from None


@app.command(epilog="Example: layerwise decode --shape 4096x4096 --threads 1 --out results/decode.csv")
def decode(
    shape: Annotated[list[str], typer.Option(help="ROWSxINPUTS of a weight. Can be given several times.")],
    out: Annotated[Path, typer.Option(help="Table to write, .csv.")],
    threads: Annotated[int, typer.Option(help="Threads per product.")] = 1,
    rounds: Annotated[int, typer.Option(help="Number of timed runs of each product.")] = 100,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time the product of a token's vector with packed weights."""
    shapes = list(map(_shape, shape))
    from layerwise.cli.workflow import check_writable
    from layerwise.export import decode as module

    check_writable(out.parent)

    for line in module.time_products(shapes, threads, rounds, device, out):
        print(line)


def _shape(text: str) -> tuple[int, int]:
    rows, times, inputs = text.partition("x")
    if not (times and rows.isdecimal() and inputs.isdecimal()):
        raise InputError(f"--shape must be ROWSxINPUTS, such as 4096x4096. Got {text!r} instead.")
    return int(rows), int(inputs)


@app.command("clean-cache", epilog="Example: layerwise clean-cache --dry-run")
def clean_cache(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be freed, without freeing it.")] = False,
) -> None:
    """Delete stored Grams and converted models that no study uses."""
    from layerwise.calibration import clean_cache as module
    from layerwise.runtime.files import gram_stores
    from layerwise.sources import gguf_cleaning, gguf_files

    _print_freed(module.clean(gram_stores(), Path.cwd(), dry_run), gram_stores(), dry_run)
    if gguf_files.store().is_dir():
        _print_freed(gguf_cleaning.clean(gguf_files.store(), Path.cwd(), dry_run), gguf_files.store(), dry_run)


def _print_freed(size: int, store: Path, dry: bool) -> None:
    """Print the number of bytes freed in a store."""
    said = f"{'Would free' if dry else 'Freed'} {size / 1e6:.1f} MB" if size else "There is nothing to free"
    print(f"{said} in {store}.")


@app.command(context_settings=FORWARD, add_help_option=False, epilog="Example: layerwise worker fingerprint --help")
def worker(context: typer.Context) -> None:
    """Run one step of a job, as the rules of the workflow do."""
    from layerwise.cli import worker as module

    module.run(context.args)
