"""Two result folders compared, and several put into one."""

# pandas' own annotations lose whether a selection is a column or a frame.

import json
from typing import Any

import pandas as pd
import pytest

from layerwise.cli.app import app
from layerwise.comparison.folders import ALLOCATED
from layerwise.results.cell_results import evaluations
from layerwise.results.collect import TABLES, StudyInputs, collect
from layerwise.results.main_table import document
from layerwise.results.table_text import markdown
from layerwise.runtime.errors import InputError
from layerwise.storage.table_schema import read_table
from tests.support.result_folders import PLAN, SKIPPED, TEXTS, results
from tests.support.synthetic_tables import EVALUATIONS, STUDY, cell, layer_frame


def status(*arguments: object) -> int:
    command = arguments if arguments[0] == "merge" else ("compare", *arguments)
    return app([str(word) for word in command], standalone_mode=False)


def test_a_folder_agrees_with_itself(tmp_path, capsys):
    folder = results(tmp_path)
    assert status(folder, folder / "results/tables") == 0
    assert capsys.readouterr().out.splitlines() == [
        "output_error (layers): all 42 agree within 2%.",
        # of each cell two perplexities with three divergences each, an error, a sparsity and bits
        "value (cells): all 33 agree within 2%.",
    ]


def test_moved_numbers_are_listed_with_exit_status_one(tmp_path, capsys):
    before, after = results(tmp_path / "a"), results(tmp_path / "b", {"dense": 1, "magnitude": 1, "wanda": 1.05})
    assert status(before, after) == 1
    out = capsys.readouterr().out
    assert "output_error (layers): 14 moved, 0 added, 0 gone" in out and out.count("+5.00%") == 15
    assert "mean_output_error" in out and "magnitude" not in out
    assert status(after, before) == 1 and "-4.76%" in capsys.readouterr().out
    assert status(before, after, "--tolerance", "0.06") == 0


def test_gone_counts_and_added_does_not(tmp_path, capsys):
    whole, part = results(tmp_path / "a"), results(tmp_path / "b", {"dense": 1, "wanda": 1})
    assert status(part, whole) == 0 and "0 moved, 14 added, 0 gone" in capsys.readouterr().out
    assert status(whole, part) == 1 and "0 moved, 0 added, 14 gone" in capsys.readouterr().out


def test_other_versions_and_protocols_are_said(tmp_path, capsys):
    before = results(tmp_path / "a")
    after = results(tmp_path / "b", torch="2.14.0", commit="b" * 40, calibration_samples=128)
    assert status(before, after) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "protocol: calibration_samples: 64 -> 128",
        f"provenance: commit: {'a' * 40} -> {'b' * 40}",
        "provenance: torch: 2.13.0 -> 2.14.0",
    ]


def spread(root, spread: float, change: float = 1.0):
    """The folder of a study whose entry owl has the given spread."""
    own = cell("wanda", "60% row", allocation="owl", allocation_params={"spread": spread})
    return results(root, {"wanda": change}, plan=[own])


def test_an_allocation_with_other_parameters_is_another_cell(tmp_path, capsys):
    before, after = spread(tmp_path / "a", 0.08), spread(tmp_path / "b", 0.15, 1.5)
    assert status(before, after) == 1
    out = capsys.readouterr().out
    assert "output_error (layers): 0 moved, 14 added, 14 gone" in out and '{"spread": 0.15}' in out
    with pytest.raises(InputError, match="one meaning of allocation owl.*differ in its allocation_params"):
        status("merge", before, after, "--out", tmp_path / "merged")


def test_tables_that_do_not_name_the_allocator_are_compared_without_it(tmp_path, capsys):
    before, after = spread(tmp_path / "a", 0.08), spread(tmp_path / "b", 0.08, 1.5)
    for path in (before / "results/tables").glob("*.parquet"):
        pd.read_parquet(path).drop(columns=list(ALLOCATED), errors="ignore").to_parquet(path)
    for folders in ((before, after), (after, before)):
        assert status(*folders) == 1
        out = capsys.readouterr().out
        assert "layers.parquet is from a version without allocator, allocation_params." in out
        assert "output_error (layers): 14 moved, 0 added, 0 gone" in out


def test_no_tables_is_a_sentence(tmp_path):
    with pytest.raises(
        InputError, match=r"must hold cells.parquet directly, or in tables or results/tables. Got no such file\."
    ):
        status(tmp_path, tmp_path)


# --------------------------------------------------------------------------------------------------------------- merge


def test_halves_of_a_study_give_the_whole(tmp_path, capsys):
    whole = results(tmp_path / "whole") / "results/tables"
    one = results(tmp_path / "one", {"dense": 1, "wanda": 1})
    other = results(tmp_path / "other", {"dense": 1, "magnitude": 1})
    assert status("merge", one, other, "--out", tmp_path / "merged") == 0
    assert "2 folders, 3 cells, 0 incomplete" in capsys.readouterr().out
    for table in ("cells", "skipped"):  # in the order of the plan
        assert (tmp_path / f"merged/{table}.csv").read_text() == (whole / f"{table}.csv").read_text()
    for table in TABLES:
        mine, theirs = read_table(tmp_path / "merged", table), read_table(whole, table)
        if table == "comparisons":  # those of windows and items need files that are not in the tables
            theirs = theirs[theirs["metric"] == "output_error"]
            assert (mine["label"].item(), mine["other"].item()) == (theirs["other"].item(), theirs["label"].item())
            assert mine["effect"].item() == -theirs["effect"].item() and mine["p"].item() == theirs["p"].item()
            continue
        order = [name for name in ("label", "layer", "iteration") if name in mine]
        assert mine.sort_values(order, ignore_index=True).equals(theirs.sort_values(order, ignore_index=True))
    assert (tmp_path / "merged/main.md").read_text() == document(
        read_table(whole, "cells"), markdown, read_table(tmp_path / "merged", "comparisons")
    )


def test_texts_evaluated_on_two_machines_come_together(tmp_path):
    one = results(tmp_path / "one", texts=TEXTS[:1])
    other = results(tmp_path / "other", texts=TEXTS[1:])
    assert status("merge", one, other, "--out", tmp_path / "merged") == 0
    cells = read_table(tmp_path / "merged", "cells")
    assert set(cells["status"]) == {"done"} and len(cells) == 3 * 13
    assert len(read_table(tmp_path / "merged", "layers")) == 3 * 14


def test_duplicates_that_agree_are_those_of_the_first(tmp_path):
    one = results(tmp_path / "one", {"wanda": 1.0}, cpu="first")
    other = results(tmp_path / "other", {"wanda": 1.01, "magnitude": 1.0}, cpu="second")
    assert status("merge", one, other, "--out", tmp_path / "merged") == 0
    cells = read_table(tmp_path / "merged", "cells").set_index("label")
    assert set(cells.loc["wanda", "cpu"]) == {"first"} and set(cells.loc["magnitude", "cpu"]) == {"second"}
    assert set(cells.loc["dense", "status"]) == {"missing"}
    layers = read_table(tmp_path / "merged", "layers")
    expected = layer_frame(PLAN[2], 2)["output_error"].to_list()
    assert layers.loc[layers["label"] == "wanda", "output_error"].to_list() == pytest.approx(expected, rel=1e-12)


def test_three_folders_with_studies_of_their_own(tmp_path):
    folders = [results(tmp_path / one.columns["label"], plan=[one]) for one in PLAN]
    assert status("merge", *folders, "--out", tmp_path / "merged") == 0
    assert list(read_table(tmp_path / "merged", "cells")["label"].unique()) == ["dense", "magnitude", "wanda"]


@pytest.mark.parametrize(
    ("errors", "provenance", "told"),
    [
        (
            1.05,
            {},
            r"Got 14 in the layers tables of .*one and .*other that do not; the first is \S+ and \S+ for demo docs ",
        ),
        (
            1.0,
            {"calibration_samples": 128},
            r"differ in calibration_samples \(64 and 128\) of demo docs 0 shared wanda",
        ),
    ],
)
def test_duplicates_that_disagree_are_one_sentence(tmp_path, errors, provenance, told):
    one = results(tmp_path / "one", {"wanda": 1.0})
    other = results(tmp_path / "other", {"wanda": errors}, **provenance)
    with pytest.raises(InputError, match=told) as error:
        status("merge", one, other, "--out", tmp_path / "merged")
    assert str(error.value).count("\n") == 0 and not (tmp_path / "merged").exists()


def test_diverged_in_one_folder_alone_disagrees(tmp_path):
    one, other = results(tmp_path / "one"), results(tmp_path / "other")
    for path in other.glob("results/cells/*/*/*/wanda*/perplexity-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"perplexity": None}))
    collect(StudyInputs(PLAN, SKIPPED, evaluations(STUDY, EVALUATIONS)), other / "results/tables", root=other)
    with pytest.raises(InputError, match="differ in whether there is a value of demo docs 0 shared wanda"):
        status("merge", one, other, "--out", tmp_path / "merged")


@pytest.mark.parametrize("column", ["model_sha256", "calibration_samples", "dtype"])
def test_names_that_mean_two_things_are_not_merged(tmp_path, column):
    known: dict[str, Any] = {"model_sha256": "a", "calibration_samples": 64, "dtype": "float32"}
    changed: dict[str, Any] = {**known, column: 1 if "samples" in column else "b"}
    one = results(tmp_path / "one", {"wanda": 1.0}, **known)
    other = results(tmp_path / "other", {"magnitude": 1.0}, **changed)
    with pytest.raises(InputError, match=f"differ in its {column}"):
        status("merge", one, other, "--out", tmp_path / "merged")


def test_the_merged_tables_have_a_folder_of_their_own(tmp_path):
    one, other = results(tmp_path / "one", {"wanda": 1.0}), results(tmp_path / "other", {"magnitude": 1.0})
    with pytest.raises(InputError, match="a folder of their own"):
        status("merge", one, other, "--out", one / "results/tables")


def test_one_folder_is_nothing_to_merge(tmp_path):
    folder = results(tmp_path)
    with pytest.raises(InputError, match="at least two different folders"):
        status("merge", folder, folder, "--out", tmp_path / "merged")


def test_merged_tables_are_typed_as_collect_writes_them(tmp_path):
    one, other = results(tmp_path / "one", {"wanda": 1.0}), results(tmp_path / "other", {"magnitude": 1.0})
    status("merge", one, other, "--out", tmp_path / "merged")
    for table in TABLES:
        types = [read_table(place, table).dtypes for place in (tmp_path / "merged", one / "results/tables")]
        pd.testing.assert_series_equal(*types)
