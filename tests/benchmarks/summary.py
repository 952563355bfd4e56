"""Tables and a figure of a run of the benchmarks.

    python -m tests.benchmarks.summary results/benchmarks/run.json --table docs/benchmark --figure docs/benchmark.png

Writes TABLE.csv, a line per case and shape, and TABLE.md: ratios, seconds, and exponents of growth.
"""

import argparse
import json
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from layerwise.figures import style
from layerwise.runtime.files import whole_file, write_atomic
from layerwise.storage import frames
from tests.benchmarks.suite import BUDGET, CASES, FIXED, SIDES, UNTIMED

LOOKS = tuple(zip(("#9fc3e6", "#5b9bd5", "#2f6fb0", "#123f73", "#D55E00"), "os^DP", strict=True))  # by size
GAIN, TO_FLOOR = "Published loop / method", "Method / floor"


def read(run: dict[str, Any]) -> pd.DataFrame:
    """A line per case and shape, in the suite's order: medians in seconds, their ratios, rounds, threads, load."""
    rows = []
    for entry in run["benchmarks"]:
        extra, stats = entry["extra_info"], entry["stats"]
        row = {key: extra[key] for key in ("case", "out", "in", "compared")}
        row["seconds"], row["floor_seconds"] = stats["median"], np.median(extra["floor"])
        row["baseline_seconds"] = np.median(extra["baseline"]) if extra["baseline"] else np.nan
        rows.append(row | {"rounds": stats["rounds"], "threads": extra["threads"], "load": extra["load"]})
    table = pd.DataFrame(rows)
    table["gain"] = table["baseline_seconds"] / table["seconds"]
    table["to_floor"] = table["seconds"] / table["floor_seconds"]
    table["case"] = pd.Categorical(table["case"], [name for name in CASES if name in set(table["case"])])
    return table.sort_values(["case", "in", "out"]).reset_index(drop=True)


def exponent(part: pd.DataFrame, along: str, seconds: str) -> float:
    """Slope of log seconds over log size in layers of which only `along` (in, out) differs; nan of fewer than three."""
    line = part[(part["in" if along == "out" else "out"] == FIXED) & part[along].isin(SIDES)]
    return float(np.polyfit(np.log(line[along]), np.log(line[seconds]), 1)[0]) if len(line) > 2 else np.nan


def squares(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of the sizes that were asked for, without those that serve the exponents alone, and their `shape`."""
    asked = frames.select(table, frames.column(table, "compared")).copy()
    asked["shape"] = [f"{o}" if o == i else f"{o} x {i}" for o, i in zip(asked["out"], asked["in"], strict=True)]
    return asked


def number(value: float) -> str:
    """Three digits, or a dash for what was not measured."""
    return "–" if np.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def by_shape(table: pd.DataFrame, column: str) -> str:
    """Cases down, shapes across."""
    asked = squares(table)
    shapes = list(dict.fromkeys(asked.sort_values(["in", "out"])["shape"]))
    wide = asked.pivot(index="case", columns="shape", values=column).reindex(columns=shapes)
    wide = wide.dropna(how="all")
    return markdown_table(
        ["", *shapes], [[str(case), *map(number, row)] for case, row in zip(wide.index, wide.values, strict=True)]
    )


def markdown(table: pd.DataFrame, run: dict[str, Any], command: str) -> str:
    """The page of tables."""
    (threads,) = set(table["threads"])
    taken = frames.column(table, "rounds")
    rounds = " to ".join(str(few) for few in sorted({int(frames.lowest(taken)), int(frames.highest(taken))}))
    cpu = run["machine_info"]["cpu"].get("brand_raw", "unknown processor")
    rows = [
        [
            str(case),
            *(number(exponent(part, along, of)) for along in ("in", "out") for of in ("seconds", "floor_seconds")),
        ]
        for case, part in table.groupby("case", observed=True)
    ]
    rows = [row for row in rows if set(row[1:]) != {"–"}]
    notes = [f"- {name}: {case.note}." for name, case in CASES.items() if case.note]
    notes += [
        f"- {name}: not timed above {case.largest}, where a round takes more than {BUDGET} s."
        for name, case in CASES.items()
        if case.largest < 11008
    ]
    notes += [
        f"- {name}: published loop not timed above {case.baseline_largest}."
        for name, case in CASES.items()
        if case.baseline and case.baseline_largest < case.largest
    ]
    notes += [f"- {name}: not timed, it {reason}." for name, reason in UNTIMED.items()]
    grown = f"""## Growth

The slope of log seconds over log size, from {min(SIDES)} to {max(SIDES)}, where the other size is {FIXED}.

{markdown_table(["", "`in`", "floor", "`out`", "floor"], rows)}
"""
    return f"""# Benchmark

Generated by `{command}`; [performance.md](performance.md) explains it. Out x in; medians of {rounds}
rounds. Each round times the floor, the published loop and the method.
{cpu}, {threads} threads, load {table["load"].min():.1f} to {table["load"].max():.1f} (the run itself included),
{run["datetime"][:10]}, commit {run["commit_info"]["id"][:10]}{" with changes" if run["commit_info"]["dirty"] else ""}.

![{GAIN} and {TO_FLOOR.lower()} by case and size](../figures/gallery/benchmark.png)

## {GAIN}

{by_shape(table, "gain")}
## {TO_FLOOR}

{by_shape(table, "to_floor")}
## Seconds of the method

{by_shape(table, "seconds")}
{grown if rows else ""}## Notes

{chr(10).join(notes)}
"""


def drawn(table: pd.DataFrame) -> Figure:
    """Both ratios, a row per case and a mark per size."""
    asked = squares(table)
    cases = list(asked["case"].cat.categories)
    shapes = list(dict.fromkeys(asked.sort_values(["in", "out"])["shape"]))
    figure = Figure(figsize=(style.WIDTH, 1.0 + 0.19 * len(cases)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, column, title in zip(panels, ("gain", "to_floor"), (GAIN, TO_FLOOR), strict=True):
        for name, (colour, marker) in zip(shapes, cycle(LOOKS), strict=False):
            part = frames.matching(asked, shape=name)
            places = frames.column(part, "case").cat.codes
            panel.plot(part[column], places, marker, color=colour, label=name, markersize=4)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(numticks=9))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(axis="x")
        panel.set_xlabel(title)
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside upper center", ncols=len(shapes))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="pytest-benchmark's JSON")
    parser.add_argument("--command", default="make benchmark", help="what made it, for the page")
    parser.add_argument("--table", type=Path, required=True, help="path of the tables without their suffixes")
    parser.add_argument("--figure", type=Path, required=True)
    args = parser.parse_args()
    run = json.loads(args.run.read_text("utf-8"))
    table = read(run)
    write_atomic(args.table.with_suffix(".csv"), table.to_csv(index=False, float_format="%.4g"))
    write_atomic(args.table.with_suffix(".md"), markdown(table, run, args.command))
    with style.styled(), whole_file(args.figure) as part:
        style.save(drawn(table), part, ".png")


if __name__ == "__main__":
    main()
