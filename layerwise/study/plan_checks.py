"""What is refused in a study before any job: each check raises InputError with one sentence."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from layerwise.contract.catalogue import Catalogue, odd_inputs
from layerwise.contract.target import Target
from layerwise.runtime.errors import InputError
from layerwise.sources import checkpoint_files, task_sets, text_files
from layerwise.sources.shapes import shape_of
from layerwise.sources.specs import ModelSpec
from layerwise.study.cell import Cell, SkippedRow, canonical, name_of
from layerwise.study.config_validation import TEXT_USERS
from layerwise.study.method_costs import needs_cross, needs_fisher
from layerwise.study.method_entries import MethodEntry

# Columns of the table `cells` that a study may sweep, besides parameters of its methods.
SWEPT_TARGET = ("sparsity", "bits", "group")
SWEPT = (*SWEPT_TARGET, "calibration", "calibration_samples", "calibration_length", "calibration_seed")


def check_sources(full: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Raise InputError if models, texts or tasks are absent, damaged or unsuitable for the study."""
    for name, spec in full["models"].items():
        checkpoint_files.check_checkpoint(name, spec)
        check_groups(name, spec, targets)
        check_lengths(name, spec, full)
    for name in used_texts(full):
        text_files.check_text(name, full["texts"][name])
    for name, spec in full["tasks"].items():
        task_sets.check_tasks(name, spec)


def used_texts(full: Mapping[str, Any]) -> list[str]:
    """Names of the texts that the study reads."""
    return sorted({entry["text"] for kind in TEXT_USERS for entry in full[kind].values()})


def check_text_files(config: Mapping[str, Any]) -> None:
    """Raise InputError if a local text that a plan's config reads does not exist and no rule of the workflow writes
    it."""
    for name in used_texts(config):
        text_files.check_file(name, config["texts"][name])


def check_groups(name: str, spec: ModelSpec, targets: Sequence[Target]) -> None:
    """Raise InputError if the groups of a target do not divide the inputs of a model's layers."""
    for target, size in itertools.product(targets, checkpoint_files.layer_inputs(spec)):
        if target.group and size % target.group:
            raise InputError(
                "targets: a group must divide the inputs of every layer. "
                f"Got groups of {target.group} instead, and layers of {size} inputs in the model {name!r}."
            )


def check_lengths(name: str, spec: ModelSpec, full: Mapping[str, Any]) -> None:
    """Raise InputError if sequences are longer than a model allows."""
    longest = checkpoint_files.longest_sequence(spec)
    if longest is None:
        return
    for kind in TEXT_USERS:
        for set_name, entry in full[kind].items():
            if entry["length"] > longest:
                raise InputError(
                    f"{kind}.{set_name}: its length must be at most {longest} tokens for the model {name!r}. Got "
                    f"{entry['length']} instead."
                )


def check_experts(cells: Sequence[Cell], catalogue: Catalogue, models: Mapping[str, ModelSpec]) -> None:
    """Raise InputError if a method needs the cross-Gram of a model that is known to have experts."""
    asking = {cell.model: cell for cell in reversed(cells) if needs_cross(catalogue, cell)}
    for model, cell in asking.items():
        shape = shape_of(models[model])
        if shape and shape.has_experts:
            if cell.spec.get("asymmetric"):
                raise InputError(
                    "config: asymmetric must be false for a model with experts: the dense and the compressed model may "
                    f"route different tokens to an expert. Got true for {cell.columns['model']!r} instead."
                )
            raise InputError(
                f"methods.{cell.columns['label']}: {cell.columns['method']} must have a model without experts in "
                "sequential mode: it needs the cross-Gram of the same tokens in the dense and in the compressed model, "
                f"which may route different tokens to an expert. Got {cell.columns['model']!r} instead: give the "
                "method modes: [shared]."
            )


def check_modes(cells: Sequence[Cell], catalogue: Catalogue) -> None:
    """Raise InputError if a method needs the dense model's loss in a mode that runs compressed blocks."""
    for cell in cells:
        if cell.mode != "shared" and needs_fisher(catalogue, cell):
            raise InputError(
                f"methods.{cell.columns['label']}: {cell.columns['method']} must run in shared mode: its fisher is of "
                f"the dense model's loss. Got {cell.mode} mode instead: give the method modes: [shared]."
            )


def check_ranks(cells: Sequence[Cell], models: Mapping[str, ModelSpec]) -> None:
    """Raise InputError if the rank of a target is 0 in a layer of a model whose shape is known."""
    asked = dict.fromkeys(
        (cell.model, Target(**cell.spec["target"])) for cell in cells if "rank" in cell.spec["target"]
    )
    shapes = {model: shape_of(models[model]) for model, _ in asked}
    for model, target in asked:
        shape, name = shapes[model], f"a layer of the model {name_of(models[model])!r}"
        for out, inputs in [layer[:2] for block in shape.blocks for layer in block.layers] if shape else ():
            if target.rank_of(out, inputs) < 1:
                raise InputError(f"targets: {target.without_factors((out, inputs), name)}")


def check_rotations(cells: Sequence[Cell], catalogue: Catalogue, models: Mapping[str, ModelSpec]) -> None:
    """Raise InputError if a method rotates a layer with an odd number of inputs, of a model whose shape is known."""
    rotating = {
        cell.model: cell
        for cell in reversed(cells)
        if catalogue.rotates(cell.spec["method"]["name"], cell.spec["method"]["params"])
    }
    for model, cell in rotating.items():
        shape = shape_of(models[model])
        odd = [size for block in shape.blocks for _, size, _ in block.layers if size % 2] if shape else []
        if odd:
            place = f"a layer of the model {cell.columns['model']!r}"
            told = odd_inputs(cell.columns["method"], odd[0], place)
            raise InputError(f"methods.{cell.columns['label']}: {told}")


def check_targets(
    targets: Sequence[Target],
    entries: Sequence[MethodEntry],
    catalogue: Catalogue,
    cells: Sequence[Cell],
    skipped: Sequence[SkippedRow],
) -> None:
    """Raise InputError for a target that no method reaches, unless the study has only controls."""
    supported = {canonical(cell.spec["target"]) for cell in cells}
    unreached = [target.label for target in targets if canonical(target.as_dict()) not in supported]
    if unreached and not all(catalogue[entry.method].control for entry in entries):
        reasons = [
            f" ({row['label']}: {row['reason']})"
            for row in skipped
            if f"{row['target']} ".startswith(f"{unreached[0]} ")
        ]
        raise InputError(f"targets: no method of the study supports {unreached[0]}{''.join(reasons[:1])}.")


def check_sweep(sweep: str | None, entries: Sequence[MethodEntry]) -> None:
    """Raise InputError if the study's swept quantity belongs to none of its entries."""
    if sweep is not None and sweep not in SWEPT and not any(sweep in entry.params for entry in entries):
        known = ", ".join(SWEPT)
        raise InputError(
            f"config: sweep must be {known} or a parameter of a method of the study. Got {sweep!r} instead."
        )
