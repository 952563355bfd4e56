"""SparseSwaps against swaps written plainly, in float64 and loops, every loss computed again."""

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks.brute_force import best_error, output_error
from layerwise.checks.layer_cases import Recipe
from layerwise.contract.layer import Compressed, Gram, Layer, Target
from layerwise.kernels import swap_search as kernel
from layerwise.kernels.swap_state import SwapState
from layerwise.methods.magnitude import Magnitude
from layerwise.methods.random import Random
from layerwise.methods.sparse_swaps import SparseSwaps
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.methods.wanda import Wanda
from layerwise.numerics import swap_search
from layerwise.numerics.swap_search import GroupSearch, RowSearch
from tests.support.typing_helpers import mask_of
from tests.support.wide_layer import wide

LAYERS = {
    "10 inputs": Recipe(out=6, inputs=10),
    "9 inputs": Recipe(out=4, inputs=9, seed=1),
    "dead inputs": Recipe(out=4, inputs=10, dead=(1, 5, 8)),
    "fewer tokens than inputs": Recipe(out=4, inputs=10, sequences=1, length=4),
}
TARGETS = [Target(0.5), Target(0.3), Target(pattern="2:4"), Target(pattern="1:5")]


@pytest.fixture(params=["compiled", "reference"])
def path(request, monkeypatch):
    """Both ways to the same swaps: that of a CPU and that of other devices."""
    if request.param == "reference":
        use_reference(monkeypatch)


def use_reference(monkeypatch) -> None:
    monkeypatch.setattr(kernel, "swap_rounds", swap_search.reference_rounds)


def plain_loss(row: np.ndarray, gram: np.ndarray, mask: np.ndarray) -> float:
    return sum(
        row[i] * gram[i, j] * row[j] for i, j in itertools.product(range(len(row)), repeat=2) if not mask[i] | mask[j]
    )


def plain_swap(row: np.ndarray, gram: np.ndarray, mask: np.ndarray, target: Target) -> np.ndarray | None:
    """The mask after the best swap, or None where none lowers the loss."""
    length = target.n_of_m[1] if target.n_of_m else len(row)
    best, chosen = plain_loss(row, gram, mask) - 1e-9 * (row**2 * gram.diagonal())[~mask].sum(), None
    for u, p in itertools.product(range(len(row)), repeat=2):
        if mask[u] and not mask[p] and u // length == p // length:
            swapped = mask.copy()
            swapped[[u, p]] = False, True
            loss = plain_loss(row, gram, swapped)
            if loss < best:
                best, chosen = loss, swapped
    return chosen


def numbers(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight.double().numpy(), layer.gram.matrix.double().numpy()


@pytest.mark.parametrize("start", [Wanda(), Magnitude()], ids=lambda start: type(start).__name__)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", LAYERS)
def test_every_swap_is_the_best_one_and_the_end_a_local_optimum(name: str, target: Target, start, path):
    layer = layers.make(LAYERS[name], name)
    weight, gram = numbers(layer)
    expected = mask_of(start.compress(layer, target, torch.Generator())).numpy().copy()
    swaps = 0
    for swaps in range(100):
        result = SparseSwaps(start, swaps).compress(layer, target, torch.Generator())
        loss = sum(plain_loss(*row) for row in zip(weight, [gram] * len(weight), expected, strict=True))
        assert mask_of(result).numpy().tolist() == expected.tolist()
        assert result.trace[-1][2] == pytest.approx(loss, rel=1e-6, abs=1e-12)
        swapped = [plain_swap(row, gram, mask, target) for row, mask in zip(weight, expected, strict=True)]
        if all(mask is None for mask in swapped):
            break
        expected = np.array([old if new is None else new for old, new in zip(expected, swapped, strict=True)])
    optimum = SparseSwaps(start, None).compress(layer, target, torch.Generator())
    assert mask_of(optimum).numpy().tolist() == expected.tolist() and len(optimum.trace) == swaps + 1


@pytest.mark.parametrize("target", TARGETS[:3], ids=lambda target: target.label)
def test_is_between_the_best_of_all_masks_and_the_warm_start(target: Target):
    reached = 0
    for seed in range(10):
        layer = layers.make(Recipe(out=3, inputs=8, seed=seed))
        error = output_error(layer, SparseSwaps(Wanda(), None).compress(layer, target, torch.Generator()).weight)
        best = best_error(layer, target, refit=False)
        assert best * (1 - 1e-6) <= error
        assert error <= output_error(layer, Wanda().compress(layer, target, torch.Generator()).weight) * (1 + 1e-12)
        reached += error <= best * (1 + 1e-6)
    assert reached >= 3  # most 1-swap optima of rows as short as these are the optimum


@pytest.mark.parametrize("name", layers.LAYERS)
@pytest.mark.parametrize("target", [Target(0.6), Target(pattern="2:4")], ids=lambda target: target.label)
def test_the_loss_never_rises_and_the_trace_shows_it(name: str, target: Target, path):
    layer = layers.build(name)
    result = SparseSwaps(Random(), None).compress(layer, target, torch.Generator().manual_seed(0))
    objectives = [value for _, _, value in result.trace]
    assert all(after < before for before, after in itertools.pairwise(objectives))
    weight, gram = numbers(layer)
    lost = weight * ~mask_of(result).numpy()
    scale = (weight**2 * gram.diagonal()).sum()
    assert objectives[-1] == pytest.approx(((lost @ gram) * lost).sum(), rel=1e-6, abs=1e-12 * scale)
    start = Random().compress(layer, target, torch.Generator().manual_seed(0))
    changed = (mask_of(result) != mask_of(start)).sum()
    assert 2 * result.info["swaps"] >= changed and len(result.trace) <= 1 + result.info["swaps"]


def brute_changes(weight: torch.Tensor, gram: torch.Tensor, mask: torch.Tensor, length: int) -> torch.Tensor:
    """[rows, in, in] float64 change of the loss by pruning the first index and restoring the second."""
    pruned = torch.where(mask, 0.0, weight)
    coupling, alone = pruned @ gram, weight**2 * gram.diagonal()
    change = (alone + 2 * weight * coupling)[:, :, None] + (alone - 2 * weight * coupling)[:, None]
    change -= 2 * weight[:, :, None] * weight[:, None] * gram
    group = torch.arange(len(gram)) // length
    allowed = mask[:, :, None] & ~mask[:, None] & (group[:, None] == group)
    return torch.where(allowed, change, torch.inf)


@pytest.mark.parametrize("length", [None, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_of_all_pairs(seed: int, length: int | None, monkeypatch):
    """Also where it leaves most pairs out, and with rows in several parts."""
    monkeypatch.setattr("layerwise.numerics.swap_search.ENTRIES", 2**14)
    layer = layers.make(Recipe(out=40, inputs=150, seed=seed))
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    if seed % 2:
        mask = mask_of(Wanda().compress(layer, Target(0.6), torch.Generator()))
    change = brute_changes(weight, gram, mask, length or 150)
    coupling, alone = torch.where(mask, 0.0, weight) @ gram, weight**2 * gram.diagonal()
    cost = torch.where(mask, alone + 2 * weight * coupling, torch.inf)
    gain = torch.where(mask, torch.inf, alone - 2 * weight * coupling)
    search = GroupSearch(gram.float(), length) if length else RowSearch(gram.float())
    u, p = search(cost.float(), gain.float(), weight.float())
    came, best = change[torch.arange(40), u, p], change.flatten(1).amin(1)
    assert (came <= best + 1e-6 * best.abs()).all()


@pytest.mark.parametrize("seed", range(4))
def test_no_pair_is_better_than_its_bound(seed: int):
    layer = layers.make(Recipe(out=10, inputs=60, seed=seed))
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    mask = mask_of(Wanda().compress(layer, Target(0.5), torch.Generator()))
    coupling, alone = torch.where(mask, 0.0, weight) @ gram, weight**2 * gram.diagonal()
    cost = torch.where(mask, alone + 2 * weight * coupling, torch.inf)
    gain = torch.where(mask, torch.inf, alone - 2 * weight * coupling)
    bound = RowSearch(gram).bound(cost, gain, weight)
    least = brute_changes(weight, gram, mask, 60).amin(2)
    assert (bound[mask] <= least[mask] + 1e-9 * alone.sum()).all()


def test_a_warm_start_that_updates_weights_gives_its_mask_alone():
    layer = layers.build("correlated")
    start = SparseGPT().compress(layer, Target(0.6), torch.Generator())
    result = SparseSwaps(SparseGPT(), 0).compress(layer, Target(0.6), torch.Generator())
    assert torch.equal(mask_of(result), mask_of(start))
    assert torch.equal(result.weight, torch.where(mask_of(start), layer.weight, 0.0))


def test_swaps_are_counted_per_row(path):
    layer = layers.build("correlated")
    before = mask_of(Wanda().compress(layer, Target(0.6), torch.Generator()))
    for swaps in (0, 1, 3):
        after = SparseSwaps(Wanda(), swaps).compress(layer, Target(0.6), torch.Generator())
        assert int((before != mask_of(after)).sum(1).max()) <= 2 * swaps and len(after.trace) == swaps + 1


def test_a_diagonal_gram_leaves_nothing_to_swap():
    layer = layers.build("correlated")
    layer = replace(layer, gram=Gram(torch.diag(layer.gram.diagonal), 1))
    assert SparseSwaps(Wanda(), None).compress(layer, Target(0.6), torch.Generator()).info["swaps"] == 0


@pytest.mark.parametrize("target", [Target(0.6), Target(pattern="2:4")], ids=lambda target: target.label)
def test_a_huge_input_that_every_row_keeps_does_not_end_the_search(target: Target, path):
    """As large as the massive activations of large models: only what is pruned is in the loss."""
    layer = layers.build("correlated")
    masks = []
    for power in (10, 17):  # exact in float32
        size = torch.ones(64)
        size[3] = 2.0**power
        gram = Gram(layer.gram.matrix * size * size[:, None], layer.gram.tokens)
        result = SparseSwaps(Wanda(), None).compress(replace(layer, gram=gram), target, torch.Generator())
        masks.append(mask_of(result))
        assert masks[-1][:, 3].all()
    assert torch.equal(*masks)


def tied(inputs: int, seed: int) -> Layer:
    """Every weight 1 or -1 and every Gram entry a small whole number: many pairs change the loss by the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (3 * inputs, inputs), generator=generator).double()
    weight = torch.randint(0, 2, (12, inputs), generator=generator) * 2.0 - 1
    return Layer("tied", weight, Gram((x.T @ x).float(), len(x)))


def assert_same(fast: Compressed, plain: Compressed) -> None:
    """Swap by swap: after each round the same loss, to the last bit, and the same masks in the end."""
    assert torch.equal(mask_of(fast), mask_of(plain)) and fast.info == plain.info
    assert [(i, value) for i, _, value in fast.trace] == [(i, value) for i, _, value in plain.trace]


EQUAL = [Target(0.5), Target(0.7), Target(pattern="2:4"), Target(pattern="4:8"), Target(pattern="1:5")]


@pytest.mark.parametrize("start", [Wanda(), Random()], ids=lambda start: type(start).__name__)
@pytest.mark.parametrize("target", EQUAL, ids=lambda target: target.label)
@pytest.mark.parametrize("kind", [*layers.LAYERS, "wide", "tied"])
def test_both_paths_make_the_same_swaps(kind: str, target: Target, start, monkeypatch):
    layer = {"wide": wide, "tied": tied}[kind](90, 0) if kind in ("wide", "tied") else layers.build(kind)
    fast = SparseSwaps(start, None).compress(layer, target, torch.Generator().manual_seed(0))
    use_reference(monkeypatch)
    assert_same(fast, SparseSwaps(start, None).compress(layer, target, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("make", [wide, tied])
@pytest.mark.parametrize("inputs", [300, 512])
@pytest.mark.parametrize("seed", range(3))
def test_both_paths_agree_where_bounds_are_loose_or_pairs_tied(make, inputs: int, seed: int, monkeypatch):
    layer = make(inputs, seed)
    fast = SparseSwaps(Wanda(), 40).compress(layer, Target(0.5), torch.Generator())
    assert fast.info["swaps"] > 12 * 10
    use_reference(monkeypatch)
    assert_same(fast, SparseSwaps(Wanda(), 40).compress(layer, Target(0.5), torch.Generator()))


@pytest.mark.parametrize("target", [Target(0.5), Target(pattern="2:4")], ids=lambda target: target.label)
def test_threads_and_the_number_of_rounds_at_a_time_change_nothing(target: Target, monkeypatch):
    layer, before = wide(100, 1), torch.get_num_threads()
    one = SparseSwaps(Wanda(), 50).compress(layer, target, torch.Generator())
    monkeypatch.setattr(kernel, "ROUNDS", 7)
    monkeypatch.setattr(kernel, "TASK_ROWS", 5)
    torch.set_num_threads(3)
    try:
        assert_same(SparseSwaps(Wanda(), 50).compress(layer, target, torch.Generator()), one)
    finally:
        torch.set_num_threads(before)


def test_seconds_of_rounds_rise_and_end_within_the_call(path):
    start = time.perf_counter()
    result = SparseSwaps(Random(), None).compress(wide(300, 1), Target(0.5), torch.Generator())
    total, seconds = time.perf_counter() - start, [s for _, s, _ in result.trace]
    assert len(seconds) > 2 * kernel.ROUNDS  # the clock is looked at more than once
    assert seconds[-1] <= total and all(0 < s < t for s, t in itertools.pairwise(seconds))


def test_rows_that_lie_otherwise_in_memory_give_the_same():
    layer = wide(64, 3)
    turned = replace(layer, weight=layer.weight.T.contiguous().T)
    assert not turned.weight.is_contiguous()
    for target in (Target(0.5), Target(pattern="2:4")):
        assert_same(*(SparseSwaps(Wanda(), 20).compress(x, target, torch.Generator()) for x in (layer, turned)))


@pytest.mark.parametrize("length", [None, 4])
def test_the_rounds_leave_the_rows_as_they_tell(length: int | None, path):
    """Mask and loss are those of the last round."""
    layer = wide(100, 2)
    weight, gram = layer.weight, layer.gram.matrix / 1024
    mask = mask_of(Wanda().compress(layer, Target(pattern="2:4") if length else Target(0.5), torch.Generator()))
    pruned = torch.where(mask, 0.0, weight.double())
    coupling = pruned @ gram.double()
    rows = SwapState(weight, gram, mask, coupling, (coupling * pruned).sum(1), length)
    *_, (_, last, made) = swap_search.swap_rounds(rows, 20)
    pruned = torch.where(mask, 0.0, weight.double())
    loss = ((pruned @ gram.double()) * pruned).sum(1)
    torch.testing.assert_close(rows.loss, loss, rtol=1e-9, atol=0)
    assert made >= 1 and math.isclose(last, float(loss.sum()), rel_tol=1e-9)
