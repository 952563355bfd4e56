"""Render the table `published` in Markdown and LaTeX: a table per model and paper, and what is not in the study."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from layerwise.results.main_table import number
from layerwise.results.table_text import escape_latex, escape_markdown, latex_number
from layerwise.runtime.files import write_atomic
from layerwise.storage.frames import column, distinct, groups, groups_by, missing, rows, select

VERDICTS = ("within", "outside", "protocol differs", "not checked", "not run")
COLUMNS = ("as printed", "here", "target", "published", "ours", "difference", "tolerance", "verdict", "remark")
WHERE = ("calibration", "mode", "cell", "text")  # a cell is itself only in its mode and calibration
NOTHING = "No published number is for a model of this study and one of its texts or tasks: there is nothing to compare."
NOTE = (
    "Difference is ours minus published. Within: not more than the tolerance. Protocol differs: our dense value "
    "is not the published one, or the windows differ, so the verdict says nothing about the method. Not checked: "
    "there is no dense value to tell whether the protocols agree. A value marked secondary is quoted from others."
)


def summary(data: pd.DataFrame) -> str:
    """One sentence: how many published values there are, and how many have each verdict."""
    if data.empty:
        return NOTHING
    counts = Counter(column(data, "verdict"))
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    return f"{len(data)} comparisons with published numbers: {verdicts}."


def sections(data: pd.DataFrame) -> Iterator[tuple[str, list[list[str]], list[str]]]:
    """(title, lines of COLUMNS, sentences on what has no cell) of every model and paper, in the table's order."""
    for (model, paper), part in groups(data, ["model", "paper"]):
        here = select(part, column(part, "cell").notna())
        here = distinct(here, ["printed_method", "published", *WHERE])
        cells = [cell for _, cell in groups(here, ["label", "target"])]
        tells_apart = ("calibration", "seed", "mode", "text")
        several = [name for name in tells_apart if any(column(cell, name).nunique() > 1 for cell in cells)]
        sentences = []
        for reason, absent in groups_by(select(part, column(part, "cell").isna()), "reason"):
            names = dict.fromkeys(
                f"{row['printed_method']}, {row['printed_setting'].split(';')[0]}" for row in rows(absent)
            )
            sentences.append(f"Not run, because {reason}: {'; '.join(names)}.")
        yield f"{model} and {paper}", [_line(row, several) for row in rows(here)], sentences


def _line(row: Mapping[str, Any], several: Sequence[str] = ()) -> list[str]:
    """several: the columns that distinguish the cells of one entry and target."""
    measured = "" if row["metric"] == "perplexity" else f": {row['metric']} on {row['text']}"
    several = [name for name in several if not measured or name != "text"]
    shown = [_shown(row[name]) for name in ("published", "ours", "difference", "tolerance")]
    remarks = [", ".join(f"seed {row[name]}" if name == "seed" else str(row[name]) for name in several) or None]
    remarks += [row["differs"], row["reason"], f"not stated: {row['unsaid']}" if not missing(row["unsaid"]) else None]
    remarks += [f"assumed: {row['assumed']}" if not missing(row["assumed"]) else None]
    remarks += [f"standard error {row['ours_stderr']:.2g}"] if not missing(row["ours_stderr"]) else []
    remarks += ["secondary"] if row["source_status"] == "secondary" else []
    remark = "; ".join(str(text) for text in remarks if not missing(text))
    return [
        f"{row['printed_method']}, {row['paper_table']}{measured}",
        row["label"],
        row["target"],
        *shown,
        row["verdict"],
        remark,
    ]


def _shown(value: float) -> str:
    if missing(value):
        return "–"
    return f"{value:.3g}" if abs(value) < 1 else number(value, "perplexity")


def markdown(data: pd.DataFrame) -> str:
    """The whole page in GitHub Markdown."""
    lines = ["# Published beside ours", "", escape_markdown(summary(data)), ""]
    lines += [] if data.empty else [escape_markdown(NOTE), ""]
    for title, body, sentences in sections(data):
        lines += [f"## {escape_markdown(title)}", ""]
        if body:
            lines += ["| " + " | ".join(COLUMNS) + " |", "|:--|:--|:--|--:|--:|--:|--:|:--|:--|"]
            lines += ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in body]
            lines.append("")
        lines += [line for sentence in sentences for line in (escape_markdown(sentence), "")]
    return "\n".join(lines)


def latex(data: pd.DataFrame) -> str:
    """A float per model and paper for a document that loads booktabs; what has no cell is left to the Markdown page."""
    lines = ["% " + summary(data)]
    for title, body, _ in sections(data):
        if body:
            lines += [
                r"\begin{table}[tbp]",
                r"\centering\small\setlength{\tabcolsep}{4pt}",
                rf"\caption{{Published numbers beside ours: {escape_latex(title)}. {NOTE}}}",
                r"\begin{tabular}{@{}lllrrrrlp{5cm}@{}}",
                r"\toprule",
                " & ".join(COLUMNS) + r" \\",
                r"\midrule",
                *(_latex_line(row) for row in body),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
    return "\n".join([*lines, ""])


def _latex_line(row: list[str]) -> str:
    words, numbers, rest = row[:3], row[3:7], row[7:]
    return " & ".join([*map(escape_latex, words), *map(latex_number, numbers), *map(escape_latex, rest)]) + r" \\"


def write_pages(data: pd.DataFrame, out: Path) -> None:
    """Write published.md and published.tex into folder `out`."""
    write_atomic(out / "published.md", markdown(data))
    write_atomic(out / "published.tex", latex(data))
