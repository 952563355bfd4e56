"""Figures: what is drawn and what is not, one look per method, the same bytes every time."""

# pandas' own annotations lose whether a selection is a column or a frame.

import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from layerwise.figures import plot
from layerwise.figures.allocation import levels_along_depth, metrics_vs_budget
from layerwise.figures.convergence import BOUND, convergence, typical_layer
from layerwise.figures.depth import error_along_depth, error_reduction
from layerwise.figures.errors import error_relative, gap_to_bound, ratios
from layerwise.figures.page import chosen_target, page
from layerwise.figures.pareto import kl_vs_bits, pareto_front, perplexity_vs_bits, sized
from layerwise.figures.perplexity import kl_vs_sparsity, perplexity_vs_sparsity
from layerwise.figures.ranks import groups, method_ranks
from layerwise.figures.style import LOOKS, Look, look, looks, save, spare, strokes, styled
from layerwise.figures.sweep import along, sweep
from layerwise.results.cell_results import evaluations
from layerwise.results.collect import StudyInputs, collect
from layerwise.results.seeds import repeats
from layerwise.runtime.errors import InputError
from layerwise.storage import frames
from layerwise.storage.frames import column, matching, select, tuples
from layerwise.storage.table_schema import read_table, typed, write_parquet
from tests.support.method_files import UNSOLVED
from tests.support.paths import ROOT
from tests.support.synthetic_tables import (
    EVALUATIONS,
    FAMILIES,
    METHODS,
    STUDY,
    SyntheticCell,
    cell,
    cells_table,
    comparisons_table,
    families,
    layers_table,
    plan,
    traces_table,
    write_cell,
)

TABLES = {
    "cells": cells_table,
    "layers": layers_table,
    "traces": traces_table,
    "comparisons": comparisons_table,
}
DRAW = {
    "perplexity_vs_sparsity": perplexity_vs_sparsity,
    "kl_vs_sparsity": kl_vs_sparsity,
    "perplexity_vs_bits": perplexity_vs_bits,
    "kl_vs_bits": kl_vs_bits,
    "error_along_depth": error_along_depth,
    "error_relative": error_relative,
    "error_reduction": error_reduction,
    "gap_to_bound": gap_to_bound,
    "levels_along_depth": levels_along_depth,
    "metrics_vs_budget": metrics_vs_budget,
    "sweep": sweep,
    "convergence": convergence,
    "method_ranks": method_ranks,
}


ALLOCATIONS = ("uniform", "owl", "knapsack")
SPREAD = [
    cell("dense", "dense"),
    *(
        cell(method, target, allocation=allocation, seed=seed)
        for method in ("wanda", "sparsegpt")
        for target in ("60% row", "70% row", "2:4", "4b g128")
        for allocation in ALLOCATIONS
        for seed in range(2)
        if METHODS[method][3] or target != "4b g128"
    ),
]


def drawn(name: str, cells: list[SyntheticCell]) -> Figure:
    drawing = plot.FIGURES[name]
    return DRAW[name](*(repeats(TABLES[table](cells), table, drawing.repeats) for table in drawing.tables))


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.get_axes() if axes.axison]


def values(axes: Axes, colour: str) -> list[float]:
    """y values of the lines with markers of a colour, gaps left out."""
    lines = [line for line in axes.get_lines() if line.get_color() == colour and line.get_marker() != "None"]
    return [float(y) for line in lines for y in np.asarray(line.get_ydata(), dtype=float) if y == y]


def legend_texts(figure: Figure) -> list[str]:
    (legend,) = [legend for band in figure.subfigs for legend in band.legends]
    return [text.get_text() for text in legend.get_texts() if text.get_text()]


def notes(figure: Figure) -> str:
    return " ".join(legend.get_title().get_text() for band in figure.subfigs for legend in band.legends)


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize(
    "cells",
    [
        plan(),
        pytest.param(plan(tuple(METHODS), models=("demo", "Llama-3.2-1B")), marks=pytest.mark.long),
        pytest.param(plan(("magnitude", "wanda"), ("50% row",), ("shared",)), marks=pytest.mark.long),
        pytest.param(plan(("wanda",), ("2:4",), ("sequential",)), marks=pytest.mark.long),
        pytest.param(plan(("rtn",), ("4b g128",)), marks=pytest.mark.long),
        pytest.param([cell("dense", "dense")], marks=pytest.mark.long),
        [cell(method, "60% row", seed=seed) for method in ("magnitude", "wanda", "ria") for seed in range(3)],
        SPREAD,
        families(),
    ],
    ids=[
        "demo",
        "two-models",
        "one-target",
        "one-pattern",
        "quantised-only",
        "dense-only",
        "seeds",
        "spread",
        "families",
    ],
)
@pytest.mark.filterwarnings("error")
def test_every_figure_draws_every_kind_of_study_without_a_warning(name, cells, tmp_path):
    with styled():
        save(drawn(name, cells), tmp_path / "figure.png", ".png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("name", DRAW)
def test_no_texts_overlap(name):
    with styled():
        figure = drawn(name, plan(tuple(METHODS)))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        for axes in panels(figure):
            titles = [axes.title, axes._left_title, axes._right_title]  # type: ignore[attr-defined]
            ticks = axes.get_xticklabels() if axes.xaxis.get_tick_params().get("labelbottom", True) else []
            for group in (titles, ticks):
                boxes = [text.get_window_extent(renderer) for text in group if text.get_text() and text.get_visible()]
                assert not any(a.overlaps(b) for a, b in pairwise(sorted(boxes, key=lambda box: box.x0)))
        bands = [band.get_tightbbox(renderer) for band in figure.subfigs]
        for above, below in pairwise(bands):
            assert above.y0 >= below.y1 - 0.03, "bands must not run into each other"


def test_a_legend_of_many_groups_stays_in_the_figure():
    groups = ("control", "mask-only", "weight-updating", "quantised", "pruned and quantised", "tuned")
    shown = [(label, "wanda", group) for group in groups for label in (f"one of {group}", f"another of {group}")]
    with styled():
        figure, _ = page([1.0], shown, [Line2D([], [], label="dense")])
        FigureCanvasAgg(figure).draw()
    (legend,) = [legend for band in figure.subfigs for legend in band.legends]
    place, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= place.x0 and place.x1 <= whole.x1 and whole.y0 <= place.y0
    texts = [text for group in groups for text in (group, f"one of {group}", f"another of {group}")]
    assert legend_texts(figure) == [*texts, "dense"]


def test_perplexities_are_those_of_the_table():
    cells = cells_table(plan())
    with styled():
        figure = perplexity_vs_sparsity(cells)
    left, right, *_ = panels(figure)
    own = cells.query("label == 'wanda' and mode == 'shared' and metric == 'perplexity'").set_index("target")["value"]
    assert values(left, LOOKS["wanda"].colour) == pytest.approx(list(own[["50% row", "60% row", "70% row"]]))
    assert values(right, LOOKS["wanda"].colour) == pytest.approx(list(own[["50% layer", "2:4", "4:8"]]))
    assert left.get_yscale() == "log" and len(panels(figure)) == 4
    dense = [line for line in right.get_lines() if line.get_color() == "black"]
    assert [line.get_ydata()[0] for line in dense] == [pytest.approx(12.5)]  # type: ignore[index]
    assert legend_texts(figure) == [
        "control", "random", "mask-only", "magnitude", "wanda", "weight-updating", "sparsegpt", "dense",
        "beyond the axis",
    ]  # fmt: skip


def test_divergences_are_those_of_the_table_and_dense_has_none():
    cells = cells_table(plan(("wanda", "rtn"), ("50% row", "60% row", "70% row", "4b g128"), modes=("shared",)))
    own = cells.query("label == 'wanda' and metric == 'kl'")
    with styled():
        figure, sizes = kl_vs_sparsity(cells), kl_vs_bits(cells)
    (axes,) = panels(figure)
    assert values(axes, LOOKS["wanda"].colour) == pytest.approx(list(own["value"])) and axes.get_yscale() == "log"
    assert axes.get_ylabel() == "KL from dense, nats per token" and "dense" not in legend_texts(figure)
    assert figure.subfigs[0].get_suptitle() == "demo, KL from the dense model on docs, calibrated on docs"
    (axes,) = panels(sizes)
    assert values(axes, LOOKS["wanda"].colour) == pytest.approx(list(own["value"]))
    assert "dense" not in legend_texts(sizes) and len(pareto_front(sized(cells, "kl"))) == len(axes.texts) + 1


def test_the_front_is_what_nothing_beats_in_size_and_perplexity():
    data = sized(cells_table(plan(tuple(METHODS), modes=("shared",))))
    front = pareto_front(data)
    contest = select(data, column(data, "comparison") != "control")
    assert list(front["size"]) == sorted(front["size"]) and list(front["value"]) == sorted(front["value"])[::-1]
    points = tuples(contest, ["cell", "size", "value"])
    for name, *own in points:
        if not np.isnan(own).any():
            better = [other for _, *other in points if all(np.less_equal(other, own)) and any(np.less(other, own))]
            assert (name in set(front["cell"])) == (not better)


def test_the_front_takes_one_of_equals_and_no_control():
    rows = [("a", "mask-only", 2.0, 5.0), ("b", "mask-only", 2.0, 5.0), ("c", "control", 1.0, 1.0)]
    rows += [("d", "quantised", 3.0, 5.0), ("e", "quantised", 3.0, 4.0), ("f", "quantised", 4.0, float("nan"))]
    data = pd.DataFrame(rows, columns=["cell", "comparison", "size", "value"]).assign(target="2:4")
    assert list(pareto_front(data)["cell"]) == ["a", "e"]


def test_a_panel_of_controls_alone_has_no_front():
    with styled():
        figure = perplexity_vs_bits(cells_table([cell("random", "60% row"), cell("wanda", "60% row", "sequential")]))
    assert [len(axes.texts) for axes in panels(figure)] == [0, 1]


def test_a_point_of_the_front_beyond_the_axis_has_its_number_at_the_edge():
    cells = cells_table(plan(("wanda", "rtn"), ("50% row", "4b g128"), ("shared",)))
    cells.loc[(cells["label"] == "rtn") & (cells["metric"] == "perplexity"), "value"] = 1e6  # with the fewest bits
    with styled():
        (axes,) = panels(perplexity_vs_bits(cells))
    size = pareto_front(sized(cells))["size"].iloc[0]
    assert [text.get_text() for text in axes.texts][0] == "1"
    assert axes.texts[0].xy == (size, axes.get_ylim()[1])  # type: ignore[attr-defined]


def test_every_cell_is_drawn_at_its_size_and_perplexity():
    cells = cells_table(plan(("wanda", "rtn"), modes=("shared",)), failed=[("wanda", "2:4", "shared")])
    with styled():
        figure = perplexity_vs_bits(cells)
    (axes,) = panels(figure)
    own = sized(cells).query("label == 'wanda'").dropna(subset="value")
    (line,) = [line for line in axes.get_lines() if line.get_color() == LOOKS["wanda"].colour]
    assert np.asarray(line.get_xydata()) == pytest.approx(own[["size", "value"]].to_numpy(dtype=float))
    front = pareto_front(sized(cells))
    named = ", ".join(
        f"({number}) {'dense' if target == 'dense' else f'{label} {target}'}"
        for number, (label, target) in enumerate(tuples(front, ["label", "target"]), 1)
    )
    assert f"Front: {named}." in notes(figure).replace("\n", " ") and "wanda 2:4 shared (failed)" in notes(figure)


def face(line: Line2D) -> tuple[object, ...]:
    """The look of a marker; clear and white are the same on a white page."""
    fills = (line.get_markerfacecolor(), line.get_markerfacecoloralt() if line.get_fillstyle() != "full" else "")
    return (line.get_color(), line.get_marker(), line.get_fillstyle(), *("white" if f == "none" else f for f in fills))


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_families_at_equal_bits_look_different_and_none_hides_another(metric):
    cells = cells_table(families())
    with styled():
        figure = DRAW[f"{metric}_vs_bits"](cells)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    (axes,) = panels(figure)
    (legend,) = [legend for band in figure.subfigs for legend in band.legends]
    handles = [line for line in legend.get_lines() if line.get_marker() not in ("None", "", 6)]
    named = {face(line): line.get_label() for line in handles}
    shown = {(label, comparison) for label, _, comparison, *_ in FAMILIES}
    assert len(named) == len(handles) == len(shown) + (metric == "perplexity"), "each entry must have its own look"
    lines = [line for line in axes.get_lines() if line.get_marker() not in ("None", 6) and np.size(line.get_xdata())]
    assert {face(line) for line in lines} == named.keys()
    methods = [line for line in lines if line.get_color() != "black"]
    order = [line.get_markersize() for line in sorted(methods, key=lambda line: line.get_zorder())]
    assert order == sorted(order)[::-1] and len(set(order)) > 1, "small markers must be above large ones"
    clear = {line.get_markerfacecoloralt() for line in methods if line.get_fillstyle() != "full"}
    clear |= {line.get_markerfacecolor() for line in methods} - {line.get_color() for line in methods}
    assert clear == {"none"}, "what a marker covers must be seen through it"
    numbers = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in combinations(numbers, 2))
    front = tuples(pareto_front(sized(cells, metric)), ["label", "target", "value"])
    names = ["dense" if target == "dense" else f"{label} {target}" for label, target, value in front if value]
    note = notes(figure).replace("\n", " ")
    assert len(names) >= 4 and all(f"({number}) {name}" in note for number, name in enumerate(names, 1))


def test_the_cells_of_families_are_at_equal_bits():
    sizes = sized(cells_table(families()))
    for size in (6.4, 4.16):
        near = select(sizes, (column(sizes, "size") / size - 1).abs() < 0.02)
        assert {"low rank", "sparse factor", "sum of parts", "weight-updating"} <= set(near["comparison"])


def test_the_lowest_tick_is_near_the_best_cells():
    with styled():
        figure = perplexity_vs_bits(cells_table(families()))
    (axes,) = panels(figure)
    low, high = axes.get_ylim()
    assert min(tick for tick in axes.get_yticks() if low <= tick <= high) < 1.4 * low


def test_a_failed_cell_is_a_gap_and_is_said():
    with styled():
        figure = perplexity_vs_sparsity(cells_table(plan(), failed=[("wanda", "60% row", "shared")]))
    left = panels(figure)[0]
    assert len(values(left, LOOKS["wanda"].colour)) == 2 and len(values(left, LOOKS["magnitude"].colour)) == 3
    (line,) = [line for line in left.get_lines() if line.get_color() == LOOKS["wanda"].colour]
    assert np.isnan(np.asarray(line.get_ydata(), dtype=float)[1]), "no line may be drawn across the gap"
    assert "wanda 60% row shared (failed)" in notes(figure)
    assert "Not drawn" not in notes(perplexity_vs_sparsity(cells_table(plan())))


def test_the_control_does_not_squeeze_the_methods():
    cells = cells_table(plan())
    cells.loc[(cells["label"] == "random") & (cells["metric"] == "perplexity"), "value"] = 1e6
    with styled():
        axes = panels(perplexity_vs_sparsity(cells))[0]
    assert axes.get_ylim()[1] < 1000
    assert any(line.get_marker() == 6 for line in axes.get_lines())


@pytest.mark.parametrize(
    "name", ["perplexity_vs_sparsity", "kl_vs_sparsity", "perplexity_vs_bits", "kl_vs_bits", "sweep"]
)
@pytest.mark.parametrize("worse", [False, True])
def test_the_legend_explains_the_mark_of_what_is_beyond_the_axis(name, worse):
    targets = ("50% row", "60% row", "70% row")
    cells = cells_table(plan(("random", "wanda", "sparsegpt"), targets, ("shared",))).assign(swept="sparsity")
    measured = cells["metric"].isin(["perplexity", "kl"])
    cells.loc[measured, "value"] = 3.0
    outlier = "random" if "vs_sparsity" in name else "wanda"  # only a control may leave the axis of sparsities
    cells.loc[measured & (cells["label"] == outlier) & (cells["target"] == "70% row") & worse, "value"] = 1e9
    with styled():
        figure = DRAW[name](cells)
    marked = any(line.get_marker() == 6 for axes in panels(figure) for line in axes.get_lines())
    assert marked is worse and ("beyond the axis" in legend_texts(figure)) is worse


def test_errors_are_those_of_the_table_at_60_percent():
    layers = layers_table(plan())
    with styled():
        figure = error_along_depth(layers)
    assert [axes._left_title.get_text() for axes in panels(figure)][:7] == [  # type: ignore[attr-defined]
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    own = layers.query("label == 'sparsegpt' and mode == 'shared' and target == '60% row' and kind == 'o_proj'")
    assert not values(panels(figure)[3], LOOKS["sparsegpt"].colour)  # the masks' band
    assert values(panels(figure)[7 + 3], LOOKS["sparsegpt"].colour) == pytest.approx(list(own["output_error"]))


def test_experts_of_a_block_are_averaged():
    layers = layers_table([cell("wanda", "60% row")], blocks=2)
    twice = pd.concat([layers, layers.assign(output_error=3 * layers["output_error"])])
    with styled():
        axes = panels(error_along_depth(twice))[0]
    own = layers.loc[layers["kind"] == "q_proj", "output_error"]
    assert values(axes, LOOKS["wanda"].colour) == pytest.approx(list(2 * own))


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (("50% row", "60% row", "70% row"), "60% row"),
        (("70% row", "2:4", "50% row"), "50% row"),
        (("4b g128", "70% row"), "70% row"),
        (("4b g128",), "4b g128"),
    ],
)
def test_the_target_shown_along_depth(targets, chosen):
    assert chosen_target(layers_table(plan(("sparsegpt",), targets), blocks=1)) == chosen


def test_ratios_are_to_the_same_layer_target_and_mode():
    layers = layers_table(plan())
    found = ratios(layers, "magnitude")
    assert "magnitude" not in set(found["label"])
    row = found.query("label == 'wanda' and target == '2:4' and mode == 'sequential'").iloc[5]
    same = layers.query("label == 'magnitude' and target == '2:4' and mode == 'sequential'")
    base = same.loc[same["layer"] == row["layer"], "output_error"].item()
    assert row["ratio"] == pytest.approx(row["output_error"] / base)
    assert ratios(select(layers, column(layers, "label") != "wanda"), "wanda").empty


def test_relative_errors_leave_out_quantisation_and_say_a_missing_reference():
    layers = layers_table(plan())
    with styled():
        figure = error_relative(layers)
        without = error_relative(select(layers, column(layers, "label") != "wanda"))
    assert "rtn" not in legend_texts(figure)
    assert [tick.get_text() for tick in panels(figure)[1].get_xticklabels()] == [
        "50% row", "60% row", "70% row", "50% layer", "2:4", "4:8"
    ]  # fmt: skip
    # Its panel is left out, and the title says so.
    assert [axes.get_ylabel() for axes in panels(without)] == ["error /\nmagnitude's"] * 2
    titles = [band.get_suptitle() for band in without.subfigs[:-1]]
    assert all(title.endswith(" (no errors of wanda to compare with)") for title in titles)


def test_error_saved_over_wanda_has_a_band_per_comparison():
    layers = layers_table(plan(("magnitude", "wanda", "ria", "sparsegpt"), ("60% row",), ("shared",)))
    with styled():
        figure = error_reduction(layers)
    titles = [band.get_suptitle() for band in figure.subfigs[:-1]]
    assert [title.rsplit(", ", 1)[1] for title in titles] == ["mask-only", "weight-updating"]
    masks, updating = panels(figure)[:7], panels(figure)[7:]
    assert not any(values(axes, LOOKS["sparsegpt"].colour) for axes in masks)
    assert not any(values(axes, LOOKS["ria"].colour) for axes in updating)
    own, base = (layers.query(f"label == '{label}' and kind == 'o_proj'")["output_error"] for label in ("ria", "wanda"))
    assert values(masks[3], LOOKS["ria"].colour) == pytest.approx(list(1 - own.to_numpy() / base.to_numpy()))
    assert "wanda" not in legend_texts(figure)
    assert {axes.get_ylabel() for axes in panels(figure)} == {"", "error saved\nover Wanda"}


def test_gaps_are_those_of_the_table():
    layers = layers_table(plan(("magnitude", "wanda", "sparsegpt"), ("60% row", "2:4"), ("shared", "sequential")))
    layers.loc[layers["label"] == "wanda", "gap_to_bound"] = 0.25
    with styled():
        figure = gap_to_bound(layers.assign(gap_to_bound=layers["gap_to_bound"].where(layers["mode"] == "shared")))
    (axes,) = panels(figure)
    assert set(values(axes, LOOKS["wanda"].colour)) == {0.25}
    assert "sparsegpt" not in legend_texts(figure) and axes.get_ylim() == (0, 1)


def test_convergence_shows_one_layer_in_units_of_output_error():
    cells = plan(("wanda", "sparse_swaps", "alps"), ("50% row", "60% row"), ("shared",))
    layers, traces = layers_table(cells), traces_table(cells)
    traces = select(traces, column(traces, "label") != "wanda")
    own = traces["label"] == "alps"
    with styled():
        both = convergence(traces, layers)
        masks = convergence(traces.assign(criterion=traces["criterion"].where(~own, "own")), layers)
    assert len(panels(both)) == 4 and len(panels(masks)) == 2 and "alps" not in legend_texts(masks)
    part = layers.query("label == 'sparse_swaps' and target == '60% row'")
    traced = layers.query("label in ('sparse_swaps', 'alps') and target == '60% row'")
    chosen = part[part["layer"] == typical_layer(traced)].iloc[0]
    assert chosen["layer"] in both.subfigs[0].get_suptitle()
    for axes in panels(both)[:2]:
        line, end, bound = axes.get_lines()
        steps = [chosen["output_error"] * factor for factor in (2.5, 1.5, 1)]
        assert list(np.asarray(line.get_ydata())) == pytest.approx(steps)
        assert list(np.asarray(end.get_ydata())) == [pytest.approx(chosen["output_error"])]
        height = np.asarray(bound.get_ydata())[0]
        assert height == pytest.approx(chosen["lower_bound"]) and bound.get_color() == BOUND["color"]
    assert notes(both) == ""
    relaxed = traces["criterion"].where(traces["label"] != "sparse_swaps", "relaxed error")
    note = "A line of sparse_swaps is the error of a relaxed mask; the marker at its end is the error of the result."
    assert notes(convergence(traces.assign(criterion=relaxed), layers)).replace("\n", " ") == note
    assert len(panels(both)[2].get_lines()) == 2  # a bound on masks says nothing of methods that update weights


@pytest.mark.filterwarnings("error")
def test_convergence_of_methods_that_made_no_step_or_left_no_trace_of_the_layer():
    cells = plan(("sparse_swaps", "alps"), ("60% row",), ("shared",))
    layers, traces = layers_table(cells), traces_table(cells)
    typical = typical_layer(select(layers, column(layers, "target") != "dense"))
    absent = (column(traces, "label") == "alps") & (column(traces, "layer") == typical)
    with styled():
        assert len(panels(convergence(select(traces, (column(traces, "iteration") == 0) & ~absent), layers))) == 4


def test_a_sweep_of_a_target_has_a_line_per_method_and_a_band_per_pattern():
    cells = cells_table(plan(("wanda", "sparsegpt"), ("50% row", "60% row", "70% row", "2:4"), ("shared",)))
    with styled():
        figure = sweep(cells)
    titles = [band.get_suptitle() for band in figure.subfigs[:-1]]
    assert titles == ["demo, shared calibration on docs, row, perplexity on docs", titles[1]] and "2:4" in titles[1]
    error, perplexity, *_ = panels(figure)
    for axes, metric in ((error, "mean_output_error"), (perplexity, "perplexity")):
        own = cells.query(f"label == 'wanda' and pattern == 'row' and metric == '{metric}'").sort_values("sparsity")
        assert values(axes, LOOKS["wanda"].colour) == pytest.approx(list(own["value"]))
    assert [tick.get_text() for tick in error.get_xticklabels()] == ["50%", "60%", "70%"]


def test_a_sweep_of_a_parameter_has_a_level_line_for_who_lacks_it():
    swept = [cell("sparse_swaps", "60% row", label=f"sparse_swaps.swaps_{swaps}") for swaps in (1, 10, 100)]
    cells = cells_table([cell("dense", "dense"), cell("wanda", "60% row"), *swept]).assign(swept="swaps")
    own = cells["label"].str.extract(r"swaps_(\d+)$")[0]
    cells["params"] = [f'{{"swaps":{swaps}}}' if isinstance(swaps, str) else "{}" for swaps in own]
    found = along(matching(cells, metric="perplexity"), "swaps")
    assert list(found["label"]) == ["dense", "wanda", *["sparse_swaps"] * 3]
    with styled():
        figure = sweep(cells)
    axes = panels(figure)[1]
    assert axes.get_xscale() == "log" and len(values(axes, LOOKS["sparse_swaps"].colour)) == 3
    level = cells.query("label == 'wanda' and metric == 'perplexity'")["value"].item()
    (line,) = [line for line in axes.get_lines() if line.get_color() == LOOKS["wanda"].colour]
    assert list(np.asarray(line.get_ydata())) == [level, level] and legend_texts(figure)[-1] == "dense"


@pytest.mark.parametrize("swept", ["group", "calibration_samples", "calibration_length", "calibration_seed"])
def test_a_sweep_of_integers_is_drawn_where_some_have_no_value(swept):
    """Columns of integers that may be empty, as they are read: of a cell that failed nothing is known."""
    cells = cells_table(plan(("wanda",), ("60% row",), ("shared",)))
    many = [cells.assign(swept=swept, **{swept: value, "cell": f"c{value}"}) for value in (16, 32, 64)]
    lost = cells.assign(swept=swept, value=None, status="failed", reason="out of memory", **{swept: None})
    table = pd.concat([*many, lost])
    table[swept] = table[swept].astype("Int64")
    with styled():
        axes = panels(sweep(table))[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["16", "32", "64"]


def test_a_sweep_of_texts_has_places_and_no_lines():
    cells = cells_table(plan(("wanda",), ("60% row",), ("shared",)))
    other = cells[cells["label"] == "wanda"].assign(calibration="other")
    with styled():
        axes = panels(sweep(pd.concat([cells, other]).assign(swept="calibration")))[0]
        none = sweep(cells.assign(swept=None))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["docs", "other"]
    assert {line.get_linestyle() for line in axes.get_lines()} == {"None"}
    assert "The study sweeps nothing" in none.texts[0].get_text()


def test_the_typical_layer_is_the_one_of_the_median_error():
    layers = pd.DataFrame({"layer": list("abcab"), "output_error": [0.5, 0.1, 0.1, 0.7, 0.3]})
    assert typical_layer(layers) == "b"


def test_known_methods_differ_in_look_and_unknown_ones_are_stable():
    assert len(set(LOOKS.values())) == len(LOOKS)
    families = (
        ("magnitude", "wanda", "ria", "dsnot", "sparse_swaps", "frank_wolfe"),
        ("sparsegpt", "alps", "admm", "awp", "reconstruct"),
        ("rtn", "gptq", "awq", "gqsa"),
        ("rtn", "awq", "gptq", "gptaq", "foem", "qronos", "code_swaps", "turboquant"),
    )
    for family in families:
        assert len({LOOKS[method].colour for method in family}) == len(family)
        assert len({LOOKS[method].marker for method in family}) >= len(family) - 1
    assert look("brand_new") == look("brand_new") != look("other_new")


def test_a_method_from_elsewhere_has_a_colour_of_its_own_or_that_of_its_card(tmp_path):
    own = {"colour": "#123456", "marker": "H"}
    (tmp_path / "told.py").write_text(UNSOLVED.replace('    "needs"', f'    "look": {own},\n    "needs"'))
    others = [f"other_{number}" for number in range(4)]
    for name in others:
        (tmp_path / f"{name}.py").write_text(UNSOLVED)
    with styled([tmp_path]):
        assert look("told") == ("#123456", "H")
        chosen = [look(name) for name in others]
        assert {name: look(name) for name in LOOKS} == LOOKS
    colours = {one.colour for one in chosen}
    assert len(colours) == len(others) and not colours & {one.colour for one in LOOKS.values()}
    with styled([tmp_path]):
        assert [look(name) for name in others] == chosen
    assert look("told") != ("#123456", "H")  # the next figure knows its own study alone


def test_spare_looks_do_not_run_out():
    taken: list[Look] = []
    for number in range(56):
        taken.append(spare(f"method_{number}", taken))
    assert len(set(taken)) == 56


def test_entries_of_one_method_share_its_colour():
    found = looks([("wanda.alpha_1", "wanda"), ("wanda", "wanda"), ("magnitude", "magnitude")])
    assert found["wanda"] == LOOKS["wanda"]
    assert found["wanda.alpha_1"].colour == LOOKS["wanda"].colour
    assert found["wanda.alpha_1"].marker != LOOKS["wanda"].marker


def test_entries_of_one_method_have_markers_of_their_own():
    for method in ("chain", "awp", "brand_new"):
        found = looks([(f"{method}-{number}", method) for number in range(8)])
        assert len({own.marker for own in found.values()}) == 8


def test_weight_updating_methods_are_open_and_dashed():
    own = LOOKS["sparsegpt"]
    updating, masking = strokes(own, "weight-updating"), strokes(own, "mask-only")
    assert updating["markerfacecolor"] == "white" and updating["linestyle"] != "-"
    assert masking["markerfacecolor"] == own.colour and masking["linestyle"] == "-"
    halves = [strokes(own, group)["fillstyle"] for group in ("low rank", "sum of parts", "pruned and quantised")]
    assert len({*halves, updating["fillstyle"]}) == 4


SEEDS = [cell(method, "60% row", seed=seed) for method in METHODS for seed in range(3) if METHODS[method][2]]


def test_ranks_are_those_of_brute_force():
    layers, pairs = layers_table(SEEDS), comparisons_table(SEEDS)
    masks, updates = groups(pairs, layers)
    assert [masks.comparison, updates.comparison] == ["mask-only", "weight-updating"]
    ranks: dict[str, list[float]] = {}
    for _, place in frames.groups(matching(layers, comparison="mask-only"), ["seed", "layer"]):
        for label, error in tuples(place, ["label", "output_error"]):
            ranks.setdefault(label, []).append(1 + int((place["output_error"] < error).sum()))
    assert dict(masks.ranks) == pytest.approx({label: np.mean(numbers) for label, numbers in ranks.items()})
    assert list(masks.ranks.index) == ["sparse_swaps", "ria", "wanda", "magnitude"]
    told = pairs[(pairs["comparison"] == "mask-only") & (pairs["verdict"] != "no difference shown")]
    assert masks.different == {frozenset(pair) for pair in zip(told["label"], told["other"], strict=True)}
    assert frozenset(("magnitude", "wanda")) in masks.different


def test_a_bar_joins_methods_without_a_shown_difference():
    layers, pairs = layers_table(SEEDS), comparisons_table(SEEDS)
    pairs["verdict"] = "worse"
    pairs.loc[(pairs["label"] == "wanda") & (pairs["other"] == "ria"), "verdict"] = "no difference shown"
    masks, updates = groups(pairs, layers)
    assert masks.bars() == [(1, 2)] and updates.bars() == []
    with styled():
        (axes,) = panels(method_ranks(pairs, layers))
    bars = [line for line in axes.get_lines() if line.get_linewidth() == 2.5]
    labels = dict(zip(axes.get_yticks(), (text.get_text().split()[0] for text in axes.get_yticklabels()), strict=True))
    low, high = bars[0].get_ydata()  # type: ignore[misc]
    assert len(bars) == 1 and [label for place, label in labels.items() if low < place < high] == ["ria", "wanda"]


def test_figures_of_one_number_draw_the_mean_over_the_seeds():
    cells, layers = cells_table(SEEDS), layers_table(SEEDS)
    mean = repeats(layers, "layers", "mean")
    assert len(mean) == len(layers) / 3 and list(mean.columns) == list(layers.columns)
    name = layers["layer"].iloc[9]
    here = (layers["layer"] == name) & (layers["label"] == "ria")
    own = mean[(mean["layer"] == name) & (mean["label"] == "ria")]["output_error"]
    assert own.item() == pytest.approx(layers.loc[here, "output_error"].mean())
    assert set(repeats(layers, "layers", "first")["seed"]) == {0} and repeats(layers, "layers", "all") is layers
    cells.loc[(cells["label"] == "wanda") & (cells["seed"] == 1), ["value", "status", "reason"]] = [
        None,
        "failed",
        "no",
    ]
    found = repeats(cells, "cells", "mean").set_index(["label", "metric"])
    assert len(found) == len(cells) / 3
    assert found.loc[("wanda", "perplexity"), ["status", "reason"]].tolist() == ["failed", "no"]
    assert pd.isna(found.loc[("wanda", "perplexity"), "value"])
    ria = cells[(cells["label"] == "ria") & (cells["metric"] == "perplexity")]["value"]
    assert found.loc[("ria", "perplexity"), "value"] == pytest.approx(ria.mean())


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_has_a_caption(name):
    assert list(DRAW) == list(plot.FIGURES)
    assert len((ROOT / "workflow" / "report" / f"{name}.rst").read_text().split()) > 30


def test_levels_are_a_line_per_allocation_at_the_middle_budget():
    with styled():
        figure = drawn("levels_along_depth", SPREAD)
    assert legend_texts(figure) == list(ALLOCATIONS)
    first = panels(figure)[0]
    lines = {line.get_label(): line for line in first.get_lines()}
    assert len(lines) == 3 and len(panels(figure)) == 7
    uniform, owl, _ = first.get_lines()
    assert set(np.asarray(uniform.get_ydata())) == {0.6}
    assert list(np.asarray(owl.get_ydata())) == pytest.approx([0.6 + 0.2 * (block / 8 - 0.5) for block in range(8)])


def test_perplexity_and_kl_stand_against_the_budget():
    with styled():
        figure = drawn("metrics_vs_budget", SPREAD)
    titles = [axes.get_title("left") for axes in panels(figure) if axes.get_title("left")]
    assert titles == ["wanda", "sparsegpt"] * 2 + ["sparsegpt"]  # zeros of rows, n:m, bits
    top = panels(figure)[0]
    assert [len(np.asarray(line.get_xdata())) for line in top.get_lines()] == [2, 2, 2]
    assert list(np.asarray(top.get_lines()[0].get_xdata())) == [0.6, 0.7]


def test_lines_of_a_budget_are_means_of_the_seeds_whose_range_is_shaded():
    with styled():
        top = panels(drawn("metrics_vs_budget", SPREAD))[0]
    table = cells_table(SPREAD)
    wanda = table[(table["label"] == "wanda") & (table["metric"] == "perplexity")]
    for place, name in enumerate(ALLOCATIONS):
        values = [
            wanda[(wanda["allocation"] == name) & (wanda["sparsity"] == share) & (wanda["pattern"] == "row")]["value"]
            for share in (0.6, 0.7)
        ]
        assert [len(own) for own in values] == [2, 2]
        assert list(np.asarray(top.get_lines()[place].get_ydata())) == pytest.approx([own.mean() for own in values])
        band, bars = (top.collections[2 * place + part] for part in (0, 1))
        assert set(np.asarray(band.get_paths()[0].vertices)[:, 1]) == {end(own) for own in values for end in (min, max)}
        assert isinstance(bars, LineCollection)
        assert [list(bar[:, 1]) for bar in bars.get_segments()] == [[min(own), max(own)] for own in values]


def test_one_seed_has_no_range():
    with styled():
        top = panels(drawn("metrics_vs_budget", [own for own in SPREAD if own.columns["seed"] == 0]))[0]
    assert len(top.get_lines()) == 3 and not top.collections


def test_levels_of_pairs_are_bits_per_weight():
    pairs = [cell("sparsegpt", "50% row 4b g128", allocation=name) for name in ("uniform", "knapsack")]
    with styled():
        levels, metrics = (panels(drawn(name, pairs)) for name in ("levels_along_depth", "metrics_vs_budget"))
    assert levels[0].get_ylabel() == "bits per weight"
    assert metrics[-1].get_xlabel() == "zeros of every row, at 4b g128"


@pytest.mark.parametrize(
    ("targets", "unit", "ticks"),
    [
        (("rank 30%", "rank 40%"), "rank", ["30%", "40%"]),
        (("rank 40% 4b g64",), "rank, factors of 4b g64", ["40%"]),
        (("50% row rank 20%",), "zeros of every row, at rank 20%", ["50%"]),
        (("4b rank 10%",), "bits, at rank 10%", ["4"]),
        (("2:4 rank 10%",), "zeros of n:m patterns, at rank 10%", ["50%"]),
    ],
)
def test_budgets_with_a_rank_are_bits_per_weight_along_depth_and_named_by_what_varies(targets, unit, ticks):
    spread = [cell("oats", target, allocation=name) for target in targets for name in ("uniform", "knapsack")]
    with styled():
        levels, metrics = (panels(drawn(name, spread)) for name in ("levels_along_depth", "metrics_vs_budget"))
    assert {axes.get_ylabel() for axes in levels} == {"bits per weight", ""}
    assert not any("%" in text.get_text() for axes in levels for text in axes.get_yticklabels())
    assert metrics[-1].get_xlabel() == unit
    assert [text.get_text() for text in metrics[-1].get_xticklabels()] == ticks


def test_other_figures_keep_spread_budgets_off_the_lines_of_equal_levels():
    with styled():
        figure = drawn("perplexity_vs_sparsity", SPREAD)
    labels = {text.get_text() for axes in panels(figure) for text in axes.get_xticklabels()}
    assert "60%\nrow\nowl" in labels and {"60%", "70%"} <= labels


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    cells = plan(("magnitude", "wanda", "sparsegpt"), ("50% row", "2:4"), ("shared",))
    for one in cells:
        write_cell(root, one)
    collect(StudyInputs(cells, [], evaluations(STUDY, EVALUATIONS)), root / "tables", root=root)
    return root / "tables"


def test_the_same_table_gives_the_same_bytes_in_another_process(tables, tmp_path):
    names = [f"error_relative{suffix}" for suffix in plot.SUFFIXES]
    for folder, seed in (("a", "1"), ("b", "2")):
        out = [str(tmp_path / folder / name) for name in names]
        command = [sys.executable, "-m", "layerwise.figures.plot", "error_relative", "--tables", str(tables), "--out"]
        environment = {"PYTHONHASHSEED": seed, "PATH": "", "HOME": str(tmp_path), "SOURCE_DATE_EPOCH": seed}
        subprocess.run([*command, *out], check=True, cwd=ROOT, env=environment)
    for name in names:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second, name
        assert b"CreationDate" not in first and b"<dc:date>" not in first


def test_a_figure_takes_the_look_of_a_card_in_the_studys_folder(tables, tmp_path):
    data = read_table(tables, "layers")
    for name in ("label", "method"):
        data[name] = data[name].replace("magnitude", "mine")
    table = typed(pa.Table.from_pandas(data, preserve_index=False), "layers", "test")
    write_parquet(table, tmp_path / "layers.parquet")
    file, out = tmp_path / "mine.py", tmp_path / "figure.svg"
    command = ["error_relative", "--tables", str(tmp_path), "--out", str(out)]
    file.write_text(UNSOLVED.replace('    "needs"', '    "look": {"colour": "#12ab56", "marker": "H"},\n    "needs"'))
    plot.main(command)
    assert "#12ab56" not in out.read_text()
    plot.main([*command, "--method-path", str(tmp_path)])
    assert "#12ab56" in out.read_text()
    file.write_text(UNSOLVED.replace('    "needs"', '    "look": {"colour": "red", "marker": "H"},\n    "needs"'))
    with pytest.raises(InputError, match=r"mine.py: CARD\['look'\]\['colour'\] is wrong"):
        plot.main([*command, "--method-path", str(tmp_path)])


def test_a_wrong_suffix_is_a_sentence(tables, tmp_path):
    with pytest.raises(InputError, match=r"\.pdf, \.svg, \.png"):
        plot.main(["error_relative", "--tables", str(tables), "--out", str(tmp_path / "figure.gif")])


def test_naming_the_figures_needs_no_drawing_library():
    code = "import sys, layerwise.figures.plot; sys.exit('matplotlib' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
