"""A budget that is spread: the job's table, and cells whose layers have levels of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.taps import Tap
from layerwise.compression.allocate import share_of
from layerwise.compression.levels import targets_at
from layerwise.compression.probe import Probe
from layerwise.compression.trials import ModelTrials
from layerwise.contract.gram import Gram
from layerwise.contract.layer import Layer
from layerwise.contract.target import Target
from layerwise.evaluation.divergence import kl
from layerwise.export.audit import audit
from layerwise.models.loading import load
from layerwise.models.structure import model_linears
from layerwise.runtime.errors import Diverged, InputError
from layerwise.storage.bits_per_weight import bits_per_weight
from layerwise.storage.packed_file import PackedFile
from layerwise.storage.target_bits import bits_of
from tests.compression.test_cell import LENGTH, OUTPUTS, SAMPLES, Case, dense_weights, rows, weights
from tests.support.model_families import tokens

OWL = {"owl": {"threshold": 2.0, "spread": 0.15}}
ALLOCATOR = """
from dataclasses import dataclass
from layerwise.contract.allocator import Allocator, Proposal

CARD = {{"title": "own", "needs": ["weight"], "budgets": ["row"], "parameters": {{}}}}


@dataclass(frozen=True)
class Own(Allocator):
    def measure(self, layers):
        {measure}

    def allocate(self, parts, target):
        {allocate}
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Iterator[Case]:
    yield Case(tmp_path_factory.mktemp("allocate")).prepare()


def table(cell: Path) -> list[dict[str, Any]]:
    return pq.read_table(cell / "levels.parquet").to_pylist()


@pytest.mark.parametrize("mode", ["shared", "sequential"])
def test_every_layer_is_solved_stored_and_counted_at_its_own_level(case, mode):
    target = Target(0.5)
    cell = case.run("wanda", target, mode, out=f"owl {mode}", allocations=OWL)
    found, spread = rows(cell), {row["layer"]: row for row in table(cell)}
    assert len({row["level"] for row in found}) == 2  # of two blocks
    file, dense, saved = PackedFile(cell / "weights.safetensors"), dense_weights(load(case.spec)), weights(cell)
    for row in found:
        own, name = Target(row["level"]), row["layer"]
        assert row["level"] == spread[name]["level"] and file.target_of(name) == own
        zeros = int(row["level"] * row["in"])
        assert ((saved[name] == 0).sum(1) == zeros).all() and row["achieved_sparsity"] == zeros / row["in"]
        kept = 1 - zeros / row["in"]
        assert row["bits_per_weight"] == bits_per_weight(own, kept, row["out"], row["in"])
        assert torch.equal(saved[name][saved[name] != 0], dense[name][saved[name] != 0])
        assert (row["allocation"], row["target"], row["sparsity"]) == ("owl", "50% row owl", 0.5)
    sizes = [row["out"] * row["in"] for row in found]
    mean = sum(size * row["level"] for size, row in zip(sizes, found, strict=True))
    assert abs(mean - 0.5 * sum(sizes)) <= 1
    assert table(cell)[0]["mean_level"] == pytest.approx(0.5, abs=1e-9)
    achieved = sum(size * row["achieved_sparsity"] for size, row in zip(sizes, found, strict=True)) / sum(sizes)
    assert table(cell)[0]["achieved"] == pytest.approx(achieved)


@pytest.mark.parametrize(
    ("method", "target", "levels"),
    [
        ("wanda", Target(pattern="2:4"), {0.0, 0.25, 0.5, 0.75}),
        ("rtn", Target(bits=4, group=16), set(range(2, 9))),
        ("sparsegpt", Target(0.6, "layer"), {0.3, 0.6, 0.75, 0.9}),
    ],
)
def test_a_knapsack_spreads_counts_and_bits_and_the_audit_holds(case, method, target, levels):
    params = {"levels": [0.3, 0.75, 0.9], "errors": "absolute"}
    cell = case.run(method, target, out=f"knapsack {method}", allocations={"knapsack": params})
    first = table(cell)[0]
    assert {row["level"] for row in rows(cell)} <= levels
    assert first["mean_level"] == pytest.approx(target.level, abs=1e-9)
    assert first["allocated_bound"] <= first["allocated_error"] <= first["uniform_error"]
    assert 0 <= first["allocated_gap"] < 1
    form, asked, lines = audit(cell)
    assert (form, asked) == ("packed", target) and [line.fault for line in lines] == [None] * 14


def test_the_knapsack_s_errors_are_those_of_its_probe(case):
    params = {"levels": [0.3, 0.75], "errors": "absolute"}
    cell = case.run("wanda", Target(0.5), out="knapsack", allocations={"knapsack": params})
    scores = {row["layer"]: row["score"] for row in table(cell)}
    assert {row["layer"]: row["absolute_error"] for row in rows(cell)} == pytest.approx(scores)
    assert table(cell)[0]["allocated_error"] == pytest.approx(sum(scores.values()))
    equal = case.run("wanda", Target(0.5), out="equal")
    assert table(cell)[0]["uniform_error"] == pytest.approx(sum(row["absolute_error"] for row in rows(equal)))


def test_the_knapsack_counts_an_expert_s_error_by_the_tokens_routed_to_it(tmp_path):
    """An error is a mean over the layer's own tokens; times their number it is a sum, as in layers that see all."""
    case, every = Case(tmp_path, "mixtral").prepare(), SAMPLES * LENGTH
    cell = case.run("wanda", Target(0.5), allocations={"knapsack": {"levels": [0.3, 0.75], "errors": "absolute"}})
    scores, found = {row["layer"]: row["score"] for row in table(cell)}, rows(cell)
    shares = {row["layer"]: row["calibration_tokens"] / every for row in found}
    assert scores == pytest.approx({row["layer"]: shares[row["layer"]] * row["absolute_error"] for row in found})
    routed = [shares[row["layer"]] for row in found if row["token_scope"] == "routed"]
    assert routed and max(routed) < 1 and {row["token_scope"] for row in found} == {"all", "routed"}


def test_an_expert_calibrated_on_every_token_counts_as_few():
    unused: Any = None
    for scope, share in (("all", 1.0), ("routed", 1.0), ("fallback", 0.04)):
        tap = Tap("x", (), (), Gram(torch.eye(4), 100), unused, scope)
        assert share_of(tap, 100) == share
    assert share_of(Tap("x", (), (), Gram(torch.eye(4), 5), unused, "routed"), 100) == 0.05


@pytest.mark.parametrize(
    ("target", "some_pairs"),
    [
        (Target(0.5, bits=4, group=8), [{"sparsity": 0.3, "bits": 4}, {"sparsity": 0.6, "bits": 2, "symmetric": True}]),
        (Target(pattern="2:4", bits=4), None),
    ],
)
def test_pairs_of_sparsity_and_bits_are_solved_stored_and_counted(case, target, some_pairs):
    cell = case.run(
        "chain", target, out=f"pairs {target.bits}{target.group}", allocations={"knapsack": {"pairs": some_pairs}}
    )
    found, spread = rows(cell), {row["layer"]: row for row in table(cell)}
    assert len({row["pair"] for row in found}) > 1
    file, saved = PackedFile(cell / "weights.safetensors"), weights(cell)
    for row in found:
        own, name = Target.parse(row["pair"]), row["layer"]
        assert spread[name]["pair"] == row["pair"] and file.target_of(name) == own
        assert row["level"] == row["bits_per_weight"] == pytest.approx(spread[name]["level"])
        kept = 1 - (0.75 if own.pattern == "1:4" else own.sparsity)
        assert (saved[name] != 0).double().mean() <= kept + 1 / row["in"]
    first, sizes = table(cell)[0], [row["out"] * row["in"] for row in found]
    mean = sum(size * row["level"] for size, row in zip(sizes, found, strict=True)) / sum(sizes)
    assert first["mean_level"] == pytest.approx(mean) and mean <= first["budget"] + 1e-9
    equal = rows(case.run("chain", target, out=f"equal {target.bits}{target.group}"))
    assert {row["pair"] for row in equal} == {target.label}
    stored = sum(size * row["bits_per_weight"] for size, row in zip(sizes, equal, strict=True)) / sum(sizes)
    assert first["budget"] == pytest.approx(stored)
    assert first["allocated_bound"] <= first["allocated_error"] <= first["uniform_error"]
    assert first["uniform_error"] == pytest.approx(sum(row["absolute_error"] for row in equal))
    form, asked, lines = audit(cell)
    assert (form, asked) == ("packed", target) and [line.fault for line in lines] == [None] * 14


@pytest.mark.parametrize(
    ("method", "target", "some_pairs"),
    [
        ("svd_llm", Target(rank=0.4), None),
        ("rocket", Target(rank=0.4), [{"rank": 0.01}, {"rank": 0.2}, {"rank": 0.6}]),  # 1%: no factors here
        ("oats", Target(0.5, rank=0.2), [{"sparsity": 0.7, "rank": 0.4}, {"sparsity": 0.4, "rank": 0.1}]),
    ],
)
def test_ranks_of_their_own_take_the_bits_of_the_budget(case, method, target, some_pairs):
    cell = case.run(method, target, out=f"ranks {method}", allocations={"knapsack": {"pairs": some_pairs}})
    found, spread = rows(cell), {row["layer"]: row for row in table(cell)}
    assert len({row["pair"] for row in found}) > 1
    file = PackedFile(cell / "weights.safetensors")
    taken = wanted = 0
    for row in found:
        own, name, shape = Target.parse(row["pair"]), row["layer"], (row["out"], row["in"])
        assert spread[name]["pair"] == row["pair"] and file.target_of(name) == own
        size = shape[0] * shape[1]
        rest = 0 if own.rest.dense else bits_of(own.rest, *shape)
        # rocket spends what the rank of dense factors, a whole number, leaves of its share
        assert row["bits_per_weight"] * size <= 16 * own.rank * size + rest + 1e-6
        assert own.rank != 0.01
        taken += bits_of(own, *shape)
        wanted += bits_of(target, *shape)
    assert taken <= wanted
    first = table(cell)[0]
    assert first["allocated_bound"] <= first["allocated_error"] <= first["uniform_error"]
    equal = rows(case.run(method, target, out=f"equal {method}"))
    assert {row["pair"] for row in equal} == {target.label}
    if method != "rocket":  # which svd_llm was tried for
        assert first["uniform_error"] == pytest.approx(sum(row["absolute_error"] for row in equal))
    form, asked, lines = audit(cell)
    assert (form, asked) == ("packed", target) and [line.fault for line in lines] == [None] * 14


def test_trials_measure_the_divergence_of_what_a_cell_would_store(case):
    """KL of one layer pruned alone, and of all, as the evaluation's own functions have it from the cell's weights."""
    params = {"levels": [0.3, 0.75], "errors": "divergence", "divergences": "levels", "windows": 4}
    cell = case.run("wanda", Target(0.5), out="divergence", allocations={"knapsack": params})
    batch = tokens(SAMPLES, LENGTH)[:4]
    dense, model = load(case.spec), load(case.spec)
    with torch.no_grad():
        before = dense(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        for name, linear in model_linears(model).items():
            whole = linear.weight()
            linear.replace(weights(cell)[name])
            after = model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            linear.replace(whole)
            score = {row["layer"]: row["score"] for row in table(cell)}[name]
            assert score == pytest.approx(float(kl(before, after).mean()), rel=1e-4, abs=2e-8)
    assert [path.name for path in cell.iterdir() if path.name.startswith(".trials")] == []


def test_dense_blocks_before_the_first_compressed_layer_run_once(case, monkeypatch):
    """Two blocks of seven layers; then the same trials from the last to the first give the same divergences."""
    advanced, found = list[int](), dict[tuple[float | None, ...], float]()
    plain, divergence = Stream.advance, ModelTrials.divergence

    def advance(stream: Stream, index: int) -> None:
        advanced.append(index)
        plain(stream, index)

    def tried(trials: ModelTrials, levels: Sequence[float | None], windows: int) -> float:
        found[tuple(levels)] = divergence(trials, levels, windows)
        if len(found) == 14:
            assert advanced == [0] * (1 + 7 + 1)  # of the dense model, of trials of block 0, before those of block 1
            again = [divergence(trials, levels, windows) for levels in reversed(found)]
            assert again[::-1] == list(found.values()) and min(again) > 0
        return found[tuple(levels)]

    monkeypatch.setattr(Stream, "advance", advance)
    monkeypatch.setattr(ModelTrials, "divergence", tried)
    params = {"errors": "divergence", "windows": 2}
    case.run("wanda", Target(0.5), out="dense once", allocations={"knapsack": params})
    assert len(found) == 14


@pytest.mark.parametrize("name", ["neuroal", "evopress"])
def test_allocators_that_try_the_model_hold_the_budget_and_leave_nothing(case, name):
    params = {
        "neuroal": {"widths": [0.05, 0.2], "windows": 3},
        "evopress": {"generations": 3, "offspring": 3, "survivors": 3},
    }[name]
    params |= {"windows": 3} if name == "neuroal" else {"windows": 3, "screen": 1}
    cell = case.run("wanda", Target(0.5), out=name, allocations={name: params})
    found = table(cell)
    assert found[0]["mean_level"] == pytest.approx(0.5, abs=1e-9) and len({row["level"] for row in found}) > 1
    assert sorted(path.name for path in cell.iterdir()) == sorted(["levels.parquet", *OUTPUTS])
    again = case.run("wanda", Target(0.5), out=f"{name} again", allocations={name: params})
    assert table(again) == found


@pytest.mark.parametrize("name", ["neuroal", "evopress"])
def test_a_trial_at_which_the_probe_diverges_is_left_out(case, name, monkeypatch, capsys):
    plain = Probe.weight

    def weight(probe: Probe, layer: Layer, level: float) -> Tensor:
        if level > limit:
            raise Diverged(f"Wanda has diverged on {layer.name}.")
        return plain(probe, layer, level)

    monkeypatch.setattr(Probe, "weight", weight)
    params = {"neuroal": {"widths": [0.05, 0.2]}, "evopress": {"generations": 3, "offspring": 6, "screen": 1}}[name]
    params |= {"windows": 2}
    limit = 0.55
    found = table(case.run("wanda", Target(0.5), out=f"{name} left out", allocations={name: params}))
    assert max(row["level"] for row in found) <= limit and len({row["level"] for row in found}) > 1
    assert "A trial is left out: Wanda has diverged on model.layers." in capsys.readouterr().err
    limit = 0.4
    with pytest.raises(InputError, match=r"equal levels must be finite\. Got inf|no width gives finite activations"):
        case.run("wanda", Target(0.5), out=f"{name} all", allocations={name: params})


def test_evopress_ends_below_equal_levels(case):
    params = {"generations": 8, "offspring": 4, "survivors": 2, "windows": 3, "screen": 1}
    cell = case.run("wanda", Target(0.5), out="evopress 8", allocations={"evopress": params})
    start = case.run("wanda", Target(0.5), out="evopress 0", allocations={"evopress": params | {"generations": 0}})
    assert {row["level"] for row in table(start)} == {0.5}
    assert table(cell)[0]["score"] < table(start)[0]["score"]


def test_more_windows_than_the_calibration_set_has_are_one_sentence(case):
    with pytest.raises(InputError, match="windows must be at most the 6 samples of calibration.words. Got 7 instead"):
        case.run("wanda", Target(0.5), out="many", allocations={"neuroal": {"windows": 7}})


def test_cells_of_equal_levels_are_stored_as_before(case):
    file = PackedFile(case.run("wanda", Target(0.5), out="equal again") / "weights.safetensors")
    assert file.targets == {} and file.target_of("anything") == Target(0.5)
    assert {row["level"] for row in rows(case.folder / "equal again")} == {0.5}


@pytest.mark.parametrize(
    ("measure", "allocate", "sentence"),
    [
        ("return []", "return None", "must measure each of the 7 layers of block 0 once. Got 0 values instead."),
        ("return 1 / 0", "return None", "own failed at block 0: ZeroDivisionError: division by zero."),
        ("return [0] * len(list(layers))", "return 1 / 0", "own failed at 50% row: ZeroDivisionError"),
        (
            "return [0] * len(list(layers))",
            "return Proposal((float('nan'),) * len(parts), (None,) * len(parts))",
            "own failed at 50% row: ValueError: levels must be 14 finite numbers. Got [nan, nan",
        ),
        (
            "return [0] * len(list(layers))",
            "return None",
            "own failed at 50% row: ValueError: an allocator must return a Proposal. Got NoneType instead.",
        ),
        (
            "return [0] * len(list(layers))",
            "return Proposal((0.5,), (None,) * len(parts), official=True)",
            "own failed at 50% row: ValueError: levels must be 14, one for each layer. Got 1 instead.",
        ),
        (
            "return [0] * len(list(layers))",
            "return Proposal((float('nan'),) * len(parts), (None,) * len(parts), official=True)",
            "own failed at 50% row: ValueError: Target.sparsity must be in [0, 1). Got nan instead.",
        ),
        (
            "return [0] * len(list(layers))",
            "return Proposal((0.5,) * len(parts), ())",
            "scores must be 14, one for each layer. Got 0 instead.",
        ),
    ],
)
def test_an_allocator_that_fails_is_named_in_one_sentence(case, tmp_path, measure, allocate, sentence):
    (tmp_path / "own.py").write_text(ALLOCATOR.format(measure=measure, allocate=allocate), "utf-8")
    with pytest.raises(InputError) as refused:
        case.run("wanda", Target(0.5), out="own", own=tmp_path, allocations={"own": None})
    assert sentence in str(refused.value)


def test_levels_that_are_absent_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match="The levels of an allocation .* does not exist"):
        targets_at(tmp_path / "none.parquet", Target(0.5))


def test_a_layer_without_a_level_stops_the_cell(case):
    from layerwise.compression.solver import Solver
    from layerwise.methods.wanda import Wanda

    solver = Solver("wanda", Wanda(), Target(0.5), 0, targets={"model.layers.0.mlp.up_proj": Target(0.7)})
    assert solver.at("model.layers.0.mlp.up_proj").target == Target(0.7)
    with pytest.raises(InputError, match="must have a level for every layer. Got none for other."):
        solver.at("other")


GREEDY = ALLOCATOR.replace('"budgets": ["row"]', '"budgets": ["pruned and quantised"]')


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ("(target,)", "ValueError: pairs must be 14, one for each layer. Got 1 instead."),
        ("None", "ValueError: pairs must be 14, one for each layer. Got 0 instead."),
        ("(Target(bits=8),) * 14", "ValueError: pairs must take at most "),
    ],
)
def test_pairs_beyond_the_budget_are_refused(case, tmp_path, pairs, sentence):
    body = f"return Proposal((), (None,) * 14, pairs={pairs})"
    text = GREEDY.format(measure="return [0] * len(list(layers))", allocate=body)
    (tmp_path / "own.py").write_text(text.replace("import Allocator,", "import Allocator, Target,"), "utf-8")
    with pytest.raises(InputError) as refused:
        case.run("chain", Target(0.5, bits=4), out="own", own=tmp_path, allocations={"own": None})
    assert sentence in str(refused.value)
