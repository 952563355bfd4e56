"""The regression check: what moved, by how much, and with which exit status."""

import math
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from layerwise.cli.app import app
from layerwise.comparison import regression
from layerwise.comparison.folders import ALLOCATED, changed_numbers, report
from layerwise.results.cell_results import evaluations
from layerwise.results.collect import StudyInputs, collect
from layerwise.runtime.errors import InputError
from layerwise.study import config_file
from tests.support.synthetic_tables import EVALUATIONS, STUDY, cell, layer_frame, write_cell


def frame(**errors: float) -> pd.DataFrame:
    return pd.DataFrame({"label": "wanda", "layer": list(errors), "output_error": list(errors.values())})


def test_agreement_within_the_tolerance():
    changes = changed_numbers(frame(q=0.1019, k=0.5), frame(q=0.1, k=0.5), 0.02)
    assert changes.empty
    assert report(changes, 2, "output_error", 0.02) == "output_error: all 2 agree within 2%."


@pytest.mark.parametrize(("now", "change"), [(0.103, 0.03), (0.05, -0.5)])
def test_worse_and_better_have_both_moved(now, change):
    (moved,) = changed_numbers(frame(q=now, k=0.5), frame(q=0.1, k=0.5), 0.02).to_dict("records")
    assert (moved["layer"], moved["status"]) == ("q", "moved")
    assert moved["change"] == pytest.approx(change)


def test_added_and_gone_in_the_order_of_today():
    changes = changed_numbers(frame(z=1.0, new=0.1, a=2.0), frame(a=1.0, z=2.0, old=0.3), 0.02)
    assert changes[["layer", "status"]].values.tolist() == [
        ["z", "moved"], ["new", "added"], ["a", "moved"], ["old", "gone"]
    ]  # fmt: skip


def test_an_error_that_was_zero():
    assert changed_numbers(frame(q=1e-15), frame(q=0.0), 0.02).empty
    (moved,) = changed_numbers(frame(q=1e-6), frame(q=0.0), 0.02).to_dict("records")
    assert math.isinf(moved["change"])
    assert "from zero" in report(changed_numbers(frame(q=1e-6), frame(q=0.0), 0.02), 1, "output_error", 0.02)


def test_a_number_that_is_not_a_number_has_moved():
    assert list(changed_numbers(frame(q=math.nan), frame(q=0.1), 0.02)["status"]) == ["moved"]


def test_a_key_with_two_numbers_is_a_sentence():
    with pytest.raises(InputError, match="Got two of wanda q"):
        changed_numbers(pd.concat([frame(q=1.0), frame(q=2.0)]), frame(q=1.0), 0.02)


def test_the_report_is_an_aligned_table_with_counts():
    changes = changed_numbers(frame(q_proj=0.11, new=0.1), frame(q_proj=0.1, old=0.3), 0.02)
    *table, summary = report(changes, 2, "output_error", 0.02).splitlines()
    assert summary == "output_error: 1 moved, 1 added, 1 gone; 2 compared, tolerance 2%."
    assert table[0].split() == ["cell", "layer", "accepted", "now", "change"]
    assert table[2].split() == ["wanda", "q_proj", "0.1", "0.11", "+10.00%"]
    assert len({line.rstrip().rfind(" ") > 0 for line in table}) == 1
    assert table[0].index("layer") == table[2].index("q_proj")


def study(root: Path, change: float = 1.0, methods: tuple[str, ...] = ("magnitude", "wanda")) -> Path:
    """Tables of a small study in which the errors of block 1's q_proj are changed by a factor."""
    cells = [cell(method, "60% row") for method in methods]
    for one in cells:
        folder = write_cell(root, one)
        layers = layer_frame(one, 2)
        chosen = (layers["block"] == 1) & (layers["kind"] == "q_proj")
        layers.loc[chosen, "output_error"] *= change
        layers.to_parquet(folder / "layers.parquet")
    collect(StudyInputs(cells, [], evaluations(STUDY, EVALUATIONS)), root / "tables", root=root)
    return root / "tables"


def run(command: str, tables: Path, accepted: Path) -> int:
    return app([command, "--tables", str(tables), "--accepted", str(accepted)], standalone_mode=False)


def test_check_after_accept_agrees_in_one_line_per_table(tmp_path, capsys):
    tables = study(tmp_path / "a")
    assert run("accept", tables, tmp_path / "accepted") == 0
    accepted = pd.read_csv(tmp_path / "accepted" / "layers.csv")
    assert list(accepted.columns) == [*regression.CELL, "layer", "output_error"] and len(accepted) == 28
    assert accepted["label"].is_monotonic_increasing
    capsys.readouterr()
    assert run("regression", tables, tmp_path / "accepted") == 0
    assert capsys.readouterr().out.splitlines() == [
        "output_error (layers): all 28 agree within 2%.",
        "perplexity (cells): all 4 agree within 2%.",
        "kl (divergences): all 4 agree within 2%.",
    ]


def test_numbers_that_an_earlier_version_accepted_are_held_and_the_rest_is_said(tmp_path, capsys):
    tables, accepted = study(tmp_path / "a"), tmp_path / "accepted"
    run("accept", tables, accepted)
    (accepted / "divergences.csv").unlink()
    capsys.readouterr()
    assert run("regression", tables, accepted) == 0
    told = "kl (divergences): none accepted yet; 4 not compared."
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert run("regression", study(tmp_path / "b", 1.05), accepted) == 1 and told in capsys.readouterr().out


def test_a_divergence_that_moved_fails(tmp_path, capsys):
    tables, accepted = study(tmp_path / "a"), tmp_path / "accepted"
    run("accept", tables, accepted)
    path = accepted / "divergences.csv"
    held = pd.read_csv(path)
    assert list(held.columns) == [*regression.CELL, "text", "kl"] and len(held) == 4
    held.assign(kl=1.1 * held["kl"]).to_csv(path, index=False)
    assert run("regression", tables, accepted) == 1
    assert "kl (divergences): 4 moved, 0 added, 0 gone" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "shown"), [(1.05, "+5.00%"), (0.9, "-10.00%")])
def test_check_fails_when_a_layer_moved(tmp_path, capsys, change, shown):
    run("accept", study(tmp_path / "a"), tmp_path / "accepted")
    assert run("regression", study(tmp_path / "b", change), tmp_path / "accepted") == 1
    out = capsys.readouterr().out
    assert out.count("model.layers.1.self_attn.q_proj") == 2 and shown in out and "2 moved, 0 added, 0 gone" in out


def test_gone_fails_and_added_does_not(tmp_path, capsys):
    small, large = study(tmp_path / "a", methods=("wanda",)), study(tmp_path / "b")
    run("accept", small, tmp_path / "small")
    run("accept", large, tmp_path / "large")
    assert run("regression", large, tmp_path / "small") == 0
    assert "0 moved, 14 added, 0 gone" in capsys.readouterr().out
    assert run("regression", small, tmp_path / "large") == 1
    assert "0 moved, 0 added, 14 gone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ({"a": 1, "b": None}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": None}, False),  # a parameter that no longer exists
        ({"a": 2, "b": None}, {"a": 1}, False),
        ({"chain": [{"awp": {"a": 1, "b": 2}}, {"gptq": {}}]}, {"chain": [{"awp": {"a": 1}}, {"gptq": {}}]}, True),
        ({"chain": [{"awp": {}}, {"gptq": {}}]}, {"chain": [{"awp": {}}]}, False),
        ({"start": {"wanda": {}}}, {"start": None}, False),
    ],
)
def test_parameters_that_only_gained_some(new, old, expected):
    assert regression.extends(new, old) is expected


def test_a_method_that_gained_a_parameter_keeps_its_accepted_numbers(tmp_path, capsys):
    accepted = tmp_path / "accepted"
    run("accept", study(tmp_path / "a"), accepted)
    tables = study(tmp_path / "b", change=1.05)
    for name in ("layers", "cells"):
        data = pd.read_parquet(tables / f"{name}.parquet")
        data["params"] = data["params"].where(data["label"] != "wanda", '{"gained":null}')
        data.to_parquet(tables / f"{name}.parquet")
    capsys.readouterr()
    assert run("regression", tables, accepted) == 1
    out = capsys.readouterr().out
    assert "output_error (layers): 2 moved, 0 added, 0 gone; 28 compared" in out
    assert out.splitlines()[-1] == "Methods or allocators with more parameters than when they were accepted: wanda."
    data = pd.read_csv(accepted / "layers.csv").assign(params="{")  # edited by hand
    data.to_csv(accepted / "layers.csv", index=False)
    assert run("regression", tables, accepted) == 1 and "28 gone" in capsys.readouterr().out


def test_numbers_accepted_without_the_allocator_are_held(tmp_path, capsys):
    accepted = tmp_path / "accepted"
    run("accept", study(tmp_path / "a"), accepted)
    for path in accepted.glob("*.csv"):
        pd.read_csv(path, dtype=str, keep_default_na=False).drop(columns=list(ALLOCATED)).to_csv(path, index=False)
    assert run("regression", study(tmp_path / "b"), accepted) == 0
    capsys.readouterr()
    assert run("regression", study(tmp_path / "c", 1.05), accepted) == 1
    assert "output_error (layers): 2 moved, 0 added, 0 gone; 28 compared" in capsys.readouterr().out


def test_an_allocator_that_gained_a_parameter_keeps_its_accepted_numbers_and_one_that_changed_does_not(
    tmp_path, capsys
):
    tables, accepted = study(tmp_path / "a"), tmp_path / "accepted"
    run("accept", tables, accepted)
    for params, code, told in (
        ('{"gained":1}', 0, "were accepted: uniform."),
        ("[]", 1, "28 added, 28 gone"),
    ):
        for name in ("layers", "cells"):
            path = tables / f"{name}.parquet"
            pd.read_parquet(path).assign(allocation_params=params).to_parquet(path)
        capsys.readouterr()
        assert run("regression", tables, accepted) == code
        assert told in capsys.readouterr().out


def test_nothing_accepted_yet_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="`layerwise accept` writes it"):
        run("regression", study(tmp_path / "a"), tmp_path / "accepted")


def test_a_study_s_numbers_by_its_name_and_by_its_file(tmp_path, monkeypatch):
    root, folder, local = tmp_path / "shipped", tmp_path / "here", Path("results/accepted")
    for path in (root / "config", folder, *(root / local / name for name in ("embedded", "pruning"))):
        path.mkdir(parents=True)
    ships = {"embedded": "config/config.yaml", "pruning": "config/pruning.yaml", "seeds": "config/seeds.yaml"}
    for path in (*(root / file for file in ships.values()), folder / "mine.yaml", folder / "pruning.yaml"):
        path.write_text("")
    monkeypatch.setattr(config_file, "ROOT", root)
    monkeypatch.setattr(regression, "ROOT", root)
    monkeypatch.chdir(folder)
    for name, file in ships.items():
        for study in (name, root / file):
            assert regression.folder_of(study) == local / name
            # No numbers ship for `seeds`.
            assert regression.accepted_folder(study) == (local if name == "seeds" else root / local) / name
    for study in ("mine.yaml", folder / "mine.yaml"):
        assert regression.folder_of(study) == regression.accepted_folder(study) == local / "mine"
    assert regression.accepted_folder("pruning.yaml") == local / "pruning"  # what ships is of another study
    (local / "pruning").mkdir(parents=True)
    assert regression.accepted_folder("pruning") == local / "pruning"  # what was accepted here comes first
    for function in (regression.folder_of, regression.accepted_folder):
        with pytest.raises(InputError, match="A study must be a file or the name of one that ships"):
            function("no-such-study")


def test_numbers_that_ship_can_be_read():
    for name in ("embedded", "pruning", "quantisation"):
        folder = regression.accepted_folder(name)
        present = {path.stem for path in folder.glob("*.csv")}
        assert set(regression.NUMBERS) - set(regression.LATER) <= present <= set(regression.NUMBERS)
        for table in present:
            assert len(regression.accepted_numbers(folder, table)) > 20


def test_a_strange_accepted_file_is_a_sentence(tmp_path):
    tables = study(tmp_path / "a")
    run("accept", tables, tmp_path)
    (tmp_path / "layers.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="must have the columns"):
        run("regression", tables, tmp_path)


def test_a_failed_cell_is_gone(tmp_path):
    tables = study(tmp_path / "a")
    run("accept", tables, tmp_path / "accepted")
    data = pq.read_table(tables / "layers.parquet")
    pq.write_table(data.slice(14), tables / "layers.parquet")
    assert run("regression", tables, tmp_path / "accepted") == 1
