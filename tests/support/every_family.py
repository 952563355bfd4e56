"""What becomes of every causal family of the installed transformers: right, refused in one sentence, or wrong.

`python -m tests.support.every_family` says it of each family, or of those named;
with `--table` it writes the tables of docs/models.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.taps import Tap
from layerwise.evaluation.model_check import check_model
from layerwise.evaluation.perplexity import evaluate, window_losses
from layerwise.models.loading import load
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import ROUTERS, Blocks, Linear, find_blocks, linears, model_linears
from layerwise.runtime.errors import InputError
from layerwise.runtime.sentences import brief
from tests.support.library_truth import Inputs, Linears, Truth
from tests.support.paths import ROOT
from tests.support.tiny_configs import EXPERTS, FAMILIES, build, family_config, tokens

DOCUMENT = ROOT / "docs/models.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
WINDOWS, LENGTH, BATCH = 3, 32, 2
TOLERANCE = 1e-5  # of losses in nats, so of perplexities relatively, and of Grams relative to their largest entry

# What becomes of a family, and by which words of a sentence it is known.
ACCEPTED, NOT_BUILT, WRONG = "accepted", "not built", "wrong"
REFUSALS = {
    "were never called as a module": "refused: a layer is never called",
    "was never called as a module": "refused: a layer is never called",
    "must see every token once": "refused: a layer sees other than every token once",
    "with three dimensions": "refused: weights of three dimensions in an unknown layout",
    "are in no linear layer": "refused: most weights are in no linear layer",
    "[sequences, length, width]": "refused: hidden states of another shape",
    "from block to block": "refused: blocks pass more than hidden states",
    "the largest of its lists of blocks": "refused: text passes other blocks than the largest ones",
    "is not causal": "refused: logits depend on later tokens",
    "once, in order": "refused: blocks are called several times",
    "must have one list of blocks": "refused: several lists of blocks",
    "must have weights of its own": "refused: blocks share weights",
    "cannot be run block by block": "refused: its blocks cannot be called alone",
}
KINDS = (ACCEPTED, *dict.fromkeys(REFUSALS.values()), NOT_BUILT, WRONG)


@dataclass
class Outcome:
    """said: the sentence of a refusal, or why the library builds no tiny model. outside: linear layers beside blocks
    and head that text passes, numbers as *. faults: what no model may show, each in a few words."""

    family: str
    said: str = ""
    outside: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    built: bool = True

    @property
    def kind(self) -> str:
        if self.faults:
            return WRONG
        if not self.built:
            return NOT_BUILT
        return refusal(self.said) if self.said else ACCEPTED

    @property
    def reason(self) -> str:
        """Why the family is not built, as a cell of a table."""
        return brief(self.said.replace("|", "/"))

    @property
    def left(self) -> list[str]:
        """The last name of what lies outside the blocks."""
        return sorted({name.rpartition(".")[2] for name in self.outside})


def refusal(sentence: str) -> str:
    """The kind of a sentence, or "" for one that is not known."""
    return next((kind for words, kind in REFUSALS.items() if words in sentence), "")


@torch.no_grad()
def outcome(family: str, folder: Path) -> Outcome:
    """Load, evaluate and calibrate a tiny model of the family in every way that there is, beside the library."""
    found, windows = Outcome(family), tokens(WINDOWS, LENGTH)
    try:
        build(family_config(family)).save_pretrained(folder / "model")
        truth = Truth(folder / "model", windows)
        losses, causal = truth.losses(), truth.causal()
    except Exception as error:  # of the library's own code whatever it raises
        found.built, found.said = False, shortly(error)
        return found
    spec = {"path": str(folder / "model")}
    try:
        check_model(spec, windows)  # what every study does before it calibrates
    except InputError as error:
        found.said = str(error)
        return found
    with attempt(found, "reading a model block by block"):
        lazy = LazyBlocks(spec)
        with attempt(found, "perplexity"):
            compare_losses(found, window_losses(lazy, windows, BATCH, folder=folder / "states"), losses)
        with attempt(found, "calibration"):
            stream, inputs = Stream(lazy, windows, BATCH, folder=folder / "shared"), truth.inputs()
            for index in range(len(lazy)):
                with lazy.open(index):
                    compare_grams(found, stream.collect(index, advance=True), truth.model, inputs)
            check_coverage(found, truth.model, inputs)
    with attempt(found, "loading a model whole"):
        whole = Blocks(load(spec))
        with attempt(found, "perplexity of a whole model"):
            compare_losses(found, torch.tensor(evaluate(whole, windows)["losses"], dtype=torch.float64), losses)
        with attempt(found, "calibration of compressed blocks"):
            taps = after_compression(whole, windows)
            compress(truth.model, len(whole) - 1)
            compare_grams(found, taps, truth.model, truth.inputs())
    if not causal and not found.said:
        found.faults.append("the library's logits depend on later tokens")
    return found


@contextmanager
def attempt(found: Outcome, what: str) -> Iterator[None]:
    """Within it a refusal is noted, and any other exception a fault."""
    try:
        yield
    except InputError as error:
        found.said = found.said or re.sub(r"/\S*/model\b", "MODEL", str(error))
        if "\n" in found.said or not found.said.endswith(".") or not refusal(found.said):
            found.faults.append(f"{what}: a sentence of no known kind: {found.said}")
    except Exception as error:
        found.faults.append(f"{what}: {shortly(error)}")


def shortly(error: Exception) -> str:
    """The kind of an error and the first line that says something, without the paths of this run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].rstrip(":") if lines else ""
    return f"{type(error).__name__}: {re.sub(r'/tmp/[^ ]*/', '', said)}".removesuffix(": ")


# ------------------------------------------------------------------------------------------------------- comparisons


def compare_losses(found: Outcome, ours: Tensor, theirs: Tensor) -> None:
    if not torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE):
        values = (f"{float(losses.mean().exp()):.6g}" for losses in (ours, theirs))
        found.faults.append("perplexity {} instead of {}".format(*values))


def compare_grams(found: Outcome, taps: Iterable[Tap], model: nn.Module, inputs: Inputs) -> None:
    """Hold the taps of one block against what entered the same layers of the library's model."""
    layers, names = model_linears(model), {module: name for name, module in model.named_modules()}
    wrong: list[str] = []
    for tap in taps:
        for layer in (layers[name] for name in tap.layers):
            if layer.expert is None:
                expected = inputs.gram(layer.name)
            else:
                owner, every = names[layer.module], tap.scope == "fallback"
                expected = inputs.expert_gram(owner, layer.module, layer.expert, layer.parameter, every)
            if expected.shape != tap.gram.matrix.shape or not close(tap.gram.matrix.double(), expected):
                wrong.append(layer.name)
    if wrong:
        found.faults.append(f"{len(wrong)} Grams are not those of what the library multiplies, first of {wrong[0]}")


def close(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))


def compress(model: nn.Module, blocks: int) -> None:
    """Take the smaller half of the weights of every layer of so many first blocks."""
    name, modules = find_blocks(model)
    for index, block in enumerate(modules[:blocks]):
        prune(linears(block, f"{name}.{index}"))


def prune(layers: Iterable[Linear]) -> None:
    for layer in layers:
        weight = layer.weight()
        layer.replace(weight * (weight.abs() > weight.abs().median()))


def after_compression(blocks: Blocks, windows: Tensor) -> list[Tap]:
    """The last block's taps, where all before it are pruned one after the other, as sequential mode does it."""
    stream, last = Stream(blocks, windows, BATCH), len(blocks) - 1
    for index in range(last):
        stream.collect(index)
        prune(linears(stream.blocks[index], f"{stream.name}.{index}"))
        stream.advance(index)
    return stream.collect(last)


def check_coverage(found: Outcome, model: Any, inputs: Inputs) -> None:
    """Note which linear layers that text passes are not compressed, and as a fault those that should be.

    Also those that are two layers at once, and matrices of a block that are neither layer, convolution nor router.
    """
    layers, (blocks, modules) = model_linears(model), find_blocks(model)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    faults: dict[str, None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linears) or not inputs.linear[name] or name in layers:
            continue
        general = re.sub(r"\d+", "*", name)
        if name.startswith(f"{blocks}."):
            if not is_gate(name, module):
                faults[f"{general} of the blocks is never compressed"] = None
        elif any(name.startswith(f"{outer}.") for outer in lists):
            faults[f"{general} is never compressed, beside the blocks {blocks}"] = None
        elif module is not model.get_output_embeddings():
            found.outside.add(general)
    known = {(layer.module, layer.parameter) for layer in layers.values()}
    for name, module in modules.named_modules():
        for key, parameter in () if isinstance(module, NO_MATRICES) else module.named_parameters(recurse=False):
            many = sum(size > 1 for size in parameter.shape) > 1
            if many and (module, key) not in known and len(parameter) != EXPERTS:
                faults[f"{re.sub(r'[0-9]+', '*', name)}.{key} of the blocks is never compressed"] = None
    owners: defaultdict[tuple[int, int | None], list[str]] = defaultdict(list)
    for layer in layers.values():
        owners[id(layer.module.get_parameter(layer.parameter)), layer.expert].append(layer.name)
    faults |= {f"{names[0]} and {names[1]} are one weight": None for names in owners.values() if len(names) > 1}
    found.faults += faults


NO_MATRICES = (*Linears, nn.Embedding, nn.Conv1d)


def is_gate(name: str, module: nn.Module) -> bool:
    """Whether a linear layer chooses experts, or weighs one."""
    outputs = module.get_parameter("weight").shape[0]
    return outputs == 1 or (outputs == EXPERTS and not set(ROUTERS).isdisjoint(name.split(".")[-2:]))


# -------------------------------------------------------------------------------------------------------- the document


def tables(found: Iterable[Outcome]) -> str:
    """Markdown: the families of each outcome, why some are not built, and what lies outside the blocks."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    outside: defaultdict[str, list[str]] = defaultdict(list)
    for one in found:
        kinds[one.kind].append(one.family)
        if not one.built:
            reasons[one.reason].append(one.family)
        for name in one.left if one.kind == ACCEPTED else ():
            outside[f"`{name}`"].append(one.family)
    ordered = {kind: kinds[kind] for kind in KINDS if kind in kinds}
    parts = zip(TABLES, (ordered, reasons, dict(sorted(outside.items()))), strict=True)
    return "\n\n".join(one_table(title, rows) for title, rows in parts)


TABLES = ("outcome", "not built, as the library says", "left as it is outside the blocks")


def one_table(title: str, rows: Mapping[str, list[str]]) -> str:
    lines = [f"| {name} | {len(families)} | {', '.join(families)} |" for name, families in rows.items()]
    return "\n".join([f"| {title} | | families |", "|:--|--:|:--|", *lines])


def documented() -> dict[str, dict[str, list[str]]]:
    """Of each table of the document, by its title: family -> the names of its rows."""
    told: dict[str, dict[str, list[str]]] = {}
    text = DOCUMENT.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    for part in text.strip().split("\n\n"):
        title, _, *rows = ([cell.strip() for cell in line.split("|")[1:4]] for line in part.splitlines())
        told[title[0]] = defaultdict(list)
        for name, _, families in rows:
            for family in families.split(", "):
                told[title[0]][family].append(name)
    return told


def examine(family: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return outcome(family, Path(folder))


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.every_family", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"one of {len(FAMILIES)}; default: all")
    parser.add_argument("--table", action="store_true", help=f"write the table of {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("fork")) as pool:
        for one in pool.map(examine, options.families or FAMILIES):
            found.append(one)
            say(f"{one.family}: {one.kind} {'; '.join(one.faults) or one.said}")
    if options.table:
        if options.families:
            parser.error("--table is of all families.")
        before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
        text = f"{before}{BEGIN}\n{tables(found)}\n{END}{rest.partition(END)[2]}"
        DOCUMENT.write_text(text, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
