"""Divergence from the dense model: against a plain loop in float64, closed forms, and states that do not fit."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import rel_entr
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from layerwise.evaluation import divergence, perplexity
from layerwise.evaluation.dense_states import write_dense_states
from layerwise.evaluation.divergence import DenseStates, kl
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Blocks
from layerwise.runtime.errors import InputError
from tests.evaluation.test_perplexity import LENGTH, VOCABULARY, WINDOWS, layers_of, llama, weights_of

BATCH = 3  # windows of a batch, of which the last one has but one
MADE_OF = {"tokens": "0", "model": {"config.json": "1"}}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", BATCH * LENGTH * VOCABULARY)
    monkeypatch.setitem(divergence.AT_ONCE, "cpu", 4 * VOCABULARY)  # rows: less than a window has


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (WINDOWS, LENGTH))


def gpt2() -> GPT2LMHeadModel:
    sizes: dict[str, Any] = {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).eval()


def gemma2() -> Gemma2ForCausalLM:
    """With soft-capping of logits and of attention, and one sliding window among its blocks."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=0.7,  # logits are of that size: a cap left out would show
        initializer_range=0.3,
    )
    return Gemma2ForCausalLM(config).eval()


def noisy(model, share=0.3):
    """The model with noise on the weights of its blocks."""
    changed = copy.deepcopy(model)
    for layer in layers_of(changed).values():
        weight = layer.weight()
        layer.replace(weight + share * weight.std() * torch.randn_like(weight))
    return changed


def dense_states(model, tokens, folder) -> DenseStates:
    write_dense_states(Blocks(model), tokens, folder / "dense.json", MADE_OF)
    return DenseStates.read(folder / "dense.json")


def found(model, tokens, dense):
    return perplexity.evaluate(model, tokens, dense=dense)["divergence"]


@torch.no_grad()
def plain(dense, compressed, tokens):
    """One forward pass of each model and window in float64, word by word: KL of every token, and agreement."""
    by_token, same = [], []
    for window in tokens:
        pair = (copy.deepcopy(model).double()(window[None]).logits[0].numpy() for model in (dense, compressed))
        for p, q in list(zip(*pair, strict=True))[:-1]:
            p, q = np.exp(p) / np.exp(p).sum(), np.exp(q) / np.exp(q).sum()
            by_token.append(rel_entr(p, q).sum())
            same.append(p.argmax() == q.argmax())
    return np.array(by_token), np.array(same)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergence_is_that_of_a_plain_loop_in_float64(tmp_path, tokens, build, dtype):
    dense = build()
    compressed = noisy(dense)
    by_token, same = plain(dense, compressed, tokens)
    result = found(compressed.to(dtype), tokens, dense_states(dense.to(dtype), tokens, tmp_path))
    near: dict[str, Any] = {"rel": 1e-4} if dtype == torch.float32 else {"rel": 1e-9, "abs": 1e-9}
    assert 0.01 < by_token.mean() < 10 and 0.1 < same.mean() < 0.99  # what is held is worth holding
    assert result["kl"] == pytest.approx(by_token.mean(), **near)
    assert result["kl_p99"] == pytest.approx(np.percentile(by_token, 99), **near)
    assert result["top1_agreement"] == pytest.approx(same.mean(), abs=1e-9)
    for name, values in (("kl_windows", by_token), ("top1_windows", same)):
        assert result[name] == pytest.approx(values.reshape(WINDOWS, -1).mean(1), **near)


@pytest.mark.parametrize("build", [llama, gpt2, gemma2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_does_not_diverge_from_itself(tmp_path, tokens, build, dtype):
    model = build().to(dtype)
    result = found(copy.deepcopy(model), tokens, dense_states(model, tokens, tmp_path))
    assert (result["kl"], result["kl_p99"], result["top1_agreement"]) == (0, 0, 1)
    assert result["kl_windows"] == [0] * WINDOWS and result["top1_windows"] == [1] * WINDOWS


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_model_read_block_by_block_has_the_same(tmp_path, tokens, build):
    dense = build()
    compressed = noisy(dense)
    dense.save_pretrained(tmp_path / "model")
    save_file(weights_of(compressed), tmp_path / "weights.safetensors")
    spec = {"name": "tiny", "path": str(tmp_path / "model"), "dtype": "float32", "trust_remote_code": False}
    whole = found(compressed, tokens, dense_states(dense, tokens, tmp_path))
    values = (tmp_path / "dense.bin").read_bytes()
    write_dense_states(LazyBlocks(spec), tokens, tmp_path / "dense.json", MADE_OF)
    assert (tmp_path / "dense.bin").read_bytes() == values
    assert sorted(path.name for path in tmp_path.glob("*dense*")) == ["dense.bin", "dense.json"]
    lazy = LazyBlocks(spec)
    perplexity.apply_weights(lazy, tmp_path / "weights.safetensors")
    streamed = perplexity.evaluate(lazy, tokens, folder=tmp_path / "s", dense=DenseStates.read(tmp_path / "dense.json"))
    assert streamed["divergence"] == whole


def test_the_file_is_as_large_as_is_said_before(tmp_path, tokens):
    dense = dense_states(llama(), tokens, tmp_path)
    assert dense.values.stat().st_size == WINDOWS * LENGTH * 32 * 4
    assert dense.record["shape"] == [LENGTH, 32] and dense.record["windows"] == WINDOWS


def test_perplexity_is_as_without(tmp_path, tokens):
    dense = llama()
    compressed = noisy(dense)
    result = perplexity.evaluate(compressed, tokens, dense=dense_states(dense, tokens, tmp_path))
    assert result["losses"] == perplexity.evaluate(compressed, tokens)["losses"]
    assert "divergence" not in perplexity.evaluate(compressed, tokens)


def test_of_words_that_a_model_rules_out():
    masked, open_ = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[1.0, 0.0, 0.0]])
    first, second = 1 / (1 + math.e), math.e / (1 + math.e)
    assert kl(masked, masked).tolist() == [0.0]
    other = torch.tensor([[1.0, 0.0, -math.inf]])
    assert float(kl(masked, other)) == pytest.approx(first * math.log(first / second) + second * math.log(math.e))
    assert kl(open_, masked).tolist() == [math.inf] and torch.isfinite(kl(masked, open_)).all()
    assert kl(open_, open_ * math.nan).isnan().all() and kl(open_ * math.nan, open_).isnan().all()


def test_small_divergences_keep_their_digits():
    """float32 would be off by more than half of it."""
    logits = 3 * torch.randn(4, 4096)
    nudged = logits + 1e-4 * torch.randn(4, 4096)
    p, q = (x.double().softmax(-1) for x in (logits, nudged))
    expected = rel_entr(p.numpy(), q.numpy()).sum(-1)
    assert expected.min() > 1e-10 and expected.max() < 1e-7
    np.testing.assert_allclose(kl(logits, nudged), expected, rtol=1e-6)


def test_a_model_that_has_diverged_has_none_and_a_reason(tmp_path, tokens):
    model = llama()
    dense = dense_states(model, tokens, tmp_path)
    spoilt = copy.deepcopy(model)
    next(iter(layers_of(spoilt).values())).replace(torch.full((32, 32), math.nan))
    result = found(spoilt, tokens, dense)
    assert {result[name] for name in divergence.METRICS} == {None} and result["kl_windows"] == []
    assert result["reason"] == "the divergence of 7 of 7 windows from the dense model is not finite"
    json.dumps(result, allow_nan=False)


def test_states_of_other_tokens_or_another_model_are_refused(tmp_path, tokens):
    dense = dense_states(llama(), tokens, tmp_path)
    dense.check("0", MADE_OF["model"])
    with pytest.raises(InputError, match="dense.json must be of the tokens that the cell is evaluated with"):
        dense.check("2", MADE_OF["model"])
    with pytest.raises(InputError, match="dense.json must be of the model that the cell is evaluated with"):
        dense.check("0", {"config.json": "2"})
    with pytest.raises(InputError, match=r"must hold \[windows, tokens\] = \[5, 16\]. Got \[7, 16\] instead"):
        found(llama(), tokens[:5], dense)
    with pytest.raises(InputError, match="must hold hidden states in bfloat16, .* Got float32 instead: run the rule"):
        found(llama().bfloat16(), tokens, dense)


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def turn(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, turn, lambda path: path.unlink()], ids=["cut", "bit", "absent"])
def test_damaged_states_are_set_aside(tmp_path, tokens, damage):
    dense = dense_states(llama(), tokens, tmp_path)
    damage(dense.values)
    with pytest.raises(
        InputError, match="dense.bin is damaged: it has changed since it was written; it is now .*; run again"
    ):
        found(llama(), tokens, dense)
    assert not dense.path.exists()  # so that the workflow makes both again


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_that_takes_more_than_hidden_states_from_its_last_block_is_refused(tmp_path, tokens, masked):
    model, side = llama(), {"mean": 0.0}
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: side.update(mean=0.0))
    mlp: Any = model.model.layers[-1].mlp
    mlp.register_forward_hook(lambda _, args, output: side.update(mean=float(output.mean())))
    model.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + 10 * side["mean"], *args[1:]))
    if masked:  # a logit that makes no difference of the others small
        model.lm_head.register_forward_hook(lambda _, args, logits: logits.index_fill(-1, torch.tensor([3]), -1e9))
    with pytest.raises(InputError, match="LlamaForCausalLM must use only hidden states from its last block"):
        dense_states(model, tokens, tmp_path)
    assert not list(tmp_path.iterdir())
