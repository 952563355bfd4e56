"""Zero-shot tasks: lm-eval's own command line gives the same numbers, and what is absent is one sentence."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from layerwise.demo import docstring_tasks
from layerwise.evaluation import zero_shot
from layerwise.evaluation.perplexity import apply_weights
from layerwise.models.structure import find_blocks, linears
from layerwise.results.cell_results import TaskSet, gather_cell
from layerwise.results.main_table import document
from layerwise.results.table_text import markdown
from layerwise.runtime.errors import InputError
from layerwise.sources import task_sets
from layerwise.study.grid import plan
from tests.study.test_grid import study
from tests.support import synthetic_tables as synthetic
from tests.support.paths import ROOT
from tests.support.workflow_harness import words, write_model, write_tokenizer

LONG = pytest.mark.long  # lm-eval reads its thousands of tasks
TASKS = ("last_word", "continuation")
ITEMS, BATCH, SHOTS = 6, 4, 1
PERPLEXITY = "  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"  # of many digits


def write_folder(folder: Path) -> Path:
    """The embedded study's definitions, with a perplexity and a few items of made-up words."""
    folder.mkdir(parents=True)
    text = words(400, seed=3).split()
    rows: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    for item in range(ITEMS):
        parts = text[30 * item : 30 * item + 30]
        rows["last_word"].append({"context": " ".join(parts[:12]), "word": parts[12]})
        choices = [" ".join(parts[i : i + 3 + i % 2]) for i in range(14, 26, 3)]
        rows["continuation"].append({"context": " ".join(parts[:12]), "choices": choices, "label": item % 4})
    for task in TASKS:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
        definition = (ROOT / f"resources/demo/tasks/{task}.yaml").read_text("utf-8")
        definition = definition.replace("test_split: test\n", "test_split: test\nfewshot_split: test\n")
        if task == "last_word":
            definition = definition.replace("metadata:", f"{PERPLEXITY}metadata:")
        (folder / f"{task}.yaml").write_text(definition)
    return folder


def run(cwd: Path, *arguments: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **own, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a model, weights of a cell, the model with these weights as Hugging Face saves it, and tasks."""
    folder = tmp_path_factory.mktemp("zero_shot")
    vocabulary = write_tokenizer(folder / "model", words(400, seed=1))
    model = write_model(folder / "model", vocabulary)
    prefix, blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(0)
    weights = {
        layer.name: torch.randn(layer.shape, generator=generator) * 0.2
        for i, block in enumerate(blocks)
        for layer in linears(block, f"{prefix}.{i}")
    }
    save_file(weights, folder / "weights.safetensors")
    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    apply_weights(saved, folder / "weights.safetensors")
    saved.save_pretrained(folder / "saved")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "saved")
    write_folder(folder / "tasks")
    return folder


@LONG
def test_lm_eval_s_command_line_gives_the_same_numbers(tiny):
    spec = {"tasks": list(TASKS), "folder": "tasks", "fewshot": SHOTS, "items": None, "batch": BATCH}
    model = {"path": str(tiny / "model"), "dtype": "float32"}
    ours = ["layerwise.evaluation.zero_shot", "cell", "--tasks", json.dumps(spec), "--model", json.dumps(model)]
    ours += ["--weights", "weights.safetensors", "--threads", "1", "--out", "out.json"]
    done = run(tiny, *ours, cache=tiny / "cache")
    assert done.returncode == 0, done.stderr
    theirs = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={tiny / 'saved'},dtype=float32"]
    theirs += ["--tasks", ",".join(TASKS), "--include_path", ".", "--num_fewshot", str(SHOTS)]
    theirs += ["--batch_size", str(BATCH), "--device", "cpu", "--output_path", str(tiny / "theirs.json")]
    done = run(tiny / "tasks", *theirs, cache=tiny / "cache")
    assert done.returncode == 0, done.stderr
    (path,) = tiny.glob("theirs*.json")
    expected = json.loads(path.read_text("utf-8"))["results"]
    record = json.loads((tiny / "out.json").read_text("utf-8"))
    rows = {(row["task"], row["metric"]): row for row in record["rows"]}
    names = {"acc": "acc", "acc_norm": "acc_norm", "answer_perplexity": "perplexity"}
    assert rows.keys() == {("last_word", "acc"), ("last_word", "answer_perplexity")} | {
        ("continuation", metric) for metric in ("acc", "acc_norm")
    }
    for (task, metric), row in rows.items():
        assert row["value"] == expected[task][f"{names[metric]},none"]
        assert row["stderr"] == expected[task][f"{names[metric]}_stderr,none"]
        assert (row["items"], row["fewshot"], row["task_version"]) == (ITEMS, SHOTS, "1.0")
    correct = record["samples"]["continuation"]["acc"]
    assert len(correct) == ITEMS and sum(correct) / ITEMS == rows["continuation", "acc"]["value"]


@pytest.mark.parametrize(
    "spec, sentence",
    [
        (
            {"tasks": ["last_word"], "folder": "empty"},
            "The data of the tasks last_word cannot be used; empty must hold them",
        ),
        pytest.param(
            {"tasks": ["no_such_task"]},
            "error: There is no task 'no_such_task' in lm-eval 0.4.13.",
            marks=LONG,
        ),
        pytest.param({"tasks": ["piqa"]}, "HF_HUB_OFFLINE=1 forbids fetching: ", marks=LONG),
    ],
)
def test_absent_input_is_one_sentence(tmp_path, spec, sentence):
    (tmp_path / "empty").mkdir()
    shutil.copy(ROOT / "resources/demo/tasks/last_word.yaml", tmp_path / "empty")
    arguments = ["layerwise.evaluation.zero_shot", "data", "--tasks", json.dumps(spec), "--out", "out.json"]
    done = run(tmp_path, *arguments, cache=tmp_path / "cache")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out.json").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert sentence in line


@LONG
def test_a_task_of_lm_eval_reads_its_data_from_the_folder(tmp_path):
    """Laid out as `hf download baber/piqa --repo-type dataset --local-dir baber/piqa` does."""
    data = tmp_path / "data/baber/piqa"
    data.mkdir(parents=True)
    row = {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Turn the jar into soup.", "label": 0}
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    spec = json.dumps({"tasks": ["piqa"], "folder": "data"})
    arguments = ["layerwise.evaluation.zero_shot", "data", "--tasks", spec, "--out", "out.json"]
    done = run(tmp_path, *arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text("utf-8"))
    (told,) = record["tasks"].values()
    assert len(told.pop("sha256")) == 64 and told == {
        "version": "1.0",
        "items": 3,
        "generates": False,
        "data": "baber/piqa",
    }


def test_a_task_that_shuffles_is_the_same_each_time(tmp_path):
    """As gpqa does, with Python's own generator: lm-eval's command line seeds it before it loads tasks."""
    folder = write_folder(tmp_path / "tasks")
    definition = (folder / "continuation.yaml").read_text("utf-8")
    (folder / "continuation.yaml").write_text(f"process_docs: !function shuffled.docs\n{definition}")
    (folder / "shuffled.py").write_text(
        "import random\n\ndef docs(data):\n    return data.select(random.sample(range(len(data)), len(data)))\n"
    )
    spec = {"tasks": ["continuation"], "folder": ".", "trust_remote_code": True}
    orders = []
    for _ in range(2):
        with contextlib.chdir(folder):
            orders.append([doc["context"] for doc in zero_shot.load_tasks(spec)["tasks"]["continuation"].eval_docs])
    assert orders[0] == orders[1]


def test_items_are_identified_by_their_data():
    items = results(-2.0)["samples"]["t"]
    other = [{**items[0], "target_hash": "d"}]
    assert zero_shot.data_hash(items) == zero_shot.data_hash([dict(items[0])]) != zero_shot.data_hash(other)


def results(likelihood: float) -> dict[str, Any]:
    item = {"filtered_resps": [(-1.0, True), (likelihood, False)], "doc_id": 0}
    item |= {"doc_hash": "a", "prompt_hash": "b", "target_hash": "c"}
    return {
        "results": {"t": {"alias": "t", "acc,none": 0.25, "acc_stderr,none": 0.1, "exact,strict": 0.5}},
        "versions": {"t": 2},
        "n-shot": {"t": 0},
        "n-samples": {"t": {"original": 9, "effective": 1}},
        "samples": {"t": [item]},
    }


def test_a_row_per_metric():
    shared = {"task": "t", "task_version": "2", "fewshot": 0, "items": 1}
    shared["eval_sha256"] = zero_shot.data_hash(results(-2.0)["samples"]["t"])
    assert zero_shot.rows_of("t", ["t"], results(-2.0)) == [
        {**shared, "metric": "acc", "value": 0.25, "stderr": 0.1},
        {**shared, "metric": "exact,strict", "value": 0.5, "stderr": None},
    ]


@pytest.mark.parametrize("likelihood", [math.nan, -math.inf])
def test_a_model_that_has_diverged_has_no_accuracy(likelihood):
    """An argmax over NaN would give the share of items whose first choice is right."""
    for row in zero_shot.rows_of("t", ["t"], results(likelihood)):
        assert row["value"] is None and row["stderr"] is None
        assert row["reason"] == "the model has diverged: 1 of 2 log-likelihoods of t are NaN or Inf"


# -------------------------------------------------------------------------------------------------------------- a study


def test_lists_of_papers_are_written_out():
    planned = plan(study(tasks={"zero-shot": {"tasks": ["sparsegpt-four", "piqa", "mmlu"]}}))
    (spec,) = (dict(own) for own in planned.tasks.values())
    assert spec["tasks"] == ["lambada_openai", "piqa", "arc_easy", "arc_challenge", "mmlu"]
    assert (spec["name"], spec["fewshot"], spec["items"], spec["batch"]) == ("zero-shot", None, None, 8)
    assert len(task_sets.LISTS["wanda-seven"]) == 7 and plan(study()).tasks == {}


def test_sets_of_tasks_are_checked_before_a_job(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="config: tasks.a has no key 'shots'; its keys are tasks, folder, fewshot"):
        plan(study(tasks={"a": {"tasks": ["piqa"], "shots": 5}}))
    with pytest.raises(InputError, match=r"tasks.a: the folder .*absent does not exist"):
        task_sets.check_tasks("a", {"tasks": ["piqa"], "folder": str(tmp_path / "absent")})
    task_sets.check_tasks("a", {"tasks": ["last_word"], "folder": task_sets.MADE_FOLDERS[0]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="tasks.a needs lm-eval, which is not installed"):
        task_sets.check_tasks("a", {"tasks": ["piqa"]})


def test_files_of_a_folder_are_inputs(tmp_path):
    write_folder(tmp_path / "tasks")
    (tmp_path / "tasks/.git").mkdir()
    (tmp_path / "tasks/.git/index").write_text("")
    spec = {"tasks": list(TASKS), "folder": str(tmp_path / "tasks")}
    names = sorted(f"{task}.{kind}" for task in TASKS for kind in ("jsonl", "yaml"))
    assert [path.name for path in task_sets.task_files(spec)] == names and task_sets.task_files({"tasks": ["a"]}) == []
    made = task_sets.task_files({**spec, "folder": task_sets.MADE_FOLDERS[0]})
    assert sorted(path.name for path in made) == names


def test_a_folder_with_too_much_in_it_is_refused_before_all_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(task_sets, "MOST_FILES", 5)
    for number in range(5):
        (tmp_path / f"{number}.yaml").write_text("task: a")
    spec = {"tasks": ["a"], "folder": str(tmp_path)}
    task_sets.check_tasks("a", spec)
    assert len(task_sets.task_files(spec)) == 5
    (tmp_path / "more").mkdir()
    for search in (lambda: task_sets.check_tasks("a", spec), lambda: task_sets.task_files(spec)):
        with pytest.raises(
            InputError, match=r"Got more than 5 files and folders instead: give the folder of the tasks\.$"
        ):
            search()


def test_rows_of_the_cells_table(tmp_path):
    of = synthetic.cell("wanda", "2:4")
    folder = synthetic.write_cell(tmp_path, of)
    tasks = TaskSet("local-1", "local", ("last_word", "continuation"))
    results = gather_cell(of, [], tmp_path, [tasks])
    rows, gap = results.rows, results.gap
    lost = [row for row in rows if row.get("task")]
    assert [row["task"] for row in lost] == [*tasks.tasks, "mean"] and gap is not None and gap.status == "missing"
    assert all(row["status"] == "missing" and row["reason"] and "value" not in row for row in lost)
    row = {"task": "last_word", "task_version": "1.0", "fewshot": 0, "items": 9, "metric": "acc"}
    rows = [{**row, "value": 0.5, "stderr": 0.1}, {**row, "task": "both", "value": 0.25}]
    rows.append({**row, "task": "weighted", "value": 0.3})  # a group that is not the mean of its items
    record = {
        "lm_eval": "0.4.13",
        "rows": rows,
        "groups": {"both": ["last_word", "other"], "weighted": ["last_word", "other"]},
        "samples": {"last_word": {"acc": [1, 0, 1, 0]}, "other": {"acc": [0, 0, 0, 0]}},
    }
    (folder / "tasks-local-1.json").write_text(json.dumps(record))
    results = gather_cell(of, [], tmp_path, [tasks])
    rows, gap = results.rows, results.gap
    found, both, weighted, mean = [row for row in rows if row.get("task")]
    assert found["low"] == 0 and found["high"] == 1 and both["low"] < 0.25 < both["high"] and "low" not in weighted
    assert list(results.scores) == [("local", "last_word", "acc"), ("local", "both", "acc")]
    assert mean["task"] == "mean" and mean["value"] == pytest.approx((0.5 + 0.25 + 0.3) / 3) and "stderr" not in mean
    assert gap is None and (found["task_set"], found["lm_eval"], found["value"]) == ("local", "0.4.13", 0.5)
    (folder / "tasks-local-1.json").write_text('{"lm_eval": "0.4.13", "rows": []}')
    results = gather_cell(of, [], tmp_path, [tasks])
    rows, gap = results.rows, results.gap
    assert gap is not None and "tasks-local-1.json cannot be used: it has no rows" in gap.reason


def test_the_highest_accuracy_is_the_best():
    cells = [synthetic.cell(method, "2:4") for method in ("magnitude", "wanda")]
    frame = synthetic.cells_table([synthetic.cell("dense", "dense"), *cells])
    frame = frame[frame["metric"] == "perplexity"].copy()
    frame = frame.assign(metric="acc", text=None, task="last_word", task_set="local", contaminated=pd.NA)
    frame = frame.assign(value=[0.5, 0.25, 0.375], stderr=0.04)
    failed = frame.iloc[[-1]].assign(value=None, stderr=None, status="failed", reason="out of memory", label="ria")
    norm = frame.assign(metric="acc_norm")
    text = document(pd.concat([frame, failed, norm], ignore_index=True), markdown)
    assert text.count("| ria | failed |") == 2
    assert (
        "acc on last\\_word of local" in text
        and "Dense: 50.0 (standard error 4.0). In percent, higher is better" in text
    )
    assert "| wanda | **37.5** |" in text and "| magnitude | 25.0 |" in text


# ------------------------------------------------------------------------------------------ tasks of the embedded study


def text_of_modules(count: int = 12) -> str:
    """A split as docstrings.py writes it: modules of two packages, with a docstring each that repeats its last word."""
    draw, modules = random.Random(0), []
    for package in ("alpha", "beta"):
        for number in range(count):
            body = " ".join(f"{package}{draw.choice('abcdef')}{draw.randint(0, 99)}" for _ in range(20))
            modules.append(
                f"{package}.m{number}.run\nReturn the matrix. {body} of the\nwhole new matrix. It ends here now."
            )
    return "\n\n\n\n".join(modules)


def test_tasks_from_a_text():
    text = text_of_modules()
    items = {"last_word": 20, "continuation": 20}
    made = docstring_tasks.make(text, items)
    assert made == docstring_tasks.make(text, items) != docstring_tasks.make(text, items, seed=1)
    for item in made["last_word"]:
        assert f"{item['context']} {item['word']}" in text and item["word"] in item["context"]
        assert not item["context"][-1].isspace()
    for item in made["continuation"]:
        true = item["choices"][item["label"]]
        assert f"{item['context']} {true}" in text and len(set(item["choices"])) == docstring_tasks.CHOICES
        assert all(choice in text and item["package"] in choice for choice in item["choices"])
    assert len({item["label"] for item in made["continuation"]}) == docstring_tasks.CHOICES
    with pytest.raises(InputError, match="The text must give 999 items of the task last_word. Got 24 instead"):
        docstring_tasks.make(text, {**items, "last_word": 999})
