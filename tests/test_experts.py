"""Mixtures of experts: each expert's Gram is that of the tokens routed to it, found here by brute force in float64."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from families import FAMILIES, HIDDEN, LENGTH, build, tokens
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear

from workflow.scripts import experts
from workflow.scripts.calibrate import read_block, read_index, shared, write_gram
from workflow.scripts.models import EXPERTS, few, find_blocks, is_experts, linears, load, model_linears
from workflow.scripts.propagate import Stream
from workflow.scripts.runtime import InputError
from workflow.scripts.tap_statistics import SAMPLE_ROWS, RoutedStatistics, TapStatistics

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
                found.append((name, module, args[0].reshape(-1, HIDDEN).clone(), args[1].reshape(-1, args[1].shape[-1])))

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
    taps = {tap.name: tap for block in calibrated(family) for tap in block for tap.name in tap.layers}
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
                expected = truth(inputs, positions)
                for one, other in zip((tap.gram.matrix, found.mean, found.absmean, found.sequence_variance), expected):
                    close(one, other)
                assert torch.equal(tap.gram.matrix, tap.gram.matrix.T)
                close(found.sample, inputs)  # in the order of the text
                checked += 1
    assert checked == 2 * 4 * 2
