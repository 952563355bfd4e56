"""ALPS and ADMM at their defaults, whole runs, against the released loops in plain torch, and against the factorisation
and products that B needs alone.

Prints medians, taken in turns, and the error of the result; with one thread, of processor time.

    python -m tests.benchmarks.bench_penalty 2048 576x1536 --rounds 3 --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from layerwise.checks.brute_force import output_error
from layerwise.contract.layer import Layer, Method, Target
from layerwise.methods.admm import ADMM
from layerwise.methods.alps import ALPS
from tests.benchmarks import companions, suite
from tests.benchmarks.bench_iterative import afresh, first

TARGET = Target(0.5, "layer")  # the released choice


def compared() -> dict[str, tuple[Method, Callable[[Layer, Target], Tensor], Callable[[Layer, int], None]]]:
    """By name, the method, its released loop, and the floor of a number of iterations."""
    return {
        "admm": (ADMM(), companions.baseline_admm, companions.floor_admm),
        "alps": (ALPS(), companions.baseline_alps, companions.floor_alps),
    }


def measured(layer: Layer, name: str, rounds: int, clock: Callable[[], float]) -> str:
    """A line: seconds of both, their ratio, the most that a gain can be, and the relative output errors."""
    method, released, floor = compared()[name]
    iterations = method.compress(afresh(layer), TARGET, torch.Generator()).trace[-1][0]
    calls: list[Callable[[], Tensor | None]] = [
        lambda: first(method, layer, TARGET),
        lambda: released(layer, TARGET),
        lambda: floor(layer, iterations),
    ]
    seconds: list[list[float]] = [[] for _ in calls]
    errors = []
    for _ in range(rounds):
        results = []
        for call, taken in zip(calls, seconds, strict=True):
            start = clock()
            results.append(call())
            taken.append(clock() - start)
        errors = [float(output_error(layer, weight)) for weight in results if weight is not None]
    ours, theirs, least = map(statistics.median, seconds)
    return (
        f"{layer.name:>12s}  {name}: {ours:.2f} s, released loop {theirs:.2f} s, {theirs / ours:.2f} times; "
        f"floor of {iterations} iterations {least:.2f} s, at most {theirs / least:.2f} times; "
        f"errors {errors[0]:.6g}, {errors[1]:.6g}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["2048", "576x1536"], help="in, or OUTxIN")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(compared()), choices=list(compared()))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    for out, inputs in (shape for shape, timed in suite.shapes(" ".join(args.sizes)).items() if timed):
        for name in args.only:
            print(measured(suite.layer_of(out, inputs), name, args.rounds, clock), flush=True)


if __name__ == "__main__":
    main()
