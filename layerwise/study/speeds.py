"""The speed of this machine: measured once, stored in the cache folder, estimated until then. Does not import torch.

A separate process (compression/speed.py) measures the rates of forward passes, of evaluations and of a job's start, and
each method of a study on one small layer. The measurements hold for one processor and one version of libraries and
code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from layerwise.contract.import_closure import closure
from layerwise.contract.target import LOW_RANK, Target
from layerwise.runtime.errors import Failure
from layerwise.runtime.files import digest_of, write_atomic
from layerwise.runtime.project import PACKAGE, portable
from layerwise.runtime.provenance import processor
from layerwise.study.cell import Cell, canonical
from layerwise.study.grid import Plan

WORKER = "layerwise.compression.speed"
LIBRARIES = ("torch", "transformers", "numpy", "numba")  # libraries whose versions affect the speed
SECONDS = 90.0  # no further trial begins after this time
PATIENCE = 120.0  # further seconds allowed for the running trial
# Rates of an unmeasured processor, in units of an operation in a product of float32 matrices. They are those of an AMD
# EPYC with AVX2 (12 ps per operation), where a forward pass took 23 ps per operation, a word 18 ns and the start of a
# process that imports torch 9 s.
PASSES, WORD, START = 1.9, 1500.0, 9.0
SIDE, PRODUCTS = 64, 200  # of the square matrices; BLAS multiplies larger ones on several threads


@dataclass(frozen=True)
class Rates:
    """Seconds of one thread. start: start of a process that imports what a job imports. word: one vocabulary entry for
    one evaluated token. float32, bfloat16, float16: one operation of a forward pass's linear layers in that dtype,
    including all other work."""

    start: float
    word: float
    float32: float
    bfloat16: float
    float16: float

    def passes(self, dtype: str) -> float:
        """Seconds per operation of a forward pass in a dtype; dtypes other than half precision count as float32."""
        return {"bfloat16": self.bfloat16, "float16": self.float16}.get(dtype, self.float32)


@dataclass(frozen=True)
class Trial:
    """A solution of a layer with `inputs` inputs. once: fixed seconds. row: additional seconds per row."""

    inputs: int
    once: float
    row: float

    def seconds(self, out: int, inputs: int) -> float:
        """Seconds of a layer's solution, scaled from the trial.

        The time of a row scales as inputs^2 (the number of operations) for layers larger than the trial's, and as
        inputs^1.5 for smaller ones: SparseSwaps and Frank-Wolfe scaled with exponents from 1.2 to 1.8 between 256 and
        1536 inputs.
        """
        ratio = inputs / self.inputs
        return self.once * max(ratio**1.5, ratio**3) + self.row * out * max(ratio**1.5, ratio**2)


@dataclass(frozen=True)
class Speeds:
    """rates: the machine's rates. trials: `trial_key` -> trial of a method. said: sentences about failed measurements
    or writes."""

    rates: Rates
    trials: Mapping[str, Trial] = field(default_factory=dict)
    said: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------- requested trials


def trial_key(plan: Plan, cell: Cell) -> str:
    """A key of everything that affects the duration of a cell's method: code, parameters and kind of target."""
    return _trial_key(plan, cell)[0]


def trials_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """Key -> request for a trial, for all methods of a study: one per kind of target, from its first cell."""
    found: dict[str, dict[str, Any]] = {}
    for cell in plan.cells:
        key, sources = _trial_key(plan, cell)
        if key not in found:
            outside = {str(path.parent) for path in sources if not path.resolve().is_relative_to(PACKAGE.parent)}
            method = cell.spec["method"]
            found[key] = {
                "key": key,
                "label": "{label}, {target}".format(**cell.columns),
                "method": method["name"],
                "params": method["params"],
                "target": cell.spec["target"],
                "folders": sorted(outside),
            }
    return found


def _trial_key(plan: Plan, cell: Cell) -> tuple[str, tuple[Path, ...]]:
    method, target = cell.spec["method"], Target(**cell.spec["target"])
    sources = tuple(plan.catalogue.sources(method["name"], method["params"]))
    kind = [target.pattern if target.sparsity else None, target.bits is not None, bool(target.sparsity)]
    kind += [LOW_RANK] if target.rank else []
    return _digest(_code(sources), method["name"], canonical(method["params"]), *kind), sources


@cache
def _code(sources: tuple[Path, ...]) -> str:
    return digest_of(map(portable, sources))


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------- stored measurements


def store() -> Path:
    """The file of measurements on this processor, with these versions of libraries and code."""
    shared = os.environ.get("LAYERWISE_CACHE")
    return (Path(shared) if shared else Path("results")) / "speeds" / f"{machine()}.json"


@cache
def machine() -> str:
    """A key of the processor, the library versions and the code that affect the rates."""
    versions = [importlib.metadata.version(name) for name in LIBRARIES]
    return _digest(processor(), os.cpu_count(), sys.version, versions, _code(tuple(closure([WORKER]))))


def kept() -> tuple[Rates | None, dict[str, Trial]]:
    """The stored measurements of this machine; empty for a file that is absent, unreadable or of another kind."""
    try:
        content = json.loads(store().read_text("utf-8"))
        return _rates(content["rates"]), {str(key): _trial(own) for key, own in content["trials"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, {}


def _rates(content: Mapping[str, Any]) -> Rates:
    """Parse stored values. Raises ValueError or TypeError for invalid content."""
    rates = Rates(**content)
    if not all(0 < value < math.inf for value in asdict(rates).values()):
        raise ValueError("rates must be above zero")
    return rates


def _trial(content: Iterable[Any]) -> Trial:
    """Parse stored values. Raises ValueError or TypeError for invalid content."""
    inputs, once, row = content  # text instead of a number fails in the comparison below
    if not (1 <= inputs < math.inf and 0 <= once < math.inf and 0 <= row < math.inf):
        raise ValueError("a trial's seconds must not be below zero")
    return Trial(int(inputs), once, row)


def keep(rates: Rates, trials: Mapping[str, Trial]) -> str | None:
    """Write the file; returns a sentence if the disk refuses it."""
    content = {key: [own.inputs, own.once, own.row] for key, own in trials.items()}
    try:
        write_atomic(store(), json.dumps({"rates": asdict(rates), "trials": content}, indent=1) + "\n")
    except Failure as error:
        return f"The speed of this machine will be measured again next time. {error}"
    except OSError as error:
        why = f"{store()} cannot be written ({error.strerror})"
        return f"The speed of this machine will be measured again next time: {why}."
    return None


# -------------------------------------------------------------------------------------------------------- measurements


def at_hand() -> Speeds:
    """The stored measurements of this machine; otherwise one from a matrix product, which takes milliseconds."""
    rates, trials = kept()
    return Speeds(rates or typical(operation()), trials)


def typical(one: float) -> Rates:
    """The rates of a machine on which an operation in a product of large float32 matrices takes `one` seconds."""
    return Rates(START, WORD * one, *[PASSES * one] * 3)


def operation(rounds: int = 5) -> float:
    """Seconds per operation in a product of float32 matrices, on one thread of this machine.

    Other programs do not count: a thread of BLAS that waits for another one, to which they leave no processor, would
    take CPU time without an operation.
    """
    import numpy as np

    matrix, seconds = np.ones((SIDE, SIDE), np.float32), math.inf
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(PRODUCTS):
            np.matmul(matrix, matrix)
        seconds = min(seconds, time.thread_time() - start)
    return seconds / (2 * SIDE**3 * PRODUCTS)


def measured(plan: Plan) -> Speeds:
    """The speeds for a study: stored ones, and missing ones, which are measured now and stored.

    It takes a few seconds, plus a second or two for each untried method; at most SECONDS and one trial.
    """
    rates, trials = kept()
    missing = {key: own for key, own in trials_of(plan).items() if key not in trials}
    if rates and not missing:
        return Speeds(rates, trials)
    said = []
    print(
        f"Measuring {_count(rates is None, len(missing))}, once; the result is stored in {store()}.",
        file=sys.stderr,
        flush=True,
    )
    answers, fault = ask({"rates": rates is None, "seconds": SECONDS, "trials": list(missing.values())})
    failed = {key: f"it failed on a small layer: {why}" for key, why in _failures(answers)}
    for answer in answers:
        if "rates" in answer:
            rates = _rates(answer["rates"])
        if "trial" in answer:
            trials[answer["key"]] = _trial(answer["trial"])
    if rates is None:
        said.append(f"The speed of this machine could not be measured: {fault or 'it gave no result'}.")
    elif refusal := keep(rates, trials):
        said.append(refusal)
    for key, own in missing.items():
        if key not in trials:
            why = failed.get(key, fault or "there was no time left to try it")
            said.append(f"The time of {own['label']} is estimated from its method's card: {why}.")
    return Speeds(rates or typical(operation()), trials, tuple(said))


def _count(machine: bool, methods: int) -> str:
    """The measurement in words."""
    tried = f"{methods} methods on a small layer, a few seconds each" if methods else ""
    return " and ".join(filter(None, ["this machine" if machine else "", tried]))


def _failures(answers: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    return ((answer["key"], answer["failed"].rstrip(".")) for answer in answers if "failed" in answer)


def ask(request: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The answers of the measuring process, and what ended it early, or None."""
    fault = None
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answers.jsonl"
        asked.write_text(json.dumps(request), "utf-8")
        answered.touch()
        command = [sys.executable, "-m", "layerwise", "worker", "speed", "--request", asked, "--out", answered]
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        one = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
        try:
            subprocess.run(
                command,
                env={**os.environ, **one, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=True,
                timeout=request["seconds"] + PATIENCE,
            )
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.strip()]
            fault = (lines[-1] if lines else f"the process ended with status {error.returncode}").rstrip(".")
        except subprocess.TimeoutExpired:
            fault = "the process took too long"
        except OSError as error:
            fault = f"no process could be started ({error})"
        lines = answered.read_text("utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")], fault
