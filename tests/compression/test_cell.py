"""The runner of a cell: what it scores, what it saves, how it walks through the blocks, and how it names a fault."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn

from layerwise.calibration import fisher, fisher_store
from layerwise.calibration.calibrate import write_gram
from layerwise.calibration.gram_store import read_block
from layerwise.checks import layer_cases as layers
from layerwise.cli import compress as compress_worker
from layerwise.cli import fisher as fisher_worker
from layerwise.compression import allocate
from layerwise.compression import cell as cell_module
from layerwise.compression import solver as solver_module
from layerwise.compression.cell import CellJob
from layerwise.contract.layer import Gram, Layer
from layerwise.contract.target import Target
from layerwise.methods.random import Random
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.methods.wanda import Wanda
from layerwise.models.loading import load
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import find_blocks, linears
from layerwise.numerics import learned_steps, ops
from layerwise.numerics.gradient_projection import Problem
from layerwise.runtime.errors import InputError
from layerwise.sources import fingerprint
from layerwise.storage.packed_file import PackedFile
from layerwise.study.cell import Cell
from layerwise.study.grid import plan
from tests.support.model_families import HIDDEN, build, tokens
from tests.support.typing_helpers import some

SAMPLES, LENGTH = 6, 24
ROW, TWO_OF_FOUR = Target(0.5), Target(pattern="2:4")
OUTPUTS = ["cell.json", "layers.parquet", "trace.parquet", "weights.safetensors"]
UP = "model.layers.1.mlp.up_proj"  # where the faulty methods below fail

FAULTY = '''"""Magnitude pruning with a fault."""

from dataclasses import dataclass, replace

import torch

from layerwise.numerics import ops
from layerwise.contract.layer import Compressed, Method, Quantised, UnsupportedTarget

CARD = {{
    "title": "Faulty",
    "patterns": ["row", "n:m"],
    "bits": [4],
    "updates_weights": False,
    "needs": ["gram"],
    "parameters": {{}},
}}


@dataclass(frozen=True)
class Faulty(Method):
    def solve(self, layer, target, rng):
        good = ops.pruned(layer, layer.weight.abs(), target)
        if layer.name != "{layer}":
            return good
        {fault}
'''


@dataclass(frozen=True)
class Case:
    """A saved model with everything that a cell's job is given."""

    folder: Path
    family: str = "llama"
    dtype: str = "float32"

    @property
    def spec(self) -> dict[str, Any]:
        """The model's entry in a config."""
        return {"path": str(self.folder / "model"), "dtype": self.dtype}

    @property
    def model(self) -> str:
        """The model as jobs are given it."""
        return json.dumps({"name": "tiny", **self.spec})

    def prepare(self) -> Case:
        build(self.family, dtype=getattr(torch, self.dtype)).save_pretrained(self.folder / "model")
        info = {"dataset": "words", "sha256": "0" * 64, "samples": SAMPLES, "length": LENGTH}
        info |= {"seed": 0, "sampling": "stream"}
        drawn = {"tokens": tokens(SAMPLES, LENGTH).numpy().astype(np.int64)}
        save_file(drawn, self.folder / "tokens.safetensors", metadata={"info": json.dumps(info)})
        fingerprint.main(["--model", self.model, "--out", str(self.folder / "model.json")])
        write_gram(self.folder / "gram", LazyBlocks(self.spec), tokens(SAMPLES, LENGTH), {})
        return self

    def run(
        self,
        method: str,
        target: Target,
        mode: str = "shared",
        out: str = "",
        own: Path | None = None,
        tune: dict[str, Any] | None = None,
        dtype: str | None = None,
        allocations: dict[str, Any] | None = None,
        fisher: Path | None = None,
        asymmetric: bool = False,
    ) -> Path:
        """Compress as the workflow does and return the cell's folder.

        allocations: a section of a config with one entry, whose levels lie in the folder too.
        """
        entry = {"tune": tune} if tune else {}
        entry |= {"chain": ["wanda", "rtn"]} if method == "chain" else {}
        config = {
            "models": {"tiny": self.spec},
            "texts": {"words": {"path": "words.txt"}},
            "calibration": {"words": {"text": "words", "samples": SAMPLES, "length": LENGTH, "seed": 0}},
            "evaluation": {"words": {"text": "words", "length": LENGTH}},
            "modes": [mode],
            "asymmetric": asymmetric,
            "targets": [{key: value for key, value in target.as_dict().items() if value is not None}],
            "methods": {method: entry} if method != "dense" else {"dense": None, "magnitude": None},
            "method_paths": [str(own)] if own and not allocations else [],
            **({"allocations": allocations, "allocator_paths": [str(own)] if own else []} if allocations else {}),
        }
        folder = self.folder / (out or f"cells/{method} {target.label} {mode}".replace(":", "of"))
        cell = plan(config).cells[0]
        levels = folder / "levels.parquet"
        if cell.levels:
            self.allocate(cell, levels, own)
        arguments = {
            "cell": cell.params,
            "model": self.model,
            "fingerprint": self.folder / "model.json",
            "tokens": self.folder / "tokens.safetensors",
            **({"gram": self.folder / "gram"} if mode == "shared" else {}),
            **({"fisher": fisher} if fisher else {}),
            **({"method-path": own} if own else {}),
            **({"dtype": dtype} if dtype else {}),
            **({"levels": levels} if cell.levels else {}),
            "out": folder,
        }
        compress_worker.main([part for key, value in arguments.items() for part in (f"--{key}", str(value))])
        return folder

    def allocate(self, cell: Cell, out: Path, own: Path | None) -> None:
        """Spread a cell's budget as the workflow does."""
        out.parent.mkdir(parents=True, exist_ok=True)
        arguments = {
            "columns": json.dumps({"model": "tiny", "calibration": "words"}),
            "allocation": json.dumps(cell.spec.get("allocation")),
            "model": self.model,
            "fingerprint": self.folder / "model.json",
            "gram": self.folder / "gram",
            "tokens": self.folder / "tokens.safetensors",
            **({"allocator-path": own} if own else {}),
            "out": out,
        }
        allocate.main([part for key, value in arguments.items() for part in (f"--{key}", str(value))])


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("compress")).prepare()


def rows(cell: Path, table: str = "layers") -> list[dict[str, Any]]:
    return pq.read_table(cell / f"{table}.parquet").to_pylist()


def by_layer(cell: Path, column: str) -> dict[str, Any]:
    return {row["layer"]: row[column] for row in rows(cell)}


def weights(cell: Path) -> dict[str, torch.Tensor]:
    file = PackedFile(cell / "weights.safetensors")
    return {layer: file.read(layer).weight for layer in file.shapes}


# ---------------------------------------------------------------------------------------------------- what is reported


def inputs_of(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name -> what each linear layer of the blocks sees, [tokens, in] float64, by hooks on each."""
    prefix, blocks = find_blocks(model)
    seen, handles = {}, []
    for index, block in enumerate(blocks):
        for linear in linears(block, f"{prefix}.{index}"):

            def hook(_, args, name=linear.name):
                seen[name] = args[0].flatten(0, -2).double()

            handles.append(linear.module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def dense_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    prefix, blocks = find_blocks(model)
    found = [linear for i, block in enumerate(blocks) for linear in linears(block, f"{prefix}.{i}")]
    return {linear.name: linear.weight() for linear in found}


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_the_score_is_the_error_of_the_outputs_of_the_saved_weights(case, method):
    """In float64 from the activations themselves, without a Gram."""
    cell = case.run(method, TWO_OF_FOUR)
    model = load(case.spec)
    seen, dense, saved = inputs_of(model, tokens(SAMPLES, LENGTH)), dense_weights(model), weights(cell)
    assert saved.keys() == seen.keys() == {row["layer"] for row in rows(cell)}
    for row in rows(cell):
        x, w, what = seen[row["layer"]], dense[row["layer"]].double(), saved[row["layer"]].double()
        error, total = ((x @ (w - what).T) ** 2).sum() / len(x), ((x @ w.T) ** 2).sum() / len(x)
        assert row["absolute_error"] == pytest.approx(float(error), rel=1e-5)
        assert row["output_error"] == pytest.approx(float(error / total), rel=1e-5)
        lost, whole = (((x[::LENGTH] @ part.T) ** 2).sum() for part in (w - what, w))
        assert row["first_token_error"] == pytest.approx(float(lost / whole), rel=1e-5)
        assert row["achieved_sparsity"] == 0.5 == float((what == 0).double().mean())
        assert (row["out"], row["in"]) == tuple(what.shape)


def test_the_saved_weights_are_exactly_what_was_scored(case):
    cell = case.run("sparsegpt", ROW)
    saved, dense = weights(cell), dense_weights(load(case.spec))
    grams = {
        name: tap.gram.matrix for i in range(2) for tap in read_block(case.folder / "gram", i) for name in tap.layers
    }
    for row in rows(cell):
        gram, w = grams[row["layer"]].double(), dense[row["layer"]].double()
        difference = w - saved[row["layer"]].double()
        error = torch.trace(difference @ gram @ difference.T)
        assert row["absolute_error"] == pytest.approx(float(error), rel=1e-12)
        assert row["output_error"] == pytest.approx(float(error / torch.trace(w @ gram @ w.T)), rel=1e-12)


def test_a_model_in_half_precision_is_saved_as_it_is_evaluated(tmp_path):
    half = Case(tmp_path, dtype="bfloat16").prepare()
    cell = half.run("magnitude", TWO_OF_FOUR)
    kept = [tensor for name, tensor in load_file(cell / "weights.safetensors").items() if name.endswith(".values")]
    assert len(kept) == 14 and {tensor.dtype for tensor in kept} == {torch.bfloat16}
    saved = weights(cell)
    for name, dense in dense_weights(load(half.spec)).items():
        assert torch.equal(saved[name], ops.prune_mask(dense.abs(), TWO_OF_FOUR) * dense)


@pytest.mark.parametrize("mode", ["shared", "sequential"])
def test_dense_loses_nothing(case, mode):
    cell = case.run("dense", Target(0.5), mode)
    assert set(by_layer(cell, "output_error").values()) == {0.0} == set(by_layer(cell, "achieved_sparsity").values())
    assert set(by_layer(cell, "bits_per_weight").values()) == {16.0}
    dense = dense_weights(load(case.spec))
    assert all(torch.equal(weight, dense[name]) for name, weight in weights(cell).items())


def test_rows_of_a_cell(case, capsys):
    cell = case.run("wanda", TWO_OF_FOUR)
    table = rows(cell)
    assert sorted(path.name for path in cell.iterdir()) == OUTPUTS
    assert [row["block"] for row in table] == [0] * 7 + [1] * 7
    assert [row["tap"] for row in table[:7]] == [
        *["q_proj,k_proj,v_proj"] * 3,
        "o_proj",
        *["gate_proj,up_proj"] * 2,
        "down_proj",
    ]
    assert all(row["layer"].endswith(f"{row['block']}.{inside(row)}.{row['kind']}") for row in table)
    assert {(row["label"], row["target"], row["mode"], row["seed"]) for row in table} == {("wanda", "2:4", "shared", 0)}
    assert {row["bits_per_weight"] for row in table} == {9.0} and all(row["peak_mb"] > 0 for row in table)
    assert all(0 <= row["seconds"] < 60 and row["damping"] is None for row in table)
    assert rows(cell, "trace") == []
    record = json.loads((cell / "cell.json").read_text("utf-8"))
    assert record["columns"].items() <= table[0].items()
    facts = record["provenance"]
    assert facts["model_source"] == case.spec["path"] and facts["torch"] == torch.__version__
    weights_file = case.folder / "model/model.safetensors"
    assert facts["model_sha256"] == hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert (facts["calibration_text"], facts["calibration_samples"], facts["calibration_length"]) == ("words", 6, 24)
    assert "wanda 2:4 shared" in capsys.readouterr().err  # the progress bar


def test_learned_steps_are_kept_with_their_layer_and_grams(case):
    """The kept steps give the saved weights again, from the Grams that the record names."""
    cell = case.run("unfolded", ROW)
    kept, saved, dense = learned(cell), weights(cell), dense_weights(load(case.spec))
    assert kept["grams"] == "gram" and list(kept["layers"]) == [row["layer"] for row in rows(cell)]
    for name, own in kept["layers"].items():
        tap = {tap.name: tap for tap in read_block(case.folder / kept["grams"], own["block"])}[own["tap"]]
        layer = Layer(name, dense[name], tap.gram)
        problem, start = Problem.of(layer, ROW), Wanda().compress(layer, ROW, torch.Generator())
        of_layer = learned_steps.Rows.of_layer(layer, problem, start, ROW)
        *_, (_, best, _) = learned_steps.best_iterates(of_layer, learned_steps.Steps(torch.tensor(own["steps"])))
        torch.testing.assert_close((best.weight.double() * problem.unit).float(), saved[name], rtol=0, atol=0)
    alone = learned(case.run("unfolded", ROW, "sequential"))
    first, second = (f"model.layers.{block}.self_attn.q_proj" for block in (0, 1))
    assert alone["grams"] is None and alone["layers"][first] == kept["layers"][first]
    assert alone["layers"][second]["steps"] != kept["layers"][second]["steps"]
    assert learned(case.run("magnitude", ROW)) is None


def learned(cell: Path) -> Any:
    return json.loads((cell / "cell.json").read_text("utf-8")).get("learned")


@pytest.mark.parametrize("mode", ["shared", "sequential"])
def test_the_input_scale_of_awq_is_counted(case, mode):
    target = Target(bits=4, group=8)
    plain, scaled = (rows(case.run(name, target, mode)) for name in ("rtn", "awq"))
    for without, row in zip(plain, scaled, strict=True):
        assert row["bits_per_weight"] == pytest.approx(without["bits_per_weight"] + 16 / row["out"], rel=1e-12)
    assert sum(row["output_error"] for row in scaled) < sum(row["output_error"] for row in plain)


def inside(row: dict[str, Any]) -> str:
    return "self_attn" if row["kind"] in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


def test_a_damping_that_was_used_is_a_column(case):
    assert set(by_layer(case.run("sparsegpt", ROW), "damping").values()) == {0.01}


# --------------------------------------------------------------------------------------------------------------- modes


class Catcher(nn.Module):
    """Takes the first block's place and keeps what it is called with, as in the published codes."""

    def __init__(self, inputs: torch.Tensor) -> None:
        super().__init__()
        self.inputs, self.row, self.keywords = inputs, 0, {}

    def forward(self, hidden, **keywords):
        self.inputs[self.row] = hidden[0]
        self.row += 1
        self.keywords = keywords
        raise StopIteration


@torch.no_grad()
def published(model: nn.Module, batch: torch.Tensor, prune) -> dict[str, torch.Tensor]:
    """The loop of SparseGPT's and Wanda's code for Llama: one sequence at a time, the block run again once pruned."""
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    inputs = torch.zeros(len(batch), batch.shape[1], HIDDEN)
    outputs = torch.zeros_like(inputs)
    first, catcher = blocks[0], Catcher(inputs)
    blocks[0] = catcher
    for row in batch:
        with suppress(StopIteration):
            model(row[None], use_cache=False)
    keywords, blocks[0] = catcher.keywords, first
    found = {}
    for index, block in enumerate(blocks):
        subset = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        sums = {name: torch.zeros(module.in_features, module.in_features) for name, module in subset.items()}
        handles = []
        for name, module in subset.items():

            def add_batch(_, args, out, total=sums[name]):
                x = args[0].reshape(-1, args[0].shape[-1]).t()
                total += x @ x.t()

            handles.append(module.register_forward_hook(add_batch))
        for j in range(len(batch)):
            outputs[j] = block(inputs[j][None], **keywords)[0]
        for handle in handles:
            handle.remove()
        for name, module in subset.items():
            module.weight.data = prune(module.weight.data, sums[name] / batch.numel())
            found[f"model.layers.{index}.{name}"] = module.weight.data.clone()
        for j in range(len(batch)):
            outputs[j] = block(inputs[j][None], **keywords)[0]
        inputs, outputs = outputs, inputs
    return found


def wanda_by_row(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    metric = weight.abs() * gram.diagonal().sqrt().reshape(1, -1)
    order = torch.sort(metric, dim=-1, stable=True)[1][:, : weight.shape[1] // 2]
    return weight.scatter(1, order, 0)


def sparsegpt_by_row(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    layer = Layer("layer", weight, Gram(gram, SAMPLES * LENGTH))
    return SparseGPT().compress(layer, ROW, torch.Generator()).weight


@pytest.mark.parametrize(("method", "prune"), [("wanda", wanda_by_row), ("sparsegpt", sparsegpt_by_row)])
def test_sequential_is_the_published_loop(case, method, prune):
    saved = weights(case.run(method, ROW, "sequential"))
    expected = published(load(case.spec), tokens(SAMPLES, LENGTH), prune)
    assert saved.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(saved[name] == 0, weight == 0), name
        torch.testing.assert_close(saved[name], weight, rtol=1e-3, atol=1e-4)


def test_sequential_scores_on_what_the_compressed_blocks_pass_on(case):
    """The Gram of a block is that of the model whose blocks before it have the saved weights."""
    cell = case.run("magnitude", ROW, "sequential")
    errors, saved = by_layer(cell, "absolute_error"), weights(cell)
    model = load(case.spec)
    dense = dense_weights(model)
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        seen = inputs_of(model, tokens(SAMPLES, LENGTH))
        for linear in linears(block, f"{prefix}.{index}"):
            x, difference = seen[linear.name], (dense[linear.name] - saved[linear.name]).double()
            assert errors[linear.name] == pytest.approx(float(((x @ difference.T) ** 2).sum() / len(x)), rel=1e-5)
            linear.replace(saved[linear.name])


def test_only_blocks_of_dense_targets_stay_as_they_are(case, monkeypatch):
    asked: list[bool] = []
    blocks = cell_module.sequential_blocks

    def seen(*arguments):
        asked.extend(map(arguments[4], range(2)))  # stays
        return blocks(*arguments)

    monkeypatch.setattr(cell_module, "sequential_blocks", seen)
    dense = case.run("dense", ROW, "sequential", "stays")
    case.run("magnitude", ROW, "sequential", "changes")
    assert asked == [True, True, False, False]
    unknown = {row["asymmetric_error"] for row in rows(dense) if row["block"]}
    assert unknown == {None} and set(by_layer(dense, "output_error").values()) == {0.0}


@pytest.mark.parametrize("method", ["gptaq", "qronos", "gptq"])
def test_the_asymmetric_error_is_that_of_the_outputs_of_both_models(case, method):
    """Of what the saved weights make of the compressed model's inputs, against the dense weights on the dense ones.

    GPTQ does not need the dense model's inputs: the config asks for them. Its inputs are those before the block is
    compressed, the others' those after the compression of the layers before.
    """
    asked: dict[str, Any] = {"asymmetric": True, "out": "scored"} if method == "gptq" else {}
    cell = case.run(method, Target(bits=3), "sequential", **asked)
    errors, saved = by_layer(cell, "asymmetric_error"), weights(cell)
    model = load(case.spec)
    dense, batch = dense_weights(model), tokens(SAMPLES, LENGTH)
    originals = inputs_of(model, batch)
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        seen = inputs_of(model, batch)
        for linear in linears(block, f"{prefix}.{index}"):
            seen = seen if method == "gptq" else inputs_of(model, batch)
            wanted = originals[linear.name] @ dense[linear.name].double().T
            lost = wanted - seen[linear.name] @ saved[linear.name].double().T
            assert errors[linear.name] == pytest.approx(float((lost**2).sum() / (wanted**2).sum()), rel=1e-4)
            linear.replace(saved[linear.name])
    symmetric = by_layer(cell, "output_error")
    undrifted = "0." if method == "gptq" else "0.self_attn.[qkv]_"
    same = {name for name in errors if errors[name] == symmetric[name]}
    assert same and same == {name for name in errors if re.search(rf"layers\.{undrifted}", name)}


def test_the_asymmetric_error_is_the_output_error_or_not_known_where_no_method_asks(case):
    """In shared mode inputs are the dense model's; in sequential mode those of the first block are."""
    cell = case.run("gptaq", Target(bits=3))
    assert by_layer(cell, "asymmetric_error") == by_layer(cell, "output_error")
    gptq = case.run("gptq", Target(bits=3))
    assert all(torch.equal(weight, weights(gptq)[name]) for name, weight in weights(cell).items())
    alone = case.run("gptq", Target(bits=3), "sequential")
    unknown = by_layer(alone, "asymmetric_error")
    assert all((error is not None) == (".0." in name) for name, error in unknown.items())
    scored = case.run("gptq", Target(bits=3), "sequential", "scored apart", asymmetric=True)
    assert all(torch.equal(weight, weights(alone)[name]) for name, weight in weights(scored).items())
    assert by_layer(scored, "output_error") == by_layer(alone, "output_error")


def test_a_cell_is_given_the_fisher_of_each_of_its_layers(case, tmp_path):
    path = tmp_path / "fisher.safetensors"
    given = {"model": case.model, "fingerprint": case.folder / "model.json", "out": path}
    given |= {"tokens": case.folder / "tokens.safetensors"}
    fisher_worker.main([part for key, value in given.items() for part in (f"--{key}", str(value))])
    found = fisher_store.read(path)
    assert {name: own.tolist() for name, own in fisher.of_model(load(case.spec), tokens(SAMPLES, LENGTH)).items()} == {
        name: own.tolist() for name, own in found.items()
    }
    saved, dense = weights(case.run("fwsvd", Target(rank=0.5), fisher=path)), dense_weights(load(case.spec))
    for name, weight in dense.items():
        root = found[name].double().sqrt()[:, None].numpy()
        u, sizes, v = np.linalg.svd(weight.double().numpy() * root, full_matrices=False)
        rank = Target(rank=0.5).rank_of(*weight.shape)
        expected = (u[:, :rank] * sizes[:rank] @ v[:rank]) / root
        np.testing.assert_allclose(saved[name].numpy(), expected, atol=2e-3 * np.abs(expected).max())  # 16 bits
    with pytest.raises(InputError, match="fwsvd must have the fisher of the dense model, in shared mode. Got none"):
        case.run("fwsvd", Target(rank=0.5), out="cells/without")


def test_another_fisher_is_another_result(case, tmp_path):
    """By the hash of its content: a checkpoint of the first is not gone on with."""
    jobs = []
    for name in ("a", "b"):
        fisher_store.write(tmp_path / name, {"x": torch.full((2,), float(len(jobs) + 1))}, {})
        own = {"name": "fwsvd", "params": {}}
        spec = {"columns": {"mode": "sequential", "seed": 0}, "method": own, "target": {}}
        paths = (case.folder / "model.json", case.folder / "tokens.safetensors", tmp_path)
        jobs.append(CellJob(spec, case.spec, *paths, fisher=tmp_path / name))
    assert jobs[0].decisive()["fisher"] != jobs[1].decisive()["fisher"]
    assert "fisher" not in dataclasses.replace(jobs[0], fisher=None).decisive()


def test_sequential_passes_through_a_model_in_the_calibrations_dtype(case):
    """Magnitude's masks do not depend on the Grams, which are those of the model in bfloat16 as compressed so far."""
    cell = case.run("magnitude", ROW, "sequential", "cells/half", dtype="bfloat16")
    full = weights(case.run("magnitude", ROW, "sequential"))
    errors, saved = by_layer(cell, "absolute_error"), weights(cell)
    assert all(torch.equal(saved[name], weight) for name, weight in full.items())  # they keep the model's dtype
    model, dense = load({**case.spec, "dtype": "bfloat16"}), dense_weights(load(case.spec))
    prefix, blocks = find_blocks(model)
    for index, block in enumerate(blocks):
        seen = inputs_of(model, tokens(SAMPLES, LENGTH))
        for linear in linears(block, f"{prefix}.{index}"):
            x, difference = seen[linear.name].double(), (dense[linear.name] - saved[linear.name]).double()
            assert errors[linear.name] == pytest.approx(float(((x @ difference.T) ** 2).sum() / len(x)), rel=1e-5)
            linear.replace(saved[linear.name])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_calibrations_dtype_and_tuning_go_together(tmp_path, family):
    stages = {"blocks": {"epochs": 1, "batch": 2, "weights": 1e-3, "grid": 1e-3}}
    cell = Case(tmp_path, family).prepare().run("magnitude", ROW, "sequential", tune=stages, dtype="bfloat16")
    assert json.loads((cell / "cell.json").read_text())["tuning"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_both_modes_on_other_architectures(tmp_path, family):
    """GPT-2 stores its weights transposed; sequential mode must pass the pruned ones on."""
    other = Case(tmp_path, family).prepare()
    dense = dense_weights(load(other.spec))
    for mode in ("shared", "sequential"):
        saved = weights(other.run("magnitude", TWO_OF_FOUR, mode))
        for name, weight in dense.items():
            assert torch.equal(saved[name], ops.prune_mask(weight.abs(), TWO_OF_FOUR) * weight)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_modes_agree_on_the_first_block_and_only_there(case, method):
    one, other = case.run(method, TWO_OF_FOUR, "shared"), case.run(method, TWO_OF_FOUR, "sequential")
    first, second = by_layer(one, "absolute_error"), by_layer(other, "absolute_error")
    saved, again = weights(one), weights(other)
    for name in first:
        if ".0." in name:
            assert first[name] == second[name] and torch.equal(saved[name], again[name])
        else:
            assert first[name] != second[name]


def test_the_same_twice(case):
    cells = [case.run("random", ROW, out=f"twice/{i}") for i in range(2)]
    first, second = map(weights, cells)
    assert all(torch.equal(first[name], second[name]) for name in first)
    masks = [(first[f"model.layers.{i}.self_attn.q_proj"] == 0) for i in range(2)]
    assert not torch.equal(*masks)  # each layer draws its own numbers


def test_random_numbers_depend_on_seed_and_layer_but_not_on_the_order():
    def masks(names: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
        solver = solver_module.Solver("random", Random(), ROW, seed)
        made = {name: layers.make(layers.ORDINARY["correlated"], name) for name in names}
        return {name: some(solver.solve(layer)[0].mask) for name, layer in made.items()}

    forward, backward = masks(["a", "b", "c"]), masks(["c", "b"])
    assert all(torch.equal(forward[name], mask) for name, mask in backward.items())
    assert not torch.equal(forward["a"], forward["b"])
    assert not torch.equal(forward["a"], masks(["a"], seed=1)["a"])
    before = torch.get_rng_state()
    masks(["a"])
    assert torch.equal(torch.get_rng_state(), before)


# --------------------------------------------------------------------------------------------------------------- faults

FAULTS = {
    "raises": (
        'raise ArithmeticError("no pivot is left")',
        f"faulty failed on {UP}: ArithmeticError: no pivot is left",
    ),
    "refuses": (
        'raise UnsupportedTarget("faulty cannot")',
        f"faulty failed on {UP}: UnsupportedTarget: faulty cannot",
    ),
    "nothing": ("return None", "faulty"),
    "shape": (
        "return replace(good, weight=good.weight[:, 1:])",
        "promise 1: the weight's shape must be [48, 32]. Got [48, 31] instead",
    ),
    "dtype": (
        "return replace(good, weight=good.weight.double())",
        "promise 1: the weight's dtype must be torch.float32",
    ),
    "not finite": (
        "return replace(good, weight=good.weight / 0)",
        f"faulty broke its contract on {UP}: promise 1: the weight must be finite. "
        "Got 1536 entries of NaN or Inf instead.",
    ),
    "no mask": ("return Compressed(good.weight)", "promise 1: a pruned layer must have a mask. Got None instead"),
    "mask": (
        "return replace(good, weight=layer.weight.clone())",
        "promise 1: the weight must be zero where the mask is",
    ),
    "pattern": (
        "return replace(good, weight=layer.weight.clone(), mask=torch.ones_like(good.mask))",
        "promise 2: the kept entries of 2:4 must be exact. Got 384 groups of 2:4 that differ instead.",
    ),
    "weight": (
        "layer.weight[~good.mask] = 0\n        return good",
        "promise 1: the inputs must be untouched. Got a changed weight",
    ),
    "gram": (
        "layer.gram.matrix.mul_(2)\n        return good",
        "promise 1: the inputs must be untouched. Got a changed gram",
    ),
    "gram through numpy": (
        "layer.gram.matrix.numpy()[0, 0] += 1\n        return good",
        "promise 1: the inputs must be untouched. Got a changed gram",
    ),
}
SHORTAGES = {
    "Python": "raise MemoryError",
    "a sentence": 'raise MemoryError("no room for the inverse")',
    "torch": "torch.empty(2**50)",  # a plain RuntimeError
    "device": 'raise torch.OutOfMemoryError("CUDA out of memory.")',
}


def faulty(folder: Path, fault: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "faulty.py").write_text(FAULTY.format(layer=UP, fault=fault), "utf-8")
    return folder


def failed(case: Case, tmp_path: Path, fault: str, target: Target = TWO_OF_FOUR) -> tuple[str, dict[str, str]]:
    """The sentence that a fault gives, and the record that it leaves."""
    out = tmp_path / "cell"
    with pytest.raises(InputError) as error:
        case.run("faulty", target, out=str(out), own=faulty(tmp_path / "own", fault))
    # No declared output, and the block before it is kept.
    assert sorted(path.name for path in out.iterdir()) == [".checkpoint", "failed-compress.json"]
    record = json.loads((out / "failed-compress.json").read_text("utf-8"))
    assert set(record) == {"status", "reason", "stage", "traceback"} and record["stage"] == "compress"
    sentence = str(error.value)
    assert sentence == f"{record['reason']} (details: {out / 'failed-compress.json'})" and "\n" not in sentence
    assert "Traceback" in record["traceback"]
    return sentence, record


@pytest.mark.parametrize(("method", "rank"), [("svd_llm", 0.05), ("rocket", 0.063)])
def test_a_rank_of_zero_is_one_sentence_before_the_first_layer(case, monkeypatch, method, rank):
    """6.3% of [32, 32] are 1.008 columns and rows, which leaves ROCKET no place for positions."""
    monkeypatch.setattr(solver_module.Solver, "solve", None)
    with pytest.raises(InputError) as caught:
        case.run(method, Target(rank=rank))
    told = f"The rank of rank {100 * rank:g}% must be at least 1 in every layer."
    assert str(caught.value).startswith(f"{told} Got 0 in model.layers.0.self_attn.q_proj [32, 32] instead. (details")


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_named_with_its_method_and_layer(case, tmp_path, kind):
    fault, expected = FAULTS[kind]
    sentence, record = failed(case, tmp_path, fault)
    assert expected in sentence and "faulty" in sentence and UP in sentence
    assert record["status"] == ("diverged" if kind == "not finite" else "error")


def test_a_grid_without_codes_is_named(case, tmp_path):
    fault = "return replace(good, quantised=None)"
    target = Target(pattern="2:4", bits=4)
    own = faulty(tmp_path / "own", fault)
    text = (
        (own / "faulty.py")
        .read_text("utf-8")
        .replace("good = ops.pruned(layer, layer.weight.abs(), target)", GOOD_GRID)
    )
    (own / "faulty.py").write_text(text, "utf-8")
    with pytest.raises(InputError, match=f"on {UP}: promise 3: a quantised layer must have codes, scales and zeros"):
        case.run("faulty", target, out=str(tmp_path / "cell"), own=own)


GOOD_GRID = """mask = ops.prune_mask(layer.weight.abs(), target)
        grid, group_of = ops.fit_grid(layer.weight, target), ops.groups_of(layer.weight.shape[1], target.group)
        codes = grid.codes(layer.weight, group_of)
        values = torch.where(mask, grid.values(codes, group_of), 0.0)
        good = Compressed(values, mask, Quantised(codes, grid.scales, grid.zeros))"""


@pytest.mark.parametrize("kind", SHORTAGES)
def test_a_lack_of_memory_has_its_own_status(case, tmp_path, kind):
    sentence, record = failed(case, tmp_path, SHORTAGES[kind])
    assert record["status"] == "out of memory"
    assert "faulty" in sentence and UP in sentence


def test_an_error_about_memory_is_no_lack_of_it(case, tmp_path):
    _, record = failed(case, tmp_path, 'raise ValueError("unsupported memory format")')
    assert record["status"] == "error"


def test_success_removes_the_record(case, tmp_path):
    failed(case, tmp_path, "return None")
    cell = case.run("faulty", TWO_OF_FOUR, out=str(tmp_path / "cell"), own=faulty(tmp_path / "mended", "return good"))
    assert sorted(path.name for path in cell.iterdir()) == OUTPUTS
    plain = case.run("magnitude", TWO_OF_FOUR)
    assert by_layer(cell, "output_error") == by_layer(plain, "output_error")


def test_a_trace_has_a_row_per_layer_and_iteration(case, tmp_path):
    own = faulty(tmp_path / "own", "return replace(good, trace=((0, 0.0, 2.0), (1, 0.5, 1.0)))")
    table = rows(case.run("faulty", TWO_OF_FOUR, out=str(tmp_path / "cell"), own=own), "trace")
    assert [(row["layer"], row["iteration"], row["objective"]) for row in table] == [(UP, 0, 2.0), (UP, 1, 1.0)]
    assert table[0]["label"] == "faulty" and table[1]["seconds"] == 0.5
