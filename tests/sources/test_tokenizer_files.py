"""The ids of a text are those that the model's tokenizer.json gives, whatever class its config names."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layerwise.runtime.errors import InputError
from layerwise.sources import tokenizer_files, tokens
from layerwise.sources.checkpoint_files import MODEL_VOCABULARIES, check_checkpoint
from layerwise.sources.tokenizer_files import (
    check_ids,
    check_loaded,
    check_task_tokens,
    class_defaults,
    load_tokenizer,
    pipeline_of,
)
from tests.support.tokenizers import PIPELINES, SIZE, TEXT, byte_level, digits_in_threes, ids, set_config, write
from tests.support.typing_helpers import some

CLASSES = ("GPT2Tokenizer", "LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None)
TYPES = ("llama", "qwen2", "qwen3", "gpt2", "smollm3", "starcoder2", "exaone4", "olmo2", "deepseek_v3", "gemma2")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("make", PIPELINES)
def test_the_file_decides_and_not_the_class(tmp_path: Path, make, kind: str | None):
    own = write(tmp_path, make, tokenizer_class=kind)
    assert ids(load_tokenizer({"path": str(tmp_path)})) == own.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize("model_type", TYPES)
def test_the_file_decides_and_not_the_model_type(tmp_path: Path, model_type: str):
    own = write(tmp_path, digits_in_threes, model_type)
    assert ids(load_tokenizer({"path": str(tmp_path)})) == own.encode(TEXT, add_special_tokens=False).ids


def test_a_class_that_cuts_otherwise_is_reported(tmp_path: Path, capsys):
    write(tmp_path, digits_in_threes, tokenizer_class="GPT2Tokenizer")
    load_tokenizer({"path": str(tmp_path)})
    told = capsys.readouterr().err
    assert "is used as tokenizer.json has it: GPT2Tokenizer would take another pre_tokenizer" in told
    write(tmp_path / "plain", byte_level, tokenizer_class="PreTrainedTokenizerFast")
    load_tokenizer({"path": str(tmp_path / "plain")})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", [*CLASSES, "GPTNeoXTokenizer", "RobertaTokenizer", "BertTokenizer"])
@pytest.mark.parametrize("added", [True, False, None])
@pytest.mark.parametrize("begins", [True, False])
def test_tokens_around_a_text_are_those_of_the_file(tmp_path: Path, kind: str | None, added: bool | None, begins: bool):
    write(tmp_path, digits_in_threes, tokenizer_class=kind)
    set_config(tmp_path, **({} if added is None else {"add_bos_token": added}))
    path = tmp_path / "tokenizer.json"
    own = Tokenizer.from_file(str(path))
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    own.post_processor = template if begins else processors.ByteLevel()
    own.save(str(path))
    found = ids(load_tokenizer({"path": str(tmp_path)}), special=True)
    assert found == own.encode(TEXT).ids and (found[0] == 0) is begins


@pytest.mark.parametrize("added", [True, False])
def test_without_the_file_the_config_says_what_begins_a_text(tmp_path: Path, added: bool):
    """OPT: vocab.json, merges.txt and add_bos_token."""
    own = write(tmp_path, byte_level, "opt", tokenizer_class="GPT2Tokenizer", bos_token="</s>")
    set_config(tmp_path, add_bos_token=added)
    own.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    tokenizer = load_tokenizer({"path": str(tmp_path)})
    assert ids(tokenizer) == own.encode(TEXT).ids
    assert ids(tokenizer, special=True) == [1] * added + own.encode(TEXT).ids


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("number", [SIZE, SIZE + 180])
def test_tokens_that_other_files_add(tmp_path: Path, kind: str | None, name: str, number: int):
    """They are kept where they get the id that is written, and otherwise no text that has them is tokenised."""
    write(tmp_path, digits_in_threes, tokenizer_class=kind)
    if name == "added_tokens.json":
        (tmp_path / name).write_text(json.dumps({"<|tool|>": number}))
    added = {str(number): {"content": "<|tool|>", "special": True}}
    set_config(tmp_path, added_tokens_decoder=added)
    spec = {"path": str(tmp_path)}
    tokenizer = load_tokenizer(spec)
    (token,) = tokenizer("<|tool|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(token) == "<|tool|>"
    text = f"one <|tool|> two{TEXT}"
    if number == SIZE:
        assert token == number and load_tokenizer(spec, [text])
    else:
        with pytest.raises(InputError, match="must give the ids of its tokenizer.json"):
            load_tokenizer(spec, [text])


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_adds_no_tokens_of_its_own(tmp_path: Path, kind: str | None, model_type: str, capsys):
    own = write(tmp_path, digits_in_threes, model_type, tokenizer_class=kind, bos_token=None, eos_token=None)
    spec = {"path": str(tmp_path)}
    tokenizer = load_tokenizer(spec)
    assert len(tokenizer) == own.get_vocab_size()
    assert all(own.token_to_id(str(token)) is not None for token in tokenizer.special_tokens_map.values())
    text = "<|endoftext|> <s> <eos> <pad>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode(text, add_special_tokens=False).ids
    library = AutoTokenizer.from_pretrained(tmp_path)
    file = pipeline_of(tmp_path)
    assert file is not None
    told = capsys.readouterr().err
    assert all(name in told for name in class_defaults(library, file, tmp_path))


def test_a_file_that_cuts_at_random_is_refused(tmp_path: Path):
    write(tmp_path, byte_level)
    file = tmp_path / "tokenizer.json"
    found = json.loads(file.read_text())
    for dropout, refused in ((None, False), (0.0, False), (1e-6, True)):  # so seldom that no probe would show it
        found["model"]["dropout"] = dropout
        file.write_text(json.dumps(found))
        wanted = pytest.raises(InputError, match="a dropout of 0 or null in tokenizer.json. Got 1e-06 instead")
        with wanted if refused else nullcontext():
            load_tokenizer({"path": str(tmp_path)})


def test_other_ids_than_the_files_are_refused(tmp_path: Path, monkeypatch):
    write(tmp_path, digits_in_threes, tokenizer_class="GPT2Tokenizer")
    spec = {"path": str(tmp_path)}
    monkeypatch.setattr(tokenizer_files, "use_pipeline", lambda *_: [])
    with pytest.raises(
        InputError, match=r"must give the ids of its tokenizer.json. Got \[.*\] instead of \[.*\] from to"
    ):
        load_tokenizer(spec)
    monkeypatch.setattr(tokenizer_files, "PROBE", "no digit")
    tokenizer, file = load_tokenizer(spec), some(pipeline_of(tmp_path))
    check_ids(tokenizer, file, tmp_path, "no digit")
    with pytest.raises(InputError, match="from token"):
        check_ids(tokenizer, file, tmp_path, TEXT)
    assert load_tokenizer(spec, ["no digit"])
    with pytest.raises(InputError, match="from token"):
        load_tokenizer(spec, ["no digit", TEXT])
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(InputError, match="must give the ids of its tokenizer.json"):
        tokens.tokens(spec, {"path": str(text)}, {"length": 16}, "evaluation")


@pytest.mark.parametrize("name", MODEL_VOCABULARIES)
def test_a_vocabulary_that_is_not_read_is_named_before_any_job(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(b"\n\x0e")
    for call in (
        lambda: check_checkpoint("m", {"path": str(tmp_path)}),
        lambda: load_tokenizer({"path": str(tmp_path)}),
    ):
        with pytest.raises(InputError, match=f"has its tokenizer as {name} without tokenizer.json"):
            call()


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer.json": "{}"}, "/tokenizer.json must be a file of the tokenizers library, which reports"),
        ({"tokenizer.json": ""}, "/tokenizer.json must be a file of the tokenizers library, which reports"),
        ({"tekken.json": "{}"}, "one of its own files lacks the key 'config'"),
        ({"vocab.txt": "a\nb\n"}, "tokenizer_config.json must be one that reads the other files. Got null instead"),
    ],
    ids=str,
)
def test_unusable_tokenizer_files_are_reported_without_a_library_to_install(tmp_path: Path, files, told: str):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as refused:
        load_tokenizer({"path": str(tmp_path)})
    sentence = str(refused.value)
    assert told in sentence and sentence.endswith(".") and "\n" not in sentence
    assert "sentencepiece" not in sentence.lower() and "tiktoken" not in sentence


@pytest.mark.parametrize("kind", ["GemmaTokenizer", "LlamaTokenizer"])
def test_a_class_that_does_not_take_the_vocabulary_is_refused(tmp_path: Path, kind: str):
    own = write(tmp_path, byte_level, "opt", tokenizer_class="GPT2Tokenizer")
    own.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer({"path": str(tmp_path)})
    set_config(tmp_path, tokenizer_class=kind)
    with pytest.raises(InputError, match=r"must have the tokens of its vocab.json. Got .* instead of "):
        load_tokenizer({"path": str(tmp_path)})


NAMED = "name one in its tokenizer_config.json, or leave the tasks out."
TASK_TOKENS = [  # special tokens, and what is said to tasks that score choices and to those that generate
    ({}, "must have a bos_token or an eos_token for zero-shot tasks. Got neither", "must have a bos_token or an eos"),
    ({"bos_token": "<s>"}, None, "must have an eos_token for tasks that generate text, such as gen. Got none"),
    ({"eos_token": "</s>"}, None, None),
    ({"bos_token": "<s>", "eos_token": "</s>"}, None, None),
    (
        {"bos_token": "<B>", "eos_token": "</s>"},
        "must have a bos_token .* Got '<B>', 420,",
        "must have a bos_token",
    ),
    ({"bos_token": "<s>", "eos_token": "<E>"}, None, "must have a eos_token that the model embeds, from 0 to 419, for"),
    ({"eos_token": "</s>", "pad_token": "<P>"}, None, "must have a pad_token that the model embeds"),
    ({"eos_token": "</s>", "unk_token": "<U>"}, None, "must have a unk_token that the model embeds"),
]


@pytest.mark.parametrize("special, scored, generated", TASK_TOKENS)
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_tasks_need_tokens_that_the_model_embeds(tmp_path: Path, kind: str, special, scored, generated):
    write(tmp_path, digits_in_threes, tokenizer_class=kind, **{"bos_token": None, "eos_token": None, **special})
    spec = {"path": str(tmp_path)}
    tokenizer = load_tokenizer(spec)
    for generating, said in (((), scored), (("gen",), generated)):
        if said is None:
            check_task_tokens(tokenizer, spec, SIZE, generating)
            continue
        with pytest.raises(InputError, match=f"The tokenizer of {tmp_path} {said}") as error:
            check_task_tokens(tokenizer, spec, SIZE, generating)
        assert str(error.value).endswith(NAMED)


def test_a_given_tokenizer_is_compared_with_its_file(tmp_path: Path):
    write(tmp_path, digits_in_threes, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(InputError, match="from token .* on: load_tokenizer of layerwise.sources.tokenizer_files uses"):
        check_loaded(AutoTokenizer.from_pretrained(tmp_path), "text")
    tokenizer = load_tokenizer({"path": str(tmp_path)})
    tokenizer.add_tokens(["<|mine|>"])
    check_loaded(tokenizer, f"text <|mine|> {TEXT}")
    check_loaded(PreTrainedTokenizerFast(tokenizer_object=byte_level()), "text")  # from no folder


def test_replaced_tokenizer_parts_are_recorded(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    wanted = {"GPT2Tokenizer": ["pre_tokenizer", "unk_token"], "PreTrainedTokenizerFast": []}
    for kind, replaced in wanted.items():
        write(tmp_path / kind, digits_in_threes, tokenizer_class=kind)
        cut = {"length": 16}
        _, info = tokens.tokens({"path": str(tmp_path / kind)}, {"path": str(text)}, cut, "evaluation")
        assert [name for name in info["tokenizer_replaced"] if name != "model"] == replaced
        assert info["vocabulary"] == SIZE
