"""The battery's findings on one file: rows, and the text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from layerwise.runtime.text_table import aligned

KEPT, BROKEN, KNOWN, NOTHING = "kept", "broken", "known failure", "nothing to check"
NOTE = "note"  # for a method that is not shipped: its mask is not the best possible, which may be intended


@dataclass(frozen=True)
class Row:
    """One check of a method at a target on a layer, or of an allocator on a synthetic model (allocator_cases.py).

    promise: number and name of the check, such as "2 pattern". target: its label. layer: its name in layer_cases.
    method: the name with the parameters that differ from the defaults. params: these parameters. reference: whether
    plain torch is used.
    sentence: the fault, or why there is nothing to check. For a broken promise it contains `expected` and `came`.
    """

    promise: str
    target: str
    layer: str
    method: str
    params: Mapping[str, Any]
    reference: bool
    status: str
    sentence: str = ""
    expected: str = ""
    came: str = ""

    @property
    def ok(self) -> bool:
        """Whether no promise is broken here, apart from known failures."""
        return self.status != BROKEN


@dataclass(frozen=True)
class Report:
    """All checks of a file. seconds: their duration. word: "method" or "allocator"."""

    name: str
    path: str
    rows: tuple[Row, ...]
    asks: Mapping[str, str] = field(repr=False)  # each check's demand as a sentence, in the checks' order
    seconds: float = 0.0
    word: str = "method"

    @property
    def ok(self) -> bool:
        """Whether every checked promise is kept."""
        return all(row.ok for row in self.rows)

    def first(self, status: str = BROKEN) -> list[Row]:
        """The first row with this status for each promise, such as the first breach."""
        found: dict[str, Row] = {}
        for row in self.rows:
            if row.status == status:
                found.setdefault(row.promise, row)
        return [found[promise] for promise in self.asks if promise in found]

    def render(self) -> str:
        """The report as text: a line per promise, the targets, and the first breach of each promise explained."""
        lines = [f"{self.name} ({self.path})", "", *self._table(), "", *self._targets()]
        for row in [*self.first(BROKEN), *self.first(NOTE)]:
            lines += ["", *self._explained(row)]
        promises = {row.promise for row in self.rows}
        broken = {row.promise for row in self.rows if not row.ok}
        verdict = f"breaks {len(broken)} of {len(promises)} promises" if broken else "keeps its contract"
        end = f"{self.name} {verdict}: {len(self.rows)} checks in {self.seconds:.0f} s."
        return "\n".join([*lines, "", end]) + "\n"

    def _table(self) -> list[str]:
        table = [("promise", "targets", "checks", "result")]
        for promise in self.asks:
            rows = [row for row in self.rows if row.promise == promise]
            if not rows:
                continue
            counts = {status: sum(row.status == status for row in rows) for status in (BROKEN, KNOWN, NOTE, NOTHING)}
            said = [f"{status} ({count})" for status, count in counts.items() if count]
            result = ", ".join(said) if said else KEPT
            if counts[NOTHING] == len(rows):
                result = rows[0].sentence[0].lower() + rows[0].sentence[1:].rstrip(".")
            table.append((promise, str(len({row.target for row in rows})), str(len(rows)), result))
        return [f"  {line}" for line in aligned(table, right=(1, 2))]

    def _targets(self) -> list[str]:
        refused = list(dict.fromkeys(row.target for row in self.rows if row.promise.startswith("8 ")))
        tried = dict.fromkeys(row.target for row in self.rows)
        solved = [target for target in tried if target not in refused and target != "dense"]
        done = "Spread" if self.word == "allocator" else "Compressed to"
        lines = [f"{done}: {', '.join(solved) or 'no target'}."]
        lines += [f"Must be refused: {', '.join(refused)}."] if refused else []
        methods = list(dict.fromkeys(row.method for row in self.rows))
        return [*lines, f"Tried as: {', '.join(methods)}."]

    def _explained(self, row: Row) -> list[str]:
        others = sum((other.status, other.promise) == (row.status, row.promise) for other in self.rows) - 1
        more = f" ({others} more)" if others else ""
        arguments = [repr(self.path), repr(row.target)]
        arguments += [repr(dict(row.params))] if row.params else []
        arguments += ["plain=True"] if row.reference else []
        what, checks = ("model", "allocator_promises") if self.word == "allocator" else ("layer", "battery")
        where = f'{row.method} at {row.target} on the {what} "{row.layer}"{more}'
        note = f"Worth knowing, {row.promise}: {where}. A score that measures something other than the error does this."
        return [
            note if row.status == NOTE else f"Promise {row.promise} is broken by {where}.",
            f"  It asks:   {self.asks[row.promise]}",
            f"  Expected:  {row.expected}.",
            f"  Got:       {row.came}.",
            "  To repeat:",
            f"    from layerwise.checks import {', '.join(sorted({'battery', checks}))}",
            f"    case = battery.case_at({', '.join(arguments)})",
            f"    {checks}.CHECKS[{row.promise!r}].on(case, {row.layer!r})",
        ]
