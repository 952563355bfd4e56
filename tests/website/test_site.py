"""The site: every page is in its navigation, every link leads somewhere, and the reference holds what the code has."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from matplotlib.text import Text

import layerwise
from layerwise.cli import cards
from layerwise.figures.style import styled
from layerwise.runtime.errors import InputError
from layerwise.runtime.project import ROOT
from layerwise.storage import table_schema
from website import docstrings, markdown, notebook, pages, pictures, plan, readme_pictures, reference, results
from website.layering import layered


@pytest.fixture(scope="module")
def site() -> pages.Site:
    return pages.Site()


def named(nav: list) -> list[str]:
    """Paths of a navigation, in its order."""
    found = []
    for item in nav:
        inner = item if isinstance(item, str) else next(iter(item.values()))
        found += [inner] if isinstance(inner, str) else named(inner)
    return found


def test_every_page_is_in_the_navigation_once(site):
    settings = site.settings("pages", "html")
    assert sorted(named(settings["nav"])) == sorted(site.pages)
    assert settings["docs_dir"] == "pages" and settings["strict"]


def test_every_link_of_a_page_leads_to_a_page_or_a_file(site):
    there = {*site.pages, *site.files}
    for page, text in site.pages.items():
        for link in markdown.links(text):
            if not markdown.ELSEWHERE.match(link) and not link.startswith("#"):
                assert markdown.resolved(page, link.partition("#")[0]) in there, (page, link)


def test_a_link_to_the_source_of_a_page_leads_to_the_page(site):
    text = site.pages["tutorials/first-study.md"]
    assert "[the columns](../reference/tables.md)" in text and "(../reference/config-guide.md)" in text
    assert "(results/smollm2-small.md)" in site.pages["results/index.md"].replace("](", "](results/")
    assert "![The rooms of the code, a row per floor](files/figures/gallery/rooms.png)" in site.pages["overview.md"]


def test_a_link_that_leads_nowhere_is_a_sentence(monkeypatch):
    monkeypatch.setattr(pages, "sources", lambda: {"README.md": "index.md"})
    monkeypatch.setattr(Path, "read_text", lambda self, *_: "[x](docs/absent.md)")
    with pytest.raises(InputError, match=r"A link of README.md must lead to a page or a file. Got 'docs/absent.md'"):
        pages.Site()


def test_what_is_written_is_what_mkdocs_reads(site, tmp_path):
    settings = yaml.safe_load(pages.write(tmp_path).read_text("utf-8"))
    assert settings == site.settings("pages", "html")
    for name, text in site.pages.items():
        assert (tmp_path / "pages" / name).read_text("utf-8") == text
    for name, file in site.files.items():
        assert (tmp_path / "pages" / name).read_bytes() == file.read_bytes()


# ----------------------------------------------------------------------------------------------------------- reference


def properties_of(schema: Any) -> Iterator[str]:
    """Every key of a JSON Schema's objects, however deep."""
    if isinstance(schema, dict):
        yield from schema.get("properties", {})
        for own in schema.values():
            yield from properties_of(own)


def test_the_config_page_has_every_key_with_its_default():
    text = reference.config_keys()
    schema = yaml.safe_load(reference.CONFIG.read_text("utf-8"))
    keys = set(properties_of(schema))
    there = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) | set(re.findall(r"^##+ (\w+)$", text, re.MULTILINE))
    assert keys == there - {"The"}
    assert "| `samples` | integer at least 1 | required | Number of sequences. |" in text
    assert "| `batch` | integer at least 1 | `8` | Sequences per forward pass. |" in text


def test_the_pages_of_cards_have_every_method_allocator_and_parameter():
    text = reference.methods()
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == list(cards.catalogue())
    for entry in cards.catalogue().values():
        section = text.split(f"## {entry.name}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` ", section, re.MULTILINE) == list(entry.card["parameters"])
    assert "| `blocksize` | integer at least 1 | `128` |" in text
    files = sorted(path.stem for path in (ROOT / "allocators").glob("*.py"))
    assert sorted(re.findall(r"^## (\w+)$", reference.allocators(), re.MULTILINE)) == files


def test_the_page_of_tables_has_every_column():
    text = reference.tables()
    for name in table_schema.document()["tables"]:
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` ", section, re.MULTILINE) == list(table_schema.columns(name))


def test_the_page_of_the_command_has_the_help_of_every_command():
    text = reference.command_line()
    assert "Usage: layerwise estimate [OPTIONS] [STUDY]" in text and "--quick" in text
    assert re.findall(r"^## ([\w-]+)$", text, re.MULTILINE)[:2] == ["run", "report"]


def test_the_page_of_the_library_has_every_public_name():
    text = reference.library()
    found = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert set(found) == set(layerwise.__all__) - {"__version__"} and len(found) == len(set(found))
    assert "    seed: int = 0,\n" in text and "- `gram`: Gram of the layer's inputs, from" in text
    assert "class LowerBound(output_error: float, absolute_error: float, gap: float)" in text
    assert "### mask\n\n```python\nmask: Tensor | None\n```\n" in text


def test_a_name_that_a_module_lacks_is_no_entry():
    with pytest.raises(ValueError, match=r"layerwise.api must define or import absent, .* Got neither instead"):
        docstrings.entry("layerwise.api", "absent")


def test_the_page_of_rules_says_what_each_does():
    text = reference.rules()
    assert "| `overlap` | How much of an evaluation a calibration set has seen, by content. | `calibrate.smk` |" in text


def test_a_page_of_results_has_the_tables_and_figures_of_the_gallery(site):
    for study in results.studies():
        text, folder = site.pages[results.address(study)], ROOT / results.GALLERY / study
        assert text.count("![") == len(list(folder.glob("*.png")))
        if (folder / "main.md").is_file():
            assert (folder / "main.md").read_text("utf-8") in text
    assert "It is 0 for the dense model" in site.pages["results/smollm2-small.md"]  # a figure's caption


# ------------------------------------------------------------------------------------------------------------ markdown


def test_links_in_code_are_none_and_anchors_stay():
    text = "[a](b.md#c) `[d](e.md)` ![f](g.png) [h](#i) [j](https://k.l)\n```\n[m](n.md)\n```\n[`o`](p.md)\n"
    assert markdown.links(text) == ["b.md#c", "g.png", "#i", "https://k.l", "p.md"]
    new = markdown.relinked(text, "docs/page.md", lambda path: f"X/{path}")
    assert new == text.replace("b.md", "X/docs/b.md").replace("g.png", "X/docs/g.png").replace("p.md", "X/docs/p.md")


def test_lists_are_spaced_as_python_markdown_asks():
    assert markdown.spaced("text\n- a\n  - b\n- c\n") == "text\n\n- a\n    - b\n- c\n"
    assert markdown.spaced("- a\n  more\n- b\n```\ntext\n- c\n```\n") == "- a\n  more\n- b\n```\ntext\n- c\n```\n"


def test_a_notebook_is_a_page_and_runs():
    cell = {"cell_type": "code", "source": ["x = 2\n", "print(x)"], "outputs": [{"text": ["old\n"]}]}
    text = json.dumps({"cells": [{"cell_type": "markdown", "source": ["# T\n"]}, cell]})
    ran = notebook.run(text, {})
    assert notebook.markdown(ran) == "# T\n\n\n```python\nx = 2\nprint(x)\n```\n\n```text\n2\n```\n"


# ------------------------------------------------------------------------------------------------------------ pictures


def test_the_picture_of_rooms_is_that_of_the_code():
    said = "python -m website.pictures draws it again"
    assert pictures.kept(pictures.GALLERY / "rooms.png") == pictures.content(plan.rooms()), said


def test_the_picture_of_the_rules_is_that_of_the_workflow():
    graph = plan.rule_graph()
    kept = pictures.kept(pictures.GALLERY / "dag.png")
    assert kept == pictures.content([graph.nodes, graph.edges]), "python -m website.pictures draws it again"


def test_the_pictures_of_the_readme_are_up_to_date_and_legible_on_a_phone():
    graph = plan.rule_graph()
    stages, points = readme_pictures.stages(graph, pictures.files_of(graph)), readme_pictures.divergences()
    with styled():
        figures = {
            "stages": (stages, readme_pictures.draw_stages(stages)),
            "divergences": (points, readme_pictures.draw_divergences(points)),
        }
    for name, (found, figure) in figures.items():
        kept = pictures.kept(pictures.GALLERY / f"{name}.png")
        assert kept == pictures.content(found), "python -m website.pictures draws it again"
        # A phone is 360 pixels wide: 100 for each inch of the picture, so that 8 points are 11 pixels.
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert figure.get_figwidth() <= 3.6 and min(sizes) >= 8, name
    assert {rule for _, _, rules in stages for rule in rules} == {node.replace("_", " ") for node in graph.nodes}
    accepted = pd.read_csv(ROOT / f"results/accepted/{readme_pictures.STUDY}/divergences.csv")
    drawn = accepted["target"].isin(readme_pictures.TITLES) & ~accepted["label"].isin(readme_pictures.LEFT_OUT)
    assert sorted(kl for *_, kl in points) == sorted(accepted.loc[drawn, "kl"])


def test_a_graph_has_no_shortcuts_and_one_node_for_figures():
    names = ("all", "a", "b", "c", "figure_x", "figure_y")
    dot = "".join(f'{number}[label = "{name}"]\n' for number, name in enumerate(names))
    dot += "1 -> 2\n2 -> 3\n1 -> 3\n3 -> 4\n3 -> 5\n5 -> 0\n"
    assert plan.graph_of(dot) == plan.Graph(("a", "b", "c", "figures"), (("a", "b"), ("b", "c"), ("c", "figures")))


def test_ways_lead_from_left_to_right_and_around_boxes():
    edges = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"), ("e", "d")]
    found = layered(["a", "b", "c", "d", "e"], edges)
    assert {node: found.places[node][0] for node in "abcde"} == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 2}
    assert len(set(found.places.values())) == len(found.places)
    for edge, way in zip(edges, found.ways, strict=True):
        assert (way[0], way[-1]) == edge
        layers = [found.places[node][0] for node in way]
        assert layers == list(range(layers[0], layers[-1] + 1))
