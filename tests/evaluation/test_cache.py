"""Evaluations by content: what is read is what would be computed, and nothing that differs is taken for the same."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from layerwise.evaluation import cache, dense_states, perplexity
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import sha256
from layerwise.runtime.project import PACKAGE
from layerwise.sources.fingerprint import main as fingerprint
from tests.evaluation.test_perplexity import LENGTH, VOCABULARY, WINDOWS, layers_of, llama, weights_of
from tests.support.paths import ROOT

INFO = {"sha256": "abc", "dataset": "random"}


def write_tokens(path, seed=0, words=VOCABULARY):
    tokens = torch.randint(words, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    save_numpy({"tokens": tokens.numpy()}, path, metadata={"info": json.dumps(INFO)})
    return tokens


@pytest.fixture
def cell(tmp_path, monkeypatch):
    """A model, its weights all zero in a cell's folder, and tokens, in a folder that is worked in."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained("model")
    save_file({name: torch.zeros_like(weight) for name, weight in weights_of(model).items()}, "weights.safetensors")
    write_tokens("tokens.safetensors")
    fingerprint(["--model", json.dumps(entry()), "--out", "tiny.json"])
    write_dense_states("tokens.safetensors", "dense.json")
    return tmp_path


def write_dense_states(tokens, out):
    given = ["--model", json.dumps(entry()), "--fingerprint", "tiny.json", "--tokens", tokens, "--threads", "1"]
    dense_states.main([*given, "--out", out])


def request(data, dense=None):
    return {"kind": "perplexity", "data": data, "dense": dense, "spec": {}}


def entry(**changed):
    return {"name": "tiny", "path": "model", "dtype": "float32", "trust_remote_code": False} | changed


def evaluate_ahead(cell, requested):
    weights = cell / "weights.safetensors"
    cache.evaluate_ahead(requested, entry(), cell / "tiny.json", weights, sha256(weights), "cpu", "float32")


def arguments(out="out.json", data="tokens.safetensors", dense: str | None = "dense.json", **changed):
    given = ["perplexity", "--model", json.dumps(entry(**changed)), "--fingerprint", "tiny.json", "--threads", "1"]
    given += ["--weights", "weights.safetensors", "--data", data, "--name", "wanda", "--out", out]
    return [*given, "--dense", dense] if dense else given


def test_an_unseen_evaluation_is_computed(cell, capsys):
    cache.main(arguments())
    result = json.loads((cell / "out.json").read_text())
    model, tokens = as_saved(), write_tokens(cell / "again.safetensors")
    for layer in layers_of(model).values():
        layer.replace(torch.zeros(layer.shape))
    assert result["losses"] == pytest.approx(perplexity.window_losses(model, tokens, 1).tolist(), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["mean_loss"])) and result["text"] == INFO
    assert (result["windows"], result["length"]) == (WINDOWS, LENGTH) and result["seconds"] > 0
    assert "wanda: 100%" in capsys.readouterr().err
    assert result["divergence"]["kl"] > 0.1 and len(result["divergence"]["kl_windows"]) == WINDOWS


def test_the_dense_model_s_own_weights_do_not_diverge(cell):
    save_file(weights_of(as_saved()), "weights.safetensors")
    cache.main(arguments())
    found = json.loads((cell / "out.json").read_text())["divergence"]
    assert (found["kl"], found["kl_p99"], found["top1_agreement"]) == (0, 0, 1)


def test_dense_states_of_other_tokens_are_refused(cell):
    write_tokens(cell / "other.safetensors", seed=1)
    write_dense_states("other.safetensors", "other.json")
    with pytest.raises(InputError, match="other.json must be of the tokens that the cell is evaluated with"):
        cache.main(arguments(dense="other.json"))
    assert not (cell / "out.json").exists()


def test_other_weights_in_the_same_place_are_evaluated_again(cell, capsys):
    cache.main(arguments())
    save_file(weights_of(llama()), "weights.safetensors")
    cache.main(arguments("again.json"))
    before, after = (json.loads((cell / name).read_text()) for name in ("out.json", "again.json"))
    assert before["losses"] != after["losses"] and "are already evaluated" not in capsys.readouterr().err


def test_a_model_that_is_edited_meanwhile_leaves_no_result(cell, monkeypatch):
    computed = cache.computed

    def edited(*given):
        text = computed(*given)
        with open("model/config.json", "a") as file:
            file.write("\n")
        return text

    monkeypatch.setattr(cache, "computed", edited)
    with pytest.raises(InputError, match="config.json is no longer the file from which tiny.json was made"):
        cache.main(arguments())
    assert not (cell / "out.json").exists() and not cache.STORE.exists()


def as_saved():
    return type(llama()).from_pretrained("model")


def test_a_stored_evaluation_is_read_without_torch(cell):
    cache.main(arguments())
    program = (
        "import sys; from layerwise.evaluation import cache; cache.main(sys.argv[1:]); print('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments("again.json")], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "False" and "are already evaluated" in done.stderr, done.stderr
    assert (cell / "again.json").read_bytes() == (cell / "out.json").read_bytes()


def test_the_compress_job_stores_what_the_evaluation_job_would(cell):
    cache.main(arguments())
    (alone,) = cache.STORE.iterdir()
    alone.rename("alone.json")
    requested = [request("{model}.safetensors", "dense-{model}.json")]
    (cell / "tokens.safetensors").rename("tiny.safetensors")  # the model's identity is its fingerprint's name
    evaluate_ahead(cell, requested)
    assert not list(cell.glob("results/evaluations/*"))  # the dense states are not there yet
    write_dense_states("tiny.safetensors", "dense-tiny.json")
    evaluate_ahead(cell, requested)
    (beside,) = cache.STORE.iterdir()
    results = [json.loads(path.read_text()) for path in (cell / "alone.json", beside)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    cache.main(arguments(data="tiny.safetensors", dense="dense-tiny.json"))
    assert (cell / "out.json").read_bytes() == beside.read_bytes()


def test_the_place_depends_on_all_that_decides_the_result_and_on_no_name(cell):
    def place(**changed):
        given = {"kind": "perplexity", "model": entry(), "fingerprint": cell / "tiny.json"}
        given |= {"weights": cell / "weights.safetensors", "digest": "0", "data": cell / "tokens.safetensors"}
        given |= {"dense": cell / "dense.json"}
        return cache.Evaluation(**given | changed).file()

    known = place()
    assert known == place(name="another label", model=entry(name="renamed", path="elsewhere"), weights=cell / "moved")
    (cell / "other").mkdir()
    write_tokens(cell / "other/tokens.safetensors", seed=1)
    write_dense_states("other/tokens.safetensors", "other/dense.json")
    other = json.loads((cell / "tiny.json").read_text())
    other["files"]["config.json"] = "0" * 64
    (cell / "other.json").write_text(json.dumps(other))
    changes = [
        {"digest": "1"},
        {"data": cell / "other/tokens.safetensors"},
        {"dense": cell / "other/dense.json"},
        {"dense": None},
        {"fingerprint": cell / "other.json"},
        {"model": entry(dtype="bfloat16")},
        {"model": entry(trust_remote_code=True)},
        {"kind": "tasks"},
        {"spec": {"tasks": ["a"], "items": 3}},
        {"device": "cuda"},
    ]
    assert len({known, *(place(**change) for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize(
    "file",
    [
        "evaluation/perplexity",
        "evaluation/divergence",
        "sources/tokens",
        "numerics/ops",
        "models/streaming",
        "versions",
    ],
)
def test_other_code_and_other_versions_have_another_place(cell, monkeypatch, file):
    evaluation = cache.Evaluation(
        "perplexity", entry(), cell / "tiny.json", cell / "weights.safetensors", "0", cell / "tokens.safetensors"
    )
    before = evaluation.file()
    if file != "versions":
        monkeypatch.setitem(cache.CODE, PACKAGE / f"{file}.py", "edited")
    else:
        monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "0")
    assert evaluation.file() != before


def test_a_failed_early_evaluation_is_left_to_its_own_job(cell, capsys):
    write_tokens(cell / "wrong.safetensors", words=10 * VOCABULARY)
    requested = [request(name) for name in ("wrong.safetensors", "absent.safetensors", "tokens.safetensors")]
    evaluate_ahead(cell, requested)
    assert (
        "perplexity of wrong.safetensors could not be computed together with the compression: The tokens must be 0 to"
        in capsys.readouterr().err
    )
    assert len(list(cache.STORE.iterdir())) == 1  # the last one is there all the same
    with pytest.raises(InputError, match="do the tokenizer and the model belong together"):
        cache.main(arguments(data="wrong.safetensors", dense=None))
    assert (cell / "failed-out.json").is_file() and not (cell / "out.json").exists()


@pytest.mark.parametrize("left", ["", '{"perplexity": 3'])
def test_a_result_that_a_crash_has_cut_is_computed_again(cell, left):
    cache.main(arguments())
    (stored,) = cache.STORE.iterdir()
    stored.write_text(left)
    cache.main(arguments("again.json"))
    assert (
        json.loads((cell / "again.json").read_text())["losses"] == json.loads((cell / "out.json").read_text())["losses"]
    )


def test_code_that_was_edited_meanwhile_evaluates_nothing(cell, monkeypatch):
    monkeypatch.setitem(cache.CODE, PACKAGE / "evaluation/perplexity.py", "as it was when the compression began")
    evaluate_ahead(cell, [request("tokens.safetensors")])
    assert not cache.STORE.exists()
