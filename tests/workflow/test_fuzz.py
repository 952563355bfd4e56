"""Whatever is put in gives a right result or one sentence: configs, model folders, layers, tables, printed numbers."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from layerwise.checks import layer_cases as layers
from layerwise.checks.settings import parameter_sets
from layerwise.comparison.published import FILE, pairs, read_published
from layerwise.compression.verify import broken_promise
from layerwise.contract.layer import Target, UnsupportedTarget
from layerwise.models.loading import load
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import find_blocks
from layerwise.results.collect import write_csv
from layerwise.runtime.errors import InputError
from layerwise.sources import checkpoint_files
from layerwise.sources.tokenizer_files import load_tokenizer
from layerwise.storage.table_schema import columns, from_rows, read_table, to_frame
from layerwise.study import config_file
from layerwise.study.grid import plan
from tests.support.fuzz_configs import CATALOGUE, EVERY_CHECK, fuzz, sentence_of, targets
from tests.support.model_families import build
from tests.support.paths import ROOT
from tests.support.workflow_harness import tiny_study, words, write_tokenizer

QUIET = settings(deadline=None, derandomize=True, database=None, suppress_health_check=EVERY_CHECK)
some = settings(QUIET, max_examples=60)


def told(call: Callable[[], Any]) -> str | None:
    """The sentence that a call is refused with, or None; any other exception is a failure of the test."""
    try:
        call()
    except InputError as error:
        return sentence_of(error)
    return None


# -------------------------------------------------------------------------------------------------------------- configs


def test_a_config_expands_or_is_refused_in_one_sentence():
    found = fuzz(300)
    assert found["whole accepted"] > 25 and found["spoilt refused"] > 60


@pytest.mark.long
@pytest.mark.parametrize("start", range(1, 5))  # of the draws; together 10,000
def test_ten_thousand_configs(start):
    assert fuzz(2_500, start).total() >= 2_500


DOCUMENTS = {
    "cut off": "models: [1, 2\nb: }",
    "nothing": "",
    "bytes": b"\xff\xfe\x00\x81",
    "a list": "[1, 2]",
    "python object": '!!python/object/apply:os.system ["touch x"]',
    "python name": "seed: !!python/name:os.system",
    "python tuple": "modes: !!python/tuple [shared]",
    "tag": "seed: !mine 3",
    "template": "__use_yte__: true\nseed: ?__import__('os').system('touch x')",
    "key twice": "seed: 1\nseed: 2",
    "key twice in JSON": '{"seed": 1, "seed": 2}',
    "key twice below": "models: {a: {path: x, path: y}}",
    "list as key": "? [1, 2]\n: 3",
    "mapping as key": "{a: 1}: 3",
    "cycle": "models: &a\n  b: *a",
    "cycle in a list": "models: &a [*a]",
    "deep": "a: " + "[" * 3000 + "]" * 3000,
    "deep in JSON": "[" * 100_000,
    "many": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "no such anchor": "a: *b",
    "no such date": "seed: 2026-02-31",
    "date": "seed: 2026-02-04",
    "binary": "seed: !!binary gIGC",
    "set": "models: !!set {a, b}",
    "sexagesimal": "seed: 190:20:30:15:99:99:99:99:99:99:99:99",
    "large number": "seed: " + "9" * 5000,
    "not a number": "seed: .nan",
    "two documents": "seed: 1\n---\nseed: 2",
    "tab": "models:\n\ta: 1",
    "control character": "study: \x07",
    "half a character": r'study: "\ud800"',
    "NUL": r'models: {"a": {"path": "\0"}}',
    "directive": "%YAML 9.9\n---\nseed: 1",
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_file_that_is_no_config_is_one_sentence(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own, text = Path("study.yaml"), DOCUMENTS[kind]
    own.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    assert told(lambda: plan(config_file.read(own)))
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize("kind", [kind for kind in DOCUMENTS if kind.startswith("key twice")])
def test_a_duplicate_key_is_named(tmp_path, kind):
    (tmp_path / "study.yaml").write_text(DOCUMENTS[kind])
    key = "path" if "below" in kind else "seed"
    assert f"'{key}' is given twice" in (told(lambda: config_file.read(tmp_path / "study.yaml")) or "")


@pytest.mark.parametrize("name", ["absent.yaml", "folder", "a" * 300])
def test_a_file_that_cannot_be_opened_is_one_sentence(tmp_path, name):
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in (told(lambda: config_file.read(tmp_path / name)) or "")


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
@QUIET
def test_any_bytes_are_a_document_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    assert told(lambda: plan(config_file.read(path)))


def test_merge_keys_and_anchors_are_yaml(tmp_path):
    found = yaml.safe_load("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: {<<: *a, x: 3}")
    assert found == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 3}}
    (tmp_path / "merged.yaml").write_text("a: &a {k: 0}\nx:\n  b: &b {<<: *a, k: 1}\nc: {<<: *b, k: 2}")
    assert config_file.read(tmp_path / "merged.yaml") == {"a": {"k": 0}, "x": {"b": {"k": 1}}, "c": {"k": 2}}
    path = ROOT / "config/config.yaml"
    assert config_file.read(path) == yaml.safe_load(path.read_text("utf-8"))


def test_commands_that_read_a_config_show_no_traceback(tmp_path):
    (tmp_path / "study.yaml").write_text(DOCUMENTS["template"])
    for name in ("check-study", "estimate", "run"):
        command = [sys.executable, "-m", "layerwise", name, str(tmp_path / "study.yaml")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and "requests to run Python" in done.stderr
        assert done.stderr.count("\n") == 1 and not (ROOT / "x").exists()


# ---------------------------------------------------------------------------------------------------------- places


PLACES = ["", ".", "/", "~", "a" * 300, "a/" * 3000, "absent", "file/inside", "loop", "/dev/null", "/proc/self/mem"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["models", "texts", "tasks", "method_paths"])
def test_a_place_where_nothing_is_is_one_sentence(tmp_path, monkeypatch, kind, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    whole_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text("text")
    study = {
        **tiny_study(),
        "models": {"m": {"path": "model"}},
        "texts": {"train": {"path": "text.txt"}},
    }
    study["evaluation"] = {"e": {"text": "train", "length": 8}}
    plan(study, check_sources=True)
    asked = {
        "models": {"m": {"path": place}},
        "texts": {"train": {"path": place}},
        "tasks": {"t": {"tasks": ["a"], "folder": place or "absent"}},
        "method_paths": [place],
    }
    sentence = told(lambda: plan({**study, kind: asked[kind]}, check_sources=True))
    assert sentence or kind in ("tasks", "method_paths"), "a folder that is there may hold no methods and no tasks"


# --------------------------------------------------------------------------------------------------- model folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return whole_folder(tmp_path_factory.mktemp("whole") / "model")


def whole_folder(folder: Path) -> Path:
    """A tiny model in shards, with its tokenizer."""
    write_tokenizer(folder, words(60, seed=0))
    build("llama").save_pretrained(folder, max_shard_size="40KB")
    return folder


def loaders(spec: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    return {
        "check": lambda: checkpoint_files.check_checkpoint("m", spec),
        "load": lambda: same_logits(load(spec)),
        "stream": lambda: read_all(LazyBlocks(spec)),
        "tokenizer": lambda: load_tokenizer(spec),
    }


def same_logits(model: Any) -> None:
    """What loads in spite of a missing piece must be the model: nothing may have been drawn at random."""
    tokens = torch.arange(8).view(1, -1)
    assert torch.equal(model(tokens).logits, build("llama").eval()(tokens).logits)


def read_all(lazy: LazyBlocks) -> None:
    with lazy.whole_if_it_fits():
        same_logits(lazy.model)


JUNK = {
    "folder": None,
    "empty": b"",
    "noise": b"\xff\x00junk" * 9,
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", ["absent", *JUNK])
def test_a_folder_with_a_piece_missing_is_one_sentence(tmp_path, whole, kind):
    harmless = {"generation_config.json", "special_tokens_map.json", "README.md"}
    for piece in sorted(path.name for path in whole.iterdir()):
        folder = shutil.copytree(whole, tmp_path / piece)
        (folder / piece).unlink()
        if kind == "folder":
            (folder / piece).mkdir()
        elif kind != "absent":
            (folder / piece).write_bytes(JUNK[kind] or b"")
        found = {name: told(call) for name, call in loaders({"path": str(folder), "name": "m"}).items()}
        assert any(found.values()) or piece in harmless or piece == "tokenizer_config.json", (piece, kind)
        if piece.endswith(".safetensors") or piece == "model.safetensors.index.json":
            assert all(found[name] for name in ("check", "load", "stream")), (piece, kind, found)


ODD = [None, "64", -1, 0, [], {}, True]
FIELDS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "model_type", "text_config")


@pytest.mark.parametrize("field", [*FIELDS, "intermediate_size", "head_dim", "max_position_embeddings", "dtype"])
def test_a_config_json_with_another_type_is_one_sentence(tmp_path, whole, field):
    folder = shutil.copytree(whole, tmp_path / "model")
    own = json.loads((folder / "config.json").read_text())
    spec = {"path": str(folder), "name": "m"}
    calls = (
        lambda: checkpoint_files.check_checkpoint("m", spec),
        lambda: find_blocks(load(spec)),
        lambda: LazyBlocks(spec),
    )
    for value in [*ODD, 10**30]:
        (folder / "config.json").write_text(json.dumps({**own, field: value}))
        for call in calls:
            told(call)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "overlap": {"a": F32, "b": {**F32, "data_offsets": [4, 12]}},
    "hole": {"a": F32, "b": {**F32, "data_offsets": [12, 20]}},
    "begins late": {"a": {**F32, "data_offsets": [4, 12]}},
    "backwards": {"a": {**F32, "data_offsets": [8, 0]}},
    "negative": {"a": {**F32, "data_offsets": [-8, 0]}},
    "huge": {"a": {**F32, "shape": [2**62, 2**62], "data_offsets": [0, 2**64]}},
    "more than its shape": {"a": {**F32, "data_offsets": [0, 16]}},
    "negative shape": {"a": {**F32, "shape": [-1, -2]}},
    "shape in words": {"a": {**F32, "shape": "ab"}},
    "true shape": {"a": {**F32, "shape": [2, True]}},
    "number": {"a": 3},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "one offset": {"a": {**F32, "data_offsets": [8]}},
    "offset in words": {"a": {**F32, "data_offsets": [0, "8"]}},
    "dtype": {"a": {**F32, "dtype": "F99"}},
    "dtype that is a list": {"a": {**F32, "dtype": []}},
    "list": [1],
    "empty list": [],
    "null": None,
    "deep": "[" * 100_000,
    "name twice": '{"a": %s, "a": %s}' % (json.dumps(F32), json.dumps({**F32, "data_offsets": [8, 16]})),  # noqa: UP031
    "not UTF-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_breaks_the_format_is_one_sentence(tmp_path, whole, kind):
    told_of = HEADERS[kind]
    text = told_of if isinstance(told_of, (str, bytes)) else json.dumps(told_of)
    header = text if isinstance(text, bytes) else text.encode()
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    for name, call in loaders({"path": str(folder), "name": "m"}).items():
        assert name == "tokenizer" or "its header cannot be read" in (told(call) or "")


SHARDS = [3, None, [], "../secret.safetensors", "/etc/passwd", "a\0.safetensors", "..", "sub/a.safetensors", "a.bin"]


@pytest.mark.parametrize("shard", SHARDS)
def test_an_index_names_files_beside_it(tmp_path, whole, shard):
    folder = shutil.copytree(whole, tmp_path / "model")
    shutil.copy(next(whole.glob("*.safetensors")), tmp_path / "secret.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(next(whole.glob("*.safetensors")), folder / "sub/a.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"lm_head.weight": shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, call in loaders({"path": str(folder), "name": "m"}).items():
        assert name == "tokenizer" or "must name safetensors files beside it" in (told(call) or "")


# ------------------------------------------------------------------------------------------------ targets and shapes

SHORT = 3  # iterations, swaps, cycles: what a method does on such layers it does in the first


def short(name: str) -> dict[str, Any]:
    """Parameters with which a method takes milliseconds."""
    entry = CATALOGUE[name]
    counts = {key for key, own in entry.card["parameters"].items() if "integer" in str(own.get("type"))}
    own = {key: SHORT for key in counts if isinstance(entry.defaults[key], int) and entry.defaults[key] > 20}
    return {key: value for key, value in own.items() if key not in ("blocksize", "grid")}


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Target, layers.Recipe]:
    out, inputs = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    wanted = dict(draw(targets()))
    if "pattern" in wanted and ":" in wanted["pattern"] and draw(st.booleans()):
        m = draw(st.integers(2, 60))  # also more than there are inputs
        wanted["pattern"] = f"{draw(st.integers(1, m - 1))}:{m}"
    if "sparsity" in wanted:
        wanted["sparsity"] = draw(st.sampled_from([1e-9, 0.001, 0.25, 0.5, 0.999, 1 - 2**-53]) | st.floats(0, 0.9999))
    dead = draw(st.sets(st.integers(0, inputs - 1), max_size=3))
    recipe = layers.Recipe(out, inputs, 4, 8, tuple(dead), seed=draw(st.integers(0, 99)))
    return Target(**wanted), replace(recipe, correlated=draw(st.booleans()))


def methods() -> list[tuple[str, dict[str, Any]]]:
    others = [(name, one) for name, entry in CATALOGUE.items() for one in parameter_sets(entry)[1:2]]
    return [(name, {}) for name in CATALOGUE if name != "chain"] + others


@pytest.mark.parametrize(("name", "params"), methods(), ids=str)
def test_any_layer_at_any_target_keeps_the_promises_or_is_refused(name, params):
    complete = CATALOGUE.complete(name, {**short(name), **params}, "fuzz")
    method = CATALOGUE.build(name, complete)

    @given(shapes())
    @settings(QUIET, max_examples=12)
    def holds(drawn: tuple[Target, layers.Recipe]) -> None:
        target, recipe = drawn
        layer, reason = layers.make(recipe), CATALOGUE.refusal(name, complete, target)
        try:
            result = method.compress(layer, target, torch.Generator().manual_seed(0))
        except UnsupportedTarget as error:
            assert reason and str(error).endswith(".") and "\n" not in str(error)
            return
        assert broken_promise(layer, target, result) is None
        assert reason is None or target == Target(), f"refused beforehand ({reason}), and done"

    holds()


# --------------------------------------------------------------------------------------------- tables there and back

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["a,b", 'say "so"', "two\nlines", "carriage\r\nreturn", "=1+1", "<script>", "NA", "nan", "null", "", " ", "é😀"]
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def cell_of(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    low, high = schema.get("minimum"), schema.get("maximum")
    known = {
        "string": st.sampled_from(schema["enum"]) if "enum" in schema else TEXT,
        "integer": st.integers(-(2**63) if low is None else low, 2**63 - 1 if high is None else high),
        "number": st.floats(low, high, allow_nan=False, allow_infinity=False),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return st.one_of([known[kind] for kind in kinds])


def row_of(table: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: cell_of(schema) for name, schema in columns(table).items()})


@pytest.mark.parametrize("table", ["layers", "cells", "traces", "bounds", "comparisons", "skipped"])
def test_rows_come_back_from_parquet_as_they_were(tmp_path_factory, table):
    folder = tmp_path_factory.mktemp("parquet")

    @given(st.lists(row_of(table), max_size=4))
    @settings(QUIET, max_examples=8)
    def back(rows: list[dict[str, Any]]) -> None:
        data = from_rows(rows, table, "fuzz")
        pq.write_table(data, folder / f"{table}.parquet")
        assert data.to_pylist() == [{key: row[key] for key in columns(table)} for row in rows]
        pd.testing.assert_frame_equal(read_table(folder, table), to_frame(data))

    back()


@given(st.lists(row_of("skipped"), max_size=4))
@some
def test_text_comes_back_from_csv_as_it_was(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "table.csv"
    write_csv(from_rows(rows, "skipped", "fuzz"), path)
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == rows


@given(st.lists(FLOATS, min_size=1, max_size=5))
@some
def test_numbers_come_back_from_csv_with_nine_digits(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "numbers.csv"
    write_csv(pa.table({"value": pa.array(values, pa.float64())}), path)
    for text, value in zip(path.read_text().splitlines()[1:], values, strict=True):
        assert float(text) == pytest.approx(value, rel=1e-8, abs=5e-324)


# --------------------------------------------------------------------------------------------------- published numbers

with FILE.open(encoding="utf-8", newline="") as opened:
    HEADER, *PRINTED = list(csv.reader(opened))
SPOILT = ["", "x", "nan", "inf", "-1", "0", "1e999", "true", "null", "[]", "{}", '{"a": 1}', "9" * 5000, "[" * 5000]
SPOILT += [
    "=cmd()",
    "a,b",
    'a"b',
    "two\nlines",
    "\0",
    "dense",
    "2:4",
    "4:2",
    "0:0",
    "1.5",
    "²",
    "1_0",
    "0x1",
    "primary",
]
STUDY = plan(yaml.safe_load((ROOT / "config/paper-wanda-llama2.yaml").read_text("utf-8")))


def write_rows(path: Path, rows: list[list[str]], mark: str = "", end: str = "\n") -> Path:
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows(rows)
    path.write_bytes((mark + text.getvalue()).encode("utf-8"))
    return path


def accepted(path: Path) -> bool:
    """Whether a file is accepted, and then of use, or refused in a sentence."""

    def use() -> None:
        for row in read_published(path):
            if row["not_joined"] is None:
                for model in STUDY.models:
                    pairs(STUDY, row, model)

    return told(use) is None


def test_the_published_numbers_come_back():
    rows = read_published()
    assert len(rows) == len(PRINTED)
    for row, printed in zip(rows, PRINTED, strict=True):
        for name, text in zip(HEADER, printed, strict=True):
            assert row[name] == text or (row[name] is None) == (text == "") and not isinstance(row[name], str)


@given(st.sampled_from(PRINTED), st.sampled_from(HEADER), st.sampled_from(SPOILT) | st.text(max_size=6))
@settings(QUIET, max_examples=60)
@example(next(row for row in PRINTED if not row[-1]), "our_params", "[" * 5000)
def test_a_published_field_is_taken_or_refused_in_one_sentence(tmp_path_factory, row, column, text):
    assume(max(text, default="") < "\ud800" or min(text) > "\udfff")
    own = [text if name == column else value for name, value in zip(HEADER, row, strict=True)]
    accepted(write_rows(tmp_path_factory.getbasetemp() / "published.csv", [HEADER, own]))


def test_the_form_of_the_published_table(tmp_path):
    path, rows = tmp_path / "published.csv", [HEADER, *PRINTED[:3]]
    assert read_published(write_rows(path, rows, mark="\ufeff", end="\r\n")) == read_published(write_rows(path, rows))
    assert not accepted(write_rows(path, [HEADER + ["more"], PRINTED[0] + ["x"]]))
    assert not accepted(write_rows(path, [HEADER + ["paper"], PRINTED[0] + ["x"]]))
    assert not accepted(write_rows(path, [HEADER, PRINTED[0] + ["x"]]))
    assert not accepted(write_rows(path, [HEADER, PRINTED[0][:5]]))
    assert not accepted(write_rows(path, []))
    for column in range(len(HEADER)):
        assert not accepted(write_rows(path, [row[:column] + row[column + 1 :] for row in rows]))
    path.write_bytes(FILE.read_bytes()[:2000] + b'"')
    assert not accepted(path)
    path.write_bytes(b"\xff\xfe")
    assert not accepted(path)
