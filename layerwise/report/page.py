"""One self-contained HTML page of a study: the answer first, then tables, cells layer by layer, protocol, provenance.

Nothing is fetched when it is opened, and everything shown is escaped. Each number can be traced: its cell leads to the
spec, the folder, the log, and the row of the table under results/tables (1 is the first row below the header).
"""

import argparse
import base64
import importlib.resources
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from docutils.core import publish_parts

from layerwise.comparison import published_page
from layerwise.comparison.folders import PROVENANCE
from layerwise.report import headline
from layerwise.report.cells import LAYER, NUMBER, Study, cell_views, measured
from layerwise.report.chart import chart
from layerwise.report.fields import Field, entries, plain, shown, table
from layerwise.results import main_table
from layerwise.results.comparisons import NO_DIFFERENCE
from layerwise.results.table_text import Table
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import write_atomic
from layerwise.runtime.project import ROOT
from layerwise.storage.frames import column, columns_of
from layerwise.storage.frames import rows as rows_of
from layerwise.storage.table_schema import read_table
from layerwise.study.grid import plan

HERE = ROOT / "workflow" / "report"
# Shown in their own way; traces, bounds and allocations in figures.
TABLES = ("layers", "cells", "traces", "bounds", "allocations", "skipped")
LEAD = {  # a reader's first columns, before those that locate the row
    "published": (
        *("model", "paper", "label", "target", "published", "ours", "difference", "tolerance", "verdict"),
        *("differs", "reason"),
    ),
    "comparisons": (
        *("mode", "target", "metric", "text", "label", "other", "verdict", "median_ratio", "difference", "low", "high"),
        *("effect", "p_holm"),
    ),
    "allocation_comparisons": (
        *("mode", "target", "metric", "text", "label", "allocation", "other_allocation", "verdict", "difference"),
        *("low", "high", "effect", "p_holm"),
    ),
}
PROTOCOL = {  # name on the page -> section of the config
    "model": "models",
    "text": "texts",
    "calibration": "calibration",
    "evaluation": "evaluation",
    "tasks": "tasks",
}
MOST_ROWS = 5000  # of a table that is shown whole


def results(views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row per cell: what was asked, every metric, and where it comes from."""
    first = ("comparison", "label", "target", "mode", "model", "calibration", "seed")
    named = [[dict(zip(NUMBER, n[1:-2], strict=True)) for n in view["numbers"]] for view in views]
    values = [{measured(row): row["value"] for row in rows} for rows in named]
    metrics = list(dict.fromkeys(metric for own in values for metric in own))
    header = [*first, *(" ".join(filter(None, metric)) for metric in metrics)]
    header += ["status", "cell", "params", "folder", "log"]
    rows = [
        [
            *(view["spec"][name] for name in first),
            *(Field(own.get(metric), metric[0]) for metric in metrics),
            view["status"],
            Field(view["spec"]["cell"], link=f"#cell-{i}"),
            view["spec"]["params"],
            view["folder"],
            view["log"],
        ]
        for i, (view, own) in enumerate(zip(views, values, strict=True))
    ]
    return table(header, rows)


def links(views: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[tuple[Any, str]]]:
    """(seed, address) of all cells that an entry of a main table is made of."""
    found: dict[tuple[Any, ...], list[tuple[Any, str]]] = {}
    for i, view in enumerate(views):
        spec = view["spec"]
        key = tuple(spec[name] for name in ("model", "calibration", "mode", "label", "target"))
        found.setdefault(key, []).append((spec["seed"], f"#cell-{i}"))
    return found


def gaps(views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row per cell and reason why it lacks numbers."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for i, view in enumerate(views):
        for metric, text, status, reason, log in view["gaps"]:
            rows.setdefault((i, status, reason, log if status == "failed" else view["log"]), []).append(
                " ".join(filter(None, (metric, text)))
            )
    header = [
        "cell",
        "model",
        "calibration",
        "seed",
        "mode",
        "label",
        "target",
        "status",
        "what is absent",
        "reason",
        "log",
    ]
    return table(
        header,
        [
            [
                Field(views[i]["spec"]["cell"], link=f"#cell-{i}"),
                *(views[i]["spec"][name] for name in header[1:7]),
                status,
                ", ".join(absent),
                reason,
                log,
            ]
            for (i, status, reason, log), absent in rows.items()
        ],
    )


def provenance(views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A column per distinct origin, named by how many cells it has; a row per fact that is known of any."""
    origins: dict[tuple[Any, ...], int] = {}
    for view in views:
        own = tuple(view["provenance"].values())
        if any(value is not None for value in own):
            origins[own] = origins.get(own, 0) + 1
    rows = [[name, *(o[i] for o in origins)] for i, name in enumerate(PROVENANCE)]
    header = ["", *(f"{count} cell{'s' * (count != 1)}" for count in origins.values())]
    return table(header, [row for row in rows if any(value is not None for value in row[1:])])


def prose(path: Path) -> str:
    """A caption of workflow/report, or another one, as HTML; formulas as MathML."""
    settings = {"math_output": "MathML", "file_insertion_enabled": False, "raw_enabled": False, "report_level": 5}
    parts: Any = publish_parts(path.read_text("utf-8"), writer="html5", settings_overrides=settings)
    return parts["fragment"]


def figure(path: Path) -> dict[str, str]:
    """A figure as an image within the page, with its caption."""
    try:
        svg = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise InputError(f"The figure {path} cannot be read: {error.strerror}.") from None
    caption = HERE / f"{path.stem}.rst"
    title = path.stem.replace("_", " ")
    return {"name": path.stem, "title": title, "svg": svg, "caption": prose(caption) if caption.is_file() else ""}


def other_tables(folder: Path, views: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every further table of the folder, `published` first, whole up to MOST_ROWS; its cells lead to the drill-down.

    Columns for readers come first, and those with one value in all rows are above the table.
    """
    links = {view["spec"]["cell"]: f"#cell-{i}" for i, view in enumerate(views)}
    paths = (path for path in folder.glob("*.parquet") if path.stem not in TABLES)
    return [
        _other_table(path.stem, pd.read_parquet(path), links)
        for path in sorted(paths, key=lambda path: (path.stem != "published", path.stem))
    ]


def _other_table(name: str, data: pd.DataFrame, links: Mapping[str, str]) -> dict[str, Any]:
    """One of them; links: name of a cell -> its address within the page."""
    notes = [_summary(name, data)]
    notes += [f"The first {MOST_ROWS} of {len(data)} rows."] if len(data) > MOST_ROWS else []
    names = [str(key) for key in data]
    same = [key for key in names if key != "cell" and len(data) > 1 and column(data, key).nunique(dropna=False) == 1]
    first = {key: column(data, key).iloc[0] for key in same}
    common = [f"{key} {shown(value)}" for key, value in first.items() if plain(value) is not None]
    notes += [f"In all rows: {', '.join(common)}."] if common else []
    lead = [key for key in LEAD.get(name, ()) if key in names and key not in same]
    header = ["row", *lead, *(key for key in names if key not in (*lead, *same))]
    numbered = columns_of(data.assign(row=range(1, len(data) + 1)), header).head(MOST_ROWS)
    rows = [
        [Field(value, link=links.get(value) if key == "cell" else None) for key, value in row.items()]
        for row in rows_of(numbered)
    ]
    title = "Published beside ours" if name == "published" else name.replace("_", " ").capitalize()
    return {"name": name, "title": title, "note": " ".join(filter(None, notes)), **table(header, rows)}


def _summary(name: str, data: pd.DataFrame) -> str:
    """A sentence on what a table says as a whole."""
    if name == "published":
        return published_page.summary(data)
    if name in ("comparisons", "allocation_comparisons") and len(data):
        return f"{int((column(data, 'verdict') == NO_DIFFERENCE).sum())} of {len(data)} comparisons show no difference."
    return ""


def scripts() -> dict[str, str]:
    """The scripts of maintained libraries to inline: DataTables with its extensions (from itables), and Bokeh."""
    datatables = importlib.resources.files("itables") / "html"
    bokeh = importlib.resources.files("bokeh") / "server/static/js/bokeh.min.js"
    return {
        "datatables": base64.b64encode((datatables / "dt_bundle.js").read_bytes()).decode(),
        "datatables_css": (datatables / "dt_bundle.css").read_text("utf-8"),
        # A script element ends at the first such tag, wherever it stands.
        "bokeh": re.sub("</(?=script)", r"<\\/", bokeh.read_text("utf-8"), flags=re.IGNORECASE),
        "glue": (HERE / "page/page.js").read_text("utf-8"),
        "css": (HERE / "page/page.css").read_text("utf-8"),
    }


def page(study: Study, folder: Path, figures: Sequence[Path]) -> str:
    """The HTML of a study whose tables are in a folder. Raises InputError when a table or figure cannot be used."""
    data = {name: read_table(folder, name) for name in ("layers", "cells", "comparisons", "allocations", "skipped")}
    views, shapes = cell_views(study, data)
    skipped, main = data["skipped"], _main_tables(data)
    leading, further = headline.split([figure(path) for path in figures])
    return _template().render(
        **_about(study, views),
        counts=_counts(views) | {"skipped": len(skipped)},
        links=links(views),
        targets=list(dict.fromkeys(view["spec"]["target"] for view in views)),
        headline=headline.headline(main),
        leading=leading,
        main=main,
        results=results(views),
        others=other_tables(folder, views),
        figures=further,
        gaps=gaps(views),
        skipped=table(list(skipped.columns), skipped.itertuples(index=False)),
        provenance=provenance(views),
        drill={"cells": views, "shapes": shapes, "number": ["row", *NUMBER, "file", "log"], "layer": ["row", *LAYER]},
        chart=json.loads(chart(shapes)),
        folder=str(folder),
        **scripts(),
    )


def _template() -> jinja2.Template:
    """The page's template, which escapes whatever is shown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "page"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("page.html.jinja")


def _about(study: Study, views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The page's facts about the study: its name, warnings, protocol and config."""
    config = dict(study.config)
    methods = {tuple(view["spec"][name] for name in ("label", "method", "comparison", "params")): 0 for view in views}
    protocol = {name: entries(config.get(key, {}), name) for name, key in PROTOCOL.items()}
    return {
        "name": str(config.get("study", "study")),
        "about": prose(HERE / "workflow.rst"),
        "warnings": study.warnings(),
        "protocol": protocol | {"method": table(["label", "method", "comparison", "params"], methods)},
        "config": yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True),
    }


def _counts(views: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Status -> cells that have it."""
    return {name: sum(view["status"] == name for view in views) for name in ("done", "failed", "missing")}


NOTED = ("comparisons", "layers", "allocations")  # tables from which the main tables' notes come


def _main_tables(data: Mapping[str, pd.DataFrame]) -> list[Table]:
    return [
        rendered
        for metric in main_table.METRICS
        for rendered in main_table.tables(data["cells"], metric, *(data[name] for name in NOTED))
    ]


def write_page(config: Mapping[str, Any], tables: Path, figures: Sequence[Path], out: Path) -> None:
    """Write the page of a study to a file, and print its size."""
    html = page(plan(config), tables, figures)
    write_atomic(out, html)
    print(f"{len(html.encode()) / 1e6:.1f} MB -> {out}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="report_page", description=__doc__)
    parser.add_argument("--study", required=True, type=json.loads, help="the whole config as JSON")
    parser.add_argument("--tables", type=Path, default=Path("results/tables"), help="folder of the tables")
    parser.add_argument("--figures", type=Path, nargs="*", default=[], help="figures to show, .svg, in their order")
    parser.add_argument("--out", type=Path, default=Path("results/report.html"))
    args = parser.parse_args(argv)
    write_page(args.study, args.tables, args.figures, args.out)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
