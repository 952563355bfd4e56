"""Which rules an edit of a module runs again: those whose jobs import it, and no others."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from layerwise.cli.worker import WORKERS
from layerwise.contract.import_closure import closure, file_of, imports
from layerwise.figures.plot import FIGURES
from tests.support.paths import ROOT

RULE = re.compile(r"^rule (\w+):\n(.*?)(?=^rule |^for |\Z)", re.MULTILINE | re.DOTALL)
ALONE = re.compile(r'alone="([\w.]+)"')
ENTRIES = re.compile(r'CODE\.of\(\s*((?:"[\w.]+"|KINDS\["\w+"\])(?:,\s*(?:"[\w.]+"|KINDS\["\w+"\]))*)')
# In a copy of the package: import an entry of a rule, and say which modules came with it. Forks share the libraries.
LOADED = """
import importlib, json, os, sys
for name in ("torch", "transformers", "pandas", "pyarrow", "tqdm", "safetensors.torch", "numba", "matplotlib.figure"):
    importlib.import_module(name)
for entry in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(entry)
        names = [name for name in sys.modules if name.startswith("layerwise.")]
        print(json.dumps([entry, [sys.modules[name].__file__ for name in names]]), flush=True)
        os._exit(0)
    os.wait()
"""
# In a copy of the package: edit each module in turn, and name the code of every rule before and after.
EDITED = """
import json, sys
from functools import cache
from pathlib import Path
from layerwise.runtime import files
from layerwise.study import job_inputs
from layerwise.study.job_inputs import Code
job_inputs.portable, files.located = cache(job_inputs.portable), cache(files.located)  # no file is moved
rules, alone = map(json.loads, sys.argv[1:3])
def names():
    code = Code()  # a comment changes no import, of which nothing is read again
    return {rule: code.of(*entries, alone=alone.get(rule)) for rule, entries in rules.items()}
before = names()
for path in map(Path, sys.argv[3:]):
    text = path.read_text("utf-8")
    path.write_text(text + "\\n# edited\\n", "utf-8")
    after = names()
    path.write_text(text, "utf-8")
    print(json.dumps([str(path), [rule for rule in rules if after[rule] != before[rule]]]))
assert names() == before
"""


def modules_of_rules() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Of the text of the rules: rule -> modules that it names, and rule -> a module that it names without imports."""
    from layerwise.evaluation.cache import KINDS

    rules: dict[str, list[str]] = {}
    alone: dict[str, str] = {}
    for file in sorted((ROOT / "workflow/rules").glob("*.smk")):
        for name, body in RULE.findall(file.read_text("utf-8")):
            if found := ENTRIES.search(body):
                parts: list[str] = re.findall(r'"([\w.]+)"', found[1])
                rules[name] = [KINDS.get(part, part) for part in parts]
            if found := ALONE.search(body):
                alone[name] = found[1]
    figures = {f"figure_{name}": ["layerwise.figures.plot", drawing.module] for name, drawing in FIGURES.items()}
    return rules | figures, alone


RULES, WITHOUT_IMPORTS = modules_of_rules()


def lines(program: str, *arguments: str, folder: Path = ROOT) -> dict[str, list[str]]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


ONE_WORKER = pytest.mark.xdist_group("edits")  # where the edits are tried once


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> dict[str, set[str]]:
    """Module -> the rules that run again after an edit of it, in a copy of the package."""
    folder = tmp_path_factory.mktemp("copy")
    for part in ("layerwise", "methods", "allocators", "workflow"):
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    modules = sorted(map(str, (folder / "layerwise").rglob("*.py")))
    found = lines(EDITED, json.dumps(RULES), json.dumps(WITHOUT_IMPORTS), *modules, folder=folder)
    return {str(Path(path).relative_to(folder / "layerwise")): set(rules) for path, rules in found.items()}


def workers_of_rules() -> dict[str, list[str]]:
    """Rule -> the workers that it runs."""
    bodies = [
        body for file in (ROOT / "workflow/rules").glob("*.smk") for body in RULE.findall(file.read_text("utf-8"))
    ]
    return {name: found for name, body in bodies if (found := re.findall(r"\{WORKER\} ([\w-]+)", body))}


def test_no_input_is_ancient():
    """Snakemake leaves out jobs behind a file that is `ancient` to them when the job that makes it has to run again."""
    rules = [file.read_text("utf-8") for file in (ROOT / "workflow/rules").glob("*.smk")]
    assert rules and not any("ancient(" in rule for rule in rules)


def test_every_rule_names_the_code_of_its_worker():
    """The module that the job runs is its code: an edit of how it reads its arguments can change the result, too."""
    workers = workers_of_rules()
    assert workers.pop("check_model") == ["check-model"]  # the jobs behind it know by which code the model was checked
    for rule, names in workers.items():
        code = {*closure(RULES[rule]), *(file_of(module) for module in [WITHOUT_IMPORTS.get(rule)] if module)}
        assert names and {file_of(WORKERS[name]) for name in names} <= code, rule


def test_a_worker_that_is_named_alone_imports_no_other_code_of_its_result():
    """But the store of evaluations, which has code of its own."""
    for rule, module in WITHOUT_IMPORTS.items():
        rest = set(imports(file_of(module))) - set(closure(RULES[rule]))
        assert {path.relative_to(ROOT / "layerwise").parts[0] for path in rest} == {"evaluation"}


def test_imports_of_a_rule_are_its_code():
    """Against Python's own imports, which know nothing of the closure."""
    entries = sorted({entry for modules in RULES.values() for entry in modules})
    loaded = lines(LOADED, *entries)
    assert loaded.keys() == set(entries)
    for entry, files in loaded.items():
        known = {path.resolve() for path in closure([entry])}
        files = {Path(file).resolve() for file in files if file}
        rooms = {path for path in files if path.name == "__init__.py"}  # they hold a docstring
        assert files - rooms <= known, (entry, sorted(files - rooms - known))
        assert len(files) > 2


@ONE_WORKER
def test_an_edit_of_any_module_runs_the_rules_that_import_it_again(again):
    """Each module of each room, edited in a copy: the code of just those rules has another name."""
    expected = {module: set() for module in again}
    for rule, entries in RULES.items():
        for path in closure(entries):
            if path.suffix == ".py" and path.is_relative_to(ROOT / "layerwise"):
                expected[str(path.relative_to(ROOT / "layerwise"))].add(rule)
    for rule, module in WITHOUT_IMPORTS.items():
        expected[str(file_of(module).relative_to(ROOT / "layerwise"))].add(rule)
    assert again == expected
    assert len(again) > 80


FIGURE_RULES = {rule for rule in RULES if rule.startswith("figure_")}
KNOWN = {  # module -> (rules that run again, rules that do not)
    "results/protocol.py": ({"tables", "published", "report_page"}, {"compress", "gram", "perplexity"}),
    "comparison/published_page.py": ({"published", "report_page"}, {"tables", "compress"}),
    "results/comparisons.py": ({"tables", "report_page"}, {"compress"}),
    "sources/hub.py": ({"calibration_tokens", "evaluation_tokens", "model", "gram", "compress"}, {"docstrings"}),
    "calibration/calibrate.py": ({"gram"}, {"certificate", "compress", "tables"}),
    "calibration/fisher.py": ({"fisher"}, set(RULES) - {"fisher"}),
    "calibration/fisher_store.py": ({"fisher", "compress"}, {"gram", "certificate", "tables"}),
    "compression/lower_bound.py": ({"certificate"}, {"compress", "gram", "perplexity"}),
    "evaluation/dense_states.py": ({"dense_states", "perplexity"}, {"compress", "gram", "tables", "zero_shot"}),
    "evaluation/perplexity.py": ({"perplexity", "dense_states", "zero_shot"}, {"compress", "gram", "tables"}),
    "evaluation/zero_shot.py": ({"zero_shot", "task_data"}, {"perplexity", "compress"}),
    "figures/depth.py": ({"figure_error_along_depth", "figure_error_reduction"}, {"figure_sweep", "tables"}),
    "figures/style.py": (FIGURE_RULES, {"tables", "compress"}),
    "export/audit.py": (set(), set(RULES)),
    "cli/compress.py": ({"compress"}, set(RULES) - {"compress"}),
    "cli/worker.py": (set(), set(RULES)),
    "report/page.py": ({"report_page"}, set(RULES) - {"report_page"}),
    "study/estimate.py": (set(), set(RULES)),
}


@ONE_WORKER
@pytest.mark.parametrize("module", KNOWN)
def test_known_edits(again, module):
    run, rest = KNOWN[module]
    assert run <= again[module] and not rest & again[module], again[module]
