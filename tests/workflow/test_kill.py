"""A study that is killed, with all its processes, at random moments ends as if nothing had been."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from layerwise.runtime.files import unlock_after_death
from tests.support.kill_study import assert_same_tables, disturbed
from tests.support.typing_helpers import some
from tests.support.workflow_harness import WITHOUT_FIGURES, snakemake, tiny_project


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, float]:
    """A folder where the study ran to its end, and the seconds that it took."""
    folder = tiny_project(tmp_path_factory.mktemp("undisturbed"))
    done = snakemake(folder, *WITHOUT_FIGURES)
    assert done.status == 0, done.output
    return folder, done.seconds


@pytest.mark.long
def test_a_killed_study_ends_with_the_same_tables(tmp_path, undisturbed):
    folder, seconds = undisturbed
    told = disturbed(tiny_project(tmp_path), WITHOUT_FIGURES, 4, seconds / 2, random.Random(0))
    assert len(told) > 2
    assert not any("Directory cannot be locked" in text for text in told)
    assert_same_tables(tmp_path, folder)


def test_the_lock_of_a_run_that_lives_is_left_alone(tmp_path):
    lock = tmp_path / "locks/0.input.lock"
    lock.parent.mkdir()
    lock.write_text("")
    first = unlock_after_death(tmp_path)
    assert not lock.exists()
    lock.write_text("")
    second = unlock_after_death(tmp_path)
    assert lock.exists()
    some(first).close()
    third = unlock_after_death(tmp_path)  # the second still lives
    assert lock.exists()
    some(second).close()
    some(third).close()
    some(unlock_after_death(tmp_path)).close()
    assert not lock.exists()
