"""The head of the report page: the dense model's value, and the best method of every group at every target."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from layerwise.results.cell_results import ACCURACIES
from layerwise.results.main_table import METRICS
from layerwise.results.table_text import Section, Table, TableEntry

FIRST = ("perplexity_vs_bits", "perplexity_vs_sparsity", "kl_vs_bits", "kl_vs_sparsity")  # of what is drawn, one leads
MOST = 3  # methods that are named of those not shown to differ from the best
NUMBER = re.compile(r"[\d.]+(?:e[+-]?\d+)?")


def headline(tables: Sequence[Table]) -> list[dict[str, Any]]:
    """Per main table of the first metric that the study has: title, the dense value in a sentence, targets, and rows.

    A row is a mode and a group with, for each target, (label, value) of the best method and of those that are not shown
    to differ from it, MOST in all; `more` says how many further ones there are.
    """
    leading = next((metric for metric in METRICS if any(_is_of(table, metric) for table in tables)), None)
    highest = leading in ACCURACIES
    return [
        {
            "title": table.title,
            "dense": table.dense,
            "targets": table.targets,
            "rows": [row for section in table.sections for row in _rows(section, len(table.targets), highest)],
            "table": table,
        }
        for table in tables
        if leading is not None and _is_of(table, leading)
    ]


def _is_of(table: Table, metric: str) -> bool:
    return table.name == metric or table.name.startswith(f"{metric}-")


def _rows(section: Section, targets: int, highest: bool) -> Iterator[dict[str, Any]]:
    for comparison, lines in section.groups:
        found = [_best([(label, entries[i]) for label, entries in lines], highest) for i in range(targets)]
        yield {
            "mode": section.title,
            "comparison": comparison,
            "best": [own[:MOST] for own in found],
            "more": [max(0, len(own) - MOST) for own in found],
        }


def _best(entries: Sequence[tuple[str, TableEntry]], highest: bool) -> list[tuple[str, str]]:
    """(label, value) of the entries in bold, the best first; for a group of one method, that method."""
    numbers = [(label, entry) for label, entry in entries if NUMBER.match(entry.text)]
    chosen = [own for own in numbers if own[1].best] or (numbers if len(numbers) == 1 else [])

    def value(own: tuple[str, TableEntry]) -> float:
        found = NUMBER.match(own[1].text)
        return float(found[0]) if found else 0.0

    return [(label, entry.text) for label, entry in sorted(chosen, key=value, reverse=highest)]


def split(figures: Sequence[Mapping[str, str]]) -> tuple[list[Mapping[str, str]], list[Mapping[str, str]]]:
    """The figure that is beside the headline, if there is one of FIRST, and all others."""
    names = [figure["name"] for figure in figures]
    leading = next((name for name in FIRST if name in names), None)
    return [own for own in figures if own["name"] == leading], [own for own in figures if own["name"] != leading]
