"""Render the table `published` in Markdown and LaTeX: a table per model and paper, and what is not in the study."""

# pandas' own annotations lose whether a selection is a column or a frame.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from layerwise.results.main_table import escape_latex, escape_markdown, latex_number, number
from layerwise.runtime.files import write_atomic

VERDICTS = ("within", "outside", "protocol differs", "not checked", "not run")
COLUMNS = ("as printed", "here", "target", "published", "ours", "difference", "tolerance", "verdict", "remark")
WHERE = ("calibration", "mode", "cell", "text")  # a cell is itself only in its mode and calibration
NOTHING = "No published perplexity is of a model of this study: there is nothing to compare."
NOTE = (
    "Difference is ours minus published. Within: not more than the tolerance. Protocol differs: our dense perplexity "
    "is not the published one, or the windows are others, so that nothing is said of the method. Not checked: there is "
    "no dense perplexity to tell whether the protocols agree. A value marked secondary is quoted by others."
)


def summary(data: pd.DataFrame) -> str:
    """One sentence: how many published values there are, and how many have each verdict."""
    if data.empty:
        return NOTHING
    counts = data["verdict"].value_counts()
    told = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS)
    return f"{len(data)} comparisons with published perplexities: {told}."


def sections(data: pd.DataFrame) -> Iterator[tuple[str, list[list[str]], list[str]]]:
    """(title, lines of COLUMNS, sentences on what has no cell) of every model and paper, in the table's order."""
    for (model, paper), part in data.groupby(["model", "paper"], sort=False):
        here = part[part["cell"].notna()].drop_duplicates(["printed_method", "published", *WHERE])
        own = here.groupby(["label", "target"])
        several = [name for name in ("calibration", "seed", "mode", "text") if own[name].nunique().gt(1).any()]
        absent = part[part["cell"].isna()]
        sentences = []
        for reason, own in absent.groupby("reason", sort=False):
            names = dict.fromkeys(
                f"{row.printed_method}, {row.printed_setting.split(';')[0]}" for row in own.itertuples()
            )
            sentences.append(f"Not run, because {reason}: {'; '.join(names)}.")
        yield f"{model} and {paper}", [_line(row, several) for row in here.to_dict("records")], sentences


def _line(row: dict, several: Sequence[str] = ()) -> list[str]:
    """several: the columns that tell the cells of one entry and target apart."""
    shown = [_shown(row[name]) for name in ("published", "ours", "difference", "tolerance")]
    remarks = [", ".join(f"seed {row[name]}" if name == "seed" else str(row[name]) for name in several) or None]
    remarks += [row["differs"], row["reason"], f"not said: {row['unsaid']}" if pd.notna(row["unsaid"]) else None]
    remarks += [f"assumed: {row['assumed']}" if pd.notna(row["assumed"]) else None]
    remarks += ["secondary"] if row["source_status"] == "secondary" else []
    remark = "; ".join(str(text) for text in remarks if pd.notna(text))
    return [
        f"{row['printed_method']}, {row['paper_table']}",
        row["label"],
        row["target"],
        *shown,
        row["verdict"],
        remark,
    ]


def _shown(value: float) -> str:
    if pd.isna(value):
        return "–"
    return f"{value:.3g}" if abs(value) < 1 else number(value, "perplexity")


def markdown(data: pd.DataFrame) -> str:
    """The whole page in GitHub Markdown."""
    lines = ["# Published beside ours", "", escape_markdown(summary(data)), ""]
    lines += [] if data.empty else [escape_markdown(NOTE), ""]
    for title, rows, sentences in sections(data):
        lines += [f"## {escape_markdown(title)}", ""]
        if rows:
            lines += ["| " + " | ".join(COLUMNS) + " |", "|:--|:--|:--|--:|--:|--:|--:|:--|:--|"]
            lines += ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
            lines.append("")
        lines += [line for sentence in sentences for line in (escape_markdown(sentence), "")]
    return "\n".join(lines)


def latex(data: pd.DataFrame) -> str:
    """A float per model and paper for a document that loads booktabs; what has no cell is left to the Markdown page."""
    lines = ["% " + summary(data)]
    for title, rows, _ in sections(data):
        if rows:
            lines += [
                r"\begin{table}[tbp]",
                r"\centering\small\setlength{\tabcolsep}{4pt}",
                rf"\caption{{Published perplexities beside ours: {escape_latex(title)}. {NOTE}}}",
                r"\begin{tabular}{@{}lllrrrrlp{5cm}@{}}",
                r"\toprule",
                " & ".join(COLUMNS) + r" \\",
                r"\midrule",
                *(_latex_line(row) for row in rows),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
    return "\n".join([*lines, ""])


def _latex_line(row: list[str]) -> str:
    words, numbers, rest = row[:3], row[3:7], row[7:]
    return " & ".join([*map(escape_latex, words), *map(latex_number, numbers), *map(escape_latex, rest)]) + r" \\"


def write(data: pd.DataFrame, out: Path) -> None:
    """Write published.md and published.tex into folder `out`."""
    write_atomic(out / "published.md", markdown(data))
    write_atomic(out / "published.tex", latex(data))
