"""Learned steps beside AWP, its momentum and ALPS: error and seconds, and steps that are learned elsewhere.

    python -m tests.benchmarks.bench_learned_steps MODEL GRAMS --block 3 --others 1 5 --model MODEL GRAMS 15 --out OUT

MODEL is a local folder, GRAMS its Gram store of a study (results/grams/HASH). Two tables are written to OUT.
forms.csv has the layers of the block, solved in each way; seconds are the processor's, of the whole call on one thread,
training included. transfer.csv has steps that are learned on 64 rows of each layer of the block and used where nothing
is trained: on the layer's other rows, on layers of other blocks and of another model, of the same kind (`alike`) or
not. There `ratio` is the error over that of AWP with 200 iterations, on the same rows. With --updates only
training.csv is written: the layers, solved with twelve steps after each number of updates, for both losses.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from layerwise.calibration.gram_store import read_block
from layerwise.compression.score import output_error
from layerwise.contract.layer import Layer, Method, Target
from layerwise.methods.alps import ALPS
from layerwise.methods.awp import AWP
from layerwise.methods.unfolded import Unfolded
from layerwise.methods.wanda import Wanda
from layerwise.models.loading import load
from layerwise.models.structure import model_linears
from layerwise.numerics import gradient_projection as gp
from layerwise.numerics import learned_steps
from layerwise.numerics.learned_steps import Rows, Steps, Training

Row = dict[str, Any]
SAMPLE = 64  # rows that steps are learned on
FORMS: dict[str, Method] = {
    "wanda": Wanda(),
    "awp 12": AWP(Wanda(), iterations=12),
    "awp 50": AWP(Wanda(), iterations=50),
    "awp 200": AWP(Wanda()),
    "awp 2000": AWP(Wanda(), iterations=2000, tolerance=0.0),
    "momentum 12": AWP(Wanda(), "spectral", iterations=12, acceleration="momentum"),
    "momentum 50": AWP(Wanda(), "spectral", iterations=50, acceleration="momentum"),
    "momentum 200": AWP(Wanda(), "spectral", acceleration="momentum"),
    "alps": ALPS(),
    "learned 8": Unfolded(Wanda(), iterations=8),
    "learned 12": Unfolded(Wanda()),
    "learned 20": Unfolded(Wanda(), iterations=20),
    "learned 12, all rows": Unfolded(Wanda(), rows=100000),
    "learned 12, best cycle, no training": Unfolded(Wanda(), starts=1, updates=0),
    "learned 12, momentum": Unfolded(Wanda(), momentum="learned"),
    "learned 12, line search": Unfolded(Wanda(), begin="line_search", updates=60),
    "learned 12, incremental": Unfolded(Wanda(), begin="incremental"),
    "learned 12, toward alps": Unfolded(Wanda(), toward=ALPS()),
    "learned 12, incremental, toward alps": Unfolded(Wanda(), begin="incremental", toward=ALPS()),
    "learned 12, soft": Unfolded(Wanda(), threshold="soft"),
}


def trainings(updates: Sequence[int]) -> dict[str, Method]:
    """Twelve steps, trained by each number of updates, incrementally and from cycles; and what they compare with."""
    ways: dict[str, Method] = {name: FORMS[name] for name in ("awp 200", "alps")}
    for begin in ("incremental", "cycles"):
        for toward in (None, ALPS()):
            for count in updates:
                name = f"{begin}, {'toward alps' if toward else 'own error'}, {count}"
                ways[name] = Unfolded(Wanda(), begin=begin, updates=count, toward=toward)
    return ways


def block_layers(model: str, grams: str, block: int, kinds: Sequence[str]) -> list[Layer]:
    """The layers of a block with their Grams; of these kinds, if there are any."""
    found = model_linears(load({"path": model}))
    taps = read_block(Path(grams), block)
    layers = [Layer(name, found[name].weight().float(), tap.gram) for tap in taps for name in tap.layers]
    return [layer for layer in layers if not kinds or layer_kind(layer) in kinds]


def layer_kind(layer: Layer) -> str:
    """Such as q_proj."""
    return layer.name.split(".")[-1]


def forms(layers: Sequence[Layer], target: Target, ways: Mapping[str, Method] = FORMS) -> Iterator[Row]:
    """A row for each layer and way to solve it."""
    for layer in layers:
        for name, method in ways.items():
            began = time.process_time()
            result = method.compress(layer, target, torch.Generator().manual_seed(0))
            seconds = time.process_time() - began
            error = output_error(layer, result.weight)[1]
            print(f"{layer.name} {target.label} {name}: {error:.6f} in {seconds:.3f} s", file=sys.stderr, flush=True)
            yield {"target": target.label, "layer": layer.name, "form": name, "error": error, "seconds": seconds}


class Prepared:
    """A layer's rows at the start of the iterations, and AWP's errors of them [out] after 200."""

    def __init__(self, layer: Layer, target: Target) -> None:
        problem = gp.Problem.of(layer, target)
        start = Wanda().compress(layer, target, torch.Generator())
        self.kind = layer_kind(layer)
        self.rows = Rows.of_layer(layer, problem, start, target)
        plain = AWP(Wanda()).compress(layer, target, torch.Generator()).weight
        missing = self.rows.weight - (plain.double() / problem.unit).float()
        self.plain = ((missing @ self.rows.gram) * missing).sum(1)
        order = torch.randperm(len(problem.weight), generator=torch.Generator().manual_seed(0))
        self.sample, self.held = order[:SAMPLE], order[SAMPLE:]

    def learned(self, toward: Method | None, layer: Layer, target: Target) -> Steps:
        """Twelve steps for the sample, as Unfolded learns them."""
        sample = self.rows.of(self.sample)
        loss = learned_steps.own_error(sample)
        if toward is not None:
            part = Layer(layer.name, layer.weight[self.sample], layer.gram)
            aim = toward.compress(part, target, torch.Generator()).weight
            unit = float(layer.weight.abs().max() / self.rows.weight.abs().max())
            loss = learned_steps.distance_to(sample, aim / unit)
        usual = Unfolded()
        return Training(usual.iterations, usual.begin, usual.updates, usual.starts, False, False).learn(sample, loss)

    def ratio(self, steps: Steps, rows: torch.Tensor | slice = slice(None)) -> float:
        """The error of some of the rows after the steps, each at its best iterate, over AWP's."""
        chosen = torch.arange(len(self.plain))[rows]
        *_, (_, _, error) = learned_steps.best_iterates(self.rows.of(chosen), steps)
        return error / float(self.plain[chosen].sum())


def transfer(
    layers: Sequence[Layer], others: Mapping[str, Sequence[Layer]], target: Target
) -> Iterator[dict[str, Any]]:
    """A row for each layer of the block, loss, and place where its steps are used."""
    own = {layer.name: Prepared(layer, target) for layer in layers}
    away = {where: [Prepared(layer, target) for layer in found] for where, found in others.items()}
    for layer in layers:
        here = own[layer.name]
        if len(here.held) == 0:
            continue
        for loss, toward in (("own error", None), ("toward alps", ALPS())):
            steps = here.learned(toward, layer, target)
            row = {"target": target.label, "learned on": layer.name, "loss": loss}
            yield row | {"used on": "the same rows", "alike": True, "ratio": here.ratio(steps, here.sample)}
            yield row | {"used on": "other rows of the layer", "alike": True, "ratio": here.ratio(steps, here.held)}
            beside = {"other layers of the block": [one for one in own.values() if one is not here], **away}
            for where, found in beside.items():
                for one in found:
                    yield row | {"used on": where, "alike": one.kind == here.kind, "ratio": one.ratio(steps)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("grams")
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--others", type=int, nargs="*", default=[], help="blocks of the same model")
    parser.add_argument("--model", dest="other", nargs=3, metavar=("MODEL", "GRAMS", "BLOCK"), help="another model")
    parser.add_argument("--layers", nargs="*", default=[], help="kinds of layers, such as q_proj; all by default")
    parser.add_argument("--targets", nargs="+", default=["60% row", "2:4"])
    parser.add_argument("--updates", type=int, nargs="+", help="numbers of updates that are compared")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    layers = block_layers(args.model, args.grams, args.block, args.layers)
    beside = [block_layers(args.model, args.grams, block, args.layers) for block in args.others]
    others = {"other blocks": [layer for found in beside for layer in found]}
    if args.other:
        others["another model"] = block_layers(args.other[0], args.other[1], int(args.other[2]), args.layers)
    args.out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, Callable[[Target], Iterator[Row]]] = {
        "transfer": lambda target: transfer(layers, others, target),
        "forms": lambda target: forms(layers, target),
    }
    if args.updates:
        tables = {"training": lambda target: forms(layers, target, trainings(args.updates))}
    for name, rows in tables.items():
        table = pd.DataFrame([row for label in args.targets for row in rows(Target.parse(label))])
        table.to_csv(args.out / f"{name}.csv", index=False)
        print(summary(table, name).to_string(), flush=True)


def summary(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Means over layers; of the others also the largest ratio of a layer's error to that of AWP's 200 iterations."""
    if name == "transfer":
        rows = table.groupby(["target", "loss", "used on", "alike"], sort=False)
        return pd.DataFrame({"count": rows.size(), "mean": rows["ratio"].mean(), "max": rows["ratio"].max()}).round(4)
    plain = {
        (row["target"], row["layer"]): row["error"] for row in table.to_dict("records") if row["form"] == "awp 200"
    }
    ratios = [row["error"] / plain[row["target"], row["layer"]] for row in table.to_dict("records")]
    rows = table.assign(ratio=ratios).groupby(["target", "form"], sort=False)
    means = {name: rows[name].mean() for name in ("error", "ratio", "seconds")}
    return pd.DataFrame({**means, "worst ratio": rows["ratio"].max()}).round(5)


if __name__ == "__main__":
    main()
