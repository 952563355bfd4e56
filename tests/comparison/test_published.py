"""Published numbers: the table of them, what a study is compared with, and the configs of the papers and sweeps."""

# pandas' own annotations lose whether a selection is a column or a frame.

import csv
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from layerwise.cli.app import app
from layerwise.comparison import published_page
from layerwise.comparison.published import (
    FILE,
    pairs,
    published_comparisons,
    read_published,
    target_of,
    text_name,
    tolerance,
)
from layerwise.runtime.errors import InputError
from layerwise.sources.specs import TextSpec
from layerwise.storage.table_schema import from_rows, read_table, to_frame
from layerwise.study.cell import name_of
from layerwise.study.grid import Plan, plan
from tests.support.paths import ROOT
from tests.support.workflow_harness import copy_project, snakemake

PAPERS = sorted((ROOT / "config").glob("paper-*.yaml"))
SWEEPS = sorted((ROOT / "config").glob("sweep-*.yaml"))
ROWS = read_published()
JOINED = [row for row in ROWS if row["not_joined"] is None]
HUB = "facebook/opt-125m"
PRINTED_BY = {"paper-gptq-llama": "GPTQ", "paper-gptq-opt": "GPTQ", "paper-qronos": "Brevitas"}
KNOWN = {
    ("paper-awq", "awq"): "calibration_text: published pile, ours c4",
    ("paper-qronos", "rotated"): "calibration_text: published wikitext2-train, ours c4",
    ("paper-gptq-llama", "gptq"): "mode: published true-sequential, ours sequential",
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text("utf-8"))


def row(method: str = "wanda", number: float = 30.0, **changes: Any) -> dict[str, Any]:
    """A published row of the small study's protocol; a dense one has no target."""
    sparse = {"sparsity": 0.0} if method == "dense" else {"sparsity": 0.5}
    protocol = {"mode": "shared", "calibration_text": "c4", "calibration_samples": 128, "calibration_length": 2048}
    named = {"paper": "P", "table": "T", "model": "OPT", "method": method, "setting": "50%; seqlen 2048"}
    known = {"status": "primary", "source": "here", "hub": HUB, "our_method": method, "our_metric": "perplexity"}
    own = {"evaluation_text": "wikitext2", "evaluation_length": 2048, "number": number, "pattern": "row"}
    empty = ("our_params", "our_allocation", "bits", "group", "deviation", "assumed", "not_joined", "fewshot")
    own["value"] = f"{number:.2f}"
    return {**dict.fromkeys(empty), "symmetric": False, **sparse, **protocol, **named, **known, **own, **changes}


def study(**changes: Any) -> Plan:
    """Dense and Wanda on OPT-125M in a local folder, under the protocol of `row`."""
    config = {
        "modes": ["shared"],
        "certificates": False,
        "models": {"opt": {"path": "opt", "known_as": HUB}},
        "texts": {"c4": {"path": "c4.jsonl", "dataset": "c4"}, "wiki": {"path": "w.txt", "dataset": "wikitext2"}},
        "calibration": {"c4": {"text": "c4", "samples": 128, "length": 2048, "seed": 0}},
        "evaluation": {"w": {"text": "wiki", "length": 2048}},
        "targets": [{"sparsity": 0.5}],
        "methods": {"dense": None, "wanda": None},
    }
    return plan({**config, **changes})


def results(planned: Plan, values: Mapping[str, float | None]) -> pd.DataFrame:
    """The `cells` table with a perplexity for every label; None: the cell has failed."""
    rows = [
        cell.columns
        | {"metric": "perplexity", "text": name_of(spec), "value": values[cell.columns["label"]]}
        | ({"status": "done"} if values[cell.columns["label"]] else {"status": "failed", "reason": "out of memory"})
        for cell in planned.cells
        for spec in planned.evaluations.values()
    ]
    return to_frame(from_rows(rows, "cells", "the test"))


def verdicts(rows: list[dict[str, Any]], planned: Plan, **values: float | None) -> list[dict[str, Any]]:
    return published_comparisons(planned, rows, results(planned, values) if values else None)


# --------------------------------------------------------------------------------------------------- published.csv


def test_every_row_is_kept_and_the_words_say_what_is_joined():
    assert len(ROWS) == 1169 and len(JOINED) > 600
    assert {r["status"] for r in ROWS} == {"primary", "secondary"}
    assert all(r["source"] for r in ROWS)
    keys = [(r["paper"], r["table"], r["model"], r["method"], r["setting"], r["metric"], r["value"]) for r in ROWS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("paper", sorted({row["paper"] for row in JOINED}))
def test_the_translation_says_what_is_printed(paper):
    catalogue = study().catalogue
    for r in (r for r in JOINED if r["paper"] == paper):
        assert r["number"] == float(r["value"])
        params = catalogue.complete(r["our_method"], json.loads(r["our_params"] or "{}"), paper)
        target = target_of(r)
        assert r["our_method"] == "dense" or catalogue.refusal(r["our_method"], params, target) is None
        setting = r["setting"]
        if percent := re.match(r"(\d+)%", setting):
            assert target.sparsity == int(percent[1]) / 100
        if nm := re.match(r"\d:\d", setting):
            assert target.pattern == nm[0]
        if bits := re.search(r"(?:^|INT| )([34])(?: ?bit|-g)", setting):
            assert (target.bits, target.group) == (int(bits[1]), 128 if "g128" in setting else None)
        if length := re.search(r"; seqlen (\d+)$", setting):
            assert r["evaluation_length"] == int(length[1])


def test_a_row_of_a_spread_target_is_compared_with_its_own_cells():
    spread = {"allocations": {"uniform": None, "owl": {"official": True}, "mild": {"allocator": "owl", "spread": 0.02}}}
    planned = study(**spread)
    (model,) = planned.models
    joined = pairs(planned, row("wanda", our_allocation='{"owl": {"official": true}}'), model)
    assert [pair.cell.columns["target"] for pair in joined] == ["50% row owl"]
    assert [pair.cell.columns["target"] for pair in pairs(planned, row("wanda"), model)] == ["50% row"]
    _, lost = published_comparisons(study(), [row("wanda"), row("wanda", our_allocation='{"owl": {}}')], None)
    assert lost["reason"] == "the study has no cell of wanda at this target by owl with these parameters"


def test_owl_s_rows_are_joined():
    owl = [r for r in JOINED if r["our_allocation"]]
    assert len(owl) == 10 and {(r["paper"], r["our_method"]) for r in owl} == {("OWL", "wanda"), ("OWL", "sparsegpt")}


def test_the_length_of_llama_2_is_that_of_the_paper():
    dense = {
        (r["paper"], r["evaluation_length"]): r["number"]
        for r in JOINED
        if r["our_method"] == "dense" and r["hub"] == "meta-llama/Llama-2-7b-hf"
    }
    assert dense["Wanda", 4096] == 5.12 and dense["BESA", 2048] == dense["DSnoT", 2048] == 5.47


def test_a_mean_over_seeds_has_its_deviation():
    (found,) = [
        r
        for r in JOINED
        if (r["paper"], r["hub"], r["our_method"], r["sparsity"], r["pattern"])
        == ("ALPS", "meta-llama/Llama-2-7b-hf", "wanda", 0.5, "row")
    ]
    assert (found["number"], found["deviation"]) == (6.93, 0.01)


@pytest.mark.parametrize(
    ("column", "value", "sentence"),
    [
        ("status", "rumour", "row 2: status must be one of "),
        ("sparsity", "half", "row 2: sparsity must be a number"),
        ("hub", "", "row 2: hub must be a text. Got None instead."),
        ("verdict", "x", "row 2: the row has no key 'verdict'; its keys are "),
    ],
)
def test_a_wrong_row_is_one_sentence(tmp_path, column, value, sentence):
    with FILE.open(encoding="utf-8", newline="") as file:
        first = next(r for r in csv.DictReader(file) if not r["not_joined"])
    with (tmp_path / "published.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, {**first, column: value})
        writer.writeheader()
        writer.writerow({**first, column: value})
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_published(tmp_path / "published.csv")


# ------------------------------------------------------------------------------------------------------- comparison


def test_within_and_outside():
    rows = [row("dense", 27.66), row("wanda", 38.0)]
    dense, wanda = verdicts(rows, study(), dense=27.7, wanda=38.5)
    assert (dense["verdict"], dense["target"]) == ("within", "dense") and dense["tolerance"] == pytest.approx(0.1383)
    assert wanda["verdict"] == "within" and wanda["difference"] == pytest.approx(0.5)
    assert wanda["tolerance"] == pytest.approx(0.76) and wanda["differs"] is None and wanda["reason"] is None
    assert (wanda["dense_published"], wanda["dense_ours"]) == (27.66, 27.7)
    assert verdicts(rows, study(), dense=27.7, wanda=39.0)[1]["verdict"] == "outside"


def test_another_dense_perplexity_says_nothing_of_the_methods():
    """The longer windows of a LLaMA-2 table: even a method that happens to agree is not judged."""
    rows = [row("dense", 5.12, evaluation_length=4096), row("wanda", 6.42, evaluation_length=4096)]
    dense, wanda = verdicts(rows, study(), dense=5.47, wanda=6.42)
    assert dense["verdict"] == "protocol differs" and dense["differs"] == "evaluation_length: published 4096, ours 2048"
    assert wanda["verdict"] == "protocol differs" and wanda["differs"] == dense["differs"]
    assert wanda["reason"] == "our dense perplexity 5.47 is not within 0.5% of the published 5.12 (P)"


def test_other_windows_are_not_comparable_whatever_the_dense_row():
    part = study(evaluation={"w": {"text": "wiki", "length": 2048, "samples": 10}})
    dense, wanda = verdicts([row("dense", 27.66), row("wanda", 38.0)], part, dense=27.66, wanda=38.0)
    assert dense["verdict"] == wanda["verdict"] == "protocol differs"
    assert wanda["differs"] == "evaluation_windows: published all, ours 10"


def test_another_length_is_not_comparable_even_where_the_dense_rows_agree():
    rows = [row("dense", 27.66, evaluation_length=4096), row("wanda", 38.0, evaluation_length=4096)]
    for found in verdicts(rows, study(), dense=27.66, wanda=38.0):
        assert (
            found["verdict"] == "protocol differs"
            and found["differs"] == "evaluation_length: published 4096, ours 2048"
        )


@pytest.mark.parametrize(
    "target", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"pattern": "layer"}, {"bits": 4, "group": 128}]
)
def test_a_number_of_another_target_is_not_ours(target):
    rows = [row("dense", 27.66), row("wanda", 38.0), row("wanda", 45.0, **target)]
    _, same, other = verdicts(rows, study(), dense=27.66, wanda=38.0)
    assert (same["verdict"], other["verdict"]) == ("within", "not run")
    assert other["reason"] == "the study has no cell of wanda at this target with these parameters"


def test_fields_of_the_calibration_are_named_where_the_method_looks_at_it():
    rows = [row("dense", 27.66), row("wanda", 38.0, mode="sequential", calibration_samples=64), row("magnitude", 60.0)]
    rows[2] |= {"calibration_samples": 64, "pattern": "layer"}
    methods = {"dense": None, "wanda": None, "magnitude": {"targets": [{"sparsity": 0.5, "pattern": "layer"}]}}
    _, wanda, magnitude = verdicts(rows, study(methods=methods), dense=27.66, wanda=38.0, magnitude=60.0)
    assert wanda["differs"] == "mode: published sequential, ours shared; calibration_samples: published 64, ours 128"
    assert wanda["verdict"] == "within" and magnitude["differs"] is None
    _, wanda, _ = verdicts(rows, study(methods=methods), dense=27.66, wanda=45.0, magnitude=60.0)
    assert wanda["verdict"] == "protocol differs"
    assert wanda["reason"] == "mode and calibration_samples may explain it"


def test_the_nearest_protocol_is_compared():
    both = study(
        modes=["shared", "sequential"],
        evaluation={"long": {"text": "wiki", "length": 4096}, "w": {"text": "wiki", "length": 2048}},
    )
    (found,) = verdicts([row("wanda", 38.0, mode="sequential")], both)
    assert (found["mode"], found["text"], found["differs"]) == ("sequential", "w", None)


def test_parameters_make_a_method_the_printed_one():
    swept = study(methods={"dense": None, "frank_wolfe": {"keep": [0.5, 0.9]}})
    rows = [row("frank_wolfe", 30.0, our_params='{"keep":0.5}'), row("frank_wolfe", 29.0)]
    half, default = verdicts(rows, swept)
    assert (half["label"], default["label"]) == ("frank_wolfe.keep_0.5", "frank_wolfe.keep_0.9")
    conventions = study(methods={"magnitude": {"convention": "official"}})
    assert verdicts([row("magnitude")], conventions)[0]["label"] == "magnitude"


def test_a_row_without_a_number_is_not_run():
    rows = [row("dense", 27.66), row("wanda", 38.0), row("ria", 37.0), row("owl", 36.0, not_joined="no method is OWL")]
    failed = verdicts(rows, study(), dense=27.66, wanda=None)
    assert [entry["verdict"] for entry in failed] == ["within", "not run", "not run", "not run"]
    assert [entry["reason"] for entry in failed[1:]] == [
        "out of memory",
        "the study has no cell of ria at this target with these parameters",
        "no method is OWL",
    ]
    assert {entry["verdict"] for entry in verdicts(rows, study())} == {"not run"}
    other = study(evaluation={"c": {"text": "c4", "length": 2048}})
    assert verdicts(rows, other) == []


def test_a_dense_row_is_borrowed_from_another_paper_of_the_same_length():
    rows = [row("wanda", 38.0), row("dense", 27.66, paper="Q"), row("dense", 26.0, paper="R", evaluation_length=4096)]
    wanda = next(e for e in verdicts(rows, study(), dense=27.66, wanda=38.0) if e["label"] == "wanda")
    assert (wanda["verdict"], wanda["dense_published"]) == ("within", 27.66)
    (alone,) = verdicts([row("wanda", 38.0)], study(), dense=27.66, wanda=38.0)
    assert alone["verdict"] == "not checked" and "no dense value is published" in alone["reason"]
    unsaid = verdicts([row("wanda", 38.0, evaluation_length=None), rows[1]], study(), dense=27.66, wanda=38.0)
    assert "no dense value is published" in next(e for e in unsaid if e["label"] == "wanda")["reason"]


def test_a_dense_misprint_does_not_hide_the_methods():
    """Wanda prints 4.77 for LLaMA-30B, all others 4.10."""
    rows = [row("dense", 4.77), row("wanda", 5.24), row("dense", 4.10, paper="Q")]
    wanda = next(e for e in verdicts(rows, study(), dense=4.1, wanda=5.24) if e["method"] == "wanda")
    assert (wanda["verdict"], wanda["reason"]) == ("within", "P prints 4.77 for the dense model, Q 4.1 as here (4.1)")
    assert verdicts(rows, study(), dense=4.4, wanda=5.24)[-1]["verdict"] == "protocol differs"


def test_a_rounded_number_is_no_other_result():
    rows = [row("dense", 6.1, value="6.1"), row("wanda", 6.5, value="6.5")]
    assert [e["verdict"] for e in verdicts(rows, study(), dense=6.14, wanda=6.54)] == ["within", "within"]
    assert tolerance(row(number=1.7e4, value="1.7e4")) == 500


def test_the_tolerance_grows_with_compression_and_printed_noise():
    assert tolerance(row("dense", 10.0)) == pytest.approx(0.05)
    assert tolerance(row(number=10.0)) == pytest.approx(0.2)
    assert tolerance(row(number=10.0, sparsity=0.6)) == pytest.approx(0.5)
    assert tolerance(row("gptq", 10.0, sparsity=0.0, bits=3)) == pytest.approx(0.5)
    assert tolerance(row("gptq", 10.0, sparsity=0.0, bits=2)) == pytest.approx(0.5)
    assert tolerance(row(number=10.0, deviation=0.4)) == pytest.approx(0.8)


def accuracy(method: str, number: float, task: str = "piqa", **changes: Any) -> dict[str, Any]:
    """A published accuracy of no examples, in percent, by a method on no calibration that is said."""
    calibration = dict.fromkeys(("mode", "calibration_text", "calibration_samples", "calibration_length"))
    own = {"our_metric": "acc_norm", "evaluation_text": task, "evaluation_length": None, "fewshot": 0}
    return row(method, number, **{**calibration, **own, **changes})


TASKS = {"zero-shot": {"tasks": ["piqa", "arc_easy"]}}


def task_results(planned: Plan, values: Mapping[str, float | None], **changes: Any) -> pd.DataFrame:
    """The `cells` table with an accuracy on piqa for every label, as a share, with its standard error of 0.02."""
    common = {"metric": "acc_norm", "task_set": "zero-shot", "task": "piqa", "stderr": 0.02, "fewshot": 0, **changes}
    rows = [
        cell.columns | common | {"value": values[cell.columns["label"]], "status": "done"} for cell in planned.cells
    ]
    return to_frame(from_rows(rows, "cells", "the test"))


def test_accuracies_are_compared_in_percent_within_two_standard_errors():
    planned = study(tasks=TASKS)
    rows = [accuracy("dense", 66.92), accuracy("wanda", 60.0), accuracy("dense", 42.99, task="hellaswag")]
    dense, other, wanda = published_comparisons(planned, rows, task_results(planned, {"dense": 0.63, "wanda": 0.55}))
    assert (dense["text"], dense["metric"], dense["verdict"]) == ("piqa of zero-shot", "acc_norm", "within")
    assert dense["ours"] == pytest.approx(63) and dense["difference"] == pytest.approx(-3.92)
    assert dense["ours_stderr"] == pytest.approx(2) and dense["tolerance"] == pytest.approx(4)
    assert (wanda["verdict"], wanda["dense_published"], wanda["dense_ours"]) == ("outside", 66.92, pytest.approx(63))
    assert (other["verdict"], other["reason"]) == ("not run", "the study has no task hellaswag")
    far = published_comparisons(planned, rows, task_results(planned, {"dense": 0.62, "wanda": 0.6}))
    assert (far[0]["verdict"], far[2]["verdict"]) == ("outside", "protocol differs")
    assert far[2]["reason"] == "our dense acc_norm 62 is not within 2 standard errors of the published 66.92 (P)"
    text = published_page.markdown(to_frame(from_rows(far, "published", "the test")))
    assert (
        "| dense, T: acc\\_norm on piqa of zero-shot | dense | dense | 66.92 | 62.00 | -4.92 | 4.00 | outside |" in text
    )
    assert "standard error 2" in text


def test_an_accuracy_of_another_metric_or_protocol_is_not_ours():
    planned = study(tasks=TASKS)
    done = {"dense": 0.63, "wanda": 0.55}
    (one,) = published_comparisons(planned, [accuracy("dense", 66.0, our_metric="acc")], task_results(planned, done))
    assert (one["verdict"], one["ours"], one["tolerance"]) == ("not run", None, None)
    (shots,) = published_comparisons(planned, [accuracy("dense", 63.0, fewshot=5)], task_results(planned, done))
    assert (shots["verdict"], shots["differs"]) == ("protocol differs", "fewshot: published 5, ours 0")
    part = study(tasks={"zero-shot": {"tasks": ["piqa"], "items": 10}})
    within, outside = (
        published_comparisons(part, [accuracy("dense", number)], task_results(part, done))[0] for number in (63.0, 70.0)
    )
    assert (within["verdict"], within["differs"]) == ("within", "items: published all, ours 10")
    assert (outside["verdict"], outside["reason"]) == ("protocol differs", "items may explain it")


def test_a_quantised_file_is_not_the_published_model():
    planned = study(tasks=TASKS)
    cells = task_results(planned, {"dense": 0.5, "wanda": 0.4}, model_quantisation="Q4_1 x 211")
    (found,) = published_comparisons(planned, [accuracy("dense", 66.92)], cells)
    assert (found["verdict"], found["reason"]) == ("protocol differs", "model_quantisation may explain it")
    assert found["differs"] == "model_quantisation: published none, ours Q4_1 x 211"


def test_the_zero_shot_accuracies_of_smollm2_have_their_task_and_source():
    found = {
        (r["evaluation_text"], r["our_metric"]): r["number"]
        for r in JOINED
        if r["hub"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and r["fewshot"] == 0 and "model card" in r["source"]
    }
    expected = {("piqa", "acc_norm"): 66.92, ("arc_easy", "acc"): 54.12, ("arc_challenge", "acc_norm"): 27.73}
    assert found == {**expected, ("hellaswag", "acc_norm"): 42.99}


def test_texts_are_known_by_what_they_are():
    wiki: TextSpec = {
        "hub": "Salesforce/wikitext",
        "revision": "x",
        "files": ["wikitext-2-raw-v1/test-00000-of-00001.parquet"],
    }
    assert text_name(wiki) == "wikitext2"
    assert text_name({**wiki, "files": ["wikitext-103-raw-v1/test-00000-of-00001.parquet"]}) == "Salesforce/wikitext"
    assert text_name({"hub": "allenai/c4", "files": []}) == "c4"
    assert text_name({"path": "pile.jsonl", "dataset": "pile"}) == "pile"


# ------------------------------------------------------------------------------------------------------------- pages


def test_the_embedded_study_has_nothing_to_compare_and_says_so(tmp_path):
    app(["published", "embedded", "--unrun", "--out", str(tmp_path)], standalone_mode=False)
    assert read_table(tmp_path, "published").empty
    for name in ("published.md", "published.tex"):
        assert published_page.NOTHING in (tmp_path / name).read_text("utf-8")


def test_the_page_shows_verdicts_and_what_is_not_in_the_study(tmp_path):
    rows = [
        row("dense", 27.66),
        row("wanda", 38.0, status="secondary"),
        row("owl", 36.0, not_joined="no method is OWL"),
    ]
    entries = verdicts(rows, study(), dense=27.7, wanda=41.0)
    data = to_frame(from_rows(entries, "published", "the test"))
    text = published_page.markdown(data)
    assert "| wanda | 50% row | 38.00 | 41.00 | 3.00 | 0.76 | outside | secondary |" in text
    assert "1 within, 1 outside, 0 protocol differs, 0 not checked, 1 not run" in text
    assert "Not run, because no method is OWL: owl, 50%." in text
    latex = published_page.latex(data)
    assert r"wanda & 50\% row & 38.00 & 41.00" in latex and latex.count(r"\begin{table}") == 1
    lines = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(published_page.COLUMNS) - 1}


def test_the_page_shows_every_mode_and_says_which():
    planned = study(modes=["shared", "sequential"])
    cells = results(planned, {"dense": 27.66, "wanda": 38.0})
    cells.loc[(cells["mode"] == "sequential") & (cells["label"] == "wanda"), "value"] = 60.0
    entries = published_comparisons(planned, [row("dense", 27.66), row("wanda", 38.0, mode=None)], cells)
    text = published_page.markdown(to_frame(from_rows(entries, "published", "the test")))
    assert "| 38.00 | 38.00 | 0 | 0.76 | within | shared; not stated: mode |" in text
    assert "| 38.00 | 60.00 | 22.00 | 0.76 | outside | sequential; not stated: mode |" in text


# ----------------------------------------------------------------------------------------------------------- configs


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("the plan must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_paper_is_planned_without_network_and_is_not_run(path, no_network):
    planned = plan(read(path), check_sources=True)
    assert planned.warnings() == [] and planned.config["study"] == path.stem
    assert all(model.get("hub") and model.get("revision") for model in planned.models.values())
    entries = published_comparisons(planned, ROWS, None)
    assert {entry["verdict"] for entry in entries} <= {"not run"}
    own = PRINTED_BY.get(path.stem)
    own = own or next((p for p in {r["paper"] for r in ROWS} if path.stem.startswith(f"paper-{p.lower()}")), None)
    there = [entry for entry in entries if entry["paper"] == own and entry.get("cell") and entry["method"] != "dense"]
    assert there if own not in (None, "GQSA") else path.stem in ("paper-awp", "paper-gqsa")


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_paper_s_own_rows_agree_with_its_config_s_protocol(path):
    """What a config cannot do as the paper did is named; the others differ in nothing."""
    prefix = (PRINTED_BY.get(path.stem) or path.stem.removeprefix("paper-").split("-")[0]).lower()
    for entry in published_comparisons(plan(read(path)), ROWS, None):
        if entry["paper"].lower() == prefix and entry.get("cell") and entry["method"] != "dense":
            assert entry["differs"] == KNOWN.get((path.stem, entry["method"])), entry


def test_a_dry_run_of_a_paper_builds_its_dag(tmp_path):
    copy_project(tmp_path)
    done = snakemake(tmp_path, "-n", "--configfile", "config/paper-wanda-llama2.yaml", HF_HUB_OFFLINE="0")
    assert done.status == 0, done.output
    planned = plan(read(ROOT / "config/paper-wanda-llama2.yaml"))
    assert done.jobs["compress"] == done.jobs["perplexity"] == len(planned.cells) == 30
    assert done.jobs["published"] == done.jobs["tables"] == 1 and done.jobs["model"] == 3
    forbidden = snakemake(tmp_path, "-n", "--configfile", "config/paper-wanda-llama2.yaml")
    assert forbidden.status and "HF_HUB_OFFLINE forbids fetching" in forbidden.output


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_planned_and_varies_what_it_says(path):
    planned = plan(read(path))
    swept = planned.config["sweep"]
    assert "sweep" in planned.gives
    found = set()
    for cell in planned.cells:
        columns = {**cell.columns, **json.loads(cell.columns["params"])}
        calibration = planned.calibrations[cell.calib]
        columns |= {"calibration": name_of(calibration), **{f"calibration_{k}": v for k, v in calibration.items()}}
        if cell.columns["target"] != "dense":
            found.add(columns.get(swept))
    assert len(found - {None}) >= 5


def test_a_sweep_of_nothing_is_refused():
    config = read(ROOT / "config/sweep-swaps.yaml")
    with pytest.raises(InputError, match="config: sweep must be .* Got 'keep' instead"):
        plan({**config, "sweep": "keep"})
