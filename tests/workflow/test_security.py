"""What a stranger's config, checkpoint, tasks and names cannot do; docs/security.md says what runs code by design."""

from __future__ import annotations

import ast
import html.parser
import json
import os
import pickle
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
import torch
import yaml

from layerwise.evaluation import zero_shot
from layerwise.models.loading import load
from layerwise.models.streaming import LazyBlocks
from layerwise.report.page import Study, page
from layerwise.results.cell_results import evaluations
from layerwise.results.collect import StudyInputs, collect
from layerwise.results.table_text import escape_latex, escape_markdown
from layerwise.runtime.errors import InputError
from layerwise.sources import checkpoint_files, task_sets
from layerwise.sources.tokenizer_files import load_tokenizer
from layerwise.study.grid import plan
from tests.support import synthetic_tables
from tests.support.model_families import build
from tests.support.paths import ROOT
from tests.support.workflow_harness import (
    CONFIG,
    TEXTS,
    snakemake,
    tiny_project,
    tiny_study,
    words,
    write_config,
    write_tokenizer,
)

CODE = sorted(path for part in ("methods", "allocators", "layerwise") for path in (ROOT / part).rglob("*.py"))
SNAKEFILES = [ROOT / "Snakefile", *sorted((ROOT / "workflow").rglob("*.smk"))]

# ------------------------------------------------------------------------------------------------------ what is called

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "dbm"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp", "commands.getoutput"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "torch.load", "torch.save", "pd.read_pickle", "np.load"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "torch.hub.load"),
}
# file -> its calls that are allowed, with the keyword or class that makes each safe
ALLOWED = {
    "config_file.py": {"yaml.load": "_Loader"},  # derived from SafeLoader
    "train.py": {"torch.load": "weights_only=True", "torch.save": ""},  # its own checkpoint, tensors alone
}


def faults(source: str, name: str) -> list[str]:
    """Calls and imports of a module that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [module for module in names if module.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            call, text = ast.unparse(node.func), ast.unparse(node)
            safe = ALLOWED.get(name, {}).get(call)
            if call in CALLS and (safe is None or safe not in text):
                found.append(text)
            if any(keyword.arg == "shell" for keyword in node.keywords) or "allow_pickle" in text:
                found.append(text)
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_no_module_runs_what_a_file_holds(path):
    assert faults(path.read_text("utf-8"), path.name) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(x)",
        "os.system(x)",
        "subprocess.run(x, shell=True)",
        "yaml.load(x, Loader=yaml.Loader)",
        "torch.load(x, weights_only=True)",
        "np.load(x, allow_pickle=True)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source):
    assert faults(source, "any.py")


def test_every_value_in_a_shell_command_is_quoted():
    """Of wildcards the three that a rule leaves bare are digits of a fixed list, as their constraints say."""
    bare = {"WORKER", "threads", "resources.device", "params.figure", "wildcards.format"}
    found = set()
    for path in SNAKEFILES:
        for command in re.findall(r'shell:\n((?:\s+".*"\n)+)', path.read_text("utf-8")):
            found |= set(re.findall(r"\{([^{}]+)\}", command))
    assert len(found) > 20 and {name for name in found if not name.endswith(":q")} <= bare


# ------------------------------------------------------------------------------------------------- pickles and code


class Touches:
    """What a malicious pickle holds."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {shlex.quote(str(self.path))}",)


def sentences_of_loaders(folder: Path, **spec: Any) -> list[str]:
    """The sentences with which every way of loading refuses a folder."""
    own, found = {"path": str(folder), "name": "m", **spec}, []
    for call in (lambda: checkpoint_files.check_checkpoint("m", own), lambda: load(own), lambda: LazyBlocks(own)):
        with pytest.raises(InputError) as error:
            call()
        found.append(str(error.value))
    return found


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt", "b.ckpt", "c.pth"])
def test_a_checkpoint_that_is_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, name):
    folder, mark = tmp_path / "a model; it's $(touch y)", tmp_path / "pwned"
    write_tokenizer(folder, words(60, seed=0))
    model = build("llama")
    model.config.save_pretrained(folder)
    (folder / name).write_bytes(pickle.dumps({"a": Touches(mark)}))
    command: list[str] = []
    for told in sentences_of_loaders(folder):
        assert name in told and "a pickle can run code: if you trust its source" in told
        command = shlex.split(told.partition("convert pytorch_model*.bin with ")[2])
        assert command[:2] == ["python", "-c"] and len(command) == 3
    assert not mark.exists()
    if name != "pytorch_model.bin":
        return
    with pytest.raises(Exception, match="(?i)weights.only|unpickl"):  # and what the command calls runs no code either
        exec(command[2])
    assert not mark.exists()
    torch.save(model.state_dict(), folder / name)
    exec(command[2])
    checkpoint_files.check_checkpoint("m", {"path": str(folder)})
    tokens = torch.arange(4).view(1, -1)
    assert torch.equal(load({"path": str(folder)})(tokens).logits, model.eval()(tokens).logits)


MODELING = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_beside_a_model_runs_only_where_its_entry_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = tmp_path / "model", tmp_path / "pwned"
    write_tokenizer(folder, words(60, seed=0))
    build("llama").save_pretrained(folder)
    (folder / "own.py").write_text(MODELING.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    own = json.loads((folder / "tokenizer_config.json").read_text())
    own |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    for spec in ({}, {"trust_remote_code": False}):
        for call in (load, LazyBlocks, load_tokenizer):
            with pytest.raises(InputError) as error:
                call({"path": str(folder), **spec})
            assert "\n" not in str(error.value)
    assert not mark.exists()
    load({"path": str(folder), "trust_remote_code": True})
    assert mark.exists()


TASK = "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: data.jsonl}}}}\ntest_split: test\n"
TASK += "output_type: loglikelihood\ndoc_to_text: {text}\ndoc_to_target: a\nmetric_list: [{{metric: acc}}]\n"
ESCAPES = "{{ cycler.__init__.__globals__.os.system('touch pwned') }}"
CALLED = "!function code.text"


def task_folder(tmp_path: Path, text: str, before: str = "") -> dict[str, Any]:
    (tmp_path / "own.yaml").write_text(before + TASK.format(name="own", text=text))
    (tmp_path / "code.py").write_text("import os\nos.system('touch pwned')\ndef text(doc): return 'a'\n")
    (tmp_path / "data.jsonl").write_text('{"a": "b"}\n')
    return {"tasks": ["own"], "folder": str(tmp_path), "batch": 1}


def test_a_task_that_names_python_is_refused_unless_it_is_trusted(tmp_path):
    spec = task_folder(tmp_path, CALLED)
    with pytest.raises(InputError, match=r"tasks.t: .*own.yaml names Python functions .*trust_remote_code: true"):
        task_sets.check_tasks("t", spec)
    task_sets.check_tasks("t", {**spec, "trust_remote_code": True})
    task_folder(tmp_path, "'{{ a }}'")
    task_sets.check_tasks("t", spec)
    assert not (tmp_path / "pwned").exists()


def test_a_task_that_names_python_in_other_words_is_not_run(tmp_path):
    spec = task_folder(tmp_path, "!e!tion code.text", "%TAG !e! !func\n---\n")
    task_sets.check_tasks("t", spec)
    with zero_shot.inside(spec), pytest.raises(InputError, match="code.text is Python, which runs only if"):
        zero_shot.load_tasks(zero_shot.prepared(spec))
    assert not (tmp_path / "pwned").exists()


def test_a_template_of_a_task_cannot_reach_python(tmp_path):
    spec = task_folder(tmp_path, json.dumps(ESCAPES))
    with zero_shot.inside(spec), pytest.raises(InputError, match="unsafe"):
        zero_shot.load_tasks(zero_shot.prepared(spec))
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------------------------------- network

NO_NETWORK = """
import socket, sys
def refuse(*arguments, **others): print("asked the network", arguments, file=sys.stderr); raise SystemExit(99)
def guarded(own):  # a socket of this machine's files, such as that of the warm workers, is no network
    return lambda self, *arguments: (own if self.family == socket.AF_UNIX else refuse)(self, *arguments)
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket, "socket", type("socket", (socket.socket,), {name: guarded(getattr(socket.socket, name))}))
socket.getaddrinfo = socket.create_connection = refuse
"""


@pytest.mark.long
def test_a_local_study_asks_no_network(tmp_path):
    """A whole study whose processes end at their first connection, of which the environment forbids none."""
    folder = tiny_project(tmp_path / "project")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NO_NETWORK)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    study = tiny_study() | {
        "methods": {"wanda": None},
        "targets": [{"sparsity": 0.5}],
        "modes": ["shared"],
    }
    config = write_config(folder, study)
    command = [sys.executable, "-m", "snakemake", "results/tables/cells.parquet", "--cores", "2"]
    own = {**clean, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([*command, "--configfile", str(config)], cwd=folder, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "asked the network" not in done.stdout + done.stderr
    probe = subprocess.run([sys.executable, "-c", "import socket; socket.create_connection(('localhost', 9))"], env=own)
    assert probe.returncode == 99  # the guard is at work


def test_parsing_a_study_opens_no_socket(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / "t.txt").write_text("text")
    build("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    study = tiny_study() | {"models": {"m": {"path": str(tmp_path)}}}
    plan(
        study | {"texts": {name: {"path": str(tmp_path / "t.txt")} for name in TEXTS}},
        check_sources=True,
    )


# -------------------------------------------------------------------------------------------- places and shell commands

EVIL = "<script>alert(1)</script>"
SHELL = [
    "a; touch x",
    "$(touch x)",
    "`touch x`",
    'it\'s "x"',
    "{input}",
    "{wildcards.model}",
    "a\nb",
    "--out",
    "%s",
    "\\",
]


@pytest.mark.parametrize("name", [EVIL, "../../x", "/etc/x", "a/b", ".hidden", "-rf", "", "a\0", *SHELL])
@pytest.mark.parametrize("kind", ["models", "texts", "calibration", "evaluation", "methods", "tasks"])
def test_a_name_that_is_no_file_name_is_refused(kind, name):
    study = {**tiny_study(), "tasks": {"t": {"tasks": ["boolq"]}}}
    entry = next(iter(study[kind].values()))
    with pytest.raises(InputError, match=rf"config: {kind}: the name .* is wrong; names are letters"):
        plan({**study, kind: {**study[kind], name: entry}})


def test_nothing_is_written_outside_the_project(tmp_path):
    """Values of the config that name places are read; what is written lies under results, logs and figures."""
    study = tiny_study()
    study["models"]["tiny"] |= {"known_as": "../../../x"}
    study["texts"]["train"] |= {"dataset": "/x", "field": "../x"}
    planned = plan(study | {"study": "../../x"})
    for cell in planned.cells:
        assert re.fullmatch(r"results/cells(/[A-Za-z0-9][\w.-]*){4}", cell.folder)
        assert cell.certificate is None or re.fullmatch(
            r"results/certificates(/[A-Za-z0-9][\w.-]*){3}", cell.certificate
        )
    for path in SNAKEFILES:
        for line in re.findall(r'^ +(?:\w+=)?(?:temp|directory|KEPT)?\(?"([^"]*\{[^"]*)"\)?,$', path.read_text(), re.M):
            assert line.startswith(("results/", "logs/", "figures/")) or "--" in line or line[0] == "{", line


@pytest.mark.long
def test_config_values_reach_jobs_as_they_are_and_no_shell(tmp_path):
    """Every free text of a config with what a shell, Snakemake's formatting or a wildcard would act on."""
    folder = tiny_project(tmp_path / "project")
    study = tiny_study() | {
        "methods": {"wanda": None},
        "targets": [{"sparsity": 0.5}],
        "modes": ["shared"],
    }
    nasty = "".join(SHELL)
    text = (folder / TEXTS["train"]).read_text()
    rows = [{nasty: f"{nasty}{part}"} for part in re.findall(r"(?:\S+\s){40}", text)]
    (folder / "own text").mkdir()
    path = folder / "own text/a; touch x $(touch x) `touch x` it's.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    study["study"] = nasty
    study["models"]["tiny"]["known_as"] = nasty
    own = {"path": str(path.relative_to(folder)), "field": nasty, "begins": nasty, "join": nasty, "dataset": nasty}
    study["texts"]["train"] = own
    done = snakemake(folder, "--configfile", write_config(folder, study))
    assert done.status == 0, done.output
    assert not [found for found in (folder, folder / "own text") if (found / "x").exists()]
    cells = pd.read_parquet(folder / "results/tables/cells.parquet")
    assert set(cells["calibration_text"]) == {nasty} and set(cells["status"]) == {"done"}
    assert json.loads(json.dumps(nasty)) in yaml.safe_load((folder / CONFIG).read_text())["study"]


# ------------------------------------------------------------------------------------------------------------- the page


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and what is in scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


HOSTILE = [EVIL, "</script><img src=x onerror=alert(1)>", '"><svg onload=alert(1)>', "' onclick='alert(1)", "<!--"]
HOSTILE += ["{{ 7 * 7 }}", "javascript:alert(1)", "\u2028", "</style><style>*{display:none}"]


@pytest.mark.parametrize("text", [*HOSTILE[:3], *(pytest.param(text, marks=pytest.mark.long) for text in HOSTILE[3:])])
def test_the_report_escapes_everything_it_shows(tmp_path, text):
    def study_of(word: str) -> tuple[Any, str]:
        cells = [
            synthetic_tables.cell("magnitude", "2:4", model=word),
            synthetic_tables.cell("wanda", "2:4", model=word),
        ]
        cells = [
            synthetic_tables.SyntheticCell(f"results/cells/m/c/shared/{i}", one.columns) for i, one in enumerate(cells)
        ]
        root = tmp_path / str(word == text)
        synthetic_tables.write_cell(root, cells[0])
        (root / cells[1].folder).mkdir(parents=True)
        record = {"status": "error", "reason": f"no {word}", "stage": "compress", "traceback": word}
        (root / cells[1].folder / "failed-compress.json").write_text(json.dumps(record))
        skipped = [{"label": word, "method": word, "target": word, "allocation": word, "reason": word}]
        told = evaluations(synthetic_tables.STUDY, synthetic_tables.EVALUATIONS)
        collect(StudyInputs(cells, skipped, told), root / "tables", partial=True, root=root)
        pd.DataFrame({"paper": [word], word: [word], "verdict": ["not run"]}).to_parquet(
            root / "tables/published.parquet"
        )
        entry = {"path": word, "known_as": word, "dataset": word, "tasks": [word], word: word}
        config = {"study": word, "models": {word: entry}, **synthetic_tables.STUDY, "tasks": {word: entry}}

        planned = SimpleNamespace(
            cells=cells,
            config=config,
            evaluations=synthetic_tables.EVALUATIONS,
            tasks={},
            warnings=lambda: [f"warned of {word}"],
        )
        return planned, page(cast(Study, planned), root / "tables", [])

    _, hostile = study_of(text)
    _, plain = study_of("harmless")
    assert text in ("javascript:alert(1)", "{{ 7 * 7 }}", "\u2028") or text not in hostile
    found, wanted = Elements(hostile).tags, Elements(plain).tags
    assert [tag for tag, _ in found] == [tag for tag, _ in wanted]
    assert [sorted(own) for _, own in found] == [sorted(own) for _, own in wanted]
    links = [own[key] or "" for _, own in found for key in ("href", "src") if key in own]
    assert all(link.startswith(("#", "data:")) for link in links)


def test_other_tables_escape_names_too():
    assert escape_markdown(EVIL) != EVIL and "|" not in escape_markdown("a|b").replace("\\|", "")
    assert escape_latex(r"\input{x}") == r"\textbackslash{}input\{x\}"


# ------------------------------------------------------------------------------------------------------- dependencies


def test_the_hashed_lock_has_the_versions_of_the_lock():
    def pins(name: str) -> list[str]:
        text = (ROOT / name).read_text("utf-8").replace("\\\n", "")
        return sorted(line.split()[0].lower().replace("_", "-") for line in text.splitlines() if re.match(r"\w", line))

    assert pins("requirements-hashed.lock") == [pin for pin in pins("requirements.lock") if pin != "torch==2.13.0"]
    blocks = (ROOT / "requirements-hashed.lock").read_text("utf-8").replace("\\\n", "").splitlines()
    hashed = [line for line in blocks if re.match(r"\w", line)]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashed)
