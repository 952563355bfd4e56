"""Answers that a compressed model writes: those of generate() on the exported folder, and of a loop of our own."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from layerwise.demo import docstring_tasks
from layerwise.evaluation import zero_shot
from layerwise.evaluation.perplexity import apply_weights
from layerwise.models.loading import read_generation_config
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import find_blocks, linears
from layerwise.results import main_table
from layerwise.results.cell_results import TaskSet, gather_cell, without_filter
from layerwise.results.collect import observe
from layerwise.results.main_table import document
from layerwise.results.table_text import markdown
from layerwise.runtime.errors import InputError
from layerwise.storage.frames import distinct, matching
from tests.support import synthetic_tables as synthetic
from tests.support.paths import ROOT
from tests.support.workflow_harness import words, write_model, write_tokenizer

MOST, STOP, BATCH, ITEMS = 8, "e", 4, 10
WRITE = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "write.jsonl"}},
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [STOP], "max_gen_toks": MOST, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
FIRST = [{"function": "regex", "regex_pattern": r"^([\s\S])"}, {"function": "take_first"}]
FILTERS = [{"name": "whole", "filter": [{"function": "take_first"}]}, {"name": "first", "filter": FIRST}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a model, a penalty in its generation_config.json, a cell's weights, and the model with these."""
    folder = tmp_path_factory.mktemp("generated")
    model = write_model(folder / "model", write_tokenizer(folder / "model", words(400, seed=1)))
    GenerationConfig(repetition_penalty=1.6, bos_token_id=0, eos_token_id=0).save_pretrained(folder / "model")
    prefix, blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(0)
    weights = {
        layer.name: torch.randn(layer.shape, generator=generator) * 0.2
        for i, block in enumerate(blocks)
        for layer in linears(block, f"{prefix}.{i}")
    }
    save_file(weights, folder / "weights.safetensors")
    save_file({name: weight * 1e30 for name, weight in weights.items()}, folder / "broken.safetensors")
    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    apply_weights(saved, folder / "weights.safetensors")
    saved.save_pretrained(folder / "saved")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "saved")
    return folder


def contexts() -> list[str]:
    """Beginnings of several lengths, so that batches are padded."""
    text = words(400, seed=3).split()
    return [" ".join(text[9 * item : 9 * item + 2 + item % 4]) for item in range(ITEMS)]


def looped(folder: Path, penalty: float) -> list[str]:
    """What a model writes, by whole forward passes and the largest logit; those of seen tokens are made less likely."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = []
    for context in contexts():
        ids = tokenizer(context)["input_ids"]
        start = len(ids)
        assert start + MOST <= 64
        while len(ids) < start + MOST and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
            logits = model(torch.tensor([ids])).logits[0, -1].detach()
            seen = torch.tensor(sorted(set(ids)))
            logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
            ids.append(int(logits.argmax()))
        texts.append(tokenizer.decode(ids[start:], skip_special_tokens=True).split(STOP)[0])
    return texts


def generated(folder: Path) -> list[str]:
    """What transformers' generate() writes of the model in a folder, one text at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for context in contexts():
        ids = tokenizer(context, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**ids, max_new_tokens=MOST, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.append(text.split(STOP)[0])
    return texts


def write_tasks(folder: Path, answers: list[str]) -> dict[str, Any]:
    """Two tasks that ask for the answers, the second by two filters; of every third item the answer is another."""
    folder.mkdir()
    rows = [
        {"context": context, "answer": f"{answer}?" if item % 3 == 2 else answer}
        for item, (context, answer) in enumerate(zip(contexts(), answers, strict=True))
    ]
    (folder / "write.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, more in {"write": {}, "filtered": {"filter_list": FILTERS}}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **WRITE, **more}), "utf-8")
    return {"tasks": ["write", "filtered"], "folder": str(folder), "batch": BATCH}


def evaluate(folder: Path, spec: Mapping[str, Any], weights: str | None) -> dict[str, Any]:
    """The record of a cell's tasks, of the model that is read block by block."""
    model = {"path": str(folder / "model"), "dtype": "float32"}
    path = folder / weights if weights else None
    return zero_shot.evaluate_model(argparse.Namespace(model=model, tasks=spec, weights=path, threads=1, device="cpu"))


def test_a_cell_writes_what_its_exported_model_writes(tiny, tmp_path):
    answers = generated(tiny / "saved")
    assert answers == looped(tiny / "saved", penalty=1.6) != looped(tiny / "saved", penalty=1.0)
    assert len(set(answers)) > 3 and all(answers) and len({len(text) for text in answers}) > 1
    spec = write_tasks(tmp_path / "tasks", answers)
    record = evaluate(tiny, spec, "weights.safetensors")
    right = [int(item % 3 != 2) for item in range(ITEMS)]
    share = sum(right) / ITEMS
    assert record["samples"]["write"] == {"exact_match": right}
    (row, *filtered) = record["rows"]
    assert (row["task"], row["metric"], row["items"], row["fewshot"]) == ("write", "exact_match", ITEMS, 0)
    assert row["value"] == pytest.approx(share)
    assert row["stderr"] == pytest.approx((share * (1 - share) / (ITEMS - 1)) ** 0.5)
    # Of an answer's first character the text's is right where it is the whole answer.
    first = [int(text[:1] == (text if item % 3 != 2 else f"{text}?")) for item, text in enumerate(answers)]
    assert record["samples"]["filtered"] == {"exact_match,whole": right, "exact_match,first": first}
    assert {row["metric"]: row["value"] for row in filtered} == {
        "exact_match,whole": pytest.approx(share),
        "exact_match,first": pytest.approx(sum(first) / ITEMS),
    }
    dense = evaluate(tiny, spec, None)
    own = [
        int(text == answer and item % 3 != 2)
        for item, (text, answer) in enumerate(zip(looped(tiny / "model", 1.6), answers, strict=True))
    ]
    assert dense["samples"]["write"] == {"exact_match": own} and own != right


def test_a_model_that_writes_from_nan_has_no_exact_match(tiny, tmp_path):
    """The argmax over NaN is a token, and an empty answer may be right."""
    spec = write_tasks(tmp_path / "tasks", ["?"] * ITEMS)
    for row in evaluate(tiny, {**spec, "tasks": ["write"]}, "broken.safetensors")["rows"]:
        assert row["value"] is None and row["stderr"] is None
        assert row["reason"] == f"the model has diverged: its logits were NaN or Inf while it generated {ITEMS} answers"


def test_a_damaged_generation_config_is_one_sentence(tiny, tmp_path):
    spec = {"path": str(tiny / "model"), "dtype": "float32"}
    blocks = LazyBlocks(spec)
    assert blocks.model.generation_config.repetition_penalty in (None, 1.0)
    read_generation_config(blocks.model, spec)
    assert blocks.model.generation_config.repetition_penalty == 1.6
    damaged = {"path": str(tmp_path / "damaged")}
    (tmp_path / "damaged").mkdir()
    for path in (tiny / "model").iterdir():
        (tmp_path / "damaged" / path.name).symlink_to(path)
    (tmp_path / "damaged/generation_config.json").unlink()
    read_generation_config(blocks.model, damaged)  # nothing is said: nothing changes
    assert blocks.model.generation_config.repetition_penalty == 1.6
    (tmp_path / "damaged/generation_config.json").write_text("{", "utf-8")
    with pytest.raises(InputError, match=r"^Cannot load the model folder .*damaged: .*generation_config"):
        read_generation_config(blocks.model, damaged)


# ----------------------------------------------------------------------------------------------------------- the tables


def table_of(values: Mapping[str, float | None], metric: str) -> pd.DataFrame:
    """Rows of `cells`, of a task that is written; None: the cell failed, which its one row says under acc."""
    labels = {label: synthetic.cell(label, "dense" if label == "dense" else "2:4") for label in values}
    frame = synthetic.cells_table(list(labels.values()))
    frame = distinct(matching(frame, metric="perplexity"), ["label"])
    frame = frame.assign(text=None, task="write", task_set="local", contaminated=pd.NA, stderr=0.04)
    frame = frame.assign(value=[values[label] for label in frame["label"]])
    failed = frame["value"].isna()
    frame["metric"] = [("acc" if lost else metric) for lost in failed]
    frame["status"] = [("failed" if lost else "done") for lost in failed]
    return frame.assign(reason=["out of memory" if lost else None for lost in failed])


@pytest.mark.parametrize(("metric", "title"), [("exact_match", "local"), ("exact_match,strict", "local, strict")])
def test_the_main_table_shows_what_was_written(metric, title):
    frame = table_of({"dense": 0.5, "magnitude": 0.25, "wanda": 0.375, "ria": None}, metric)
    text = document(frame, markdown)
    assert f"exact\\_match on write of {title}, calibrated on" in text
    assert "Dense: 50.0 (standard error 4.0). In percent, higher is better" in text
    assert "| wanda | **37.5** |" in text and "| magnitude | 25.0 |" in text
    assert text.count("| ria | failed |") == 1 and "acc on" not in text


def test_a_set_that_failed_everywhere_is_shown_as_failed():
    frame = table_of({"dense": None, "magnitude": None}, "exact_match")
    assert "| magnitude | failed |" in document(frame, markdown)


def test_a_mean_that_no_cell_has_is_not_shown():
    frame = table_of({"dense": 0.5, "magnitude": 0.25, "wanda": None}, "exact_match")
    lost = frame[frame["label"] == "wanda"].assign(task="mean")
    assert "mean of local" not in document(pd.concat([frame, lost], ignore_index=True), markdown)


def test_written_items_are_compared_under_their_filter(tmp_path):
    cell = synthetic.cell("wanda", "2:4")
    folder = synthetic.write_cell(tmp_path, cell)
    row = {"task": "write", "task_version": "1.0", "fewshot": 0, "items": 4, "value": 0.5, "stderr": 0.1}
    rows = [{**row, "metric": name} for name in ("exact_match,whole", "exact_match,first")]
    samples = {"exact_match,whole": [1, 0, 1, 0], "exact_match,first": [0, 0, 1, 1]}
    record = {"lm_eval": "0.4.13", "rows": rows, "groups": {}, "samples": {"write": samples}}
    (folder / "tasks-local-1.json").write_text(json.dumps(record))
    results = gather_cell(cell, [], tmp_path, [TaskSet("local-1", "local", ("write",))])
    assert results.gap is None and results.compression is not None
    found = observe(cell.columns, results.compression, results).values
    by_text = {(m.metric, m.text): list(items.values()) for m, items in found.items() if m.text}
    assert by_text == {
        ("exact_match", "write of local, whole"): [1, 0, 1, 0],
        ("exact_match", "write of local, first"): [0, 0, 1, 1],
    }
    assert without_filter("exact_match") == ("exact_match", "") and "exact_match" in main_table.METRICS


# --------------------------------------------------------------------------------------------------- the embedded study


def test_the_written_word_is_the_first_one():
    """The items of last_word; what comes behind the word, and the blank before it, do not count."""
    from lm_eval.api.metrics import exact_match_hf_evaluate

    definition = yaml.safe_load((ROOT / "resources/demo/tasks/written_word.yaml").read_text("utf-8"))
    ignored = definition["metric_list"][0]["regexes_to_ignore"]
    for written, right in {
        " word": 1,
        " word of it": 1,
        " words": 0,
        "word": 1,
        " a word": 0,
        "": 0,
        " word's": 1,
    }.items():
        told = exact_match_hf_evaluate([written], ["word"], regexes_to_ignore=ignored)
        assert told["exact_match"] == right, written
    study = yaml.safe_load((ROOT / "config/generated.yaml").read_text("utf-8"))
    assert set(study["tasks"]["docstrings"]["tasks"]) <= docstring_tasks.MAKERS.keys()
    rule = (ROOT / "workflow/rules/evaluate.smk").read_text("utf-8")
    assert re.search(r"task=DOCSTRING_TASKS", rule)
