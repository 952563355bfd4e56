"""Draw what decode.py measured: python -m layerwise.figures.decode --table results/decode.csv --out FILE..."""

import argparse
import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from layerwise.contract.target import LOW_RANK, SUM
from layerwise.figures import style
from layerwise.figures.style import Look
from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import whole_file
from layerwise.storage.frames import groups, rows

# Where a method of the suite gives the storage, its look.
LOOKS = {
    "dense float32": Look("#8c8c8c", "x"),
    "dense bfloat16": Look("#000000", "o"),
    "2:4 bfloat16": style.look("wanda"),
    "W4 g128": style.look("gptq"),
    "W4 50% 1x16": style.look("gqsa"),
    "60% row": style.look("sparsegpt"),
    "rank 40%": style.look("svd_llm"),
    "rank 40% 4b g64": style.look("lplr"),
    "60% row rank 10%": style.look("three_basil"),
    "4b g128 rank 6%": style.look("eora"),
}
# Half-filled markers show factors and sums, as in the other figures.
KINDS = {"rank 40%": LOW_RANK, "rank 40% 4b g64": LOW_RANK, "60% row rank 10%": SUM, "4b g128 rank 6%": SUM}


def decode(table: pd.DataFrame) -> Figure:
    """Microseconds (median, quartiles) and megabytes moved against bits per weight, a column of panels per shape."""
    shapes = groups(table, ["rows", "inputs"])
    figure = Figure(figsize=(style.WIDTH, 4.2), layout="constrained")
    axes = figure.subplots(2, len(shapes), sharex=True, squeeze=False)
    for (upper, lower), ((outputs, inputs), part) in zip(axes.T, shapes, strict=True):
        for row in rows(part):
            look = LOOKS[row["storage"]]
            fill = style.HALVES.get(KINDS.get(row["storage"], ""), "full")
            mark = {"color": look.colour, "marker": look.marker, "linestyle": "none", "label": row["storage"]}
            mark |= {"fillstyle": fill, "markerfacecoloralt": "white"}
            middle = row["microseconds"]
            spread = [[middle - row["microseconds_q1"]], [row["microseconds_q3"] - middle]]
            upper.errorbar([row["bits_per_weight"]], [middle], yerr=spread, elinewidth=0.8, capsize=2, **mark)
            lower.plot([row["bits_per_weight"]], [row["bytes_moved"] / 1e6], **mark)
        upper.set_title(f"{outputs} x {inputs}")
        for axis in (upper, lower):
            axis.set_xscale("log", base=2)
            axis.set_xticks([2, 4, 8, 16, 32])
            axis.set_xlim(1.4, 40)
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("microseconds")
    axes[1, 0].set_ylabel("megabytes moved")
    figure.supxlabel("bits per weight", fontsize=style.RC["axes.labelsize"])
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="figure_decode", description=__doc__)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="files to write, .pdf, .svg or .png")
    args = parser.parse_args(argv)
    for path in args.out:
        if path.suffix not in style.METADATA:
            raise InputError(f"--out must end in {', '.join(style.METADATA)}. Got {path} instead.")
    if not args.table.is_file():
        raise InputError(f"The table {args.table} does not exist: `layerwise decode` writes it.")
    with style.styled():
        figure = decode(pd.read_csv(args.table))
        for path in args.out:
            with whole_file(path) as part:
                style.save(figure, part, path.suffix)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
