"""The command: what its help teaches, what it prints, and how it refuses bad input."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from layerwise import __version__ as version
from layerwise.checks import template
from layerwise.cli import worker, workflow
from layerwise.cli.app import app
from layerwise.cli.worker import WORKERS
from layerwise.contract.catalogue import Catalogue
from layerwise.runtime import project
from layerwise.runtime.errors import InputError
from layerwise.study import config_file
from layerwise.study.grid import plan
from tests.support.paths import ROOT

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def call(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def layerwise(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "layerwise", *arguments]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


# ----------------------------------------------------------------------------------------------------------------- help


def test_help_lists_every_command_with_its_purpose():
    told = call("--help")
    assert "..." not in told.stdout.split("Commands:")[1], "a purpose is cut to the width of the page"
    assert told.exit_code == 0 and told.stdout == call().stdout
    expected = (
        "run report estimate check-study methods new-method check-method regression accept compare merge leaderboard"
    )
    assert [
        name.replace("_", "-") for name in COMMANDS
    ] == f"{expected} published export audit decode clean-cache worker".split()
    for name in expected.split():
        assert re.search(rf"^  {name} +[A-Z]", told.stdout, re.MULTILINE)
    assert "--install-completion" in told.stdout and "--show-completion" in told.stdout


@pytest.mark.parametrize("name", [name.replace("_", "-") for name in COMMANDS if name != "worker"])
def test_help_of_a_command_has_a_sentence_and_an_example(name):
    told = call(name, "--help")
    text = " ".join(told.stdout.split())
    assert told.exit_code == 0
    assert re.search(rf"Usage: layerwise {name} .*?[A-Z][^.]*\.", text) and f"Example: layerwise {name}" in text


def test_the_version_is_that_of_the_package():
    told = call("--version")
    assert told.exit_code == 0 and told.stdout == f"layerwise {version}\n"


def test_studies_are_checked_without_their_models(tmp_path):
    study = (ROOT / "config/config.yaml").read_text("utf-8")
    path = tmp_path / "absent.yaml"
    path.write_text(study.replace("demo: {path: resources/demo,", "absent: {path: nowhere,"))
    told = call("check-study", "embedded", path)
    assert told.exit_code == 0 and told.stdout == f"embedded: 29 cells\n{path}: 29 cells\n"


@pytest.mark.parametrize("command", ["run", "check-study"])
def test_a_shell_completes_names_of_studies(command):
    words = {"_LAYERWISE_COMPLETE": "complete_bash", "COMP_WORDS": f"layerwise {command} qua", "COMP_CWORD": "2"}
    python = [sys.executable, "-m", "layerwise"]
    done = subprocess.run(python, env={**ENVIRONMENT, **words}, capture_output=True, text=True)
    assert done.stdout.split() == [
        "quantisation",
        "quantisers",
        "quantisers-draws",
        "quantisers-smollm2",
        "quantisers-smollm2-bits",
    ]


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = {
    "no-such-command": "No such command",
    "run": "Missing argument",
    "run no-such-study": "A study must be a file or the name of one that ships",
    "run paper-wanda-lama": "such as paper-wanda-llama",
    "run -n": "STUDY must come before Snakemake's own arguments. Got '-n' first instead.",
    "run -n embedded": "STUDY must come before Snakemake's own arguments. Got '-n' first instead.",
    "run --cores two embedded": "--cores must be a number of at least 1, or `all`. Got 'two' instead.",
    "run embedded --cores two -n": "--cores must be a number of at least 1, or `all`. Got 'two' instead.",
    "run embedded -c0": "--cores must be a number of at least 1, or `all`. Got '0' instead.",
    "report embedded -n --cores=2.5": "--cores must be a number of at least 1, or `all`. Got '2.5' instead.",
    "run embedded --directory file/inside": "must be a writable folder",
    "run embedded -n --no-such-option": "`snakemake --help` lists. Got --no-such-option instead.",
    "report embedded -n --no-such-option=3": "`snakemake --help` lists. Got --no-such-option=3 instead.",
    "run embedded -n --retries many": "invalid int value: 'many' (`snakemake --help` lists its options).",
    "run absent-model.yaml": "The folder nowhere of the model 'absent' does not exist.",
    "estimate absent-model.yaml": "The folder nowhere of the model 'absent' does not exist.",
    "estimate embedded --cores 0": "--cores must be at least 1. Got 0 instead.",
    "estimate embedded --mem-mb 0": "--mem-mb must be a number above 0. Got 0 instead.",
    "estimate embedded --mem-mb nan": "--mem-mb must be a number above 0. Got nan instead.",
    "estimate embedded --cores many": "Invalid value for '--cores'",
    "check-study file": "file is not valid YAML",
    "check-study embedded wrong-key.yaml": "config: targets.0",
    "check-study absent-text.yaml": "The file nowhere.txt of the text 'docstrings-train' does not exist.",
    "methods no-such-method": "The method must be one of admm,",
    "methods sparsgpt": "Got 'sparsgpt' instead (did you mean 'sparsegpt'?).",
    "methods owl": "owl is an allocator, not a method: a study names it under `allocations` (docs/allocation.md).",
    "methods --method-path absent": "method_paths must be folders. Got 'absent' instead.",
    "new-method torch": "The name of a new method must be free. Got 'torch' instead, which is a Python package.",
    "check-method absent.py": "The method must be a file. Got 'absent.py' instead.",
    "report no-such-study": "A study must be a file",
    "report no-such-study -n": "A study must be a file",
    "report -n pruning": "STUDY must come before Snakemake's own arguments. Got '-n' first instead.",
    "report -n absent-model.yaml": "STUDY must come before Snakemake's own arguments.",
    "report absent-model.yaml": "The folder nowhere of the model 'absent' does not exist.",
    "report embedded -n --directory file/inside": "must be a writable folder",
    "report": "name a study, such as layerwise report my-study.yaml or layerwise report embedded.",
    "report -n": "There are no results in ",
    "report --cores 2": "There are no results in ",
    "estimate -n": "No such option: -n",
    "published -n": "No such option: -n",
    "published absent-model.yaml --tables absent": "The cells table absent/cells.parquet does not exist",
    "regression no-such-study": "A study must be a file or the name of one that ships",
    "regression seeds": "Accepted numbers must be in results/accepted/seeds/layers.csv. There is no such file",
    "regression embedded": "The layers table results/tables/layers.parquet does not exist",
    "accept no-such-study": "A study must be a file or the name of one that ships",
    "accept embedded": "The layers table results/tables/layers.parquet does not exist",
    "compare absent absent": "The folder 'absent' does not exist.",
    "compare absent absent --tolerance -1": "A tolerance must be at least 0, such as 0.02. Got -1 instead.",
    "merge absent": "Missing option '--out'",
    "merge absent --out merged": "The folder 'absent' does not exist.",
    "published no-such-study": "A study must be a file",
    "export absent --format dense --out saved": "The cell must be a folder. Got 'absent' instead.",
    "export . --format nope --out saved": "--format must be one of dense, packed, compressed-tensors. Got 'nope'",
    "audit absent": "The folder absent does not exist.",
    "audit .": ". must hold weights: weights.safetensors, model.safetensors or model.safetensors.index.json. Got none",
    "decode --shape 16 --out decode.csv": "--shape must be ROWSxINPUTS, such as 4096x4096. Got '16' instead.",
    "decode --shape 0x0 --out decode.csv": "--shape must have at least one row and one input. Got 0x0 instead.",
    "decode --shape 16x16 --out file/inside/decode.csv": "file/inside must be a writable folder",
    "new-method shrink --folder file/inside": "must be a writable folder",
    "--no-such-option": "No such option",
    "worker no-such-worker": "The worker must be one of allocate,",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence_and_exit_status_two(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a: [")
    study = (ROOT / "config/config.yaml").read_text("utf-8")
    Path("absent-model.yaml").write_text(study.replace("demo: {path: resources/demo,", "absent: {path: nowhere,"))
    Path("absent-text.yaml").write_text(study.replace("path: results/text/train.txt", "path: nowhere.txt"))
    Path("wrong-key.yaml").write_text(study.replace("sparsity: 0.6", "sparsty: 0.6", 1))
    told = call(*words.split())
    assert told.exit_code == 2 and told.stdout in ("", "embedded: 29 cells\n")
    assert told.stderr.startswith("error: ") and told.stderr.count("\n") == 1
    assert BAD[words] in told.stderr


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    told = call("published", "embedded", "--unrun", "--out", tmp_path / "file/inside")
    assert told.exit_code == 2 and told.stderr.startswith("error: ") and told.stderr.count("\n") == 1


def test_snakemake_s_own_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/inside"))
    (tmp_path / "file").write_text("")
    told = call("run", "embedded", "-n")
    assert told.exit_code == 2 and told.stderr.startswith("error: ") and told.stderr.count("\n") == 1
    assert "file/inside/snakemake must be a writable folder" in told.stderr
    assert "XDG_CACHE_HOME" in told.stderr


def test_findings_of_a_command_are_exit_status_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = call("estimate", "embedded", "--mem-mb", "300", "--quick")
    assert told.exit_code == 1 and "--mem-mb gives 300 MB" in told.stderr and "demo: 7 M parameters" in told.stdout


# -------------------------------------------------------------------------------------------------------------- methods


def test_methods_are_a_table_of_all_cards():
    lines = call("methods").stdout.splitlines()
    assert lines[0].split("  ")[0] == "method" and [line.split()[0] for line in lines[2:]] == list(Catalogue())
    sparsegpt = next(line for line in lines if line.startswith("sparsegpt"))
    assert re.split("  +", sparsegpt) == ["sparsegpt", "SparseGPT", "row, layer, n:m", "2-8", "yes", "gram"]


def test_one_card_whole():
    text = call("methods", "sparsegpt").stdout
    entry = Catalogue()["sparsegpt"]
    assert text.startswith("sparsegpt: SparseGPT\n") and f"  arxiv: {entry.card['arxiv']}\n" in text
    for name, schema in entry.card["parameters"].items():
        assert f"\n  {name}: " in text and schema["description"] in " ".join(text.split())


@pytest.mark.parametrize(("default", "shown"), [("1.0", "1.0"), ("0", "0"), ("True", "yes"), ("False", "no")])
def test_a_default_is_shown_as_what_it_is(tmp_path, default, shown):
    path = template.write("shrink", tmp_path)
    path.write_text(path.read_text("utf-8").replace("power: float = 1.0", f"power: float = {default}"), "utf-8")
    assert f", default {shown}\n" in call("methods", "shrink", "--method-path", tmp_path).stdout


def test_a_further_folder_has_methods_too(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "methods/wanda.py").read_text("utf-8"))
    assert "\nmine " in call("methods", "--method-path", tmp_path).stdout


def test_a_new_method_passes_its_checks(tmp_path):
    pytest.importorskip("layerwise.checks.template")
    told = call("new-method", "shrink", "--folder", tmp_path / "mine")
    path = tmp_path / "mine/shrink.py"
    assert told.exit_code == 0 and f"layerwise check-method {path}" in told.stdout and path.is_file()
    again = call("new-method", "shrink", "--folder", tmp_path / "mine")
    assert again.exit_code == 2 and again.stderr.count("\n") == 1
    checked = call("check-method", path, "--quick")
    assert checked.exit_code == 0 and "shrink keeps its contract" in checked.stdout
    path.write_text(path.read_text("utf-8").replace("CARD = ", "OTHER = "))
    refused = call("check-method", path)
    assert refused.exit_code == 2 and "must hold a method" in refused.stderr and refused.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------------ run


def test_studies_by_name_and_by_file(tmp_path):
    assert config_file.study_file("embedded") == project.ROOT / "config/config.yaml"
    assert config_file.study_file("pruning") == project.ROOT / "config/pruning.yaml"
    (tmp_path / "mine.yaml").write_text("study: mine")
    assert config_file.study_file(tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    with pytest.raises(InputError, match="such as embedded, .*baselines, .* Got 'config' instead"):
        config_file.study_file("config")


def test_arguments_of_snakemake():
    study = Path("config/config.yaml")
    own = ["--configfile", str(study.resolve()), "--snakefile", str(project.ROOT / "Snakefile")]
    default = ["--workflow-profile", str(project.ROOT / "profiles/default")]
    assert workflow.arguments(study, None, ["-n"]) == [*own, *default, "--cores", "all", "-n"]
    assert workflow.arguments(study, "3", []) == [*own, *default, "--cores", "3"]
    assert workflow.arguments(study, None, ["-c2"]) == [*own, *default, "-c2"]
    target = workflow.arguments(study, None, ["--cores=2"], ["report_page"])
    assert target == [*own, *default, "report_page", "--cores=2"]
    given = workflow.arguments(study, None, ["--workflow-profile=profiles/gpu", "--resources", "gpu=4"])
    assert given[: len(own)] == own and given[-3:] == [given[-3], "--resources", "gpu=4"]


def test_a_report_without_a_study_is_of_the_embedded_one_where_its_results_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given: list[tuple[object, ...]] = []
    monkeypatch.setattr(workflow, "run", lambda *arguments, targets=(): given.append((*arguments, targets)))
    cell = plan(config_file.read(ROOT / "config/config.yaml")).cells[0]
    for folder in (".", "elsewhere"):
        Path(folder, "results/cells/mine").mkdir(parents=True)  # of another study
        told = call("report", "-n", "--directory", folder)
        assert told.exit_code == 2 and " are not of the embedded study: name a study, such as " in told.stderr
        Path(folder, cell.folder).mkdir(parents=True)
    for words in ([], ["-n"], ["--cores", "2", "-n"], ["seeds", "-n"], ["-n", "--directory", "elsewhere"]):
        assert call("report", *words).exit_code == 0
    assert given == [
        ("embedded", None, [], ["report_page"]),
        ("embedded", None, ["-n"], ["report_page"]),
        ("embedded", "2", ["-n"], ["report_page"]),
        ("seeds", None, ["-n"], ["report_page"]),
        ("embedded", None, ["-n", "--directory", "elsewhere"], ["report_page"]),
    ]


def test_a_path_that_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert project.locate("resources/demo") == project.ROOT / "resources/demo"
    for other in ("resources/absent", "config/config.yaml", "resources/../config", "", str(tmp_path)):
        assert project.locate(other) == Path(other)
    Path("resources/demo").mkdir(parents=True)  # the working directory comes first
    assert project.locate("resources/demo") == Path("resources/demo")


def test_where_a_model_lies_is_no_part_of_what_it_is(tmp_path, monkeypatch):
    config = config_file.read(ROOT / "config/config.yaml")
    here = plan(config)
    monkeypatch.chdir(tmp_path)
    elsewhere = plan(config, check_sources=True)
    assert list(elsewhere.models) == list(here.models) and list(elsewhere.by_folder) == list(here.by_folder)


def test_a_study_that_ships_runs_from_an_empty_folder(tmp_path):
    done = layerwise(tmp_path, "run", "embedded", "-n", "--cores", "2")
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert re.search(r"^compress +29$", told, re.MULTILINE) and "dry-run" in told


@pytest.mark.parametrize(("cores", "threads"), [(2, 1), (6, 3), (16, 4)])
def test_jobs_that_run_the_dense_model_have_half_of_the_cores(cores: int, threads: int, tmp_path: Path):
    """Cells have one thread. A job of two would wait on two cores until no cell runs, while one of them is idle."""
    done = layerwise(tmp_path, "run", "embedded", "-n", "--cores", str(cores))
    jobs = re.findall(r"^rule (\w+):\n((?: {4}.*\n)+)", done.stdout + done.stderr, re.MULTILINE)
    of = {rule: int(found[1]) if (found := re.search("    threads: (.*)", body)) else 1 for rule, body in jobs}
    assert of["gram"] == of["dense_states"] == of["check_model"] == threads and of["compress"] == 1


# -------------------------------------------------------------------------------------------------------------- workers


def test_a_worker_starts_without_help_torch_and_snakemake():
    code = "import sys; sys.argv[1:] = ['worker', 'fingerprint', '--help']\nimport layerwise.cli\n"
    code += "try: layerwise.cli.main()\nexcept SystemExit: pass\n"
    code += "print({'typer', 'rich', 'click', 'torch', 'snakemake', 'pandas'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr == "set()\n" and "--model" in done.stdout


@pytest.mark.parametrize("words", ["worker", "worker --help", "worker -h"])
def test_help_lists_every_worker(words):
    told = call(*words.split())
    assert told.exit_code == 0 and f"Names: {', '.join(WORKERS)}." in told.stdout


def test_a_worker_whose_modules_refuse_to_be_imported_says_so_in_a_sentence(tmp_path, monkeypatch, capsys):
    refusing = "from layerwise.runtime.errors import InputError\nraise InputError('No folder can be written.')\n"
    (tmp_path / "refusing.py").write_text(refusing)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(WORKERS, "refusing", "refusing")
    with pytest.raises(SystemExit) as ended:
        worker.run(["refusing"])
    assert ended.value.code == 2 and capsys.readouterr().err == "error: No folder can be written.\n"


def test_the_rules_name_workers_that_there_are():
    rules = "\n".join(path.read_text("utf-8") for path in (ROOT / "workflow/rules").glob("*.smk"))
    named = set(re.findall(r"\{WORKER\} ([\w-]+)", rules))
    assert named and named <= WORKERS.keys()
    for module in WORKERS.values():
        assert importlib.util.find_spec(module), module


# ---------------------------------------------------------------------------------------------------------------- wheel


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
BUILD = ["--no-deps", *(["--no-build-isolation"] if importlib.util.find_spec("hatchling") else [])]
# Stands for the distribution `kernels`, which transformers imports where it is installed. It has any class asked for.
KERNELS = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **options: None})
"""


@pytest.mark.long
def test_an_editable_install_is_a_link_and_nothing_else(tmp_path):
    subprocess.run([*PIP, "install", *BUILD, "--target", tmp_path, "--editable", ROOT], check=True)
    assert (tmp_path / "_layerwise.pth").read_text("utf-8").split() == [str(ROOT)]
    others = {path.name.split("-")[0] for path in tmp_path.iterdir() if not path.name.endswith(".dist-info")}
    assert others <= {"_layerwise.pth", "bin"}


@pytest.mark.long
def test_the_wheel_works_without_the_checkout(tmp_path):
    subprocess.run([*PIP, "wheel", *BUILD, "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("layerwise-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    # No other top-level name: `kernels`, say, is that of a distribution which transformers imports.
    assert {name.split("/")[0].split("-")[0] for name in names} == {"layerwise"} and len(names) == len(set(names))
    methods = {path.name for path in (ROOT / "methods").glob("*.py")}
    assert {name.removeprefix("layerwise/methods/") for name in names if "/methods/" in name} == methods
    allocators = {path.name for path in (ROOT / "allocators").glob("*.py")}
    assert {name.removeprefix("layerwise/allocators/") for name in names if "/allocators/" in name} == allocators
    shipped = ("Snakefile", "config/config.yaml", "requirements.lock", "results/accepted/embedded/layers.csv")
    assert {f"layerwise/shipped/{path}" for path in shipped} <= set(names)

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    places = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    packages = Path(places.stdout.strip())
    subprocess.run([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    # The locked packages, without running what .pth files say there: it may lead to the checkout.
    (packages / "locked.pth").write_text(sysconfig.get_path("purelib") + "\n")
    known = packages / "kernels-0.18.2.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (packages / "kernels").mkdir()
    (packages / "kernels/__init__.py").write_text(KERNELS)
    clean = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"}
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(*command: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=folder, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    code = "import kernels, layerwise, layerwise.kernels.obs, transformers.integrations.hub_kernels\n"
    code += "from transformers.utils import is_kernels_available\nfrom layerwise.runtime.project import ROOT\n"
    code += "print(layerwise.__file__, ROOT, kernels.__file__, is_kernels_available())"
    wanted = ["layerwise/__init__.py", "layerwise/shipped", "kernels/__init__.py"]
    assert run(python, "-c", code).split() == [*(str(packages / path) for path in wanted), "True"]
    told = run(environment / "bin/layerwise", "run", "embedded", "-n", "--cores", "2")
    assert re.search(r"^compress +29$", told, re.MULTILINE) and "dry-run" in told
    assert "sparsegpt" in run(environment / "bin/layerwise", "methods")
    code = "from layerwise.comparison import regression; print(regression.accepted_folder('pruning'))"
    assert run(python, "-c", code).split() == [str(packages / "layerwise/shipped/results/accepted/pruning")]
