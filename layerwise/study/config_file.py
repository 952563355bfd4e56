"""Read a config as a document of plain JSON values, without running anything. Does not import torch.

Snakemake itself would run Python in a config that requests it, so a config is read here before Snakemake sees it.
"""

import datetime
import difflib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from layerwise.runtime.errors import InputError
from layerwise.runtime.project import ROOT
from layerwise.runtime.sentences import brief, place

EMBEDDED = "embedded"  # name of the study in config/config.yaml
DEEPEST = 40  # largest depth of a document; anchors can make it infinite
MOST_VALUES = 200_000  # largest number of values; anchors can make a short file represent more than memory holds
RUNS_PYTHON = "__use_yte__"  # with this key Snakemake treats a config as a template with Python
UNUSABLE = re.compile("[\0\ud800-\udfff]")  # characters that neither a path nor UTF-8 can contain


class _Loader(yaml.SafeLoader):
    """Builds no objects, and rejects repeated keys, of which YAML would silently keep the last."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge (<<) values into the node, after one check of its own keys."""
        seen = set()
        for key_node, _ in () if hasattr(node, "flat") else node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node)
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
                seen.add(key)
        node.flat = True  # type: ignore[attr-defined]
        super().flatten_mapping(node)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON mapping without repeated keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{key!r} is given twice")
        found[key] = value
    return found


def read(path: Path) -> Any:
    """The document in a config file, JSON or YAML as for Snakemake, without repeated keys.

    Raises InputError, in one sentence, for a file that cannot be read. Only the YAML tags of plain values are
    supported.
    """
    try:
        text = Path(path).read_text("utf-8")
        try:
            found = json.loads(text, object_pairs_hook=_unique)
        except ValueError:
            found = yaml.load(text, _Loader)  # derived from the safe one
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: byte {error.start} cannot be decoded.") from None
    except InputError as error:
        raise InputError(f"{path} is not valid: {brief(str(error))}.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # for example, 31 February
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        told = getattr(error, "problem", None) or str(error)
        raise InputError(f"{path} is not valid YAML: {brief(told)}{where}.") from None
    if isinstance(found, dict) and RUNS_PYTHON in found:
        raise InputError(f"{path} requests to run Python ({RUNS_PYTHON}), which a study must not do.")
    return found


def check(document: Any) -> None:
    """Raise InputError for the first value that is not a JSON value, or is a number or text that no job can use."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), document)]
    seen = 0
    while waiting:
        path, value = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or len(path) > DEEPEST:
            what = "nested too deeply" if len(path) > DEEPEST else f"too large, with more than {MOST_VALUES} values"
            raise InputError(f"config: the study is {what}: does an anchor contain itself?")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or UNUSABLE.search(key):
                    names = "names are letters, digits, '.', '_', '-'"
                    raise InputError(f"config: {place(path)}: the name {brief(repr(key))} is wrong; {names}.")
            waiting += [((*path, key), item) for key, item in reversed(list(value.items()))]
        elif isinstance(value, (list, tuple)):
            waiting += [((*path, number), item) for number, item in reversed(list(enumerate(value)))]
        elif fault := _fault(value):
            raise InputError(f"config: {place(path)} is wrong: {fault}.")


def _fault(value: Any) -> str | None:
    """The fault of a single value, or None."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        return f"{brief(repr(value))} has characters that no file can hold" if UNUSABLE.search(value) else None
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "it is a whole number of more than 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} is not finite"
    if isinstance(value, (datetime.date, datetime.datetime)):
        return f"YAML reads {value.isoformat()} as a date: put it in quotes"
    return f"a {type(value).__name__} of YAML is not a text, number, list or mapping"


def shipped_studies() -> list[str]:
    """Names of the shipped studies, `embedded` first."""
    names = sorted(path.stem for path in (ROOT / "config").glob("*.yaml"))
    return [EMBEDDED, *(name for name in names if name != "config")]


def study_file(study: str | Path) -> Path:
    """The file of a study, given by its path or by the name of a shipped study. Raises InputError for anything else."""
    path = Path(study)
    if path.is_file():
        return path
    names = shipped_studies()
    if str(study) in names:
        return ROOT / "config" / f"{'config' if str(study) == EMBEDDED else study}.yaml"
    near = difflib.get_close_matches(str(study), names, 3)
    known = ", ".join(near or [name for name in names if not name.startswith(("paper-", "sweep-"))])
    raise InputError(
        f"A study must be a file or the name of one that ships, such as {known}. Got {brief(str(study))!r} instead."
    )


def study_name(study: str | Path) -> str:
    """The name of a study, given by its name or file. Raises InputError as study_file does."""
    path = study_file(study)
    return EMBEDDED if path.samefile(ROOT / "config/config.yaml") else path.stem
