"""The tokenizer of an exported folder gives the ids of the study."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layerwise.export.save_tokenizer import copy_tokenizer
from layerwise.sources.tokenizer_files import load_tokenizer
from tests.support.tokenizers import digits_in_threes, ids, write


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
def test_a_copied_tokenizer_gives_the_same_ids(tmp_path: Path, model_type: str, capsys):
    write(tmp_path / "own", digits_in_threes, model_type, tokenizer_class="GPT2Tokenizer")
    (tmp_path / "out").mkdir()
    shutil.copy(tmp_path / "own/config.json", tmp_path / "out")
    spec = {"path": str(tmp_path / "own")}
    tokenizer = load_tokenizer(spec)
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "own")) != ids(tokenizer)
    capsys.readouterr()
    copy_tokenizer(spec, tmp_path / "out")
    saved, plain = (one.from_pretrained(tmp_path / "out") for one in (AutoTokenizer, PreTrainedTokenizerFast))
    told = "AutoTokenizer gives other ids for this export than the study used" in capsys.readouterr().err
    assert told is (ids(saved) != ids(tokenizer)) is (model_type == "qwen2")  # it always takes Qwen2Tokenizer
    assert ids(plain, special=True) == ids(tokenizer, special=True)
    assert plain.special_tokens_map == tokenizer.special_tokens_map
