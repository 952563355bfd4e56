"""What a method takes besides the process: weights and grams of the `cost` on its card.

    python -m tests.benchmarks.bench_memory [--table] [method ...]

Each case of the suite solves layers of several shapes as a cell's job does: solved, judged, written into a bfloat16
module, packed. The peak above what the process had before is fitted from above by w times the weight and g times the
Gram, both in float32. --table: instead the peak of each case at one shape, as a multiple of weight and Gram in the
dtype that the method needs, without the model's own weight. Needs Linux, which can reset a process's peak.
"""

import argparse
import ctypes
import gc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from layerwise.compression.lower_bound import lower_bound
from layerwise.compression.solver import Solver
from layerwise.contract.layer import Gram, Layer, Statistics, Target
from layerwise.models import structure
from layerwise.storage import layer_packing
from tests.benchmarks.suite import CASES

SHAPES = ((4096, 1024), (2048, 2048), (1024, 2560))  # the weight is 4 times the Gram, as large, two fifths
CERTIFICATE = "certificate"  # the bound on a layer's masks, which is no method
FEW = {"swaps": 3, "iterations": 4}  # of parameters that say how long a method goes on, in as much memory
SIDE = 2048  # of the layer in the table
SINGLE = {"random", "magnitude", "wanda", "dsnot", "rtn", "chain", "awp", "awq"}  # methods that need no float64
BOUNDED = {"row": Target(0.5), "layer": Target(0.5, "layer"), "2:4": Target(pattern="2:4")}


def build(out: int, inputs: int) -> Layer:
    """A layer whose inputs correlate by 0.7 to the power of their distance."""
    rng = torch.Generator().manual_seed(0)
    scale, places = torch.exp(0.5 * torch.randn(inputs, generator=rng)), torch.arange(inputs)
    matrix = 0.7 ** (places - places[:, None]).abs().float() * scale * scale[:, None]
    mean = 0.2 * scale
    statistics = Statistics(128, mean, scale, scale.square(), torch.randn(512, inputs, generator=rng) * scale)
    return Layer("layer", 0.02 * torch.randn(out, inputs, generator=rng), Gram(matrix, 2 * inputs), statistics)


def resident(field: str) -> int:
    """Bytes of this process's memory, VmRSS now or VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def solved(case: str, layer: Layer) -> None:
    """The layer through a case, as a cell's job takes it."""
    if case.startswith(CERTIFICATE):
        lower_bound(layer, BOUNDED[case.split()[1]])
        return
    chosen = CASES[case]
    dtype = torch.bfloat16
    out, inputs = layer.weight.shape
    linear = structure.Linear(layer.name, layer.name, torch.nn.Linear(inputs, out, dtype=dtype), False)
    built = replace(chosen.built, **{key: few for key, few in FEW.items() if hasattr(chosen.built, key)})
    result, _ = Solver(chosen.method, built, chosen.target, 0, dtype).solve(layer)
    linear.replace(result.weight)
    layer_packing.parts_of(result, chosen.target, dtype)


def peak(case: str, out: int, inputs: int) -> float:
    """Bytes that the process holds at most while the case runs, less what it held without the layer."""
    solved(case, build(256, 256))  # what is compiled and imported
    layer = build(out, inputs)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier cases have left
    before = resident("VmRSS") - layer.weight.nbytes - layer.gram.matrix.nbytes
    Path("/proc/self/clear_refs").write_text("5")
    solved(case, layer)
    return resident("VmHWM") - before


def fitted(peaks: list[tuple[int, int, float]]) -> tuple[float, float]:
    """(w, g): the closest w W + g G of all that no peak (bytes of W, of G, measured) exceeds."""
    w, g = np.meshgrid(np.arange(0, 50.05, 0.2), np.arange(0, 50.05, 0.2))
    ratios = np.stack([(w * weight + g * gram) / measured for weight, gram, measured in peaks])
    worst = np.where(ratios.min(0) >= 1, ratios.max(0), np.inf)
    best = np.unravel_index(worst.argmin(), worst.shape)
    return float(w[best]), float(g[best])


def line(case: str) -> str:
    """The case's line in the table of docs/performance.md."""
    single = CASES[case].method in SINGLE
    size, taken = 2 * (4 if single else 8) * SIDE**2, peak(case, SIDE, SIDE) - 2 * SIDE**2
    dtype = "float32" if single else "float64"
    return f"| {case} | {dtype} | {size / 1e6:.0f} | {taken / 1e6:.0f} | {taken / size:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of docs/performance.md")
    parser.add_argument("methods", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.table:
        print("| case | dtype | Gram and weight, MB | peak, MB | ratio |\n|:--|:--|--:|--:|--:|", flush=True)
        cases = [name for name, case in CASES.items() if not args.methods or case.method in args.methods]
        # Each in a process of its own: the allocator keeps what earlier cases have freed in pieces.
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,), max_tasks_per_child=1) as pool:
            for row in pool.map(line, cases):
                print(row, flush=True)
        return
    for method in args.methods or [*dict.fromkeys(case.method for case in CASES.values()), CERTIFICATE]:
        cases = [name for name, case in CASES.items() if case.method == method]
        cases = cases or [f"{CERTIFICATE} {pattern}" for pattern in BOUNDED]
        peaks = []
        for case in cases:
            for out, inputs in SHAPES:
                measured = peak(case, out, inputs)
                print(f"    # {case}, {out} x {inputs}: {measured / 1e6:.0f} MB", flush=True)
                peaks.append((4 * out * inputs, 4 * inputs * inputs, measured))
        w, g = fitted(peaks)
        print(f'    "{method}": ({w:.1f}, {g:.1f}),', flush=True)


if __name__ == "__main__":
    main()
