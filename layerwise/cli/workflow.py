"""Start Snakemake on a study, in the working directory, with the Snakefile that ships."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from layerwise.runtime.errors import InputError
from layerwise.runtime.project import ROOT, locate
from layerwise.study import config_file
from layerwise.study.grid import plan

CORES = ("--cores", "-c", "--jobs", "-j")  # Snakemake's options that say how many jobs run at a time
ELSEWHERE = ("--profile", "--workflow-profile", "--executor", "-e")  # which may say so, or need no such number
PROFILE = "--workflow-profile"
FOLDER = ("--directory", "-d")
CONFIG = ("--config", "-C", "--configfile", "--configfiles")  # the study is no longer that of the file alone


def arguments(study: Path, cores: str | None, passed_on: Sequence[str], targets: Sequence[str] = ()) -> list[str]:
    """Snakemake's arguments for a study's file.

    cores: jobs at a time (default: one for each processor, unless an argument or a profile says it). passed_on: further
    arguments of Snakemake, which come last. targets: what is made in the place of everything.
    """
    # --configfile takes all that follows up to the next option: another one must stand between it and the targets.
    own = ["--configfile", str(study.resolve()), "--snakefile", str(ROOT / "Snakefile")]
    if not _has(passed_on, PROFILE):
        own += [PROFILE, str(ROOT / "profiles/default")]
    if cores is None and not _has(passed_on, *CORES, *ELSEWHERE):
        cores = "all"
    own += ["--cores", cores] if cores is not None else []
    return [*own, *targets, *map(_located, passed_on)]


def study_and_rest(words: Sequence[str], default: str | None = None) -> tuple[str, list[str]]:
    """The study that leads what was typed, and Snakemake's own arguments, which follow it.

    default: the study where none is typed. Raises InputError where an argument of Snakemake comes before the study, as
    it may take the next word for its value.
    """
    first, *rest = words
    if not first.startswith("-"):
        return first, rest
    if default is None or any(word in config_file.shipped_studies() or Path(word).is_file() for word in rest):
        raise InputError(f"STUDY must come before Snakemake's own arguments. Got {first!r} in its place instead.")
    return default, [first, *rest]


def run(study: str, cores: str | None, passed_on: Sequence[str], targets: Sequence[str] = ()) -> None:
    """Run Snakemake on a study in this process, and end it with Snakemake's exit status.

    study: file, or name of one that ships. Raises InputError, before Snakemake starts, for a study that is wrong, such
    as a model that is not there, for a folder that cannot be written, Snakemake's own of HOME among them, and for a
    number of cores that is none.
    """
    check_cores(cores)
    check_cores(_value(passed_on, *CORES[:2]))
    path = config_file.study_file(study).resolve()
    folder = Path(_value(passed_on, *FOLDER) or ".")
    check_writable(folder)
    config = config_file.read(path)
    if not _has(passed_on, *CONFIG):
        with contextlib.chdir(folder):  # Snakemake would name the line of a rule as well
            plan(config, check_sources=True)
    from snakemake.cli import main
    from snakemake.common import get_appdirs

    check_writable(Path(get_appdirs().user_cache_dir), " (HOME, or XDG_CACHE_HOME, says where it lies)")
    given = arguments(path, cores, passed_on, targets)
    sys.argv = ["snakemake", *given]  # Snakemake prints them
    main(given)


def check_cores(cores: str | None) -> None:
    """Raise InputError for a value of --cores that is no number of jobs. None and an option that follows are fine."""
    if not cores or cores == "all" or cores.startswith("-"):
        return
    if not cores.isdecimal() or int(cores) < 1:
        raise InputError(f"--cores must be a number of at least 1, or `all`. Got {cores!r} instead.")


def check_writable(folder: Path, told: str = "") -> None:
    """Raise InputError for a folder in which no file can be made. One that is not there yet is made.

    told: of the folder, at the end of the sentence.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder.absolute()} must be a folder that can be written: {error.strerror}{told}.") from None


def _has(given: Sequence[str], *options: str) -> bool:
    return any(_is(word, option) for word in given for option in options)


def _is(word: str, option: str) -> bool:
    """Whether a word is an option, with or without its value: --cores, --cores=2, -c2."""
    if option.startswith("--"):
        return word == option or word.startswith(f"{option}=")
    return word.startswith(option)


def _value(given: Sequence[str], *options: str) -> str | None:
    """The value of an option, or None where it is not given."""
    for word, following in zip(given, [*given[1:], ""], strict=False):
        for option in options:
            if word == option:
                return following
            if _is(word, option):
                return word.removeprefix(option).removeprefix("=")
    return None


def _located(word: str) -> str:
    """An argument of Snakemake in which profiles/NAME is one that ships, unless the working directory has it."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{locate(value)}" if value.startswith(f"profiles{os.sep}") else word
