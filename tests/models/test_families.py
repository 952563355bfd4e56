"""Every causal family of the installed transformers: the library's own numbers, or a refusal in one sentence.

tests/support/tiny_configs.py makes a tiny model of each, tests/support/every_family.py compares it with the library.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.every_family import ACCEPTED, NOT_BUILT, TABLES, WRONG, documented, outcome
from tests.support.tiny_configs import FAMILIES

torch.set_num_threads(1)

AT_EVERY_CHANGE = (
    "llama",
    "gpt2",
    "gpt_oss",
    "gemma4_text",
    "mamba2",
    "bart",
    "glm_moe_dsa",
)


def check(family, folder) -> None:
    found = outcome(family, folder)
    assert not found.faults
    kinds, reasons, outside = (documented()[title] for title in TABLES)
    assert kinds[family] == [found.kind]
    assert reasons[family] == ([found.reason] if found.kind == NOT_BUILT else [])
    assert outside[family] == ([f"`{name}`" for name in found.left] if found.kind == ACCEPTED else [])


@pytest.mark.parametrize("family", AT_EVERY_CHANGE)
def test_a_common_family_is_right_or_refused(family, tmp_path):
    check(family, tmp_path)


OTHERS = [family for family in FAMILIES if family not in AT_EVERY_CHANGE]  # in the battery one in three


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.long] if i % 3 else []) for i, family in enumerate(OTHERS)]
)
def test_a_family_is_right_or_refused(family, tmp_path):
    check(family, tmp_path)


def test_the_document_has_every_family():
    kinds = documented()[TABLES[0]]
    assert set(kinds) == set(FAMILIES)
    assert not [family for family, kind in kinds.items() if WRONG in kind]
    assert all(len(kind) == 1 for kind in kinds.values())
