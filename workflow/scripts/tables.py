"""Render the main table in Markdown and LaTeX: methods as rows, grouped by what may be compared, targets as columns."""

# pandas' own annotations lose whether a selection is a column or a frame.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from workflow.scripts.runtime import report_errors, write_atomic
from workflow.scripts.table_schema import COMPARISONS, read_table

UNSUPPORTED = "–"
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "±": r"\ensuremath{\pm}",
    **{character: "\\" + character for character in "&%$#_{}"},
}
ACCURACIES = ("acc", "acc_norm")  # of zero-shot tasks; higher is better
METRICS = ("perplexity", *ACCURACIES, "mean_output_error")  # that have tables, in their order
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~])")


@dataclass(frozen=True)
class Entry:
    """What stands in a cell of the table; best: of its group and column, marked bold."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Section:
    """One mode: groups of (comparison, [(label, one entry per target)])."""

    title: str
    groups: list[tuple[str, list[tuple[str, list[Entry]]]]]


@dataclass(frozen=True)
class Table:
    """One rendered table. note: sentences on how to read it, the dense value among them; model, calibration: whose
    cells it holds."""

    name: str
    title: str
    note: str
    targets: list[str]
    sections: list[Section]
    model: str = ""
    calibration: str = ""


def number(value: float, metric: str) -> str:
    """A value as printed: perplexities to two decimals while these mean something, accuracies in percent, errors to
    three digits."""
    if metric in ACCURACIES:
        return f"{100 * value:.1f}"
    if metric != "perplexity":
        return f"{value:.3g}"
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.4g}"


def tables(cells: pd.DataFrame, metric: str) -> Iterator[Table]:
    """One table per model, calibration set and text or task of the `cells` table, in its order; modes are sections."""
    data = cells[cells["metric"] == metric]
    if metric in ACCURACIES:
        data = data.assign(text=data["task"] + " of " + data["task_set"])
    dense = data[data["target"] == "dense"]
    pruned = data[data["target"] != "dense"]
    text_of = pruned["text"].fillna("")
    for (model, calibration, text), part in pruned.groupby(["model", "calibration", text_of], sort=False):
        own = dense[(dense["model"] == model) & (dense["text"].fillna("") == text)]
        notes = []
        if metric != "mean_output_error" and len(own):
            row = own.to_dict("records")[0]
            error = row["stderr"] if metric in ACCURACIES else None
            notes.append(f"Dense: {_shown(row, metric)}{f' ± {number(error, metric)}' if pd.notna(error) else ''}.")
        better = "In percent, higher" if metric in ACCURACIES else "Lower"
        notes.append(f"{better} is better; the best of each group and column is bold where there is a choice.")
        if part["contaminated"].eq(True).any():
            notes.append("Calibration and evaluation text come from the same data set.")
        what = "mean output error over the layers" if metric == "mean_output_error" else f"{metric} on {text}"
        targets = list(part["target"].drop_duplicates())
        modes = part.groupby("mode", sort=False)
        sections = [Section(str(mode), _groups(rows.to_dict("records"), targets, metric)) for mode, rows in modes]
        name = "-".join(filter(None, (metric, model, calibration, text)))
        title = f"{model}, {what}, calibrated on {calibration}"
        yield Table(name, title, " ".join(notes), targets, sections, str(model), str(calibration))


def _shown(row: Mapping[str, Any], metric: str) -> str:
    if pd.notna(row["value"]):
        return number(float(row["value"]), metric)
    return "diverged" if row["status"] == "done" else str(row["status"])


def _groups(
    rows: Sequence[Mapping[str, Any]], targets: Sequence[str], metric: str
) -> list[tuple[str, list[tuple[str, list[Entry]]]]]:
    groups = []
    choose = max if metric in ACCURACIES else min
    for comparison in COMPARISONS:
        texts: dict[str, dict[str, str]] = {}
        values: dict[str, list[float]] = {}
        for row in rows:
            if row["comparison"] == comparison:
                texts.setdefault(row["label"], {})[row["target"]] = _shown(row, metric)
                if pd.notna(row["value"]):
                    values.setdefault(row["target"], []).append(float(row["value"]))
        # Equal as printed is equally good; alone is not best.
        best = {target: number(choose(column), metric) for target, column in values.items() if len(column) > 1}
        lines = [
            (label, [Entry(own.get(t, UNSUPPORTED), t in own and own[t] == best.get(t)) for t in targets])
            for label, own in texts.items()
        ]
        if lines:
            groups.append((comparison, lines))
    return groups


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it stands."""
    return "".join(LATEX.get(character, character) for character in text)


def escape_markdown(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", text)


def latex_number(text: str) -> str:
    """An entry in LaTeX: 1.2e+05 becomes 1.2 times a power of ten."""
    mantissa, e, exponent = text.partition("e")
    if e and exponent.lstrip("+-").isdigit():
        return rf"\ensuremath{{{mantissa} \times 10^{{{int(exponent)}}}}}"
    return escape_latex(text)


def markdown(table: Table) -> str:
    """The table as GitHub Markdown, a heading per mode, a row of its own for each group's name."""
    lines = [f"## {escape_markdown(table.title)}", "", escape_markdown(table.note), ""]
    for section in table.sections:
        lines += [f"### {escape_markdown(section.title)}", ""]
        lines.append("| " + " | ".join(["method", *map(escape_markdown, table.targets)]) + " |")
        lines.append("|:--" + "|--:" * len(table.targets) + "|")
        for comparison, rows in section.groups:
            lines.append(f"| *{escape_markdown(comparison)}* |" + " |" * len(table.targets))
            for label, entries in rows:
                shown = [f"**{entry.text}**" if entry.best else entry.text for entry in entries]
                lines.append("| " + " | ".join([escape_markdown(label), *shown]) + " |")
        lines.append("")
    return "\n".join(lines)


def latex(table: Table) -> str:
    """The table as a float for a document that loads booktabs, a rule between the groups."""
    width = len(table.targets) + 1
    lines = [
        r"\begin{table}[tbp]",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{escape_latex(table.title)}. {escape_latex(table.note)}}}",
        rf"\label{{tab:{re.sub(r'[^A-Za-z0-9.-]+', '-', table.name)}}}",
        rf"\begin{{tabular}}{{@{{}}l{'r' * len(table.targets)}@{{}}}}",
        r"\toprule",
        " & ".join(["method", *map(escape_latex, table.targets)]) + r" \\",
    ]
    for section in table.sections:
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{@{{}}l}}{{\textbf{{{escape_latex(section.title)}}}}} \\"]
        for comparison, rows in section.groups:
            lines += [r"\midrule", rf"\multicolumn{{{width}}}{{@{{}}l}}{{\emph{{{escape_latex(comparison)}}}}} \\"]
            for label, entries in rows:
                shown = [latex_number(entry.text) for entry in entries]
                shown = [rf"\textbf{{{t}}}" if e.best else t for t, e in zip(shown, entries, strict=True)]
                lines.append(" & ".join([escape_latex(label), *shown]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def document(cells: pd.DataFrame, render: Callable[[Table], str]) -> str:
    """The perplexity tables, those of zero-shot tasks, then those of the mean output error."""
    rendered = [render(table) for metric in METRICS for table in tables(cells, metric)]
    return "\n".join(rendered) or "No results yet.\n"


def write(cells: pd.DataFrame, out: Path) -> None:
    """Write main.md and main.tex into folder `out`."""
    write_atomic(out / "main.md", document(cells, markdown))
    write_atomic(out / "main.tex", document(cells, latex))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tables", description=__doc__)
    parser.add_argument("--tables", type=Path, default=Path("results/tables"), help="folder of the tables")
    parser.add_argument("--out", type=Path, help="folder for main.md and main.tex (default: that of the tables)")
    args = parser.parse_args(argv)
    write(read_table(args.tables, "cells"), args.out or args.tables)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
