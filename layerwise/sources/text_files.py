"""The files of a text, local or from the hub, and their data set. Does not import torch."""

import os
from pathlib import Path

from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief
from layerwise.sources.hub import (
    Spec,
    check_hub,
    hub_errors,
    readable,
)

PLAIN_SUFFIXES = (".txt", ".raw")  # .raw: WikiText's suffix
TEXT_SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
# Texts that the workflow writes itself; they may be absent when the config is checked.
MADE_TEXTS = tuple(os.path.normpath(f"results/text/{split}.txt") for split in ("train", "validation", "test"))


def check_text(name: str, spec: Spec) -> None:
    """Raise InputError, in one sentence, when the text `name` cannot be read, as far as this can be seen now.

    A local text must exist, unless the workflow writes it; a hub text must name its revision and its data files, and be
    in the cache when fetching is forbidden. Only plain text may have a separator.
    """
    files: list[str] = [spec["path"]] if "path" in spec else list(spec.get("files", ()))
    if not files:
        raise InputError(
            f"The text {name!r} must list the data files of the data set {spec.get('hub')!r} under `files`: "
            "loading scripts are not run."
        )
    for file in files:
        if not str(file).endswith(TEXT_SUFFIXES):
            suffixes = ", ".join(TEXT_SUFFIXES)
            raise InputError(f"The text {name!r} must end in one of {suffixes}. Got {brief(file)} instead.")
    if spec.get("separator") and not any(str(file).endswith(PLAIN_SUFFIXES) for file in files):
        raise InputError(
            f"The text {name!r} must have no separator, because only {' and '.join(PLAIN_SUFFIXES)} are separated by "
            f"one. Got {brief(repr(spec['separator']))} for {brief(str(files[0]))}."
        )
    if "path" not in spec:
        check_hub(f"The text {name!r}", spec, files, repo_type="dataset")
        return
    check_file(name, spec)


def check_file(name: str, spec: Spec) -> None:
    """Raise InputError when a local text does not exist, unless a rule of the workflow writes it."""
    if "path" not in spec:
        return
    path = Path(spec["path"])
    with readable(f"The text {name!r}"):
        if os.path.normpath(path) not in MADE_TEXTS and not path.is_file():
            raise InputError(f"The file {path} of the text {name!r} does not exist.")


def text_files(spec: Spec) -> list[Path]:
    """Local files on which a job that reads the text depends; none for a hub text, which its revision fixes."""
    return [Path(spec["path"])] if "path" in spec else []


def fetch_text(spec: Spec) -> list[Path]:
    """Local paths of the text's files; those of a hub text are fetched one by one.

    Never runs a loading script. Raises InputError when a file cannot be fetched.
    """
    if "path" in spec:
        return [Path(spec["path"])]
    from huggingface_hub import hf_hub_download

    with hub_errors(spec):
        return [
            Path(hf_hub_download(spec["hub"], file, repo_type="dataset", revision=spec["revision"]))
            for file in spec["files"]
        ]


def dataset_of(spec: Spec) -> str:
    """Name of a text's data set: the spec's `dataset`, otherwise the hub name, otherwise the path."""
    return spec.get("dataset") or spec.get("hub") or os.path.normpath(spec["path"])


def shared_origin(one: Spec, other: Spec) -> str | None:
    """The file or data set from which two texts are both drawn, as the end of a sentence; None if they share neither.

    A file counts as the same for any path (relative, absolute or through links) and for any named data set.
    """
    files = _files(other)
    for file, name in _files(one).items():
        if file in files:
            return f"the same file, {name}"
    return f"the same data set, {dataset_of(one)}" if dataset_of(one) == dataset_of(other) else None


def _files(spec: Spec) -> dict[tuple[object, ...], str]:
    """The identity of each file of a text -> its name."""
    if "path" not in spec:
        return {("hub", spec["hub"], file): f"{spec['hub']}/{file}" for file in spec.get("files", ())}
    path = os.path.realpath(spec["path"])
    try:
        found = os.stat(path)
    except OSError:  # a file that the workflow has not written yet
        return {("path", path): os.path.normpath(spec["path"])}
    return {("file", found.st_dev, found.st_ino): os.path.normpath(spec["path"])}
