"""A config as a document: read without running anything, and made of nothing but JSON's values. Free of torch.

Snakemake itself runs Python in a config that asks for it: read a config here before Snakemake sees it.
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
DEEPEST = 40  # levels of a document; anchors can make one endless
MOST_VALUES = 200_000  # in a document; anchors can make a short file represent more than memory holds
RUNS_PYTHON = "__use_yte__"  # with this key Snakemake takes a config for a template with Python in it
UNUSABLE = re.compile("[\0\ud800-\udfff]")  # in no path and in no file's UTF-8


class _Loader(yaml.SafeLoader):
    """Builds no objects, and takes no key twice, of which YAML would keep the last without a word."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Write what is merged (<<) into the node; before that its own keys are looked at, once."""
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
    """A mapping of JSON."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{key!r} is given twice")
        found[key] = value
    return found


def read(path: Path) -> Any:
    """The document of a config file, JSON or YAML as Snakemake takes it, each key once.

    Raises InputError, in one sentence, for a file that cannot be read. Of the tags of YAML those of plain values alone
    are known.
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
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as the 31st of February
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        told = getattr(error, "problem", None) or str(error)
        raise InputError(f"{path} is not valid YAML: {brief(told)}{where}.") from None
    if isinstance(found, dict) and RUNS_PYTHON in found:
        raise InputError(f"{path} asks to run Python ({RUNS_PYTHON}), which a study must not do.")
    return found


def check(document: Any) -> None:
    """Raise InputError for the first value that is none of JSON's, and for numbers and texts that no job can use."""
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
    """What is wrong with a single value, or None."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        return f"{brief(repr(value))} has characters that no file can hold" if UNUSABLE.search(value) else None
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else "it is a whole number of more than 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{value} is not finite"
    if isinstance(value, (datetime.date, datetime.datetime)):
        return f"YAML reads {value.isoformat()} as a date, put it in quotes"
    return f"a {type(value).__name__} of YAML is not a text, number, list or mapping"


def shipped_studies() -> list[str]:
    """Names of the studies that ship, `embedded` first."""
    names = sorted(path.stem for path in (ROOT / "config").glob("*.yaml"))
    return [EMBEDDED, *(name for name in names if name != "config")]


def study_file(study: str | Path) -> Path:
    """The file of a study: the path of one, or the name of one that ships. Raises InputError for neither."""
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
    """The name of a study, given by that or by its file. Raises InputError as study_file does."""
    path = study_file(study)
    return EMBEDDED if path.samefile(ROOT / "config/config.yaml") else path.stem
