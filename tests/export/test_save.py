"""Exports: each format loads back as the model that was evaluated, and the audit finds whatever was changed in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, PreTrainedModel

from layerwise.checks.layer_cases import regridded
from layerwise.cli.app import app
from layerwise.contract.target import Target
from layerwise.evaluation.perplexity import apply_weights
from layerwise.export import audit
from layerwise.export.save import FORMATS, load_packed, main
from layerwise.models.loading import load
from layerwise.models.structure import model_linears
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import sha256
from layerwise.storage import bit_packing, layer_packing, packed_file
from tests.compression.test_cell import Case
from tests.support.model_families import tokens
from tests.support.paths import ROOT
from tests.support.typing_helpers import some
from tests.support.workflow_harness import write_tokenizer

TWO_OF_FOUR, W4, W4S50 = Target(pattern="2:4"), Target(bits=4, group=16), Target(0.5, "1x16", bits=4, group=16)
JOINT = Target(pattern="2:4", bits=4, group=16)
NV4, MX4 = Target(format="nvfp4"), Target(format="mxfp4")
W3 = Target(bits=3, group=16)
CT = "compressed-tensors"
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    case = Case(tmp_path_factory.mktemp("export")).prepare()
    write_tokenizer(case.folder / "model", "the words of a small text " * 20)
    return case


def cell(case: Case, target: Target) -> Path:
    """A cell of the target, of a method that reaches it; made once."""
    methods = {(False, False): "dense", (True, False): "magnitude", (False, True): "rtn", (True, True): "chain"}
    folder = case.folder / f"cells/{target.label}".replace(":", "of")
    if not folder.exists():
        asked = Target(0.5) if target == Target() else target  # the control needs another method beside it
        case.run(methods[target.sparsity > 0, target.bits is not None], asked, out=str(folder))
    return folder


def save(case: Case, target: Target, form: str, out: Path) -> Path:
    main(["--cell", str(cell(case, target)), "--format", form, "--out", str(out)])
    return out


def open_saved(folder: Path, form: str) -> PreTrainedModel:
    return (load_packed if form == "packed" else AutoModelForCausalLM.from_pretrained)(folder).eval()


def evaluated(case: Case, target: Target) -> PreTrainedModel:
    """The model as the perplexity of the cell is computed with."""
    model = load(case.spec)
    apply_weights(model, cell(case, target) / "weights.safetensors")
    return model


@torch.no_grad()
def assert_same_logits(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Not one bit may differ."""
    assert found.dtype == expected.dtype
    batch = tokens(2)
    assert torch.equal(found(batch).logits, expected(batch).logits)


# ------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize(
    "target", [Target(), Target(0.5), TWO_OF_FOUR, W4, JOINT, W4S50, NV4, MX4], ids=lambda t: t.label
)
def test_a_saved_cell_loads_as_what_was_evaluated(case, tmp_path, form, target):
    folder = save(case, target, form, tmp_path / "out")
    assert_same_logits(open_saved(folder, form), evaluated(case, target))
    assert audit.audit(folder)[:2] == (form, target) and not [line for line in audit.audit(folder)[2] if line.fault]


@pytest.mark.parametrize(
    ("method", "target"),
    [("rotated", W3), ("rotated", NV4), ("rotated", MX4), ("turboquant", W3)],
    ids=lambda part: part if isinstance(part, str) else part.label,
)
def test_a_grid_of_a_methods_own_is_saved_too(case, tmp_path, method, target):
    made = case.folder / f"cells/{method} {target.label}"
    case.run(method, target, out=str(made))
    model = load(case.spec)
    apply_weights(model, made / "weights.safetensors")
    for form in ("dense", "packed"):
        main(["--cell", str(made), "--format", form, "--out", str(tmp_path / form)])
        assert_same_logits(open_saved(tmp_path / form, form), model)
        assert not [line for line in audit.audit(tmp_path / form)[2] if line.fault]
    with pytest.raises(InputError, match="cannot be saved as compressed-tensors: its inputs are rotated"):
        main(["--cell", str(made), "--format", CT, "--out", str(tmp_path / CT)])
    assert not (tmp_path / CT).exists()


PARTS = {
    "svd_llm": Target(rank=0.5),
    "rocket": Target(rank=0.7),
    "oats": Target(pattern="2:4", rank=0.2),
    "eora": Target(bits=4, group=16, rank=0.2),
    "lplr": Target(rank=0.5, factor_bits=4, factor_group=16),
}


@pytest.mark.parametrize("method", PARTS)
def test_factors_are_saved_audited_and_refused_by_compressed_tensors(case, tmp_path, method):
    """The packed file takes the bits that the table counts, but for a part that is not quantised in a float32 model."""
    made, target = case.folder / f"cells/{method}", PARTS[method]
    case.run(method, target, out=str(made))
    model = load(case.spec)
    apply_weights(model, made / "weights.safetensors")
    for form in ("dense", "packed"):
        main(["--cell", str(made), "--format", form, "--out", str(tmp_path / form)])
        assert_same_logits(open_saved(tmp_path / form, form), model)
        found, told, lines = audit.audit(tmp_path / form)
        assert (found, told) == (form, target) and not [line for line in lines if line.fault]
        assert {line.note for line in lines} == {"holds" if form == "packed" else "holds, but its parts cannot be seen"}
        if form == "packed" and method != "oats":
            counted = pq.read_table(made / "layers.parquet").column("bits_per_weight").to_pylist()
            assert [8 * line.stored / line.weights for line in lines] == pytest.approx(counted, rel=1e-2)
    with pytest.raises(InputError, match="compressed-tensors cannot hold the low-rank factors"):
        main(["--cell", str(made), "--format", CT, "--out", str(tmp_path / CT)])


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_a_changed_factor_is_found(case, tmp_path, form):
    made, folder = case.folder / "cells/changed", tmp_path / form
    case.run("svd_llm", Target(rank=0.5), out=str(made))
    main(["--cell", str(made), "--format", form, "--out", str(folder)])
    path = next(folder.glob("weights.safetensors" if form == "packed" else "model.safetensors"))
    tensors, name = load_file(path), f"{UP}.left" if form == "packed" else f"{UP}.weight"
    with safe_open(path, "pt") as file:
        told = file.metadata()
    tensors[name][0] *= 2
    save_file(tensors, path, metadata=told)
    assert [line.layer for line in audit.audit(folder)[2] if line.fault] == [UP]
    if form == "packed":
        save_file({**tensors, name: tensors[name][:, 1:].contiguous()}, path, metadata=told)
        (line,) = [line for line in audit.audit(folder)[2] if line.fault]
        assert "the factor left must be" in some(line.fault)


@pytest.mark.parametrize(
    "target",
    [
        *(Target(bits=bits, group=16) for bits in range(2, 9)),
        Target(bits=3, group=16, symmetric=True),
        Target(bits=4),
        Target(bits=8, symmetric=True),
        JOINT,
        W4S50,
    ],
    ids=lambda target: target.label,
)
def test_compressed_tensors_loads_as_what_was_evaluated(case, tmp_path, target):
    folder = save(case, target, CT, tmp_path / "out")
    scheme = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    assert (scheme["quant_method"], scheme["format"]) == (CT, "pack-quantized")
    assert scheme["ignore"] == ["lm_head"]
    assert_same_logits(open_saved(folder, CT), evaluated(case, target))
    loading = CompressedTensorsConfig(dequantize=True)
    dequantised = AutoModelForCausalLM.from_pretrained(folder, quantization_config=loading)
    assert_same_logits(dequantised.eval(), evaluated(case, target))
    form, found, lines = audit.audit(folder)
    assert (form, found) == (CT, target) and not [line for line in lines if line.fault]


def test_compressed_tensors_has_no_short_groups(case, tmp_path):
    with pytest.raises(InputError, match="groups of 32 do not divide its 48 inputs; use --format packed or dense"):
        save(case, MX4, CT, tmp_path / "out")


@pytest.mark.parametrize(("target", "family"), [(NV4, "llama"), (MX4, "gpt_neox")], ids=["nvfp4", "mxfp4"])
def test_compressed_tensors_loads_formats_of_four_bits(tmp_path, target, family):
    """In bfloat16, in which the library dequantises whatever the model's dtype is."""
    half = Case(tmp_path, family, dtype="bfloat16").prepare()
    folder = save(half, target, CT, tmp_path / "out")
    scheme = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    assert (scheme["quant_method"], scheme["format"]) == (CT, f"{target.format}-pack-quantized")
    assert_same_logits(open_saved(folder, CT), evaluated(half, target))
    form, found, lines = audit.audit(folder)
    assert (form, found) == (CT, target) and not [line for line in lines if line.fault]
    layer = lines[0].layer
    change_tensor(folder, f"{layer}.weight_scale", lambda scales: scales.view(torch.uint8).fill_(255))
    changed = {line.layer: line.fault for line in audit.audit(folder)[2]}[layer]
    assert changed and ("scales" in changed or "saved" in changed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMATS)
def test_half_precision(tmp_path, dtype, form):
    half = Case(tmp_path, dtype=dtype).prepare()
    folder = save(half, JOINT, form, tmp_path / "out")
    assert_same_logits(open_saved(folder, form), evaluated(half, JOINT))
    assert not [line for line in audit.audit(folder)[2] if line.fault]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "family",
    [
        *("qwen3", "gpt2", "bloom"),
        *(pytest.param(family, marks=pytest.mark.long) for family in ("opt", "gpt_neox", "gemma3", "falcon")),
    ],
)
def test_other_architectures(tmp_path, family, form):
    """Tied embeddings, biases, transposed weights, linear layers of another class."""
    other = Case(tmp_path, family).prepare()
    if (family, form) == ("gpt2", CT):
        with pytest.raises(
            InputError, match="c_attn cannot be saved as compressed-tensors: Conv1D is not a torch Linear"
        ):
            save(other, JOINT, form, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        return
    folder = save(other, JOINT, form, tmp_path / "out")
    assert_same_logits(open_saved(folder, form), evaluated(other, JOINT))
    assert not [line for line in audit.audit(folder)[2] if line.fault]


def test_the_tokenizer_comes_along(case, tmp_path):
    folder = save(case, TWO_OF_FOUR, "dense", tmp_path / "out")
    text = "words of a small text"
    own, saved = (AutoTokenizer.from_pretrained(path)(text).input_ids for path in (case.folder / "model", folder))
    assert own == saved and (folder / "generation_config.json").is_file()


# ------------------------------------------------------------------------------------------------------------ refusals


def changed_cell(case: Case, target: Target, tmp_path: Path, change) -> Path:
    """A copy of a cell with every layer changed."""
    source, folder = cell(case, target), tmp_path / "cell"
    folder.mkdir()
    file = packed_file.PackedFile(source / "weights.safetensors")
    results = {name: change(file.read(name)) for name in file.shapes}
    parts = {name: layer_packing.parts_of(result, target, torch.float32) for name, result in results.items()}
    packed_file.write(folder / "weights.safetensors", parts, file.shapes, target)
    record = json.loads((source / "cell.json").read_text())
    record["weights_sha256"] = sha256(folder / "weights.safetensors")
    (folder / "cell.json").write_text(json.dumps(record))
    return folder


def with_input_scale(result):
    scaled = regridded(result, input_scale=torch.linspace(0.5, 2, result.weight.shape[1]))
    return layer_packing.as_stored(scaled, W4, torch.float32)


def with_act_order(result):
    order = torch.randperm(result.weight.shape[1], generator=torch.Generator().manual_seed(0))
    return layer_packing.as_stored(regridded(result, group_of=order // 16), W4, torch.float32)


INEXPRESSIBLE = {
    "AWQ": (with_input_scale, r"it has a scale for each input \(AWQ\)"),
    "act-order": (with_act_order, r"its groups are not runs of consecutive inputs \(act-order\)"),
}


@pytest.mark.parametrize("kind", INEXPRESSIBLE)
def test_layers_beyond_compressed_tensors_are_refused_and_packed_holds_them(case, tmp_path, kind):
    change, why = INEXPRESSIBLE[kind]
    folder = changed_cell(case, W4, tmp_path, change)
    with pytest.raises(InputError, match=f"{Q} cannot be saved as compressed-tensors: {why}; use --format packed"):
        main(["--cell", str(folder), "--format", CT, "--out", str(tmp_path / "out")])
    expected = load(case.spec)
    apply_weights(expected, folder / "weights.safetensors")
    for form in ("packed", "dense"):
        main(["--cell", str(folder), "--format", form, "--out", str(tmp_path / form)])
        assert_same_logits(open_saved(tmp_path / form, form), expected)
        assert not [line for line in audit.audit(tmp_path / form)[2] if line.fault]
    change_tensor(tmp_path / "dense", f"{UP}.weight", first_kept_times(1.01))
    assert [line.fault for line in audit.audit(tmp_path / "dense")[2] if line.fault] == [NOT_SAVED]
    assert {line.note for line in audit.audit(tmp_path / "dense")[2]} == {"holds, but its grid cannot be seen"}


def test_refusals_are_one_sentence(case, tmp_path):
    def refused(sentence: str, folder: Path, form: str = "dense", out: Path = tmp_path / "out") -> None:
        with pytest.raises(InputError, match=sentence):
            main(["--cell", str(folder), "--format", form, "--out", str(out)])

    pruned = cell(case, TWO_OF_FOUR)
    not_quantised = "compressed-tensors can hold only quantised layers. Those of .* are not: use --format dense"
    refused(not_quantised, pruned, CT)
    refused("groups of 24 do not divide its 32 inputs", cell(case, Target(bits=4, group=24)), CT)
    refused("must be the folder of a cell. Got one without cell.json instead.", tmp_path)
    (tmp_path / "cell.json").write_text("{}", "utf-8")
    refused("has no weights.safetensors: set keep_weights in the config", tmp_path)
    (tmp_path / "weights.safetensors").write_bytes((pruned / "weights.safetensors").read_bytes())
    refused("cell.json has no columns", tmp_path)
    (tmp_path / "cell.json").write_text('{"columns": {}, "provenance": {}}', "utf-8")
    refused("cell.json does not say how its model is loaded: give --model", tmp_path)
    (tmp_path / "cell.json").write_text("{", "utf-8")
    refused("cell.json cannot be read: Expecting", tmp_path)
    refused("exists: give --out a new folder", pruned, out=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_cell_is_not_of_is_refused_in_every_format(case, tmp_path):
    other = Case(tmp_path / "other", "gpt2").prepare()
    for form in FORMATS:
        with pytest.raises(InputError, match="has layers that the model lacks"):
            main(
                [
                    "--cell",
                    str(cell(case, W4)),
                    "--format",
                    form,
                    "--out",
                    str(tmp_path / "out"),
                    "--model",
                    other.model,
                ]
            )
        assert not (tmp_path / "out").exists()


def test_the_library_is_asked_for_where_it_is_absent(case, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match="compressed-tensors needs the package of that name: pip install compressed-tensors"
    ):
        save(case, W4, CT, tmp_path / "out")


def test_a_packed_folder_that_lacks_a_parameter_is_refused(case, tmp_path):
    folder = save(case, W4S50, "packed", tmp_path / "out")
    rest = load_file(folder / "rest.safetensors")
    del rest["model.norm.weight"]
    save_file(rest, folder / "rest.safetensors")
    with pytest.raises(InputError, match="rest.safetensors does not fit the model: model.norm.weight"):
        load_packed(folder)
    (folder / "rest.safetensors").unlink()
    with pytest.raises(InputError, match="is not a packed model: it has no rest.safetensors"):
        load_packed(folder)


# ---------------------------------------------------------------------------------------------------------------- audit


def change_tensor(folder: Path, name: str, change, file: str = "model.safetensors") -> None:
    path = folder / file
    tensors, info = load_file(path), safe_open(path, "pt").metadata()
    change(tensors[name])
    save_file(tensors, path, metadata=info)


def set_value(index, value):
    def change(tensor):
        tensor[index] = value

    return change


def first_zero_to(value):
    def change(weight):
        row, column = (weight == 0).nonzero()[0]
        weight[row, column] = value

    return change


def first_kept_to_zero(weight):
    row, column = (weight != 0).nonzero()[0]
    weight[row, column] = 0


def first_kept_times(factor):
    def change(weight):
        row, column = (weight != 0).nonzero()[0]
        weight[row, column] *= factor

    return change


def flip_a_bit(tensor):
    tensor.view(-1)[5] ^= 1


ONE_MORE = first_zero_to(0.5)
NOT_SAVED = "its weights are not those that were saved"
TAMPERED = {  # format, target, tensor of UP, change, what is said
    "2:4": ("dense", TWO_OF_FOUR, "weight", ONE_MORE, "2:4 does not hold: 1 groups of 2:4 keep more weights"),
    "row": ("dense", Target(0.5), "weight", ONE_MORE, "50% row does not hold: 1 rows keep more weights"),
    "layer": ("dense", Target(0.5, "layer"), "weight", ONE_MORE, "50% layer does not hold: 1 layers keep more weights"),
    "block": ("dense", Target(0.5, "1x16"), "weight", ONE_MORE, "1 blocks of 1x16 must be zero in every row, 1 rows"),
    "zeros": ("dense", TWO_OF_FOUR, "weight", first_kept_to_zero, "768 zeros were saved, but 769 are there"),
    "value": ("dense", TWO_OF_FOUR, "weight", first_kept_times(1.5), NOT_SAVED),
    "off its grid": (
        "dense",
        W4,
        "weight",
        first_kept_times(1.01),
        "1 groups of weights do not lie on a grid of 4b g16",
    ),
    "another point of its grid": (CT, W4, "weight_packed", flip_a_bit, NOT_SAVED),
    "another scale": (CT, W4, "weight_scale", set_value((0, 0), 1), NOT_SAVED),
    "NaN": ("dense", W4, "weight", set_value((0, 0), float("nan")), "a weight is not finite"),
    "codes": (CT, JOINT, "weight_packed", set_value((0, 0), 0x76543210), "2:4 4b g16 does not hold: [12] groups of"),
    "zero points": (CT, JOINT, "weight_zero_point", set_value((0, 0), 0), "2:4 4b g16 does not hold: .* groups of 2:4"),
    "scale": (CT, W4, "weight_scale", set_value((0, 0), -1), r"its scales must be \[48, 2\], positive and finite"),
    "shape": (CT, W4, "weight_shape", set_value(0, 47), r"its shape must be \[48, 32\]. Got \[47, 32\] instead"),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_whatever_was_changed_in_a_folder_is_found(case, tmp_path, capsys, kind):
    form, target, tensor, change, sentence = TAMPERED[kind]
    folder = save(case, target, form, tmp_path / "out")
    change_tensor(folder, f"{UP}.{tensor}", change)
    with pytest.raises(InputError, match=f"^{folder}: {UP}: {sentence}"):
        audited(folder)
    table = capsys.readouterr().out
    assert table.count("  holds") == 13  # the other layers


@pytest.mark.parametrize("part", ["codes", "scales", "zeros"])
def test_changes_in_the_packed_layout_are_found(case, tmp_path, part):
    folder = save(case, W4S50, "packed", tmp_path / "out")
    change = flip_a_bit if part != "scales" else set_value((0, 0), 1)
    change_tensor(folder, f"{UP}.{part}", change, "weights.safetensors")
    with pytest.raises(InputError, match=f"{UP}: ({NOT_SAVED}|... zeros were saved, but ... are there)"):
        audited(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dense_weights_show_whether_they_lie_on_a_grid(dtype, bits, symmetric):
    target = Target(bits=bits, symmetric=symmetric)
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (40, 32), generator=draw)
    zeros = torch.full((40, 1), 2 ** (bits - 1)) if symmetric else torch.randint(2**bits, (40, 1), generator=draw)
    weight = (codes - zeros) * (torch.rand(40, 1, generator=draw) + 0.5).half().float()
    assert audit.on_grid(weight.to(dtype), target).all()
    assert audit.on_grid((1e-6 * weight).to(dtype), target).all()
    if (bits, dtype) == (8, torch.bfloat16):
        return  # its numbers are coarser than the grid
    assert not audit.on_grid(torch.randn(40, 32, generator=draw).to(dtype), target).any()
    widest = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    ranges = torch.tensor([[0, 1, widest], [0, 1, widest + 1], [0, -1, -widest - 1]]).to(dtype)
    assert audit.on_grid(ranges, target).tolist() == [True, False, symmetric]


def test_a_mask_of_other_counts_is_found_in_the_packed_layout(case, tmp_path):
    folder = save(case, Target(0.5, bits=4, group=16), "packed", tmp_path / "out")
    change_tensor(folder, f"{UP}.bitmap", set_value(slice(0, 4), 0b11111111), "weights.safetensors")
    with pytest.raises(InputError, match=f"{UP} in .* is damaged: .* numbers of 4 bits must take .* bytes"):
        audited(folder)
    folder = save(case, Target(0.5), "packed", tmp_path / "moved")
    path = folder / "weights.safetensors"
    row = load_file(path)[f"{UP}.bitmap"][:8]  # two rows of 32 weights: a kept weight of one goes to the other
    kept = torch.tensor([byte >> bit & 1 for byte in row.tolist() for bit in range(8)])
    one, other = int(kept[:32].nonzero()[0]), 32 + int((kept[32:] == 0).nonzero()[0])
    kept[[one, other]] = torch.tensor([0, 1])
    change_tensor(folder, f"{UP}.bitmap", set_value(slice(0, 8), bit_packing.pack(kept, 1)), "weights.safetensors")
    with pytest.raises(InputError, match=f"{UP}: 50% row does not hold: 2 rows keep other numbers of weights"):
        audited(folder)


def test_a_layer_that_is_absent_is_found(case, tmp_path):
    folder = save(case, TWO_OF_FOUR, "dense", tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{Q}.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"{Q}: there is no tensor {Q}.weight"):
        audited(folder)


def audited(*arguments: object) -> int:
    """Exit status of `layerwise audit`; what it finds is raised as InputError."""
    return app(["audit", *map(str, arguments)], standalone_mode=False)


def test_the_audit_takes_a_cell_and_a_target(case, tmp_path, capsys):
    audited(cell(case, W4S50))
    printed = capsys.readouterr().out
    assert f"{Q}" in printed and "packed, 50% 1x16 4b g16: 14 layers" in printed
    with pytest.raises(InputError, match="must declare the grid of 50% 1x16 3b g16. Got 4b g16 instead"):
        audited(cell(case, W4S50), "--target", "50% 1x16 3b g16")
    folder = save(case, TWO_OF_FOUR, "dense", tmp_path / "out")
    with pytest.raises(
        InputError, match="70% row does not hold: 32 rows keep more weights, and 13 more layers are wrong"
    ):
        audited(folder, "--target", "70% row")
    (folder / "layerwise.json").unlink()
    audited(folder, "--target", "2:4")
    for arguments, sentence in (
        ([folder], "names no target for its layers: give --target"),
        ([tmp_path / "absent"], "absent does not exist"),
        ([tmp_path], "must hold weights: weights.safetensors, model.safetensors or .*index.json. Got none instead"),
        ([folder, "--target", "9b"], "--target is wrong: .*bits must be 2 to 8"),
        ([folder, "--target", "4 bits"], "--target is wrong: .*Got '4 bits' instead"),
    ):
        with pytest.raises(InputError, match=sentence):
            audited(*arguments)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="not a saved model: it has neither config.json nor weights.safetensors"):
        audited(folder, "--target", "dense")


@pytest.mark.parametrize(
    ("form", "file", "text", "sentence"),
    [
        ("dense", "layerwise.json", '{"target": {}, "layers": {"a": {}}}', "each of its layers needs input_scale, "),
        ("dense", "layerwise.json", '{"target": {}, "layers": [1]}', "layerwise.json cannot be read"),
        (
            "dense",
            "model.safetensors.index.json",
            "{}",
            "The description of the weights in .* cannot be used: KeyError: 'weight_map'",
        ),
        (
            "dense",
            "model.safetensors.index.json",
            "{",
            "The description of the weights in .* cannot be used: JSONDecodeError",
        ),
    ],
)
def test_damaged_manifests_are_sentences(case, tmp_path, form, file, text, sentence):
    folder = save(case, W4, form, tmp_path / "out")
    (folder / file).write_text(text, "utf-8")
    with pytest.raises(InputError, match=sentence):
        audited(folder)


def test_a_scheme_of_another_kind_is_a_sentence(case, tmp_path):
    folder = save(case, W4, CT, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 16
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(InputError, match="cannot be used: ValueError: Target.bits must be 2 to 8"):
        audited(folder)


def test_the_command_prints_a_table_and_returns_its_verdict(case, tmp_path, capsys):
    folder = save(case, TWO_OF_FOUR, "dense", tmp_path / "out")

    audited(folder)
    told = capsys.readouterr().out
    assert "14 layers" in told and "(50.000%)" in told
    change_tensor(folder, f"{UP}.weight", first_zero_to(1.0))
    command = [sys.executable, "-m", "layerwise", "audit", str(folder)]
    bad = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert bad.returncode == 1 and bad.stderr.strip().splitlines()[-1].startswith(
        f"error: {folder}: {UP}: 2:4 does not"
    )


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "bloom"])  # tied; biases; weights stored as [in, out]
def test_uncompressed_parameters_are_unchanged(family, tmp_path):
    own = Case(tmp_path, family).prepare()
    dense, asked = load(own.spec), own.run("sparsegpt", TWO_OF_FOUR)
    layers = model_linears(dense)
    compressed = {layer.stored_in(name) for name, layer in layers.items()}
    for form in ("dense", "packed"):
        main(["--cell", str(asked), "--format", form, "--out", str(tmp_path / form)])
        model = open_saved(tmp_path / form, form)
        assert some(model.get_output_embeddings()).weight is model.get_input_embeddings().weight
        for name, value in model.named_parameters():
            assert torch.equal(value, dense.get_parameter(name)) == (name not in compressed)
        file = packed_file.PackedFile(asked / "weights.safetensors")
        for name, layer in model_linears(model).items():
            assert torch.equal(layer.weight(), file.read(name).weight)
