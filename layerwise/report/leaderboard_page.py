"""The boards of several studies as one self-contained HTML page, which needs no network and runs no script."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from layerwise.comparison.leaderboard import Board, Standing, leaderboard, ratio_text, study_folders
from layerwise.report.fields import shown
from layerwise.results.main_table import number
from layerwise.runtime.files import write_atomic
from layerwise.runtime.project import ROOT

HERE = ROOT / "workflow" / "report" / "page"
HEADER = (
    *("rank", "method", "ratio to dense", "perplexity", "dense", "KL, nats per token", "bits per weight"),
    *("model", "study"),
)
NUMBERS = ("ratio to dense", "perplexity", "dense", "KL, nats per token", "bits per weight")


def leaders(boards: Sequence[Board]) -> Iterator[dict[str, Any]]:
    """A line per board and group: the first of every protocol that has at least two methods in the group."""
    for i, board in enumerate(boards):
        for comparison, standings in board.groups:
            first = [own for own in standings if own.rank == 1 and own.among > 1]
            if first:
                yield {
                    "address": f"#board-{i}",
                    "board": f"{board.target} on {board.text}",
                    "comparison": comparison,
                    "first": [(own.name, own.marks, ratio_text(own), own.model) for own in first],
                }


def line(own: Standing) -> dict[str, str]:
    """Heading -> text, of a row of a board."""
    rank = "–" if own.rank is None else "alone" if own.among == 1 else f"{own.rank} of {own.among}"
    dense = "none" if own.dense is None else number(own.dense, "perplexity")
    kl = "–" if own.kl is None else number(own.kl, "kl")
    values = (rank, own.name, ratio_text(own), own.shown, dense, kl, shown(own.bits))
    return dict(zip(HEADER, (*values, own.model, ", ".join(own.studies)), strict=True))


def page(boards: Sequence[Board], sentences: Sequence[str], studies: dict[str, Path]) -> str:
    """The HTML of boards; sentences: on the page as a whole; studies: name -> folder of its tables."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("leaderboard.html.jinja").render(
        boards=[
            {
                "board": board,
                "groups": [(name, [(own, line(own)) for own in standings]) for name, standings in board.groups],
            }
            for board in boards
        ],
        leaders=list(leaders(boards)),
        sentences=sentences,
        studies=studies,
        header=HEADER,
        numbers=NUMBERS,
        css=(HERE / "page.css").read_text("utf-8"),
    )


def write_leaderboard(folders: Sequence[str], out: Path) -> str:
    """Write the page of several result folders. Returns a line that counts boards and rows.

    folders: FOLDER or NAME=FOLDER each. Raises InputError, one sentence, where a folder cannot be used.
    """
    studies = study_folders(folders)
    boards, sentences = leaderboard(studies)
    write_atomic(out, page(boards, sentences, studies))
    rows = sum(len(standings) for board in boards for _, standings in board.groups)
    return f"{len(studies)} studies, {len(boards)} boards, {rows} rows -> {out}"
