"""Spread a budget over the layers of the dense model: one level for each, in a small table (docs/allocation.md)."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from tqdm import tqdm

from layerwise.allocation.budget import held
from layerwise.calibration.gram_store import read_index, store_of, unless_damaged
from layerwise.calibration.modes import shared_blocks
from layerwise.calibration.taps import Tap, tapped_linears
from layerwise.compression.probe import Probe
from layerwise.compression.trials import ModelTrials
from layerwise.contract.allocator import Allocator, DenseLayer, Part, Proposal, Trials
from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.gram import Gram
from layerwise.contract.layer import Layer
from layerwise.contract.target import OF_FACTORS, Target
from layerwise.models import compute_dtype, loading, structure
from layerwise.models.stored_dtypes import stored_dtype
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Blocks
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import scratch_folder, whole_file
from layerwise.sources.fingerprint import unchanging
from layerwise.sources.tokens import read_tokens
from layerwise.storage.table_schema import from_rows, write_parquet
from layerwise.storage.target_bits import bits_of, kept_of


@dataclass(frozen=True)
class AllocateJob:
    """The job that spreads one budget.

    spec: the grid's spec: name, allocator, params, target and seed. model: the config's entry. gram: the store of the
    dense model's Grams; None for an allocator that does not use them. tokens: the calibration sequences, for an
    allocator that tries the model. folder: temporary files of such trials. method_paths, allocator_paths: further
    folders.
    """

    spec: Mapping[str, Any]
    model: Mapping[str, Any]
    gram: Path | None = None
    tokens: Path | None = None
    folder: Path | None = None
    method_paths: Sequence[Path] = ()
    allocator_paths: Sequence[Path] = ()
    device: str = "cpu"

    @property
    def target(self) -> Target:
        return Target(**self.spec["target"])

    def allocator(self) -> tuple[Allocator, set[str]]:
        """The allocator and the names of its needs."""
        catalogue = Catalogue(list(self.allocator_paths), ALLOCATOR, Catalogue(list(self.method_paths)))
        name = self.spec["allocator"]
        return catalogue.allocator(name, self.spec["params"]), catalogue[name].needs(self.spec["params"])

    def probe(self, allocator: Allocator, needs: set[str], dtype: torch.dtype) -> Probe | None:
        """The probe that tries layers, for an allocator that needs one. dtype: the model's dtype."""
        if not needs & {"errors", "trials"}:
            return None
        method, candidates = allocator.candidates(self.target)
        asked = candidates if "errors" in needs else ()
        return Probe.of(self.spec["allocator"], method, asked, self.target, self.spec["seed"], dtype)


def allocate(job: AllocateJob) -> list[dict[str, Any]]:
    """The rows of the table, without the columns of the study.

    Raises InputError, in one sentence, for an allocator that fails or proposes no levels.
    """
    blocks = LazyBlocks(job.model, job.device)
    with named_failures(job.spec["allocator"], job.target.label):
        allocator, needs = job.allocator()
        probe = job.probe(allocator, needs, stored_dtype(blocks.model))
    parts: list[Part] = []
    title = "{name} {target}".format(name=job.spec["name"], target=job.target.label)
    with tqdm(total=structure.count_linears(blocks.model), desc=title, unit="layer", mininterval=1.0) as progress:
        for index, layers in block_layers(blocks, job.gram):
            parts += measured(allocator, job.spec["allocator"], index, layers, probe, progress)
    with named_failures(job.spec["allocator"], job.target.label):
        with trials_of(job, parts, probe if "trials" in needs else None) as trials:
            proposal = allocator.search(parts, job.target, trials) if trials else allocator.allocate(parts, job.target)
        return rows_of(parts, proposal, targets_of(parts, proposal, job.target), job.target)


@contextmanager
def trials_of(job: AllocateJob, parts: Sequence[Part], probe: Probe | None) -> Iterator[Trials | None]:
    """The model to try, whole in memory; None without a probe. Its files are deleted afterwards, and files left by
    killed jobs beforehand."""
    if probe is None:
        yield None
        return
    assert job.gram and job.tokens
    tokens = torch.from_numpy(read_tokens(job.tokens)[0])
    computed = compute_dtype.compute_dtype(job.model, job.device)
    blocks = Blocks(loading.load(job.model, job.device, computed))
    with scratch_folder(job.folder or Path(gettempdir()), ".trials-") as folder:
        yield ModelTrials(blocks, parts, store_of(job.gram), tokens, probe, folder)


def targets_of(parts: Sequence[Part], proposal: object, target: Target) -> list[Target]:
    """The target of each layer. Raises ValueError for what is no proposal, lacks layers or misses the budget."""
    if not isinstance(proposal, Proposal):
        raise ValueError(f"an allocator must return a Proposal. Got {type(proposal).__name__} instead")
    if len(proposal.scores) != len(parts):
        raise ValueError(f"scores must be {len(parts)}, one for each layer. Got {len(proposal.scores)} instead")
    if target.paired:
        return held_pairs(parts, proposal.pairs or (), target)
    if proposal.official and len(proposal.levels) != len(parts):
        raise ValueError(f"levels must be {len(parts)}, one for each layer. Got {len(proposal.levels)} instead")
    levels = list(proposal.levels) if proposal.official else held(proposal.levels, sizes(parts), target)
    return [target.at(level) for level in levels]


def held_pairs(parts: Sequence[Part], pairs: Sequence[Target], target: Target) -> list[Target]:
    """The layers' own targets, after a check that they take no more bits than the budget."""
    if len(pairs) != len(parts):
        raise ValueError(f"pairs must be {len(parts)}, one for each layer. Got {len(pairs)} instead")
    taken = sum(bits_of(own, part.out, part.inputs) for part, own in zip(parts, pairs, strict=True))
    wanted = sum(bits_of(target, part.out, part.inputs) for part in parts)
    if taken > wanted:
        raise ValueError(f"pairs must take at most {wanted} bits together. Got {taken} instead")
    return list(pairs)


@contextmanager
def named_failures(name: str, where: str) -> Iterator[None]:
    """Context in which any exception of an allocator, whose file may be anyone's, becomes an InputError with its
    name."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = str(error).rstrip(".")
        raise InputError(f"The allocator {name} failed at {where}: {type(error).__name__}: {said}.") from error


def sizes(parts: Sequence[Part]) -> list[int]:
    return [part.size for part in parts]


Seen = tuple[Layer | DenseLayer, float]  # a layer, and the share of the calibration tokens that it sees


def block_layers(blocks: LazyBlocks, gram: Path | None) -> Iterator[tuple[int, Iterator[Seen]]]:
    """The layers of each block of a model, with the Grams and statistics of its calibration if `gram` is given, and the
    share of the tokens that each sees (1 without Grams)."""
    if gram is None:
        for index in range(len(blocks)):
            with blocks.open(index) as block:
                found = structure.linears(block, f"{blocks.name}.{index}")
                yield index, ((DenseLayer(linear.name, linear.weight()), 1.0) for linear in found)
        return
    most = max(tap["tokens"] for block in read_index(store_of(gram))["blocks"] for tap in block.values())
    for index, taps in shared_blocks(store_of(gram), blocks):
        tapped = tapped_linears(blocks.model, [(index, taps)])
        seen = (
            (Layer(linear.name, linear.weight(), tap.gram, tap.statistics), share_of(tap, most))
            for _, tap, linear in tapped
        )
        yield index, seen


def share_of(tap: Tap, tokens: int) -> float:
    """The share of all tokens that a tap's layers see when the model runs.

    A fallback expert was calibrated on every token. It was routed fewer than its layers have inputs, which counts here:
    the store does not keep the number.
    """
    return min(tap.gram.tokens, len(tap.gram.matrix)) / tokens if tap.scope == "fallback" else tap.gram.tokens / tokens


def measured(
    allocator: Allocator,
    name: str,
    index: int,
    layers: Iterable[Seen],
    probe: Probe | None,
    progress: tqdm[Any],
) -> list[Part]:
    """The parts of a block.

    Absolute errors, which are means over the tokens that a layer sees, are multiplied by the share of these among all
    tokens, so that an expert counts by what it adds to the error of the model. Raises InputError if the allocator fails
    or does not measure every layer exactly once.
    """
    seen: list[Part] = []

    def watched() -> Iterator[DenseLayer]:
        for layer, share in layers:
            out, inputs = layer.weight.shape
            errors = None
            if probe is not None and probe.candidates and isinstance(layer, Layer):
                found = probe.errors(layer)
                errors = {candidate: (share * error, relative) for candidate, (error, relative) in found.items()}
            seen.append(Part(layer.name, index, out, inputs, None, errors))
            gram: Gram | None = layer.gram
            yield DenseLayer(layer.name, layer.weight, gram)
            progress.update()

    rest = watched()
    with named_failures(name, f"block {index}"):
        values = list(allocator.measure(rest))
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
    """One row per layer; values common to all layers are repeated in each row."""
    total, paired = sum(sizes(parts)), target.paired
    levels = [own.level for own in targets]
    if paired:
        stored = zip(parts, targets, strict=True)
        levels = [bits_of(own, part.out, part.inputs) / part.size for part, own in stored]
    mean = math.fsum(part.size * level for part, level in zip(parts, levels, strict=True)) / total
    achieved = mean  # of bits
    if target.sparsity:
        kept = sum(kept_of(own, part.out, part.inputs) for part, own in zip(parts, targets, strict=True))
        achieved = 1 - kept / total
    gap = None
    if proposal.error is not None and proposal.bound is not None:
        gap = max(0.0, 1 - proposal.bound / proposal.error) if proposal.error > 0 else 0.0
    common = {
        "budget": sum(bits_of(target, part.out, part.inputs) for part in parts) / total if paired else target.level,
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
            "pair": own.label if paired else None,
            "score": None if score is None else float(score),
            **common,
        }
        for part, own, level, score in zip(parts, targets, levels, proposal.scores, strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="allocate", description=__doc__)
    parser.add_argument("--columns", type=json.loads, required=True, help="model and calibration, as JSON")
    parser.add_argument("--allocation", type=json.loads, required=True, help="allocation spec, as JSON")
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="the model's fingerprint")
    parser.add_argument("--gram", type=Path, help="store of the Grams, for an allocator that uses them")
    parser.add_argument("--tokens", type=Path, help="calibration tokens, for an allocator that tries the model")
    parser.add_argument("--method-path", type=Path, action="append", default=[], help="further folder of methods")
    parser.add_argument("--allocator-path", type=Path, action="append", default=[], help="further folder of allocators")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="table of levels, parquet")
    args = parser.parse_args(argv)
    loading.set_threads(args.threads)
    paths = (args.method_path, args.allocator_path)
    job = AllocateJob(args.allocation, args.model, args.gram, args.tokens, args.out.parent, *paths, args.device)
    facts = {
        **args.columns,
        "allocation": job.spec["name"],
        "allocator": job.spec["allocator"],
        "target": job.target.label,
        # the label contains what the target says of factors
        **{name: value for name, value in job.target.as_dict().items() if name not in OF_FACTORS},
        "params": json.dumps(job.spec["params"], sort_keys=True, separators=(",", ":")),
        "seed": job.spec["seed"],
    }
    with unchanging(args.model, args.fingerprint), unless_damaged(args.gram):
        rows = [facts | row for row in allocate(job)]
    with whole_file(args.out) as part:
        write_parquet(from_rows(rows, "allocations", f"the levels of {job.spec['name']}"), part)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
