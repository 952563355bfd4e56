"""Products with packed weights against the weights that they represent."""

import csv
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from layerwise.cli.app import app
from layerwise.contract.target import Target
from layerwise.export import decode
from layerwise.figures import decode as decode_figure
from layerwise.kernels.packed_matvec import Sparse24, W4BlockSparse, W4Grouped
from layerwise.kernels.packed_parts import Dense16, RowSparse, SumOfParts
from layerwise.runtime.errors import InputError
from tests.support.typing_helpers import some

SHAPES = [(1, 16), (1, 1), (5, 100), (7, 512), (3, 1000), (64, 352)]


def grid(rows, inputs, length):
    generator = torch.Generator().manual_seed(rows * inputs + length)
    groups = -(-inputs // length)
    codes = torch.randint(0, 16, (rows, inputs), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) + 0.1).bfloat16().float()
    zeros = torch.randint(0, 16, (rows, groups), generator=generator).float()
    group_of = torch.arange(inputs) // length
    weight = scales.double()[:, group_of] * (codes - zeros.double()[:, group_of])
    return codes, scales, zeros, weight.numpy()


def check(storage, weight):
    """The round trip is exact, and the product within float32's rounding of each row's sum of |w x|."""
    np.testing.assert_array_equal(storage.dequantised(), weight)
    x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1)).numpy()
    before = x.copy()
    # A code and its zero are summed apart, so the bound is on |code| + |zero| rather than on their difference.
    bound = 4e-6 * (np.abs(weight).sum(1) + 15 * weight.shape[1]) * np.abs(x).max() / np.sqrt(weight.shape[1])
    for threads in (1, 2):
        assert (np.abs(storage.product(x, threads) - weight @ x.astype(np.float64)) <= bound).all()
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("rows, inputs", SHAPES)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups(rows, inputs, group):
    codes, scales, zeros, weight = grid(rows, inputs, group)
    check(W4Grouped.pack(codes, scales, zeros, group), weight)


@pytest.mark.parametrize("rows, inputs", SHAPES)
@pytest.mark.parametrize("share", ["none", "some", "all"])
def test_blocks(rows, inputs, share):
    codes, scales, zeros, weight = grid(rows, inputs, 16)
    chosen = torch.rand(scales.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    chosen[0] = False  # an empty row beside others
    kept = {"none": torch.zeros_like(chosen), "some": chosen, "all": torch.ones_like(chosen)}[share]
    mask = kept.repeat_interleave(16, 1)[:, :inputs].numpy()
    check(W4BlockSparse.pack(codes, scales, zeros, kept), np.where(mask, weight, 0.0))


@pytest.mark.parametrize("rows, inputs", SHAPES)
def test_two_of_four(rows, inputs):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, inputs, generator=generator).bfloat16().float()
    order = torch.rand(rows, -(-inputs // 4), 4, generator=generator).argsort(2)
    mask = (order < 2).flatten(1)[:, :inputs]
    check(Sparse24.pack(weight, mask), torch.where(mask, weight, 0.0).double().numpy())


def normal(rows, inputs, seed):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


@pytest.mark.parametrize("rows, inputs", [*SHAPES, (3, 16), (3, 33), (2, 48)])
def test_bfloat16(rows, inputs):
    weight = normal(rows, inputs, 5)
    check(Dense16.pack(weight), weight.double().numpy())


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rows, inputs", [*SHAPES, (3, 16), (3, 33)])
def test_bitmap(rows, inputs, share):
    weight, kept = normal(rows, inputs, 6), int(share * inputs)
    order = torch.rand(rows, inputs, generator=torch.Generator().manual_seed(7)).argsort(1)
    storage = RowSparse.pack(weight, order < kept)
    check(storage, torch.where(order < kept, weight, 0.0).double().numpy())
    assert storage.nbytes == 2 * rows * (kept + -(-inputs // 16))  # 16 bits a value, and the bitmap padded to blocks


def test_the_bits_of_every_byte_choose_the_lanes_of_its_values():
    """All 256 bytes in both halves of a word, in turn those with equally many bits, as every row keeps as many."""
    words = np.arange(256, dtype=np.uint16)
    for half in (0, 8):
        bits = torch.from_numpy(((words << half)[:, None] >> np.arange(16)) & 1).bool()
        for count in range(9):
            own = bits[bits.sum(1) == count]
            weight = normal(len(own), 16, count)
            check(RowSparse.pack(weight, own), torch.where(own, weight, 0.0).double().numpy())


@pytest.mark.parametrize("label", decode.WITH_FACTORS)
@pytest.mark.parametrize("rows, inputs", [(64, 352), (200, 96), (33, 1000)])
def test_sums(rows, inputs, label):
    """S x + B (A x) is the product with the dense sum, whose parts are what the target says."""
    target, weight = Target.parse(label), normal(rows, inputs, 8)
    storage = decode._sum(weight, target, torch.Generator().manual_seed(9))
    rank = target.rank_of(rows, inputs)
    assert storage.left.shape == (rows, rank) and storage.right.shape == (rank, inputs)
    assert {type(storage.left), type(storage.right)} == {W4Grouped if target.factor_bits else Dense16}
    dense, rest = storage.left.dequantised() @ storage.right.dequantised(), storage.rest
    if target.sparsity:
        assert ((some(rest).dequantised() == 0).sum(1) == int(target.sparsity * inputs)).all()
    assert (rest is None) == target.rest.dense and isinstance(rest, W4Grouped) == bool(target.bits)
    dense = dense if rest is None else dense + rest.dequantised()
    np.testing.assert_allclose(storage.dequantised(), dense, rtol=0, atol=1e-12 * np.abs(dense).max())
    x = torch.randn(inputs, generator=torch.Generator().manual_seed(10)).numpy()
    exact = dense @ x.astype(np.float64)
    for threads in (1, 2):
        assert np.abs(storage.product(x, threads) - exact).max() <= 2e-6 * np.abs(exact).max()


def test_misfits_are_one_sentence():
    codes, scales, zeros, _ = grid(2, 64, 32)
    kept = torch.ones(2, 4, dtype=torch.bool)
    for message, call in {
        "A group must be a multiple of 16 inputs. Got 24 instead.": lambda: W4Grouped.pack(codes, scales, zeros, 24),
        r"Scales must be \[2, 4\]. Got float32 \[2, 2\] instead.": lambda: W4BlockSparse.pack(
            codes, scales, zeros, kept
        ),
        "Codes must be whole numbers from 0 to 15.": lambda: W4Grouped.pack(codes + 1, scales, zeros, 32),
        "exact in bfloat16, as they are stored": lambda: W4Grouped.pack(codes, scales + 1e-4, zeros, 32),
        "two of every four": lambda: Sparse24.pack(codes.float(), torch.ones(2, 64, dtype=torch.bool)),
        "in every row. Got 1 to 2 instead.": lambda: RowSparse.pack(codes.float(), torch.ones(2, 64).tril().bool()),
        r"The right factor must be \[64, inputs\]. Got \[2, 64\] instead.": lambda: SumOfParts(
            Dense16.pack(codes.float()), Dense16.pack(codes.float())
        ),
        r"The part S must be \[2, 2\]. Got \[2, 64\] instead.": lambda: SumOfParts(
            Dense16.pack(codes.float()),
            Dense16.pack(codes.float().T),
            RowSparse.pack(codes.float(), torch.ones(2, 64).bool()),
        ),
        r"float32 \[64\]. Got float32 \[63\]": lambda: W4Grouped.pack(codes, scales, zeros, 32).product(
            np.zeros(63, np.float32)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def run(*arguments: str) -> int:
    return app(["decode", *arguments], standalone_mode=False)


def test_a_bad_shape_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="at least one row and one input. Got 0x16 instead."):
        run("--shape", "0x16", "--out", str(tmp_path / "decode.csv"))


def test_more_threads_than_processors_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"--threads must be at most the \d+ processors. Got 100000 instead."):
        run("--shape", "64x64", "--threads", "100000", "--out", str(tmp_path / "decode.csv"))


def test_a_product_that_is_wrong_is_no_time():
    (good, base) = decode.stored_weights(32, 64, 1, "cpu")[:2]
    wrong = replace(good, exact=good.exact + good.exact.abs().max() / 1000)
    with pytest.raises(InputError, match="The product of dense float32 is wrong by 0.001 of its largest entry."):
        decode.measure([wrong, base], 1, 1, "cpu")


def test_a_rank_of_zero_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "pin", lambda threads: None)
    with pytest.raises(InputError, match=r"The rank of 60% row rank 10% must .* Got 0 in --shape \[16, 16\] instead."):
        run("--shape", "16x16", "--out", str(tmp_path / "decode.csv"))


def test_kept_weights_are_counted_as_they_are_stored():
    bits = {entry.storage: entry.bits for entry in decode.stored_weights(32, 80, 1, "cpu")}
    assert bits["W4 50% 1x16"] == 3 / 5 * (4 + (16 + 16 + 4) / 16)  # three of five blocks stay


def test_the_table_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "pin", lambda threads: None)  # these tests' process keeps its processors
    path = tmp_path / "decode.csv"
    run("--shape", "64x512", "--rounds", "2", "--out", str(path))
    rows = {row["storage"]: row for row in csv.DictReader(path.open())}
    bits = {name: float(row["bits_per_weight"]) for name, row in rows.items()}
    expected = {"dense float32": 32, "dense bfloat16": 16, "2:4 bfloat16": 9, "W4 g128": 4.1562, "W4 50% 1x16": 3.125}
    kept, weights = 16 * 205 / 512 + 1, 64 * 512  # 205 = 512 - floor(60% of 512), and the bitmap
    rank, tenth, six = (int(share * weights / 576) for share in (0.4, 0.1, 0.06))
    in_codes = (64 * (4 * rank + 20) + rank * (4 * 512 + 8 * 20)) / weights  # a row of B has one group, one of A eight
    expected |= {"60% row": kept, "60% row rank 10%": kept + 16 * tenth * 576 / weights}
    expected |= {"rank 40%": 16 * rank * 576 / weights, "rank 40% 4b g64": in_codes}
    expected |= {"4b g128 rank 6%": 4.15625 + 16 * six * 576 / weights}
    assert bits == pytest.approx(expected, abs=1e-4)
    assert set(rows) == set(decode_figure.LOOKS) and set(decode_figure.KINDS) == set(decode.WITH_FACTORS)
    vectors = 4 * (64 + 512)
    assert int(rows["W4 50% 1x16"]["bytes_moved"]) == 64 * 512 * 3.125 / 8 + vectors  # no fillers at this shape
    assert int(rows["W4 g128"]["bytes_moved"]) == 64 * 512 * 4.15625 / 8 + vectors
    assert max(float(row["max_relative_error"]) for row in rows.values()) < 0.01
    assert len(decode_figure.decode(pd.read_csv(path)).axes) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton kernels need CUDA")
def test_on_cuda():
    from layerwise.kernels.cuda import OnDevice

    x = torch.randn(1000, generator=torch.Generator().manual_seed(4))
    for length, pack in ((16, None), (128, 128)):
        codes, scales, zeros, weight = grid(33, 1000, length)
        kept = torch.arange(scales.numel()).view(scales.shape) % 2 == 0
        storage = W4Grouped.pack(codes, scales, zeros, pack) if pack else W4BlockSparse.pack(codes, scales, zeros, kept)
        exact = torch.from_numpy(storage.dequantised()) @ x.double()
        found = OnDevice(storage).product(x.cuda()).cpu().double()
        assert float((found - exact).abs().max() / exact.abs().max()) < 1e-5
