"""Reading what the official codes of factors and sums made of the layers of tests/data (format: its README)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
from safetensors import safe_open

from tests.support.paths import DATA

FILE = DATA / "official-parts.safetensors"


@cache
def _cases() -> dict[str, list[dict[str, Any]]]:
    with safe_open(FILE, "numpy") as file:
        return json.loads(file.metadata()["cases"])


def cases(method: str, *stored: str, settings: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """(layer, case) pairs of a method, for parametrize; those of which these arrays are stored, without a setting."""
    with safe_open(FILE, "numpy") as file:
        known = set(file.keys())
    return [
        (name, case["id"])
        for name, own in _cases().items()
        for case in own
        if case["method"] == method
        and all(f"{name}/{case['id']}/{part}" in known for part in stored)
        and not case["settings"].keys() & set(settings)
    ]


def case(name: str, case_id: str) -> dict[str, Any]:
    """Settings, rank and error of a case."""
    return next(case for case in _cases()[name] if case["id"] == case_id)


def array(name: str, case_id: str, part: str) -> np.ndarray:
    with safe_open(FILE, "numpy") as file:
        return file.get_tensor(f"{name}/{case_id}/{part}")


def mask(name: str, case_id: str, part: str, shape: tuple[int, int]) -> np.ndarray:
    """[shape] bool, True where a sparse part or factor is not zero."""
    return np.unpackbits(array(name, case_id, part), count=shape[0] * shape[1]).reshape(shape).astype(bool)
