"""The speed of this machine: measured once, kept in the cache folder, and estimated until then. Free of torch.

A process of its own measures (compression/speed.py): the rates of forward passes, of evaluations and of a job's start,
and each method of a study on one small layer. The measurements hold for one processor and one
version of libraries and code.
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
LIBRARIES = ("torch", "transformers", "numpy", "numba")  # whose versions decide how fast the code is
SECONDS = 90.0  # after which no further trial begins
PATIENCE = 120.0  # seconds more that the process has for the trial that it is at
# Of a processor that is not measured, in units of an operation of a product of large matrices in float32: those of an
# AMD EPYC with AVX2 (12 ps an operation), where a forward pass took 23 ps, a word 18 ns and a job's start 9 s.
PASSES, WORD, START = 1.9, 1500.0, 9.0


@dataclass(frozen=True)
class Rates:
    """Seconds of one thread. start: of a job. word: of a word of the vocabulary for a token that is evaluated.
    float32, bfloat16, float16: of an operation of a forward pass's linear layers in that dtype, with all else."""

    start: float
    word: float
    float32: float
    bfloat16: float
    float16: float

    def passes(self, dtype: str) -> float:
        """Of an operation of a forward pass in a dtype; one that is no half precision counts as float32."""
        return {"bfloat16": self.bfloat16, "float16": self.float16}.get(dtype, self.float32)


@dataclass(frozen=True)
class Trial:
    """A solution of a layer with so many inputs. once: seconds whatever its rows. row: seconds of each row besides."""

    inputs: int
    once: float
    row: float

    def seconds(self, out: int, inputs: int) -> float:
        """Of a layer's solution, by the trial's.

        A row takes inputs^2 in larger layers than the trial's, by the count of operations; in smaller ones inputs^1.5:
        SparseSwaps and Frank-Wolfe took the powers 1.2 to 1.8 of it from 256 to 1536 inputs.
        """
        ratio = inputs / self.inputs
        return self.once * max(ratio**1.5, ratio**3) + self.row * out * max(ratio**1.5, ratio**2)


@dataclass(frozen=True)
class Speeds:
    """rates: of the machine. trials: by `trial_key`, of the methods that have been tried. said: sentences about what
    could not be measured or kept."""

    rates: Rates
    trials: Mapping[str, Trial] = field(default_factory=dict)
    said: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------- what is to be tried


def trial_key(plan: Plan, cell: Cell) -> str:
    """Names what the duration of a cell's method depends on: its code, its parameters and the kind of its target."""
    return _trial_key(plan, cell)[0]


def trials_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """Key -> the request for a trial, of all methods of a study: for each kind of target its first cell's."""
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


# -------------------------------------------------------------------------------------------------------- what is kept


def store() -> Path:
    """The file of what was measured on this processor, with these versions of libraries and of the code."""
    shared = os.environ.get("LAYERWISE_CACHE")
    return (Path(shared) if shared else Path("results")) / "speeds" / f"{machine()}.json"


@cache
def machine() -> str:
    """Names the processor, the versions of libraries and the code that the rates depend on."""
    versions = [importlib.metadata.version(name) for name in LIBRARIES]
    return _digest(processor(), os.cpu_count(), sys.version, versions, _code(tuple(closure([WORKER]))))


def kept() -> tuple[Rates | None, dict[str, Trial]]:
    """The kept measurements of this machine; empty for a file that is absent, unreadable, or of another kind."""
    try:
        content = json.loads(store().read_text("utf-8"))
        return _rates(content["rates"]), {str(key): _trial(own) for key, own in content["trials"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None, {}


def _rates(content: Mapping[str, Any]) -> Rates:
    """Raises ValueError or TypeError for what is none."""
    rates = Rates(**content)
    if not all(0 < value < math.inf for value in asdict(rates).values()):
        raise ValueError("rates must be above zero")
    return rates


def _trial(content: Iterable[Any]) -> Trial:
    """Raises ValueError or TypeError for what is none."""
    inputs, once, row = content  # a text in a number's place is refused below, where it is compared
    if not (1 <= inputs < math.inf and 0 <= once < math.inf and 0 <= row < math.inf):
        raise ValueError("a trial's seconds must not be below zero")
    return Trial(int(inputs), once, row)


def keep(rates: Rates, trials: Mapping[str, Trial]) -> str | None:
    """Write the file; a sentence where the disk refuses it."""
    content = {key: [own.inputs, own.once, own.row] for key, own in trials.items()}
    try:
        write_atomic(store(), json.dumps({"rates": asdict(rates), "trials": content}, indent=1) + "\n")
    except Failure as error:
        return f"The speed of this machine is measured again next time. {error}"
    except OSError as error:
        why = f"{store()} cannot be written ({error.strerror})"
        return f"The speed of this machine is measured again next time: {why}."
    return None


# -------------------------------------------------------------------------------------------------------- measurements


def at_hand() -> Speeds:
    """The kept measurements of this machine; without any, one from a product of matrices, which takes milliseconds."""
    rates, trials = kept()
    return Speeds(rates or typical(operation()), trials)


def typical(one: float) -> Rates:
    """The rates of a machine on which an operation of a product of large float32 matrices takes so many seconds."""
    return Rates(START, WORD * one, *[PASSES * one] * 3)


def operation(rounds: int = 5) -> float:
    """Seconds of one thread of this machine that an operation takes in a product of float32 matrices."""
    import numpy as np

    matrix, seconds = np.ones((768, 768), np.float32), math.inf
    for _ in range(rounds):
        start = time.process_time()  # of all threads
        np.matmul(matrix, matrix)
        seconds = min(seconds, time.process_time() - start)
    return seconds / (2 * len(matrix) ** 3)


def measured(plan: Plan) -> Speeds:
    """The speeds for a study: what is kept, and what is not is measured now and kept.

    It takes some seconds, and a second or two for each method that has not been tried; at most SECONDS and one trial.
    """
    rates, trials = kept()
    missing = {key: own for key, own in trials_of(plan).items() if key not in trials}
    if rates and not missing:
        return Speeds(rates, trials)
    said = []
    print(
        f"Measuring {_count(rates is None, len(missing))}, once; it is kept in {store()}.", file=sys.stderr, flush=True
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
            said.append(f"The time of {own['label']} is what its method's card says: {why}.")
    return Speeds(rates or typical(operation()), trials, tuple(said))


def _count(machine: bool, methods: int) -> str:
    """The measurement in words."""
    tried = f"{methods} methods on a small layer, some seconds each" if methods else ""
    return " and ".join(filter(None, ["this machine" if machine else "", tried]))


def _failures(answers: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    return ((answer["key"], answer["failed"].rstrip(".")) for answer in answers if "failed" in answer)


def ask(request: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The answers of the process that measures, and what ended it before it was done, or None."""
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
