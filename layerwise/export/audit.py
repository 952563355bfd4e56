"""Open a saved folder and verify, from its files alone, pattern, grid and exact counts of every layer (docs/export.md).

Reads a cell's folder and the three formats of save.py; compressed-tensors without the library that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from layerwise.contract.target import Target
from layerwise.export.float_formats import PACKINGS, names_of, on_format, unpacked_format
from layerwise.export.save import MANIFEST, WEIGHTS, digest
from layerwise.models.loading import load
from layerwise.models.structure import Linear, few, model_linears
from layerwise.numerics import ops
from layerwise.numerics.patterns import count_kept, kept_counts
from layerwise.results.cell_results import read_record
from layerwise.runtime.errors import InputError, out_of_memory
from layerwise.runtime.sentences import reason
from layerwise.sources import checkpoint_files
from layerwise.sources.config_faults import config_fault
from layerwise.storage.bits_per_weight import kept_blocks
from layerwise.storage.packed_file import PackedFile

HOLDERS = (WEIGHTS, checkpoint_files.WEIGHTS, checkpoint_files.INDEX)  # files of which a folder with weights has one
MARKS = {"zeros", "sha256", "input_scale", "reordered"}  # a manifest's entries for a layer


@dataclass(frozen=True)
class Found:
    """A layer as a folder holds it; mask: None where a kept weight of zero looks like a pruned one."""

    weight: Tensor  # [out, in], in the model's dtype
    mask: Tensor | None
    stored: int  # bytes
    grid: str | None = None  # the fault in the grid
    note: str = "holds"  # the note on a right layer


@dataclass(frozen=True)
class Line:
    """The audit's verdict on a layer; fault: None where the layer is right."""

    layer: str
    out: int
    inputs: int
    zeros: int
    stored: int  # bytes
    fault: str | None
    note: str = "holds"

    @property
    def weights(self) -> int:
        return self.out * self.inputs


@dataclass(frozen=True)
class Folder:
    """A saved folder: the grid that it declares, the layers that it should hold, and a function that reads one."""

    form: str
    grid: Target | None  # None where nothing but the weights shows it
    layers: Mapping[str, tuple[int, int]]  # name -> (out, in)
    read: Callable[[str], Found]


# -------------------------------------------------------------------------------------------------------------- reading


class Tensors:
    """The tensors of a Hugging Face folder by name, whichever file they lie in. Raises InputError when it has none."""

    def __init__(self, folder: Path) -> None:
        index = folder / checkpoint_files.INDEX
        names = (
            sorted(set(read_record(index)["weight_map"].values())) if index.is_file() else [checkpoint_files.WEIGHTS]
        )
        try:
            files = [safe_open(folder / name, "pt") for name in names]
        except (OSError, SafetensorError) as error:
            raise InputError(f"The weights of {folder} cannot be read: {error}.") from None
        self.files = {key: file for file in files for key in list(file.keys())}

    def get(self, name: str) -> Tensor:
        """Raises ValueError when there is none of that name."""
        if name not in self.files:
            raise ValueError(f"there is no tensor {name}")
        return self.files[name].get_tensor(name)


def open_folder(
    folder: Path, said: Mapping[str, Any], target: Target, trust_remote_code: bool, targets: Mapping[str, Target]
) -> Folder:
    """The folder, whichever format it has; said: its manifest; targets: those of layers with a target of their own.

    Raises InputError when it has none of the formats.
    """
    config, linears = None, {}
    if (folder / "config.json").is_file():
        config, linears = structure(folder, trust_remote_code)
    shapes = {name: linear.shape for name, linear in linears.items()}
    dtype = getattr(config, "dtype", None) or torch.float32
    if (folder / WEIGHTS).is_file():
        file = PackedFile(folder / WEIGHTS)
        return Folder("packed", file.target.grid, shapes or file.shapes, partial(read_packed, file, dtype))
    if config is None:
        raise InputError(f"{folder} is not a saved model: it has neither config.json nor {WEIGHTS}.")
    tensors, scheme = Tensors(folder), getattr(config, "quantization_config", None)
    if scheme is None:
        marks = said.get("layers", {})
        hidden = {
            name for name, mark in marks.items() if mark["reordered"] or mark["input_scale"] or mark.get("own_grid")
        }
        loaded = loader(folder, trust_remote_code)
        return Folder(
            "dense",
            None,
            shapes,
            lambda name: read_dense(tensors, linears[name], targets.get(name, target), name in hidden, loaded),
        )
    known = ["pack-quantized", *PACKINGS]
    if scheme.get("format") not in known or len(scheme["config_groups"]) != 1:
        which = " or ".join(known)
        raise InputError(f"{folder} must be {which} with one group of layers. Got {scheme.get('format')} instead.")
    weights = next(iter(scheme["config_groups"].values()))["weights"]
    group = weights["group_size"] if weights["strategy"] == "group" else None
    if own := PACKINGS.get(scheme["format"]):
        grid = Target(format=own, group=weights["group_size"])
        return Folder(
            "compressed-tensors", grid, shapes, lambda name: read_float_format(tensors, linears[name], grid, dtype)
        )
    grid = Target(bits=weights["num_bits"], group=group, symmetric=weights["symmetric"])
    return Folder(
        "compressed-tensors", grid, shapes, lambda name: read_pack_quantized(tensors, linears[name], grid, dtype)
    )


def structure(folder: Path, trust_remote_code: bool) -> tuple[Any, dict[str, Linear]]:
    """A saved model's config, and the linear layers of its blocks as its architecture has them, without weights."""
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        plain = AutoConfig.from_pretrained(folder, **options)
        vars(plain).pop("quantization_config", None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(plain, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the code of a model's family raises
        if out_of_memory(error):
            raise
        if fault := config_fault(folder, error, trust_remote_code):
            raise fault from error
        raise InputError(f"Cannot read the config of {folder}: {reason(error)}.") from error
    return config, model_linears(model)


def read_packed(file: PackedFile, dtype: torch.dtype, name: str) -> Found:
    """A layer of our own layout. Raises ValueError when the file has none of that name."""
    if name not in file.shapes:
        raise ValueError(f"{file.path.name} does not hold the layer")
    result = file.read(name)
    return Found(result.weight.to(dtype), result.mask, file.stored_bytes(name))


def loader(folder: Path, trust_remote_code: bool) -> Callable[[], dict[str, Linear]]:
    """The layers of a folder's model as transformers loads it, at the first call."""
    return cache(lambda: model_linears(load({"path": str(folder), "trust_remote_code": trust_remote_code})))


def read_dense(
    tensors: Tensors, linear: Linear, target: Target, hidden: bool, loaded: Callable[[], Mapping[str, Linear]]
) -> Found:
    """A layer of a folder of dense weights; hidden: its grid cannot be seen in them (act-order, scales of inputs).

    loaded: the same layers as transformers gives them, for experts, whose tensors have other names in a checkpoint.
    """
    if linear.expert is None:
        stored = tensors.get(linear.stored_in(linear.name))
        weight = stored.T if linear.transposed else stored
    else:
        stored = weight = loaded()[linear.name].stored()
    if target.rank:
        return Found(weight, None, stored.nbytes, note="holds, but its parts cannot be seen")
    grid = None if hidden else grid_fault(weight, target)
    note = "holds, but its grid cannot be seen" if hidden and target.bits else "holds"
    return Found(weight, None, stored.nbytes, grid, note)


def grid_fault(weight: Tensor, target: Target) -> str | None:
    """The fault in the grid of a dequantised weight [out, in], or None."""
    if target.bits is None:
        return None
    groups = ops.grouped(weight, target.group or weight.shape[1], 0.0).flatten(0, 1)
    off = int((~on_grid(groups, target)).sum())
    return f"{off} groups of weights do not lie on a grid of {target.grid.label}" if off else None


def on_grid(groups: Tensor, target: Target) -> Tensor:
    """[groups] bool: whether some scale makes the weights of each of groups [groups, length] codes minus a zero.

    The largest weight is tried as 1, 2, ... 2^bits - 1 scales. Every weight may be off by the rounding of its dtype and
    of the largest one's, so that grids as fine as that, 7 and 8 bits in bfloat16, always pass.
    """
    assert target.bits is not None
    if target.format:
        return on_format(groups)
    most, limits, weight = 2**target.bits - 1, torch.finfo(groups.dtype), groups.double()
    largest = weight.abs().amax(1, keepdim=True)
    found = largest[:, 0] == 0
    for count in reversed(range(1, most + 1)):
        rows = (~found).nonzero()[:, 0]
        scale = largest[rows] / count
        whole = (weight[rows] / scale).round()
        low, high = whole.amin(1).clamp(max=0), whole.amax(1).clamp(min=0)
        fits = (high <= most // 2) & (low >= -(most // 2 + 1)) if target.symmetric else high - low <= most
        near = (weight[rows] - whole * scale).abs() <= limits.eps * (weight[rows].abs() + limits.tiny)
        found[rows] = fits & near.all(1)
    return found


def read_pack_quantized(tensors: Tensors, linear: Linear, grid: Target, dtype: torch.dtype) -> Found:
    """A layer in compressed-tensors' pack-quantized format. Raises ValueError when its tensors do not fit together."""
    (rows, inputs), bits = linear.shape, grid.bits
    assert bits is not None
    names = ["weight_packed", "weight_scale", "weight_shape", *([] if grid.symmetric else ["weight_zero_point"])]
    parts = {name: tensors.get(f"{linear.name}.{name}") for name in names}
    if parts["weight_shape"].tolist() != [rows, inputs]:
        raise ValueError(f"its shape must be [{rows}, {inputs}]. Got {parts['weight_shape'].tolist()} instead")
    if f"{linear.name}.weight_g_idx" in tensors.files:
        raise ValueError(
            "its groups must be runs of consecutive inputs. Got others instead, which this audit cannot read"
        )
    groups, scales = -(-inputs // (grid.group or inputs)), parts["weight_scale"]
    if scales.shape != (rows, groups) or not (torch.isfinite(scales).all() and (scales > 0).all()):
        raise ValueError(f"its scales must be [{rows}, {groups}], positive and finite")
    zeros = torch.full((rows, groups), 2 ** (bits - 1))
    if not grid.symmetric:
        zeros = from_words(parts["weight_zero_point"].T, bits, groups, rows).T
    codes = from_words(parts["weight_packed"], bits, rows, inputs)
    weight = ops.dequantise(codes, scales.float(), zeros.float(), ops.groups_of(inputs, grid.group))
    return Found(weight.to(dtype), None, sum(part.nbytes for part in parts.values()))


def read_float_format(tensors: Tensors, linear: Linear, grid: Target, dtype: torch.dtype) -> Found:
    """A layer in compressed-tensors' layout of nvfp4 or mxfp4. Raises ValueError when its tensors do not fit."""
    parts = {name: tensors.get(f"{linear.name}.{name}") for name in names_of(grid)}
    weight = unpacked_format(parts, grid, linear.shape)
    return Found(weight.to(dtype), None, sum(part.nbytes for part in parts.values()))


def from_words(words: Tensor, bits: int, lines: int, length: int) -> Tensor:
    """[lines, length] uint8 numbers of `bits` bits, each line in whole 32-bit words, lowest bits first."""
    size = -(-length * bits // 32)
    if words.dtype != torch.int32 or words.shape != (lines, size):
        raise ValueError(f"{lines} x {length} numbers must be [{lines}, {size}] int32. Got {list(words.shape)} instead")
    octets = words.contiguous().numpy().astype("<i4").view(np.uint8)  # [lines, bytes]
    digits = np.unpackbits(octets, axis=1, bitorder="little")[:, : length * bits]
    return torch.from_numpy(np.packbits(digits.reshape(lines, length, bits), axis=2, bitorder="little")[..., 0])


# ------------------------------------------------------------------------------------------------------------- checking


def pattern_fault(weight: Tensor, mask: Tensor | None, target: Target) -> str | None:
    """The fault in the pattern of a layer [out, in], or None.

    With a mask the counts must be exact; without one, as a kept weight may be zero, no group may have more weights that
    are not zero than the pattern keeps.
    """
    if target.sparsity == 0:
        return None
    count = count_kept(weight != 0 if mask is None else mask, target)
    expected = kept_counts(weight.shape, target)
    if target.block:
        if mask is not None and not ((count == 0) | (count == expected)).all():
            return f"a 1x{target.block} block is only partly kept"
        wanted, dropped = expected.shape[1] - kept_blocks(target, weight.shape[1]), (count == 0).sum(1)
        wrong = int((dropped < wanted if mask is None else dropped != wanted).sum())
        return f"{wanted} blocks of 1x{target.block} must be zero in every row, {wrong} rows differ" if wrong else None
    wrong = int((count > expected if mask is None else count != expected).sum())
    where = {"row": "rows", "layer": "layers", "n:m": f"groups of {target.pattern}"}[target.structure]
    more = "more weights" if mask is None else "other numbers of weights"
    return f"{target.label} does not hold: {wrong} {where} keep {more}" if wrong else None


def check(folder: Folder, name: str, target: Target, saved: Mapping[str, Any] | None) -> Line:
    """The line of a layer; saved: what the folder's manifest says of it."""
    try:
        found = folder.read(name)
    except (ValueError, SafetensorError, InputError) as error:
        return Line(name, *folder.layers[name], 0, 0, str(error).rstrip("."))
    if tuple(found.weight.shape) != folder.layers[name]:
        fault = f"its shape must be {folder.layers[name]}. Got {tuple(found.weight.shape)} instead"
        return Line(name, *folder.layers[name], 0, found.stored, fault)
    counted = int((found.weight == 0).sum())
    seen = found.mask is not None or not target.rank  # of a sum the mask alone shows which entries of S are kept
    fault = (pattern_fault(found.weight, found.mask, target) if seen else None) or found.grid
    if not torch.isfinite(found.weight).all():
        fault = "a weight is not finite"
    elif fault is None and saved and counted != saved["zeros"]:
        fault = f"{saved['zeros']} zeros were saved, but {counted} are there"
    elif fault is None and saved and digest(found.weight) != saved["sha256"]:
        fault = "its weights are not those that were saved"
    return Line(name, *folder.layers[name], counted, found.stored, fault, found.note)


def audit(
    folder: Path, target: Target | None = None, trust_remote_code: bool = False
) -> tuple[str, Target, list[Line]]:
    """Format and target of a saved folder, and a line for every linear layer of its model.

    target: what the layers should be; None takes the folder's word. Raises InputError when the folder cannot be read,
    declares another grid, or says nothing of a target where none is given.
    """
    if not folder.is_dir():
        raise InputError(f"The folder {folder} does not exist.")
    if not any((folder / name).is_file() for name in HOLDERS):
        raise InputError(f"{folder} must hold weights: {', '.join(HOLDERS[:-1])} or {HOLDERS[-1]}. Got none instead.")
    try:
        said = read_record(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
        targets: dict[str, Target] = {}
        if target is None and "target" in said:
            target = Target(**said["target"])
            targets = {name: Target(**own) for name, own in said.get("targets", {}).items()}
        marks = said.get("layers", {})
        if not all(isinstance(mark, dict) and mark.keys() >= MARKS for mark in marks.values()):
            raise ValueError(f"each of its layers needs {', '.join(sorted(MARKS))}")
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be read: {error}.") from None
    if target is None and (folder / WEIGHTS).is_file():
        file = PackedFile(folder / WEIGHTS)
        target, targets = file.target, file.targets
    if target is None:
        raise InputError(f"{folder} names no target for its layers: give --target.")
    try:
        opened = open_folder(folder, said, target, trust_remote_code, targets)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of config.json or an index
        raise InputError(
            f"The description of the weights in {folder} cannot be used: {type(error).__name__}: {error}."
        ) from None
    if opened.grid not in (None, target.grid):
        raise InputError(f"{folder} must declare the grid of {target.label}. Got {opened.grid.label} instead.")
    layers = said.get("layers", {})
    if layers and layers.keys() != opened.layers.keys():
        others = few(layers.keys() ^ opened.layers.keys())
        raise InputError(f"{folder / MANIFEST} must list the layers of the model. Got differences instead: {others}.")
    lines = [check(opened, name, targets.get(name, target), layers.get(name)) for name in opened.layers]
    return opened.form, target, lines


def table(lines: list[Line]) -> str:
    """The lines as text."""
    width = max(len(line.layer) for line in lines)
    head = f"{'layer':{width}}  {'out x in':>13}  {'zeros':>11}  {'zeros %':>8}  {'bits/weight':>11}  check"
    text = [head, "-" * len(head)]
    for line in lines:
        shape = f"{line.out} x {line.inputs}"
        text.append(
            f"{line.layer:{width}}  {shape:>13}  {line.zeros:11,}  {100 * line.zeros / line.weights:8.3f}  "
            f"{8 * line.stored / line.weights:11.4f}  {line.fault or line.note}"
        )
    return "\n".join(text)


def summary(form: str, target: Target, lines: list[Line]) -> str:
    """All layers together, in one line."""
    weights, zeros, stored = (sum(getattr(line, name) for line in lines) for name in ("weights", "zeros", "stored"))
    return (
        f"{form}, {target.label}: {len(lines)} layers, {weights:,} weights, {zeros:,} zeros "
        f"({100 * zeros / weights:.3f}%), {stored:,} bytes, {8 * stored / weights:.4f} bits per weight."
    )


def fault_of(folder: Path, lines: list[Line]) -> str | None:
    """The first fault of a folder's layers in one sentence, or None if nothing is wrong."""
    faults = [line for line in lines if line.fault]
    if not faults:
        return None
    others = f", and {len(faults) - 1} more layers are wrong" if len(faults) > 1 else ""
    return f"{folder}: {faults[0].layer}: {faults[0].fault}{others}."
