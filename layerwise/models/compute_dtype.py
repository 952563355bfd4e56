"""The dtype in which forward passes are computed, if it differs from the dtype in which weights are stored.

A processor without units for bfloat16 or float16 multiplies such matrices many times more slowly than float32 ones.
On such a processor, weights are rounded to the dtype of the study, and passes are computed from them in float32. The
speed is measured once per process, because a list of processors would go out of date. torch is imported only for the
measurement.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from layerwise.runtime.project import PACKAGE

WIDE = "float32"  # compute dtype if the stored dtype is slow
HALVES = ("bfloat16", "float16")
KEY = "compute_dtype"  # key of a model's entry, NATIVE or WIDE, that replaces the measurement; also the column's name
NATIVE = "native"  # compute in the dtype of the stored weights
RATIO = 3.0  # a dtype is slow if a product takes more than this many times as long as in float32
SHAPE = (256, 256, 256)  # tokens, inputs and outputs of the measured products: 34 million operations
ROUNDS = 5


@cache
def slowdown(dtype: str) -> float:
    """Time of a matrix product in a dtype, relative to float32, on one thread of the processor.

    It is the ratio of the shortest of ROUNDS products each, in the thread's CPU time, because other work on the machine
    can only make a product longer. It takes about 30 ms in all, or 200 ms on the slowest processors.
    """
    import torch

    def timed(product: Callable[[], torch.Tensor]) -> float:
        start = time.thread_time()
        product()
        return time.thread_time() - start

    def product(kind: torch.dtype) -> Callable[[], torch.Tensor]:
        inputs, weight = torch.ones(SHAPE[0], SHAPE[1], dtype=kind), torch.ones(SHAPE[2], SHAPE[1], dtype=kind)
        return lambda: torch.nn.functional.linear(inputs, weight)

    products = product(getattr(torch, dtype)), product(torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounds = [tuple(map(timed, products)) for _ in range(1 + ROUNDS)][1:]  # the first round prepares the kernel
    finally:
        torch.set_num_threads(threads)
    own, wide = map(min, zip(*rounds, strict=True))
    return own / wide


@cache
def slow_apart(dtype: str) -> bool:
    """`slow` for a process that must not load torch: another process measures.

    If that fails, a line on stderr says so, and passes count as computed in WIDE, which takes more memory.
    """
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import slow; print(slow({dtype!r}))"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
    except (OSError, subprocess.SubprocessError) as error:
        _print(f"The speed of {dtype} here could not be measured ({error}): the estimate counts {WIDE}.")
        return True
    return done.stdout.strip() == "True"


def slow(dtype: str) -> bool:
    """Whether products in a dtype are slow on this processor. Only half-precision dtypes are measured."""
    return dtype in HALVES and slowdown(dtype) > RATIO


def compute_dtype(
    entry: Mapping[str, Any], device: str = "cpu", is_slow: Callable[[str], bool] | None = None
) -> str | None:
    """The dtype in which a model's forward passes are computed on a device, by torch's name.

    entry: the config's entry, with the `dtype` to which weights are rounded. An entry without one keeps the dtype in
    which the model was saved and is computed in it; the result is then None. is_slow: replaces the measurement of this
    processor.
    """
    dtype, asked = entry.get("dtype"), entry.get(KEY)
    if dtype is None:
        return None
    if asked == WIDE:
        return WIDE
    if asked == NATIVE or not str(device).startswith("cpu"):
        return dtype
    return WIDE if (is_slow or slow)(dtype) else dtype


def at(entry: Mapping[str, Any], dtype: str | None) -> Mapping[str, Any]:
    """A model's entry for forward passes in another dtype, such as a calibration's; None: its own dtype."""
    return {**entry, "dtype": dtype} if dtype else entry


def sentence(entry: Mapping[str, Any], computed: str | None, device: str = "cpu") -> str | None:
    """Sentences about forward passes that are computed in another dtype; None if the entry's own dtype is fast.

    computed: the choice of `compute_dtype`, on this machine or on the one that computed earlier results of the cell.
    """
    dtype, asked = entry.get("dtype"), entry.get(KEY)
    if dtype is None or asked == WIDE:
        return None
    rounded = f"forward passes are computed in {computed}, from weights rounded to {dtype}"
    if not str(device).startswith("cpu") or not slow(dtype):
        return None if computed == dtype else f"As before on another processor {rounded}."
    taken = f"Products in {dtype} take {slowdown(dtype):.0f} times as long as in {WIDE} on this processor"
    if computed != dtype:
        return f"{taken}: {rounded} ({KEY}: {NATIVE} of the model prevents it)."
    why = f"{KEY}: {NATIVE} asks for it" if asked == NATIVE else "as before on another processor"
    return f"{taken}, and forward passes are computed in it: {why}."


def tell(entry: Mapping[str, Any], computed: str | None, device: str = "cpu") -> None:
    """Print the sentence, if there is one, on stderr, once per process."""
    if said := sentence(entry, computed, device):
        _print(said)


@cache
def _print(said: str) -> None:
    print(said, file=sys.stderr, flush=True)
