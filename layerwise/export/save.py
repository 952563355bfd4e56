"""Save a compressed cell as a folder that other tools load (formats: docs/export.md)."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layerwise.contract.layer import Compressed, Quantised
from layerwise.contract.target import Target
from layerwise.evaluation.perplexity import apply_weights, layers_of
from layerwise.export.float_formats import packed_format, packing
from layerwise.export.save_tokenizer import copy_tokenizer
from layerwise.models import loading, structure
from layerwise.models.structure import Linear, few
from layerwise.results.cell_results import read_record
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import check_weights, write_atomic, writing
from layerwise.sources.checkpoint_files import model_folder
from layerwise.storage.layer_packing import quantised_of, reordered
from layerwise.storage.packed_file import PackedFile

WEIGHTS = "weights.safetensors"  # the compressed layers of a cell, and of a packed folder
REST = "rest.safetensors"  # the other parameters of a packed folder
MANIFEST = "layerwise.json"  # describes the layers of a folder


# ------------------------------------------------------------------------------------------------------------- formats


def save_dense(model: PreTrainedModel, file: PackedFile, folder: Path) -> None:
    """The model with its pruned weights as zeros, quantised ones dequantised and sums summed, for from_pretrained."""
    apply_weights(model, file.path)
    model.save_pretrained(folder)


def save_packed(model: PreTrainedModel, file: PackedFile, folder: Path) -> None:
    """The layers as the cell stores them, and everything else that `load_packed` needs."""
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    shutil.copy(file.path, folder / WEIGHTS)
    layers = {layer.stored_in(name) for name, layer in structure.model_linears(model).items()}
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in layers}
    once = {tensor.data_ptr(): name for name, tensor in rest.items()}.values()  # one name of those tied to each other
    save_file({name: rest[name].contiguous() for name in once}, folder / REST)


def load_packed(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a packed folder, dense in memory, in eval mode.

    Raises InputError when its files do not make up the whole model.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    config._experts_implementation = loading.EXPERTS
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=trust_remote_code)
    if not (folder / REST).is_file():
        raise InputError(f"{folder} is not a packed model: it has no {REST}.")
    rest = load_file(folder / REST)
    absent, unknown = model.load_state_dict(rest, strict=False)
    parameters = model.state_dict()
    filled = {parameters[name].data_ptr() for name in rest if name in parameters}  # with those tied to them
    layers = {layer.stored_in(name) for name, layer in structure.model_linears(model).items()}
    lacking = {name for name in absent if parameters[name].data_ptr() not in filled} - layers
    if lacking or unknown:
        raise InputError(f"{folder / REST} does not fit the model: {few(lacking or unknown)}.")
    apply_weights(model, folder / WEIGHTS)
    return model.eval().requires_grad_(False)


def save_compressed_tensors(model: PreTrainedModel, file: PackedFile, folder: Path) -> None:
    """The pack-quantized format of the compressed-tensors library, or its own of nvfp4 and mxfp4, for from_pretrained.

    Its integer codes and zeros are ours minus 2^(bits - 1); its scales are in the model's dtype.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStatus,
        preset_name_to_scheme,
    )
    from compressed_tensors.utils import get_direct_state_dict, replace_direct_state_dict

    target, layers = file.target, layers_of(model, file)
    bits = target.bits
    assert bits is not None  # `export` refuses others
    group = target.group or -1  # -1: one group per row
    arguments = QuantizationArgs(num_bits=bits, symmetric=target.symmetric, group_size=group)
    form = "pack-quantized"
    if target.format:
        arguments, form = preset_name_to_scheme(f"{target.format}a16".upper(), []).weights, packing(target)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=CompressionFormat(form))
    for name, linear in layers.items():
        result = file.read(name)
        refuse_inexpressible(linear, result, target, model.dtype)
        state = get_direct_state_dict(linear.module)
        del state["weight"]
        if target.format:
            tensors = packed_format(quantised_of(result), target)
        else:
            tensors = pack_quantized(quantised_of(result), bits, target.symmetric, model.dtype)
        replace_direct_state_dict(linear.module, state | tensors)
        vars(linear.module).update(quantization_scheme=scheme, quantization_status=QuantizationStatus.COMPRESSED)
    compressor = ModelCompressor.from_pretrained_model(model, form)
    # The library leaves out linear layers of another class than those quantised, such as Falcon's head.
    linear_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert compressor.quantization_config is not None
    compressor.quantization_config.ignore = [name for name in linear_names if name not in layers]
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    if target.has_zeros:
        # compressed-tensors 0.20 cannot lay packed zero points out before they are loaded (its compress() on meta
        # tensors leaves them unpacked), so that from_pretrained must dequantise while it loads.
        config = read_record(folder / "config.json")
        config["quantization_config"]["dequantize"] = True
        write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")


def refuse_inexpressible(linear: Linear, result: Compressed, target: Target, dtype: torch.dtype) -> None:
    """Raise InputError, in one sentence, for what the pack-quantized format cannot hold."""
    inputs, quantised, why = linear.shape[1], quantised_of(result), None
    if not isinstance(linear.module, nn.Linear):
        why = f"{type(linear.module).__name__} is not a torch Linear"
    elif quantised.input_scale is not None:
        why = "it has a scale for each input (AWQ)"
    elif quantised.rotation is not None:
        why = "its inputs are rotated"
    elif quantised.levels is not None:
        why = "its codes stand for levels of its own"
    elif reordered(result, target):
        why = "its groups are not runs of consecutive inputs (act-order)"
    elif target.group and inputs % target.group:
        why = f"groups of {target.group} do not divide its {inputs} inputs"
    elif not target.format and not torch.equal(quantised.scales.to(dtype).float(), quantised.scales):
        why = f"{str(dtype).removeprefix('torch.')} cannot hold its scales"
    if why:
        raise InputError(f"{linear.name} cannot be saved as compressed-tensors: {why}; use --format packed or dense.")


def pack_quantized(quantised: Quantised, bits: int, symmetric: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer [out, in] in the pack-quantized format."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    offset = 2 ** (bits - 1)
    tensors = {
        "weight_packed": pack_to_int32((quantised.codes.int() - offset).to(torch.int8), bits),
        "weight_scale": quantised.scales.to(dtype),
        "weight_shape": torch.tensor(quantised.codes.shape),
    }
    if not symmetric:
        zeros = (quantised.zeros - offset).to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
    return tensors


FORMATS = {"dense": save_dense, "packed": save_packed, "compressed-tensors": save_compressed_tensors}


# ---------------------------------------------------------------------------------------------------------------- cells


def read_cell(folder: Path) -> tuple[dict[str, Any], PackedFile]:
    """The record of a cell's folder, and its compressed layers. Raises InputError when the weights are gone."""
    if not (folder / "cell.json").is_file():
        raise InputError(f"{folder} must be the folder of a cell. Got one without cell.json instead.")
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}: set keep_weights in the config, or export with Snakemake.")
    try:
        record = read_record(folder / "cell.json")
    except ValueError as error:
        raise InputError(f"{folder / 'cell.json'} cannot be read: {error}.") from None
    absent = [key for key in ("columns", "provenance") if key not in record]
    if absent:
        raise InputError(f"{folder / 'cell.json'} has no {absent[0]}.")
    check_weights(folder / WEIGHTS)
    return record, PackedFile(folder / WEIGHTS)


def manifest(record: Mapping[str, Any], file: PackedFile, form: str, dtype: torch.dtype) -> dict[str, Any]:
    """The manifest of the folder: target, zeros and weights of every layer, and the origin of the cell."""
    layers = {}
    for name in file.shapes:
        result = file.read(name)
        weight = result.weight.to(dtype)
        layers[name] = {
            "zeros": int((weight == 0).sum()),
            "sha256": digest(weight),
            "input_scale": result.quantised is not None and result.quantised.input_scale is not None,
            "reordered": reordered(result, file.target_of(name).rest),
            "own_grid": result.quantised is not None and result.quantised.own_grid,
        }
    own: dict[str, Any] = {"format": form, "target": file.target.as_dict(), "layers": layers}
    if file.targets:
        own["targets"] = {name: target.as_dict() for name, target in file.targets.items()}
    return own | {"columns": record["columns"], "provenance": record["provenance"]}


def digest(weight: Tensor) -> str:
    """SHA-256 of a weight [out, in] as its dtype has it, row by row."""
    return hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().data).hexdigest()


def export(cell: Path, form: str, out: Path, spec: Mapping[str, Any] | None = None) -> None:
    """Write a cell as a folder of the format, whole or not at all.

    spec: the model's config entry, where it is not the cell's. Raises InputError, in one sentence, when the cell or its
    model is absent, the format cannot hold the cell, or `out` exists.
    """
    record, file = read_cell(cell)
    spec = spec or record.get("model")
    if not spec:
        raise InputError(f"{cell / 'cell.json'} does not say how its model is loaded: give --model.")
    if form == "compressed-tensors" and file.target.rank:
        raise InputError(
            f"compressed-tensors cannot hold the low-rank factors of {cell}: use --format packed or dense."
        )
    if form == "compressed-tensors" and file.target.bits is None:
        raise InputError(
            f"compressed-tensors can hold only quantised layers. Those of {cell} are not: use --format dense."
        )
    if form == "compressed-tensors" and {target.grid for target in file.targets.values()} - {file.target.grid}:
        raise InputError(f"compressed-tensors is written with one grid for all layers: those of {cell} have several.")
    if form == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
        raise InputError(
            "The format compressed-tensors needs the package of that name: pip install compressed-tensors."
        )
    with whole_folder(out) as part:
        model = loading.load(spec)
        dtype = model.dtype
        layers_of(model, file)  # a model that the cell is not of is refused
        FORMATS[form](model, file, part)
        source = model_folder(spec)
        scripts = [path.name for path in source.glob("*.py")] if spec.get("trust_remote_code") else []
        for name in scripts:
            shutil.copy(source / name, part / name)
        copy_tokenizer(spec, part)
        write_atomic(part / MANIFEST, json.dumps(manifest(record, file, form, dtype), indent=1) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`; it takes the name when the body ends without an error."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists: give --out a new folder.")
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with writing(path):
            yield part
            for file in (one for one in part.rglob("*") if one.is_file()):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            part.replace(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", type=Path, required=True, help="folder of the cell, with its weights.safetensors")
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--model", type=json.loads, help="model entry of the config, as JSON, if not the cell's")
    args = parser.parse_args(argv)
    export(args.cell, args.format, args.out, args.model)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
