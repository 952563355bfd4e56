"""The certificate of a target: for every layer of a model the error that no mask of its pattern, or no matrix of its
rank, can beat."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from layerwise.calibration.gram_store import store_of, unless_damaged
from layerwise.calibration.modes import shared_blocks
from layerwise.calibration.taps import tapped_linears
from layerwise.compression.lower_bound import lower_bound
from layerwise.contract.layer import Layer, Target
from layerwise.models import loading, structure
from layerwise.models.streaming import LazyBlocks
from layerwise.numerics import ops
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import whole_file
from layerwise.sources.fingerprint import unchanging
from layerwise.storage.table_schema import from_rows, write_parquet


def row(layer: Layer, target: Target) -> dict[str, Any]:
    """The layer's row of the `bounds` table, in units of output_error: shares of the error of pruning everything."""
    start = time.perf_counter()
    try:
        bound = lower_bound(layer, target)
    except (ValueError, RuntimeError) as error:  # torch.linalg raises RuntimeError
        raise InputError(f"The bound on {layer.name} failed: {type(error).__name__}: {error}") from error
    nothing: Tensor = torch.zeros_like(layer.weight, dtype=torch.bool)
    total = ops.mask_objective(layer.weight, layer.gram.matrix, nothing)
    shares = [value / total if total > 0 else 0.0 for value in (bound.error, bound.plain, bound.gap)]
    names = ("lower_bound", "plain_bound", "bound_gap")
    return {"layer": layer.name, **dict(zip(names, shares, strict=True)), "seconds": time.perf_counter() - start}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=json.loads, required=True, help="model, calibration and seed, as JSON")
    parser.add_argument("--target", type=json.loads, required=True, help="target, as JSON")
    parser.add_argument("--model", type=json.loads, required=True, help="model entry of the config, as JSON")
    parser.add_argument("--fingerprint", type=Path, required=True, help="the model's fingerprint, from fingerprint.py")
    parser.add_argument("--gram", type=Path, required=True, help="store of the Grams, from calibrate.py")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="table of bounds, parquet")
    args = parser.parse_args(argv)
    loading.set_threads(args.threads)
    target = Target(**args.target)
    facts = {**args.columns, "target": target.label, "sparsity": target.sparsity, "pattern": target.pattern}
    with unchanging(args.model, args.fingerprint), unless_damaged(args.gram):
        blocks = LazyBlocks(args.model, args.device)
        layers = tqdm(
            tapped_linears(blocks.model, shared_blocks(store_of(args.gram), blocks)),
            desc=f"bound {target.label}",
            total=structure.count_linears(blocks.model),
            unit="layer",
            mininterval=1.0,
        )
        rows = [
            facts | row(Layer(linear.name, linear.weight(), tap.gram, tap.statistics), target)
            for _, tap, linear in layers
        ]
    with whole_file(args.out) as part:
        write_parquet(from_rows(rows, "bounds", f"the bounds of {target.label}"), part)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
