"""The fisher of a dense model's layers: against torch.autograd.grad in float64, sequence by sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.calibration import fisher, fisher_store
from layerwise.models.structure import find_blocks, model_linears
from layerwise.runtime.errors import InputError
from tests.support.model_families import build, tokens
from tests.support.typing_helpers import some

FAMILIES = ("llama", "gpt2", "opt", "gemma3", "qwen3_moe")  # gpt2 stores [in, out], qwen3_moe has experts
SEQUENCES = 3


def plain(model: Any, sequences: Tensor) -> dict[str, Tensor]:
    """Layer -> mean over sequences of the squared gradient of a sequence's mean next-token loss, summed over rows."""
    model = model.double().requires_grad_(True)
    layers, found = model_linears(model), {}
    for sequence in sequences:
        logits = model(input_ids=sequence[None], use_cache=False).logits[0]
        told = torch.log_softmax(logits, -1)[torch.arange(len(sequence) - 1), sequence[1:]]
        parameters = list({id(p): p for p in (x.module.get_parameter(x.parameter) for x in layers.values())}.values())
        gradients = torch.autograd.grad(-told.mean(), parameters)
        by_parameter = {id(p): own for p, own in zip(parameters, gradients, strict=True)}
        for name, layer in layers.items():
            own = by_parameter[id(layer.module.get_parameter(layer.parameter))]
            own = own if layer.expert is None else own[layer.expert]
            rows = ((own.T if layer.transposed else own) ** 2).sum(1)
            found[name] = found.get(name, 0) + rows / len(sequences)
    return found


def state(model: Any) -> dict[str, Any]:
    return {
        "gradients": [(own.requires_grad, own.grad) for own in model.parameters()],
        "places": [own.data_ptr() for own in model.parameters()],
        "forward": ["forward" in vars(block) for block in find_blocks(model)[1]],
        "hooks": [getattr(own, "_post_accumulate_grad_hooks", None) for own in model.parameters()],
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_that_of_plain_gradients(family: str):
    model, drawn = build(family), tokens(SEQUENCES)
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    before = state(model)
    found = fisher.of_model(model, drawn)
    after = state(model)
    assert {key: own for key, own in after.items() if key != "hooks"} == {
        k: v for k, v in before.items() if k != "hooks"
    }
    assert not any(after["hooks"])
    expected = plain(model, drawn)
    assert found.keys() == expected.keys() == model_linears(model).keys()
    for name, own in expected.items():
        assert found[name].dtype == torch.float32 and found[name].shape == own.shape
        torch.testing.assert_close(found[name].double(), own, rtol=1e-4, atol=1e-5 * float(own.max()), msg=name)


def test_it_is_the_mean_over_sequences_however_often_one_comes():
    model, drawn = build("llama"), tokens(2)
    one, two, both = (fisher.of_model(model, own) for own in (drawn[:1], drawn[1:], drawn))
    again = fisher.of_model(model, drawn[[0, 1, 0, 1]])
    for name, own in both.items():
        torch.testing.assert_close(own, (one[name] + two[name]) / 2)
        torch.testing.assert_close(own, again[name])


def test_one_gradient_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch):
    model, held = build("llama"), []
    see = fisher.Gradients._see

    def counted(self: fisher.Gradients, layers: Any, parameter: Tensor) -> None:
        held.append(sum(own.grad is not None for own in model.parameters()))
        see(self, layers, parameter)

    monkeypatch.setattr(fisher.Gradients, "_see", counted)
    fisher.of_model(model, tokens(1))
    assert held == [1] * len(model_linears(model))


def test_blocks_are_run_again_on_the_way_back():
    model, runs = build("llama"), []
    for block in find_blocks(model)[1]:
        block.register_forward_hook(lambda *_: runs.append("forward"))
        block.get_submodule("mlp").register_forward_pre_hook(lambda *_: runs.append("inside"))
    fisher.of_model(model, tokens(1))
    depth = len(find_blocks(model)[1])
    assert runs.count("forward") == depth and runs.count("inside") == 2 * depth


def dying_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die amid the sequence after so many."""
    add, seen = fisher.Gradients.add, []

    def limited(self: fisher.Gradients, own: Tensor) -> None:
        if len(seen) == count:
            raise KeyboardInterrupt
        seen.append(own)
        add(self, own)

    monkeypatch.setattr(fisher.Gradients, "add", limited)


def test_a_killed_job_goes_on_with_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(fisher, "PART", 2)
    drawn = tokens(5)
    fisher.write_fisher(tmp_path / "whole.safetensors", build("llama"), drawn, {"model": "a"})
    path = tmp_path / "fisher.safetensors"
    with monkeypatch.context() as patch:
        dying_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            fisher.write_fisher(path, build("llama"), drawn, {"model": "a"})
    assert not path.exists() and (tmp_path / ".fisher.part").is_dir()
    with monkeypatch.context() as patch:
        dying_after(3, patch)  # the three that are left
        fisher.write_fisher(path, build("llama"), drawn, {"model": "a"})
    assert "Resuming after 1 finished parts of the sequences." in capsys.readouterr().err
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (tmp_path / ".fisher.part").exists()


def test_sums_of_another_model_are_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(fisher, "PART", 1)
    path, drawn = tmp_path / "fisher.safetensors", tokens(2)
    with monkeypatch.context() as patch:
        dying_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            fisher.write_fisher(path, build("llama"), drawn.flip(0), {"model": "a"})
    fisher.write_fisher(path, build("llama"), drawn, {"model": "b"})
    assert "1 finished parts of the sequences in" in capsys.readouterr().err
    expected = fisher.of_model(build("llama"), drawn)
    assert all(torch.equal(own, expected[name]) for name, own in fisher_store.read(path).items())


def test_a_damaged_file_is_set_aside(tmp_path: Path):
    path = tmp_path / "fisher.safetensors"
    vectors = {"a": torch.rand(5), "b": torch.rand(3)}
    fisher_store.write(path, vectors, {"samples": 1, "length": 2})
    assert all(torch.equal(own, vectors[name]) for name, own in fisher_store.read(path).items())
    whole = path.read_bytes()
    for spoilt, said in ((whole[:-2] + b"??", "is damaged: its vectors"), (whole[:-2], "must hold a vector for each")):
        path.write_bytes(spoilt)
        with pytest.raises(InputError, match=said):
            fisher_store.read(path)
        assert not path.exists()
    with pytest.raises(InputError, match="must hold a vector for each"):
        fisher_store.read(path)


def test_what_has_no_gradients_is_one_sentence():
    drawn = tokens(1)
    with pytest.raises(
        InputError, match=r"must be in float32 for gradients of its loss. Got torch.bfloat16 instead\.$"
    ):
        fisher.of_model(build("llama", dtype=torch.bfloat16), drawn)
    with pytest.raises(InputError, match="The tokens must be 0 to"):
        fisher.of_model(build("llama"), drawn + 10**6)
    model = build("llama")
    some(model.get_output_embeddings()).get_parameter("weight").data.mul_(1e38)
    with pytest.raises(InputError, match=r"The squared gradients of model\..* must be finite in float32"):
        fisher.of_model(model, drawn)
