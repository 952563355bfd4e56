"""Measure how long this processor takes, on one thread: for forward passes, for comparing tokens, for the methods.

    layerwise worker speed --request FILE --out FILE

Estimates use it (study/speeds.py). Times are CPU times of the process, so other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from layerwise.calibration.tap_statistics import TapStatistics
from layerwise.compression import cell
from layerwise.compression.solver import Solver
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Layer
from layerwise.contract.target import Target
from layerwise.evaluation.divergence import kl
from layerwise.evaluation.perplexity import loss_of
from layerwise.models.compute_dtype import HALVES, slowdown
from layerwise.storage.layer_packing import parts_of

ROUNDS = 3  # measurements, of which the shortest counts
HEADS, WIDE = 8, 1408  # of the block in the forward pass
SEQUENCES, LENGTH, WIDTH = 2, 512, 512  # of its inputs
COMPARED = (64, 2**14)  # tokens and vocabulary size
INPUTS = 1024  # largest number of inputs of a trial's layer
ROWS = (8, 16, 64)  # rows of its weight, one trial each; the first trial compiles the method's code
TRIED = (4, 512)  # sequences, and tokens in each, of the trial's Gram
LONGEST = 4.0  # seconds that a trial's last solution may be expected to take


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--request", type=Path, required=True, help="JSON: rates, trials, seconds")
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each answer, as it comes")
    arguments = parser.parse_args(argv)
    request = json.loads(arguments.request.read_text("utf-8"))
    torch.set_num_threads(1)
    with arguments.out.open("a", encoding="utf-8") as out:
        for answer in answers(request):
            print(json.dumps(answer), file=out, flush=True)


def answers(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rates, if they are asked for, and each trial until the time is up: `key` with `trial` or `failed`."""
    begun = time.perf_counter()
    if request["rates"]:
        yield {"rates": rates()}
    for trial in request["trials"]:
        if time.perf_counter() - begun > request["seconds"]:
            return
        try:
            yield {"key": trial["key"], "trial": tried(trial)}
        except Exception as error:  # the method may be anyone's
            yield {"key": trial["key"], "failed": f"{type(error).__name__}: {error}".splitlines()[0]}


# ----------------------------------------------------------------------------------------------------------- the rates


def rates() -> dict[str, float]:
    """Rates in seconds. `start`: the import of what a job imports. `word`: one vocabulary entry compared for one token.
    Each dtype: one operation of the linear layers in a forward pass, with all other work of the pass included."""
    one = forward_pass()
    wide = shortest(one[0]) / one[1]
    halves = {dtype: wide * slowdown(dtype) for dtype in HALVES}
    return {"start": job_start(), "word": word(), "float32": wide, **halves}


def job_start() -> float:
    """Seconds until a process has imported everything that a job imports.

    A second process is timed, because the first may have compiled the files.
    """
    before = os.times()
    subprocess.run([sys.executable, "-c", f"import {cell.__name__}"], stdin=subprocess.DEVNULL, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def shortest(work: Callable[[], object]) -> float:
    """CPU seconds of the shortest of ROUNDS runs, after one run that is not counted."""
    found = math.inf
    for again in range(1 + ROUNDS):
        before = time.process_time()
        work()
        found = min(found, time.process_time() - before) if again else found
    return found


@torch.no_grad()
def forward_pass() -> tuple[Callable[[], Tensor], float]:
    """A block of a decoder in float32, and the operations of its linear layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(WIDTH, WIDTH)] * 4 + [(WIDE, WIDTH)] * 2 + [(WIDTH, WIDE)]
    q, k, v, o, gate, up, down = (torch.randn(shape, generator=generator) / WIDTH**0.5 for shape in shapes)
    inputs = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator)
    linear = nn.functional.linear

    @torch.no_grad()
    def run() -> Tensor:
        x = rms_norm(inputs, (WIDTH,))
        asked, keys, values = (linear(x, own).unflatten(-1, (HEADS, -1)).transpose(1, 2) for own in (q, k, v))
        attended = scaled_dot_product_attention(asked, keys, values, is_causal=True).transpose(1, 2).flatten(-2)
        x = inputs + linear(attended, o)
        y = rms_norm(x, (WIDTH,))
        return x + linear(silu(linear(y, gate)) * linear(y, up), down)

    return run, 2.0 * SEQUENCES * LENGTH * sum(math.prod(shape) for shape in shapes)


def word() -> float:
    """Seconds per vocabulary entry and token in an evaluation of the loss and the divergence (divergence.py)."""
    generator = torch.Generator().manual_seed(0)
    dense, own = torch.randn(2, *COMPARED, generator=generator)
    targets = torch.zeros(COMPARED[0], dtype=torch.long)
    return shortest(lambda: (kl(dense, own), loss_of(own, targets))) / dense.numel()


# ---------------------------------------------------------------------------------------------------------- the trials


def inputs_of(target: Target) -> int:
    """The largest number of inputs up to INPUTS that the target's group divides. Raises ValueError if there is none."""
    parts = [
        target.group or 1,
        *(target.n_of_m or ())[1:],
        int(target.pattern[2:]) if target.pattern[:2] == "1x" else 1,
    ]
    unit = math.lcm(*parts)
    if unit > INPUTS:
        raise ValueError(f"groups of {unit} inputs are larger than the layer")
    return INPUTS // unit * unit


def tried(trial: Mapping[str, Any]) -> list[float]:
    """[inputs of the layer, fixed seconds of a solution, seconds per row] for a method at a target, with scoring."""
    target = Target(**trial["target"])
    catalogue = Catalogue([Path(folder) for folder in trial["folders"]])
    method = catalogue.build(trial["method"], trial["params"])
    solver = Solver(trial["method"], method, target, 0)
    inputs = inputs_of(target)
    taken: dict[int, float] = {}
    for rows in ROWS:
        layer = random_layer(rows, inputs)  # a new layer, whose Gram has no cached factor
        before = time.process_time()
        result, _ = solver.solve(layer)
        parts_of(result, target, torch.float32)
        taken[rows] = time.process_time() - before
        if rows > ROWS[0] and taken[rows] * ROWS[-1] / rows > LONGEST:
            break
    first, *more = (rows for rows in taken if rows > ROWS[0])
    if not more:
        return [inputs, 0.0, taken[first] / first]
    each = max(0.0, (taken[more[0]] - taken[first]) / (more[0] - first))
    return [inputs, max(0.0, taken[first] - first * each), each]


def random_layer(rows: int, inputs: int) -> Layer:
    """A layer whose inputs are correlated and have nonzero means, as in language models.

    Frank-Wolfe and SparseSwaps take about as long on it as on a row of SmolLM2's layers.
    """
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(*TRIED, inputs, generator=generator) * torch.arange(1, inputs + 1) ** -0.5
    x = common @ torch.randn(inputs, inputs, generator=generator)
    x = x * (torch.randn(inputs, generator=generator) / 2).exp() + torch.randn(inputs, generator=generator)
    statistics = TapStatistics(inputs, *TRIED)
    statistics.update(x)
    gram, known = statistics.finish()
    weight = torch.randn(rows, inputs, generator=generator) / inputs**0.5
    return Layer("trial", weight, gram, known, fisher=torch.rand(rows, generator=generator))


if __name__ == "__main__":
    main(sys.argv[1:])
