"""Sources: what a job depends on, and every reason why a model or text cannot be read, told before a job runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from layerwise.runtime.errors import InputError
from layerwise.sources import checkpoint_files, hub, text_files
from tests.support.paths import ROOT

EVERYTHING = "".join(f"from layerwise.sources.{name} import *\n" for name in ("hub", "checkpoint_files", "text_files"))
HUB = {"hub": "organisation/name", "revision": "0123abc"}
HUB_TEXT = {**HUB, "files": ["en/part.json.gz"]}


def run(code: str, tmp_path: Path, **environment: str) -> str:
    """Output of code in a process of its own, with an empty hub cache: the hub's library reads these once."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_", "TRANSFORM"))
    }
    variables = clean | {"HF_HOME": str(tmp_path / "hub")} | environment
    done = subprocess.run([sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path):
    """A complete model folder, as far as can be seen without loading it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.ones((4, 8), np.float32), "bias": np.ones(4, np.float32)}, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_importing_is_light(tmp_path):
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'numpy', 'pandas'}"
    code = f"import sys, layerwise.sources.hub; print({heavy} & set(sys.modules))"
    assert run(code, tmp_path) == "set()"


def test_complete_model(folder):
    checkpoint_files.check_checkpoint("mine", {"path": str(folder)})
    names = [path.name for path in checkpoint_files.model_files({"path": str(folder)})]
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert checkpoint_files.model_files(HUB) == []
    assert hub.fetch_model({"path": str(folder)}) == folder


def test_complete_shards(folder):
    sharded(folder)
    save_file({"bias": np.ones(4, np.float32)}, folder / "model-00002-of-00002.safetensors")
    checkpoint_files.check_checkpoint("mine", {"path": str(folder)})
    assert len(checkpoint_files.model_files({"path": str(folder)})) == 5


def test_an_index_without_metadata_is_refused(folder):
    sharded(folder)
    save_file({"bias": np.ones(4, np.float32)}, folder / "model-00002-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    with pytest.raises(InputError, match="index.json of the model 'mine' must have an object `metadata`"):
        checkpoint_files.check_checkpoint("mine", {"path": str(folder)})


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def lengthen(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model-00001-of-00001.bin")


def writes(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def removes(name: str):
    return lambda folder: (folder / name).unlink()


BROKEN_MODELS = {
    "no config": (removes("config.json"), "has no config.json"),
    "bad config": (writes("config.json", b"{"), "config.json is not valid JSON"),
    "list config": (writes("config.json", b"[]"), "must hold a JSON object"),
    "no tokenizer": (removes("tokenizer.json"), "has no tokenizer"),
    "no weights": (removes("model.safetensors"), "has no weights"),
    "pickles": (
        only_pickles,
        r"a pickle can run code: if you trust its source, convert .* python -c .*use_safetensors=F",
    ),
    "other": (lambda f: (f / "model.safetensors").rename(f / "a.safetensors"), "has a.safetensors, but neither"),
    "shards": (sharded, r"names files that do not exist: model-00002-of-00002.safetensors\."),
    "cut": (cut, r"model.safetensors is cut off: it has \d+ bytes, and its header says \d+"),
    "cut header": (writes("model.safetensors", (100).to_bytes(8, "little") + b"{"), "cut off: it has 9 bytes"),
    "too long": (lengthen, "is too long"),
    "empty": (writes("model.safetensors", b""), "not a safetensors file"),
    "garbage": (writes("model.safetensors", b"\xff" * 64), "not a safetensors file"),
    "bad header": (writes("model.safetensors", (2).to_bytes(8, "little") + b"[]"), "header cannot be read"),
    "pointer": (writes("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
}


@pytest.mark.parametrize("kind", BROKEN_MODELS)
def test_incomplete_model(folder, kind):
    spoil, sentence = BROKEN_MODELS[kind]
    spoil(folder)
    with pytest.raises(InputError, match=sentence):
        checkpoint_files.check_checkpoint("mine", {"path": str(folder)})


def test_missing_model_folder(tmp_path):
    with pytest.raises(InputError, match="The folder .*absent of the model 'mine' does not exist"):
        checkpoint_files.check_checkpoint("mine", {"path": str(tmp_path / "absent")})


BROKEN_TEXTS = {
    "missing": ({"path": "absent.txt"}, "The file absent.txt of the text 'mine' does not exist"),
    "suffix": ({"path": "text.csv"}, r"must end in one of \.txt, .*Got text.csv instead"),
    "separator": (
        {"path": "a.jsonl", "separator": "\n\n"},
        r"'mine' must have no separator, because only \.txt and \.raw are separated by one. Got '\\n\\n' for a.jsonl",
    ),
    "hub files": (HUB, "must list the data files of the data set 'organisation/name'"),
    "hub suffix": ({**HUB, "files": ["c4.py"]}, "Got c4.py instead"),
    "hub revision": ({"hub": "a/b", "files": ["a.txt"]}, "must name its `revision`"),
    "hub name": ({**HUB_TEXT, "hub": "a/b/c"}, r"A hub name must be 'organisation/name'\. Got 'a/b/c' instead"),
}


@pytest.mark.parametrize("kind", BROKEN_TEXTS)
def test_unreadable_text(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    spec, sentence = BROKEN_TEXTS[kind]
    with pytest.raises(InputError, match=sentence):
        text_files.check_text("mine", spec)


def test_readable_texts(tmp_path):
    (tmp_path / "a.jsonl.gz").touch()
    text_files.check_text("mine", {"path": str(tmp_path / "a.jsonl.gz")})
    text_files.check_text("made later", {"path": "results/text/train.txt"})
    assert text_files.text_files({"path": "a.txt"}) == text_files.fetch_text({"path": "a.txt"}) == [Path("a.txt")]
    assert text_files.text_files(HUB_TEXT) == []


def test_hub_model_needs_a_revision():
    with pytest.raises(InputError, match="must name its `revision`"):
        checkpoint_files.check_checkpoint("mine", {"hub": "organisation/name"})


@pytest.mark.parametrize("value", ["1", "true", "yes"])
@pytest.mark.parametrize("call", [f"check_checkpoint('mine', {HUB})", f"check_text('mine', {HUB_TEXT})"])
def test_offline_and_not_in_the_cache(tmp_path, call, value):
    code = f"{EVERYTHING}try: {call}\nexcept InputError as error: print(error)"
    sentence = run(code, tmp_path, HF_HUB_OFFLINE=value)
    assert "'mine'" in sentence and "organisation/name at 0123abc" in sentence
    assert "is not in the local cache and HF_HUB_OFFLINE forbids fetching: download it before" in sentence
    assert run(code, tmp_path, HF_HUB_OFFLINE="0") == ""  # fetching is allowed, and left to the job


def test_offline_and_in_the_cache(tmp_path):
    snapshot = tmp_path / "hub/hub/models--organisation--name/snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert (
        run(
            f"{EVERYTHING}check_checkpoint('m', {HUB})",
            tmp_path,
            HF_HUB_OFFLINE="1",
        )
        == ""
    )


@pytest.mark.parametrize("call", [f"fetch_model({HUB})", f"fetch_text({HUB_TEXT})"])
def test_fetching_offline_is_one_sentence(tmp_path, call):
    code = f"{EVERYTHING}try: {call}\nexcept InputError as error: print(error)"
    assert "HF_HUB_OFFLINE forbids fetching" in run(code, tmp_path, HF_HUB_OFFLINE="1")


def test_a_hub_model_of_pickles_is_refused_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(InputError, match="hf download organisation/name --revision 0123abc --local-dir FOLDER"):
        hub.fetch_model({"hub": "organisation/name", "revision": "0123abc"})


def test_no_network_is_one_sentence(tmp_path):
    code = f"{EVERYTHING}try: fetch_model({HUB})\nexcept InputError as error: print(error)"
    sentence = run(code, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")  # nothing listens there
    assert sentence.startswith(
        "organisation/name at revision 0123abc is not in the local cache and could not be fetched"
    )
    assert "\n" not in sentence


def test_contamination():
    train, test, other = (
        {"path": "a/train.txt", "dataset": "d"},
        {"path": "a/test.txt", "dataset": "d"},
        {"path": "b.txt"},
    )
    assert text_files.shared_origin(train, test) == "the same data set, d"
    assert text_files.shared_origin(train, other) is None
    assert text_files.shared_origin(other, {"path": "./b.txt"}) == "the same file, b.txt"
    another, named = {**HUB_TEXT, "files": ["x.parquet"]}, {**HUB_TEXT, "dataset": "mine"}
    assert text_files.shared_origin(HUB_TEXT, another) == "the same data set, organisation/name"
    assert text_files.shared_origin(HUB_TEXT, named) == f"the same file, organisation/name/{HUB_TEXT['files'][0]}"
    assert text_files.shared_origin(HUB_TEXT, {**another, "dataset": "mine"}) is None
    assert [text_files.dataset_of(spec) for spec in (train, other, HUB_TEXT)] == ["d", "b.txt", "organisation/name"]
