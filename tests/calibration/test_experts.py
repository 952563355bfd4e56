"""Mixtures of experts: each expert's Gram is that of the tokens routed to it, found here by brute force in float64."""

from __future__ import annotations

import json
from functools import cache

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.calibrate import shared, write_gram
from layerwise.calibration.gram_store import read_block, read_index
from layerwise.calibration.tap_statistics import SAMPLE_ROWS, RoutedStatistics, TapStatistics
from layerwise.compression.score import output_error
from layerwise.contract.layer import Layer
from layerwise.contract.target import Target
from layerwise.evaluation.perplexity import apply_weights
from layerwise.export import audit, save
from layerwise.export.save import load_packed
from layerwise.models.loading import EXPERTS, load
from layerwise.models.structure import Blocks, is_experts, linears, model_linears
from layerwise.runtime.errors import InputError
from tests.compression.test_cell import SAMPLES, TWO_OF_FOUR, Case
from tests.support.model_families import EXPERT, FAMILIES, HIDDEN, LENGTH, build, tokens

torch.set_num_threads(1)
SEQUENCES = 5
MIXTURES = [name for name, family in FAMILIES.items() if any(".experts." in tap for tap in family.taps)]
every_mixture = pytest.mark.parametrize("family", MIXTURES)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


def seen_by_experts(model, sequences: int = SEQUENCES) -> list[tuple[str, torch.nn.Module, Tensor, Tensor]]:
    """Of each experts' module: name, itself, what enters [tokens, hidden], and the experts chosen [tokens, k]."""
    found = []
    for name, module in model.named_modules():
        if is_experts(module):

            def keep(module, args, name=name):
                found.append(
                    (name, module, args[0].reshape(-1, HIDDEN).clone(), args[1].reshape(-1, args[1].shape[-1]))
                )

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=tokens(sequences), use_cache=False)
    return found


def activation(module, expert: int, x: Tensor) -> Tensor:
    """[tokens, intermediate] float64, what enters an expert's second product, from the papers' formulas."""
    first = module.gate_up_proj[expert].double()
    if module.is_transposed:  # GPT-OSS: gate and up take turns, with biases and limits
        product = x @ first + module.gate_up_proj_bias[expert].double()
        gate, up = product[:, ::2].clamp(max=module.limit), product[:, 1::2].clamp(-module.limit, module.limit)
        return (up + 1) * gate * torch.sigmoid(module.alpha * gate)
    gate, up = linear(x, first).chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


@cache
def calibrated(family: str, batch: int | None = 2, sequences: int = SEQUENCES):
    return list(shared(Stream(build(family), tokens(sequences), batch)))


def truth(x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Gram, mean, absmean and variance within sequences, weighted by their tokens, of rows x of these positions."""
    variance = torch.zeros(x.shape[1], dtype=torch.float64)
    for sequence in (positions // LENGTH).unique():
        own = x[positions // LENGTH == sequence]
        variance += len(own) * own.var(0, correction=0) / len(x)
    return x.T @ x / len(x), x.mean(0), x.abs().mean(0), variance


@every_mixture
def test_an_experts_gram_is_that_of_its_routed_tokens(family):
    taps = {layer: tap for block in calibrated(family) for tap in block for layer in tap.layers}
    assert {tap.scope for tap in taps.values()} == {"all", "routed"}
    checked = 0
    for name, module, hidden, chosen in seen_by_experts(build(family)):
        for expert in range(4):
            positions = (chosen == expert).any(1).nonzero()[:, 0]
            x = hidden[positions].double()
            for kind, inputs in (("gate_up_proj", x), ("down_proj", activation(module, expert, x))):
                tap = taps[f"{name}.{expert}.{kind}"]
                assert tap.gram.tokens == len(x) and tap.statistics.length == LENGTH
                found = tap.statistics
                fields = (tap.gram.matrix, found.mean, found.absmean, found.sequence_variance)
                for one, other in zip(fields, truth(inputs, positions), strict=True):
                    close(one, other)
                assert torch.equal(tap.gram.matrix, tap.gram.matrix.T)
                close(found.sample, inputs)  # in the order of the text
                checked += 1
    assert checked == 2 * 4 * 2


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_batches_do_not_change_an_experts_statistics(family):
    for whole, split in zip(calibrated(family, SEQUENCES), calibrated(family, 1), strict=True):
        for one, other in zip(whole, split, strict=True):
            assert (one.name, one.scope, one.gram.tokens) == (other.name, other.scope, other.gram.tokens)
            close(other.gram.matrix, one.gram.matrix, 2e-6)
            for field in ("mean", "absmean", "sequence_variance", "sample"):
                close(getattr(other.statistics, field), getattr(one.statistics, field), 2e-6)


# ------------------------------------------------------------------------------------------------- too few tokens


def starved(family: str = "qwen3_moe"):
    """A model that routes no token to expert 3, and hardly one to expert 1."""
    model = build(family)
    for layer in model.model.layers:
        layer.mlp.gate.weight[3] = 0
        layer.mlp.gate.weight[1] = 0.5 * layer.mlp.gate.weight[0]
        layer.mlp.gate.top_k = 1
    return model


def test_experts_with_too_few_tokens_see_all_of_them(capsys):
    expected = {name: (module, hidden, chosen) for name, module, hidden, chosen in seen_by_experts(starved())}
    blocks = list(shared(Stream(starved(), tokens(SEQUENCES), 2)))
    taps = {layer: tap for block in blocks for tap in block for layer in tap.layers}
    scopes = set()
    for name, (module, hidden, chosen) in expected.items():
        for expert in range(4):
            routed = (chosen == expert).any(1).nonzero()[:, 0]
            for kind in ("gate_up_proj", "down_proj"):
                tap = taps[f"{name}.{expert}.{kind}"]
                inputs = module.get_parameter(kind).shape[2]
                positions = routed if len(routed) >= inputs else torch.arange(len(hidden))
                assert tap.scope == ("routed" if len(routed) >= inputs else "fallback")
                assert tap.gram.tokens == len(positions)
                x = hidden[positions].double()
                x = x if kind == "gate_up_proj" else activation(module, expert, x)
                found = tap.statistics
                fields = (tap.gram.matrix, found.mean, found.absmean, found.sequence_variance)
                for one, other in zip(fields, truth(x, positions), strict=True):
                    close(one, other)
                scopes.add((kind, tap.scope))
    assert len(scopes) == 4  # each kind both ways
    first, second = (taps[f"model.layers.0.mlp.experts.{expert}.gate_up_proj"] for expert in (1, 3))
    assert first is second and first.name == "mlp.experts.gate_up_proj"  # one Gram for what all would see
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("model.layers.0: ")
    assert "of 4 experts were routed fewer tokens than one of their layers has inputs" in lines[0]


def test_the_outputs_are_those_of_the_routing_though_some_experts_saw_all():
    model = starved()
    stream = Stream(model, tokens(SEQUENCES), SEQUENCES)
    for index in range(2):
        stream.collect(index, advance=True)
    final = []
    model.model.layers[1].register_forward_hook(lambda _, args, output: final.append(output))
    model(input_ids=tokens(SEQUENCES), use_cache=False)
    assert torch.equal(stream.inputs[0], final[0] if isinstance(final[0], Tensor) else final[0][0])


# ------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("length", [1, 7, 100, 5000])
def test_an_expert_that_sees_every_token_has_the_statistics_of_a_layer(length):
    x = 10 + torch.randn(3, length, 6)
    every, routed = TapStatistics(6, 3, length), RoutedStatistics(6, length, torch.full((6, 6), torch.nan))
    every.update(x)
    for sequence in x:
        routed.update(sequence)
    (gram, statistics), (own, found) = every.finish(), routed.finish()
    assert own.tokens == gram.tokens
    close(own.matrix, gram.matrix, 1e-6)
    for field in ("mean", "absmean", "sequence_variance"):
        close(getattr(found, field), getattr(statistics, field), 1e-6)


@pytest.mark.parametrize("parts", [[5, 1, 300], [1] * 600, [2000, 3], [513]])
def test_the_sample_of_unknown_many_tokens_is_evenly_spaced(parts):
    x = torch.arange(sum(parts), dtype=torch.float32)[:, None]
    statistics = RoutedStatistics(1, 4096, torch.zeros(1, 1))
    for part in x.split(parts):
        statistics.update(part)
    rows = statistics.finish()[1].sample[:, 0]
    assert min(len(x), SAMPLE_ROWS // 2) <= len(rows) <= SAMPLE_ROWS
    assert rows[0] == 0 and len(rows.diff().unique()) <= 1 and len(x) - rows[-1] <= max(1, rows[1])


# ---------------------------------------------------------------------------------------------------------- errors


def test_unseen_products_are_reported():
    model = build("mixtral")
    model.set_experts_implementation("batched_mm")
    with pytest.raises(InputError, match=r"Got \d+ tokens too few of a batch in model.layers.0.mlp.experts.0."):
        Stream(model, tokens(2)).collect(0)


def test_an_expert_that_is_given_other_tokens_is_named(monkeypatch):
    model = build("mixtral")
    module = model.model.layers[0].mlp.experts
    own = type(module).forward

    def doubled(self, hidden_states, top_k_index, top_k_weights):
        return own(self, 2 * hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(type(module), "forward", doubled)
    with pytest.raises(InputError, match="experts.0.gate_up_proj does not receive the tokens routed to it"):
        Stream(model, tokens(2)).collect(0)


def test_activations_that_are_not_finite_name_the_expert():
    model = build("mixtral")
    model.model.layers[0].mlp.experts.gate_up_proj[2] *= float("inf")
    with pytest.raises(
        InputError,
        match="act_fn has NaN or Inf in float32, and so have the inputs of .*layers.0.mlp.experts.2.down_proj",
    ):
        Stream(model, tokens(SEQUENCES)).collect(0)


def test_stacks_of_weights_in_another_layout_are_refused():
    block = torch.nn.Module()
    block.mix = torch.nn.Conv1d(4, 4, 3)
    assert linears(block, "block") == []
    block.experts = torch.nn.Module()
    block.experts.weight = torch.nn.Parameter(torch.zeros(4, 8, 8))
    with pytest.raises(InputError, match="Module of block keeps weight with three dimensions"):
        linears(block, "block")


def test_blocks_with_most_weights_outside_known_layers_are_refused():
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 96, "max_seq_len": 64}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    ffn = {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}
    config = AutoConfig.for_model("dbrx", **sizes, attn_config=attention, ffn_config=ffn)
    with pytest.raises(InputError, match=r"Most weights of transformer.blocks.0 are in no linear layer"):
        model_linears(AutoModelForCausalLM.from_config(config))


# --------------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("name", ["gate", "router.proj", "gate.wg", "router.gate"])
def test_routers_are_no_layers_however_deep_they_are(name):
    block = build("mixtral").model.layers[0]
    outer, _, inner = name.rpartition(".")
    router = torch.nn.Linear(HIDDEN, 4)
    block.mlp.gate = torch.nn.Identity()
    if outer:
        setattr(block.mlp, outer, torch.nn.Module())
        setattr(block.mlp.get_submodule(outer), inner, router)
    else:
        setattr(block.mlp, inner, router)
    assert len(linears(block, "block")) == 4 + 2 * 4


@every_mixture
def test_layers_are_found_without_their_weights(family):
    model = build(family)
    found = {name: layer.shape for name, layer in model_linears(model).items()}
    model.to("meta")  # pyright: ignore[reportArgumentType]: the type of what wraps `to` has no self
    assert {name: layer.shape for name, layer in model_linears(model).items()} == found
    assert not any("router" in name or name.endswith(".gate") for name in found)


@every_mixture
def test_an_experts_weight_is_out_by_in_whichever_way_it_is_stored(family):
    for layer in (layer for layer in model_linears(build(family)).values() if layer.expert is not None):
        stored = layer.module.get_parameter(layer.parameter)[layer.expert]
        assert torch.equal(layer.weight(), stored.T if family == "gpt_oss" else stored)
        assert layer.shape == ((2 * EXPERT, HIDDEN) if layer.parameter == "gate_up_proj" else (HIDDEN, EXPERT))


def test_an_expert_is_written_alone_and_gates_are_left_alone():
    model = build("qwen2_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = model_linears(model)
    assert not any("gate" in name.rpartition(".")[2] and "proj" not in name for name in layers)
    layer = layers["model.layers.1.mlp.experts.2.down_proj"]
    assert layer.shape == (HIDDEN, EXPERT) and torch.equal(layer.weight(), layer.module.get_parameter("down_proj")[2])
    layer.replace(torch.zeros(layer.shape))
    stored = "model.layers.1.mlp.experts.down_proj"
    before[stored][2] = 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ones = torch.ones_like(layer.module.get_parameter("down_proj"))
    layer.module.down_proj = torch.nn.Parameter(ones, requires_grad=False)
    assert bool((layer.weight() == 1).all())  # the parameter of now


# ------------------------------------------------------------------------------------------------------------ store


def test_the_store_keeps_tokens_and_scope_of_each_tap(tmp_path):
    expected = list(shared(Stream(starved(), tokens(SEQUENCES))))
    write_gram(tmp_path / "gram", Blocks(starved()), tokens(SEQUENCES), {})
    for index, taps in enumerate(expected):
        for one, other in zip(read_block(tmp_path / "gram", index), taps, strict=True):
            assert (one.name, one.layers, one.scope) == (other.name, other.layers, other.scope)
            assert one.gram.tokens == other.gram.tokens and torch.equal(one.gram.matrix, other.gram.matrix)
    said = read_index(tmp_path / "gram")["blocks"][0]["mlp.experts.gate_up_proj"]
    assert (said["tokens"], said["scope"]) == (SEQUENCES * LENGTH, "fallback")


# ------------------------------------------------------------------------------------------------- cells and exports


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2), use_cache=False).logits


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def case(request, tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("experts"), request.param).prepare()


@pytest.mark.parametrize("mode", ["shared", "sequential"])
def test_a_cell_compresses_experts_and_says_on_which_tokens(case, mode):
    cell = case.run("sparsegpt", TWO_OF_FOUR, mode)
    table = {row["layer"]: row for row in pq.read_table(cell / "layers.parquet").to_pylist()}
    model = load(case.spec)
    assert table.keys() == model_linears(model).keys()
    assert {row["token_scope"] for row in table.values()} == {"all", "routed"}
    for name, row in table.items():
        assert row["achieved_sparsity"] == pytest.approx(0.5, abs=0.01) and 0 < row["output_error"] < 1
        if "expert" not in name:
            assert row["calibration_tokens"] == SAMPLES * LENGTH
    first = [row for name, row in table.items() if "layers.0.mlp.experts" in name and row["kind"] == "gate_up_proj"]
    assert sum(row["calibration_tokens"] for row in first) == 3 * SAMPLES * LENGTH  # experts per token
    apply_weights(model, cell / "weights.safetensors")
    if mode == "sequential":  # the second block's Grams are those of the compressed first
        half, compressed = load(case.spec), model_linears(model)
        for name, layer in model_linears(half).items():
            if ".layers.0." in name:
                layer.replace(compressed[name].weight())
        stream = Stream(half, tokens(SAMPLES, LENGTH))
        stream.advance(0)
        for layer, gram in ((layer, tap.gram) for tap in stream.collect(1) for layer in tap.layers):
            own = Layer(layer, model_linears(half)[layer].weight(), gram)
            error = output_error(own, compressed[layer].weight())[0]
            assert table[layer]["absolute_error"] == pytest.approx(error, rel=1e-6)


def test_an_export_gives_the_same_logits(case, tmp_path):
    cell = case.run("wanda", TWO_OF_FOUR)
    model = load(case.spec)
    apply_weights(model, cell / "weights.safetensors")
    for form in ("dense", "packed"):
        save.main(["--cell", str(cell), "--format", form, "--out", str(tmp_path / form)])
        assert not [line for line in audit.audit(tmp_path / form)[2] if line.fault]
    expected = logits(model)
    assert torch.equal(logits(load_packed(tmp_path / "packed")), expected)
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", experts_implementation=EXPERTS)
    assert torch.equal(logits(own.eval()), expected)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()), expected)
    names = load_file(tmp_path / "dense/model.safetensors").keys()
    stored = any(name.endswith(".block_sparse_moe.experts.3.w2.weight") for name in names)  # as on the hub
    assert stored == (case.family == "mixtral")


def test_experts_are_not_written_as_compressed_tensors(case, tmp_path):
    cell = case.run("rtn", Target(bits=4, group=8))
    with pytest.raises(InputError, match=r"Experts is not a torch Linear; use --format packed or dense"):
        save.export(cell, "compressed-tensors", tmp_path / "out")


def test_experts_are_tuned(tmp_path):
    case = Case(tmp_path, "qwen3_moe").prepare()
    stages = {"blocks": {"epochs": 1, "batch": 2, "weights": 1e-3, "grid": 1e-3}}
    cell = case.run("rtn", Target(bits=4, group=8), tune=stages)
    history = json.loads((cell / "cell.json").read_text("utf-8"))["tuning"]
    assert len(history) == 2 and all(record["after"] < record["before"] for record in history)
