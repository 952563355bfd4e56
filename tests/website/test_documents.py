"""Every document keeps its word: its code runs, its configs are valid, its commands, files and anchors exist."""

import ast
import importlib.util
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from typer.core import TyperGroup

from layerwise import __version__
from layerwise.checks import template
from layerwise.cli.app import app
from layerwise.study import config_file
from layerwise.study.grid import plan
from tests.support.paths import ROOT
from website import markdown

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "config/README.md", "resources/demo/README.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
COMMANDS = ("layerwise", "make", "snakemake", "python", "pytest")
PLACES = (
    "docs",
    "tests",
    "config",
    "layerwise",
    "methods",
    "allocators",
    "workflow",
    "resources",
    "profiles",
    "figures/gallery",
)
PLUGIN = "--slurm-"  # how options begin of an executor that is installed for clusters alone
IN_A_WHEEL = "layerwise/shipped"
GIVEN = {  # what a page's code takes as given
    "docs/allocation.md": "from dataclasses import dataclass; "
    "from layerwise.contract.allocator import Allocator, Proposal",
    "docs/checking-a-method.md": "from layerwise.checks import template; template.write('power_norm')",
    "docs/tutorials/first-method.md": "import os; from layerwise.checks import template; os.mkdir('my-methods'); "
    "template.write('shrink', 'my-methods')",
}
BASE = {  # a study to which a page's fragment of a config is added
    "models": {"m": {"path": "resources/demo"}},
    "texts": {"t": {"path": "t.txt"}},
    "calibration": {"c": {"text": "t", "samples": 1, "length": 8, "seed": 0}},
    "evaluation": {"e": {"text": "t", "length": 8}},
    "targets": [{"sparsity": 0.5}, {"sparsity": 0.5, "bits": 4}, {"pattern": "1x16", "sparsity": 0.5, "bits": 4}],
    "methods": {"dense": None, "wanda": None, "both": {"chain": ["wanda", "rtn"]}},
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return [text for own, text in BLOCK.findall(path.read_text("utf-8")) if own == language]


def having(language: str) -> list[Path]:
    return [path for path in DOCUMENTS if blocks(path, language)]


# ---------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("path", having("python"), ids=name_of)
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the first block to the last, one after the other, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resources").symlink_to(ROOT / "resources")
    names: dict[str, Any] = {"__name__": "document"}
    torch.manual_seed(0)
    for text in [GIVEN.get(name_of(path), ""), *blocks(path, "python")]:
        exec(compile(text, name_of(path), "exec"), names)


def test_the_first_method_is_what_the_command_writes(tmp_path: Path):
    written = ast.parse(template.write("shrink", tmp_path).read_text("utf-8"))
    shown = ast.parse(blocks(ROOT / "docs/tutorials/first-method.md", "python")[0])
    assert ast.unparse(shown.body) == ast.unparse(written.body[1:])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("path", having("yaml"), ids=name_of)
def test_configs_are_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A whole study as it stands; a fragment as part of one."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_swaps", "shrink"):
        (tmp_path / "my-methods").mkdir(exist_ok=True)
        text = template.write(name, tmp_path / "my-methods").read_text("utf-8")
        if name == "my_swaps":  # which the page gives a warm start
            text = text.replace('"parameters": {', '"parameters": {"warm_start": {"format": "method"},')
            text = text.replace("    power: float", '    warm_start: Method | str = "wanda"\n    power: float')
        (tmp_path / f"my-methods/{name}.py").write_text(text, "utf-8")
    for text in blocks(path, "yaml"):
        (tmp_path / "study.yaml").write_text(text, "utf-8")
        read = config_file.read(tmp_path / "study.yaml")
        known = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text("utf-8"))["properties"]
        given = read if set(read) <= set(known) else {"methods": read}
        alone = {"dense": None} if "methods" in given else {"dense": None, "wanda": None}
        methods = alone if "targets" in given else BASE["methods"]
        part = {**BASE, "method_paths": ["my-methods"], **given, "methods": {**methods, **given.get("methods", {})}}
        study = given if set(BASE) <= set(given) else part
        assert plan(study).cells


# ------------------------------------------------------------------------------------------------------------ commands


def commands(path: Path) -> Iterator[str]:
    """Command lines of a page: those within its text, and the lines of blocks without a language, comments dropped."""
    text = path.read_text("utf-8")
    outside = "".join(part for fenced, part in markdown.sections(text) if not fenced)
    found = [" ".join(match.split()) for match in INLINE.findall(outside)]
    found += [line for block in blocks(path, "") for line in block.splitlines()]
    for line in found:
        if line.partition(" ")[0] in COMMANDS and " " in line:
            yield line.partition("  #")[0].removesuffix(" ...")


LINES = sorted({line for path in DOCUMENTS for line in commands(path)})


@pytest.mark.parametrize("line", LINES)
def test_a_command_exists_and_takes_what_it_is_given(line: str):
    program, *words = shlex.split(line, comments=True)
    {"layerwise": layerwise, "make": make, "snakemake": snakemake, "python": python, "pytest": pytest_}[program](words)


def layerwise(words: list[str]) -> None:
    """It has the command, which parses the arguments; one that is only named lacks some."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    name, *rest = words
    if name in ("COMMAND", "--help"):
        return
    own = command.commands[name]
    context = own.make_context(name, list(rest), resilient_parsing=not rest)
    if name in ("run", "report"):
        snakemake([word for word in context.args if word.startswith("-")])


def make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            assert re.search(rf"^{name} \?=", text, re.MULTILINE), word
            if name == "STUDY" and value.islower():
                assert config_file.study_file(value).is_file()
        else:
            assert re.search(rf"^{re.escape(name)}:", text, re.MULTILINE), word


def snakemake(words: list[str]) -> None:
    from snakemake.cli import get_argument_parser

    known = {option for action in get_argument_parser()._actions for option in action.option_strings}
    asked = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert {word for word in asked if not word.startswith(PLUGIN)} <= known


def python(words: list[str]) -> None:
    if words[:1] == ["-m"] and not words[1].endswith("..."):
        module, *rest = words[1:]
        found = importlib.util.find_spec(module)
        assert found, module
        if module in ("pytest", "snakemake"):
            return (pytest_ if module == "pytest" else snakemake)(rest)
        path = Path(found.origin or "")
        path = path.with_name("__main__.py") if path.name == "__init__.py" else path
        own, _, further = " ".join(rest).partition(" -- ")
        text = path.read_text("utf-8")
        assert all(word in text for word in own.split() if word.startswith("--")), rest
        if further:  # the command that it runs
            test_a_command_exists_and_takes_what_it_is_given(further)


def pytest_(words: list[str]) -> None:
    assert all((ROOT / word.partition("::")[0]).exists() for word in words if "/" in word), words


# ------------------------------------------------------------------------------------------------------ files and links


def slug(heading: str) -> str:
    """The anchor that the code host gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-")


def anchors(path: Path) -> set[str]:
    outside = "".join(part for fenced, part in markdown.sections(path.read_text("utf-8")) if not fenced)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", outside, re.MULTILINE)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_and_anchors_exist(path: Path):
    for link in markdown.links(path.read_text("utf-8")):
        if markdown.ELSEWHERE.match(link):
            continue
        target, _, anchor = link.partition("#")
        file = path if not target else ROOT / markdown.resolved(name_of(path), target)
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(path: Path):
    """`tests/x.py::test_y`, `config/*.yaml` and the like; a name in capitals or braces means any."""
    for word in INLINE.findall(path.read_text("utf-8")):
        name, _, test = word.strip().partition("::")
        if (
            not re.fullmatch(rf"({'|'.join(PLACES)})/[\w./*-]+", name)
            or re.search(r"[A-Z]{3,}|\.\.", name)
            or name == IN_A_WHEEL
        ):
            continue
        found = list(ROOT.glob(name.rstrip("/"))) or list((ROOT / "tests").glob(name))
        assert found, word
        assert not test or test.partition("[")[0] in found[0].read_text("utf-8"), word


def test_the_notebook_prints_what_it_shows(monkeypatch: pytest.MonkeyPatch):
    """Words are the same, and numbers within a twentieth: they depend on the processor."""
    import matplotlib

    from website import notebook

    matplotlib.use("Agg")
    monkeypatch.setattr(os, "environ", {**os.environ})
    text = (ROOT / "docs/tutorials/one-layer.ipynb").read_text("utf-8")
    shown, ran = (notebook.markdown(own).split() for own in (text, notebook.run(text, {})))
    assert len(shown) == len(ran)
    for old, new in zip(shown, ran, strict=True):
        if re.fullmatch(r"\d+\.\d+", old):
            assert float(new) == pytest.approx(float(old), rel=0.05)
        else:
            assert old == new


# ------------------------------------------------------------------------------------------------------------ messages


def test_messages_of_the_faults_page_are_in_the_code():
    """Each message of the table, cut at `...` and at colons, which are before other sentences, is in a string."""
    code = " ".join(path.read_text("utf-8") for path in sorted((ROOT / "layerwise").rglob("*.py")))
    code = " ".join(re.sub(r'"\s*f?"', "", code).split())
    rows = [line.split(" | ") for line in (ROOT / "docs/faults.md").read_text("utf-8").splitlines() if "|" in line]
    quoted = [text for row in rows[2:] for text in re.findall(r"`([^`]+)`", row[1]) if " " in text]
    assert len(quoted) > 15
    for text in quoted:
        for part in re.split(r"\.\.\./?|[:,]", text):
            if len(part.split()) > 1 and text not in OF_SNAKEMAKE:
                assert part.strip() in code, text


OF_SNAKEMAKE = ("Directory cannot be locked",)


# ------------------------------------------------------------------------------------------------------------- release


def test_one_version_is_released():
    """The version of pyproject.toml, the package, CITATION.cff and the newest release of the changelog is one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heads[0] == "Unreleased" and heads[1] == f"{project} - {citation['date-released']}"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project)
    assert __version__ == citation["version"] == project
    dates = [head.partition(" - ")[2] for head in heads[1:]]
    assert dates == sorted(dates, reverse=True)
