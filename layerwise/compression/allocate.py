"""Spread a budget over the layers of the dense model: one level for each, in a small table (docs/allocation.md)."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from layerwise.allocation.budget import held
from layerwise.calibration.gram_store import store_of, unless_damaged
from layerwise.calibration.modes import shared_blocks
from layerwise.calibration.taps import tapped_linears
from layerwise.compression.solver import Solver
from layerwise.contract.allocator import Allocator, DenseLayer, Part, Proposal
from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.gram import Gram
from layerwise.contract.layer import Layer
from layerwise.contract.target import Target
from layerwise.models import loading, structure
from layerwise.models.stored_dtypes import stored_dtype
from layerwise.models.streaming import LazyBlocks
from layerwise.numerics.patterns import kept_counts
from layerwise.results.bounds import read_levels
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import whole_file
from layerwise.sources.fingerprint import unchanging
from layerwise.storage.table_schema import from_rows, write_parquet


@dataclass(frozen=True)
class AllocateJob:
    """A budget to be spread.

    spec: as the grid has it: name, allocator, params, target and seed. model: the config's entry. gram: where the Grams
    of the dense model are; None for an allocator that sees none. method_paths, allocator_paths: further folders.
    """

    spec: Mapping[str, Any]
    model: Mapping[str, Any]
    gram: Path | None = None
    method_paths: Sequence[Path] = ()
    allocator_paths: Sequence[Path] = ()
    device: str = "cpu"

    @property
    def target(self) -> Target:
        return Target(**self.spec["target"])

    def allocator(self) -> tuple[Allocator, Mapping[str, Any]]:
        """The allocator and its card."""
        catalogue = Catalogue(list(self.allocator_paths), ALLOCATOR, Catalogue(list(self.method_paths)))
        name = self.spec["allocator"]
        return catalogue.allocator(name, self.spec["params"]), catalogue[name].card


def allocate(job: AllocateJob) -> list[dict[str, Any]]:
    """The rows of the table, without the columns of the study.

    Raises InputError, in one sentence, for an allocator that fails or proposes no levels.
    """
    allocator, card = job.allocator()
    blocks = LazyBlocks(job.model, job.device)
    probe = Probe.of(allocator, job, stored_dtype(blocks.model)) if "errors" in card["needs"] else None
    parts: list[Part] = []
    title = "{name} {target}".format(name=job.spec["name"], target=job.target.label)
    with tqdm(total=structure.count_linears(blocks.model), desc=title, unit="layer", mininterval=1.0) as progress:
        for index, layers in block_layers(blocks, job.gram):
            parts += measured(allocator, job.spec["allocator"], index, layers, probe, progress)
    try:
        proposal = allocator.allocate(parts, job.target)
        levels = list(proposal.levels) if proposal.official else held(proposal.levels, sizes(parts), job.target)
        if len(proposal.scores) != len(parts):
            raise ValueError(f"scores must be {len(parts)}, one for each layer. Got {len(proposal.scores)} instead")
        targets = [job.target.at(level) for level in levels]
    except Exception as error:  # the message names the allocator
        raise failed(job.spec["allocator"], job.target.label, error) from error
    return rows_of(parts, proposal, targets, job.target)


def failed(name: str, where: str, error: Exception) -> InputError:
    """The error about an allocator that has failed."""
    return InputError(f"The allocator {name} failed at {where}: {type(error).__name__}: {str(error).rstrip('.')}.")


def sizes(parts: Sequence[Part]) -> list[int]:
    return [part.size for part in parts]


def block_layers(blocks: LazyBlocks, gram: Path | None) -> Iterator[tuple[int, Iterator[Layer | DenseLayer]]]:
    """The layers of each block of a model, with the Grams and statistics that it was calibrated to, or without."""
    if gram is None:
        for index in range(len(blocks)):
            with blocks.open(index) as block:
                found = structure.linears(block, f"{blocks.name}.{index}")
                yield index, (DenseLayer(linear.name, linear.weight()) for linear in found)
        return
    for index, taps in shared_blocks(store_of(gram), blocks):
        tapped = tapped_linears(blocks.model, [(index, taps)])
        yield index, (Layer(linear.name, linear.weight(), tap.gram, tap.statistics) for _, tap, linear in tapped)


@dataclass(frozen=True)
class Probe:
    """The method that tries every candidate level of a layer."""

    solver: Solver
    levels: Sequence[float]

    @classmethod
    def of(cls, allocator: Allocator, job: AllocateJob, dtype: torch.dtype) -> Probe:
        method, levels = allocator.candidates(job.target)
        name = f"{job.spec['allocator']}'s {type(method).__name__}"
        return cls(Solver(name, method, job.target, job.spec["seed"], dtype), levels)

    def errors(self, layer: Layer) -> dict[float, tuple[float, float]]:
        """Level -> (absolute, relative) output error of the layer."""
        found = {}
        for level in self.levels:
            _, row = replace(self.solver, target=self.solver.target.at(level)).solve(layer)
            found[level] = (row["absolute_error"], row["output_error"])
        return found


def measured(
    allocator: Allocator,
    name: str,
    index: int,
    layers: Iterable[Layer | DenseLayer],
    probe: Probe | None,
    progress: tqdm[Any],
) -> list[Part]:
    """The parts of a block. Raises InputError where the allocator fails, or does not measure every layer once."""
    seen: list[Part] = []

    def watched() -> Iterator[DenseLayer]:
        for layer in layers:
            out, inputs = layer.weight.shape
            errors = probe.errors(layer) if probe and isinstance(layer, Layer) else None
            seen.append(Part(layer.name, index, out, inputs, None, errors))
            gram: Gram | None = layer.gram
            yield DenseLayer(layer.name, layer.weight, gram)
            progress.update()

    rest = watched()
    try:
        values = list(allocator.measure(rest))
    except InputError:
        raise
    except Exception as error:
        raise failed(name, f"block {index}", error) from error
    for _ in rest:
        pass
    if len(values) != len(seen):
        raise InputError(
            f"The allocator {name} must measure each of the {len(seen)} layers of block {index} once. "
            f"Got {len(values)} values instead."
        )
    return [replace(part, measured=value) for part, value in zip(seen, values, strict=True)]


def rows_of(
    parts: Sequence[Part], proposal: Proposal, targets: Sequence[Target], target: Target
) -> list[dict[str, Any]]:
    """A row for each layer; what holds for all stands in every one."""
    total = sum(sizes(parts))
    levels = [own.level for own in targets]
    mean = math.fsum(part.size * level for part, level in zip(parts, levels, strict=True)) / total
    achieved = mean  # of bits
    if target.sparsity:
        kept = sum(kept_of(part, own) for part, own in zip(parts, targets, strict=True))
        achieved = 1 - kept / total
    gap = None
    if proposal.error is not None and proposal.bound is not None:
        gap = max(0.0, 1 - proposal.bound / proposal.error) if proposal.error > 0 else 0.0
    common = {
        "budget": target.level,
        "mean_level": mean,
        "achieved": achieved,
        "official": proposal.official,
        "allocated_error": proposal.error,
        "uniform_error": proposal.uniform_error,
        "allocated_bound": proposal.bound,
        "allocated_gap": gap,
    }
    return [
        {
            "layer": part.name,
            "kind": part.name.rpartition(".")[2],
            "block": part.block,
            "out": part.out,
            "in": part.inputs,
            "level": level,
            "score": None if score is None else float(score),
            **common,
        }
        for part, level, score in zip(parts, levels, proposal.scores, strict=True)
    ]


def kept_of(part: Part, target: Target) -> int:
    """Weights of a layer that a target keeps."""
    if target.sparsity == 0:
        return part.size
    return int(kept_counts(torch.Size((part.out, part.inputs)), target).sum())


def levels_at(path: Path) -> dict[str, float]:
    """Layer -> its level, from a table that this job wrote. Raises InputError when it is absent or broken."""
    data = read_levels(path)
    return dict(zip(data.column("layer").to_pylist(), data.column("level").to_pylist(), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="allocate", description=__doc__)
    parser.add_argument("--columns", type=json.loads, required=True, help="model and calibration, as JSON")
    parser.add_argument("--allocation", type=json.loads, required=True, help="what is to be spread, and how, as JSON")
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="the model's fingerprint")
    parser.add_argument("--gram", type=Path, help="where the Grams are, for an allocator that sees them")
    parser.add_argument("--method-path", type=Path, action="append", default=[], help="further folder of methods")
    parser.add_argument("--allocator-path", type=Path, action="append", default=[], help="further folder of allocators")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="table of levels, parquet")
    args = parser.parse_args(argv)
    loading.set_threads(args.threads)
    job = AllocateJob(args.allocation, args.model, args.gram, args.method_path, args.allocator_path, args.device)
    facts = {
        **args.columns,
        "allocation": job.spec["name"],
        "allocator": job.spec["allocator"],
        "target": job.target.label,
        **job.target.as_dict(),
        "params": json.dumps(job.spec["params"], sort_keys=True, separators=(",", ":")),
        "seed": job.spec["seed"],
    }
    with unchanging(args.model, args.fingerprint), unless_damaged(args.gram):
        rows = [facts | row for row in allocate(job)]
    with whole_file(args.out) as part:
        write_parquet(from_rows(rows, "allocations", f"the levels of {job.spec['name']}"), part)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
