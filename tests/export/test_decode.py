"""Products with packed weights against the weights that they represent."""

import csv
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from layerwise.cli.app import app
from layerwise.export import decode
from layerwise.figures import decode as decode_figure
from layerwise.kernels.packed_matvec import Sparse24, W4BlockSparse, W4Grouped
from layerwise.runtime.errors import InputError

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
        r"float32 \[64\]. Got float32 \[63\]": lambda: W4Grouped.pack(codes, scales, zeros, 32).product(
            np.zeros(63, np.float32)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def run(*arguments: str) -> int:
    return app(["decode", *arguments], standalone_mode=False)


def test_a_bad_shape_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="at least one row and one input. Got 0 16 instead."):
        run("--shape", "0x16", "--out", str(tmp_path / "decode.csv"))


def test_more_threads_than_processors_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"--threads must be at most the \d+ processors. Got 100000 instead."):
        run("--shape", "64x64", "--threads", "100000", "--out", str(tmp_path / "decode.csv"))


def test_a_product_that_is_wrong_is_no_time():
    (good, base) = decode.stored_weights(32, 64, 1, "cpu")[:2]
    wrong = replace(good, exact=good.exact + good.exact.abs().max() / 1000)
    with pytest.raises(InputError, match="The product of dense float32 is wrong by 0.001 of its largest entry."):
        decode.measure([wrong, base], 1, 1, "cpu")


def test_kept_weights_are_counted_as_they_are_stored():
    bits = {entry.storage: entry.bits for entry in decode.stored_weights(8, 80, 1, "cpu")}
    assert bits["W4 50% 1x16"] == 3 / 5 * (4 + (16 + 16 + 4) / 16)  # three of five blocks stay


def test_the_table_and_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "pin", lambda threads: None)  # these tests' process keeps its processors
    path = tmp_path / "decode.csv"
    run("--shape", "64x512", "--rounds", "2", "--out", str(path))
    rows = {row["storage"]: row for row in csv.DictReader(path.open())}
    bits = {name: float(row["bits_per_weight"]) for name, row in rows.items()}
    expected = {"dense float32": 32, "dense bfloat16": 16, "2:4 bfloat16": 9, "W4 g128": 4.1562, "W4 50% 1x16": 3.125}
    assert bits == expected and set(rows) == set(decode_figure.LOOKS)
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
