"""Run the checks (promises.py, allocator_promises.py) on one file: what holds, what does not, and how to repeat it."""

from __future__ import annotations

import contextlib
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.checks import allocator_cases, allocator_promises, settings
from layerwise.checks.allocator_cases import AllocatorCase
from layerwise.checks.case import Case, Finding, NothingToCheck, cases_of
from layerwise.checks.layer_cases import UNCORRELATED
from layerwise.checks.promises import CHECKS, checks_of
from layerwise.checks.report import BROKEN, KEPT, KNOWN, NOTE, NOTHING, Report, Row
from layerwise.checks.settings import ONE_OF_EACH, TARGETS, more_targets
from layerwise.contract.cards import ALLOCATOR, Kind
from layerwise.contract.catalogue import Catalogue, forget
from layerwise.contract.import_closure import FOLDERS
from layerwise.contract.method_file import CatalogueError, Entry, card_kind
from layerwise.contract.target import Target
from layerwise.runtime.errors import InputError

Progress = Callable[[int, int, str], None]


def check_file(path: str | Path, *, quick: bool = False, progress: Progress | None = None) -> Report:
    """Check every promise of the contract on one method's or allocator's file at every target.

    An allocator is asked for levels of small synthetic models at the budgets that its card lists. For a method:
    Targets that the card lists are checked on ordinary and degenerate layers; all others must be refused. Besides the
    defaults, the check tries the variants that the card names, or each value of a parameter that is an enum or a
    boolean.

    path: the file; methods in the same folder can be its warm starts, or the probes of an allocator. quick: only the
    defaults, at one target of each kind. progress: called with (done, total, label) before each case.
    Raises InputError if the file is neither a method nor an allocator, cannot be read or imported, or has a wrong card.
    """
    began = time.perf_counter()
    catalogue, entry = _loaded(Path(path))
    work = [(name, case) for case in _file_cases(catalogue, entry, quick) for name in _file_checks(case)]
    checks = allocator_promises.CHECKS if entry.kind is ALLOCATOR else CHECKS
    found = []
    for done, (name, case) in enumerate(work):
        if progress:
            progress(done, len(work), f"{case.label} at {case.target.label}: {name}")
        found += [_row(name, case, layer) for layer in _check(name, case).layers(case)]
    if progress:
        progress(len(work), len(work), "")
    asks = {name: check.asks for name, check in checks.items()}
    return Report(entry.name, str(path), tuple(found), asks, time.perf_counter() - began, entry.kind.word)


def case_at(
    path: str | Path, target: str, params: Mapping[str, Any] | None = None, plain: bool = False
) -> Case | AllocatorCase:
    """A file's method or allocator with these parameters at the target with this label; used to repeat one check.

    Raises InputError if the file is neither a method nor an allocator, or if the target (one of the battery's) or a
    parameter is unknown.
    """
    catalogue, entry = _loaded(Path(path))
    known = {one.label: one for one in _targets(entry)}
    if target not in known:
        raise InputError(f"target must be one of {', '.join(known)}. Got {target!r} instead.")
    made = _construct(catalogue, entry, params or {}, [known[target]])
    return replace(next(made), plain=plain)


def _loaded(path: Path) -> tuple[Catalogue, Entry]:
    """The shipped methods (or allocators) together with this file's, and the file's entry."""
    path = path.resolve()
    kind = card_kind(path)
    try:
        catalogue = Catalogue() if kind is not ALLOCATOR else Catalogue(kind=kind, methods=Catalogue())
        if path.parent == FOLDERS[kind.folder] and path.stem in catalogue:
            return catalogue, catalogue[path.stem]
        forget(path)  # it may have been edited since
        entry = catalogue.add(path)
    except CatalogueError as error:
        raise InputError(str(error)) from None
    if entry is None:
        raise InputError(f"{path} must hold a method, with a literal CARD. Got a file without one instead.")
    _add_others(catalogue.methods, path)
    return catalogue, entry


def _add_others(methods: Catalogue, path: Path) -> None:
    """Add the methods in the file's folder, which may be its warm starts; they are not checked here."""
    for other in sorted(path.parent.glob("*.py")):
        if other != path:
            with contextlib.suppress(CatalogueError):
                methods.add(other)


def _targets(entry: Entry) -> list[Target]:
    if entry.kind is ALLOCATOR:
        return [one for kind in entry.card["budgets"] for one in allocator_cases.TARGETS[kind]]
    return [*TARGETS, *more_targets(entry)]


def _file_cases(catalogue: Catalogue, entry: Entry, quick: bool) -> Iterator[Case | AllocatorCase]:
    variants = settings.parameter_sets(entry)
    targets = _targets(entry)
    if quick:
        variants = variants[:1]
        targets = [one for one in targets if _is_quick(one, entry.kind)]
    for params in variants:
        yield from _construct(catalogue, entry, params, targets)


def _is_quick(target: Target, kind: Kind) -> bool:
    if kind is ALLOCATOR:
        return any(target == own[0] for own in allocator_cases.TARGETS.values())
    return target == Target() or target.label in ONE_OF_EACH or target not in TARGETS


def _construct(
    catalogue: Catalogue, entry: Entry, params: Mapping[str, Any], targets: Sequence[Target]
) -> Iterator[Case | AllocatorCase]:
    """`cases_of`, with any error as one sentence."""
    made_of = allocator_cases.cases_of if entry.kind is ALLOCATOR else cases_of
    try:
        yield from made_of(catalogue, entry.name, [params], targets)
    except CatalogueError as error:
        raise InputError(str(error)) from None
    except Exception as error:  # the file's import or its class may raise anything
        made = f" with {dict(params)}" if params else ""
        raise InputError(
            f"{entry.path} must make a {entry.class_name}{made}. Got {_told(error, entry.path)} instead."
        ) from error


def _file_checks(case: Case | AllocatorCase) -> list[str]:
    if isinstance(case, AllocatorCase):
        return list(allocator_promises.CHECKS)
    names = checks_of(case)
    return names if case.refusal else [*names, "10 the runner's own"]


def _check(name: str, case: Any) -> Any:
    return (allocator_promises.CHECKS if isinstance(case, AllocatorCase) else CHECKS)[name]


def _row(name: str, case: Case | AllocatorCase, layer: str) -> Row:
    """A check of a case on one layer or model. Any exception of the file's code is a broken promise."""
    row = Row(name, case.target.label, layer, case.label, dict(case.params), case.plain, KEPT)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        _check(name, case).on(case, layer)
        return row
    except NothingToCheck as reason:
        return replace(row, status=NOTHING, sentence=f"Nothing to check: {reason}.")
    except Finding as finding:
        row = replace(row, status=BROKEN, expected=finding.expected, came=finding.came)
    except Exception as error:
        came = _told(error, case.entry.path)
        expected = "every call must return" if isinstance(case, AllocatorCase) else "compress must return a result"
        row = replace(row, status=BROKEN, expected=expected, came=came)
    finally:  # restores the caller's generators, which checks of promise 4 seed
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
    if known := settings.known_failure(name, case.entry, case.params, case.target):
        return replace(row, status=KNOWN, sentence=f"Known: {known}.")
    # a score may measure something else, as RIA's does does
    if layer.endswith(UNCORRELATED) and not case.entry.shipped:
        row = replace(row, status=NOTE)
    return replace(row, sentence=f"{layer}: {row.expected}. Got {row.came} instead.")


def _told(error: Exception, path: Path) -> str:
    """An error's class and message, and the line of the file that raised it."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).resolve() == path
    ]
    at = f" in line {lines[-1]} of {path.name}" if lines else ""
    return f"{type(error).__name__}{at} ({' '.join(str(error).split())})"
