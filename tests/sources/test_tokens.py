"""Tokens of texts: the published ways of sampling and cutting, and sentences for what is too short."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from layerwise.runtime.errors import InputError
from layerwise.sources import tokens as text
from layerwise.sources.tokenizer_files import load_tokenizer

# ------------------------------------------------------------------------------------------------------------- sampling


def published_stream(ids, samples, length, seed):
    """The loop of get_wikitext2 in SparseGPT's datautils.py and Wanda's lib/data.py, without its tensors."""
    random.seed(seed)
    loader = []
    for _ in range(samples):
        i = random.randint(0, len(ids) - length - 1)
        loader.append(ids[i : i + length])
    return loader


def published_documents(encode, documents, samples, length, seed):
    """The loop of get_c4 in Wanda's lib/data.py, without its tensors."""
    random.seed(seed)
    loader = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = encode(documents[i])
            if len(ids) > length:
                break
        i = random.randint(0, len(ids) - length - 1)
        loader.append(ids[i : i + length])
    return loader


def codes(document: str) -> np.ndarray:
    return np.array([ord(character) for character in document], dtype=np.int64)


@pytest.fixture(scope="module")
def many():
    draw = random.Random(1)
    return ["".join(draw.choices("abcdefgh", k=draw.randint(0, 40))) for _ in range(200)]


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_samples_of_a_stream_are_the_published_ones(seed):
    ids = np.arange(1000)
    drawn = text.sample_stream(ids, 20, 32, seed)
    assert drawn.shape == (20, 32)
    np.testing.assert_array_equal(drawn, published_stream(ids, 20, 32, seed))


@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("counted_before", [0, 20_000])
def test_samples_of_documents_are_the_published_ones(monkeypatch, many, seed, counted_before):
    monkeypatch.setattr(text, "COUNTED_BEFORE", counted_before)
    monkeypatch.setattr(text, "MISSES", 3)
    drawn = text.sample_documents(codes, many, 25, 32, seed)
    np.testing.assert_array_equal(drawn, published_documents(codes, many, 25, 32, seed))


@pytest.mark.parametrize("seed", range(8))
def test_the_very_last_crop_is_never_drawn_as_in_the_published_codes(seed):
    ids = np.arange(9)
    assert text.sample_stream(ids, 1, 8, seed)[0][0] == 0
    assert text.sample_documents(lambda document: ids, ["nine"], 1, 8, seed)[0][0] == 0


def test_seeds_differ_and_global_randomness_is_left_alone(many):
    state = random.getstate()
    first, again, other = (text.sample_documents(codes, many, 8, 16, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert random.getstate() == state


def test_a_document_is_tokenised_once(many):
    seen = []
    text.sample_documents(lambda document: seen.append(document) or codes(document), sorted(set(many)), 40, 30, 0)
    assert len(seen) == len(set(seen))


def test_stream_too_short():
    with pytest.raises(InputError, match="has 100 tokens, 6 sequences of 16 tokens, but 7 are requested"):
        text.sample_stream(np.arange(100), 7, 16, 0)
    with pytest.raises(InputError, match="has 16 tokens"):  # one window, but no room to draw
        text.sample_stream(np.arange(16), 1, 16, 0)
    assert text.sample_stream(np.arange(100), 6, 16, 0).shape == (6, 16)


@pytest.mark.parametrize("counted_before", [0, 20_000])
@pytest.mark.parametrize(
    ("found", "count"), [(["ab"] * 5, 0), (["abcd"], 0), (["abcdefghij", "abcde", ""], 3), ([], 0)]
)
def test_documents_too_short(monkeypatch, counted_before, found, count):
    monkeypatch.setattr(text, "COUNTED_BEFORE", counted_before if found else 0)
    monkeypatch.setattr(text, "MISSES", 10)
    sentence = f"{len(found)} documents, and the longer ones hold {count} sequences of 4 tokens, but 4 are requested"
    if counted_before == 0 and count:
        assert len(text.sample_documents(codes, found, 4, 4, 0)) == 4  # never missed often enough to be counted
    else:
        with pytest.raises(InputError, match=sentence):
            text.sample_documents(codes, found, 4, 4, 0)


def test_windows():
    np.testing.assert_array_equal(text.windows(np.arange(10), 3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(text.windows(np.arange(10), 3, 2), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(InputError, match="10 tokens, 3 windows of 3 tokens, but 4 are requested"):
        text.windows(np.arange(10), 3, 4)
    with pytest.raises(InputError, match="10 tokens, 0 windows of 11 tokens, but 1 are requested"):
        text.windows(np.arange(10), 11)


# ----------------------------------------------------------------------------------------------------------- tokenising

CHARACTERS = ["<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz \n"]


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Characters as tokens, BOS first; metaspace and prepend: as in the two ways of Llama's tokenizers."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(CHARACTERS)}, []))
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    elif kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    template = "<s> $A </s>" if kind == "both" else "<s> $A"
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])
    end = AddedToken("</s>", special=True, normalized=False, lstrip=kind == "strip")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=end, model_max_length=8)


@pytest.mark.parametrize("kind", ["plain", "metaspace", "prepend", "both", "strip"])
@pytest.mark.parametrize("join", ["</s>", "\n\n"])
def test_stream_is_tokenised_as_one_text(monkeypatch, many, kind, join):
    monkeypatch.setattr(text, "CHUNK", 100)  # many pieces
    tokenizer = tokenizer_of(kind)
    spaced = [f" {document} a " for document in many]
    stream = text.encode_stream(tokenizer, spaced, join)
    np.testing.assert_array_equal(stream, tokenizer(join.join(spaced), verbose=False)["input_ids"])
    assert stream[0] == 0 and (stream[1:] != 0).all()  # BOS at the very start alone


def test_long_texts_bring_no_warning(capfd):
    assert len(text.encode(tokenizer_of("plain"), "a" * 100)) == 101
    assert capfd.readouterr().err == ""


def test_tokenizer_that_cannot_be_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=f"The tokenizer of {tmp_path} cannot be loaded: .*"):
        load_tokenizer({"path": str(tmp_path)})


@pytest.fixture
def study(tmp_path, many):
    """A model's and a text's config entries."""
    tokenizer_of("plain").save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("|".join(many))
    spec = {"path": str(tmp_path / "a.txt"), "separator": "|", "join": "</s>", "dataset": "letters"}
    return {"path": str(tmp_path / "model")}, spec


@pytest.mark.parametrize("sampling", ["stream", "documents"])
def test_main_writes_calibration_tokens(tmp_path, study, many, sampling):
    model, spec = study
    cut = {"text": "letters", "samples": 5, "length": 16, "seed": 3, "sampling": sampling}
    arguments = ["--model", json.dumps(model), "--text", json.dumps(spec), "--calibration", json.dumps(cut)]
    text.main(["calibration", *arguments, "--out", str(tmp_path / "out.safetensors")])
    tokens, info = text.read_tokens(tmp_path / "out.safetensors")
    tokenizer, found = tokenizer_of("plain"), [document for document in many if document]
    if sampling == "stream":
        expected = published_stream(tokenizer("</s>".join(found))["input_ids"], 5, 16, 3)
        assert info["tokens_in_text"] == 1 + sum(map(len, found)) + len(found) - 1
    else:
        expected = published_documents(lambda d: tokenizer(d)["input_ids"], found, 5, 16, 3)
        assert info["tokens_in_text"] is None
    np.testing.assert_array_equal(tokens, expected)
    assert tokens.dtype == np.int64
    wanted = {key: cut[key] for key in ("samples", "length", "seed", "sampling")}
    wanted |= {"dataset": "letters", "documents": len(found), "vocabulary": len(CHARACTERS), "normalised": ""}
    assert {key: info[key] for key in wanted} == wanted
    assert info["sha256"] == text.hashlib.sha256("</s>".join(found).encode()).hexdigest()


def test_main_writes_evaluation_tokens(tmp_path, study):
    model, spec = study
    arguments = ["--model", json.dumps(model), "--text", json.dumps(spec), "--out", str(tmp_path / "out.safetensors")]
    text.main(["evaluation", *arguments, "--evaluation", '{"text": "letters", "length": 16, "samples": null}'])
    tokens, info = text.read_tokens(tmp_path / "out.safetensors")
    assert len(tokens) == info["samples"] == info["tokens_in_text"] // 16
    assert tokens[0, 0] == 0 and (tokens.flatten()[1:] != 0).all()
    with pytest.raises(
        InputError, match=r"a.txt: The text has \d+ tokens, \d+ windows of 16 tokens, but 9999 are requested"
    ):
        text.main(["evaluation", *arguments, "--evaluation", '{"length": 16, "samples": 9999}'])


def test_tokens_file_of_another_kind(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="must hold the tensor 'tokens'"):
        text.read_tokens(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["tokens", "sketch"])
def test_a_damaged_tensor_is_set_aside(tmp_path, name):
    whole = {"tokens": np.arange(8).reshape(2, 4), "sketch": np.arange(3, dtype=np.uint64)}
    info = {f"{key}_sha256": text.tokens_hash(tensor) for key, tensor in whole.items()} | {"dataset": "letters"}
    path = tmp_path / "a.safetensors"
    save_file({**whole, name: whole[name] + whole[name].dtype.type(1)}, path, metadata={"info": json.dumps(info)})
    read = {"tokens": text.read_tokens, "sketch": text.read_sketch}
    other = "sketch" if name == "tokens" else "tokens"
    found = read[other](path)
    np.testing.assert_array_equal(found[0] if other == "tokens" else found, whole[other])
    with pytest.raises(
        InputError, match=f"is damaged: its tensor '{name}' has changed since it was written; it is now"
    ):
        read[name](path)
    assert not path.exists()
