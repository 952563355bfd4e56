"""ALPS and ADMM at their defaults, whole runs, against the released loops in plain torch.

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
from tests.benchmarks.bench_iterative import first

TARGET = Target(0.5, "layer")  # the released choice


def pairs() -> dict[str, tuple[Method, Callable[[Layer, Target], Tensor]]]:
    """By name, the method and its released loop."""
    return {"admm": (ADMM(), companions.baseline_admm), "alps": (ALPS(), companions.baseline_alps)}


def measured(layer: Layer, name: str, rounds: int, clock: Callable[[], float]) -> str:
    """A line: seconds of both, their ratio, and the relative output errors."""
    method, released = pairs()[name]
    calls: list[Callable[[], Tensor]] = [lambda: first(method, layer, TARGET), lambda: released(layer, TARGET)]
    seconds: list[list[float]] = [[], []]
    errors = [0.0, 0.0]
    for _ in range(rounds):
        for k, call in enumerate(calls):
            start = clock()
            weight = call()
            seconds[k].append(clock() - start)
            errors[k] = float(output_error(layer, weight))
    ours, theirs = map(statistics.median, seconds)
    return (
        f"{layer.name:>12s}  {name}: {ours:.2f} s, released loop {theirs:.2f} s, {theirs / ours:.2f} times; "
        f"errors {errors[0]:.6g}, {errors[1]:.6g}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["2048", "576x1536"], help="in, or OUTxIN")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(pairs()), choices=list(pairs()))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    for out, inputs in (shape for shape, compared in suite.shapes(" ".join(args.sizes)).items() if compared):
        for name in args.only:
            print(measured(suite.layer_of(out, inputs), name, args.rounds, clock), flush=True)


if __name__ == "__main__":
    main()
