"""A cell of the grid: its typed spec, and the identity that names its folder. Does not import torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NotRequired, TypedDict

from layerwise.contract.target import CERTIFIED, LOW_RANK, Target
from layerwise.sources.specs import CalibrationSpec, EvaluationSpec, ModelSpec, TaskSetSpec


class TargetSpec(TypedDict):
    """The fields of a Target in the form of a config."""

    sparsity: float
    pattern: str
    bits: Any  # a width, the name of a format, or None
    group: int | None
    symmetric: bool


class CellColumns(TargetSpec):
    """The first columns of every row about a cell, in all tables."""

    model: str
    calibration: str
    mode: str
    label: str
    method: str
    comparison: str
    target: str
    allocation: str
    allocator: str
    allocation_params: str
    params: str
    seed: int
    cell: str


class MethodSpec(TypedDict):
    """A method and its complete parameters."""

    name: str
    params: Mapping[str, Any]


class AllocationSpec(TypedDict):
    """The input of the job that spreads a budget over the layers. name: name of the config's entry."""

    name: str
    allocator: str
    params: Mapping[str, Any]
    target: TargetSpec
    seed: int


class CellSpec(TypedDict):
    """The input of the job that computes a cell. tune: stage -> its settings, absent without tuning. allocation: absent
    if all layers have the target's level. asymmetric: True if the dense model's inputs are collected for the score
    alone, otherwise absent."""

    columns: CellColumns
    method: MethodSpec
    target: TargetSpec
    tune: NotRequired[Mapping[str, Mapping[str, Any]]]
    allocation: NotRequired[AllocationSpec]
    asymmetric: NotRequired[bool]


def canonical(value: Any) -> str:
    """The same JSON string for equal values: the order of keys does not matter, and equal numbers are spelled alike."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def plain(value: Any) -> Any:
    """The value as plain JSON, with whole floats as integers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def identity(name: str, spec: Any) -> str:
    """`name-digest`: the digest, 8 hex digits of SHA-256 of the canonical JSON, changes with any value in the spec."""
    return f"{name}-{hashlib.sha256(canonical(spec).encode()).hexdigest()[:8]}"


def slug(value: Any) -> str:
    """A value in a form suitable for a file name."""
    text = value if isinstance(value, str) else canonical(value)
    return "".join(c if c.isascii() and c.isalnum() or c in "._-" else "_" for c in text).strip("_")


@dataclass(frozen=True)
class Cell:
    """One method on one model at one target, with one calibration and mode. The names form its path."""

    model: str
    calib: str
    mode: str
    cell: str
    spec: CellSpec

    @property
    def folder(self) -> str:
        return f"results/cells/{self.model}/{self.calib}/{self.mode}/{self.cell}"

    @property
    def columns(self) -> dict[str, Any]:
        """A new row with the cell's columns."""
        return dict(self.spec["columns"])

    @property
    def certificate(self) -> str | None:
        """Path of the bound on the errors of the cell's layers: masks of a bounded pattern, or low-rank factors alone,
        on the dense Grams.

        A bound is for one target for all layers, so cells with other levels per layer have none.
        """
        target = Target(**self.spec["target"])
        masks = self.spec["columns"]["comparison"] == "mask-only" and target.structure in CERTIFIED
        factors = self.spec["columns"]["comparison"] == LOW_RANK
        if self.mode != "shared" or not (masks or factors) or self.levels:
            return None
        return (
            f"results/certificates/{self.model}/{self.calib}/{identity(slug(target.label), target.as_dict())}.parquet"
        )

    @cached_property
    def levels(self) -> str | None:
        """Path of the table of the layers' levels, if the budget is spread over the layers."""
        if (allocation := self.spec.get("allocation")) is None:
            return None
        name = f"{allocation['name']}-{slug(Target(**allocation['target']).label)}"
        return f"results/allocations/{self.model}/{self.calib}/{identity(name, allocation)}.parquet"

    def overlap(self, evaluation: str) -> str:
        """Path of the overlap of the cell's calibration with an evaluation, given by its identity."""
        return f"results/tokens/{self.model}/overlap/{self.calib}/{evaluation}.json"

    @cached_property
    def params(self) -> str:
        """The spec as the one string that Snakemake tracks."""
        return canonical(self.spec)


class SkippedRow(TypedDict):
    """A row of the table `skipped`: an entry, a target that it cannot reach, and the reason."""

    label: str
    method: str
    target: str
    allocation: str
    reason: str


def name_of(spec: ModelSpec | CalibrationSpec | EvaluationSpec | TaskSetSpec) -> str:
    """The config's name of a spec that a plan identifies by hash."""
    return spec["name"]  # pyright: ignore[reportTypedDictNotRequiredAccess]: a plan's specs have a name
