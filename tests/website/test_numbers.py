"""Every number of a document's table is in a file of the repository, or its table says how it was measured.

A comment above a table of numbers is one of

    <!-- numbers: PATH -->                      a folder of accepted numbers, which the rows are compared with
    <!-- measured: `COMMAND`; PROCESSOR -->     the command that gave them, and on what it ran
    <!-- derived: FORMULA OR PATH -->           computed, by a formula or by the code of a file
    <!-- no source kept: REASON -->             neither; NO_SOURCE counts these tables, and no new one may come
"""

import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from layerwise.storage import frames
from tests.benchmarks import summary
from tests.support.paths import ROOT
from website import markdown

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BENCHMARK = ROOT / "docs/benchmark.md"  # a page of tables made of benchmark.csv
ACCEPTED = ROOT / "results/accepted"
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:e[-+]?\d+)?")
# A cell that is a number with what may follow it: a second number, a deviation, quartiles, a unit.
VALUE = re.compile(rf"^{NUMBER.pattern}(?:\s*(?:±|to|of|x|%|,|[(]|[GM]B|m?s\b|copies|{NUMBER.pattern}|[)])\s*)*$")
MARK = re.compile(r"<!-- (numbers|measured|derived|no source kept): (.+?) -->$")
GENERATED = re.compile(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", re.DOTALL)  # by a command that the page names
SEED = r" seed \d+$"  # at the end of a calibration's name in accepted numbers, if there are several
MOST = 3  # cells that are numbers, from which on a table is one of numbers
NO_SOURCE = 3  # tables whose command was not kept
Results = Mapping[tuple[str, str], Mapping[tuple[str, str], float]]  # (label, mode) -> (metric, target) -> number


@dataclass(frozen=True)
class Table:
    """A table of a document: what is above it, and its rows, the first of which is the header."""

    page: str
    above: str
    rows: list[list[str]]

    @property
    def numbers(self) -> int:
        return sum(bool(VALUE.match(cell)) for row in self.rows[1:] for cell in row[1:])

    @property
    def mark(self) -> tuple[str, str]:
        """Kind and content of the comment above the table; two empty strings for none."""
        found = MARK.match(self.above)
        return (found[1], found[2]) if found else ("", "")


def cells_of(line: str) -> list[str]:
    """The cells of a line of a table, without bold, marks and escapes."""
    return [cell.strip(" *†").replace("\\_", "_") for cell in line.strip().strip("|").split("|")]


def tables(path: Path) -> Iterator[Table]:
    """The tables of a document, those that a command writes left out."""
    text = "".join(part for fenced, part in markdown.sections(path.read_text("utf-8")) if not fenced)
    above, rows = "", list[list[str]]()
    for line in [*GENERATED.sub("", text).splitlines(), ""]:
        if line.startswith("|"):
            rows.append(cells_of(line))
        elif rows:
            yield Table(path.relative_to(ROOT).as_posix(), above, [rows[0], *rows[2:]])
            above, rows = line, []
        elif line:
            above = line


def tables_of_numbers() -> list[Table]:
    return [own for path in DOCUMENTS if path != BENCHMARK for own in tables(path) if own.numbers >= MOST]


@cache
def accepted(folder: Path, calibration: str | None = None, deviation: bool = False) -> Results:
    """The perplexities, divergences and mean output errors that were accepted, of one calibration set or over all.

    Means over seeds, or their standard deviations.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for name, column, metric in (
        ("cells", "perplexity", "perplexity"),
        ("divergences", "kl", "KL"),
        ("layers", "output_error", "error"),
    ):
        if not (folder / f"{name}.csv").is_file():
            continue
        data = pd.read_csv(folder / f"{name}.csv")
        if calibration:
            names = frames.column(data, "calibration").str.replace(SEED, "", regex=True)
            data = frames.select(data, names == calibration)
        for (label, mode, target), part in frames.groups(data, ["label", "mode", "target"]):
            means = [frames.column(own, column).mean() for _, own in frames.groups(part, ["calibration"])]
            value = statistics.stdev(means) if deviation and len(means) > 1 else statistics.fmean(means)
            found.setdefault((label, mode), {})[metric, target] = value
    return found


def printed_like(value: float, text: str) -> bool:
    """Whether a number is the one printed, to half a unit of its last digit."""
    digits, _, exponent = text.replace(",", "").partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    # Accepted numbers have six digits: rounding them again may fall on the other side of a half.
    return abs(value - float(text.replace(",", ""))) <= 0.5 * unit + 1e-6 * abs(value)


def column_of(header: str) -> tuple[str, str]:
    """(metric, beginning of the target's label) of a heading such as `60% row`, `KL, 2:4` or `error, 4b`."""
    metric, comma, target = header.partition(", ")
    return (metric, target) if comma else ("perplexity", header)


def fits(
    row: list[str],
    header: list[str],
    numbers: Mapping[tuple[str, str], float],
    deviations: Mapping[tuple[str, str], float],
) -> bool:
    """Whether all numbers of a row, and the deviations behind ±, are those of one method in one mode."""
    for heading, cell in zip(header[1:], row[1:], strict=True):
        metric, target = column_of(heading)
        mean, _, deviation = cell.partition(" ± ")
        if VALUE.match(cell) and not any(
            printed_like(value, mean) and (not deviation or printed_like(deviations[measure, label], deviation))
            for (measure, label), value in numbers.items()
            if measure == metric and (label == target or label.startswith(f"{target} "))
        ):
            return False
    return True


@pytest.mark.parametrize("own", tables_of_numbers(), ids=lambda own: f"{own.page}: {', '.join(own.rows[0])[:60]}")
def test_a_table_of_numbers_has_a_source(own: Table):
    kind, content = own.mark
    assert kind, f"{own.page}: the table {own.rows[0]} needs a comment above it, such as <!-- numbers: PATH -->"
    if kind == "numbers":
        results, deviations = accepted(ROOT / content), accepted(ROOT / content, deviation=True)
        for row in own.rows[1:]:
            assert any(fits(row, own.rows[0], numbers, deviations[key]) for key, numbers in results.items()), row
    if kind == "measured":
        command, _, processor = content.rpartition("; ")
        assert re.search(r"`[^`]+`", command) and processor
    if kind == "derived":
        assert re.search(r"\d", content) or (ROOT / content).is_file()


def test_most_tables_have_a_source():
    assert sum(own.mark[0] == "no source kept" for own in tables_of_numbers()) <= NO_SOURCE


def test_the_tables_of_the_benchmark_are_those_of_its_csv():
    data = pd.read_csv(BENCHMARK.with_suffix(".csv"))
    data["case"] = pd.Categorical(data["case"], list(dict.fromkeys(data["case"])))
    found = [own.rows for own in tables(BENCHMARK)]
    for column, shown in zip(("gain", "to_floor", "seconds"), found[:3], strict=True):
        wanted = [cells_of(line) for line in summary.by_shape(data, column).splitlines()]
        assert [row[0] for row in shown] == [row[0] for row in (wanted[0], *wanted[2:])]
        for row, expected in zip(shown[1:], wanted[2:], strict=True):
            for one, other in zip(row[1:], expected[1:], strict=True):
                assert one == other or close(one, other), (column, row)


def close(one: str, other: str) -> bool:
    """Whether two printed numbers agree to a unit of the third digit: the CSV has four."""
    a, b = (float(text.replace(",", "")) for text in (one, other))
    return abs(a - b) <= 0.01 * abs(b)


@pytest.mark.parametrize("study", sorted(path.name for path in ACCEPTED.iterdir()))
def test_the_gallery_has_the_accepted_numbers(study: str):
    """Each table of figures/gallery/STUDY/main.md of a metric that is accepted, entry by entry."""
    results, mode, metric, compared = accepted(ACCEPTED / study), "", "", 0
    deviations = results
    rows = len(results)
    header: list[str] = []
    for line in (ROOT / "figures/gallery" / study / "main.md").read_text("utf-8").splitlines():
        if line.startswith("## "):
            metric = next((m for m, word in METRICS.items() if word in line), "")
            of = ACCEPTED / study, line.partition(", calibrated on ")[2].replace("\\_", "_")
            results, deviations = accepted(*of), accepted(*of, deviation=True)
        elif line.startswith("### "):
            mode, header = line[4:], []
        elif line.startswith("|") and metric:
            row = cells_of(line)
            header = header or row
            for target, cell in zip(header[1:], row[1:], strict=False):
                if VALUE.match(cell) and row != header:
                    known = results[row[0], mode].get((metric, target))
                    if known is not None:
                        mean, _, deviation = cell.partition(" ± ")
                        assert printed_like(known, mean), (row[0], mode, metric, target)
                        spread = deviations[row[0], mode][metric, target]
                        assert not deviation or printed_like(spread, deviation), (row[0], mode, metric, target)
                        compared += 1
    assert compared >= rows


METRICS = {"perplexity": ", perplexity on", "KL": ", KL(dense", "error": "mean output error"}
