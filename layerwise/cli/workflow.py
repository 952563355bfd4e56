"""Start Snakemake on a study, in the working directory, with the shipped Snakefile."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from layerwise.runtime.errors import InputError
from layerwise.runtime.project import ROOT, locate
from layerwise.study import config_file
from layerwise.study.config_file import EMBEDDED
from layerwise.study.grid import plan

CORES = ("--cores", "-c", "--jobs", "-j")  # Snakemake's options for the number of concurrent jobs
# options that may set this number or do not need it
ELSEWHERE = ("--profile", "--workflow-profile", "--executor", "-e")
PROFILE = "--workflow-profile"
FOLDER = ("--directory", "-d")
CONFIG = ("--config", "-C", "--configfile", "--configfiles")  # options that change the study given by the file


def arguments(study: Path, cores: str | None, passed_on: Sequence[str], targets: Sequence[str] = ()) -> list[str]:
    """Snakemake's arguments for a study's file.

    cores: jobs at a time (default: one per processor, unless an argument or a profile sets it). passed_on: further
    arguments for Snakemake, placed last. targets: what to make instead of everything.
    """
    # --configfile takes all words up to the next option, so another option must separate it from the targets.
    own = ["--configfile", str(study.resolve()), "--snakefile", str(ROOT / "Snakefile")]
    if not _has(passed_on, PROFILE):
        own += [PROFILE, str(ROOT / "profiles/default")]
    if cores is None and not _has(passed_on, *CORES, *ELSEWHERE):
        cores = "all"
    own += ["--cores", cores] if cores is not None else []
    return [*own, *targets, *map(_located, passed_on)]


def study_and_rest(words: Sequence[str], default: str | None = None) -> tuple[str, list[str]]:
    """The study, which is the first word, and Snakemake's own arguments, which follow it.

    default: the study if none is given, with or without such arguments. Raises InputError if an argument of Snakemake
    precedes the study, because it might take the next word as its value.
    """
    if not words and default is not None:
        return default, []
    first, *rest = words
    if not first.startswith("-"):
        return first, rest
    if default is None or any(word in config_file.shipped_studies() or Path(word).is_file() for word in rest):
        raise InputError(f"STUDY must come before Snakemake's own arguments. Got {first!r} first instead.")
    return default, [first, *rest]


def study_of_results(passed_on: Sequence[str]) -> str:
    """The embedded study, if the folder has results of it. Raises InputError for a folder without any, because to
    report a study means to run what it lacks."""
    folder = Path(_value(passed_on, *FOLDER) or ".")
    if not (folder / "results/cells").is_dir():
        lacking = f"There are no results in {folder.absolute()}"
    else:
        embedded = plan(config_file.read(config_file.study_file(EMBEDDED)))
        if any((folder / cell.folder).is_dir() for cell in embedded.cells):
            return EMBEDDED
        lacking = f"The results in {folder.absolute()} are not of the embedded study"
    raise InputError(f"{lacking}: name a study, such as layerwise report my-study.yaml or layerwise report {EMBEDDED}.")


def run(study: str, cores: str | None, passed_on: Sequence[str], targets: Sequence[str] = ()) -> None:
    """Run Snakemake on a study in this process, and end it with Snakemake's exit status.

    study: a file, or the name of a shipped study. Raises InputError, before Snakemake starts, for a wrong study (such
    as one with an absent model), for a folder that cannot be written (including Snakemake's cache under HOME), for an
    invalid number of cores, and for an unknown option or a wrong value of one.
    """
    check_cores(cores)
    check_cores(_value(passed_on, *CORES[:2]))
    path = config_file.study_file(study).resolve()
    folder = Path(_value(passed_on, *FOLDER) or ".")
    check_writable(folder)
    config = config_file.read(path)
    if not _has(passed_on, *CONFIG):
        with contextlib.chdir(folder):  # Snakemake would also name the line of a rule
            plan(config, check_sources=True)
    from snakemake.cli import main
    from snakemake.common import get_appdirs

    check_writable(Path(get_appdirs().user_cache_dir), " (set HOME or XDG_CACHE_HOME to move it)")
    given = arguments(path, cores, passed_on, targets)
    check_options(given)
    sys.argv = ["snakemake", *given]  # Snakemake prints them
    main(given)


def check_cores(cores: str | None) -> None:
    """Raise InputError for a value of --cores that is not a number of jobs. None and a following option are
    accepted."""
    if not cores or cores == "all" or cores.startswith("-"):
        return
    if not cores.isdecimal() or int(cores) < 1:
        raise InputError(f"--cores must be a number of at least 1, or `all`. Got {cores!r} instead.")


def check_options(given: Sequence[str]) -> None:
    """Raise InputError for arguments that Snakemake's parser refuses. Snakemake itself would print all its options."""
    from snakemake.cli import get_argument_parser

    parser = get_argument_parser()
    parser.error = _refuse
    try:
        parser.parse_args(given)
    except InputError:
        raise
    except Exception:  # from the function that reads a value; Snakemake reports it without its usage
        return


def _refuse(message: str) -> NoReturn:
    """Raise InputError with the message of an argument parser."""
    _, unknown, words = message.partition("unrecognized arguments: ")
    if unknown:
        raise InputError(
            f"An option must be one that `layerwise run --help` or `snakemake --help` lists. Got {words} instead."
        )
    raise InputError(f"Snakemake's arguments are wrong: {message} (`snakemake --help` lists its options).")


def check_writable(folder: Path, told: str = "") -> None:
    """Raise InputError for a folder in which no file can be created. An absent folder is created.

    told: text about the folder for the end of the sentence.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder.absolute()} must be a writable folder: {error.strerror}{told}.") from None


def _has(given: Sequence[str], *options: str) -> bool:
    return any(_is(word, option) for word in given for option in options)


def _is(word: str, option: str) -> bool:
    """Whether a word is an option, with or without its value: --cores, --cores=2, -c2."""
    if option.startswith("--"):
        return word == option or word.startswith(f"{option}=")
    return word.startswith(option)


def _value(given: Sequence[str], *options: str) -> str | None:
    """The value of an option, or None if it is not given."""
    for word, following in zip(given, [*given[1:], ""], strict=False):
        for option in options:
            if word == option:
                return following
            if _is(word, option):
                return word.removeprefix(option).removeprefix("=")
    return None


def _located(word: str) -> str:
    """An argument of Snakemake in which profiles/NAME is the shipped profile, unless the working directory has one."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{locate(value)}" if value.startswith(f"profiles{os.sep}") else word
