"""A model read block by block is the model that is whole in memory, to the last bit, and never whole itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.calibrate import shared
from layerwise.evaluation import perplexity
from layerwise.models import streaming
from layerwise.models.loading import load
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Blocks, linears, model_linears
from layerwise.runtime.errors import InputError
from tests.support.model_families import FAMILIES, build, tokens
from tests.support.typing_helpers import some

torch.set_num_threads(1)
every_family = pytest.mark.parametrize("family", FAMILIES)


def saved(folder, family: str, dtype: torch.dtype = torch.float32, shards: str = "20KB") -> dict[str, str]:
    """The config entry of a model written in several files."""
    build(family, dtype=dtype).save_pretrained(folder, max_shard_size=shards)
    return {"path": str(folder)}


def held(blocks: Blocks) -> list[int]:
    """The blocks that have weights."""
    return [i for i, block in enumerate(blocks.modules) if not any(own.is_meta for own in block.parameters())]


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_model(tmp_path, family, dtype):
    spec = saved(tmp_path, family, dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, lazy = load(spec), LazyBlocks(spec)
    assert held(lazy) == [] and (lazy.model.dtype, lazy.model.training) == (whole.dtype, False)
    with torch.no_grad(), lazy.outside():
        assert torch.equal(lazy.model(input_ids=tokens(2)).logits, whole(input_ids=tokens(2)).logits)
    assert held(lazy) == [] and all(own.is_meta for own in lazy.model.parameters())
    for index in range(len(lazy)):
        with lazy.open(index) as block:
            assert held(lazy) == [index]
            ours, theirs = block.state_dict(), Blocks(whole).modules[index].state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    buffers = dict(whole.named_buffers())
    for name, own in lazy.model.named_buffers():
        assert torch.equal(own, buffers.pop(name))
    assert not buffers


@every_family
def test_calibration_and_perplexity_are_those_of_the_whole_model(tmp_path, family):
    spec = saved(tmp_path / "model", family)
    whole, lazy = load(spec), LazyBlocks(spec)
    most = []
    expected = shared(Stream(whole, tokens(5), 2))
    for index, taps in enumerate(shared(Stream(lazy, tokens(5), 2, folder=tmp_path / "states"))):
        most.append(len(held(lazy)))
        for ours, theirs in zip(taps, next(expected), strict=True):
            assert torch.equal(ours.gram.matrix, theirs.gram.matrix) and ours.layers == theirs.layers
        assert {path.stem for path in (tmp_path / "states").iterdir()} == {
            f"inputs-{i:03d}" for i in (index, index + 1)
        }
    assert max(most) == 0  # between the blocks
    losses = perplexity.window_losses(lazy, tokens(5), 2, folder=tmp_path / "windows")
    with torch.no_grad():
        logits = whole(input_ids=tokens(5)).logits[:, :-1].double()
    wanted = nn.functional.cross_entropy(logits.transpose(1, 2), tokens(5)[:, 1:], reduction="none").mean(1)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(losses, perplexity.window_losses(whole, tokens(5), 2))


def test_weights_written_to_a_block_are_there_while_it_is_open(tmp_path):
    lazy = LazyBlocks(saved(tmp_path, "llama"))
    with lazy.open(0) as block:
        (first, *_) = linears(block, "0")
        before = first.weight()
        first.replace(0 * before)
        with torch.no_grad(), lazy.outside():
            lazy.model(input_ids=tokens(1))
        assert not first.weight().any()
    with lazy.open(0):
        assert torch.equal(first.weight(), before)


def test_blocks_that_fit_are_read_once(tmp_path, monkeypatch, capsys):
    lazy = LazyBlocks(saved(tmp_path, "llama"))
    with lazy.whole_if_it_fits():
        assert held(lazy) == [0, 1]
    assert held(lazy) == [] and not capsys.readouterr().err
    monkeypatch.setattr(streaming, "free_bytes", lambda device: 10)
    with lazy.whole_if_it_fits():
        assert held(lazy) == []
    assert "0.0 GB of memory are free: each block is read whenever it is run." in capsys.readouterr().err


def change(folder, name: str, write) -> None:
    """Rewrite the file that holds a tensor; write: from the tensors of that file."""
    for path in folder.glob("*.safetensors"):
        found = load_file(path)
        if name in found:
            write(found)
            save_file(found, path, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def test_faults_of_files_are_reported_before_any_work(tmp_path):
    spec = saved(tmp_path, "llama")
    change(tmp_path, NAME, lambda found: found.update({NAME: torch.zeros(3, 3)}))
    with pytest.raises(InputError, match=f"Got 1 tensors of another shape instead: {NAME}"):
        LazyBlocks(spec)
    change(tmp_path, NAME, lambda found: found.pop(NAME))
    with pytest.raises(InputError, match=f"lack tensors of LlamaForCausalLM: {NAME}"):
        LazyBlocks(spec)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=f"{path.name} is cut off: it has"):
        LazyBlocks(spec)


def test_a_weight_that_is_not_finite_is_reported_when_its_block_is_read(tmp_path):
    spec = saved(tmp_path, "llama")
    change(tmp_path, NAME, lambda found: found[NAME].fill_(float("nan")))
    lazy = LazyBlocks(spec)
    with lazy.open(0):
        pass
    with pytest.raises(InputError, match=f"must be finite. Got NaN or Inf in {NAME} instead"), lazy.open(1):
        pass


def test_tied_embeddings_are_one_tensor(tmp_path):
    lazy = LazyBlocks(saved(tmp_path, "qwen3"))
    for _ in range(2):
        with lazy.outside():
            weight = lazy.model.get_input_embeddings().weight
            assert some(lazy.model.get_output_embeddings()).weight is weight and not weight.is_meta


def test_files_are_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lazy = LazyBlocks(saved("model", "llama"))
    layers = model_linears(load({"path": "model"}))
    save_file({name: torch.ones(layer.shape) for name, layer in layers.items()}, "weights.safetensors")
    perplexity.apply_weights(lazy, Path("weights.safetensors"))
    monkeypatch.chdir("/")
    with lazy.outside(), lazy.open(0) as block:
        assert not lazy.model.get_input_embeddings().weight.is_meta
        assert all(bool((layer.weight() == 1).all()) for layer in linears(block, "0"))
