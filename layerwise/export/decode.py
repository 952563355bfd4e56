"""Time y = W x, one token's product with a weight, for each way of storing W (docs/decode.md):
layerwise decode --shape ROWSxINPUTS --threads 1 --out results/decode.csv"""

import csv
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from layerwise.contract.target import Target
from layerwise.kernels.packed_matvec import Sparse24, W4BlockSparse, W4Grouped
from layerwise.kernels.packed_parts import Dense16, RowSparse, SumOfParts
from layerwise.kernels.packing import BLOCK
from layerwise.numerics import ops
from layerwise.numerics.patterns import kept_counts
from layerwise.runtime.errors import InputError
from layerwise.runtime.files import whole_file
from layerwise.runtime.provenance import provenance
from layerwise.storage.bits_per_weight import bits_per_weight, kept_blocks

FLOAT32_ERROR, BFLOAT16_ERROR = 1e-5, 1e-2  # of the largest entry of a product
BASE = "dense bfloat16"
W4 = Target(bits=4, group=128)
W4_BLOCKS = Target(0.5, f"1x{BLOCK}", bits=4, group=BLOCK)
TWO_OF_FOUR = Target(pattern="2:4")
BITMAP = "60% row"
WITH_FACTORS = ("rank 40%", "rank 40% 4b g64", "60% row rank 10%", "4b g128 rank 6%")  # labels of targets
Storage = W4Grouped | W4BlockSparse | Sparse24 | RowSparse | Dense16 | SumOfParts
DEVICES = ("cpu", "cuda")
WARM_UP = 5  # rounds that are not counted


@dataclass(frozen=True)
class StoredWeight:
    """A storage of W [rows, inputs] and the ways of computing its product, of which the fastest counts.

    exact: [rows] float64, the product with what is stored; moved: bytes of W as stored, of x and of y.
    """

    storage: str
    ways: dict[str, Callable[[], Tensor]]
    exact: Tensor
    bits: float
    moved: int


def stored_weights(rows: int, inputs: int, threads: int, device: str) -> list[StoredWeight]:
    """Every storage of one weight with normal entries. Entries of x are exact in bfloat16: all multiply the same x.

    Factors have normal entries too, as the time of a product does not depend on values: B A is no fit of the weight.
    Raises InputError for a shape in which a target's factors would have rank 0.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, inputs, generator=generator).bfloat16().float()
    x = torch.randn(inputs, generator=generator).bfloat16().float()
    moved = x.nbytes + 4 * rows
    halves = _dense(weight.bfloat16().to(device), x.bfloat16().to(device))
    if device == "cpu":  # the loop of dense factors, which is faster than torch on processors without bfloat16
        halves |= _kernel(Dense16.pack(weight), x, threads, device)

    def bits(target: Target) -> float:
        kept = 1.0
        if target.block:
            kept = min(kept_blocks(target, inputs) * target.block / inputs, 1.0)
        elif target.sparsity:
            kept = int(kept_counts(torch.Size((rows, inputs)), target).sum()) / (rows * inputs)
        return bits_per_weight(target, kept, rows, inputs)

    exact = weight.double() @ x.double()
    found = [
        StoredWeight("dense float32", _dense(weight.to(device), x.to(device)), exact, 32.0, weight.nbytes + moved),
        StoredWeight(
            BASE,
            halves,
            exact,
            bits(Target()),
            (weight.nbytes + moved) // 2,
        ),
    ]
    packed = {"W4 g128": (W4, _grouped(weight, W4)), "W4 50% 1x16": (W4_BLOCKS, _blocks(weight))}
    if device == "cpu":
        packed = {"2:4 bfloat16": (TWO_OF_FOUR, _two_of_four(weight)), **packed}
        packed[BITMAP] = (Target.parse(BITMAP), _bitmap(weight, Target.parse(BITMAP)))
        for label in WITH_FACTORS:
            packed[label] = (Target.parse(label), _sum(weight, Target.parse(label), generator))
    for name, (target, storage) in packed.items():
        exact = torch.from_numpy(storage.dequantised()) @ x.double()
        way = _kernel(storage, x, threads, device)
        found.append(StoredWeight(name, way, exact, bits(target), storage.nbytes + moved))
    return found


def _dense(weight: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """torch's own ways of multiplying one vector."""
    row, column = x[None], x[:, None]
    return {
        "W @ x": lambda: weight @ x,
        "x @ W.T": lambda: x @ weight.T,
        "W @ x[:, None]": lambda: weight @ column,
        "linear(x[None], W)": lambda: linear(row, weight),
        "linear(x, W)": lambda: linear(x, weight),
    }


def _kernel(storage: Storage, x: Tensor, threads: int, device: str) -> dict:
    if device == "cpu" or not isinstance(storage, W4Grouped | W4BlockSparse):  # others have no kernel on a device
        vector = x.numpy()
        return {"numba": lambda: torch.from_numpy(storage.product(vector, threads))}
    from layerwise.kernels.cuda import OnDevice  # needs Triton

    placed, entry = OnDevice(storage, device), x.to(device)
    return {"triton": lambda: placed.product(entry)}


def _two_of_four(weight: Tensor) -> Sparse24:
    mask = ops.prune_mask(weight.abs(), TWO_OF_FOUR)
    return Sparse24.pack(weight, mask)


def _bitmap(weight: Tensor, target: Target) -> RowSparse:
    return RowSparse.pack(weight, ops.prune_mask(weight.abs(), target))


def _sum(weight: Tensor, target: Target, generator: torch.Generator) -> SumOfParts:
    """Factors, in bfloat16 or codes, beside the weight pruned by a bitmap or quantised, if the target says so."""
    rows, inputs = weight.shape
    rank, part = target.rank_of(rows, inputs), target.rest
    if rank < 1:
        raise InputError(target.without_factors((rows, inputs), "--shape"))

    def factor(*shape: int) -> Dense16 | W4Grouped:
        values = torch.randn(shape, generator=generator).bfloat16().float()
        return _grouped(values, target.factors) if target.factor_bits else Dense16.pack(values)

    rest = None if part.dense else _grouped(weight, part) if part.bits else _bitmap(weight, part)
    return SumOfParts(factor(rows, rank), factor(rank, inputs), rest)


def _grouped(weight: Tensor, target: Target) -> W4Grouped:
    codes, scales, zeros = _quantised(weight, target)
    return W4Grouped.pack(codes, scales, zeros, target.group or weight.shape[1])


def _blocks(weight: Tensor) -> W4BlockSparse:
    mask = ops.prune_mask(weight.square(), W4_BLOCKS)
    return W4BlockSparse.pack(*_quantised(weight, W4_BLOCKS), mask[:, ::BLOCK])


def _quantised(weight: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, inputs], scales in bfloat16 and zeros [rows, groups] of a min-max grid."""
    grid = ops.fit_grid(weight, target.grid)
    grid = ops.Grid(grid.scales.bfloat16().float(), grid.zeros, grid.bits)
    return grid.codes(weight, ops.groups_of(weight.shape[1], target.group)), grid.scales, grid.zeros


def measure(found: list[StoredWeight], rounds: int, threads: int, device: str) -> list[dict[str, object]]:
    """One row per entry, in columns of the table: times in microseconds, over `rounds` rounds that call all once.

    Raises InputError for a product that is wrong.

    One thread on a processor is timed by its own clock, which stops while other programs run.
    """
    clock = time.thread_time if threads == 1 and device == "cpu" else time.perf_counter
    calls = [(entry, way, call) for entry in found for way, call in entry.ways.items()]
    seconds = np.empty((len(calls), WARM_UP + rounds))
    for nth in range(WARM_UP + rounds):
        for place, (_, _, call) in enumerate(calls):
            began = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[place, nth] = clock() - began
    low, middle, high = np.quantile(1e6 * seconds[:, WARM_UP:], (0.25, 0.5, 0.75), axis=1)
    rows = []
    for entry in found:
        place = min((n for n, (other, _, _) in enumerate(calls) if other is entry), key=middle.__getitem__)
        error = (calls[place][2]().double().cpu().flatten() - entry.exact).abs().max() / entry.exact.abs().max()
        if not error <= (BFLOAT16_ERROR if entry.storage == BASE else FLOAT32_ERROR):
            raise InputError(f"The product of {entry.storage} is wrong by {float(error):.2g} of its largest entry.")
        rows.append(
            {
                "storage": entry.storage,
                "way": calls[place][1],
                "bits_per_weight": round(entry.bits, 4),
                "bytes_moved": entry.moved,
                "microseconds": round(middle[place], 1),
                "microseconds_q1": round(low[place], 1),
                "microseconds_q3": round(high[place], 1),
                "max_relative_error": float(f"{float(error):.2g}"),
            }
        )
    base = next(float(row["microseconds"]) for row in rows if row["storage"] == BASE)
    return [{**row, "times_as_fast": round(base / float(row["microseconds"]), 3)} for row in rows]


def pin(threads: int) -> None:
    """Keep this process to as many processors as it has threads, where the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    torch.set_num_threads(threads)


def time_products(
    shapes: Sequence[tuple[int, int]], threads: int, rounds: int, device: str, out: Path
) -> Iterator[str]:
    """Time every storage at every shape (rows, inputs) and write the table `out`, a CSV. Yields a line per product.

    rounds: times that each product is timed. device: cpu or cuda. Raises InputError for a device or threads that
    this machine lacks, and for a product that is wrong.
    """
    for name, value in (("threads", threads), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1. Got {value} instead.")
    for shape in shapes:
        if min(shape) < 1:
            raise InputError(f"--shape must have at least one row and one input. Got {shape[0]}x{shape[1]} instead.")
    if device not in DEVICES:
        raise InputError(f"--device must be {' or '.join(DEVICES)}. Got {device!r} instead.")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs a GPU that torch can use; there is none.")
    if threads > (os.cpu_count() or 1):
        raise InputError(f"--threads must be at most the {os.cpu_count()} processors. Got {threads} instead.")
    pin(threads)
    made = provenance(device, threads)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{made['cpu']}, {made['platform']}"
    table = []
    for rows, inputs in shapes:
        with torch.inference_mode():
            measured = measure(stored_weights(rows, inputs, threads, device), rounds, threads, device)
        for row in measured:
            place = {"rows": rows, "inputs": inputs, "threads": threads, "device": device, "machine": machine}
            table.append({**row, **place, "torch": torch.__version__, "numba": numba.__version__})
            yield "{rows} x {inputs}  {storage:16} {microseconds:9} us  x{times_as_fast}".format(**table[-1])
    with whole_file(out) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
