"""Draw one figure from the tables alone: layerwise worker figure FIGURE --tables FOLDER --out FILE..."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import whole_file


class Drawing(NamedTuple):
    """tables: what the figure is drawn from; module: where the function of the figure's name is; needs: what a study
    must have for it (Plan.gives), or None; repeats: what is drawn of several seeds: `mean`, `first` or `all`."""

    tables: tuple[str, ...]
    module: str
    needs: str | None = None
    repeats: str = "mean"


# The caption of a figure is workflow/report/FIGURE.rst. The Snakefile reads this list: nothing heavy is imported here.
FIGURES = {
    "perplexity_vs_sparsity": Drawing(("cells",), "layerwise.figures.perplexity"),
    "kl_vs_sparsity": Drawing(("cells",), "layerwise.figures.perplexity"),
    "perplexity_vs_bits": Drawing(("cells",), "layerwise.figures.pareto"),
    "kl_vs_bits": Drawing(("cells",), "layerwise.figures.pareto"),
    "error_along_depth": Drawing(("layers",), "layerwise.figures.depth"),
    "error_relative": Drawing(("layers",), "layerwise.figures.errors"),
    "error_reduction": Drawing(("layers",), "layerwise.figures.depth"),
    "gap_to_bound": Drawing(("layers",), "layerwise.figures.errors", "certificates"),
    "levels_along_depth": Drawing(("layers",), "layerwise.figures.allocation", "allocations", "all"),
    "metrics_vs_budget": Drawing(("cells",), "layerwise.figures.allocation", "allocations", "all"),
    "sweep": Drawing(("cells",), "layerwise.figures.sweep", "sweep"),
    "convergence": Drawing(("traces", "layers"), "layerwise.figures.convergence", "traces", "first"),
    "method_ranks": Drawing(("comparisons", "layers"), "layerwise.figures.ranks", "pairs", "all"),
}
SUFFIXES = (".pdf", ".svg", ".png")


def draw(name: str, tables: Path, out: list[Path], method_paths: Sequence[Path] = ()) -> None:
    """Draw a figure of FIGURES and write it to every file of `out`, in the format of its suffix.

    method_paths: the study's folders of methods besides the shipped ones. Raises InputError for a wrong card there.
    """
    from layerwise.contract.method_file import CatalogueError
    from layerwise.figures import style
    from layerwise.results import seeds
    from layerwise.storage.table_schema import read_table

    drawing = FIGURES[name]
    data = [seeds.repeats(read_table(tables, table), table, drawing.repeats) for table in drawing.tables]
    try:
        with style.styled(method_paths):
            figure = getattr(importlib.import_module(drawing.module), name)(*data)
            for path in out:
                with whole_file(path) as part:
                    style.save(figure, part, path.suffix)
    except CatalogueError as error:
        raise InputError(str(error)) from None


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="plot", description=__doc__)
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("--tables", type=Path, default=Path("results/tables"), help="folder of the tables")
    parser.add_argument("--out", type=Path, nargs="+", required=True, help="files to write, .pdf, .svg or .png")
    parser.add_argument(
        "--method-path",
        type=Path,
        action="append",
        default=[],
        help="further folder of methods, whose cards say how they are drawn",
    )
    args = parser.parse_args(argv)
    for path in args.out:
        if path.suffix not in SUFFIXES:
            raise InputError(f"--out must end in {', '.join(SUFFIXES)}. Got {path} instead.")
    draw(args.figure, args.tables, args.out, args.method_path)


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
