"""A study's sets of zero-shot tasks: the papers' lists, and checks before a job. Does not import torch.

A set's spec is {tasks, folder, fewshot, items, batch}; its tasks are lm-eval's names or the lists here.
"""

import importlib.util
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief
from layerwise.sources.hub import readable

Spec = Mapping[str, Any]
BATCH = 8  # default sequences per forward pass, as in the config schema

LISTS = {  # name of a list -> names of lm-eval's tasks
    # Wanda (arXiv:2306.11695), section 4.1; also used by OWL, DSnoT and SparseFW's code
    "wanda-seven": ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"],
    # SparseGPT (arXiv:2301.00774), section 4, without StoryCloze, whose text is not public
    "sparsegpt-four": ["lambada_openai", "piqa", "arc_easy", "arc_challenge"],
}
MOST_FILES = 20_000  # largest number of files in a folder of tasks
DOCSTRING_TASKS = ("last_word", "continuation", "written_word")  # made by demo/docstring_tasks.py
MADE_FOLDERS = (os.path.normpath("results/tasks/docstrings"),)  # written by the workflow


def expanded(spec: Spec) -> dict[str, Any]:
    """The spec with the papers' lists in its tasks expanded, each task once."""
    names = [task for name in spec["tasks"] for task in LISTS.get(name, [name])]
    return {**spec, "tasks": list(dict.fromkeys(names))}


def stay_offline(spec: Spec) -> None:
    """Forbid fetching for a set with a folder. The libraries read this setting on import."""
    if spec.get("folder"):
        os.environ["HF_HUB_OFFLINE"] = "1"


def made(spec: Spec) -> bool:
    """Whether the workflow itself writes the set's folder."""
    return bool(spec.get("folder")) and os.path.normpath(spec["folder"]) in MADE_FOLDERS


def task_files(spec: Spec) -> list[Path]:
    """Files on which a job with these tasks depends; none for data on the hub, whose hash is in the rows."""
    if not spec.get("folder"):
        return []
    folder = Path(spec["folder"])
    if made(spec):
        return [folder / f"{task}.{kind}" for task in spec["tasks"] for kind in ("yaml", "jsonl")]
    files = (path for path in searched(folder) if path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def searched(folder: Path) -> list[Path]:
    """The files of a folder of tasks. Raises InputError for a folder with more than MOST_FILES entries."""
    found = list(itertools.islice(folder.rglob("*"), MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise InputError(
            f"The folder {brief(str(folder))} must hold only tasks and their data. Got more than {MOST_FILES:,} "
            "files and folders instead: give the folder of the tasks."
        )
    return found


def check_tasks(name: str, spec: Spec) -> None:
    """Raise InputError, in one sentence, when the set `name` cannot be run, as far as this can be seen now."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"tasks.{name} needs lm-eval, which is not installed: pip install lm-eval.")
    if not spec.get("folder") or made(spec):
        return
    with readable(f"The folder of tasks.{name}"):
        if not Path(spec["folder"]).is_dir():
            raise InputError(f"tasks.{name}: the folder {brief(spec['folder'])} does not exist.")
        code = [] if spec.get("trust_remote_code") else running_code(Path(spec["folder"]))
    if code:
        raise InputError(
            f"tasks.{name}: {code[0]} names Python functions (!function), which run when the tasks are loaded: read "
            "them, and set trust_remote_code: true in the entry if you trust them."
        )


def running_code(folder: Path) -> list[Path]:
    """Definitions in a folder that make lm-eval import Python; refused here early, and zero_shot.keep_in refuses the
    rest."""
    definitions = sorted(path for path in searched(folder) if path.suffix == ".yaml" and path.is_file())
    return [path for path in definitions if b"!function" in path.read_bytes()]
