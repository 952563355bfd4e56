"""Calibration: block by block it is the model's own forward pass, and its statistics are those of plain hooks."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from layerwise.calibration import block_stream, calibrate, gram_store
from layerwise.calibration.block_calls import capture, same, without_cache
from layerwise.calibration.block_stream import PROBE, Stream
from layerwise.calibration.calibrate import shared, write_gram
from layerwise.calibration.gram_store import read_block, read_index
from layerwise.calibration.tap_statistics import TapStatistics
from layerwise.models.loading import load
from layerwise.models.structure import Blocks, Linear, find_blocks, linears
from layerwise.numerics import dispatch
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import digest_of
from layerwise.sources import fingerprint
from tests.support.model_families import FAMILIES, HIDDEN, LENGTH, VOCABULARY, build, tokens
from tests.support.typing_helpers import some

torch.set_num_threads(1)
every_family = pytest.mark.parametrize("family", FAMILIES)
SEQUENCES = 5  # in batches of two, the last is shorter than the others
FIELDS = ("mean", "absmean", "sequence_variance", "sample", "first_tokens")


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to the tolerance relative to the largest entry."""
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


def ordinary(block, prefix="") -> list[Linear]:
    """A block's linear layers that see every token, which an expert's do not (test_experts.py)."""
    return [layer for layer in linears(block, prefix) if layer.expert is None]


def forward(model, sequences=SEQUENCES) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Output of the last block, input [sequences, length, in] of each linear layer, and logits, by ordinary hooks."""
    name, blocks = find_blocks(model)
    final: list[Any] = []
    inputs: dict[str, Tensor] = {}
    handles = [blocks[-1].register_forward_hook(lambda _, args, out: final.append(out))]
    for index, block in enumerate(blocks):
        for layer in ordinary(block, f"{name}.{index}"):

            def keep(_, args, out, name=layer.name):
                inputs[name] = args[0].detach().clone().reshape(sequences, LENGTH, -1)

            handles.append(layer.module.register_forward_hook(keep))
    with torch.no_grad():
        logits = model(input_ids=tokens(sequences), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return (final[0] if isinstance(final[0], Tensor) else final[0][0]), inputs, logits


# ---------------------------------------------------------------------------------------------------- block by block


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_walk_is_the_models_own_forward_pass(family, dtype):
    model = build(family, dtype=dtype)
    final, _, logits = forward(model)
    for sequences_per_batch in (SEQUENCES, 2):
        stream = Stream(model, tokens(SEQUENCES), sequences_per_batch)
        for index, block in enumerate(stream.blocks):
            stream.collect(index)
            for layer in linears(block, stream.name):
                layer.replace(layer.weight())
            stream.advance(index)
        assert stream.inputs[0].dtype == dtype
        if sequences_per_batch == SEQUENCES:
            assert torch.equal(stream.inputs[0], final)
        close(torch.cat(list(stream.inputs)), final, 1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(forward(model)[2], logits)


@every_family
def test_blocks_changed_on_the_way_give_the_changed_models_states(family):
    model = build(family)
    stream = Stream(model, tokens(SEQUENCES), SEQUENCES)
    for index, block in enumerate(stream.blocks):
        stream.collect(index)
        for layer in linears(block, stream.name):
            weight = layer.weight()
            layer.replace(weight * (weight.abs() > weight.abs().median()))
        stream.advance(index)
    assert torch.equal(stream.inputs[0], forward(model)[0])


@every_family
def test_no_cache_is_ever_replayed(family):
    model = build(family)
    model.config.use_cache = True
    for calls in Stream(model, tokens(SEQUENCES), 2)._calls:
        for call in calls:
            assert not any(isinstance(value, Cache) for value in (*call.args, *call.kwargs.values()))
    assert without_cache(DynamicCache()) is None


def test_hidden_states_may_come_as_a_keyword():
    model = build("llama")
    expected = forward(model)[0]
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: ((), {**kwargs, "hidden_states": args[0]} if args else kwargs), with_kwargs=True
        )
    stream = Stream(model, tokens(SEQUENCES))
    list(shared(stream))
    assert torch.equal(stream.inputs[0], expected)


def test_a_block_that_writes_into_its_input_leaves_the_stream_alone(monkeypatch):
    model = build("llama")
    first = model.model.layers[0]
    original = first.forward

    def forward_and_write(hidden_states, **kwargs):
        output = original(hidden_states, **kwargs)
        hidden_states.zero_()
        return output

    monkeypatch.setattr(first, "forward", forward_and_write)
    stream = Stream(model, tokens(SEQUENCES))
    assert torch.equal(stream.inputs[0], model.get_input_embeddings()(tokens(SEQUENCES)))
    again = Stream(model, tokens(SEQUENCES))
    again.collect(0, advance=True)
    stream.collect(0)
    stream.advance(0)
    assert torch.equal(stream.inputs[0], again.inputs[0])


def test_states_passed_beside_the_hidden_ones_are_refused():
    model = build("llama")
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "first": args[0]}), with_kwargs=True
    )
    with pytest.raises(InputError, match="must pass only hidden_states from block to block"):
        Stream(model, tokens(4), 2)


class Residual(nn.Module):
    """A block that hands the next something made of its hidden states, as value residuals and shared keys are."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden, first=None, **kwargs):
        output = self.block(hidden if first is None else hidden + first, **kwargs)
        return output, (0.5 * hidden if first is None else first)


class Residuals(nn.Module):
    """A model of such blocks."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model.model, model.config
        self.layers = nn.ModuleList(map(Residual, model.model.layers))
        del self.model.layers

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(self, input_ids, use_cache):
        hidden, first = self.model.embed_tokens(input_ids), None
        positions = self.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for block in self.layers:
            hidden, first = block(hidden, first, position_embeddings=positions, attention_mask=None)


def test_states_that_blocks_return_beside_the_hidden_ones_are_refused():
    with pytest.raises(InputError, match="must pass only hidden_states from block to block"):
        Stream(cast(PreTrainedModel, Residuals(build("llama"))), tokens(4), 2)


@every_family
def test_calls_are_those_of_a_whole_pass_though_no_block_is_run(family, monkeypatch):
    model = build(family)
    with torch.no_grad():
        whole = capture(model, list(find_blocks(model)[1]), tokens(SEQUENCES))
    blocks = []
    for block in find_blocks(model)[1]:
        monkeypatch.setattr(block, "forward", recorded(block.forward, blocks))
    stream = Stream(model, tokens(SEQUENCES), SEQUENCES)
    assert same(stream._calls[0], whole.calls) and torch.equal(stream.inputs[0], whole.hidden)
    assert max(blocks) == PROBE  # tokens
    assert forward(model)[2].isfinite().all() and max(blocks) == LENGTH  # now they run again


def recorded(run, lengths):
    def forward(*args, **kwargs):
        lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1])
        return run(*args, **kwargs)

    return forward


def test_batches_fill_what_they_may_take(monkeypatch):
    model = build("llama")
    widest = max(max(layer.shape) for layer in linears(model.model.layers[0], ""))
    monkeypatch.setitem(block_stream.BATCH_BYTES, "cpu", 3 * LENGTH * widest * 4 + 1)
    assert [len(batch) for batch in Stream(model, tokens(7)).inputs] == [3, 3, 1]
    monkeypatch.setitem(block_stream.BATCH_BYTES, "cpu", 1)
    assert [len(batch) for batch in Stream(model, tokens(2)).inputs] == [1, 1]


def test_same_compares_down_to_the_values():
    call = {"mask": torch.ones(2, 2), "embeddings": (torch.zeros(3), torch.ones(3)), "flag": False, "none": None}
    again = {"mask": torch.ones(2, 2), "embeddings": (torch.zeros(3), torch.ones(3)), "flag": False, "none": None}
    assert same(call, again)
    assert not same(call, {**again, "flag": True})
    assert not same(call, {**again, "none": torch.ones(1)})
    assert not same(call, {**again, "mask": torch.ones(1, 2)})
    assert not same(call, {**again, "mask": torch.ones(2, 2, dtype=torch.bool)})
    assert not same(call, {**again, "embeddings": (torch.zeros(3), torch.zeros(3))})


# ------------------------------------------------------------------------------------------------------- statistics


@every_family
def test_statistics_are_those_of_hooks_on_each_layer(family):
    model = build(family)
    _, inputs, _ = forward(model)
    stream = Stream(model, tokens(SEQUENCES), 2)
    name, blocks = find_blocks(model)
    for index, taps in enumerate(shared(stream)):
        assert tuple(tap.name for tap in taps) == FAMILIES[family].taps
        layers = [layer for tap in taps for layer in tap.layers]
        assert sorted(layers) == sorted(layer.name for layer in linears(blocks[index], f"{name}.{index}"))
        for tap in taps:
            assert tap.gram.tokens == SEQUENCES * LENGTH or tap.scope == "routed"
            assert tap.statistics.length == LENGTH
            assert tuple(f"{name}.{index}.{inside}" for inside in tap.inside) == tap.layers
            for layer in tap.layers if tap.scope == "all" else ():
                x = inputs[layer].double()  # [sequences, length, in]
                flat = x.flatten(0, 1)
                close(tap.gram.matrix, flat.T @ flat / len(flat))
                close(tap.statistics.mean, flat.mean(0))
                close(tap.statistics.absmean, flat.abs().mean(0))
                close(tap.statistics.sequence_variance, x.var(1, correction=0).mean(0))
                close(tap.statistics.sample, flat)
                close(some(tap.statistics.first_tokens), x[:, 0])


@every_family
def test_an_output_that_is_not_needed_is_not_computed(family):
    """In sequential mode, from the second batch on: the taps are the other."""
    whole, cut = (Stream(build(family), tokens(SEQUENCES), 2) for _ in range(2))
    experts = any(layer.expert is not None for layer in linears(cut.blocks[0], ""))
    ended: list[int] = []
    cut.blocks[0].register_forward_hook(lambda *_: ended.append(0))
    for tap, other in zip(whole.collect(0, advance=True), cut.collect(0), strict=True):
        assert tap.layers == other.layers and torch.equal(tap.gram.matrix, other.gram.matrix)
        for field in FIELDS if tap.scope == "all" else FIELDS[:-1]:
            assert torch.equal(getattr(tap.statistics, field), getattr(other.statistics, field))
    assert len(ended) >= 3 if experts else len(ended) == 1
    cut.advance(0)
    assert all(map(torch.equal, cut.inputs, whole.inputs))


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom", "falcon_alibi", "opt"])
@pytest.mark.parametrize("batch", [1, 3])
def test_batches_do_not_change_the_statistics(family, batch):
    model = build(family)
    whole = shared(Stream(model, tokens(7)))
    split = shared(Stream(model, tokens(7), batch))
    for expected, actual in zip(whole, split, strict=True):
        for one, other in zip(expected, actual, strict=True):
            assert one.layers == other.layers
            close(other.gram.matrix, one.gram.matrix, 2e-6)
            for field in FIELDS:
                close(getattr(other.statistics, field), getattr(one.statistics, field), 2e-6)


@pytest.mark.parametrize("batch", [1, 4, 9])
@pytest.mark.parametrize("length", [1, 100, 171, 4096])
def test_accumulated_statistics_are_exact_and_the_sample_is_evenly_spaced(batch, length):
    x = 100 + torch.randn(9, length, 6)  # a large mean hides the variance from careless sums
    statistics = TapStatistics(6, 9, length)
    for part in x.split(batch):
        statistics.update(part)
    gram, found = statistics.finish()
    flat = x.double().flatten(0, 1)
    assert torch.equal(gram.matrix, gram.matrix.T)
    close(gram.matrix, flat.T @ flat / len(flat), 1e-6)
    close(found.mean, flat.mean(0), 1e-6)
    if length > 1:
        close(found.sequence_variance, x.double().var(1, correction=0).mean(0))
    stride = max(1, len(flat) // 512)
    assert torch.equal(found.sample, x.flatten(0, 1)[::stride][:512])
    assert torch.equal(some(found.first_tokens), x[:, 0])


def test_first_tokens_are_kept_of_as_many_sequences_as_rows_of_the_sample():
    x, statistics = torch.randn(600, 2, 3), TapStatistics(3, 600, 2)
    for part in x.split(7):
        statistics.update(part)
    assert torch.equal(some(statistics.finish()[1].first_tokens), x[:512, 0])


@pytest.mark.parametrize("features", [1, 63, 64, 200, 600])
@pytest.mark.parametrize("length", [1, 5, 40])
def test_both_paths_sum_alike(features, length):
    x = 3 + torch.randn(4, length, features)
    found = []
    for path in (nullcontext, dispatch.reference):
        with path():
            statistics = TapStatistics(features, 4, length)
            statistics.update(x)
            found.append(statistics.finish())
    for field in FIELDS:
        close(getattr(found[0][1], field), getattr(found[1][1], field), 1e-6)
    flat = x.double().flatten(0, 1)
    assert torch.equal(found[0][0].matrix, found[0][0].matrix.T)
    close(found[0][0].matrix, flat.T @ flat / len(flat), 1e-6)


def test_statistics_of_too_few_tokens_are_refused():
    statistics = TapStatistics(3, 2, 4)
    statistics.update(torch.ones(1, 4, 3))
    with pytest.raises(ValueError, match="must see 8 tokens. Got 4"):
        statistics.finish()


class Shift(nn.Module):
    """Adds to its input in place after a layer has seen it."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + self.second(x.add_(1))


def test_an_input_written_to_between_two_layers_is_two_taps():
    model = build("llama")
    layer = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = Shift(layer, layer.__class__(48, HIDDEN, bias=False).requires_grad_(False))
    taps = Stream(model, tokens(2)).collect(0)
    first, second = taps[-2:]
    assert (first.name, second.name) == ("first", "second")
    close(second.statistics.mean, first.statistics.mean + 1)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_module(value):
    model = build("llama")
    model.model.layers[1].post_attention_layernorm.weight[0] = value
    stream = Stream(model, tokens(3))
    stream.collect(0, advance=True)
    sentence = r"the output of model\.layers\.1\.post_attention_layernorm has NaN or Inf in float32\."
    with pytest.raises(InputError, match=sentence):
        stream.collect(1)


def test_activations_whose_squares_overflow_name_block_tap_and_layers():
    model = build("llama")
    block = model.model.layers[1]
    block.post_attention_layernorm.weight[0] = 1e25
    for layer in (block.mlp.gate_proj, block.mlp.up_proj):
        layer.weight[:, 0] = 0  # what comes out is ordinary
    stream = Stream(model, tokens(3))
    stream.collect(0, advance=True)
    with pytest.raises(InputError) as error:
        stream.collect(1)
    assert str(error.value).startswith("The activations of model.layers.1, tap gate_proj,up_proj, are not finite")
    assert "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj" in str(error.value)


class Halved(nn.Module):
    """Shows its layer part of the tokens only, as a mixture of experts does, or all of them in two parts."""

    def __init__(self, layer: nn.Module, parts: int) -> None:
        super().__init__()
        self.expert, self.parts = layer, parts

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.expert(part) for part in x.chunk(2)[: self.parts]]
        return torch.cat(seen if len(seen) == 2 else [*seen, torch.zeros_like(seen[0])])


@pytest.mark.parametrize("parts, seen", [(1, "48"), (2, "48 \\+ 48")])
def test_layers_that_do_not_see_every_token_once_are_named(parts, seen):
    model = build("llama")
    model.model.layers[0].mlp.up_proj = Halved(model.model.layers[0].mlp.up_proj, parts)
    with pytest.raises(InputError, match=f"Got {seen} of the 96 tokens of a batch in .*.up_proj.expert instead"):
        Stream(model, tokens(4)).collect(0)


def test_a_layer_that_is_never_called_is_named():
    model = build("llama")
    model.model.layers[0].mlp.spare = nn.Linear(4, 4)
    with pytest.raises(InputError, match="family are not supported: model.layers.0.mlp.spare was never called"):
        Stream(model, tokens(4)).collect(0)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (
            torch.full((2, 4), VOCABULARY),
            f"must be 0 to {VOCABULARY - 1}, which the model embeds. Got {VOCABULARY} to {VOCABULARY} instead",
        ),
        (torch.full((2, 4), -1), "Got -1 to -1 instead"),
        (torch.zeros(2, 65, dtype=torch.int64), "sequences must have at most 64 tokens for this model. Got 65 instead"),
        (torch.zeros(0, 4, dtype=torch.int64), "must be int32 or int64"),
        (torch.zeros(2, 4), "must be int32 or int64"),
    ],
)
def test_tokens_that_are_not_the_models_are_refused(wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        Stream(build("llama"), wrong)


# ------------------------------------------------------------------------------------------------------------ store


def assert_same_taps(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert (one.name, one.layers, one.inside) == (other.name, other.layers, other.inside)
        assert one.gram.tokens == other.gram.tokens and one.statistics.length == other.statistics.length
        assert torch.equal(one.gram.matrix, other.gram.matrix)
        assert all(torch.equal(getattr(one.statistics, field), getattr(other.statistics, field)) for field in FIELDS)


def calibrated(entry, folder, monkeypatch, *arguments, out="gram.json"):
    """The Grams of a calibration, as the workflow runs it, in the folder of stores `grams`."""
    monkeypatch.setenv("LAYERWISE_CACHE", str(folder / "grams"))
    if not (folder / "tokens.safetensors").exists():
        save_file({"tokens": tokens(SEQUENCES)}, folder / "tokens.safetensors", metadata={"info": "{}"})
    fingerprint.main(["--model", entry, "--out", str(folder / "model.json")])
    files = {"model": entry, "fingerprint": folder / "model.json", "tokens": folder / "tokens.safetensors"}
    given = [str(part) for name, value in files.items() for part in (f"--{name}", value)]
    calibrate.main([*given, "--out", str(folder / out), *arguments])
    return gram_store.store_of(folder / out)


def test_main_writes_what_the_walk_gives(tmp_path, monkeypatch):
    model = build("gpt2")
    model.save_pretrained(tmp_path / "model")
    entry = json.dumps({"name": "tiny", "path": str(tmp_path / "model"), "dtype": "float32"})
    gram = calibrated(entry, tmp_path, monkeypatch)
    expected = list(shared(Stream(model, tokens(SEQUENCES))))
    for index, taps in enumerate(expected):
        assert_same_taps(read_block(gram, index), taps)
    names = {"index.json", "users.txt", "block-000.safetensors", "block-001.safetensors"}
    assert {path.name for path in gram.iterdir()} == names
    assert [path.name for path in (tmp_path / "grams").iterdir()] == [gram.name]
    index = read_index(gram)
    assert (index["length"], len(index["blocks"])) == (LENGTH, 2)
    assert index["blocks"][1]["mlp.c_proj"] == {
        "layers": ["transformer.h.1.mlp.c_proj"],
        "inside": ["mlp.c_proj"],
        "in": 4 * HIDDEN,
        "tokens": SEQUENCES * LENGTH,
        "scope": "all",
    }


def test_a_calibration_has_its_own_dtype(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    entry = json.dumps({"name": "tiny", "path": str(tmp_path / "model"), "dtype": "float32"})
    gram = calibrated(entry, tmp_path, monkeypatch, "--dtype", "bfloat16")
    half = load({"path": str(tmp_path / "model"), "dtype": "bfloat16"})
    expected = shared(Stream(half, tokens(SEQUENCES)))
    for index, taps in enumerate(expected):
        assert_same_taps(list(read_block(gram, index)), taps)


def test_a_calibration_that_fails_leaves_no_store(tmp_path):
    model = build("llama")
    model.model.layers[0].input_layernorm.weight[0] = float("nan")
    with pytest.raises(InputError):
        write_gram(tmp_path / "gram", Blocks(model), tokens(2), {})
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_that_fails_goes_on_from_its_last_block(tmp_path, monkeypatch, capsys):
    model, run = build("llama"), []
    whole = tmp_path / "whole"
    write_gram(whole, Blocks(model), tokens(2), {})
    norm = model.model.layers[1].input_layernorm.weight
    sound = norm.clone()
    norm[0] = float("nan")
    for fingerprint_ in ({"code": 1}, {"code": 2}, {"code": 2}):
        with pytest.raises(InputError):
            write_gram(tmp_path / "gram", Blocks(model), tokens(2), fingerprint_)
    said = capsys.readouterr().err
    assert "1 finished blocks in" in said and "belong to another code: starting over." in said
    assert said.count("Resuming after 1 finished blocks.") == 1
    norm.copy_(sound)
    monkeypatch.setattr(model.model.layers[0], "forward", recorded(model.model.layers[0].forward, run))
    write_gram(tmp_path / "gram", Blocks(model), tokens(2), {"code": 2})
    assert max(run) == PROBE  # tokens: the block that was finished is only run to see what it returns
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["gram", "whole"]
    for path in whole.iterdir():
        assert (tmp_path / "gram" / path.name).read_bytes() == path.read_bytes()


def test_studies_share_the_grams_of_the_same_content(tmp_path, monkeypatch, capsys):
    build("llama").save_pretrained(tmp_path / "model")
    entry = json.dumps({"name": "tiny", "path": str(tmp_path / "model"), "dtype": "float32"})
    gram = calibrated(entry, tmp_path, monkeypatch)
    again = calibrated(entry.replace("tiny", "renamed"), tmp_path, monkeypatch, out="other.json")
    said = f"The same Grams already exist: {gram} (layers by token_scope: 14 all)"
    assert again == gram and said in capsys.readouterr().err
    code = tmp_path / digest_of([__file__])
    code.write_text(json.dumps([__file__]))
    assert calibrated(entry, tmp_path, monkeypatch, "--code", str(code)) != gram
    code.rename(tmp_path / "before")
    with pytest.raises(InputError, match="The code was edited since this run began: run again"):
        calibrated(entry, tmp_path, monkeypatch, "--code", str(tmp_path / "before"))
    assert len(list((tmp_path / "grams").iterdir())) == 2


def test_other_tokens_in_the_same_place_have_grams_of_their_own(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    entry = json.dumps({"name": "tiny", "path": str(tmp_path / "model"), "dtype": "float32"})
    before = calibrated(entry, tmp_path, monkeypatch)
    others = tokens(SEQUENCES).flip(0, 1)
    save_file({"tokens": others.contiguous()}, tmp_path / "tokens.safetensors", metadata={"info": "{}"})
    after = calibrated(entry, tmp_path, monkeypatch, out="other.json")
    grams_of = [next(read_block(folder, 1)).gram.matrix for folder in (before, after)]
    assert before != after and not torch.equal(*grams_of)


def test_removed_grams_are_reported(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path / "model")
    entry = json.dumps({"name": "tiny", "path": str(tmp_path / "model"), "dtype": "float32"})
    shutil.rmtree(calibrated(entry, tmp_path, monkeypatch))
    with pytest.raises(InputError, match="Grams of .*gram.json are no longer at .*: run again to compute"):
        gram_store.store_of(tmp_path / "gram.json")
    assert not (tmp_path / "gram.json").exists()  # so that it does


def test_an_absent_or_damaged_store_is_refused(tmp_path):
    with pytest.raises(InputError, match="have no index.json"):
        list(read_block(tmp_path / "gram", 0))
    write_gram(tmp_path / "gram", Blocks(build("llama")), tokens(2), {})
    path = tmp_path / "gram" / "block-001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert len(list(read_block(tmp_path / "gram", 0))) == 4
    with pytest.raises(InputError, match="Gram file block-001.safetensors .* cannot be read"):
        list(read_block(tmp_path / "gram", 1))
