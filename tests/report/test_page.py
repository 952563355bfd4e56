"""The report: one file, everything escaped and traceable, and what it does in a real browser."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import sync_playwright

from layerwise.report.headline import headline
from layerwise.report.page import other_tables, page
from layerwise.results import main_table, table_text
from layerwise.results.cell_results import ACCURACIES, evaluations
from layerwise.results.collect import StudyInputs, collect
from layerwise.runtime.errors import InputError
from layerwise.storage import frames
from layerwise.storage.frames import matching, tuples
from layerwise.storage.table_schema import arrow_schema, from_rows, read_table, write_parquet
from tests.support.synthetic_tables import EVALUATIONS, STUDY, SyntheticCell, cell, write_cell
from tests.support.typing_helpers import some

pytestmark = pytest.mark.xdist_group("report")
EVIL = "<script>alert(1)</script>"
SKIPPED = [
    {"label": "rtn", "method": "rtn", "target": "2:4", "allocation": "uniform", "reason": f"rtn does not prune {EVIL}"}
]
REASON = f"compress: no pivot {EVIL} is left"
PUBLISHED = {
    "paper": [EVIL, "Wanda"],
    "published": [7.26, 6.42],
    "verdict": ["not run", "within"],
}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="300" height="100"><rect width="9" height="9"/></svg>'
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
CHROMIUM = shutil.which("chromium")


@dataclass(frozen=True)
class Study:
    """What the page reads of a plan."""

    cells: list[SyntheticCell]
    config: dict[str, Any] = field(default_factory=lambda: {"study": EVIL, "models": {EVIL: {"path": EVIL}}, **STUDY})
    evaluations: dict[str, Any] = field(default_factory=lambda: EVALUATIONS)
    tasks: dict[str, Any] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        return [f"warned of {EVIL}"]


@pytest.fixture(scope="module")
def study() -> Study:
    targets = ("50% row", "60% row", "2:4")
    pruned = [cell(method, target, model=EVIL) for method in ("magnitude", "wanda", "sparsegpt") for target in targets]
    return Study([cell("dense", "dense", model=EVIL), *pruned])


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory) -> Path:
    """A study whose last cell has failed, with the page of it."""
    root = tmp_path_factory.mktemp("report")
    moved = [SyntheticCell(one.folder.replace(EVIL, "evil"), one.columns) for one in study.cells]
    study.cells[:] = moved
    for one in moved[:-1]:
        write_cell(root, one)
    failed = root / moved[-1].folder
    failed.mkdir(parents=True)
    record = {"status": "error", "reason": REASON.partition(": ")[2], "stage": "compress", "traceback": ""}
    (failed / "failed-compress.json").write_text(json.dumps(record))
    collect(StudyInputs(moved, SKIPPED, evaluations(STUDY, EVALUATIONS)), root / "tables", partial=True, root=root)
    pd.DataFrame(PUBLISHED).to_parquet(root / "tables/published.parquet")
    (root / "error_along_depth.svg").write_text(SVG)
    (root / "report.html").write_text(page(study, root / "tables", [root / "error_along_depth.svg"]), "utf-8")
    return root


@pytest.fixture(scope="module")
def html(folder) -> str:
    return (folder / "report.html").read_text("utf-8")


def drill(html: str) -> dict[str, Any]:
    return json.loads(some(re.search(r'id="drill">(.*?)</script>', html, re.DOTALL)).group(1))


def test_everything_shown_is_escaped(html):
    assert EVIL not in html and html.count("&lt;script&gt;alert(1)") > 20
    assert html.count("<script") == html.count("</script>") == 4


def test_every_number_leads_to_spec_log_and_row(study, folder, html):
    found = drill(html)
    data = {name: read_table(folder / "tables", name) for name in ("cells", "layers")}
    numbers = [dict(zip(found["number"], row, strict=True)) for view in found["cells"] for row in view["numbers"]]
    assert [number["row"] for number in numbers] == list(range(1, len(data["cells"]) + 1))
    for number, row in zip(numbers, data["cells"].to_dict("records"), strict=True):
        assert number["metric"] == row["metric"]
        assert number["value"] == (None if pd.isna(row["value"]) else pytest.approx(row["value"], rel=1e-5))
    for one, view in zip(study.cells, found["cells"], strict=True):
        assert view["folder"] == one.folder and view["spec"] == dict(one.columns)
        assert view["log"] == one.folder.replace("results/", "logs/") + "/compress.log"
        files = [dict(zip(found["number"], row, strict=True))["file"] for row in view["numbers"]]
        assert len(set(files)) == 4 and all((folder / file).is_file() == (view["status"] == "done") for file in files)
        if view["layers"]:
            rows = data["layers"].iloc[[row - 1 for row in view["layers"]["row"]]]
            assert set(rows["cell"]) == {one.columns["cell"]}
            assert rows["output_error"].to_list() == pytest.approx(view["layers"]["output_error"], rel=1e-5)
            assert rows["layer"].to_list() == found["shapes"][view["layers"]["shape"]]["layer"]


def test_gaps_have_their_reasons(html):
    found = drill(html)["cells"]
    assert [view["status"] for view in found] == ["done"] * 9 + ["failed"]
    assert {tuple(gap[3:]) for gap in found[-1]["gaps"]} == {(REASON, found[-1]["log"])} and found[-1]["layers"] is None
    assert "9 cells done, 1 failed, 0 missing; 1 pairs" in html


def test_the_main_tables_mark_what_is_not_shown_to_differ(study, folder, html, monkeypatch):
    marked = html.count('class="number best"')
    monkeypatch.setattr(main_table, "NO_DIFFERENCE", "worse")
    assert page(study, folder / "tables", []).count('class="number best"') > marked > 0


def test_the_page_opens_with_the_answer(study, folder, html, tmp_path):
    order = re.findall(r'<section id="([\w-]+)"', html)
    assert order[:4] == ["answer", "main", "results", "cell"] and order[-3:] == ["gaps", "protocol", "provenance"]
    answer = html[html.index('<section id="answer">') : html.index('<section id="main">')]
    assert "warned of &lt;script" in answer and "Dense: " in answer
    cells = read_table(folder / "tables", "cells")
    own = matching(cells, metric="perplexity")
    own = matching(own, text=own["text"].iloc[0])
    row = some(re.search(r"<td>mask-only</td>(.*?)</tr>", answer, re.DOTALL)).group(1)
    for target, best in zip(("50% row", "60% row", "2:4"), row.split("</td>")[:3], strict=True):
        here = dict(tuples(matching(own, comparison="mask-only", target=target), ["label", "value"]))
        named = re.findall(r">([\w.]+)</a> <b>([\d.]+)</b>", best)
        lowest = min(here, key=here.__getitem__)
        assert named[0] == (lowest, main_table.number(here[lowest], "perplexity")), (target, best)
    (tmp_path / "perplexity_vs_bits.svg").write_text(SVG)
    drawn = page(study, folder / "tables", [folder / "error_along_depth.svg", tmp_path / "perplexity_vs_bits.svg"])
    first, last = (drawn.index(f'id="figure-{name}"') for name in ("perplexity_vs_bits", "error_along_depth"))
    assert first < drawn.index('<section id="main">') < drawn.index('<section id="figures">') < last


def test_the_headline_names_the_best_and_counts_what_it_leaves_out():
    entries = [
        ("a", "9.50", True),
        ("b", "12.00", False),
        ("c", "9.10", True),
        ("d", "9.3 ± 0.2", True),
        ("e", "9.6", True),
    ]
    alone = [
        ("a", [table_text.TableEntry("diverged"), table_text.TableEntry("3.1")]),
        ("b", [table_text.TableEntry("–")] * 2),
    ]
    lines = [(label, [table_text.TableEntry(text, best)] * 2) for label, text, best in entries]
    section = table_text.Section("shared", [("mask-only", lines), ("quantised", alone)])
    tables = [
        table_text.Table(name, "T", "", ["x", "y"], [section], dense="Dense: 9.")
        for name in ("kl-m-c-t", "perplexity-m-c-t", "perplexity-m-c-u", f"{ACCURACIES[0]}-m-c-t")
    ]
    found = headline(tables)
    assert [own["table"].name for own in found] == ["perplexity-m-c-t", "perplexity-m-c-u"]
    best, single = found[0]["rows"]
    assert best["best"] == [[("c", "9.10"), ("d", "9.3 ± 0.2"), ("a", "9.50")]] * 2 and best["more"] == [1, 1]
    assert single["best"] == [[], [("a", "3.1")]] and found[0]["dense"] == "Dense: 9."
    assert headline(tables[3:])[0]["rows"][0]["best"][0][0] == ("e", "9.6") and headline([]) == []


def test_fallback_calibration_is_noted_above_the_main_tables(study, folder, html, tmp_path):
    shutil.copytree(folder / "tables", tmp_path / "tables")
    layers = read_table(folder / "tables", "layers")
    layers.loc[(layers["kind"] == "down_proj") & (layers["block"] == 0), "token_scope"] = "fallback"
    layers.to_parquet(tmp_path / "tables/layers.parquet")
    said = "Calibrated on every token, since fewer were routed to their expert than they have inputs: 1 of 14 layers in"
    assert said in page(study, tmp_path / "tables", []) and said not in html


def test_missed_budgets_are_noted_above_the_main_tables(study, folder, html, tmp_path):
    """The study has no allocation, so its target 60% row is read as the budget 60% under an allocation called row."""
    shutil.copytree(folder / "tables", tmp_path / "tables")
    first = {**study.cells[1].columns, "target": "60%", "allocation": "row", "sparsity": 0.6, "pattern": "row"}
    first |= {"layer": "l", "kind": "l", "block": 0, "out": 4, "in": 4, "level": 0.5, "official": True}
    first |= {"budget": 0.6, "mean_level": 0.55, "achieved": 0.55}
    known = {name: value for name, value in first.items() if name in arrow_schema("allocations").names}
    write_parquet(from_rows([known], "allocations", "test"), tmp_path / "tables/allocations.parquet")
    said = "60% row: the levels&#39; mean is 55.00%, not the budget of 60.00%."
    assert said in page(study, tmp_path / "tables", []) and said not in html


def test_further_tables_lead_with_what_is_asked(folder, tmp_path):
    verdicts = {"published": ["within", "outside"], "comparisons": ["better", "no difference shown"]}
    for name, own in verdicts.items():
        rows = {"model": "m", "cell": ["a", "b"], "n": [1, None], "verdict": own}
        pd.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
    found = other_tables(tmp_path, [{"spec": {"cell": "b"}}])
    assert [one["title"] for one in found] == ["Published beside ours", "Comparisons"]
    assert all(one["header"] == ["row", "verdict", "cell", "n"] for one in found)
    assert [row[2]["link"] for row in found[0]["rows"]] == [None, "#cell-0"]
    assert [row[3]["text"] for row in found[0]["rows"]] == ["1", ""]
    assert found[0]["note"].startswith("2 comparisons with published numbers: 1 within, 1 outside")
    assert found[1]["note"] == "1 of 2 comparisons show no difference. In all rows: model m."


def test_equal_input_gives_equal_bytes(study, folder, html):
    again = page(study, folder / "tables", [folder / "error_along_depth.svg"])
    ids = re.compile(r'"(?:id|root_id|docid|roots)":(?:"[^"]*"|\{[^}]*\})')
    assert ids.sub("", again) == ids.sub("", html)


def test_bad_input_is_a_sentence(study, folder):
    with pytest.raises(InputError, match=r"The figure .*absent.svg cannot be read: No such file"):
        page(study, folder / "tables", [folder / "absent.svg"])
    with pytest.raises(InputError, match="Got the cell .* instead, which the study lacks"):
        page(Study(study.cells[1:]), folder / "tables", [])


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("chromium is not installed")
    with sync_playwright() as driver:
        profile = tmp_path_factory.mktemp("profile")
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=FLAGS, offline=True, timeout=180_000
        )
        context.set_default_timeout(180_000)
        yield context
        context.close()


@pytest.fixture
def opened(browser, folder):
    """The page, opened; what it says on the console and asks of the network is in `page.said`."""
    tab = browser.new_page()
    tab.said = []
    tab.on("console", lambda message: tab.said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: tab.said.append(str(error)))
    tab.on("dialog", lambda dialog: (tab.said.append(dialog.message), dialog.dismiss()))
    tab.on(
        "request", lambda asked: None if asked.url[:5] in ("data:", "file:", "blob:") else tab.said.append(asked.url)
    )
    tab.goto((folder / "report.html").as_uri(), wait_until="commit")
    tab.wait_for_selector("html[data-ready]", state="attached")
    yield tab
    assert tab.said == []
    tab.close()


def column(tab, name: str) -> list[str]:
    return tab.evaluate(
        """name => { const table = document.getElementById("table-results");
        const at = [...table.tHead.rows[0].cells].findIndex(cell => cell.innerText.trim() === name);
        return [...table.tBodies[0].rows].map(row => row.cells[at]?.innerText) }""",
        name,
    )


def test_tables_sort_and_filter(opened):
    heading = opened.locator("#table-results thead tr").first.locator("th", has_text="mean_output_error")
    heading.click()
    opened.wait_for_selector("#table-results th[aria-sort=ascending]")
    numbers = [float(text) for text in column(opened, "mean_output_error") if text]
    assert len(numbers) == 9 and numbers == sorted(numbers) and len(set(numbers)) > 5
    heading.click()
    opened.wait_for_selector("#table-results th[aria-sort=descending]")
    assert [float(text) for text in column(opened, "mean_output_error") if text] == numbers[::-1]
    fields = opened.locator("#table-results thead input")
    fields.nth(1).fill("wanda")
    opened.wait_for_function("document.querySelectorAll('#table-results tbody tr').length == 3")
    assert column(opened, "label") == ["wanda"] * 3
    fields.nth(2).fill("2:4")
    opened.wait_for_function("document.querySelectorAll('#table-results tbody tr').length == 1")
    assert column(opened, "target") == ["2:4"]


def test_figures_are_visible(opened):
    image = opened.locator("#figures img")
    image.scroll_into_view_if_needed()
    assert image.is_visible() and image.evaluate("image => image.naturalWidth") == 300


def test_the_chart_has_a_height_as_soon_as_it_is_seen(opened):
    opened.wait_for_function("[...Bokeh.index][0].frame.bbox.height > 100", polling=100)


def test_the_layers_of_the_chosen_cell_are_shown(opened, folder, study):
    layers = read_table(folder / "tables", "layers")
    for index in (4, 6):
        name = study.cells[index].columns["cell"]
        opened.locator("#table-results a", has_text=name).first.click()
        opened.wait_for_function("name => document.getElementById('cell-spec').innerText.includes(name)", arg=name)
        own = matching(layers, cell=name)
        shown = opened.locator("#table-layers tbody tr").all_inner_texts()
        numbered = zip(own.index.to_list(), own["layer"].to_list(), strict=True)
        assert [text.split("\t")[:2] for text in shown] == [[str(i + 1), layer] for i, layer in numbered]
        drawn = opened.evaluate("Bokeh.documents[0].get_model_by_name('q_proj').data.error")
        errors = frames.column(matching(own, kind="q_proj"), "output_error")
        assert list(drawn) == pytest.approx(errors.to_list(), rel=1e-5)
    opened.locator("#choice").select_option(str(len(study.cells) - 1))
    opened.wait_for_function("document.getElementById('cell-layers').hidden")
    assert opened.locator("#cell-gaps").inner_text() == REASON


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_light_and_dark_wide_and_narrow(opened, scheme, width):
    opened.set_viewport_size({"width": width, "height": 900})
    opened.emulate_media(color_scheme=scheme)
    # The browser lays out, and tells of a changed scheme, a little later.
    opened.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)
    opened.wait_for_function(
        "dark => document.documentElement.classList.contains('dark') === dark", arg=scheme == "dark"
    )
    paper, ink = opened.evaluate(
        "(({ backgroundColor, color }) => [backgroundColor, color])(getComputedStyle(document.body))"
    )
    bright = [sum(map(int, re.findall(r"\d+", colour))) / 3 for colour in (paper, ink)]
    assert abs(bright[0] - bright[1]) > 150 and (bright[0] < bright[1]) == (scheme == "dark")
