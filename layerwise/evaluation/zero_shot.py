"""Run zero-shot tasks through lm-eval, in the same process, on a model with a cell's weights.

`lm_eval run --model hf` on a saved folder, with the same tasks, few-shot examples, batch and dtype, gives the same
numbers. Nothing in lm-eval is replaced, except that templates of an untrusted folder run in a sandbox. A set with a
folder is run from there, so that its YAML definitions and data sets are found without network access.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.runtime.errors import InputError, record_failure, report_errors
from layerwise.runtime.files import write_atomic
from layerwise.sources.task_sets import BATCH, Spec, expanded, stay_offline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerwise.evaluation.cache import Evaluation
    from layerwise.models.streaming import LazyBlocks

GENERATING = "generate_until"  # lm-eval's type of tasks with generated text
# lm-eval's perplexity, of answers or per word, differs from the cells' own.
RENAMED = {"perplexity": "answer_perplexity"}


def prepared(spec: Spec) -> dict[str, Any]:
    """The set's config entry as it is run: every task by name, with a batch size; the library logs only errors."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return {"batch": BATCH, **expanded(spec)}


def inside(spec: Spec) -> contextlib.AbstractContextManager[None]:
    """Context with the set's folder as working directory, where lm-eval finds definitions and data sets, if it has
    one."""
    return contextlib.chdir(spec["folder"]) if spec.get("folder") else contextlib.nullcontext()


def seed_generators() -> None:
    """Seed the global generators as simple_evaluate does before it loads tasks, because some tasks (gpqa) shuffle."""
    import random

    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


@cache
def of_the_library() -> tuple[Any, Any]:
    """lm-eval's original template environment, and its original import of Python named in a definition."""
    from lm_eval import utils
    from lm_eval.tasks import _yaml_loader

    return utils.env, _yaml_loader._import_func_in_yml


def keep_in(kept: bool) -> None:
    """Set whether lm-eval imports only its own Python, for any definition, and sandboxes its templates. A template
    outside the sandbox can reach all of Python."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils
    from lm_eval.tasks import _yaml_loader

    environment, own = of_the_library()

    def import_own(name: str, folder: Path) -> Any:
        if Path(folder).resolve().is_relative_to(Path(utils.__file__).parent):
            return own(name, folder)
        raise InputError(f"{name} is Python, which runs only if the set of tasks has trust_remote_code: true")

    sandbox = SandboxedEnvironment(loader=BaseLoader, undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(environment.filters)
    utils.env = sandbox if kept else environment
    _yaml_loader._import_func_in_yml = import_own if kept else own


def load_tasks(spec: Spec) -> Any:
    """lm-eval's TaskDict of a set, with loaded data. Raises InputError for an unknown task and for unavailable data."""
    from lm_eval.tasks import TaskManager

    seed_generators()
    folder = spec.get("folder")
    keep_in(bool(folder) and not spec.get("trust_remote_code"))
    own = [f"{task}.yaml" for task in spec["tasks"] if Path(f"{task}.yaml").is_file()] if folder else []
    # The library's thousands of definitions take seconds to read, so they are read only if one is needed.
    manager = TaskManager(include_path="." if folder else None, include_defaults=len(own) < len(spec["tasks"]))
    unknown = [task for task in spec["tasks"] if task not in manager.all_tasks]
    if unknown:
        where = f"lm-eval {importlib.metadata.version('lm_eval')}" + (f" or in {folder}" if folder else "")
        raise InputError(f"There is no task {unknown[0]!r} in {where}.")
    try:
        loaded = manager.load(list(spec["tasks"]))
        for task in loaded["tasks"].values():
            task.doc_to_text(next(iter(task.eval_docs)))
        return loaded
    except Exception as error:  # definitions contain foreign code and templates, which may raise anything
        told = "; ".join(" ".join(str(one).split()) or type(one).__name__ for one in (error, error.__cause__) if one)
        if folder:
            wanted = f"{folder} must hold them, in a folder of the data set's name or where the definition says"
        else:
            wanted = (
                "they need the network, a copy in the hub's cache, or a `folder`; HF_HUB_OFFLINE=1 forbids fetching"
            )
        named = ", ".join(spec["tasks"])
        raise InputError(f"The data of the tasks {named} cannot be used; {wanted}: {told}") from None


def describe(spec: Spec) -> dict[str, Any]:
    """Version, items and data set of each task of a set, once its data has been loaded."""
    loaded = load_tasks(spec)
    tasks = {
        name: {
            "version": str(task.VERSION),
            "items": len(task.eval_docs),
            "generates": task.OUTPUT_TYPE == GENERATING,
            "data": task.config.dataset_path,
            "sha256": documents_hash([task.eval_docs, task.fewshot_docs() if examples(task, spec) else ()]),
        }
        for name, task in loaded["tasks"].items()
    }
    return {"lm_eval": importlib.metadata.version("lm_eval"), "tasks": tasks}


def examples(task: Any, spec: Spec) -> int:
    """Number of examples before each item: the definition's, or the set's if the definition has none or allows it."""
    own = task.get_config("num_fewshot")
    return own if own is not None and (own == 0 or spec.get("fewshot") is None) else spec.get("fewshot") or 0


def documents_hash(sets: list[Any]) -> str:
    """Hash of the documents loaded by lm-eval: the items and the sources of examples."""
    told = hashlib.sha256()
    for documents in sets:
        for document in documents or ():
            told.update(json.dumps(document, sort_keys=True, default=str).encode())
    return told.hexdigest()


def run(model: PreTrainedModel, tokenizer: Any, spec: Spec, entry: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's results for a config entry's model: rows (one per task and metric) and samples (every item's score).

    A task with a log-likelihood that is not finite has a reason instead of values. Groups represent their tasks.
    seconds: time of the evaluation, including the loading of data.
    Raises InputError when the tokenizer lacks a token that the tasks need.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    from layerwise.models.loading import read_generation_config, vocabulary
    from layerwise.sources.tokenizer_files import check_task_tokens

    start = time.perf_counter()
    loaded = load_tasks(spec)
    generating = [name for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == GENERATING]
    check_task_tokens(tokenizer, entry, vocabulary(model), generating)
    if generating:
        read_generation_config(model, entry)
    # As in simple_evaluate, which would also look up the model's folder on the hub by its name.
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=examples(task, spec))
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    grouped = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
    inner = {child.name for group in loaded["groups"].values() for child in group.get_all_groups()}
    top = [group for name, group in loaded["groups"].items() if name not in inner]
    lm = watched_model(model, tokenizer, spec["batch"])
    results = evaluate(lm=lm, task_dict=loaded, limit=spec.get("items"))
    assert results is not None  # it is None only in secondary processes
    found: Mapping[str, Any] = {**results}
    members = {group.name: [task.task_name for task in group.get_all_tasks()] for group in top}
    shown = [*members, *(name for name in loaded["tasks"] if name not in grouped)]
    broken = {name: int(lm.broken_answers) for name in generating}
    return {
        "rows": [row for name in shown for row in rows_of(name, members.get(name, [name]), found, broken)],
        "lm_eval": importlib.metadata.version("lm_eval"),
        "batch": spec["batch"],
        "seconds": round(time.perf_counter() - start, 3),
        "groups": members,
        "samples": {name: scores(items) for name, items in found["samples"].items()},
    }


def watched_model(model: PreTrainedModel, tokenizer: Any, batch: int) -> Any:
    """lm-eval's HFLM of a model. broken_answers: number of answers generated from logits with NaN or +Inf.

    The generated text does not show this, because the argmax over NaN is a normal token.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    base: Any = HFLM  # its decorator hides its parameters

    class Watched(base):
        broken_answers = 0

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            broken: list[torch.Tensor] = []

            def look(_: Any, __: Any, output: Any) -> None:
                last = output.logits[:, -1]  # earlier logits are not needed
                broken.append((last.isnan() | (last == math.inf)).any(dim=-1))

            hook = model.register_forward_hook(look)
            try:
                return super()._model_generate(*args, **kwargs)
            finally:
                hook.remove()
                self.broken_answers += int(torch.stack(broken).any(dim=0).sum()) if broken else 0

    return Watched(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def rows_of(
    name: str, members: list[str], found: Mapping[str, Any], broken_answers: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """One row per metric of a task, or of the group of tasks `members`, from lm-eval's results.

    broken_answers: task -> number of its answers generated from logits that are not finite.
    """
    asked = [response for task in members for item in found["samples"][task] for response in item["filtered_resps"]]
    broken = sum(not finite(response) for response in asked)
    fault = f"{broken} of {len(asked)} log-likelihoods of {name} are NaN or Inf" if broken else ""
    if written := max((broken_answers or {}).get(task, 0) for task in members):
        fault = f"its logits were NaN or Inf while it generated {written} answers"
    row = {
        "task": name,
        "task_version": None if (version := found["versions"].get(name)) is None else str(version),
        "fewshot": max(found["n-shot"][task] for task in members),
        "items": sum(found["n-samples"][task]["effective"] for task in members),
        "eval_sha256": data_hash([item for task in members for item in found["samples"][task]]),
    }
    rows = []
    for key, value in found["results"][name].items():
        metric, comma, filtered = str(key).partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = found["results"][name].get(f"{metric}_stderr,{filtered}")
        values: dict[str, Any] = {
            "value": float(value),
            "stderr": stderr if isinstance(stderr, float) and math.isfinite(stderr) else None,
        }
        if fault or not math.isfinite(value):
            reason = f"the model has diverged: {fault or f'its {metric} on {name} is {value}'}"
            values = {"value": None, "stderr": None, "reason": reason}
        rows.append({**row, "metric": named(metric, filtered), **values})
    return rows


def named(metric: str, filtered: str) -> str:
    """The name in the tables of an lm-eval metric, with the filter of the answers."""
    return RENAMED.get(metric, metric) + ("" if filtered == "none" else f",{filtered}")


def data_hash(items: list[dict[str, Any]]) -> str:
    """Hash of the questions and right answers, from lm-eval's hash of each item; equal for equal data."""
    keys = ("doc_id", "doc_hash", "prompt_hash", "target_hash")
    told = sorted(json.dumps([item[key] for key in keys]) for item in items)
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def finite(response: Any) -> bool:
    """False for a log-likelihood that is NaN or Inf; generated text has no log-likelihood."""
    numbers = response if isinstance(response, (tuple, list)) else [response]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


def scores(items: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """metric, as in rows -> the score of every item, in the order of the data. items: one entry per item and filter."""
    found: dict[str, list[Any]] = {}
    for item in sorted(items, key=lambda item: item["doc_id"]):
        for name in item["metrics"]:
            score = item[name]
            if isinstance(score, (bool, int, float)):
                found.setdefault(named(name, item["filter"]), []).append(int(score) if score in (0, 1) else score)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="zero_shot", description=__doc__)
    parser.add_argument("stage", choices=("data", "cell"), help="data: load a set's data once; cell: evaluate a cell")
    parser.add_argument("--tasks", type=json.loads, required=True, help="the set's config entry, as JSON")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--model", type=json.loads, help="the model's config entry, as JSON")
    parser.add_argument(
        "--weights", type=Path, help="a cell's weights.safetensors; without it, the model of the folder"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    stay_offline(args.tasks)
    if args.stage == "data":
        spec = prepared(args.tasks)
        with inside(spec):
            found = describe(spec)
    else:
        with record_failure(args.out.parent, args.out.name.removesuffix(".json")):
            found = evaluate_model(args)
    write_atomic(args.out, json.dumps(found, indent=1, allow_nan=False) + "\n")


def evaluate_cell(blocks: LazyBlocks, evaluation: Evaluation) -> dict[str, Any]:
    """The result of an evaluation of this kind, for a model with the cell's weights."""
    return evaluate_tasks(blocks, evaluation.model, evaluation.spec)


def evaluate_tasks(blocks: LazyBlocks, entry: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """lm-eval's results (`run`) for the model of a config entry, on a task set in the form of the config."""
    from layerwise.sources.tokenizer_files import load_tokenizer

    spec, tokenizer = prepared(spec), load_tokenizer(entry)
    with blocks.whole_if_it_fits(), inside(spec):
        return run(blocks.model, tokenizer, spec, entry)


def evaluate_model(args: argparse.Namespace) -> dict[str, Any]:
    from layerwise.evaluation.perplexity import apply_weights
    from layerwise.models.compute_dtype import compute_dtype, tell
    from layerwise.models.loading import set_threads
    from layerwise.models.streaming import LazyBlocks

    set_threads(args.threads)
    computed = compute_dtype(args.model, args.device)
    tell(args.model, computed, args.device)
    blocks = LazyBlocks(args.model, args.device, computed)
    if args.weights:
        apply_weights(blocks, args.weights)
    return evaluate_tasks(blocks, args.model, args.tasks)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
