"""Sequential mode with a dense stream: the cross-Gram against float64 products of what hooks see in both models."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.calibrate import shared
from layerwise.calibration.modes import sequential_blocks
from layerwise.calibration.taps import Tap
from layerwise.contract.gram import Gram
from layerwise.contract.second_moment import RUN, CrossMoment
from layerwise.models.structure import find_blocks, linears
from layerwise.runtime.errors import InputError
from tests.calibration.test_calibrate import SEQUENCES, close, forward
from tests.support.model_families import build, tokens

FAMILIES = ("llama", "gpt2", "gemma3", "bloom")


def compress(block: torch.nn.Module, name: str, only: Sequence[str] | None = None) -> None:
    """Change the weights of a block, or of some of its layers, by what few bits would."""
    for layer in linears(block, name):
        if only is None or layer.name in only:
            weight = layer.weight()
            step = weight.abs().max() / 3
            layer.replace(step * torch.round(weight / step))


def walk(model, renewed: bool = False, **settings) -> list[list[Tap]]:
    """The taps of each block, which is compressed before the next."""
    stream = Stream(model, tokens(SEQUENCES), **settings)
    found = []
    for index, taps in sequential_blocks(stream, renewed=renewed):
        found.append(list(taps))
        compress(stream.blocks[index], stream.name)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", ["in memory", "in files"])
def test_the_cross_gram_is_that_of_both_models(family: str, kept: str, tmp_path: Path):
    dense = build(family)
    model, at_work = deepcopy(dense), deepcopy(dense)
    folder = tmp_path / "states" if kept == "in files" else None
    _, originals, _ = forward(dense.double())
    name, blocks = find_blocks(at_work.double())
    for index, taps in enumerate(walk(model, sequences_per_batch=2, folder=folder, beside=True)):
        _, seen, _ = forward(at_work)  # whose blocks before this one are compressed
        compress(blocks[index], name)
        for tap in taps:
            x0, x = (inputs[tap.layers[0]].flatten(0, -2) for inputs in (originals, seen))
            close(tap.gram.matrix, x.T @ x / len(x))
            close(tap.gram.cross, x0.T @ x / len(x))  # row: input in the dense model, column: in the compressed one
            close(tap.gram.dense, x0.T @ x0 / len(x))
            assert tap.gram.apart == (index > 0)  # nothing is compressed before the first block, and nothing copied
            if index:
                assert float((x0 - x).norm() / x0.norm()) > 0.01
                assert not torch.equal(tap.gram.cross, tap.gram.cross.T)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", ["in memory", "in files"])
def test_each_tap_sees_what_compressed_layers_before_it_pass_on(family: str, kept: str, tmp_path: Path):
    dense = build(family)
    model, at_work = deepcopy(dense), deepcopy(dense)
    _, originals, _ = forward(dense.double())
    name, blocks = find_blocks(at_work.double())
    folder = tmp_path / "states" if kept == "in files" else None
    stream = Stream(model, tokens(SEQUENCES), sequences_per_batch=2, folder=folder, beside=True)
    layers = set()
    for index, taps in sequential_blocks(stream, renewed=True):
        for number, tap in enumerate(taps):
            assert torch.is_grad_enabled()  # a method or its tuning may need gradients
            _, seen, _ = forward(at_work)  # whose layers before this tap are compressed
            x0, x = (inputs[tap.layers[0]].flatten(0, -2) for inputs in (originals, seen))
            close(tap.gram.matrix, x.T @ x / len(x))
            close(tap.gram.cross, x0.T @ x / len(x))
            close(tap.gram.dense, x0.T @ x0 / len(x))
            assert tap.gram.apart == (index + number > 0)
            if index + number:
                assert float((x0 - x).norm() / x0.norm()) > 0.01
            compress(stream.blocks[index], f"{name}.{index}", tap.layers)
            compress(blocks[index], f"{name}.{index}", tap.layers)
            layers |= set(tap.layers)
    assert layers == {layer.name for index, block in enumerate(blocks) for layer in linears(block, f"{name}.{index}")}


def test_without_changes_inside_a_block_each_tap_is_as_all_at_once():
    for one, other in zip(*(walk(build("llama"), renewed, beside=True) for renewed in (False, True)), strict=True):
        assert [tap.name for tap in one] == [tap.name for tap in other]
        for tap, same in zip(one, other, strict=True):
            assert torch.equal(tap.gram.matrix, same.gram.matrix)
            close(tap.gram.cross, same.gram.cross)
            assert torch.equal(tap.statistics.sample, same.statistics.sample)


def test_a_dense_stream_changes_nothing_else():
    alone, beside = (walk(build("llama"), sequences_per_batch=2, beside=own) for own in (False, True))
    for one, other in zip(alone, beside, strict=True):
        for tap, same in zip(one, other, strict=True):
            assert torch.equal(tap.gram.matrix, same.gram.matrix)
            assert torch.equal(tap.statistics.absmean, same.statistics.absmean)


def test_only_grams_of_the_dense_model_know_the_dense_inputs_without_it():
    first, second = walk(build("llama"))
    assert all(tap.gram.knows_dense and tap.gram.cross is tap.gram.matrix for tap in first)
    for tap in second:
        assert not tap.gram.knows_dense
        with pytest.raises(ValueError, match="cross_gram"):
            _ = tap.gram.cross
    for taps in shared(Stream(build("llama"), tokens(SEQUENCES))):
        assert all(tap.gram.cross is tap.gram.matrix and tap.gram.dense is tap.gram.matrix for tap in taps)


@pytest.mark.parametrize("renewed", [False, True])
def test_it_goes_on_from_a_folder(renewed: bool, tmp_path: Path):
    """As after a death: the blocks before are done, and their weights are asked for no more."""
    model = build("gemma3")  # three blocks
    whole = walk(deepcopy(model), renewed, beside=True)
    stream = Stream(deepcopy(model), tokens(SEQUENCES), folder=tmp_path, beside=True)
    for index, taps in sequential_blocks(stream, renewed=renewed):
        list(taps)
        if index == 1:
            break
        compress(stream.blocks[index], stream.name)
    again = Stream(model, tokens(SEQUENCES), folder=tmp_path, start=1, beside=True)
    for index, taps in sequential_blocks(again, start=1, renewed=renewed):
        for tap, expected in zip(list(taps), whole[index], strict=True):
            assert torch.equal(tap.gram.matrix, expected.gram.matrix)
            assert torch.equal(tap.gram.cross, expected.gram.cross)
            assert torch.equal(tap.gram.dense, expected.gram.dense)
        compress(again.blocks[index], again.name)


def test_experts_are_refused_before_anything_is_computed():
    with pytest.raises(InputError) as refused:
        Stream(build("qwen3_moe"), tokens(2), beside=True)
    assert str(refused.value).startswith("The cross-Gram must be of layers that see the same tokens")
    assert ".mlp.experts.0." in str(refused.value)


@pytest.mark.parametrize("features", [1, 63, 300])
def test_the_moment_of_two_inputs_is_exact_however_it_is_batched(features: int):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, RUN + 700, features, generator=generator)
    for batch in (500, 5000):
        moment = CrossMoment(features)
        for part, other in zip(x.split(batch), y.split(batch), strict=True):
            moment.update(other, part)
        close(moment.finish(), y.double().T @ x.double() / len(x), 1e-6)


def plain(x: Tensor, other: Tensor) -> Tensor:
    return other.double().flatten(0, -2).T @ x.double().flatten(0, -2) / x[..., 0].numel()


def test_from_inputs_of_both_models():
    generator = torch.Generator().manual_seed(0)
    x, x0 = torch.randn(2, 4, 50, 12, generator=generator)
    gram = Gram.from_inputs(x, dense_inputs=x0)
    close(gram.cross, plain(x, x0))
    close(gram.dense, plain(x0, x0))
    assert torch.equal(gram.matrix, Gram.from_inputs(x).matrix)
    order, ordered = gram.descending()
    assert torch.equal(ordered.cross, gram.cross[order][:, order]) and ordered.apart
    alone = Gram(gram.matrix, 200, drifted=True).descending()[1]
    assert not alone.knows_dense


X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("given", "sentence"),
    {
        "another shape": (torch.ones(4, 2), "dense_inputs must be [4, 3] on cpu, like x. Got [4, 2] on cpu instead."),
        "no tensor": ([1.0], "dense_inputs must be a tensor [tokens, in] or [..., in] that is not empty. Got list"),
        "integers": (X.long(), "dense_inputs must be floating point. Got torch.int64 instead."),
        "not finite": (
            X / 0,
            "dense_inputs must be finite, and so must its squares in float32. Got NaN or Inf instead.",
        ),
    }.values(),
)
def test_bad_dense_inputs_are_one_sentence(given: object, sentence: str):
    with pytest.raises(ValueError) as refused:
        Gram.from_inputs(X, dense_inputs=given)  # pyright: ignore[reportArgumentType]
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize("tokens", [0, -3, "a", 2.5, True, None])
def test_tokens_of_a_gram_are_a_number_of_at_least_one(tokens: Any):
    with pytest.raises(ValueError) as refused:
        Gram(torch.eye(3), tokens)
    assert str(refused.value) == f"tokens must be a whole number, at least 1. Got {tokens!r} instead."


def test_a_gram_is_printed_as_its_size():
    eye: Any = torch.eye(3)
    assert repr(Gram(eye, torch.tensor(5))) == "Gram(3 inputs, 5 tokens, float32)"  # pyright: ignore[reportArgumentType]
    assert repr(Gram(eye, 5, drifted=True)) == "Gram(3 inputs, 5 tokens, float32, drifted)"
    assert repr(Gram(eye, 5, eye, eye)) == "Gram(3 inputs, 5 tokens, float32, with cross and dense)"
    assert repr(Gram(None, 5)) == "Gram(no inputs, 5 tokens, no dtype)"  # pyright: ignore[reportArgumentType]


def test_one_of_the_two_matrices_is_refused():
    with pytest.raises(ValueError, match="cross and dense must be given together. Got cross alone instead."):
        Gram(torch.eye(3), 5, torch.eye(3))
