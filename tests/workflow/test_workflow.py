"""Real runs of the DAG on a tiny model. The tests follow one study, in the order in which they are here."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from layerwise.contract.target import Target
from layerwise.export.audit import audit
from layerwise.figures.plot import FIGURES
from layerwise.study.cell import Cell
from layerwise.study.grid import plan
from tests.support.workflow_harness import (
    CONFIG,
    MODEL,
    ROOT,
    TEXTS,
    Run,
    snakemake,
    tiny_project,
    tiny_study,
    write_config,
)

pytestmark = pytest.mark.xdist_group("workflow")

TABLES_ALONE = ("--until", "tables")
TABLES = ("layers", "cells", "traces", "bounds", "allocations", "comparisons", "allocation_comparisons", "skipped")
# The study has no iterative method and sweeps nothing.
DRAWN = [name for name, drawing in FIGURES.items() if drawing.needs not in ("traces", "sweep", "allocations")]
LAYERS = 7  # linear layers in a block of a Llama
# Rules that no method concerns.
BEFORE = {"docstrings", "model", "calibration_tokens", "evaluation_tokens", "overlap", "gram", "dense_states"}
NOTHING = "Nothing to be done"

LIFT = '''"""Starts from another method and raises what it keeps: a warm start and a parameter to sweep."""

from dataclasses import dataclass, replace

from layerwise.contract.layer import Compressed, Method

CARD = {
    "title": "Lift",
    "patterns": ["n:m"],
    "bits": [],
    "updates_weights": True,
    "needs": ["gram"],
    "parameters": {"warm_start": {"format": "method"}, "gain": {"type": "number"}},
}


@dataclass(frozen=True)
class Lift(Method):
    warm_start: str = "magnitude"
    gain: float = 0.0

    def solve(self, layer, target, rng):
        start = self.warm_start.compress(layer, target, rng)
        trace = ((0, 0.0, 1.0), (1, 0.1, 0.5))
        return replace(start, weight=start.weight * (1 + self.gain), trace=trace)
'''
FAULT = '        if layer.name.endswith("1.mlp.up_proj"):\n            raise ArithmeticError("no pivot is left")\n'
FRAGILE = f'''"""Magnitude pruning that fails on one layer."""

from dataclasses import dataclass

from layerwise.numerics import ops
from layerwise.contract.layer import Method

CARD = {{
    "title": "Fragile",
    "patterns": ["n:m"],
    "bits": [],
    "updates_weights": False,
    "needs": [],
    "parameters": {{}},
}}


@dataclass(frozen=True)
class Fragile(Method):
    def solve(self, layer, target, rng):
{FAULT}        return ops.pruned(layer, layer.weight.abs(), target)
'''


@dataclass(frozen=True)
class Study:
    """A project's copy in which the tiny study has run; first: the run that gave the tables."""

    folder: Path
    first: Run

    def run(self, *arguments: str | Path, config: Path = CONFIG) -> Run:
        return snakemake(self.folder, *arguments, "--configfile", config)

    def table(self, name: str, tables: str = "results/tables") -> pd.DataFrame:
        return pd.read_csv(self.folder / tables / f"{name}.csv")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = tiny_project(tmp_path_factory.mktemp("workflow") / "project")
    return Study(folder, snakemake(folder, *TABLES_ALONE, "--configfile", CONFIG))


@pytest.fixture(scope="module")
def drawn(study) -> Study:
    """The study with its figures."""
    done = study.run()
    assert done.status == 0, done.output
    return study


def test_one_worker_has_all_of_these(request):
    """Else each worker would run the study, and the tests would not follow one another."""
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith("@workflow")


def of_cells(run: Run) -> tuple[int, int]:
    """(compress, perplexity) jobs of a run that repeats nothing which no method concerns."""
    assert not BEFORE & run.jobs.keys()
    return run.jobs.get("compress", 0), run.jobs.get("perplexity", 0)


# ------------------------------------------------------------------------------------------------------- a full run


def test_a_full_run_gives_every_table_and_figure(study, drawn):
    assert study.first.status == 0, study.first.output
    names = [f"results/tables/{name}.{kind}" for name in TABLES for kind in ("csv", "parquet")]
    names += [f"results/tables/main.{kind}" for kind in ("md", "tex")]
    names += [f"figures/{figure}.{kind}" for figure in DRAWN for kind in ("pdf", "svg", "png")]
    assert [name for name in names if not (study.folder / name).stat().st_size] == []
    main = (study.folder / "results/tables/main.md").read_text("utf-8")
    assert all(word in main for word in ("shared", "sequential", "magnitude", "wanda", "50% row", "2:4"))


def test_all_cells_are_done(study):
    cells = study.table("cells")
    assert set(cells["status"]) == {"done"} and cells["value"].notna().all() and cells["reason"].isna().all()
    perplexities = cells[cells["metric"] == "perplexity"]
    done = perplexities.groupby(["label", "mode"])["target"].agg(sorted).to_dict()
    assert done == {
        ("dense", "shared"): ["dense"],  # once, although there are two modes
        ("magnitude", "shared"): ["2:4"],
        ("magnitude", "sequential"): ["2:4"],
        ("wanda", "shared"): ["2:4", "50% row"],
        ("wanda", "sequential"): ["2:4", "50% row"],
    }
    assert (perplexities["value"] > 1).all() and not perplexities["contaminated"].any()
    layers = study.table("layers")
    assert len(layers) == 7 * 2 * LAYERS
    assert (layers.loc[layers["label"] == "dense", "output_error"] == 0).all()
    assert (layers.loc[layers["label"] != "dense", "achieved_sparsity"] == 0.5).all()
    shared = layers[(layers["mode"] == "shared") & (layers["target"] == "2:4")].groupby("label")["output_error"].mean()
    assert 0 < shared["wanda"] < shared["magnitude"] < 1


def test_masks_in_shared_mode_stand_beside_a_bound(study):
    layers = study.table("layers")
    certified = (layers["mode"] == "shared") & (layers["comparison"] == "mask-only")
    assert certified.any() and layers.loc[certified, "lower_bound"].notna().all()
    assert layers.loc[~certified, ["lower_bound", "gap_to_bound"]].isna().all(axis=None)
    assert (layers.loc[certified, "lower_bound"] <= layers.loc[certified, "output_error"]).all()
    bounds = study.table("bounds")
    assert set(bounds["target"]) == {"50% row", "2:4"} and (bounds["plain_bound"] <= bounds["lower_bound"]).all()
    assert (bounds["lower_bound"] > 0).all() and study.first.jobs["certificate"] == 2


def test_rows_carry_their_provenance(study):
    cells = study.table("cells")
    assert set(cells["model_source"]) == {str(MODEL)} and set(cells["calibration_text"]) == {str(TEXTS["train"])}
    assert set(cells["torch"]) == {torch.__version__} and set(cells["calibration_samples"]) == {4}
    assert cells["model_sha256"].str.fullmatch("[0-9a-f]{64}").all()


def test_unreached_targets_are_skipped_with_their_reason(study):
    (row,) = study.table("skipped").to_dict("records")
    assert row.pop("reason").startswith("magnitude does not quantise")
    assert row == {"label": "magnitude", "method": "magnitude", "target": "4b", "allocation": "uniform"}


def test_paths_reach_no_shell(study):
    """The model's folder and the texts are named so that an unquoted path would create a file."""
    assert not [path for path in study.folder.rglob("*pwned*") if path.name not in (MODEL.name, TEXTS["train"].name)]
    assert not list(study.folder.rglob("*.part")) and not list(study.folder.rglob("failed-*.json"))


def test_every_model_was_checked_before_it_was_compressed(study):
    models = [path.name for path in (study.folder / "results/cells").iterdir()]
    for model in models:
        (record,) = (study.folder / f"results/checks/{model}").iterdir()
        assert json.loads(record.read_text("utf-8"))["finite"]
        cells = (study.folder / f"results/cells/{model}").rglob("layers.parquet")
        assert record.stat().st_mtime <= min(path.stat().st_mtime for path in cells)
    assert len(list(study.folder.glob("results/checks/passed/*.json"))) == len(models) == 1


def test_weights_are_temporary(study):
    assert not list(study.folder.rglob("weights.safetensors"))


def test_equal_weights_are_evaluated_once_and_beside_their_compression(study):
    """Magnitude pruning sees no data: in both modes it gives the same weights."""
    (text,) = {path.name for path in study.folder.glob("results/cells/*/*/*/*/perplexity-*.json")}
    results, stored = (
        [json.loads(path.read_text("utf-8"))["losses"] for path in study.folder.glob(pattern)]
        for pattern in (f"results/cells/*/*/*/*/{text}", "results/evaluations/*.json")
    )
    assert len(results) == 7 and len(stored) == 6 and sorted(map(tuple, stored)) == sorted(set(map(tuple, results)))
    logs = [path.read_text("utf-8") for path in study.folder.glob("logs/cells/*/*/*/*/perplexity-*.log")]
    assert len(logs) == 7 and all("are already evaluated" in log for log in logs)


def test_the_report_has_the_figures_with_their_captions(drawn):
    done = drawn.run("--report", "report.html")
    assert done.status == 0, done.output
    html = (drawn.folder / "report.html").read_text("utf-8")
    assert all((f"{figure}.svg" in html) == (figure in DRAWN) for figure in FIGURES)


# ----------------------------------------------------------------------------------------------------- what runs again


def test_a_second_run_has_nothing_to_do(drawn, record_property):
    second = drawn.run()
    assert second.status == 0 and NOTHING in second.output, second.output
    record_property("seconds", second.seconds)
    print(f"nothing to be done, said after {second.seconds:.1f} s")


def test_a_parameter_concerns_the_cells_of_its_method(drawn):
    changed = tiny_study()
    changed["methods"]["magnitude"]["convention"] = "official"
    again = drawn.run("-n", config=write_config(drawn.folder, changed, Path("config/changed.yaml")))
    assert of_cells(again) == (2, 2)


def test_a_new_target_leaves_the_cells_that_are_there(drawn):
    changed = tiny_study()
    changed["targets"].append({"sparsity": 0.25})
    again = drawn.run("-n", config=write_config(drawn.folder, changed, Path("config/changed.yaml")))
    assert of_cells(again) == (2, 2)


@pytest.mark.parametrize(
    ("file", "cells"),
    [("methods/wanda", 4), ("methods/magnitude", 2), ("layerwise/compression/solver", 7), ("methods/rtn", 0)],
)
def test_an_edited_method_concerns_its_own_cells(drawn, file, cells):
    path = drawn.folder / f"{file}.py"
    before = path.read_text("utf-8")
    try:
        path.write_text(before + "# edited\n", "utf-8")
        again = drawn.run("-n")
    finally:
        path.write_text(before, "utf-8")
    assert of_cells(again) == (cells, cells)
    assert (NOTHING in again.output) == (cells == 0)


def test_an_edited_text_runs_through_to_the_end(drawn):
    path = drawn.folder / TEXTS["train"]
    before = path.read_text("utf-8")
    try:
        path.write_text(before + " and more", "utf-8")
        again = drawn.run("-n")
    finally:
        path.write_text(before, "utf-8")
    assert again.jobs["calibration_tokens"] == again.jobs["gram"] == 1
    assert "evaluation_tokens" not in again.jobs and again.jobs["compress"] == 7


def test_a_touched_file_concerns_nothing(drawn):
    touched = [
        *drawn.folder.glob("methods/*.py"),
        *drawn.folder.glob("layerwise/**/*.py"),
        *drawn.folder.glob("*/*.txt"),
    ]
    assert len(touched) > 100
    for path in touched:
        os.utime(path)
    assert NOTHING in drawn.run("-n").output


def test_a_project_that_is_moved_has_nothing_to_do(drawn):
    moved = drawn.folder.with_name("moved")
    drawn.folder.rename(moved)
    try:
        assert NOTHING in snakemake(moved, "-n", "--configfile", CONFIG).output
    finally:
        moved.rename(drawn.folder)


# --------------------------------------------------------------------------------------- a method of one's own, a fault


@dataclass(frozen=True)
class Extended:
    """The study with two methods from a folder of one's own, of which one fails."""

    failing: Run
    tables: dict[str, pd.DataFrame]  # of results/partial
    figures: list[str]
    records: list[dict]
    left: list[str]  # files of the failed cell
    config: Path


@pytest.fixture(scope="module")
def extended(study) -> Extended:
    folder = study.folder
    own = folder / "own methods"
    own.mkdir()
    (own / "lift.py").write_text(LIFT, "utf-8")
    (own / "fragile.py").write_text(FRAGILE, "utf-8")
    config = tiny_study() | {"modes": ["shared"], "targets": [{"pattern": "2:4"}], "method_paths": [own.name]}
    config["methods"] |= {"lift": {"warm_start": "wanda", "gain": [0.0, 0.5]}, "fragile": None}
    path = write_config(folder, config, Path("config/extended.yaml"))
    failing = study.run(config=path)
    partial = folder / "results/partial"
    return Extended(
        failing,
        {name: study.table(name, "results/partial/tables") for name in TABLES} if partial.is_dir() else {},
        sorted(file.name for file in partial.glob("figures/*")),
        [json.loads(file.read_text("utf-8")) for file in folder.rglob("failed-*.json")],
        sorted(file.name for file in folder.glob("results/cells/*/*/shared/fragile-*/*")),
        path,
    )


@pytest.fixture(scope="module")
def mended(study, extended) -> Run:
    (study.folder / "own methods/fragile.py").write_text(FRAGILE.replace(FAULT, ""), "utf-8")
    return study.run(*TABLES_ALONE, config=extended.config)


def test_a_failure_lets_the_rest_finish(extended):
    assert extended.failing.status == 1
    assert extended.failing.jobs["compress"] == 3  # what was computed before is not computed again
    cells = extended.tables["cells"]
    perplexity = cells[cells["metric"] == "perplexity"].set_index("label")
    assert perplexity["status"].to_dict() == {
        "dense": "done",
        "magnitude": "done",
        "wanda": "done",
        "lift.gain_0": "done",
        "lift.gain_0.5": "done",
        "fragile": "failed",
    }
    sentence = "fragile failed on model.layers.1.mlp.up_proj: ArithmeticError: no pivot is left"
    assert sentence in perplexity.loc["fragile", "reason"] and pd.isna(perplexity.loc["fragile", "value"])
    assert set(extended.tables["layers"]["label"]) == set(perplexity.index) - {"fragile"}
    assert len(extended.figures) == 3 * len(DRAWN)
    assert "error: " + sentence in extended.failing.output


def test_a_failure_leaves_a_record_and_no_output(extended):
    assert extended.left == [".checkpoint", "failed-compress.json"]  # the finished block is kept
    (record,) = extended.records
    assert record["status"] == "error" and record["stage"] == "compress"
    assert "ArithmeticError" in record["traceback"] and "up_proj" in record["reason"]


@pytest.mark.long
def test_the_next_run_retries_just_what_failed(mended, study):
    assert mended.status == 0, mended.output
    assert of_cells(mended) == (1, 1)
    assert not (study.folder / "results/partial").exists() and not list(study.folder.rglob("failed-*.json"))
    assert set(study.table("cells")["status"]) == {"done"}


@pytest.mark.long
def test_a_file_is_all_that_a_method_needs(mended, study):
    cells = study.table("cells")
    errors = cells[cells["metric"] == "mean_output_error"].set_index("label")["value"]
    assert errors["lift.gain_0"] == errors["wanda"] < errors["lift.gain_0.5"]
    own = cells[cells["method"] == "lift"].drop_duplicates("label").set_index("label")
    assert set(own["comparison"]) == {"weight-updating"}
    assert json.loads(own.loc["lift.gain_0.5", "params"]) == {"gain": 0.5, "warm_start": {"wanda": {}}}
    assert len(study.table("traces")) == 2 * 2 * LAYERS * 2  # of two cells, two points of each layer
    assert "lift.gain" in (study.folder / "results/tables/main.md").read_text("utf-8").replace("\\", "")


# ---------------------------------------------------------------------------------------------------------- bad input


def changed(study: dict, path: str, value) -> dict:
    """The study with the value at a path such as models/tiny; `...` takes the entry away."""
    *parts, last = path.split("/")
    inner = study
    for part in parts:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return study


WRONG = {
    # A config of one's own is not filled up with the embedded study's entries.
    "missing key": ("models", ..., "config: the study must have the key models. Got "),
    "unknown key": ("sead", 1, "the study has no key 'sead'; its keys are"),
    "unknown method": ("methods/wander", None, "methods.wander: the method must be one of admm, "),
    "unknown parameter": ("methods/wanda", {"alpha": 1}, "wanda has no parameter 'alpha'; its parameters are: none."),
    "no such target": ("targets", [{"pattern": "2:4", "bits": 4}], "methods.wanda: wanda supports none of the targets"),
    "no folder": ("models/tiny", {"path": "absent"}, "The folder absent of the model 'tiny' does not exist."),
    "no network": ("models/tiny", {"hub": "a/b", "revision": "c"}, "HF_HUB_OFFLINE forbids fetching"),
    "shell in a name": ("models", {"a b; touch x": {"path": str(MODEL)}}, "the name 'a b; touch x' is wrong"),
    "text as number": ("targets", [{"sparsity": "5e-1"}], "YAML reads 5e-1 as text: write 0.5."),
}


AT_EVERY_CHANGE = ("missing key", "unknown parameter", "no network", "shell in a name")


@pytest.mark.parametrize(
    "kind", [k if k in AT_EVERY_CHANGE else pytest.param(k, marks=pytest.mark.long) for k in WRONG]
)
def test_bad_input_is_one_sentence_before_any_job(study, kind):
    path, value, sentence = WRONG[kind]
    config = write_config(study.folder, changed(tiny_study(), path, value), Path("config/wrong.yaml"))
    before = set(study.folder.rglob("*"))
    done = study.run(config=config)
    assert done.status == 1 and not done.jobs
    told = done.output.partition("WorkflowError")[2]
    lines = [line for line in told.splitlines()[1:] if line.strip() and not line.startswith("  File")]
    assert len(lines) == 1 and sentence in lines[0], done.output
    assert lines[0].endswith(".") and "Traceback" not in done.output
    new = {str(path.relative_to(study.folder)) for path in set(study.folder.rglob("*")) - before}
    assert not [name for name in new if not name.startswith(".snakemake") and "__pycache__" not in name]


@pytest.mark.long
def test_numbers_that_are_not_finite_name_their_layer(study):
    """NaN in a weight, and weights so large that activations overflow: known only once the model is loaded."""
    layer = "model.layers.1.mlp.down_proj"
    models = {}
    faults = {"hollow": (f"{layer}.weight", float("nan")), "huge": ("model.layers.0.mlp.up_proj.weight", 1e30)}
    for name, (key, value) in faults.items():
        folder = study.folder / name
        folder.mkdir()
        for file in (study.folder / MODEL).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        weights = load_file(folder / "model.safetensors")
        weights[key][0] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        models[name] = {"path": name}
    config = tiny_study() | {"models": models, "modes": ["sequential"], "methods": {"magnitude": None}}
    config["targets"] = [{"pattern": "2:4"}]
    cells = [f"{cell.folder}/cell.json" for cell in plan(config).cells]
    done = study.run(*cells, config=write_config(study.folder, config, Path("config/faults.yaml")))
    assert done.status == 1
    cells = study.table("cells", "results/partial/tables")
    reasons = cells[cells["metric"] == "perplexity"].set_index("model")["reason"]
    assert (
        f"the model folder hollow must be finite. Got NaN or Inf in {layer}.weight instead" in done.output
    )  # of its check
    assert "an earlier step failed" in reasons["hollow"]
    assert "activations of model.layers.0, tap down_proj, are not finite: the inputs of model.layers" in reasons["huge"]
    assert all("\n" not in reason for reason in reasons)
    assert reasons["huge"].removeprefix("compress: ") in done.output


# --------------------------------------------------------------------------------------------------------- allocations


@pytest.mark.long
def test_an_edited_allocator_concerns_its_own_job_and_cells(study):
    config = tiny_study() | {"modes": ["shared"], "targets": [{"sparsity": 0.5}], "methods": {"wanda": None}}
    config["allocations"] = {"uniform": None, "owl": {"threshold": 2}, "pq_index": None}
    path = write_config(study.folder, config, Path("config/spread.yaml"))
    done = study.run(*TABLES_ALONE, config=path)
    assert done.status == 0 and done.jobs["allocate"] == 2, done.output
    levels = study.table("allocations")
    assert set(levels["allocation"]) == {"owl", "pq_index"} and len(levels) == 2 * 2 * LAYERS
    assert set(study.table("cells")["allocation"]) == {"uniform", "owl", "pq_index"}
    edited = {}
    for name in ("owl", "uniform"):
        file = study.folder / f"allocators/{name}.py"
        before = file.read_text("utf-8")
        try:
            file.write_text(before + "# edited\n", "utf-8")
            edited[name] = study.run("-n", *TABLES_ALONE, config=path)
        finally:
            file.write_text(before, "utf-8")
    assert edited["owl"].jobs["allocate"] == 1 and of_cells(edited["owl"]) == (1, 1)
    assert sum(edited["uniform"].jobs.values()) == 0


# -------------------------------------------------------------------------------------------------------------- export


def exported() -> tuple[Cell, str]:
    """A cell, and the folder that is asked of Snakemake for its export."""
    cell = next(cell for cell in plan(tiny_study()).cells if cell.columns["label"] == "wanda")
    return cell, cell.folder.replace("cells", "exports/dense", 1)


def test_an_export_concerns_its_cell_alone(study):
    """Its weights are gone, so that it is computed again, and only it."""
    done = study.run("-n", exported()[1])
    assert done.status == 0 and done.jobs == {"code": 1, "compress": 1, "export": 1}, done.output


@pytest.mark.long
def test_a_cell_is_exported_on_request(study):
    cell, folder = exported()
    done = study.run(folder)
    assert done.status == 0, done.output
    assert not list(study.folder.rglob("weights.safetensors"))
    form, target, lines = audit(study.folder / folder)
    assert (form, target) == ("dense", Target(**cell.spec["target"])) and len(lines) == 2 * LAYERS
    assert [line.fault for line in lines if line.fault] == []
    assert AutoTokenizer.from_pretrained(study.folder / folder)("ka lo").input_ids


# ------------------------------------------------------------------------------------------------------ embedded study


def test_the_embedded_study_is_planned(study):
    (study.folder / "resources/demo").symlink_to(ROOT / "resources/demo")
    done = snakemake(study.folder, "--cores", "all", "-n")
    assert done.status == 0, done.output
    planned = plan(yaml.safe_load((ROOT / "config/config.yaml").read_text("utf-8")))
    assert done.jobs["compress"] == done.jobs["perplexity"] == len(planned.cells)
    assert all(done.jobs[rule] == 1 for rule in BEFORE | {"tables", "all"})
    assert "demo_model" not in done.jobs
