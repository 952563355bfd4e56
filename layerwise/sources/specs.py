"""Typed mappings for a config's models, texts, calibration sets, evaluations and task sets.

They are plain dicts, as in JSON, because identities are digests of them. Defaults are filled in. Does not import torch.
"""

from typing import NotRequired, TypedDict


class ModelSpec(TypedDict):
    """A local folder (`path`), a GGUF file (`gguf`, in a `wheel` of this `sha256`), or a hub's (`hub`, `revision`)."""

    name: NotRequired[str]  # name in the config
    path: NotRequired[str]
    gguf: NotRequired[str]
    wheel: NotRequired[str]
    sha256: NotRequired[str]
    hub: NotRequired[str]
    revision: NotRequired[str]
    known_as: NotRequired[str]
    dtype: NotRequired[str]
    compute_dtype: NotRequired[str]
    trust_remote_code: NotRequired[bool]


class TextSpec(TypedDict):
    """A local file (`path`) or files of a data set on the hub (`hub`, `revision`, `files`)."""

    path: NotRequired[str]
    hub: NotRequired[str]
    revision: NotRequired[str]
    files: NotRequired[list[str]]
    field: NotRequired[str]
    separator: NotRequired[str]
    join: NotRequired[str]
    begins: NotRequired[str]
    dataset: NotRequired[str]


class CalibrationSpec(TypedDict):
    """Sequences drawn from a text with one seed. samples: number of sequences. length: tokens per sequence."""

    name: NotRequired[str]
    text: str
    samples: int
    length: int
    seed: int
    sampling: NotRequired[str]
    dtype: NotRequired[str]


class EvaluationSpec(TypedDict):
    """Windows of a text. length: tokens per window. samples: number of first windows to use, None for all."""

    name: NotRequired[str]
    text: str
    length: int
    samples: NotRequired[int | None]


class TaskSetSpec(TypedDict):
    """A set of zero-shot tasks. items: number of first items to use, None for all. batch: sequences per forward
    pass."""

    name: NotRequired[str]
    tasks: list[str]
    folder: NotRequired[str]
    fewshot: NotRequired[int | None]
    items: NotRequired[int | None]
    batch: NotRequired[int]
    trust_remote_code: NotRequired[bool]
