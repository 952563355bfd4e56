"""Tables from the files of cells: order, types, weights, gaps with their reasons, and the rendered main table."""

# pandas' own annotations lose whether a selection is a column or a frame.

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerwise.compression.allocate import rows_of, targets_of
from layerwise.contract.allocator import Part
from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.target import Target
from layerwise.results.cell_results import DIVERGENCES, NEVER_RAN, evaluations
from layerwise.results.collect import StudyInputs, collect
from layerwise.results.comparisons import NO_DIFFERENCE
from layerwise.results.main_table import METRICS, SCOPES, number, spread, tables
from layerwise.results.main_table import document as rendered
from layerwise.results.table_text import escape_latex, latex, markdown
from layerwise.runtime.errors import InputError
from layerwise.storage.frames import column, columns_of, distinct_values, groups_by, matching, rows, select, tuples
from layerwise.storage.table_schema import arrow_schema, document, from_rows, read_table, to_frame, typed
from tests.support.synthetic_tables import (
    DEMO,
    EVALUATIONS,
    STUDY,
    SyntheticCell,
    cell,
    cells_table,
    divergence_of,
    layer_frame,
    layers_table,
    perplexity_of,
    plan,
    write_cell,
)

TEXTS = evaluations(STUDY, EVALUATIONS)
SKIPPED = [{"label": "rtn", "method": "rtn", "target": "2:4", "allocation": "uniform", "reason": "rtn does not prune"}]


def gather(root: Path, cells: list[SyntheticCell], partial: bool = False) -> dict[str, pd.DataFrame]:
    collect(StudyInputs(cells, SKIPPED, TEXTS), root / "tables", partial, root)
    return {name: read_table(root / "tables", name) for name in ("layers", "cells", "traces", "skipped")}


@pytest.fixture
def pair(tmp_path: Path) -> list[SyntheticCell]:
    """Two finished cells, in an order that is not alphabetical."""
    cells = [cell("wanda", "50% row"), cell("magnitude", "4b g128")]
    for one in cells:
        write_cell(tmp_path, one)
    return cells


def test_rows_stand_in_the_order_of_the_plan_and_columns_in_that_of_the_schema(tmp_path, pair):
    found = gather(tmp_path, pair)
    for name in ("layers", "cells", "traces"):
        assert list(found[name]["label"].drop_duplicates()) == ["wanda", "magnitude"]
        header = (tmp_path / "tables" / f"{name}.csv").read_text().splitlines()[0]
        assert header.split(",") == list(found[name].columns) == arrow_schema(name).names
    assert len(found["layers"]) == 2 * 2 * 7
    assert (tmp_path / "tables" / "skipped.csv").read_text().splitlines()[1] == "rtn,rtn,2:4,uniform,rtn does not prune"
    before = {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
    gather(tmp_path, pair)
    assert {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()} == before


def test_cells_computed_before_a_column_existed_get_it_from_the_plan(tmp_path, pair):
    whole = gather(tmp_path, pair)
    for one, name in ((one, name) for one in pair for name in ("layers", "trace")):
        path = tmp_path / one.folder / f"{name}.parquet"
        pd.read_parquet(path).drop(columns=["allocator", "allocation_params"]).to_parquet(path)
    again = gather(tmp_path, pair)
    assert all(again[name].equals(whole[name]) for name in whole)


def test_batches_leave_no_trace_in_the_tables(tmp_path, pair, monkeypatch):
    whole = gather(tmp_path, pair)
    csv = (tmp_path / "tables" / "layers.csv").read_bytes()
    monkeypatch.setattr("layerwise.results.collect.ROWS_AT_ONCE", 1)
    batched = gather(tmp_path, pair)
    assert (tmp_path / "tables" / "layers.csv").read_bytes() == csv
    assert all(whole[name].equals(batched[name]) for name in whole)


def test_tables_are_typed(tmp_path, pair):
    found = gather(tmp_path, pair)
    assert found["layers"]["bits"].dtype == pd.Int64Dtype()
    assert list(found["cells"].groupby("label", sort=False)["bits"].first().isna()) == [True, False]
    csv = (tmp_path / "tables" / "layers.csv").read_text()
    assert ",4,128,False," in csv and ",4.0," not in csv and "nan" not in csv.lower()
    first = float(layer_frame(pair[0], 2)["output_error"].iloc[0])
    assert f",{first:.9g}," in csv


def test_numbers_of_a_cell(tmp_path, pair):
    cells = gather(tmp_path, pair)["cells"]
    cells["text"] = cells["text"].fillna("")
    magnitude = matching(cells, label="magnitude")
    own = {(row["metric"], row["text"]): row["value"] for row in rows(magnitude)}
    layers = layer_frame(pair[1], 2)
    size = layers["in"] * layers["out"]
    assert own["perplexity", "docs"] == pytest.approx(perplexity_of(pair[1]))
    assert own["mean_output_error", ""] == pytest.approx(layers["output_error"].mean())
    assert own["bits_per_weight", ""] == pytest.approx((layers["bits_per_weight"] * size).sum() / size.sum())
    assert own["solve_seconds", ""] == pytest.approx(14 * 0.25)
    assert own["job_seconds", ""] == 9.5
    assert set(cells["device"]) == {"cpu"} and set(cells["threads"]) == {1}


def test_sparsity_is_weighted_by_the_size_of_the_layers(tmp_path):
    one = cell("wanda", "50% row")
    folder = write_cell(tmp_path, one, blocks=1)
    layers = layer_frame(one, 1)
    layers["achieved_sparsity"] = [1.0 if kind == "down_proj" else 0.0 for kind in layers["kind"]]
    layers.to_parquet(folder / "layers.parquet")
    cells = gather(tmp_path, [one])["cells"]
    size = layers["in"] * layers["out"]
    value = cells.loc[cells["metric"] == "achieved_sparsity", "value"].item()
    assert value == pytest.approx(size[layers["kind"] == "down_proj"].item() / size.sum())
    assert value != pytest.approx(1 / 7)


def test_text_of_the_same_data_set_is_flagged(tmp_path, pair):
    cells = gather(tmp_path, pair)["cells"]
    by_text = groups_by(matching(cells, metric="perplexity"), "text")
    flags = {text: distinct_values(own, "contaminated") for text, own in by_text}
    assert flags["docs"] == [True] and flags["wiki"] == [False]
    assert set(cells.loc[cells["metric"] == "perplexity", "eval_length"]) == {512}


def test_a_renamed_label_is_taken_from_the_plan(tmp_path, pair):
    renamed = SyntheticCell(pair[0].folder, {**pair[0].columns, "label": "wanda-plain"})
    found = gather(tmp_path, [renamed])
    assert set(found["layers"]["label"]) == set(found["traces"]["label"]) == {"wanda-plain"}


def test_a_failed_or_missing_cell_is_an_error_unless_partial(tmp_path, pair):
    failed, absent = cell("sparsegpt", "60% row"), cell("ria", "60% row")
    (tmp_path / failed.folder).mkdir(parents=True)
    record = {"status": "out of memory", "reason": "no room\nfor the Gram.", "traceback": "..."}
    (tmp_path / failed.folder / "failed-compress.json").write_text(json.dumps(record))
    cells = [pair[0], failed, absent, pair[1]]
    with pytest.raises(
        InputError,
        match=r"4 cells must have results. Got 2 that failed or are missing; the first is .*sparsegpt.*no room for",
    ):
        gather(tmp_path, cells)
    assert not list(tmp_path.glob("tables/*")), "no table, nor a part of one, may be left behind"
    found = gather(tmp_path, cells, partial=True)["cells"]
    assert list(found["label"].drop_duplicates()) == ["wanda", "sparsegpt", "ria", "magnitude"]
    own = matching(found, label="sparsegpt")
    assert set(own["status"]) == {"failed"} and bool(own["value"].isna().all())
    assert set(own["reason"]) == {"compress, out of memory: no room for the Gram."}
    assert set(found.loc[found["label"] == "ria", "reason"]) == {NEVER_RAN}
    assert set(found.loc[found["label"] == "ria", "status"]) == {"missing"}
    assert len({len(own) for _, own in groups_by(found, "label")}) == 1, "every cell has a row per metric"


def test_a_failed_perplexity_leaves_the_other_numbers(tmp_path, pair):
    folder = tmp_path / pair[0].folder
    (folder / "perplexity-wiki-00000002.json").unlink()
    (folder / "failed-perplexity.json").write_text(json.dumps({"status": "error", "reason": "no text"}))
    cells = gather(tmp_path, pair, partial=True)["cells"]
    broken = select(cells, column(cells, "value").isna())
    assert tuples(broken, ["label", "metric", "text", "reason"]) == [
        ("wanda", metric, "wiki", "perplexity: no text") for metric in ("perplexity", *DIVERGENCES)
    ]


@pytest.mark.parametrize("name", ["layers.parquet", "trace.parquet", "cell.json", "perplexity-docs-00000001.json"])
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b""])
def test_a_truncated_file_is_named(tmp_path, pair, name, damage):
    path = tmp_path / pair[0].folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=re.escape(name) + ".*; run again to make it"):
        gather(tmp_path, pair)
    assert not path.exists() and path.with_name(f"{name}.damaged").exists()
    cells = gather(tmp_path, pair, partial=True)["cells"]
    broken = cells[cells["status"] == "failed"]
    assert len(broken) == (4 if name.startswith("perplexity") else 13)
    assert all(name in reason for reason in broken["reason"]) and set(broken["label"]) == {"wanda"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda layers: layers.assign(cell="other"), "rows of cell 'other'"),
        (lambda layers: layers.assign(mood="good"), "unknown: mood"),
        (lambda layers: layers.drop(columns="tap"), "Lacking: tap"),
        (lambda layers: layers.assign(output_error=float("nan")), "'output_error' must have a value"),
        (lambda layers: layers.assign(output_error=float("inf")), "'output_error' must be finite"),
        (lambda layers: layers.assign(achieved_sparsity=1.5), "at most 1"),
        (lambda layers: layers.assign(mode="sideways"), "must be one of shared, sequential"),
        (lambda layers: layers.assign(block=0.5), "'block' must be int64"),
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(tmp_path, pair, change, sentence):
    change(layer_frame(pair[0], 2)).to_parquet(tmp_path / pair[0].folder / "layers.parquet")
    with pytest.raises(InputError, match=re.escape(sentence)):
        gather(tmp_path, pair)


def test_unknown_provenance_is_refused(tmp_path, pair):
    path = tmp_path / pair[0].folder / "cell.json"
    record = json.loads(path.read_text())
    record["provenance"]["weather"] = "rain"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="weather"):
        gather(tmp_path, pair)


def test_a_perplexity_that_is_not_finite_has_a_reason(tmp_path, pair):
    path = tmp_path / pair[0].folder / "perplexity-docs-00000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"perplexity": float("inf")}))
    cells = gather(tmp_path, pair)["cells"]
    row = rows(select(cells, column(cells, "value").isna()))[0]
    assert row["status"] == "done" and row["reason"] == "the model has diverged: its perplexity is inf"


def test_divergences_stand_beside_the_perplexity(tmp_path, pair):
    found = gather(tmp_path, pair)
    cells = found["cells"]
    own = cells[(cells["label"] == "wanda") & (cells["text"] == "docs")].set_index("metric")
    assert list(own.index) == ["perplexity", *DIVERGENCES]
    wanted = divergence_of(pair[0])
    assert [own.loc[name, "value"] for name in DIVERGENCES] == [pytest.approx(wanted[name]) for name in DIVERGENCES]
    assert own.loc["kl", "low"] < wanted["kl"] < own.loc["kl", "high"] and pd.isna(own.loc["kl_p99", "low"])
    for name in ("eval_length", "eval_windows", "eval_sha256", "contaminated", "contamination", "overlap"):
        assert len(distinct_values(own, name)) == 1


def test_a_divergence_that_is_not_finite_has_a_reason_of_its_own(tmp_path, pair):
    path = tmp_path / pair[0].folder / "perplexity-docs-00000001.json"
    lost = dict.fromkeys(DIVERGENCES) | {"kl_windows": [], "top1_windows": [], "reason": "of 2 windows not finite"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"divergence": lost}))
    cells = gather(tmp_path, pair)["cells"]
    absent = select(cells, column(cells, "value").isna())
    assert list(absent["metric"]) == list(DIVERGENCES) and set(absent["reason"]) == {"of 2 windows not finite"}
    assert set(absent["status"]) == {"done"} and bool(absent["low"].isna().all())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda found: None, "it lacks 'divergence'"),
        (lambda found: found | {"kl": math.inf}, "it has divergences that are not finite"),
        (lambda found: found | {"kl_windows": [math.nan]}, "it has divergences that are not finite"),
        (lambda found: found | {"kl_windows": None}, "NoneType"),
        (lambda found: {"kl": 0.1}, "it lacks 'kl_p99'"),
    ],
)
def test_a_file_without_sound_divergences_is_refused(tmp_path, pair, spoil, said):
    path = tmp_path / pair[0].folder / "perplexity-docs-00000001.json"
    record = json.loads(path.read_text())
    found = spoil(record.pop("divergence"))
    path.write_text(json.dumps(record | ({"divergence": found} if found else {})))
    with pytest.raises(InputError, match=f"perplexity-docs-00000001.json cannot be used: .*{said}"):
        gather(tmp_path, pair)


def test_the_main_table_has_the_divergence_and_no_dense_number():
    (table,) = tables(cells_table(plan(("magnitude", "wanda"), ("50% row",), ("shared",))), "kl")
    assert table.title == "demo, KL(dense || compressed), nats per token, on docs, calibrated on docs"
    assert table.note.startswith("Lower is better") and "Dense" not in table.note
    assert [entry.best for _, (entry,) in table.sections[0].groups[0][1]] == [False, True]
    assert spread([0.05, 0.0501], "kl") == "0.0500 ± 0.0001" and METRICS[:2] == ("perplexity", "kl")


def test_a_cell_without_layers_or_trace(tmp_path):
    one = cell("dense", "dense")
    folder = write_cell(tmp_path, one)
    layer_frame(one).iloc[:0].to_parquet(folder / "layers.parquet")
    cells = gather(tmp_path, [one])["cells"]
    assert set(cells.loc[cells["value"].isna(), "reason"]) == {"the cell has no compressed layer"}
    assert int(column(cells, "value").notna().sum()) == 2 * 4 + 2


def row_of(table: str) -> dict:
    """A row that satisfies the schema of a table."""
    columns = dict(cell("magnitude", "4b g128").columns)
    extra = {
        "layers": layer_frame(cell("magnitude", "4b g128"), 1).to_dict("records")[0],
        "traces": columns | {"layer": "l", "iteration": 0, "seconds": 0.1, "objective": 1.0, "criterion": "error"},
        "bounds": columns | {"layer": "l", "lower_bound": 0.1, "plain_bound": 0.05, "bound_gap": 0.0, "seconds": 0.1},
        "allocations": columns
        | {
            "allocator": "owl",
            "layer": "l",
            "kind": "l",
            "block": 0,
            "out": 4,
            "in": 4,
            "level": 0.5,
            "official": False,
        }
        | {"score": 1.0, "budget": 0.5, "mean_level": 0.5, "achieved": 0.5},
        "cells": columns | {"metric": "perplexity", "value": 2.0, "status": "done"},
        "comparisons": columns
        | {"metric": "perplexity", "text": "docs", "other": "wanda", "units": 64, "seeds": 3, "seeds_agree": 3}
        | {"effect": 0.5, "p": 0.01, "p_holm": 0.02, "verdict": "better"},
        "allocation_comparisons": columns
        | {"metric": "perplexity", "text": "docs", "other_allocation": "owl", "units": 64, "seeds": 3, "seeds_agree": 3}
        | {"effect": 0.5, "p": 0.01, "p_holm": 0.02, "verdict": "better"},
        "skipped": SKIPPED[0],
    }[table]
    return {name: extra.get(name) for name in arrow_schema(table).names}


@pytest.mark.parametrize(
    "table", ["layers", "traces", "bounds", "allocations", "comparisons", "allocation_comparisons", "cells", "skipped"]
)
def test_the_check_of_columns_agrees_with_a_validator_of_rows(table):
    schema = document()["tables"][table] | {"$defs": document()["$defs"]}
    validator = jsonschema.Draft202012Validator(schema)
    assert schema["additionalProperties"] is False and schema["required"] == list(schema["properties"])
    good = row_of(table)
    verdicts = set()
    for name in good:
        for value in (None, -1, 0, 2, 99, "shared", "", True, 0.5):
            row = good | {name: value}
            try:
                from_rows([row], table, "test")
                accepted = True
            except InputError:
                accepted = False
            verdicts.add(accepted)
            if table == "cells" and name in ("value", "reason", "status"):
                continue  # that a value or a reason is there is for collect to see to
            assert accepted == validator.is_valid(row), (name, value)
    assert verdicts == {True, False}
    assert validator.is_valid(good)


def test_the_validator_asks_for_a_number_or_a_reason():
    validator = jsonschema.Draft202012Validator(document()["tables"]["cells"] | {"$defs": document()["$defs"]})
    assert not validator.is_valid(row_of("cells") | {"value": None})
    assert validator.is_valid(row_of("cells") | {"value": None, "reason": "killed", "status": "missing"})


CERTIFICATE = "results/certificates/bound.parquet"


def certified(root: Path, share: float) -> list[SyntheticCell]:
    """A mask-only cell and one that updates weights; the bound of every layer is a share of the first one's error."""
    cells = [replace(cell("wanda", "50% row"), certificate=CERTIFICATE), cell("sparsegpt", "50% row")]
    for one in cells:
        write_cell(root, one)
    of = layer_frame(cells[0], 2)
    frame = of[["model", "calibration", "seed", "target", "sparsity", "pattern", "layer"]].assign(
        lower_bound=share * of["output_error"], plain_bound=0.0, bound_gap=0.0, seconds=0.5
    )
    (root / CERTIFICATE).parent.mkdir(parents=True)
    frame.to_parquet(root / CERTIFICATE)
    return cells


def test_layers_stand_beside_their_bounds(tmp_path):
    cells = certified(tmp_path, 0.75)
    collect(StudyInputs(cells, SKIPPED, TEXTS, certificates=[CERTIFICATE]), tmp_path / "tables", False, tmp_path)
    layers = read_table(tmp_path / "tables", "layers").set_index("label")
    assert layers.loc["wanda", "gap_to_bound"].to_numpy() == pytest.approx(0.25)
    assert (layers.loc["wanda", "lower_bound"] / layers.loc["wanda", "output_error"]).to_numpy() == pytest.approx(0.75)
    assert layers.loc["sparsegpt", ["lower_bound", "gap_to_bound"]].isna().all(axis=None)
    assert len(read_table(tmp_path / "tables", "bounds")) == 14


def test_an_error_below_its_bound_is_reported(tmp_path):
    cells = certified(tmp_path, 1.01)
    with pytest.raises(InputError, match=r"wanda has .* on .*q_proj, below the bound .* in .*bound.parquet"):
        collect(StudyInputs(cells, SKIPPED, TEXTS, certificates=[CERTIFICATE]), tmp_path / "tables", False, tmp_path)


def test_bounds_that_are_missing_are_an_error_unless_partial(tmp_path):
    cells = certified(tmp_path, 0.75)
    (tmp_path / CERTIFICATE).unlink()
    with pytest.raises(InputError, match="The bounds of a target .*bound.parquet does not exist"):
        collect(StudyInputs(cells, SKIPPED, TEXTS, certificates=[CERTIFICATE]), tmp_path / "tables", False, tmp_path)
    collect(StudyInputs(cells, SKIPPED, TEXTS, certificates=[CERTIFICATE]), tmp_path / "tables", True, tmp_path)
    assert bool(column(read_table(tmp_path / "tables", "layers"), "lower_bound").isna().all())


@pytest.mark.parametrize("broken", [b"PAR1", None], ids=["broken", "of other Grams"])
def test_bounds_that_do_not_fit_leave_the_partial_tables_without_them(tmp_path, broken):
    cells = certified(tmp_path, 1.01)
    if broken:
        (tmp_path / CERTIFICATE).write_bytes(broken)
    collect(StudyInputs(cells, SKIPPED, TEXTS, certificates=[CERTIFICATE]), tmp_path / "tables", True, tmp_path)
    assert bool(column(read_table(tmp_path / "tables", "layers"), "lower_bound").isna().all())


def test_collected_tables_satisfy_the_validator(tmp_path, pair):
    absent = cell("ria", "60% row")
    gather(tmp_path, [*pair, absent], partial=True)
    for table in ("layers", "cells", "traces", "skipped"):
        validator = jsonschema.Draft202012Validator(document()["tables"][table] | {"$defs": document()["$defs"]})
        for row in pq.read_table(tmp_path / "tables" / f"{table}.parquet").to_pylist():
            validator.validate(row)


def test_a_table_that_is_absent_or_broken_is_a_sentence(tmp_path):
    with pytest.raises(InputError, match="does not exist: run the study"):
        read_table(tmp_path, "cells")
    (tmp_path / "cells.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cells.parquet cannot be read"):
        read_table(tmp_path, "cells")


def test_integers_written_as_floats_are_taken():
    data = pa.Table.from_pylist([row_of("layers") | {"bits": 4.0, "group": float("nan")}])
    assert typed(data, "layers", "test").select(["bits", "group"]).to_pylist() == [{"bits": 4, "group": None}]


# The main table

FAILED = [("sparsegpt", "60% row", "shared")]


def lines(text: str) -> list[list[str]]:
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_markdown_groups_methods_and_marks_the_best():
    cells = cells_table(plan(), FAILED)
    text = markdown(next(tables(cells, "perplexity")))
    rows = lines(text.split("sequential")[0])
    names = [row[0] for row in rows]
    assert names[2:] == [
        "*control*", "random", "*mask-only*", "magnitude", "wanda", "*weight-updating*", "sparsegpt",
        "*quantised*", "sparsegpt", "rtn",
    ]  # fmt: skip
    header, by_name = rows[0], {row[0]: row for row in rows[:9]}
    at = header.index("60% row")
    wanda = cells.query("label == 'wanda' and target == '60% row' and mode == 'shared' and metric == 'perplexity'")
    assert by_name["wanda"][at] == f"**{wanda['value'].item():.2f}**"
    assert "**" not in by_name["magnitude"][at] and "**" not in by_name["random"][at]
    assert by_name["sparsegpt"][at] == "failed" and by_name["wanda"][header.index("4b g128")] == "–"
    assert text.count("### ") == 2 and "Dense: 12.50." in text and "same data set" in text


def test_equal_as_printed_is_equally_good():
    cells = cells_table([cell("magnitude", "2:4"), cell("wanda", "2:4")])
    cells.loc[cells["metric"] == "perplexity", "value"] = [20.001, 20.004]
    assert markdown(next(tables(cells, "perplexity"))).count("**20.00**") == 2


def test_one_table_per_model_and_text():
    cells = pd.concat([cells_table(plan(models=("a", "b"))), cells_table(plan(models=("a",)), text="wiki")])
    assert [table.title for table in tables(cells, "perplexity")] == [
        "a, perplexity on docs, calibrated on docs",
        "b, perplexity on docs, calibrated on docs",
        "a, perplexity on wiki, calibrated on docs",
    ]


def test_latex_is_balanced_and_escaped():
    cells = cells_table([cell("wanda", "50% row", model="my_model & 50%", label="w#1_{x}^~\\")])
    text = latex(next(tables(cells, "perplexity")))
    assert r"w\#1\_\{x\}\textasciicircum{}\textasciitilde{}\textbackslash{}" in text
    assert r"my\_model \& 50\%" in text and r"50\% row" in text
    plain = re.sub(r"\\.", "", text)
    assert plain.count("{") == plain.count("}") and not re.search(r"[#^~]", plain)
    label = re.search(r"\\label\{(.*)\}", text)
    assert label and re.fullmatch(r"tab:[A-Za-z0-9.-]+", label.group(1))


def test_every_latex_row_has_as_many_columns_as_the_table():
    text = latex(next(tables(cells_table(plan(), FAILED), "perplexity")))
    columns = re.search(r"\\begin\{tabular\}\{@\{\}(l(r+))@\{\}\}", text)
    assert columns
    body = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert len(body) == 1 + 2 * len([*DEMO, "sparsegpt quantised"])
    assert {len(re.split(r"(?<!\\)&", line)) for line in body} == {len(columns.group(1))}
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}") == 1


@pytest.mark.parametrize(
    ("value", "metric", "shown"),
    [
        (12.345, "perplexity", "12.35"),
        (123.45, "perplexity", "123.5"),
        (1234.5, "perplexity", "1234"),
        (123456.0, "perplexity", "1.235e+05"),
        (0.012345, "mean_output_error", "0.0123"),
    ],
)
def test_numbers_are_rounded_to_what_they_mean(value, metric, shown):
    assert number(value, metric) == shown


def test_layers_of_experts_that_saw_every_token_are_counted_per_mode():
    cells = plan(models=("a", "b"))
    layers = layers_table(cells, blocks=2)
    assert not any("every token" in table.note for table in tables(cells_table(cells), "perplexity", layers=layers))
    own = (layers["model"] == "b") & (layers["kind"] == "down_proj")  # 2 of 14 layers
    layers.loc[own & (layers["mode"] == "shared"), "token_scope"] = "fallback"
    some = own & (layers["mode"] == "sequential") & (layers["label"] == "wanda") & (layers["block"] == 0)
    layers.loc[some | (layers["target"] == "dense"), "token_scope"] = "fallback"
    first, second = tables(cells_table(cells), "perplexity", layers=columns_of(layers, list(SCOPES)))
    assert "every token" not in first.note and second.note.endswith(
        "Calibrated on every token, since fewer were routed to their expert than they have inputs: "
        "2 of 14 layers in shared mode, 0 to 1 of 14 layers in sequential mode."
    )


def test_budgets_that_the_levels_miss_are_said_below_the_main_table():
    """OWL's counts of unequal blocks move together: 1:4 for 100 weights and 2:4 for 300, mean 0.5625."""
    parts = [Part("a", 0, 10, 10, 1.0), Part("b", 1, 10, 30, 9.0)]
    owl = Catalogue([], ALLOCATOR).allocator("owl", {"counts": 2.0})
    target = Target(pattern="2:4")
    proposal = owl.allocate(parts, target)
    spread = rows_of(parts, proposal, targets_of(parts, proposal, target), target)
    first = {**cell("wanda", "2:4", allocation="owl").columns, "target": "2:4"}
    first = {name: value for name, value in first.items() if name in arrow_schema("allocations").names}
    levels = to_frame(from_rows([{**first, **row} for row in spread], "allocations", "test"))
    cells = cells_table([cell("wanda", "2:4"), cell("wanda", "2:4", allocation="owl")])
    told = "2:4 owl: the levels' mean is 56.25%, not the budget of 50.00%."
    table = next(tables(cells, "perplexity", allocations=levels))
    assert table.note.endswith(told) and told in markdown(table)
    close = levels.assign(mean_level=0.5009)
    assert "the budget" not in next(tables(cells, "perplexity", allocations=close)).note
    uniform = cells_table([cell("wanda", "2:4")])
    assert "the budget" not in next(tables(uniform, "perplexity", allocations=levels)).note
    bits = levels.assign(sparsity=0.0, target="4b g128", budget=4.0, mean_level=[4.25, 4.5])
    table = next(tables(cells_table([cell("rtn", "4b g128", allocation="owl")]), "perplexity", allocations=bits))
    assert "4b g128 owl: the levels' mean is 4.250 bits to 4.500 bits, not the budget of 4.000 bits." in table.note


REPEATED = [cell(method, "2:4", seed=seed) for method in ("magnitude", "wanda") for seed in range(3)]


def test_seeds_stand_together_as_mean_and_standard_deviation():
    cells = cells_table(REPEATED)
    cells.loc[cells["metric"] == "perplexity", "value"] = [20.0, 21.0, 22.0, 31.5, 31.5, 31.5]
    table = next(tables(cells, "perplexity"))
    rows = lines(markdown(table))
    assert [row for row in rows if row[0] in ("magnitude", "wanda")] == [
        ["magnitude", "**21.00 ± 1.00**"],
        ["wanda", "31.50 ± 0.00"],
    ]
    assert "Mean and standard deviation over 3 seeds." in table.note
    assert r"\textbf{21.00 \ensuremath{\pm} 1.00}" in latex(table)
    cells.loc[(cells["metric"] == "perplexity") & (cells["seed"] == 1) & (cells["label"] == "magnitude"), "value"] = (
        None
    )
    assert ["magnitude", "diverged (1 of 3)"] in lines(markdown(next(tables(cells, "perplexity"))))


@pytest.mark.parametrize(
    ("values", "metric", "shown"),
    [
        ([20.0], "perplexity", "20.00"),
        ([150.0, 160.0], "perplexity", "155.0 ± 7.1"),
        ([123456.0, 133456.0], "perplexity", "1.285e+05 ± 7.1e+03"),
        ([0.0495, 0.0505], "mean_output_error", "0.0500 ± 0.0007"),
    ],
)
def test_a_deviation_has_the_decimals_of_its_mean(values, metric, shown):
    assert spread(values, metric) == shown


def test_results_not_shown_to_differ_from_the_best_are_marked_too():
    cells = cells_table([cell("magnitude", "2:4"), cell("wanda", "2:4"), cell("ria", "2:4")])
    cells.loc[cells["metric"] == "perplexity", "value"] = [30.0, 20.5, 20.0]
    verdicts = {("magnitude", "wanda"): "worse", ("magnitude", "ria"): "worse", ("wanda", "ria"): NO_DIFFERENCE}
    common = {"model": "demo", "calibration": "docs", "mode": "shared", "target": "2:4", "text": "docs"}
    compared = pd.DataFrame(
        {**common, "metric": "perplexity", "label": one, "other": two, "verdict": verdict}
        for (one, two), verdict in verdicts.items()
    )
    table = next(tables(cells, "perplexity", compared))
    (mode,) = table.sections
    assert {label: entries[0].best for label, entries in mode.groups[0][1]} == {
        "magnitude": False, "wanda": True, "ria": True,
    }  # fmt: skip
    (mode,) = next(tables(cells, "mean_output_error", compared)).sections  # of which nothing is compared
    assert sum(entries[0].best for _, entries in mode.groups[0][1]) == 1


def test_collect_compares_cells_and_gives_intervals(tmp_path):
    for one in REPEATED:
        write_cell(tmp_path, one)
    collect(StudyInputs(REPEATED, [], TEXTS), tmp_path / "tables", root=tmp_path)
    found = read_table(tmp_path / "tables", "comparisons")
    assert list(found["metric"]) == ["output_error", *2 * ["perplexity", "kl", "top1_agreement"]]
    assert set(found["label"]) == {"magnitude"} and set(found["other"]) == {"wanda"} and set(found["seeds"]) == {3}
    assert list(found["units"]) == [14, *6 * [7]]
    assert list(found["text"].fillna("")) == ["", *3 * ["docs"], *3 * ["wiki"]]
    assert set(found["verdict"]) == {"worse"}
    cells = read_table(tmp_path / "tables", "cells")
    sure = column(cells, "metric").isin(["perplexity", "kl", "top1_agreement"])
    own = select(cells, sure)
    assert bool(((own["low"] < own["value"]) & (own["value"] < own["high"])).all())
    assert bool(select(cells, ~sure)[["low", "high"]].isna().to_numpy().all())


def test_a_cell_without_a_perplexity_is_not_compared_by_it(tmp_path):
    for one in REPEATED:
        write_cell(tmp_path, one)
    for name in EVALUATIONS:
        (tmp_path / REPEATED[0].folder / f"perplexity-{name}.json").unlink()
    collect(StudyInputs(REPEATED, [], TEXTS), tmp_path / "tables", True, tmp_path)
    found = read_table(tmp_path / "tables", "comparisons")
    assert list(found["seeds"]) == [3, *6 * [2]]


def test_a_power_of_ten_in_latex():
    cells = cells_table([cell("wanda", "50% row")])
    cells.loc[cells["metric"] == "perplexity", "value"] = 123456.0
    assert r"\ensuremath{1.235 \times 10^{5}}" in latex(next(tables(cells, "perplexity")))


def test_a_study_without_results_renders():
    assert rendered(cells_table([cell("dense", "dense")]), markdown) == "No results yet.\n"
    assert escape_latex("–") == "--"
