"""A small real run of the DAG on the embedded model, in a folder of its own: `python -m tests.support.smoke`.

Exits non-zero unless the methods are in the order that the literature gives them and a second run has nothing to do.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

TARGET, MODES = {"pattern": "2:4"}, ("shared", "sequential")
ORDER = ("dense", "sparsegpt", "wanda", "magnitude")  # by perplexity, best first
CALIBRATION_SAMPLES, EVALUATION_WINDOWS = 16, 24


def small_study(study: Mapping[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """The embedded study with one target and task, fewer methods and tokens, to be run from any folder."""
    return {
        **study,
        "study": "smoke",
        "modes": list(MODES),
        "certificates": False,
        "models": {name: {**spec, "path": str(root / spec["path"])} for name, spec in study["models"].items()},
        "calibration": {name: {**s, "samples": CALIBRATION_SAMPLES} for name, s in study["calibration"].items()},
        "evaluation": {name: {**s, "samples": EVALUATION_WINDOWS} for name, s in study["evaluation"].items()},
        "tasks": {name: {**s, "tasks": s["tasks"][:1]} for name, s in study["tasks"].items()},
        "targets": [TARGET],
        "methods": dict.fromkeys(ORDER),
    }


def snakemake(folder: Path) -> list[str]:
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--snakefile", str(ROOT / "Snakefile")]
    return [*command, "--directory", str(folder), "--configfile", str(folder / "study.yaml")]


def out_of_order(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A sentence for each mode in which a method is not strictly better than the next of ORDER."""
    value = {(row["mode"], row["label"]): float(row["value"]) for row in rows if row["metric"] == "perplexity"}
    (dense,) = (number for (_, label), number in value.items() if label == "dense")
    modes = list(dict.fromkeys(mode for mode, label in value if label != "dense"))
    wrong = [] if sorted(modes) == sorted(MODES) else [f"The modes must be {', '.join(MODES)}. Got {modes} instead."]
    for mode in modes:
        line = [dense, *(value[mode, label] for label in ORDER[1:])]
        if any(better >= worse for better, worse in zip(line, line[1:], strict=False)):
            told = ", ".join(f"{label} {number:.3f}" for label, number in zip(ORDER, line, strict=True))
            wrong.append(f"{mode}: expected {' < '.join(ORDER)}, got {told}.")
    return wrong


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="layerwise-") as name:
        folder = Path(name)
        study = yaml.safe_load((ROOT / "config/config.yaml").read_text("utf-8"))
        (folder / "study.yaml").write_text(yaml.safe_dump(small_study(study), sort_keys=False), "utf-8")
        if subprocess.run(snakemake(folder), cwd=folder).returncode:
            sys.exit("error: the small study did not run to its end.")
        again = subprocess.run(snakemake(folder), cwd=folder, capture_output=True, text=True)
        print("\n" + (folder / "results/tables/main.md").read_text("utf-8"))
        with (folder / "results/tables/cells.csv").open(encoding="utf-8", newline="") as file:
            wrong = out_of_order(list(csv.DictReader(file)))
    if again.returncode or "Nothing to be done" not in again.stdout + again.stderr:
        wrong.append(f"A second run should have nothing to do:\n{again.stdout}{again.stderr}")
    if wrong:
        sys.exit("error: " + "\n".join(wrong))
    print("The methods stand in the expected order, and a second run has nothing to do.")


if __name__ == "__main__":
    main()
