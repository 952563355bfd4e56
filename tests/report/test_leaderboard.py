"""The leaderboard: ranks within one protocol alone, every difference marked, and a page that escapes what it shows."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli.app import app
from layerwise.comparison.leaderboard import CONTESTED, Board, Standing, leaderboard, study_folders
from layerwise.report.leaderboard_page import HEADER, leaders, line, page, write_leaderboard
from layerwise.results.protocol import MARK
from layerwise.runtime.errors import InputError
from layerwise.storage.table_schema import read_table
from tests.support.result_folders import results
from tests.support.synthetic_tables import SyntheticCell, cell, perplexity_of

PRUNERS = ("magnitude", "wanda", "sparsegpt", "alps")
EVERY = dict.fromkeys(["dense", *PRUNERS], 1.0)


def plan(
    methods: Sequence[str] = PRUNERS, model: str = "demo", seeds: Sequence[int] = (0,), mode: str = "shared"
) -> list[SyntheticCell]:
    pruned = [cell(method, "60% row", mode, model, seed=seed) for method in methods for seed in seeds]
    return [cell("dense", "dense", model=model), *pruned]


def boards_of(*folders: Path) -> dict[tuple[str, str], Board]:
    boards, _ = leaderboard(study_folders([str(folder) for folder in folders]))
    return {(board.text, board.target): board for board in boards}


def lines_of(board: Board) -> dict[tuple[str, str], Standing]:
    """(study, label) -> row."""
    return {(study, own.label): own for _, standings in board.groups for own in standings for study in own.studies}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Two models under one calibration, one of them with another calibration too, over three seeds."""
    root = tmp_path_factory.mktemp("studies")
    return [
        results(root / "first", EVERY, plan=plan()),
        results(root / "other", EVERY, plan=plan(model="large"), model_sha256="b" * 64),
        results(root / "longer", EVERY, plan=plan(("wanda", "alps"), seeds=(0, 1, 2)), calibration_samples=128),
    ]


def test_ratios_are_to_the_dense_model_of_the_same_study(folders):
    board = boards_of(*folders)["docs", "60% row"]
    for (study, label), own in lines_of(board).items():
        seeds = (0, 1, 2) if study == "longer" else (0,)
        model = "large" if study == "other" else "demo"
        dense = perplexity_of(cell("dense", "dense", model=model))
        truth = [perplexity_of(cell(label, "60% row", model=model, seed=seed)) for seed in seeds]
        assert own.ratio == pytest.approx(statistics.fmean(truth) / dense, rel=1e-12)
        assert len(own.ratios) == len(seeds) and own.dense == pytest.approx(dense)
        assert own.model == model


def test_a_rank_counts_one_group_and_one_protocol(folders):
    board = boards_of(*folders)["docs", "60% row"]
    lines = lines_of(board)
    assert {comparison for comparison, _ in board.groups} == {"mask-only", "weight-updating"}
    ranks = {name: (own.rank, own.among) for name, own in lines.items()}
    for study in ("first", "other"):
        assert ranks[study, "wanda"] == (1, 2) and ranks[study, "magnitude"] == (2, 2)
        assert ranks[study, "alps"] == (1, 2) and ranks[study, "sparsegpt"] == (2, 2)
    assert ranks["longer", "wanda"] == ranks["longer", "alps"] == (1, 1)
    for _, standings in board.groups:
        ratios = [own.ratio or 0.0 for own in standings]
        assert ratios == sorted(ratios)


def test_rows_of_two_protocols_never_have_the_same_marks(folders):
    board = boards_of(*folders)["docs", "60% row"]
    marks: dict[tuple[str, ...], set[object]] = {}
    for own in lines_of(board).values():
        marks.setdefault(own.marks, set()).add(tuple(own.protocol.items()))
    assert len(marks) == 3 and all(len(protocols) == 1 for protocols in marks.values())
    assert lines_of(board)["first", "wanda"].marks == ()
    notes = dict(board.notes)
    [model] = lines_of(board)["other", "wanda"].marks
    assert notes[model] == "model large instead of demo."
    samples, seeds = lines_of(board)["longer", "wanda"].marks
    assert notes[samples] == "calibration samples 128 instead of 64."
    assert notes[seeds] == "seeds 0, 1, 2 instead of 0."


def test_allocations_of_one_name_with_other_parameters_are_rows_of_their_own(tmp_path):
    folders = []
    for spread in (0.08, 0.15):
        spec: dict[str, Any] = {"allocation": "owl", "allocation_params": {"spread": spread, "threshold": 5}}
        own = [cell("dense", "dense"), *(cell(name, "60% row", **spec) for name in ("wanda", "magnitude"))]
        folders.append(results(tmp_path / f"spread-{spread}", {**EVERY, "wanda": 1 + spread}, plan=own))
    board = boards_of(*folders)["docs", "60% row owl"]
    assert CONTESTED not in dict(board.notes)
    names = [own.name for _, standings in board.groups for own in standings if own.label == "wanda"]
    assert sorted(names) == ["wanda (owl spread 0.08)", "wanda (owl spread 0.15)"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dtype": "float16"}, "dtype float16 instead of not recorded."),
        ({"compute_dtype": "bfloat16"}, "compute dtype bfloat16 instead of not recorded."),
        ({"model_sha256": "c" * 64}, "model files cccccccc instead of demo."),
        ({"model_quantisation": "Q4_1 7"}, "model quantisation Q4_1 7 instead of not recorded."),
        ({"calibration_sha256": "d" * 64}, "calibration text dddddddd instead of docs."),
        ({"calibration_length": 64}, "calibration length 64 instead of not recorded."),
        ({"calibration_sampling": "documents"}, "calibration sampling documents instead of not recorded."),
        ({"calibration_dtype": "float16"}, "calibration dtype float16 instead of not recorded."),
    ],
)
def test_each_part_of_the_protocol_is_marked(tmp_path, changed, said):
    first = results(tmp_path / "a", EVERY, plan=plan())
    other = results(tmp_path / "b", EVERY, plan=plan(("wanda",)), **changed)
    board = boards_of(first, other)["docs", "60% row"]
    own = lines_of(board)["b", "wanda"]
    assert [dict(board.notes)[mark] for mark in own.marks] == [said] and own.among == 1
    assert lines_of(board)["a", "wanda"].among == 2


def test_another_mode_and_another_evaluation_are_marked(tmp_path):
    first = results(tmp_path / "a", EVERY, plan=plan())
    moded = results(tmp_path / "b", EVERY, plan=plan(("wanda",), mode="sequential"))
    other = results(tmp_path / "c", EVERY, plan=plan(("wanda",)))
    table = other / "results/tables/cells.parquet"
    cells = read_table(other / "results/tables", "cells")
    cells["eval_length"] = cells["eval_length"].where(cells["eval_length"].isna(), 1024)
    cells.to_parquet(table)
    board = boards_of(first, moded, other)["docs", "60% row"]
    notes, lines = dict(board.notes), lines_of(board)
    assert [notes[mark] for mark in lines["b", "wanda"].marks] == ["mode sequential instead of shared."]
    said = ["evaluation window length 1024 instead of 512."]
    assert [notes[mark] for mark in lines["c", "wanda"].marks] == said


def test_a_cell_of_two_studies_is_one_row(tmp_path):
    first = results(tmp_path / "a", EVERY, plan=plan())
    again = results(tmp_path / "b", EVERY, plan=plan(("wanda",)))
    board = boards_of(first, again)["docs", "60% row"]
    assert lines_of(board)["a", "wanda"].studies == ("a", "b") and lines_of(board)["a", "wanda"].among == 2
    assert board.notes == []


def test_two_numbers_of_one_cell_are_contested(tmp_path):
    first = results(tmp_path / "a", EVERY, plan=plan())
    again = results(tmp_path / "b", EVERY, plan=plan(("wanda",)))
    cells = read_table(again / "results/tables", "cells")
    cells.loc[(cells["metric"] == "perplexity") & (cells["label"] == "wanda"), "value"] *= 1.1
    cells.to_parquet(again / "results/tables/cells.parquet")
    board = boards_of(first, again)["docs", "60% row"]
    lines = lines_of(board)
    assert lines["a", "wanda"].marks == lines["b", "wanda"].marks == (CONTESTED,)
    assert lines["a", "magnitude"].marks == () and CONTESTED in dict(board.notes)


def test_bold_rows_are_those_not_shown_to_differ_from_the_first(tmp_path):
    folder = results(tmp_path / "a", EVERY, plan=plan())
    compared = read_table(folder / "results/tables", "comparisons")
    pair = (compared["metric"] == "perplexity") & compared["label"].isin(["sparsegpt", "alps"])
    for verdict, bold in (("no difference shown", True), ("better", False)):
        compared.loc[pair, "verdict"] = verdict
        compared.to_parquet(folder / "results/tables/comparisons.parquet")
        lines = lines_of(boards_of(folder)["docs", "60% row"])
        assert lines["a", "alps"].best and lines["a", "sparsegpt"].best is bold


def test_rows_without_a_number_have_no_rank(tmp_path):
    part = results(tmp_path / "a", {"dense": 1.0, "wanda": 1.0}, plan=plan())
    lines = lines_of(boards_of(part)["docs", "60% row"])
    assert lines["a", "magnitude"].rank is None and lines["a", "magnitude"].shown == "missing"
    assert line(lines["a", "magnitude"])["rank"] == "–" and line(lines["a", "wanda"])["rank"] == "alone"
    alone = results(tmp_path / "b", {"wanda": 1.0}, plan=plan(("wanda",)))
    own = lines_of(boards_of(alone)["docs", "60% row"])["b", "wanda"]
    assert own.ratio is None and own.rank is None and line(own)["dense"] == "none"


def test_other_versions_are_marked_and_said_once(tmp_path):
    first = results(tmp_path / "a", EVERY, plan=plan())
    other = results(tmp_path / "b", EVERY, plan=plan(("wanda",)), torch="2.14.0", calibration_samples=9)
    boards, sentences = leaderboard(study_folders([str(first), str(other)]))
    marks = {name: own.marks for name, own in lines_of(boards[0]).items()}
    assert marks["b", "wanda"][-1] == MARK and MARK not in marks["a", "wanda"]
    assert [sentence for sentence in sentences if "torch 2.14.0" in sentence]


def test_parameters_are_shown_where_they_tell_rows_apart(tmp_path):
    plans = []
    for damping in (0.01, 0.1):
        own = cell("sparsegpt", "60% row", params={"damping": damping, "blocksize": 128})
        plans.append([cell("dense", "dense"), own])
    folders = [results(tmp_path / name, EVERY, plan=own) for name, own in zip("ab", plans, strict=True)]
    lines = lines_of(boards_of(*folders)["docs", "60% row"])
    assert [lines[study, "sparsegpt"].name for study in "ab"] == ["sparsegpt (damping 0.01)", "sparsegpt (damping 0.1)"]
    assert [lines[study, "sparsegpt"].among for study in "ab"] == [2, 2]


def test_the_page_has_every_row_and_escapes_what_it_shows(tmp_path):
    evil = "<script>alert(1)</script>"
    first = results(tmp_path / "a", EVERY, plan=plan())
    other = results(tmp_path / "b", EVERY, plan=plan(model="large"), model_sha256="b" * 64)
    studies = study_folders([f"{evil}={first}".replace("/script", "script"), str(other)])
    boards, sentences = leaderboard(studies)
    html = page(boards, [*sentences, evil], studies)
    assert "<script" not in html and "&lt;script&gt;" in html
    for i, board in enumerate(boards):
        section = html[html.index(f'id="board-{i}"') :].partition("</section>")[0]
        shown = re.findall(r"<tr(?: class=\"best\")?><td>(.*?)</tr>", section)
        standings = [own for _, rows in board.groups for own in rows]
        for row, own in zip(shown, standings, strict=True):
            texts = [re.sub("<.*?>", "", text) for text in row.split("</td>")[:-1]]
            expected = line(own)
            expected["rank"] += ",".join(own.marks)
            assert texts == [re.sub("[<>]", lambda c: {"<": "&lt;", ">": "&gt;"}[c[0]], expected[h]) for h in HEADER]
        for mark, sentence in board.notes:
            assert f'<sup class="mark">{mark}</sup> {sentence}' in section
    first_of = list(leaders(boards))
    assert [own["comparison"] for own in first_of] == ["mask-only", "weight-updating"] * 2
    assert [[name for name, *_ in own["first"]] for own in first_of] == [["wanda"] * 2, ["alps"] * 2] * 2


def test_the_command_writes_the_page(tmp_path, capsys):
    first = results(tmp_path / "a", EVERY, plan=plan())
    other = results(tmp_path / "b", EVERY, plan=plan(("wanda",)), calibration_samples=9)
    out = tmp_path / "pages/board.html"
    assert app(["leaderboard", f"one={first}", str(other), "--out", str(out)], standalone_mode=False) == 0
    assert f"2 studies, 2 boards, 10 rows -> {out}" in capsys.readouterr().out
    assert out.read_text("utf-8").startswith("<!doctype html>")


def test_bad_folders_are_sentences(tmp_path):
    first = results(tmp_path / "a", EVERY, plan=plan())
    with pytest.raises(InputError, match=r"The folder '.*/absent' does not exist\."):
        write_leaderboard([str(tmp_path / "absent")], tmp_path / "x.html")
    with pytest.raises(InputError, match=r"must have a name of its own. Got two called a: write NAME="):
        write_leaderboard([str(first), str(first / "results")], tmp_path / "x.html")
    cells = read_table(first / "results/tables", "cells")
    cells.loc[cells.index[-1], "calibration_samples"] = 9
    cells.to_parquet(first / "results/tables/cells.parquet")
    with pytest.raises(InputError, match="a mixes two protocols: .*calibration_samples"):
        write_leaderboard([str(first)], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
