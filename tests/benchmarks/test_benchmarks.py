"""The benchmarks' list of cases is whole, its baselines do what the methods do, and a run becomes tables."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.calibrate import shared
from layerwise.checks.brute_force import output_error
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.layer import Gram
from layerwise.storage import frames
from tests.benchmarks import bench_first_tokens, bench_memory, bench_model, bench_penalty, suite, summary
from tests.benchmarks.suite import CASES, Case
from tests.support.model_families import build, tokens
from tests.support.typing_helpers import some

METHODS = Catalogue()
# Where the method goes on to its best where the published loop, of which a part is timed, is still under way.
APART = {"frank_wolfe 60% row, pairwise": 0.15, "frank_wolfe 60% row, published": 0.02}
FACTS = {"compared": True, "threads": 2, "load": 0.5}


def test_every_method_has_a_case_or_a_reason():
    timed = {case.method for case in CASES.values()}
    assert timed | suite.UNTIMED.keys() == set(METHODS) and not timed & suite.UNTIMED.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_case_s_method_meets_its_target(name: str):
    case = CASES[name]
    assert METHODS[case.method].class_name == type(case.built).__name__
    assert METHODS[case.method].refusal(case.target) is None


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.baseline])
def test_a_baseline_does_what_the_method_does(name: str):
    case = CASES[name]
    layer = suite.first_rows(suite.layer_of(64, 128), case.few or case.rows)
    theirs = some(case.baseline)(layer)
    weight = theirs if isinstance(theirs, torch.Tensor) else theirs.weight
    ours, published = (float(output_error(layer, w)) for w in (case.compress(layer).weight, weight))
    assert 0 < ours == pytest.approx(published, rel=APART.get(name, 0.01))
    if case.target.bits is None:  # on a grid what is kept may be zero too
        assert float((weight == 0).float().mean()) == pytest.approx(case.target.sparsity, abs=0.01)


def test_timed_cases_depend_on_the_size():
    assert suite.shapes("") == {
        (512, 512): True,
        (1024, 512): False,
        (512, 1024): False,
        (1024, 1024): True,
        (2048, 1024): False,
        (1024, 2048): False,
        (2048, 2048): True,
        (4096, 4096): True,
        (11008, 4096): True,
    }
    assert suite.shapes("256 96x32") == {(96, 32): True, (256, 256): True}
    alps, reconstruct = CASES["alps 50% layer"], CASES["reconstruct 50% row"]
    assert alps.left_out(2048, 2048) is None and "60 s" in some(alps.left_out(4096, 4096))
    assert reconstruct.left_out(2048, 1024) and reconstruct.left_out(1024, 2048) is None


def entry(case: Case, out: int, inputs: int, seconds: float, baseline: list[float]) -> dict:
    """One of pytest-benchmark's entries, with a floor of half the seconds."""
    named = {"case": case.name, "out": out, "in": inputs, "floor": [seconds / 2], "baseline": baseline}
    return {"stats": {"median": seconds, "rounds": 3}, "extra_info": named | FACTS | {"compared": bool(baseline)}}


@pytest.fixture
def run() -> dict:
    wanda, gptq = CASES["wanda 50% row"], CASES["gptq 4 bits g128"]
    shapes = suite.shapes("512 1024 2048")
    entries = [
        entry(case, out, inputs, 1e-9 * out * inputs**power, [6e-9 * out * inputs**power] if compared else [])
        for case, power in ((gptq, 2), (wanda, 1))
        for (out, inputs), compared in shapes.items()
    ]
    machine = {"machine_info": {"cpu": {"brand_raw": "A processor"}}, "datetime": "2026-01-02T03:04"}
    return {"benchmarks": entries, "commit_info": {"id": "0123456789abcdef", "dirty": True}, **machine}


def test_ratios_and_exponents(run: dict):
    table = summary.read(run)
    assert list(table["case"].unique()) == ["wanda 50% row", "gptq 4 bits g128"]  # the suite's order
    assert np.allclose(table["to_floor"], 2) and np.allclose(table["gain"].dropna(), 6)
    assert frames.column(table, "gain").notna().sum() == 6 and len(table) == 14
    gptq = frames.matching(table, case="gptq 4 bits g128")
    assert summary.exponent(gptq, "in", "seconds") == pytest.approx(2)
    assert summary.exponent(gptq, "out", "floor_seconds") == pytest.approx(1)
    assert np.isnan(summary.exponent(frames.select(gptq, frames.column(gptq, "in") < 2048), "in", "seconds"))


def test_the_page_of_tables(run: dict):
    page = summary.markdown(summary.read(run), run, "make benchmark")
    assert "A processor, 2 threads, load 0.5 to 0.5" in page and "2026-01-02, commit 0123456789 with changes" in page
    assert "|  | 512 | 1024 | 2048 |\n" in page and "| wanda 50% row | 6.00 | 6.00 | 6.00 |\n" in page
    assert "| gptq 4 bits g128 | 2.00 | 2.00 | 1.00 | 1.00 |\n" in page
    assert "1024 x 512" not in page  # which serves the exponents alone
    one = {**run, "benchmarks": [item for item in run["benchmarks"] if item["extra_info"]["in"] == 512]}
    assert "Growth" not in summary.markdown(summary.read(one), one, "make benchmark")


def test_the_figure_has_every_case_and_size(run: dict):
    figure = summary.drawn(summary.read(run))
    gain, to_floor = figure.axes
    assert [label.get_text() for label in gain.get_yticklabels()] == ["wanda 50% row", "gptq 4 bits g128"]
    assert [line.get_label() for line in to_floor.lines][:3] == ["512", "1024", "2048"]
    assert all(set(np.asarray(line.get_xdata()).tolist()) == {2.0} for line in to_floor.lines[:3])


def test_minutes_of_a_model_from_some_of_its_blocks(capsys):
    few = ["--shape", "tiny", "--samples", "2", "--length", "16", "--device", "cpu", "--threads", "1"]
    bench_model.main([*few, "--methods", "wanda", "sparse_swaps:swaps=2,warm_start=magnitude"])
    *_, head, _, wanda, swaps, _, about = capsys.readouterr().out.splitlines()
    assert head.count("|") == wanda.count("|") == swaps.count("|") and "sparse_swaps:swaps=2" in swaps
    assert about.startswith("tiny, 5 blocks from 2, 2 x 16 tokens, 50% row, bfloat16; ")
    first, slow, fast = (bench_model.Phases(seconds, 2 * seconds, 0.0) for seconds in (50.0, 4.0, 2.0))
    measured = bench_model.Measured("method", first, [slow, fast], 1.0, None)
    assert measured.minutes(40) == (40 * 9 / 60, 40 * 6 / 60)
    with pytest.raises(SystemExit):
        bench_model.main([*few, "--blocks", "1"])


def test_whole_runs_of_alps_and_admm_end_where_the_released_loops_do(capsys):
    bench_penalty.main(["96x160", "--rounds", "1", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == ["admm:", "alps:"]
    for line in lines:
        ours, released = (float(error) for error in line.split("errors ")[1].split(", "))
        assert 0 < ours == pytest.approx(released, rel=0.01)


def test_a_peak_is_fitted_from_above():
    assert {case.method for case in suite.CASES.values()} > bench_memory.SINGLE
    fitted = bench_memory.fitted
    assert fitted([(400, 100, 900.0), (100, 400, 600.0)]) == (2.0, 1.0)
    w, g = fitted([(400, 100, 900.0), (100, 400, 600.0), (200, 200, 640.0)])
    assert all(w * a + g * b >= measured for a, b, measured in ((400, 100, 900), (100, 400, 600), (200, 200, 640)))


def test_first_tokens_weigh_in_a_gram_what_they_are_given():
    taps = [tap for block in shared(Stream(build("llama"), tokens(3))) for tap in block]
    for tap in taps:
        first = some(tap.statistics.first_tokens)
        alone, none = bench_first_tokens.weighted(tap, 1.0).matrix, bench_first_tokens.weighted(tap, 0.0).matrix
        assert len(first) == 3 and torch.equal(none, tap.gram.matrix)
        np.testing.assert_allclose(alone, np.einsum("si,sj->ij", first, first) / 3, atol=1e-5)


def test_grams_without_first_tokens_and_with_them_make_up_the_whole():
    model, text = build("llama"), tokens(3)
    taps = [tap for block in shared(Stream(model, text)) for tap in block]
    others = bench_first_tokens.without_first(model, taps, text)
    for tap in taps:
        rest, first = others[tap.layers[0]], some(tap.statistics.first_tokens)
        assert rest.tokens == tap.gram.tokens - 3
        whole = (rest.tokens * rest.matrix + first.T @ first) / tap.gram.tokens
        np.testing.assert_allclose(whole, tap.gram.matrix, rtol=1e-4, atol=1e-5)


def test_errors_leave_out_what_they_say():
    """Against products with the inputs themselves."""
    [tap] = [tap for block in shared(Stream(build("llama"), tokens(3))) for tap in block][:1]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(6, 10, 16, generator=generator) + 2  # [sequences, length, in]
    flat = inputs.flatten(0, 1)
    own = replace(tap.statistics, length=10, first_tokens=inputs[:, 0])
    tap = replace(tap, gram=Gram(flat.T @ flat / len(flat), len(flat)), statistics=own)
    later = inputs[:, 1:].flatten(0, 1)
    others = Gram(later.T @ later / len(later), len(later))
    dense, weight = torch.randn(2, 8, 16, generator=generator)
    without, share = bench_first_tokens.without_direction(tap.gram)
    errors = bench_first_tokens.errors_of(tap, (others, without), "layer", dense, weight)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    rest = flat - s[0] * u[:, :1] @ v[:1]

    def error(x: torch.Tensor) -> float:
        return float((x @ (dense - weight).T).square().sum() / (x @ dense.T).square().sum())

    true = [error(x) for x in (flat, inputs[:, 0], later, rest)]
    assert list(astuple(errors)) == pytest.approx(true, rel=1e-4)
    assert share == pytest.approx(float(s[0] ** 2 / s.square().sum()))


def test_the_dense_first_token_repairs_what_only_the_first_token_lost():
    """Keys and values that are wrong at first tokens alone: with the dense model's in their place nothing is lost."""
    model = build("llama")
    windows = bench_first_tokens.Windows(model, tokens(2))
    assert windows.measure(dense_first=False)[1] == pytest.approx(0, abs=1e-12)

    def wrong(name: str, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :1] + 1, output[:, 1:]], 1)

    with bench_first_tokens.hooked(model, wrong):
        assert windows.measure(dense_first=False)[1] > 1e-6
        assert windows.measure(dense_first=True)[1] == pytest.approx(0, abs=1e-12)
