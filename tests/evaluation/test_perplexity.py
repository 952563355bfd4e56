"""Perplexity: against a float64 oracle, transformers' own loss and closed forms; weights that do not fit the model."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from layerwise.evaluation import perplexity
from layerwise.models.structure import find_blocks, linears
from layerwise.runtime.errors import InputError

VOCABULARY, LENGTH, WINDOWS = 50, 16, 7


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2)).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (WINDOWS, LENGTH))


def layers_of(model) -> dict:
    prefix, blocks = find_blocks(model)
    return {layer.name: layer for i, block in enumerate(blocks) for layer in linears(block, f"{prefix}.{i}")}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: layer.weight() for name, layer in layers_of(model).items()}


@torch.no_grad()
def test_losses_are_the_oracle_s(tokens):
    model = llama()
    logits = model(tokens).logits.double().numpy()
    expected = np.zeros(WINDOWS)
    for window in range(WINDOWS):
        for position in range(LENGTH - 1):
            scores = logits[window, position]
            expected[window] += np.log(np.exp(scores).sum()) - scores[tokens[window, position + 1]]
    losses = perplexity.window_losses(model, tokens, batch=3)
    assert losses.dtype == torch.float64 and losses.shape == (WINDOWS,)
    np.testing.assert_allclose(losses, expected / (LENGTH - 1), rtol=1e-5)
    sum_of_published = sum(float(loss) * LENGTH for loss in losses)  # Wanda's lib/eval.py
    assert perplexity.perplexity(losses) == pytest.approx(math.exp(sum_of_published / (WINDOWS * LENGTH)), rel=1e-12)


@pytest.mark.parametrize("build", [llama, gpt2])
@torch.no_grad()
def test_losses_are_those_of_transformers(tokens, build):
    model = build()
    expected = [model(window[None], labels=window[None]).loss.item() for window in tokens]
    np.testing.assert_allclose(perplexity.window_losses(model, tokens, batch=4), expected, rtol=1e-5)


@pytest.mark.parametrize("build", [llama, gpt2])
@torch.no_grad()
def test_perplexity_is_that_of_a_plain_implementation(tokens, build):
    """One full forward pass per window, nothing batched, everything after it in float64."""
    model, total, count = build(), 0.0, 0
    for window in tokens:
        likelihoods = model(window[None]).logits[0].double().softmax(-1)
        for position in range(1, LENGTH):
            total -= math.log(likelihoods[position - 1, window[position]])
            count += 1
    assert perplexity.evaluate(model, tokens)["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_batches_do_not_matter(tokens, batch):
    model = llama()
    torch.testing.assert_close(
        perplexity.window_losses(model, tokens, batch), perplexity.window_losses(model, tokens, 1), rtol=1e-5, atol=0
    )


def test_half_precision_logits_are_taken_to_float32(tokens):
    model = llama()
    reference = perplexity.window_losses(model, tokens, 2)
    losses = perplexity.window_losses(model.bfloat16(), tokens, 2)
    torch.testing.assert_close(losses, reference, rtol=0.02, atol=0)
    assert losses.dtype == torch.float64


def test_perplexity_of_a_uniform_model_is_the_vocabulary(tokens):
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity.evaluate(model, tokens)["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)


def test_perplexity_that_is_not_finite(tokens):
    with pytest.raises(InputError, match="the loss of 2 of 4 windows is NaN or Inf; the first is window 1"):
        perplexity.perplexity([1.0, math.nan, 2.0, math.inf])
    with pytest.raises(InputError, match="the mean loss is 1000 nats"):
        perplexity.perplexity([1000.0, 1000.0])
    model = llama()
    model.lm_head.weight.data[3, 3] = math.nan
    result = perplexity.evaluate(model, tokens)
    assert result["perplexity"] is None and result["losses"] == [None] * 7
    assert "the model has diverged" in result["reason"] and "the loss of 7 of 7 windows" in result["reason"]
    json.dumps(result, allow_nan=False)


def test_tokens_that_do_not_fit_the_model(tokens):
    with pytest.raises(InputError, match="must be 0 to 49, which the model embeds. Got 0 to 50 instead"):
        perplexity.evaluate(llama(), torch.tensor([[0, 50]]))
    with pytest.raises(InputError, match="sequences must have at most 16 tokens for this model. Got 112 instead"):
        perplexity.evaluate(llama(), tokens.reshape(1, -1))


def test_batch_size_is_bounded_by_the_logits():
    assert perplexity.batch_size(512, 4096) == 2
    assert perplexity.batch_size(2048, 128_000) == 1


@pytest.mark.parametrize("build", [llama, gpt2])
def test_weights_are_written_into_their_layers(tmp_path, build):
    model = build()
    wanted = {name: torch.randn_like(weight) for name, weight in weights_of(model).items()}
    save_file(wanted, tmp_path / "weights.safetensors")
    perplexity.apply_weights(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(weight, wanted[name]) for name, weight in weights_of(model).items())


UNFIT = {
    "missing": (lambda w, name: w.pop(name), "lacks layers of the model: model.layers.0.mlp.up_proj"),
    "unknown": (lambda w, name: w.update({"model.layers.9.x": torch.ones(1)}), "the model lacks: model.layers.9.x"),
    "shape": (
        lambda w, name: w.update({name: w[name].T.contiguous()}),
        r"up_proj as \(48, 32\). Got \(32, 48\) instead",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_weights_that_do_not_fit(tmp_path, kind):
    model = llama()
    weights = weights_of(model)
    spoil, sentence = UNFIT[kind]
    spoil(weights, "model.layers.0.mlp.up_proj")
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=sentence):
        perplexity.apply_weights(model, tmp_path / "weights.safetensors")


def test_weights_that_cannot_be_read(tmp_path):
    for content in (None, b"nothing"):
        if content:
            (tmp_path / "weights.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="weights.safetensors cannot be read"):
            perplexity.apply_weights(llama(), tmp_path / "weights.safetensors")
