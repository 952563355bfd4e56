"""A calibration that has seen what is evaluated: whatever the texts are called, from their files to the tables."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from layerwise.results.cell_results import evaluations
from layerwise.results.collect import StudyInputs, collect
from layerwise.results.contamination import contamination
from layerwise.results.main_table import tables
from layerwise.results.table_text import markdown
from layerwise.runtime.errors import InputError
from layerwise.sources import overlap, tokens
from layerwise.sources.ngrams import NGRAM
from layerwise.storage.table_schema import read_table
from tests.support.synthetic_tables import (
    EVALUATIONS,
    STUDY,
    SyntheticCell,
    cell,
    cells_table,
    write_cell,
    write_overlap,
)
from tests.support.workflow_harness import write_tokenizer

WORDS = ("river", "stone", "window", "garden", "copper", "lantern", "paper", "engine", "winter", "valley", "bridge")
HOLDS = "draw from texts of which one holds"
NOTHING = {"contaminated": False, "contamination": None, "overlap": 0.0}


def sentences(count: int, seed: int) -> str:
    """A text of so many sentences of one kind, four to a line."""
    draw = random.Random(seed)
    one, another = partial(draw.choice, WORDS), partial(draw.randint, 2, 99)
    made = [f"The {one()} near the {one()} has {another()} {one()}s." for _ in range(count)]
    return "\n".join(" ".join(made[start : start + 4]) for start in range(0, count, 4)) + "\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, sentences(400, 1))
    return {"path": str(folder)}


def draw(
    model: dict[str, Any],
    calibration: dict[str, Any],
    evaluation: dict[str, Any],
    out: Path,
    length: int = 64,
    samples: int = 4,
    sampling: str = "stream",
) -> dict[str, Any]:
    """What the two jobs of tokens and that of their overlap leave in `out`."""
    cuts = {
        "calibration": {"samples": samples, "length": length, "seed": 0, "sampling": sampling},
        "evaluation": {"length": length, "samples": 8},
    }
    for task, text in (("calibration", calibration), ("evaluation", evaluation)):
        told = ["--model", json.dumps(model), "--text", json.dumps(text), f"--{task}", json.dumps(cuts[task])]
        tokens.main([task, *told, "--out", str(out / f"{task}-x-01234567.safetensors")])
    files = [part for task in cuts for part in (f"--{task}", str(out / f"{task}-x-01234567.safetensors"))]
    overlap.main([*files, "--out", str(out / "overlap.json")])
    return json.loads((out / "overlap.json").read_text())


# ------------------------------------------------------------------------------------------------- what the texts hold

PAGES = sentences(400, 3)
ROWS = "".join(json.dumps({"text": line}) + "\n" for line in PAGES.splitlines())
SAME = {  # what is calibrated on, where PAGES is evaluated: a file, its content and what is said of it
    "a copy": ("other.txt", PAGES, "draw from the same text"),
    "a Windows editor's": ("other.txt", "\ufeff" + PAGES.replace("\n", "\r\n"), "draw from the same text"),
    "other line breaks": (
        "other.txt",
        PAGES.replace("\n", " "),
        f"{HOLDS} 100% of the other",
    ),
    "as JSON": ("other.jsonl", ROWS, f"{HOLDS} 100% of the other"),
    "a part": ("other.txt", PAGES[3000:9000], f"{HOLDS} 100% of the other"),
    "more": ("other.txt", sentences(800, 5) + PAGES, f"{HOLDS} 100% of the other"),
    "in part": ("other.txt", sentences(400, 5) + PAGES[:9000], HOLDS),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_text_is_known_by_what_it_holds(tmp_path, capsys, model, kind):
    name, content, what = SAME[kind]
    (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "test.txt").write_bytes(PAGES.encode())
    found = draw(model, {"path": str(tmp_path / name)}, {"path": str(tmp_path / "test.txt")}, tmp_path)
    assert found["contamination"].startswith(what)
    told = capsys.readouterr().err
    assert told.startswith(f"warning: calibration x-01234567 and evaluation x-01234567 {found['contamination']} (")
    assert "data-aware methods may look better than on unseen text" in told
    assert contamination(None, tmp_path / "overlap.json")["contaminated"]


def test_windows_that_were_calibrated_on_are_known_by_their_n_grams(tmp_path, capsys, model):
    """A long text that holds a little of another one, just what is drawn."""
    (tmp_path / "test.txt").write_text(PAGES)
    documents = [PAGES[500:900], *(sentences(1, seed).strip() for seed in range(200))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    calibration, evaluation = ({"path": str(tmp_path / name)} for name in ("train.jsonl", "test.txt"))
    found = draw(model, calibration, evaluation, tmp_path, samples=1, sampling="documents")
    assert found["contamination"] == f"share n-grams of {NGRAM} tokens"
    assert found["text_overlap"] < overlap.MOST_TEXT
    assert found["reverse"] == 1.0 and found["overlap"] == 15 / (8 * 64 - 49)
    shares = f"({100 * found['overlap']:.1f}% of the evaluation's n-grams of 50 tokens are in the calibration"
    assert shares in capsys.readouterr().err
    columns = contamination(None, tmp_path / "overlap.json")
    assert columns == {"contaminated": True, "contamination": found["contamination"], "overlap": found["overlap"]}


@pytest.mark.parametrize("length", [49, 64])
def test_texts_of_one_kind_that_share_nothing_are_left_alone(tmp_path, capsys, model, length):
    for name, seed in (("train", 2), ("test", 3)):
        (tmp_path / f"{name}.txt").write_text(sentences(800, seed))
    calibration, evaluation = ({"path": str(tmp_path / f"{name}.txt")} for name in ("train", "test"))
    found = draw(model, calibration, evaluation, tmp_path, length, 16)
    assert found["contamination"] is None and capsys.readouterr().err == ""
    assert found["text_overlap"] == 0.0
    shares = None if length < NGRAM else 0.0  # sequences shorter than an n-gram have none
    assert found["overlap"] == found["reverse"] == shares
    assert contamination(None, tmp_path / "overlap.json") == NOTHING | {"overlap": shares}


def test_a_windows_text_gives_the_tokens_of_the_plain_one(tmp_path, model):
    (tmp_path / "plain.txt").write_bytes(PAGES.encode())
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + PAGES.replace("\n", "\r\n").encode())
    pages = "\n\n".join(PAGES.splitlines())
    (tmp_path / "pages.txt").write_bytes(pages.replace("\n", "\r\n").encode())
    cut = {"length": 64, "samples": 8}
    plain, about_plain = tokens.tokens(model, {"path": str(tmp_path / "plain.txt")}, cut, "evaluation")
    windows, about = tokens.tokens(model, {"path": str(tmp_path / "windows.txt")}, cut, "evaluation")
    np.testing.assert_array_equal(windows, plain)
    assert about == about_plain | {"dataset": about["dataset"], "normalised": "byte order mark, line ends"}
    draw = {"length": 16, "samples": 4, "seed": 0, "sampling": "documents"}
    text = {"path": str(tmp_path / "pages.txt"), "separator": "\n\n"}
    _, about = tokens.tokens(model, text, draw, "calibration")
    assert about["documents"] == 100 and about["normalised"] == "line ends"


# ------------------------------------------------------------------------------------------ where the texts come from


def reasons(calibration: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, str]:
    """Calibration set -> what it has in common with the evaluation, by their config alone."""
    config = {"texts": {"c": calibration, "e": evaluation}, "calibration": {"c": {"text": "c"}}}
    (found,) = evaluations(config, {"e-01234567": {"name": "e", "text": "e"}})
    return dict(found.shared_with)


def test_a_file_is_the_same_by_whatever_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("test.txt", "other.txt"):
        Path(name).write_text("text")
    Path("link.txt").symlink_to("test.txt")
    Path("hard.txt").hardlink_to("test.txt")
    Path("folder").symlink_to(".")
    for path in (
        str(tmp_path / "test.txt"),
        "./test.txt",
        "folder/test.txt",
        "link.txt",
        "hard.txt",
    ):
        for dataset in ({}, {"dataset": "another"}):  # whatever it is said to be of
            assert reasons({"path": path, **dataset}, {"path": "test.txt"})["c"].startswith("the same file, "), path
    assert reasons({"path": "other.txt"}, {"path": "test.txt"}) == {}
    shutil.copy("test.txt", "copy.txt")
    assert reasons({"path": "copy.txt"}, {"path": "test.txt"}) == {}  # which its content tells


# --------------------------------------------------------------------------------------------------------- the tables


@pytest.fixture
def study(tmp_path) -> list[SyntheticCell]:
    cells = [cell("wanda", "50% row"), cell("magnitude", "50% row")]
    for one in cells:
        write_cell(tmp_path, one)
    return cells


def columns(root: Path, cells: list[SyntheticCell], partial: bool = False) -> dict[str, list[Any]]:
    """Text -> contaminated, contamination and overlap of the first cell's perplexity."""
    collect(StudyInputs(cells, [], evaluations(STUDY, EVALUATIONS)), root / "tables", partial, root)
    found = read_table(root / "tables", "cells").query("metric == 'perplexity' and label == 'wanda'").set_index("text")
    chosen = found[["contaminated", "contamination", "overlap"]].astype(object)
    return {text: [None if pd.isna(value) else value for value in row] for text, *row in chosen.itertuples()}


def test_the_tables_say_whether_and_why(tmp_path, study):
    of_name = [True, "draw from the same data set, docstrings", 0.0]
    assert columns(tmp_path, study) == {"docs": of_name, "wiki": [False, None, 0.0]}
    path = tmp_path / study[0].overlap("wiki-00000002")
    write_overlap(path, 0.25, "share n-grams of 50 tokens")
    assert columns(tmp_path, study)["wiki"] == [True, "share n-grams of 50 tokens", 0.25]
    path.unlink()
    assert columns(tmp_path, study, partial=True) == {"docs": of_name, "wiki": [None, None, None]}  # it is not known


def test_a_broken_file_of_an_overlap_is_named(tmp_path, study):
    path = tmp_path / study[0].overlap("wiki-00000002")
    path.write_text("{")
    with pytest.raises(InputError, match="wiki-00000002.json cannot be used: .*run again to make it"):
        columns(tmp_path, study)
    path.write_text("{}")
    with pytest.raises(InputError, match="wiki-00000002.json cannot be used: it lacks 'overlap'"):
        columns(tmp_path, study)
    assert columns(tmp_path, study, partial=True)["wiki"] == [None, None, None]


def test_the_note_of_the_main_table_says_why():
    cells = cells_table([cell("wanda", "2:4"), cell("magnitude", "2:4")])
    for what in ("draw from the same file, test.txt", "share n-grams of 50 tokens"):
        cells.loc[cells["metric"] == "perplexity", "contamination"] = what
        assert f"Calibration and evaluation {what}." in markdown(next(tables(cells, "perplexity")))
    cells.loc[cells["metric"] == "perplexity", ["contaminated", "contamination"]] = [False, None]
    assert "Calibration and evaluation" not in markdown(next(tables(cells, "perplexity")))
