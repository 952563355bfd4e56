"""Synthetic studies for the tests of tables and figures: plausible numbers, no model, no results of the repository."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from layerwise.contract.target import Target
from layerwise.results.comparisons import ERRORS, Observation, compare_methods
from layerwise.storage.bits_per_weight import bits_per_weight
from layerwise.storage.table_schema import from_rows, to_frame

KINDS = {
    "q_proj": ("self_attn", "q_proj,k_proj,v_proj", 256, 256),
    "k_proj": ("self_attn", "q_proj,k_proj,v_proj", 128, 256),
    "v_proj": ("self_attn", "q_proj,k_proj,v_proj", 128, 256),
    "o_proj": ("self_attn", "o_proj", 256, 256),
    "gate_proj": ("mlp", "gate_proj,up_proj", 640, 256),
    "up_proj": ("mlp", "gate_proj,up_proj", 640, 256),
    "down_proj": ("mlp", "down_proj", 256, 640),
}
# method: (comparison, error relative to magnitude's, supports sparsity, supports bits)
METHODS = {
    "random": ("control", 4.0, True, False),
    "magnitude": ("mask-only", 1.0, True, False),
    "wanda": ("mask-only", 0.55, True, False),
    "ria": ("mask-only", 0.52, True, False),
    "sparse_swaps": ("mask-only", 0.40, True, False),
    "sparsegpt": ("weight-updating", 0.30, True, True),
    "alps": ("weight-updating", 0.24, True, False),
    "rtn": ("quantised", 0.5, False, True),
    "gptq": ("quantised", 0.3, False, True),
}
DEMO = ("random", "magnitude", "wanda", "sparsegpt", "rtn")
TARGETS: dict[str, tuple[float, str, int | None, int | None]] = {
    "50% row": (0.5, "row", None, None),
    "60% row": (0.6, "row", None, None),
    "70% row": (0.7, "row", None, None),
    "50% layer": (0.5, "layer", None, None),
    "2:4": (0.5, "2:4", None, None),
    "4:8": (0.5, "4:8", None, None),
    "4b g128": (0.0, "row", 4, 128),
    "3b g128": (0.0, "row", 3, 128),
}
# Of every family, most at about 6.4 or 4.2 stored bits: (label, method, comparison, target, mean error).
FAMILIES = (
    ("svd", "svd", "control", "rank 40%", 0.2),
    ("fwsvd", "fwsvd", "low rank", "rank 40%", 0.095),
    ("svd_llm", "svd_llm", "low rank", "rank 40%", 0.06),
    ("svd_llm", "svd_llm", "low rank", "rank 26%", 0.1),
    ("lplr", "lplr", "low rank", "rank 78% 8b g128", 0.024),
    ("lplr", "lplr", "low rank", "rank 99% 4b g128", 0.014),
    ("rocket", "rocket", "sparse factor", "rank 40%", 0.045),
    ("rocket", "rocket", "sparse factor", "rank 26%", 0.09),
    ("oats", "oats", "sum of parts", "76.25% row rank 10%", 0.052),
    ("three_basil", "three_basil", "sum of parts", "76.25% row rank 10%", 0.0111),
    ("eora-sparsegpt", "eora", "sum of parts", "76.25% row rank 10%", 0.035),
    ("eora-gptq", "eora", "sum of parts", "3b g128 rank 6.25%", 0.0021),
    ("wanda", "wanda", "mask-only", "66.25% row", 0.034),
    ("sparsegpt", "sparsegpt", "weight-updating", "66.25% row", 0.019),
    ("sparsegpt", "sparsegpt", "weight-updating", "80.25% row", 0.07),
    ("alps", "alps", "weight-updating", "66.25% row", 0.0115),
    ("alps", "alps", "weight-updating", "80.25% row", 0.043),
    ("rtn", "rtn", "quantised", "4b g128", 0.0016),
    ("gptq", "gptq", "quantised", "4b g128", 0.0004),
    ("gptq", "gptq", "quantised", "3b g128", 0.0028),
    ("sparsegpt", "sparsegpt", "pruned and quantised", "50% row 4b g128", 0.0064),
    ("gqsa", "gqsa", "pruned and quantised", "50% 1x16 4b g16", 0.014),
)
PROVENANCE = {
    "commit": "a" * 40,
    "dirty": False,
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.0.0",
    "numpy": "2.4.0",
    "snakemake": "9.27.1",
    "platform": "Linux-x86_64",
    "threads": 1,
    "device": "cpu",
    "calibration_samples": 64,
}
STUDY = {
    "texts": {
        "docs-train": {"path": "train.txt", "dataset": "docstrings"},
        "docs-test": {"path": "test.txt", "dataset": "docstrings"},
        "wiki": {"hub": "Salesforce/wikitext"},
    },
    "calibration": {"docs": {"text": "docs-train"}},
    "evaluation": {"docs": {"text": "docs-test"}, "wiki": {"text": "wiki"}},
}
EVALUATIONS = {
    "docs-00000001": {"name": "docs", "text": "docs-test"},
    "wiki-00000002": {"name": "wiki", "text": "wiki"},
}


@dataclass(frozen=True)
class SyntheticCell:
    """error: mean error of its layers, of the cells of FAMILIES, whose size is that of their target."""

    folder: str
    columns: Mapping[str, Any]
    certificate: str | None = None
    error: float | None = None

    def overlap(self, evaluation: str) -> str:
        _, _, model, calib, *_ = self.folder.split("/")
        return f"results/tokens/{model}/overlap/{calib}/{evaluation}.json"


def cell(
    method: str,
    target: str,
    mode: str = "shared",
    model: str = "demo",
    label: str | None = None,
    calibration: str = "docs",
    params: Mapping[str, Any] | None = None,
    seed: int = 0,
    allocation: str = "uniform",
    allocation_params: Mapping[str, Any] | None = None,
) -> SyntheticCell:
    own = Target.parse(target)
    sparsity, pattern, bits, group = own.sparsity, own.pattern, own.bits, own.group
    comparison = METHODS.get(method, ("control",))[0]
    if method == "sparsegpt" and bits:
        comparison = "quantised"
    label = label or method
    if allocation != "uniform":
        target = f"{target} {allocation}"
    name = f"{method}-{label}-{target}-{seed}".replace(" ", "-").replace("%", "").replace(":", "-")
    columns = {
        "model": model,
        "calibration": calibration,
        "mode": mode,
        "label": label,
        "method": method,
        "comparison": comparison,
        "target": target,
        "allocation": allocation,
        "allocator": allocation,
        "allocation_params": json.dumps(allocation_params or {}, sort_keys=True),
        "sparsity": sparsity,
        "pattern": pattern,
        "bits": bits,
        "group": group,
        "symmetric": False,
        "params": json.dumps(params or {}, sort_keys=True),
        "seed": seed,
        "cell": name,
    }
    return SyntheticCell(f"results/cells/{model}-1/{calibration}-1/{mode}/{name}", columns)


def plan(
    methods: Sequence[str] = DEMO,
    targets: Sequence[str] = tuple(TARGETS),
    modes: Sequence[str] = ("shared", "sequential"),
    models: Sequence[str] = ("demo",),
) -> list[SyntheticCell]:
    """Every supported pair, and one dense cell per model, as the plan has them."""
    cells = []
    for model in models:
        cells.append(cell("dense", "dense", modes[0], model))
        for mode in modes:
            for method in methods:
                for target in targets:
                    sparsity, _, bits, _ = TARGETS[target]
                    _, _, prunes, quantises = METHODS[method]
                    if (prunes or not sparsity) and (quantises or not bits):
                        cells.append(cell(method, target, mode, model))
    return cells


def families() -> list[SyntheticCell]:
    """The cells of FAMILIES and the dense one, of one mode."""
    cells = [cell("dense", "dense")]
    for label, method, comparison, text, error in FAMILIES:
        target, base = Target.parse(text), cell(method, text, label=label)
        own = {name: getattr(target, name) for name in ("sparsity", "pattern", "bits", "group")}
        cells.append(replace(base, columns=dict(base.columns) | own | {"comparison": comparison}, error=error))
    return cells


def layer_frame(of: SyntheticCell, blocks: int = 8) -> pd.DataFrame:
    """Rows of layers.parquet: the error grows with depth, sparsity and the method's factor."""
    columns = of.columns
    strength = _strength(of)[1]
    certified = (
        columns["comparison"] == "mask-only" and columns["mode"] == "shared" and strength > 0 and not columns["bits"]
    )
    budget, rows = budget_of(columns), []
    for (block, (kind, (parent, tap, out, inputs))), (layers_own, error) in zip(
        product(range(blocks), KINDS.items()), _errors(of, blocks), strict=True
    ):
        rows.append(
            dict(columns)
            | {
                "layer": f"model.layers.{block}.{parent}.{kind}",
                "kind": kind,
                "block": block,
                "tap": tap,
                "calibration_tokens": 16384,
                "token_scope": "all",
                "out": out,
                "in": inputs,
                "level": level_of(columns, budget, block / blocks),
                "pair": budget.label if budget.paired else None,
                "output_error": error,
                "absolute_error": 10 * error,
                "asymmetric_error": (1.0 if columns["mode"] == "shared" else 1.5) * error,
                "first_token_error": 2 * error,
                "lower_bound": 0.1 * layers_own if certified else None,
                "gap_to_bound": 1 - 0.1 * layers_own / error if certified else None,
                "achieved_sparsity": columns["sparsity"],
                "bits_per_weight": float(columns["bits"] or 16) * (1 - columns["sparsity"]),
                "damping": None,
                "seconds": 0.25,
                "peak_mb": None,
                "peak_gpu_mb": None,
            }
        )
    return pd.DataFrame(rows)


def _strength(of: SyntheticCell) -> tuple[float, float]:
    """The method's factor of the error, and the error of the target."""
    columns = of.columns
    factor = METHODS.get(columns["method"], ("", 0.0))[1]
    strength = {0.5: 0.02, 0.6: 0.05, 0.7: 0.13}.get(columns["sparsity"], 0.01 if columns["bits"] == 4 else 0.05)
    if of.error is not None:
        factor, strength = 1.0, of.error
    return factor, strength * (1.8 if ":" in columns["pattern"] else 1.0)


def _errors(of: SyntheticCell, blocks: int) -> list[tuple[float, float]]:
    """Of every layer in order: what it gives to its error, and its error."""
    columns = of.columns
    rng = np.random.default_rng(len(columns["mode"]) + 100 * len(columns["target"]))  # the layer's
    own = np.random.default_rng(sum(map(ord, columns["method"] + columns["target"])) + 1000 * columns["seed"])
    (factor, strength), found = _strength(of), []
    for block in range(blocks):
        for _ in KINDS:
            layers_own = strength * (0.4 + block / blocks) * float(np.exp(rng.normal(0, 0.15)))
            found.append((layers_own, min(factor * layers_own * float(np.exp(own.normal(0, 0.2))), 1.0)))
    return found


def budget_of(columns: Mapping[str, Any]) -> Target:
    """The target of a cell, without the name of its allocation."""
    return Target.parse(columns["target"].removesuffix(f" {columns['allocation']}"))


def level_of(columns: Mapping[str, Any], target: Target, depth: float) -> float:
    """What a layer at a depth in [0, 1] gives: more the deeper it is, where an allocation says so; of a paired target
    its stored bits per weight."""
    if target.paired:
        stored = bits_per_weight(target, 1 - target.sparsity, 512, 512)
        return stored * (1.0 if columns["allocation"] == "uniform" else 1 + 0.2 * (depth - 0.5))
    if columns["sparsity"]:
        return columns["sparsity"] + (0.0 if columns["allocation"] == "uniform" else 0.2 * (depth - 0.5))
    return float(columns["bits"] or 0)


def trace_frame(of: SyntheticCell, iterations: int = 3) -> pd.DataFrame:
    layer = "model.layers.0.self_attn.q_proj"
    rows = [
        dict(of.columns)
        | {"layer": layer, "iteration": i, "seconds": 0.1 * i, "objective": 1 / (i + 1)}
        | {"criterion": "error", "duality_gap": None}
        for i in range(iterations)
    ]
    names = ["layer", "iteration", "seconds", "objective", "criterion", "duality_gap"]
    return pd.DataFrame(rows, columns=[*of.columns, *names])


def perplexity_of(of: SyntheticCell) -> float:
    error = float(np.mean([error for _, error in _errors(of, blocks=2)]))
    return 12.5 * float(np.exp(22 * error)) * (0.97 if of.columns["mode"] == "sequential" else 1.0)


def divergence_of(of: SyntheticCell) -> dict[str, Any]:
    """From the dense model, whose perplexity is 12.5; it is 0 for the dense cell itself."""
    mean = float(np.log(perplexity_of(of) / 12.5)) ** 2 if of.columns["method"] != "dense" else 0.0
    windows, same = mean * (1 + np.arange(-3, 4) / 10), np.exp(-mean) * (1 + np.arange(-3, 4) / 1000) / 1.01
    found = {"kl": mean, "kl_p99": 5 * mean, "top1_agreement": float(same.mean())}
    return found | {"kl_windows": windows.tolist(), "top1_windows": same.tolist()}


def write_cell(root: Path, of: SyntheticCell, texts: Iterable[str] = tuple(EVALUATIONS), blocks: int = 2) -> Path:
    """The files of a finished cell."""
    folder = root / of.folder
    folder.mkdir(parents=True, exist_ok=True)
    layers = layer_frame(of, blocks).assign(lower_bound=None, gap_to_bound=None)  # collect fills these in
    layers.to_parquet(folder / "layers.parquet")
    trace_frame(of).to_parquet(folder / "trace.parquet")
    record = {"columns": dict(of.columns), "provenance": PROVENANCE, "seconds": 9.5, "peak_mb": 100.0}
    (folder / "cell.json").write_text(json.dumps(record))
    for identity in texts:
        result = {
            "perplexity": perplexity_of(of),
            "mean_loss": float(np.log(perplexity_of(of))),
            "losses": (np.log(perplexity_of(of)) + np.arange(-3, 4) / 10).tolist(),
            "windows": 7,
            "length": 512,
            "text": {"sha256": "f" * 64},
            "seconds": 1.0,
            "divergence": divergence_of(of),
        }
        (folder / f"perplexity-{identity}.json").write_text(json.dumps(result))
        write_overlap(root / of.overlap(identity))
    return folder


def write_overlap(path: Path, overlap: float | None = 0.0, contamination: str | None = None) -> None:
    """What is known of the tokens of a calibration and an evaluation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"overlap": overlap, "reverse": overlap, "text_overlap": overlap, "contamination": contamination}
    path.write_text(json.dumps(found))


def layers_table(cells: Sequence[SyntheticCell], blocks: int = 8) -> pd.DataFrame:
    """The `layers` table of finished cells."""
    return pd.concat([layer_frame(of, blocks) for of in cells], ignore_index=True)


def traces_table(cells: Sequence[SyntheticCell], blocks: int = 8) -> pd.DataFrame:
    """The `traces` table: every layer's error halves from step to step towards the one in the `layers` table."""
    frames = []
    for of in (one for one in cells if one.columns["method"] != "dense"):
        layers, trace = layer_frame(of, blocks), trace_frame(of)
        times = (1 + 2.0 ** (trace["iteration"].max() - trace["iteration"])) / 2
        layer, row = (index.ravel() for index in np.indices((len(layers), len(trace))))
        objective = layers["absolute_error"].to_numpy()[layer] * times.to_numpy()[row]
        frames.append(trace.iloc[row].assign(layer=layers["layer"].to_numpy()[layer], objective=objective))
    empty = pd.DataFrame(columns=list(trace_frame(cells[0]).columns))
    return pd.concat(frames, ignore_index=True) if frames else empty


def comparisons_table(cells: Sequence[SyntheticCell]) -> pd.DataFrame:
    """The `comparisons` table of the errors of the layers."""
    observations = []
    for of in cells:
        errors = layer_frame(of).set_index("layer")["output_error"].to_dict()
        observations.append(Observation(of.columns, {ERRORS: errors if of.columns["method"] != "dense" else {}}))
    return to_frame(from_rows(compare_methods(observations), "comparisons", "the comparisons"))


def cells_table(
    cells: Sequence[SyntheticCell], failed: Sequence[tuple[str, str, str]] = (), text: str = "docs"
) -> pd.DataFrame:
    """The `cells` table: perplexity, kl, mean_output_error, bits_per_weight; failed: (method, target, mode) triples."""
    rows = []
    for of in cells:
        broken = (of.columns["method"], of.columns["target"], of.columns["mode"]) in failed
        error = float(np.mean(layer_frame(of)["output_error"].to_list()))
        size = 16 * (1 - of.columns["sparsity"]) * (of.columns["bits"] or 16) / 16 + (of.columns["sparsity"] > 0)
        if of.error is not None:
            size = bits_per_weight(budget_of(of.columns), 1 - of.columns["sparsity"], 512, 512)
        contamination = "draw from the same data set, docstrings"
        for metric, value in (
            ("perplexity", perplexity_of(of)),
            ("kl", divergence_of(of)["kl"]),
            ("mean_output_error", error),
            ("bits_per_weight", size),
        ):
            rows.append(
                dict(of.columns)
                | {
                    "metric": metric,
                    "text": text if metric in ("perplexity", "kl") else None,
                    "task": None,
                    "task_set": None,
                    "stderr": None,
                    "value": None if broken else value,
                    "status": "failed" if broken else "done",
                    "reason": "compress, out of memory: no room" if broken else None,
                    "contaminated": metric in ("perplexity", "kl"),
                    "contamination": contamination if metric in ("perplexity", "kl") else None,
                    "swept": "sparsity",
                    **(dict.fromkeys(PROVENANCE) if broken else PROVENANCE),
                }
            )
    return pd.DataFrame(rows)
