"""Tables of one protocol: a study that mixes two is refused, rows of other code or versions are marked."""

# pandas' own annotations lose whether a selection is a column or a frame.

import json
import re
from pathlib import Path
from typing import Any

import pytest

from layerwise.comparison import folders
from layerwise.results.cell_results import DIVERGENCES, TaskSet, evaluations
from layerwise.results.collect import TABLES, StudyInputs, collect
from layerwise.results.main_table import document, tables
from layerwise.results.protocol import MARK, SAME
from layerwise.results.table_text import latex, markdown
from layerwise.runtime.errors import Diverged, InputError, record_failure
from layerwise.storage import frames
from layerwise.storage.frames import matching, select, tuples
from layerwise.storage.table_schema import columns, from_rows, read_table
from tests.results.test_collect import row_of
from tests.support.synthetic_tables import EVALUATIONS, PROVENANCE, STUDY, SyntheticCell, cell, cells_table, write_cell

TEXTS = evaluations(STUDY, EVALUATIONS)
PLAN = [cell("dense", "dense"), cell("magnitude", "2:4"), cell("wanda", "2:4"), cell("ria", "2:4")]
FULL = PROVENANCE | {
    "model_sha256": "a" * 64,
    "dtype": "float32",
    "compute_dtype": "float32",
    "calibration_sha256": "b" * 64,
    "calibration_length": 512,
    "calibration_sampling": "stream",
    "calibration_seed": 0,
    "calibration_dtype": "float32",
    "calibration_compute_dtype": "float32",
}
OTHER: dict[str, Any] = {
    "model_sha256": "c" * 64,
    "dtype": "bfloat16",
    "compute_dtype": "bfloat16",
    "calibration_sha256": "c" * 64,
    "calibration_samples": 128,
    "calibration_length": 256,
    "calibration_sampling": "documents",
    "calibration_dtype": "bfloat16",
    "calibration_compute_dtype": "bfloat16",
    "calibration_seed": 1,
}
TASKS = TaskSet("tasks-00000001", "four", ("copa",))


def study(root: Path, plan: list[SyntheticCell] = PLAN, **others: Any) -> Path:
    """The results of a study of which wanda's cell was computed otherwise."""
    for one in plan:
        folder = write_cell(root, one)
        own = FULL | (others if one.columns["label"] == "wanda" else {})
        change(folder / "cell.json", provenance=own)
        item = {
            "task": "copa",
            "metric": "acc",
            "value": 0.5,
            "stderr": 0.1,
            "task_version": "1",
            "fewshot": 0,
            "items": 2,
        }
        rows = {"lm_eval": "0.4.9", "rows": [item], "groups": {}, "samples": {"copa": {"acc": [0.0, 1.0]}}}
        (folder / f"tasks-{TASKS.identity}.json").write_text(json.dumps(rows))
    return root


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def gather(root: Path, partial: bool = False):
    collect(StudyInputs(PLAN, [], TEXTS, [TASKS]), root / "tables", partial, root)
    return read_table(root / "tables", "cells")


def wanda(root: Path, name: str) -> Path:
    return next(root.glob(f"results/cells/*/*/*/wanda*/{name}"))


def test_a_study_of_one_protocol_is_whole(tmp_path):
    assert set(gather(study(tmp_path))["status"]) == {"done"}


@pytest.mark.parametrize("column", OTHER)
def test_a_cell_of_another_model_or_calibration_is_refused(tmp_path, column):
    study(tmp_path, **{column: OTHER[column]})
    sentence = (
        rf"dense dense .* and wanda 2:4 .* differ in {column} \({FULL[column]} and {OTHER[column]}\): "
        r"delete .*, and run again\)\."
    )
    with pytest.raises(InputError, match=sentence):
        gather(tmp_path)
    assert not list(tmp_path.glob("tables/*"))
    cells = gather(tmp_path, partial=True)
    own = matching(cells, label="wanda")
    assert set(own["status"]) == {"failed"} and bool(own["value"].isna().all())
    assert all(column in reason for reason in own["reason"])
    assert set(cells.loc[cells["label"] != "wanda", "status"]) == {"done"}
    for table in ("layers", "traces", "comparisons"):
        found = read_table(tmp_path / "tables", table)
        sides = [name for name in ("label", "other") if name in found]
        assert len(found) and "wanda" not in {label for name in sides for label in found[name]}


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("eval_sha256", {"text": {"sha256": "0" * 64}}),
        ("eval_length", {"length": 256}),
        ("eval_windows", {"windows": 8}),
    ],
)
def test_a_perplexity_of_other_windows_is_refused(tmp_path, column, values):
    change(wanda(study(tmp_path), "perplexity-wiki-00000002.json"), **values)
    with pytest.raises(
        InputError,
        match=f"Got 1 that failed or are missing; .* wiki must have one protocol. dense dense .* differ in {column}",
    ):
        gather(tmp_path)
    cells = gather(tmp_path, partial=True)
    failed = matching(cells, status="failed")
    assert tuples(failed, ["label", "metric", "text"]) == [
        ("wanda", metric, "wiki") for metric in ("perplexity", *DIVERGENCES)
    ]
    assert bool(failed[["low", "high"]].isna().to_numpy().all())
    compared = read_table(tmp_path / "tables", "comparisons")
    for metric in ("perplexity", "kl", "top1_agreement"):
        own = compared[compared["metric"] == metric]
        assert set(own.loc[own["text"] == "docs", "other"]) == {"wanda", "ria"}
        assert set(own.loc[own["text"] == "wiki", "other"]) == {"ria"}


@pytest.mark.parametrize(
    ("column", "value"), [("lm_eval", "0.5.0"), ("task_version", "2"), ("fewshot", 5), ("items", 3)]
)
def test_tasks_of_another_harness_are_refused(tmp_path, column, value):
    path = wanda(study(tmp_path), f"tasks-{TASKS.identity}.json")
    record = json.loads(path.read_text())
    (record if column == "lm_eval" else record["rows"][0])[column] = value
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=rf"differ in {column} \(.* and {value}\)"):
        gather(tmp_path)
    cells = gather(tmp_path, partial=True)
    assert cells.loc[cells["status"] == "failed", ["label", "metric"]].values.tolist() == [["wanda", "acc"]]


@pytest.mark.parametrize("name", ["perplexity-docs-00000001.json", f"tasks-{TASKS.identity}.json"])
def test_an_evaluation_in_another_dtype_is_known_by_its_own_rows(tmp_path, name):
    """What the evaluation says of itself, and not what its cell was computed in; such a mix is no table."""
    root = study(tmp_path)
    for path in root.glob(f"results/cells/*/*/*/*/{name}"):
        change(path, compute_dtype="bfloat16" if "wanda" in path.parent.name else "float32")
    with pytest.raises(InputError, match=r"differ in compute_dtype \(float32 and bfloat16\)"):
        gather(root)
    for path in root.glob("results/cells/*/*/*/*/*.json"):
        change(path, compute_dtype="bfloat16")
    for path in root.glob("results/cells/*/*/*/*/cell.json"):
        change(path, provenance={key: value for key, value in FULL.items() if key != "compute_dtype"})
    cells = gather(root)
    evaluated = cells["metric"].isin(["perplexity", *DIVERGENCES, "acc"])
    assert set(cells.loc[evaluated, "compute_dtype"]) == {"bfloat16"}
    assert bool(cells.loc[~evaluated, "compute_dtype"].isna().all())


def test_the_names_of_a_protocol_are_columns():
    known = set(columns("cells"))
    assert all({*names, *told} <= known for _, names, told in SAME)


def test_models_and_seeds_have_protocols_of_their_own(tmp_path):
    """Another model has another hash and number of windows, another seed another draw."""
    plan = [cell("wanda", "2:4"), cell("wanda", "2:4", model="large"), cell("wanda", "2:4", seed=1)]
    for number, one in enumerate(plan):
        folder = write_cell(tmp_path, one)
        own = {"model_sha256": f"{number % 2}", "calibration_seed": one.columns["seed"]}
        change(
            folder / "cell.json",
            provenance=FULL | own | {"calibration_dtype": "bfloat16" if number == 1 else "float32"},
        )
        change(folder / "perplexity-docs-00000001.json", windows=7 + number % 2)
    collect(StudyInputs(plan, [], TEXTS), tmp_path / "tables", root=tmp_path)
    for part in ("one", "other"):
        collect(StudyInputs(plan, [], TEXTS), tmp_path / part, root=tmp_path)
    folders.merge_folders([tmp_path / "one", tmp_path / "other"], tmp_path / "merged")


def test_folders_of_two_protocols_are_not_merged(tmp_path):
    """Neither when both are, nor when one holds a mix, as a version without this check could write it."""
    one, other = study(tmp_path / "one"), study(tmp_path / "other", [PLAN[2]], calibration_length=256)
    collect(StudyInputs(PLAN, [], TEXTS), one / "tables", root=one)
    collect(StudyInputs([PLAN[2]], [], TEXTS), other / "tables", root=other)
    with pytest.raises(InputError, match=r"differ in calibration_length \(512 and 256\)"):
        folders.merge_folders([one, other], tmp_path / "merged")
    mixed = read_table(one / "tables", "cells")
    mixed.loc[mixed["label"] == "ria", "calibration_seed"] = 3
    mixed.to_parquet(one / "tables/cells.parquet")
    with pytest.raises(
        InputError, match=r"one mixes two protocols: .*ria 2:4 .* differ in calibration_seed \(0 and 3\): delete .*\."
    ):
        folders.merge_folders([one, other], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------------------------------------------------- numbers


def numbers_of(root: Path) -> str:
    """All that is in the CSVs, which have no NaN and no infinity."""
    text = "".join(path.read_text().lower() for path in (root / "tables").glob("*.csv"))
    assert not re.search(r"(^|,)(nan|-?inf)(,|$)", text, re.MULTILINE)
    return text


def test_a_method_that_diverges_is_a_row_with_status_and_reason(tmp_path):
    """And the rest of the study keeps its tables."""
    folder = wanda(study(tmp_path), "cell.json").parent
    (folder / "cell.json").unlink()
    with pytest.raises(InputError), record_failure(folder, "compress"):
        raise Diverged("wanda has diverged on model.layers.0.mlp.up_proj: its output_error is 3e+07.")
    cells = gather(tmp_path, partial=True)
    own = matching(cells, label="wanda")
    told = "compress, diverged: wanda has diverged on model.layers.0.mlp.up_proj: its output_error is 3e+07."
    assert set(own["reason"]) == {told} and set(own["status"]) == {"failed"} and bool(own["value"].isna().all())
    assert set(cells.loc[cells["label"] != "wanda", "status"]) == {"done"}
    assert len(read_table(tmp_path / "tables", "comparisons")) and told.lower() in numbers_of(tmp_path)
    assert "| wanda | failed |" in document(cells, markdown)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "put"),
    [
        ("cell.json", lambda record, value: record | {"seconds": value}),
        (
            f"tasks-{TASKS.identity}.json",
            lambda record, value: {**record, "rows": [record["rows"][0] | {"value": value}]},
        ),
        (
            f"tasks-{TASKS.identity}.json",
            lambda record, value: {**record, "rows": [record["rows"][0] | {"stderr": value}]},
        ),
        ("perplexity-docs-00000001.json", lambda record, value: record | {"perplexity": value}),
        ("perplexity-docs-00000001.json", lambda record, value: record | {"losses": [750.0, *record["losses"]]}),
        ("perplexity-docs-00000001.json", lambda record, value: record | {"perplexity": None, "losses": [None] * 7}),
    ],
    ids=["seconds", "accuracy", "error", "perplexity", "huge loss", "lost windows"],
)
def test_no_number_that_is_not_finite_reaches_a_table(tmp_path, name, put, value):
    path = wanda(study(tmp_path), name)
    path.write_text(json.dumps(put(json.loads(path.read_text()), value)))
    cells = gather(tmp_path, partial=True)
    numbers_of(tmp_path)
    own = matching(cells, label="wanda")
    own = select(own, frames.column(own, "value").isna())
    assert bool(own["reason"].notna().all())
    assert len(own) or "losses" in str(put(json.loads(path.read_text()), value))
    assert set(cells.loc[cells["label"] != "wanda", "status"]) == {"done"}


@pytest.mark.parametrize("table", TABLES)
def test_every_table_refuses_numbers_that_are_not_finite(table):
    """Also where a number may be absent: NaN is no way to say so."""
    found = [name for name, column in columns(table).items() if "number" in column["type"]]
    for name in found:
        for value in (float("nan"), float("inf"), float("-inf")):
            with pytest.raises(InputError, match=rf"column '{name}' must be finite\. Got"):
                from_rows([row_of(table) | {name: value}], table, "the test")
    assert found or table == "skipped"


# --------------------------------------------------------------------------------------------------------------- marks


def rendered(**others: Any) -> tuple[str, list[list[str]], str]:
    """Note, lines and LaTeX of a perplexity table in which wanda has other provenance."""
    cells = cells_table(PLAN)
    for column, value in others.items():
        cells[column] = [value if label == "wanda" else PROVENANCE.get(column) for label in cells["label"]]
    table = next(tables(cells, "perplexity"))
    lines = [[field.strip() for field in line.split("|")[1:-1]] for line in markdown(table).splitlines() if "|" in line]
    return table.note, lines, latex(table)


def entry(lines: list[list[str]], label: str) -> str:
    return next(line[1] for line in lines if line[0] == label)


def test_an_ordinary_table_has_no_marks():
    note, lines, tex = rendered()
    assert MARK not in note and "commit" not in note
    assert not any(MARK in field for line in lines for field in line) and "textdagger" not in tex


def test_rows_of_a_dirty_tree_are_marked():
    note, lines, tex = rendered(dirty=True)
    assert f"{MARK} computed by code with changes that are in no commit: wanda." in note
    assert re.fullmatch(rf"\**[\d.]+{MARK}\**", entry(lines, "wanda")) and MARK not in entry(lines, "magnitude")
    assert tex.count(r"\textsuperscript{\textdagger}") == 2  # the number and its reason


@pytest.mark.parametrize(("column", "value"), [("torch", "2.12.0"), ("python", "3.12.1"), ("device", "cuda")])
def test_rows_of_other_versions_are_marked(column, value):
    note, lines, _ = rendered(**{column: value})
    assert f"{MARK} with {column} {value}, the others {PROVENANCE[column]}: wanda." in note
    assert MARK in entry(lines, "wanda") and MARK not in entry(lines, "ria")


@pytest.mark.parametrize("others", [{"commit": None, "dirty": None}, {"threads": 8, "cpu": "another"}])
def test_no_checkout_and_other_cores_are_no_mark(others):
    note, lines, _ = rendered(**others)
    assert MARK not in note + entry(lines, "wanda")


def test_commits_are_counted_and_not_marked():
    note, lines, _ = rendered(commit="b" * 40)
    assert "Computed at 2 commits." in note and MARK not in note + entry(lines, "wanda")


def test_a_dirty_dense_model_is_marked_in_the_note():
    cells = cells_table(PLAN)
    cells.loc[cells["label"] == "dense", "dirty"] = True
    assert re.search(rf"Dense: [\d.]+{MARK}\.", next(tables(cells, "perplexity")).note)


def test_marks_reach_the_written_tables(tmp_path):
    study(tmp_path, dirty=True)
    gather(tmp_path)
    text = document(read_table(tmp_path / "tables", "cells"), markdown)
    assert text.count("in no commit: wanda.") == 6  # two texts and their KL, a task, the output error
