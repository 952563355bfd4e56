"""The walk through a model's blocks: how often each is run, and a model that does not call them."""

import pytest
import torch
from torch import nn

from layerwise.calibration.block_calls import capture
from layerwise.calibration.block_stream import Stream
from layerwise.calibration.modes import sequential_blocks
from layerwise.models.structure import linears
from layerwise.runtime.errors import InputError
from tests.support.model_families import build, tokens


def test_blocks_that_are_not_called_are_counted():
    model = build("llama")
    blocks = [model.model.layers[0], nn.Identity()]
    with pytest.raises(InputError) as refused:
        capture(model, blocks, tokens(2))
    calls = "LlamaForCausalLM must call each of its 2 blocks once. It calls 1 of them instead"
    assert str(refused.value) == f"{calls}, so it cannot be run block by block."


def test_a_block_that_stays_as_it_is_is_run_once(monkeypatch):
    """In sequential mode the pass that gives its Grams also gives the next block's inputs. Only block 1 changes."""
    passes: list[int] = []
    forward = Stream._forward

    def counted(stream, index, *rest):
        passes.append(index)
        return forward(stream, index, *rest)

    monkeypatch.setattr(Stream, "_forward", counted)
    walked = []
    for stays in (lambda index: False, lambda index: index != 1):
        stream = Stream(build("gemma3"), tokens(4), 2)
        walked.append([])
        for index, taps in sequential_blocks(stream, stays=stays):
            walked[-1] += [(tap.gram.matrix, tap.gram.knows_dense) for tap in taps]
            for layer in linears(stream.blocks[index], "block") if index == 1 else ():
                layer.replace(layer.weight() / 2)
    assert passes == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2] + [0, 0, 1, 1, 1, 1, 2, 2]
    for (one, known), (other, same) in zip(*walked, strict=True):
        assert torch.equal(one, other) and known is same
