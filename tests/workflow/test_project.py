"""The repository as a whole: pinned versions, the embedded study's text and model, and what no file may hold."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import math
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from tokenizers import Tokenizer

from layerwise.demo import docstrings
from layerwise.runtime.errors import InputError
from layerwise.study.grid import plan
from tests.support import smoke
from tests.support.paths import ROOT

DEMO = ROOT / "resources/demo"
LOCK = [line for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines() if line and line[0] != "#"]
PINNED: dict[str, str] = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in LOCK}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CUDA = re.compile("nvidia|cuda|triton")
SNAKEFILES = [ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")]


# ------------------------------------------------------------------------------------------------------------ versions


def test_the_lock_pins_every_version():
    assert [line for line in LOCK if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line)] == []
    assert len(PINNED) == len(LOCK) and "torch==2.13.0" in LOCK
    assert [name for name in PINNED if CUDA.match(name)] == []


def test_build_requirements_are_locked_by_hashes():
    text = (ROOT / "requirements-build.lock").read_text("utf-8")
    assert set(re.findall(r"^([\w-]+)==", text, re.MULTILINE)) == {"hatchling", "tomlkit", "trove-classifiers"}
    assert len(re.findall(r"^    --hash=sha256:[0-9a-f]{64}( \\)?$", text, re.MULTILINE)) == 2 * 3
    assert {"packaging", "pathspec", "pluggy"} <= PINNED.keys()  # what else hatchling needs


def test_the_lock_is_complete():
    """Nothing that a locked package needs is left for pip to choose; torch's CUDA libraries are not needed."""
    needed = set()
    for name in PINNED:
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed.add(canonicalize_name(requirement.name))
    assert sorted(name for name in needed - PINNED.keys() if not CUDA.match(name)) in ([], ["setuptools"])


def test_the_installed_versions_are_the_locked_ones():
    """Without them the text of the embedded study is another one, and numbers may be."""
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in PINNED}
    assert installed == PINNED


def test_conda_users_get_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["--requirement requirements.lock", "--editable ."]}
    assert sorted(entry.partition("=")[0] for entry in conda) == ["pip", "python"]
    (version,) = (entry.partition("=")[2].strip("=") for entry in conda if entry.startswith("python"))
    assert version in SpecifierSet(PROJECT["requires-python"])


def test_declared_requirements_are_locked():
    slurm = dict(line.split("==") for line in (ROOT / "requirements-slurm.lock").read_text("utf-8").splitlines()[1:])
    extras = [entry for extra in PROJECT["optional-dependencies"].values() for entry in extra]
    for entry in [*PROJECT["dependencies"], *extras]:
        requirement = Requirement(entry)
        assert (PINNED | slurm)[canonicalize_name(requirement.name)] in requirement.specifier


def imported(source: str) -> set[str]:
    """Top-level packages that Python source imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("folder", ["methods", "allocators", "layerwise", "tests"])
def test_imported_packages_are_locked(folder):
    files = list((ROOT / folder).rglob("*.py"))
    names = set().union(*(imported(path.read_text("utf-8")) for path in files))
    if folder == "layerwise":
        lines = "\n".join(path.read_text("utf-8") for path in SNAKEFILES)
        names |= set(re.findall(r"^\s*(?:import|from)\s+(\w+)", lines, re.MULTILINE))
    own = {"layerwise", "tests", "website"}
    distributions = importlib.metadata.packages_distributions()
    third_party = names - own - sys.stdlib_module_names - {"triton"}  # comes with torch where there is CUDA
    assert len(files) > 2 and third_party
    unlocked = {name for name in third_party if not PINNED.keys() & map(canonicalize_name, distributions.get(name, []))}
    assert unlocked == set()


# --------------------------------------------------------------------------------------------------------------- files


def tracked() -> list[Path]:
    """Files of the repository, those that are not committed yet among them."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_place_on_a_machine():
    places = [f"/{name}/".encode() for name in ("work", "root", "home/[a-z]+", "Users/[A-Za-z]+", "tmp/w")]
    pattern = re.compile(rb"(?<![\w.}/-])(?:" + b"|".join(places) + rb")")
    found = {str(path.relative_to(ROOT)): pattern.findall(path.read_bytes()) for path in tracked()}
    assert {name: places for name, places in found.items() if places} == {}


def test_committed_files_are_small():
    limit = 3_000_000  # official-L3.safetensors has 2.6 MB
    large = {path.name: path.stat().st_size for path in tracked() if path.stat().st_size > limit}
    assert set(large) <= {"model.safetensors"} and sum(large.values()) <= 16_000_000


def test_the_snakefile_is_short():
    assert len((ROOT / "Snakefile").read_text("utf-8").splitlines()) <= 40


def test_planning_needs_no_torch():
    """The Snakefile is parsed again by every remote job."""
    code = "import sys; sys.path.insert(0, '.'); import layerwise.study.grid, layerwise.figures.plot"
    code += "; print({'torch', 'transformers', 'matplotlib', 'pandas', 'lm_eval', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------- text of the embedded study

SOURCE = '''"""Of the module."""
if True:
    def outer():
        """Of a function.

        Text,
            indented.
        """
        def inner():
            "Of a function inside."
try:
    class Thing:
        r"""Of a class, \\d."""
        async def wait(self): """Of a method."""
        def silent(self): pass
except ImportError:
    pass
'''


def test_docstrings_are_found_with_their_names():
    assert docstrings.docstrings(SOURCE) == [
        ("", "Of the module."),
        ("outer", "Of a function.\n\nText,\n    indented."),
        ("outer.inner", "Of a function inside."),
        ("Thing", r"Of a class, \d."),
        ("Thing.wait", "Of a method."),
    ]
    assert docstrings.docstrings("x = 1") == []


def test_one_document_per_module():
    modules = {"a": [("a", "First."), ("a.f", "Second.")], "b": [("b", "Third.")]}
    assert docstrings.render(modules) == "a\nFirst.\n\n\na.f\nSecond.\n\n\n\nb\nThird."
    assert docstrings.digest(modules) == hashlib.sha256(docstrings.render(modules).encode()).hexdigest()


SPLIT = {
    "numpy": "train",
    "scipy.optimize": "train",
    "networkx.algorithms.boundary": "validation",
    "networkx.drawing.layout": "test",
    "sklearn.svm._classes": "test",
}


def test_the_split_of_a_module_never_changes():
    assert {module: docstrings.split_of(module) for module in SPLIT} == SPLIT
    splits = [docstrings.split_of(f"package.module_{i}") for i in range(5000)]
    held_out = docstrings.HELD_OUT_PERCENT / 100
    for split in ("validation", "test"):
        assert splits.count(split) / len(splits) == pytest.approx(held_out, abs=0.01)


def test_no_held_out_docstring_is_trained_on():
    names = {docstrings.split_of(name): name for name in SPLIT}
    modules = {name: [(name, "The same."), (f"{name}.own", f"Of {name}.")] for name in reversed(names.values())}
    kept = docstrings.without_repeats(modules)
    assert kept[names["train"]] == modules[names["train"]]
    assert kept[names["test"]] == [(f"{names['test']}.own", f"Of {names['test']}.")]
    alone = docstrings.without_repeats({"a": [("a", "Once.")], "b": [("b", "Once.")]})
    assert sum(map(len, alone.values())) == 1


@dataclass(frozen=True)
class Packages:
    """Made-up modules in the place of each package's, and the script's arguments once their hashes are recorded."""

    documents: dict[str, docstrings.Modules]
    arguments: list[str]


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Packages:
    documents = {
        name: {module: [(module, f"Of {module}.")] for module in (f"{package}.m{i}" for i in range(60))}
        for name, package in docstrings.PACKAGES.items()
    }
    monkeypatch.setattr(docstrings, "package_docstrings", documents.__getitem__)
    arguments = ["--hashes", str(tmp_path / "text.sha256"), "--out", str(tmp_path / "text")]
    docstrings.main([*arguments, "--record"])
    return Packages(documents, arguments)


def test_the_splits_share_no_module(packages, tmp_path):
    docstrings.main(packages.arguments)
    texts = {split: (tmp_path / f"text/{split}.txt").read_text("utf-8") for split in docstrings.SPLITS}
    found = {split: {part.split("\n")[0] for part in text.split("\n\n\n\n")} for split, text in texts.items()}
    assert all(docstrings.split_of(module) == split for split, modules in found.items() for module in modules)
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 7 * 60
    before = {path: path.read_bytes() for path in (tmp_path / "text").iterdir()}
    docstrings.main(packages.arguments)
    assert {path: path.read_bytes() for path in (tmp_path / "text").iterdir()} == before


def test_another_version_s_text_names_the_package(packages):
    packages.documents["sympy"]["sympy.m0"] = [("sympy.m0", "Rewritten.")]
    with pytest.raises(InputError) as error:
        docstrings.main(packages.arguments)
    version = importlib.metadata.version("sympy")
    assert str(error.value) == (
        f"The docstrings of sympy {version} are not those that the demo model was trained on: "
        f"`pip install sympy=={PINNED['sympy']}` installs those."
    )


def test_a_missing_package_is_one_sentence(monkeypatch):
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    wanted = f"reads the docstrings of scipy, which is not installed: `pip install scipy=={PINNED['scipy']}`"
    with pytest.raises(InputError, match=wanted):
        docstrings.package_docstrings("scipy")


def test_the_recorded_text_is_that_of_the_installed_packages():
    recorded = docstrings.read_hashes(DEMO / "text.sha256")
    assert recorded.keys() == docstrings.PACKAGES.keys() and len(recorded) == 7
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in recorded.values())
    documents = docstrings.package_docstrings("networkx")
    assert docstrings.digest(documents) == recorded["networkx"]
    assert not [module for module in documents if "tests" in module.split(".")]


# ------------------------------------------------------------------------------------------ model of the embedded study


def test_the_demo_model():
    weights = DEMO / "model.safetensors"
    assert weights.stat().st_size <= 16_000_000
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    parameters = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
    assert 6_500_000 < parameters < 8_000_000
    record = json.loads((DEMO / "training.json").read_text("utf-8"))
    assert record["parameters"] == parameters
    assert record["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["test_bits_per_byte"] < 1.3 < record["xz_9e_bits_per_byte"]


def test_the_demo_model_s_dimensions():
    config = json.loads((DEMO / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] > 3
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    assert groups < heads and heads % groups == 0  # grouped-query attention
    widths = [
        config["hidden_size"],
        config["intermediate_size"],
        heads * config["head_dim"],
        groups * config["head_dim"],
    ]
    assert [width % 128 for width in widths] == [0] * 4
    study = yaml.safe_load((ROOT / "config/config.yaml").read_text("utf-8"))
    longest = max(entry["length"] for kind in ("calibration", "evaluation") for entry in study[kind].values())
    assert longest <= config["max_position_embeddings"]


def test_the_demo_tokenizer():
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 4096 == json.loads((DEMO / "config.json").read_text("utf-8"))["vocab_size"]
    text = "Return the Gram matrix of x.\n\n    >>> A @ A.T  # ümlaut, 0.5\n"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    study = yaml.safe_load((ROOT / "config/config.yaml").read_text("utf-8"))
    for entry in study["texts"].values():
        assert len(tokenizer.encode(entry["join"]).ids) == 1


# ----------------------------------------------------------------------------------------------------- small real run


def test_the_script_of_all_checks_can_be_read():
    done = subprocess.run(["bash", "-n", ROOT / ".ci/run"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_small_study_is_the_embedded_one_in_small(tmp_path):
    study = yaml.safe_load((ROOT / "config/config.yaml").read_text("utf-8"))
    planned = plan(smoke.small_study(study, tmp_path))
    assert len(planned.cells) == 1 + 3 * 2 and planned.skipped == []
    assert {spec.get("path") for spec in planned.models.values()} == {str(tmp_path / "resources/demo")}
    assert planned.config["texts"] == plan(study).config["texts"]


def test_methods_out_of_order_are_reported():
    def rows(dense: float, sparsegpt: float, wanda: float, magnitude: float) -> list[dict[str, str]]:
        pruned = {"sparsegpt": sparsegpt, "wanda": wanda, "magnitude": magnitude}
        values = {("shared", "dense"): dense} | {
            (mode, label): value for mode in ("shared", "sequential") for label, value in pruned.items()
        }
        names = ("mode", "label", "metric", "value")
        return [dict(zip(names, (*key, "perplexity", str(value)), strict=True)) for key, value in values.items()]

    assert smoke.out_of_order(rows(10, 11, 12, 13)) == []
    wrong = smoke.out_of_order(rows(10, 12, 11, 13))
    assert len(wrong) == 2 and wrong[0] == (
        "shared: expected dense < sparsegpt < wanda < magnitude, "
        "got dense 10.000, sparsegpt 12.000, wanda 11.000, magnitude 13.000."
    )
    assert len(smoke.out_of_order(rows(11, 11, 12, 13))) == 2
    assert "Got ['shared'] instead" in smoke.out_of_order(rows(10, 11, 12, 13)[:4])[0]
