"""Tuning stages: they lower the losses that they train on, stay on the pattern and the grid, and are exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from layerwise.calibration import modes
from layerwise.calibration.block_stream import Stream
from layerwise.calibration.calibrate import shared
from layerwise.checks import layer_cases as layers
from layerwise.checks.layer_cases import grid_of
from layerwise.compression import cell as compress
from layerwise.compression import solver as solver_module
from layerwise.compression.tune import Tunable, Tuner, round_straight_through
from layerwise.compression.verify import broken_promise
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Compressed, Layer, Quantised, Target
from layerwise.models import loading, structure
from layerwise.numerics import ops
from layerwise.runtime.errors import InputError
from tests.compression.test_cell import LENGTH, SAMPLES, Case, by_layer, dense_weights, rows, weights
from tests.support.model_families import build, tokens
from tests.support.typing_helpers import some

BLOCKS = Target(0.5, "1x8", bits=4, group=8)
STAGES: dict[str, dict[str, Any]] = {
    "blocks": {"epochs": 4, "batch": 2, "weights": 0.01, "grid": 0.01},
    "end": {"epochs": 4, "batch": 2, "grid": 0.01},
}
RESULTS = [
    ("gqsa", BLOCKS),
    ("gqsa", Target(0.5, "1x8", bits=3, group=32)),  # a group of four blocks
    ("gqsa", Target(0.5, "1x16")),
    ("sparsegpt", Target(pattern="2:4", bits=4, group=16)),
    ("sparsegpt", Target(0.5, bits=2)),
    ("wanda", Target(pattern="2:4")),
    ("rtn", Target(bits=3, group=16)),
    ("rtn", Target(bits=4, symmetric=True)),
]


def solve(layer: Layer, method: str, target: Target) -> Compressed:
    catalogue = Catalogue()
    built = catalogue.build(method, catalogue.complete(method, {}, "tune"))
    return built.compress(layer, target, torch.Generator().manual_seed(0))


def reordered(layer: Layer) -> tuple[Layer, Target, Compressed]:
    """A grid with a scale per input, whose groups are no runs of inputs."""
    target = Target(bits=4, group=16)
    input_scale = torch.linspace(0.5, 2.0, 64)
    group_of = torch.arange(64) % 4
    pieces = [ops.fit_grid((layer.weight * input_scale)[:, group_of == g], Target(bits=4)) for g in range(4)]
    grid = ops.Grid(torch.cat([p.scales for p in pieces], 1), torch.cat([p.zeros for p in pieces], 1), 4)
    codes = grid.codes(layer.weight * input_scale, group_of)
    weight = ops.dequantise(codes, grid.scales, grid.zeros, group_of, input_scale)
    return layer, target, Compressed(weight, None, Quantised(codes, grid.scales, grid.zeros, group_of, input_scale))


def solved(method: str, target: Target) -> tuple[Layer, Target, Compressed]:
    layer = layers.build("correlated")
    return layer, target, solve(layer, method, target)


CASES = [lambda pair=pair: solved(*pair) for pair in RESULTS] + [lambda: reordered(layers.build("correlated"))]
NAMES = [f"{method} {target.label}" for method, target in RESULTS] + ["groups and input scales"]


# --------------------------------------------------------------------------------------------------------- one layer


def test_rounding_is_exact_and_lets_the_gradient_through():
    values = torch.cat([torch.linspace(-300, 300, 4001), torch.tensor([0.5, 1.5, 2.5, 1e-30, 3e8])]).requires_grad_()
    found = round_straight_through(values)
    assert torch.equal(found, torch.round(values))
    found.sum().backward()
    assert torch.equal(some(values.grad), torch.ones_like(values))


@pytest.mark.parametrize("frozen", [False, True], ids=["blocks", "end"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_it_starts_from_the_result(case, frozen: bool):
    layer, target, result = case()
    came = Tunable(result, target, None if frozen else layer.weight).compressed()
    assert torch.equal(came.weight, result.weight)
    assert broken_promise(layer, target, came) is None
    if target.bits:
        before, after = grid_of(result), grid_of(came)
        kept = torch.ones_like(before.codes, dtype=torch.bool) if result.mask is None else result.mask
        assert torch.equal(after.codes[kept], before.codes[kept])
        assert torch.equal(after.scales, before.scales) and torch.equal(after.zeros, before.zeros)


@pytest.mark.parametrize("frozen", [False, True], ids=["blocks", "end"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_wherever_it_goes_it_is_on_the_pattern_and_the_grid(case, frozen: bool):
    layer, target, result = case()
    tunable = Tunable(result, target, None if frozen else layer.weight)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in tunable.trained.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator))
    came = tunable.compressed()
    assert broken_promise(layer, target, came) is None
    assert result.mask is None or torch.equal(some(came.mask), result.mask)
    if frozen and not target.bits:
        assert not tunable.trained and torch.equal(came.weight, result.weight)
        return
    assert not torch.equal(came.weight, result.weight)
    if target.bits:
        before, after = grid_of(result), grid_of(came)
        assert (after.scales > 0).all() and (after.zeros == after.zeros.round()).all()
        assert after.zeros.min() >= 0 and after.zeros.max() < 2**target.bits
        assert torch.equal(after.zeros, before.zeros) == target.symmetric
        kept = torch.ones_like(after.codes, dtype=torch.bool) if result.mask is None else result.mask
        assert torch.equal(after.codes[kept], before.codes[kept]) == frozen
        zeros = after.zeros[:, ops.grouping(after, target)]
        assert torch.equal(after.codes[~kept].float(), zeros[~kept])  # without its mask it is exactly zero too


def test_trained_parameters_have_no_unit():
    """Twice the weights, the same steps: twice the result."""
    layer = layers.build("correlated")
    found = []
    for factor in (1.0, 2.0):
        own = replace(layer, weight=factor * layer.weight)
        tunable = Tunable(solve(own, "gqsa", BLOCKS), BLOCKS, own.weight)
        with torch.no_grad():
            for tensor in tunable.trained.values():
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)))
        found.append(tunable.compressed().weight)
    assert torch.equal(2 * found[0], found[1])


# -------------------------------------------------------------------------------------------------- blocks and models


def tuned(stages, mode: str = "shared", method: str = "gqsa", target: Target = BLOCKS, family: str = "llama"):
    """(dense model, tuned model, tuner) of a cell, as the runner tunes it."""
    dense, model, batch = build(family), build(family), tokens(SAMPLES, LENGTH)
    catalogue = Catalogue()
    built = catalogue.build(method, catalogue.complete(method, {}, "tune"))
    solver = solver_module.Solver(method, built, target, 0)
    stream = Stream(model, batch) if mode == "sequential" else None
    blocks = modes.sequential_blocks(stream) if stream else enumerate(list(shared(Stream(dense, batch))))
    tuner = Tuner(model, batch, stages, target, 0)
    for _ in compress.visit(model, tuner.walk(blocks, stream), tuner.keep(solver.solve), lambda row: None):
        pass
    tuner.end()
    return dense, model, tuner


def only(*names: str) -> dict[str, dict[str, Any]]:
    return {name: STAGES[name] for name in names}


@torch.no_grad()
def block_errors(dense, model, mode: str) -> list[float]:
    """Relative squared error of every block's output, over whole sequences at once and through hooks alone."""
    hidden: dict[str, list[tuple[torch.Tensor, dict[str, Any], torch.Tensor]]] = {"dense": [], "model": []}
    found = []
    for name, one in (("dense", dense), ("model", model)):
        _, blocks = structure.find_blocks(one)
        handles = [
            block.register_forward_hook(
                lambda module, args, kwargs, out, name=name: hidden[name].append(
                    (args[0], kwargs, out if isinstance(out, torch.Tensor) else out[0])
                ),
                with_kwargs=True,
            )
            for block in blocks
        ]
        one(input_ids=tokens(SAMPLES, LENGTH), use_cache=False)
        for handle in handles:
            handle.remove()
    _, blocks = structure.find_blocks(model)
    for block, (inputs, kwargs, wanted), (_, _, came) in zip(blocks, hidden["dense"], hidden["model"], strict=True):
        if mode == "shared":
            came = block(inputs, **kwargs)
            came = came if isinstance(came, torch.Tensor) else came[0]
        found.append(float((came - wanted).square().sum() / wanted.square().sum()))
    return found


@torch.no_grad()
def language_loss(model) -> float:
    batch = tokens(SAMPLES, LENGTH)
    logits = model(input_ids=batch, use_cache=False).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["shared", "sequential"])
def test_blocks_come_closer_to_the_dense_ones(mode: str, family: str):
    """GPT-2 stores its weights transposed."""
    dense, model, tuner = tuned(only("blocks"), mode, family=family)
    errors = block_errors(dense, model, mode)
    assert [record["block"] for record in tuner.history] == [0, 1]
    for error, record in zip(errors, tuner.history, strict=True):
        assert record["after"] < 0.95 * record["before"]
        assert error == pytest.approx(record["after"], rel=1e-3)
    _, plain, _ = tuned({}, mode, family=family)
    before = block_errors(dense, plain, mode)
    assert before[0] == pytest.approx(tuner.history[0]["before"], rel=1e-3)
    assert errors[1] < before[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_whole_model_predicts_its_calibration_tokens_better(family: str):
    _, plain, _ = tuned({}, family=family)
    _, model, tuner = tuned(only("end"), family=family)
    (record,) = tuner.history
    assert record["after"] < record["before"]
    assert language_loss(plain) == pytest.approx(record["before"], rel=1e-5)
    assert language_loss(model) == pytest.approx(record["after"], rel=1e-5)


def test_end_leaves_the_codes_of_the_blocks_stage():
    _, _, first = tuned(only("blocks"))
    _, _, both = tuned(only("blocks", "end"))
    assert [record["stage"] for record in both.history] == ["blocks", "blocks", "end"]
    for name, (result, _) in both.results.items():
        earlier = first.results[name][0]
        assert torch.equal(grid_of(result).codes[result.mask], grid_of(earlier).codes[result.mask])
        assert not torch.equal(grid_of(result).scales, grid_of(earlier).scales)


@pytest.mark.parametrize(("method", "target"), RESULTS[1:], ids=NAMES[1:-1])
def test_every_method_may_be_tuned(method: str, target: Target):
    stages = only("blocks", "end") if target.bits else only("blocks")
    dense, model, tuner = tuned(stages, method=method, target=target)
    assert all(record["after"] < record["before"] for record in tuner.history)
    plain = tuned({}, method=method, target=target)[2]
    found = dense_weights(model)
    for name, weight in dense_weights(dense).items():
        result = tuner.results[name][0]
        layer = replace(layers.build("correlated"), weight=weight)
        assert broken_promise(layer, target, result) is None
        assert torch.equal(found[name], result.weight)
        assert result.mask is None or torch.equal(result.mask, some(plain.results[name][0].mask))


def test_a_learning_rate_of_zero_changes_nothing():
    still = {"blocks": {**STAGES["blocks"], "weights": 0.0, "grid": 0.0}, "end": {**STAGES["end"], "grid": 0.0}}
    _, model, tuner = tuned(still)
    _, plain, _ = tuned({})
    assert all(record["after"] == record["before"] for record in tuner.history)
    assert all(torch.equal(weight, dense_weights(plain)[name]) for name, weight in dense_weights(model).items())


def test_a_rate_that_leads_nowhere_leaves_the_start():
    wild = {"blocks": {**STAGES["blocks"], "epochs": 1, "weights": 1e4, "grid": 30.0}}
    _, model, tuner = tuned(wild)
    _, plain, _ = tuned({})
    assert all(record["after"] == record["before"] for record in tuner.history)
    assert all(torch.equal(weight, dense_weights(plain)[name]) for name, weight in dense_weights(model).items())


def test_it_is_deterministic_and_leaves_the_global_generator_alone():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(dense_weights(tuned(only("blocks", "end"))[1]))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


# ------------------------------------------------------------------------------------------------------------- a cell


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("tune")).prepare()


@pytest.mark.parametrize("mode", ["shared", "sequential"])
def test_a_cell_describes_its_final_weights(case: Case, mode: str, tmp_path: Path):
    cell = case.run("gqsa", BLOCKS, mode, str(tmp_path / "tuned"), tune=STAGES)
    plain = case.run("gqsa", BLOCKS, mode, str(tmp_path / "plain"))
    saved, model = weights(cell), loading.load(case.spec)
    dense = dense_weights(model)
    assert {row["comparison"] for row in rows(cell)} == {"tuned"}
    assert set(by_layer(cell, "bits_per_weight").values()) == set(by_layer(plain, "bits_per_weight").values())
    # The error of the saved weights, through the Grams of the mode, the model before the block being the saved one.
    name, blocks = structure.find_blocks(model)
    stream = Stream(model, tokens(SAMPLES, LENGTH))
    for index, block in enumerate(blocks):
        taps = stream.collect(index, advance=mode == "shared")
        grams = {layer: tap.gram.matrix.double() for tap in taps for layer in tap.layers}
        for linear in structure.linears(block, f"{name}.{index}"):
            lost = (dense[linear.name] - saved[linear.name]).double()
            error = float(((lost @ grams[linear.name]) * lost).sum())
            assert by_layer(cell, "absolute_error")[linear.name] == pytest.approx(error, rel=1e-6)
            assert not torch.equal(saved[linear.name], weights(plain)[linear.name])
            linear.replace(saved[linear.name])
        if mode == "sequential":
            stream.advance(index)
    record = json.loads((cell / "cell.json").read_text("utf-8"))
    assert [(entry["stage"], entry["block"]) for entry in record["tuning"]] == [
        ("blocks", 0),
        ("blocks", 1),
        ("end", None),
    ]
    assert json.loads(record["columns"]["params"])["tune"] == STAGES
    assert "tuning" not in json.loads((plain / "cell.json").read_text("utf-8"))


def test_both_modes_tune_the_first_block_alike(case: Case, tmp_path: Path):
    found = [
        weights(case.run("gqsa", BLOCKS, mode, str(tmp_path / mode), tune=only("blocks")))
        for mode in ("shared", "sequential")
    ]
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]) == (".0." in name)


def test_a_tuned_result_off_its_grid_is_named(case: Case, tmp_path: Path, monkeypatch):
    honest = Tunable.compressed

    def faulty(self: Tunable) -> Compressed:
        return replace(honest(self), weight=honest(self).weight * 1.5)

    monkeypatch.setattr(Tunable, "compressed", faulty)
    with pytest.raises(InputError, match=r"gqsa, tuned, broke its contract on model\.layers\.0.*promise 3"):
        case.run("gqsa", BLOCKS, "shared", str(tmp_path / "cell"), tune=only("blocks"))
