"""The walk through a model's blocks refuses a model that does not call them."""

import pytest
from torch import nn

from layerwise.calibration.block_stream import capture
from layerwise.runtime.errors import InputError
from tests.support.model_families import build, tokens


def test_blocks_that_are_not_called_are_counted():
    model = build("llama")
    blocks = [model.model.layers[0], nn.Identity()]
    with pytest.raises(InputError) as refused:
        capture(model, blocks, tokens(2))
    calls = "LlamaForCausalLM must call each of its 2 blocks once. It calls 1 of them instead"
    assert str(refused.value) == f"{calls}, so it cannot be run block by block."
