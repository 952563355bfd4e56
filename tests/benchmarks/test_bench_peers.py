"""The comparison with other codes. They are not installed, so small substitutes take their place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from layerwise.evaluation.perplexity import evaluate
from tests.benchmarks import bench_peers
from tests.support.model_families import build, tokens

# Returns the dense model for whatever it is asked.
PEER = """#!{python}
import json, shutil, sys
if "json.load(sys.stdin)" in sys.argv[2]:
    job = json.load(sys.stdin)
    shutil.copytree(job["model"], job["out"], dirs_exist_ok=True)
    print("a line of its log", json.dumps({{"seconds": 1e6}}), sep="\\n")
"""
# Codes that set every weight to zero, as `zero` of a module of one name in each repository says.
QUANT = """
class Quantizer:
    def configure(self, bits, perchannel, sym, mse): pass
def zero(linear):
    import torch
    torch.cuda.synchronize()
    linear.weight.data = torch.zeros_like(linear.weight.data).to("cuda:0")
"""
SOLVER = """
from {quant} import *
class {name}:
    def __init__(self, linear, *sizes): self.linear = linear
    def {run}(self, *args, **settings):
        assert "{repository}" in __file__
        zero(self.linear)
"""
REPOSITORIES = {
    "sparsegpt/sparsegpt.py": ("SparseGPT", "fasterprune"),
    "gptq/gptq.py": ("GPTQ", "fasterquant"),
    "ALPS/alps.py": ("ALPS_prune", "ALPS_admm"),
    "QuantEase/method/quantease.py": ("QuantEase", "fasterquant"),
}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A model of two blocks, and its token files."""
    build("llama").save_pretrained(tmp_path / "model")
    for name, seed in (("calibration", 0), ("evaluation", 1)):
        save_file({"tokens": tokens(4, seed=seed)}, tmp_path / name, {"info": json.dumps({})})
    return [str(tmp_path / name) for name in ("model", "calibration", "evaluation")]


def rows(printed: str) -> list[list[str]]:
    """The cells of the table's rows, without its two first lines."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_a_python_without_the_peer_is_refused(files: list[str], capsys: pytest.CaptureFixture[str]):
    for python, reason in ((sys.executable, "No module named 'llmcompressor'"), ("/nowhere", "No such file")):
        with pytest.raises(SystemExit):
            bench_peers.main([*files, "--peer", python])
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"--peer must be a Python that can import llmcompressor. Got {python} (" in last and reason in last
    with pytest.raises(SystemExit):
        bench_peers.main(files)
    assert "--peer or --released must be given" in capsys.readouterr().err


def test_the_peer_s_folder_is_what_is_evaluated(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    python = tmp_path / "python"
    python.write_text(PEER.format(python=sys.executable))
    python.chmod(0o755)
    bench_peers.main([*files, "--peer", str(python), "--rounds", "1", "--threads", "1"])
    dense = evaluate(bench_peers.load_folder(Path(files[0])), tokens(4, seed=1))["perplexity"]
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["wanda 50% row", "sparsegpt 50% layer", "gptq 4b g64"]
    for _, ours, theirs, gain, mine, other, difference in found:
        assert theirs == "1000000.00" and float(gain) > 1e6 / (float(ours) + 0.01)
        assert other == f"{dense:.2f}" != mine
        assert float(difference) == pytest.approx(100 * (float(mine) / dense - 1), abs=0.02)


def test_released_codes_run_on_the_processor(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    released = tmp_path / "released"
    with pytest.raises(SystemExit):
        bench_peers.main([*files, "--released", str(released)])
    lacking = "--released must hold sparsegpt, gptq, ALPS, QuantEase."
    assert lacking in " ".join(capsys.readouterr().err.split())
    for path, (name, run) in REPOSITORIES.items():
        file = released / path
        file.parent.mkdir(parents=True)
        quant = ".quant" if file.parent.name == "method" else "quant"
        file.write_text(SOLVER.format(quant=quant, name=name, run=run, repository=path.split("/")[0]))
        (file.parent / "quant.py").write_text(QUANT)
    bench_peers.main([*files, "--released", str(released), "--rounds", "1", "--threads", "1", "--blocks", "1"])
    found = rows(capsys.readouterr().out)
    assert [row[0] for row in found[::4]] == [
        "sparsegpt 50% layer",
        "gptq 4b g64",
        "alps 50% layer",
        "quantease 4b g64",
    ]
    assert {row[1] for row in found} == {"32 x 32", "16 x 32", "48 x 32", "32 x 48"} and len(found) == 16
    for *_, mine, other in found:
        assert 0 < float(mine) < float(other) == 1
    assert not sys.modules.keys() & {"quant", "gptq", "method"}
