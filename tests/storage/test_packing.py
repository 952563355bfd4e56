"""The layout of compressed layers: what is stored is what is evaluated, in the bits that the accounting counts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layerwise.calibration.gram_store import INDEX, block_file, read_block
from layerwise.checks import layer_cases as layers
from layerwise.checks.layer_cases import grid_of, regridded
from layerwise.compression.score import output_error
from layerwise.compression.verify import broken_promise
from layerwise.contract.layer import Compressed, Layer
from layerwise.contract.target import Target
from layerwise.numerics import grids, ops, patterns
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import sha256
from layerwise.storage import bit_packing, layer_packing, layer_unpacking, packed_file
from layerwise.storage.bits_per_weight import bits_per_weight, stored_bits
from tests.support import factors
from tests.support.typing_helpers import mask_of, some


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


TARGETS = [
    Target(),
    Target(0.5),
    Target(0.6, "layer"),
    Target(pattern="2:4"),
    Target(pattern="3:5"),  # a bitmap
    Target(pattern="2:6"),
    Target(pattern="4:8"),
    Target(pattern="1:300"),  # places of 9 bits
    Target(0.5, "1x16"),
    Target(0.3, "1x7"),
    *(Target(bits=bits, group=16) for bits in range(2, 9)),
    Target(bits=4, group=128, symmetric=True),
    Target(bits=4),
    Target(0.5, bits=4, group=16),
    Target(pattern="2:4", bits=3, group=24, symmetric=True),
    Target(pattern="6:8", bits=4, group=16),
    Target(0.5, "1x16", bits=4, group=16),
    Target(0.5, "1x16", bits=4, group=8),
    Target(0.5, "1x16", bits=4, group=128),
    Target(0.5, "1x16", bits=8),
    Target(format="nvfp4"),
    Target(format="mxfp4"),
    Target(pattern="2:4", format="nvfp4"),
    Target(0.5, "1x16", format="nvfp4"),
    Target(rank=0.4),
    Target(0.5, rank=0.2),
    Target(pattern="2:4", rank=0.2),
    Target(bits=4, group=16, rank=0.1),
    Target(0.5, "1x16", bits=4, group=16, rank=0.1),
    Target(format="nvfp4", rank=0.1),
    Target(rank=0.4, factor_bits=4, factor_group=16),
    Target(0.5, rank=0.2, factor_bits=3, factor_group=24),
    Target(bits=4, group=16, rank=0.2, factor_bits=8),
]
W4S50 = Target(0.5, "1x16", bits=4, group=16)


def compressed(layer: Layer, target: Target) -> Compressed:
    """The layer pruned by magnitude and rounded to a min-max grid of what is left; with factors of what that misses."""
    if target.rank:
        rest = None if target.rest.dense else compressed(layer, target.rest)
        missing = layer.weight.double() - (0 if rest is None else rest.weight.double())
        return factors.of_best(missing, target, rest)
    mask = ops.prune_mask(layer.weight.abs(), target) if target.sparsity else None
    kept = layer.weight if mask is None else torch.where(mask, layer.weight, 0.0)
    if target.bits is None:
        return Compressed(kept.clone(), mask)
    grid, group_of = ops.fit_grid(kept, target), ops.groups_of(kept.shape[1], target.group)
    codes = grid.codes(kept, group_of)
    values = grid.values(codes, group_of)
    return Compressed(values if mask is None else torch.where(mask, values, 0.0), mask, grid.quantised(codes))


def shape_of(layer: Layer) -> tuple[int, int]:
    out, inputs = layer.weight.shape
    return out, inputs


def stored(layer: Layer, target: Target, dtype: torch.dtype = torch.float32) -> Compressed:
    return layer_packing.as_stored(compressed(layer, target), target, dtype)


def parts(result: Compressed, target: Target, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return layer_packing.parts_of(result, target, dtype)


@pytest.mark.parametrize("target", [Target(0.5), Target(bits=4, group=16)], ids=lambda target: target.label)
def test_the_stored_weight_takes_the_memory_of_the_weight(target: Target):
    layer = layers.build("correlated")
    result = compressed(layer, target)
    expected = stored(layer, target, torch.bfloat16).weight
    found = layer_packing.as_stored(result, target, torch.bfloat16).weight
    assert found.data_ptr() == result.weight.data_ptr()
    assert torch.equal(found, expected) and not torch.equal(compressed(layer, target).weight, expected)


@pytest.mark.parametrize("target", [Target(0.5), Target(bits=4, group=16)], ids=lambda target: target.label)
def test_a_weight_of_inference_mode_is_stored_like_any_other(target: Target):
    layer = layers.build("correlated")
    with torch.inference_mode():
        result = compressed(layer, target)
    found = layer_packing.as_stored(result, target, torch.bfloat16).weight
    assert torch.equal(found, stored(layer, target, torch.bfloat16).weight)


def test_a_weight_with_shared_entries_is_copied_before_it_is_stored():
    row = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    kept, mask = row.clone(), torch.ones(8, 48, dtype=torch.bool)
    found = layer_packing.as_stored(Compressed(row.expand(8, 48), mask), Target(0.5), torch.bfloat16).weight
    assert torch.equal(row, kept)
    assert torch.equal(found, kept.bfloat16().float().expand(8, 48))


def assert_same(found: Compressed, result: Compressed, target: Target) -> None:
    assert torch.equal(found.weight, result.weight)
    assert (found.mask is None) == (target.sparsity == 0) and (found.quantised is None) == (target.bits is None)
    for name in ("left", "right") if target.rank else ():
        assert torch.equal(getattr(some(found.low_rank), name), getattr(some(result.low_rank), name))
        codes, expected = (getattr(some(one.low_rank), f"{name}_codes") for one in (found, result))
        assert (codes is None) == (expected is None) == (target.factor_bits is None)
        for part in ("codes", "scales", "zeros") if codes else ():
            assert torch.equal(getattr(codes, part), getattr(expected, part))
    kept = slice(None) if result.mask is None else result.mask
    if found.mask is not None:
        assert torch.equal(found.mask, mask_of(result))
    if found.quantised is not None:
        assert torch.equal(grid_of(found).codes[kept], grid_of(result).codes[kept])


# ------------------------------------------------------------------------------------------------- what is read back


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
def test_rows_are_stored_alike_however_many_at_once(target, monkeypatch):
    layer = layers.build("correlated")
    result, judged = stored(layer, target, torch.bfloat16), broken_promise(layer, target, compressed(layer, target))
    whole = parts(result, target, torch.bfloat16)
    for module in (grids, layer_packing, patterns):
        monkeypatch.setattr(module, "ROWS", 5)
    assert broken_promise(layer, target, compressed(layer, target)) is judged is None
    found = stored(layer, target, torch.bfloat16)
    assert_same(found, result, target)
    own = parts(found, target, torch.bfloat16)
    assert own.keys() == whole.keys() and all(torch.equal(own[name], whole[name]) for name in whole)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("name", layers.LAYERS)
def test_stored_tensors_are_read_back_unchanged(name, target):
    layer = layers.build(name)
    result = stored(layer, target)
    assert broken_promise(layer, target, result) is None
    assert_same(layer_unpacking.restored(parts(result, target), target, shape_of(layer)), result, target)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_gets_the_weight_that_is_evaluated(target, dtype):
    layer = layers.build("correlated")
    result = stored(layer, target, dtype)
    found = layer_unpacking.restored(parts(result, target, dtype), target, shape_of(layer))
    assert torch.equal(found.weight.to(dtype), result.weight.to(dtype))


@pytest.mark.parametrize("target", [Target(bits=4, group=16), Target(0.5, bits=3, group=16, symmetric=True), W4S50])
def test_reordered_groups_and_input_scales_are_stored(target):
    layer = layers.build("correlated")
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 16
    values = regridded(stored(layer, target), group_of=shuffled, input_scale=torch.rand(64) + 0.5)
    values = layer_packing.as_stored(values, target, torch.float32)
    tensors = parts(values, target)
    found = layer_unpacking.restored(tensors, target, (24, 64))
    assert_same(found, values, target)
    assert torch.equal(some(grid_of(found).group_of), shuffled)
    assert torch.equal(some(grid_of(found).input_scale), some(grid_of(values).input_scale))
    kept = 1.0 if values.mask is None else float(values.mask.float().mean())
    expected = stored_bits(target, kept, 24, 64, input_scale=True, reordered=True)
    assert {name: tensor.nbytes * 8 for name, tensor in tensors.items()} == expected


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_scales_of_a_format_are_stored_as_hardware_reads_them(form):
    target, layer = Target(format=form), layers.build("correlated")
    tensors, scales = parts(stored(layer, target), target), grid_of(stored(layer, target)).scales
    if form == "nvfp4":
        assert tensors["scales"].dtype == torch.float8_e4m3fn and tensors["divisor"].shape == (1,)
        assert torch.equal(tensors["scales"].float(), scales)
    else:
        assert torch.equal(2.0 ** (tensors["scales"].double() - 127), scales.double()) and "divisor" not in tensors
    for name, tensor in tensors.items():
        if name != "codes":
            with pytest.raises(ValueError, match="scales|divisor"):
                layer_unpacking.restored({**tensors, name: tensor.double()}, target, shape_of(layer))


def test_runs_of_inputs_are_not_stored_as_reordered():
    layer, target = layers.build("correlated"), Target(bits=4, group=16)
    result = regridded(stored(layer, target), group_of=torch.arange(64) // 16)
    assert not layer_packing.reordered(result, target) and "group_of" not in parts(result, target)


@pytest.mark.parametrize("at_once", [8, bit_packing.PACKED])
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 9, 16])
def test_bits_are_packed_from_the_lowest(bits, at_once, monkeypatch):
    monkeypatch.setattr(bit_packing, "PACKED", at_once)
    numbers = torch.randint(2**bits, (37,), generator=torch.Generator().manual_seed(bits))
    octets = bit_packing.pack(numbers, bits)
    whole = sum(int(number) << (i * bits) for i, number in enumerate(numbers))
    assert bytes(octets.numpy()) == whole.to_bytes(math.ceil(37 * bits / 8), "little")
    assert torch.equal(bit_packing.unpack(octets, bits, 37).long(), numbers)
    with pytest.raises(ValueError, match=f"37 numbers of {bits} bits must take"):
        bit_packing.unpack(octets[:-1], bits, 37)


# ------------------------------------------------------------------------------------------------------------ its size


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.label)
@pytest.mark.parametrize("shape", [(24, 64), (10, 160), (5, 201), (1, 50)])
def test_every_part_takes_the_bytes_that_are_counted(target, shape):
    layer = layers.make(layers.Recipe(*shape, weights="bfloat16"))
    result = stored(layer, target)
    kept = 1.0 if result.mask is None else float(result.mask.double().mean())
    tensors = parts(result, target)
    if "" in tensors:
        tensors = {"values": tensors[""]}
    expected = {name: math.ceil(round(bits, 6) / 8) for name, bits in stored_bits(target, kept, *shape).items()}
    assert {name: tensor.nbytes for name, tensor in tensors.items()} == expected


FILES = {
    "dense": (Target(), 16),
    "50% with a bitmap": (Target(0.5), 8 + 1),
    "2:4": (Target(pattern="2:4"), 8 + 1),
    "4:8": (Target(pattern="4:8"), 8 + 1),
    "8:16": (Target(pattern="8:16"), 8 + 1),
    "3:4": (Target(pattern="3:4"), 12 + 1),
    "6:8": (Target(pattern="6:8"), 12 + 1),
    "2:8": (Target(pattern="2:8"), 4 + 0.75),
    "2:4 W4 g128": (Target(pattern="2:4", bits=4, group=128), 2 + 1 + 20 / 128),
    "4:8 W4 g128": (Target(pattern="4:8", bits=4, group=128), 2 + 1 + 20 / 128),
    "8:16 W4 g128": (Target(pattern="8:16", bits=4, group=128), 2 + 1 + 20 / 128),
    "3:4 W4 g128": (Target(pattern="3:4", bits=4, group=128), 3 + 1 + 20 / 128),
    "6:8 W4 g128": (Target(pattern="6:8", bits=4, group=128), 3 + 1 + 20 / 128),
    "W4 g128": (Target(bits=4, group=128), 4 + 20 / 128),
    "W4 g128 symmetric": (Target(bits=4, group=128, symmetric=True), 4 + 16 / 128),
    "W4S50": (W4S50, 3.125),
}


@pytest.mark.parametrize("case", FILES)
def test_the_file_is_as_large_as_the_accounting_says(tmp_path, case):
    target, bits = FILES[case]
    layer = layers.make(layers.Recipe(48, 256, weights="bfloat16"))
    result = stored(layer, target)
    path = tmp_path / "weights.safetensors"
    packed_file.write(path, {"layer": parts(result, target)}, {"layer": (48, 256)}, target)
    kept = 1.0 if result.mask is None else float(result.mask.float().mean())
    assert bits_per_weight(target, kept, 48, 256) == bits
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == bits * 48 * 256 / 8 and header < 800
    assert packed_file.PackedFile(path).stored_bytes("layer") == bits * 48 * 256 / 8


# ------------------------------------------------------------------------------------------------------------ rounding


def test_scales_are_rounded_to_sixteen_bits_and_the_weight_with_them():
    layer, target = layers.build("correlated"), Target(bits=4, group=16)
    before, after = compressed(layer, target), stored(layer, target)
    exact, rounded = grid_of(before), grid_of(after)
    assert not torch.equal(exact.scales, rounded.scales) and torch.equal(exact.codes, rounded.codes)
    assert torch.equal(rounded.scales.half().float(), rounded.scales)
    assert torch.equal(grid_of(stored(layer, target, torch.bfloat16)).scales, exact.scales.bfloat16().float())
    assert grid_of(layer_packing.as_stored(after, target, torch.float32)).scales.equal(rounded.scales)
    torch.testing.assert_close(after.weight, before.weight, rtol=2**-11, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_of_scales_hardly_moves_the_error(bits):
    layer, target = layers.build("correlated"), Target(bits=bits, group=16)
    before, after = (output_error(layer, f(layer, target).weight)[1] for f in (compressed, stored))
    assert after == pytest.approx(before, rel=2e-2 if bits == 8 else 2e-3) and after != before


def test_scales_of_inputs_that_are_all_one_take_no_bits():
    layer, target = layers.build("correlated"), Target(bits=4, group=16)
    result = regridded(compressed(layer, target), input_scale=torch.ones(64))
    found = layer_packing.as_stored(result, target, torch.float32)
    assert grid_of(found).input_scale is None and torch.equal(found.weight, stored(layer, target).weight)


def test_scales_that_float16_cannot_hold_are_bfloat16():
    tiny, huge, usual = torch.tensor([1e-12, 1.0]), torch.tensor([1e6, 1.0]), torch.tensor([0.003, 1.0])
    assert bit_packing.half(tiny, torch.float32).dtype == torch.bfloat16 == bit_packing.half(huge, torch.float32).dtype
    assert bit_packing.half(usual, torch.float32).dtype == torch.float16
    for dtype in (torch.float32, torch.bfloat16):
        least = bit_packing.half(torch.tensor([1e-44, 3.4e38]), dtype)
        assert least.dtype == torch.bfloat16 and (least > 0).all() and torch.isfinite(least).all()


def test_scales_that_are_not_stored_as_they_are_used_are_refused():
    layer, target = layers.build("correlated"), Target(bits=4, group=16)
    with pytest.raises(ValueError, match="scales must be given in 16 bits, as they are stored"):
        parts(compressed(layer, target), target)


def test_updated_weights_of_a_float32_model_keep_their_digits():
    """Those of a 16-bit checkpoint take 16 bits; others are stored as they are evaluated, in 32."""
    layer, target = layers.build("bfloat16 weights"), Target(0.5)
    result = compressed(layer, target)
    assert parts(result, target)["values"].dtype == torch.bfloat16
    moved = replace(result, weight=result.weight / 3)
    assert parts(moved, target)["values"].dtype == torch.float32
    assert torch.equal(layer_unpacking.restored(parts(moved, target), target, (24, 64)).weight, moved.weight)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def path(tmp_path):
    """A file of two layers at W4S50."""
    shapes = {name: tuple(layers.build(name).weight.shape) for name in ("correlated", "two blocks of 128")}
    tensors = {name: parts(stored(layers.build(name), W4S50), W4S50) for name in shapes}
    packed_file.write(tmp_path / "weights.safetensors", tensors, shapes, W4S50)
    return tmp_path / "weights.safetensors"


def test_a_file_says_what_it_holds(path):
    file = packed_file.PackedFile(path)
    assert file.target == W4S50 and file.shapes == {"correlated": (24, 64), "two blocks of 128": (10, 160)}
    for name in file.shapes:
        assert_same(file.read(name), stored(layers.build(name), W4S50), W4S50)


def test_the_layout_is_the_documented_one(path):
    """Block sparse rows read by hand from the raw tensors, as docs/export.md describes them."""
    tensors, shape = load_file(path), (24, 64)
    get = {part: tensors[f"correlated.{part}"] for part in ("blocks", "codes", "scales", "zeros")}
    kept = get["blocks"].shape[1]
    codes = [nibble for octet in get["codes"].tolist() for nibble in (octet & 15, octet >> 4)]
    zeros = [nibble for octet in get["zeros"].tolist() for nibble in (octet & 15, octet >> 4)]
    weight = torch.zeros(shape)
    for row in range(shape[0]):
        for place in range(row * kept, (row + 1) * kept):  # the row's offsets
            column = int(get["blocks"].flatten()[place]) * 16
            block = torch.tensor(codes[16 * place : 16 * place + 16]) - zeros[place]
            weight[row, column : column + 16] = get["scales"].flatten()[place].float() * block
    assert torch.equal(weight, stored(layers.build("correlated"), W4S50).weight)


def edit(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


FAULTS = {
    "codes too short": (
        "codes",
        lambda t: t[:-1],
        "768 numbers of 4 bits must take 384 bytes. Got uint8 \\[383\\] instead",
    ),
    "codes absent": ("codes", lambda t: None, "the tensor 'codes' is absent"),
    "block twice": ("blocks", edit((3, 1), 0), "the kept columns of a row do not rise, or lie outside it"),
    "block outside": ("blocks", edit((3, 1), 4), "the kept columns of a row do not rise, or lie outside it"),
    "blocks of another kind": ("blocks", lambda t: t.int(), "blocks must be \\[24, 2\\] uint16. Got int32"),
    "scale": ("scales", edit((0, 0), math.inf), "a scale is not a positive finite number"),
    "scales in 32 bits": ("scales", lambda t: t.float(), "there must be 48 scales of 16 bits. Got float32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_layer_is_named(path, fault):
    part, change, sentence = FAULTS[fault]
    info, tensors = metadata(path), load_file(path)
    changed = change(tensors.pop(f"correlated.{part}"))
    save_file({**tensors, **({} if changed is None else {f"correlated.{part}": changed})}, path, metadata=info)
    with pytest.raises(InputError, match=f"^correlated in .*weights.safetensors is damaged: {sentence}"):
        packed_file.PackedFile(path).read("correlated")


@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0, -1.0])
def test_a_scale_of_inputs_must_be_positive_and_finite(value):
    layer, target = layers.build("correlated"), Target(bits=4, group=16)
    result = stored(layer, target)
    parts = layer_packing.parts_of(result, target, torch.float32)
    parts["input_scale"] = torch.ones(layer.weight.shape[1], dtype=torch.float16).index_fill(
        0, torch.tensor([3]), value
    )
    with pytest.raises(ValueError, match="positive and finite"):
        layer_unpacking.restored(parts, target, shape_of(layer))


N_OF_M = [Target(pattern=pattern, bits=bits) for pattern in ("4:8", "3:4", "2:5") for bits in (None, 4)]


@pytest.mark.parametrize("target", N_OF_M, ids=lambda target: target.label)
def test_positions_of_an_older_file_are_read(target):
    """Older files have them for every n:m, with ceil(log2 m) bits for each kept weight."""
    layer = layers.build("correlated")
    result = stored(layer, target)
    tensors, of = parts(result, target), some(target.n_of_m)[1]
    places, bits = mask_of(result).nonzero()[:, 1] % of, math.ceil(math.log2(of))
    older = {name: tensor for name, tensor in tensors.items() if name != "bitmap"}
    older["positions"] = bit_packing.pack(places, bits)
    assert older.keys() != tensors.keys() and older["positions"].nbytes > tensors["bitmap"].nbytes
    assert_same(layer_unpacking.restored(older, target, shape_of(layer)), result, target)


def test_a_bitmap_must_have_the_pattern():
    layer, target = layers.build("correlated"), Target(pattern="4:8")
    tensors = parts(stored(layer, target), target)
    mask = mask_of(stored(layer, target)).clone()
    mask[2, 16:32] = torch.arange(16) < 8  # as many weights in the row, none of them in the second group
    with pytest.raises(ValueError, match="^the bitmap must be 4:8. Got other numbers in 2 groups instead$"):
        layer_unpacking.restored({**tensors, "bitmap": bit_packing.pack(mask, 1)}, target, shape_of(layer))
    with pytest.raises(ValueError, match="^the tensor 'positions' is absent$"):
        layer_unpacking.restored(tensors, Target(pattern="2:4"), shape_of(layer))


def test_a_file_that_is_no_such_file(path):
    tensors = load_file(path)
    info = json.loads(metadata(path)["layerwise"])
    save_file({**tensors, "stranger": torch.ones(1)}, path, metadata={"layerwise": json.dumps(info)})
    with pytest.raises(InputError, match="has the tensor 'stranger', which belongs to none of its layers"):
        packed_file.PackedFile(path)
    for damaged in ("{", "[]", "{}", json.dumps({**info, "target": {"bits": 9}})):
        save_file(tensors, path, metadata={"layerwise": damaged})
        with pytest.raises(InputError, match="The description of the layers in .*weights.safetensors cannot be read: "):
            packed_file.PackedFile(path)
    save_file(tensors, path, metadata={"layerwise": json.dumps({**info, "version": 2})})
    with pytest.raises(InputError, match="must be of version 1 of the layout. Got version 2 instead"):
        packed_file.PackedFile(path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        packed_file.PackedFile(path)


def test_read_blocks_are_not_kept_in_memory(tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("needs Linux, which tells the files that a process has mapped")
    path, gram = tmp_path / "weights.safetensors", tmp_path / "grams" / block_file(0)
    save_file({"first": torch.ones(64, 64, dtype=torch.bfloat16)}, path)
    file = packed_file.PackedFile(path)
    assert file.read("first").weight.sum() == 64 * 64
    gram.parent.mkdir()
    fields = {"gram": torch.eye(8), "sample": torch.ones(8, 8)} | dict.fromkeys(
        ("mean", "absmean", "sequence_variance"), torch.ones(8)
    )
    save_file({f"{tap}/{field}": own.clone() for tap in "ab" for field, own in fields.items()}, gram)
    entry = {"layers": ["x"], "inside": ["x"], "in": 8, "tokens": 8, "scope": "all"}
    index = {"length": 8, "blocks": [{"a": entry, "b": entry}], "sha256": [sha256(gram)]}
    (gram.parent / INDEX).write_text(json.dumps(index))
    for tap in read_block(gram.parent, 0):
        assert len(tap.gram.matrix) == 8
        del tap
        assert not [line for line in maps.read_text().splitlines() if str(tmp_path) in line]
