"""A table of methods (rows) and targets (columns), as Markdown and as LaTeX."""

from __future__ import annotations

import re
from dataclasses import dataclass

from layerwise.results.protocol import MARK

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
    MARK: r"\textsuperscript{\textdagger}",
    **{character: "\\" + character for character in "&%$#_{}"},
}
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~])")


@dataclass(frozen=True)
class TableEntry:
    """The text of one entry. best: whether it is the best of its group and column, or not shown to differ from the best
    (bold)."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Section:
    """One mode: groups of (comparison, [(label, one entry per target)])."""

    title: str
    groups: list[tuple[str, list[tuple[str, list[TableEntry]]]]]


@dataclass(frozen=True)
class Table:
    """One rendered table. note: sentences on how to read it, including the dense value. model, calibration: of its
    cells. dense: the sentence with the dense model's value, empty for a distance from it."""

    name: str
    title: str
    note: str
    targets: list[str]
    sections: list[Section]
    model: str = ""
    calibration: str = ""
    dense: str = ""


def escape_latex(text: str) -> str:
    """Text escaped for LaTeX."""
    return "".join(LATEX.get(character, character) for character in text)


def escape_markdown(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", text)


def latex_number(text: str) -> str:
    """An entry in LaTeX: 1.2e+05 becomes 1.2 times a power of ten."""
    if text.endswith(MARK):
        return latex_number(text.removesuffix(MARK)) + LATEX[MARK]
    if " ± " in text:
        return r" \ensuremath{\pm} ".join(map(latex_number, text.split(" ± ")))
    mantissa, e, exponent = text.partition("e")
    if e and exponent.lstrip("+-").isdigit():
        return rf"\ensuremath{{{mantissa} \times 10^{{{int(exponent)}}}}}"
    return escape_latex(text)


def markdown(table: Table) -> str:
    """The table as GitHub Markdown, with a heading per mode and a row for each group's name."""
    lines = [f"## {escape_markdown(table.title)}", "", escape_markdown(table.note), ""]
    for section in table.sections:
        lines += [f"### {escape_markdown(section.title)}", ""]
        lines.append("| " + " | ".join(["method", *map(escape_markdown, table.targets)]) + " |")
        lines.append("|:--" + "|--:" * len(table.targets) + "|")
        for comparison, group in section.groups:
            lines.append(f"| *{escape_markdown(comparison)}* |" + " |" * len(table.targets))
            for label, entries in group:
                shown = [f"**{entry.text}**" if entry.best else entry.text for entry in entries]
                lines.append("| " + " | ".join([escape_markdown(label), *shown]) + " |")
        lines.append("")
    return "\n".join(lines)


def latex(table: Table) -> str:
    """The table as a LaTeX float for a document that loads booktabs, with a rule between groups."""
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
        for comparison, group in section.groups:
            lines += [r"\midrule", rf"\multicolumn{{{width}}}{{@{{}}l}}{{\emph{{{escape_latex(comparison)}}}}} \\"]
            for label, entries in group:
                shown = [latex_number(entry.text) for entry in entries]
                shown = [rf"\textbf{{{t}}}" if e.best else t for t, e in zip(shown, entries, strict=True)]
                lines.append(" & ".join([escape_latex(label), *shown]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
