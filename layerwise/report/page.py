"""One self-contained HTML page of a study: protocol, tables, figures, every cell layer by layer, gaps, provenance.

Nothing is fetched when it is opened, and everything shown is escaped. Each number can be traced: its cell leads to the
spec, the folder, the log, and the row of the table under results/tables (1 is the first row below the header).
"""

import argparse
import base64
import importlib.resources
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import pandas as pd
import yaml
from docutils.core import publish_parts

from layerwise.comparison import published_page
from layerwise.comparison.folders import PROVENANCE, SPEC
from layerwise.figures.style import SPARE_COLOURS
from layerwise.results import main_table
from layerwise.results.cell_results import CELL_METRICS, PlannedCell
from layerwise.results.comparisons import NO_DIFFERENCE
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import write_atomic
from layerwise.runtime.project import ROOT
from layerwise.storage.frames import column, columns_of
from layerwise.storage.frames import groups as groups_of
from layerwise.storage.frames import rows as rows_of
from layerwise.storage.table_schema import columns, read_table
from layerwise.study.grid import plan

HERE = ROOT / "workflow" / "report"
CELLS, LAYERS = list(columns("cells")), list(columns("layers"))
NUMBER = CELLS[len(SPEC) : CELLS.index("commit")]  # the columns that hold a number and what belongs to it
LAYER = LAYERS[LAYERS.index("layer") :]
SHAPE = LAYER[: LAYER.index("output_error")]  # columns that all cells of a model share
TABLES = ("layers", "cells", "traces", "bounds", "skipped")  # shown in their own way; traces and bounds in figures
LEAD = {  # what a reader of a table asks, before the columns that say where
    "published": (
        *("model", "paper", "label", "target", "published", "ours", "difference", "tolerance", "verdict"),
        *("differs", "reason"),
    ),
    "comparisons": (
        *("mode", "target", "metric", "text", "label", "other", "verdict", "median_ratio", "difference", "low", "high"),
        *("effect", "p_holm"),
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
DIGITS = 6  # of a number in the drill-down; the table has all of them
# Okabe and Ito's without black and yellow, which are lost on one of the two backgrounds.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", *SPARE_COLOURS)
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "x", "star")
GREY = "#7d7d7d"  # legible on both backgrounds


class Study(Protocol):
    """What is used here of a plan."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def cells(self) -> Sequence[PlannedCell]: ...
    @property
    def evaluations(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]: ...
    def warnings(self) -> list[str]: ...


# -------------------------------------------------------------------------------------------------------------- values


def plain(value: Any) -> Any:
    """A table's value as JSON has it: None where it is empty, an integer for a number that is whole."""
    if value is None or value is pd.NA or value != value:
        return None
    if hasattr(value, "item"):
        value = value.item()
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def short(value: Any) -> Any:
    """A value with the digits of the drill-down."""
    value = plain(value)
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def shown(value: Any, metric: str | None = None) -> str:
    """A value as text: four digits, perplexities as in the main table, nothing where it is empty."""
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return main_table.number(value, metric) if metric == "perplexity" else f"{value:.4g}"
    return json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)


class Field(dict):
    """A cell of an HTML table: text, and where it is a number its value to sort by; link: address within the page."""

    def __init__(self, value: Any, metric: str | None = None, link: str | None = None) -> None:
        value = plain(value)
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
        text = shown(value, metric)
        super().__init__(text=text, number=number, link=link, long=len(text) > 60 and " " in text)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """What the template needs of a table; rows of values or of Fields."""
    fields = [[value if isinstance(value, Field) else Field(value) for value in row] for row in rows]
    return {"header": list(header), "rows": fields}


def entries(named: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """A table of config entries: a row each, a column per key that any has."""
    keys = list(dict.fromkeys(key for entry in named.values() for key in entry))
    return table([name, *keys], [[label, *(entry.get(key) for key in keys)] for label, entry in named.items()])


# --------------------------------------------------------------------------------------------------------------- cells


def origin(cell: PlannedCell, row: Mapping[str, Any], study: Study) -> tuple[str, str]:
    """(file, log) that a number of a cell, a row of the `cells` table, comes from."""
    logs = f"logs/{cell.folder.removeprefix('results/')}"
    if row["metric"] in CELL_METRICS:
        file = "cell.json" if row["metric"] == "job_seconds" else "layers.parquet"
        return f"{cell.folder}/{file}", f"{logs}/compress.log"
    kind, specs, name = "perplexity", study.evaluations, plain(row["text"])
    if plain(row["task"]) is not None:
        kind, specs, name = "tasks", study.tasks, plain(row["task_set"])
    found = [identity for identity, spec in specs.items() if spec["name"] == name]
    if not found:
        raise InputError(f"Expected tables of the study that --study gives; it has no {kind} on {name}.")
    identity = found[0]
    return f"{cell.folder}/{kind}-{identity}.json", f"{logs}/{kind}-{identity}.log"


def _log(cell: PlannedCell, row: Mapping[str, Any], study: Study) -> str:
    """The log that tells why a number is absent: that of the step which left its reason."""
    own, compress = origin(cell, row, study)[1], f"logs/{cell.folder.removeprefix('results/')}/compress.log"
    return compress if str(row["reason"]).startswith("compress") else own


def measured(row: Mapping[str, Any]) -> tuple[str, str]:
    """(metric, what it was measured on): the text, or the task of a set; nothing for the layers."""
    task = plain(row["task"])
    return row["metric"], plain(row["text"]) or ("" if task is None else main_table.task_title(task, row["task_set"]))


def _key(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(plain(row[name]) for name in names)


def cell_views(study: Study, data: Mapping[str, pd.DataFrame]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the drill-down shows of each cell, in the order of the `cells` table, and the distinct shapes of models.

    Raises InputError when the table has a cell that is not in the study.
    """
    names = [name for name in SPEC if study.cells and name in study.cells[0].columns]
    planned = {_key(cell.columns, names): cell for cell in study.cells}
    layers = data["layers"].assign(row=range(1, len(data["layers"]) + 1))
    of_layers = {_key(dict(zip(names, key, strict=True)), names): part for key, part in groups_of(layers, names, True)}
    shapes: list[dict[str, Any]] = []
    views = []
    for key, part in groups_of(data["cells"].assign(row=range(1, len(data["cells"]) + 1)), names, True):
        own = _key(dict(zip(names, key, strict=True)), names)
        if own not in planned:
            asked = " ".join(str(value) for value in own)
            raise InputError(f"Expected tables of the study that --study gives; it has no cell {asked}.")
        cell = planned[own]
        rows = rows_of(part)
        numbers = []
        for row in rows:
            file, log = origin(cell, row, study)
            numbers.append([row["row"], *(short(row[name]) for name in NUMBER), file, log])
        gaps = [row for row in rows if plain(row["reason"])]
        views.append(
            {
                "folder": cell.folder,
                "log": f"logs/{cell.folder.removeprefix('results/')}/compress.log",
                "spec": {name: plain(rows[0][name]) for name in SPEC},
                "numbers": numbers,
                "provenance": {name: plain(rows[0][name]) for name in PROVENANCE},
                "status": "done" if all(row["status"] == "done" for row in rows) else gaps[0]["status"],
                "gaps": [[*measured(row), row["status"], row["reason"], _log(cell, row, study)] for row in gaps],
                "layers": _layers_view(of_layers.get(own), shapes),
            }
        )
    return views, shapes


def _layers_view(rows: pd.DataFrame | None, shapes: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Columns of a cell's layers; names and sizes, which many cells share, stand once in `shapes`."""
    if rows is None or rows.empty:
        return None
    shape = {name: [plain(value) for value in rows[name]] for name in SHAPE}
    if shape not in shapes:
        shapes.append(shape)
    values = {name: [short(value) for value in rows[name]] for name in LAYER if name not in SHAPE}
    return {"shape": shapes.index(shape), "row": rows["row"].to_list(), **values}


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
    """A column per distinct origin, named by how many cells it has; a row per thing that is known of any."""
    origins: dict[tuple[Any, ...], int] = {}
    for view in views:
        own = tuple(view["provenance"].values())
        if any(value is not None for value in own):
            origins[own] = origins.get(own, 0) + 1
    rows = [[name, *(o[i] for o in origins)] for i, name in enumerate(PROVENANCE)]
    header = ["", *(f"{count} cell{'s' * (count != 1)}" for count in origins.values())]
    return table(header, [row for row in rows if any(value is not None for value in row[1:])])


# -------------------------------------------------------------------------------------------------- parts of the page


def prose(path: Path) -> str:
    """A caption of workflow/report, or of one's own, as HTML; formulas as MathML."""
    settings = {"math_output": "MathML", "file_insertion_enabled": False, "raw_enabled": False, "report_level": 5}
    parts: Any = publish_parts(path.read_text("utf-8"), writer="html5", settings_overrides=settings)
    return parts["fragment"]


def figure(path: Path) -> dict[str, str]:
    """A figure as an image within the page, with its caption."""
    try:
        svg = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise InputError(f"Expected a figure at {path}: {error.strerror}.") from None
    caption = HERE / f"{path.stem}.rst"
    title = path.stem.replace("_", " ")
    return {"name": path.stem, "title": title, "svg": svg, "caption": prose(caption) if caption.is_file() else ""}


def other_tables(folder: Path, views: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every further table of the folder, `published` first, whole up to MOST_ROWS; its cells lead to the drill-down.

    Columns that say what a reader asks come first, and those with one value in all rows are told above the table.
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
    if name == "comparisons" and len(data):
        return f"{int((column(data, 'verdict') == NO_DIFFERENCE).sum())} of {len(data)} comparisons show no difference."
    return ""


def chart(shapes: Sequence[Mapping[str, Any]]) -> str:
    """The drill-down's chart as Bokeh's JSON: error along the blocks, a line per kind of layer; page.js fills it."""
    from bokeh.core.types import ID
    from bokeh.embed import json_item
    from bokeh.models import BasicTickFormatter, ColumnDataSource, HoverTool, LogTicker, Range1d
    from bokeh.plotting import figure as new_figure

    kinds = list(dict.fromkeys(kind for shape in shapes for kind in shape["kind"]))
    drawn = new_figure(
        height=340,
        sizing_mode="stretch_width",
        y_axis_type="log",
        x_range=Range1d(start=0, end=1),  # set to the cell's by page.js
        y_range=Range1d(start=0.01, end=1),
        x_axis_label="block",
        y_axis_label="output error",
        tools="pan,box_zoom,reset,save",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0,
        output_backend="svg",
    )
    for i, kind in enumerate(kinds):
        source = ColumnDataSource({"block": [], "error": [], "layer": []}, name=kind)
        colour = COLOURS[i % len(COLOURS)]
        drawn.line("block", "error", source=source, color=colour, legend_label=kind)
        marker = MARKERS[i % len(MARKERS)]
        drawn.scatter("block", "error", source=source, color=colour, size=7, marker=marker, legend_label=kind)
    drawn.add_tools(HoverTool(tooltips=[("layer", "@layer"), ("output error", "@error")]))
    drawn.yaxis.ticker = LogTicker(mantissas=[1, 2, 5])
    drawn.yaxis.formatter = BasicTickFormatter(use_scientific=True, precision=3)
    for axis in (*drawn.xaxis, *drawn.yaxis):
        axis.axis_label_text_color = axis.major_label_text_color = axis.axis_line_color = GREY
        axis.major_tick_line_color = axis.minor_tick_line_color = GREY
        axis.axis_label_text_font_style = "normal"
    drawn.grid.grid_line_color, drawn.grid.grid_line_alpha = GREY, 0.25
    drawn.toolbar.logo = None
    if kinds:
        legend = drawn.legend[0]
        legend.click_policy, legend.label_text_color, legend.orientation = "hide", GREY, "horizontal"
        legend.ncols = 4  # seven kinds in a row are wider than a phone
        legend.background_fill_alpha = legend.border_line_alpha = 0
        drawn.add_layout(legend, "below")
    return json.dumps(json_item(drawn, ID("chart")))


def scripts() -> dict[str, str]:
    """What is inlined of maintained libraries: DataTables with its extensions, as itables brings it, and Bokeh."""
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
    data = {name: read_table(folder, name) for name in ("layers", "cells", "comparisons", "skipped")}
    views, shapes = cell_views(study, data)
    skipped = data["skipped"]
    return _template().render(
        **_about(study, views),
        counts=_counts(views) | {"skipped": len(skipped)},
        links=links(views),
        targets=list(dict.fromkeys(view["spec"]["target"] for view in views)),
        main=_main_tables(data),
        results=results(views),
        others=other_tables(folder, views),
        figures=[figure(path) for path in figures],
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
    """What the page says of the study: its name, warnings, protocol and config."""
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


def _main_tables(data: Mapping[str, pd.DataFrame]) -> list[main_table.Table]:
    return [
        rendered
        for metric in main_table.METRICS
        for rendered in main_table.tables(data["cells"], metric, data["comparisons"], data["layers"])
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
