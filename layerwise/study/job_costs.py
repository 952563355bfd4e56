"""The cost of each job of a study in memory, disk space and operations, from the config and the models' headers.

No weights are read and torch is not imported: the Snakefile's process calls this for the resources of every job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from layerwise.contract.target import Target
from layerwise.sources.shapes import ModelShape, shape_of
from layerwise.sources.task_sets import BATCH
from layerwise.study.allocation_entries import options_tried
from layerwise.study.cell import Cell, canonical
from layerwise.study.grid import Plan
from layerwise.study.method_costs import CERTIFICATE, corrects_drift, needs_cross, needs_fisher, of_method
from layerwise.study.model_costs import (
    FITS,
    GRAMS_BESIDE,
    HIDDEN_FILES,
    LOGITS_HELD,
    PROCESS,
    SAMPLE,
    ModelCost,
    here,
    kept,
)
from layerwise.study.work import JobCost, Work

PASSES_BACK = 4  # cost of a sequence in forward passes: one, one recomputation in the blocks, and two for gradients
FISHER_PART = 8  # sequences after which sums are saved (fisher.PART)
CHECKED_WINDOW = 64  # tokens (model_check.WINDOW)
SCORING = 8 * 6 * 256  # bytes per input of a layer for float64 rows during scoring (score.SCORED)
CELL_FILES = 300e3  # bytes of a cell's tables, logs and results
UNKNOWN_MB = 8000  # requested for jobs of a model that has not been fetched
BLOCK_COPIES = 3  # float32 copies of a block's weights during an allocator's measurement
TRIALS = 500  # passes of an allocator that tries the model, if its card has no `passes`
TRIED_WINDOWS = 8  # windows of calibration text per pass, if its parameters do not give them
SPECTRUM = 20.0  # time of singular values, in products of a weight and a Gram

SLOWEST = 5e9  # operations per second and thread assumed for a cluster's `runtime`
LEAST_MINUTES = 30
# Clusters reject longer jobs; --set-resources compress:runtime=N gives a longer time.
MOST_MINUTES = 2 * 24 * 60
TEXT_TOKENS = 350_000  # tokens of an evaluation text that is used whole
ASKED_TOKENS = 20_000  # tokens of a zero-shot task


@dataclass(frozen=True)
class Job:
    """A rule and those of the wildcards {model, calib, mode, cell, evaluation, tasks, bound} that it has."""

    rule: str
    wildcards: Mapping[str, str]


class CostModel:
    """The cost of each job of a study."""

    def __init__(self, study: Plan, computed: Callable[[Mapping[str, Any], str], str | None] = here) -> None:
        """computed: returns the dtype in which jobs of a rule compute a model of the config, as `compute_dtype`
        does."""
        self.plan, self.computed = study, computed
        self._shapes: dict[str, ModelShape | None] = {}
        # keyed by everything that affects a cost, which thousands of cells share
        self._costs: dict[tuple[Any, ...], JobCost] = {}

    def shape(self, model: str) -> ModelShape | None:
        """The shape of a model; None if it has not been fetched."""
        if self._shapes.get(model) is None:  # this run may have fetched it since
            self._shapes[model] = shape_of(self.plan.models[model])
        return self._shapes[model]

    def cost(self, job: Job) -> JobCost | None:
        """The cost of a job; None for a cheap rule, and for a model that has not been fetched."""
        make = {
            "check_model": self._check_model,
            "gram": self._gram,
            "fisher": self._fisher,
            "compress": self._compress,
            "dense_states": self._dense_states,
            "perplexity": self._perplexity,
            "zero_shot": self._tasks,
            "certificate": self._certificate,
            "allocate": self._allocate,
            "export": self._export,
        }.get(job.rule)
        if make is None:
            return None
        name = job.wildcards["model"]
        shape = self.shape(name)
        if shape is None:
            return None
        cell = self.cell(job) if job.rule == "compress" else None
        named = (job.wildcards.get(key) for key in ("model", "calib", "mode", "evaluation", "tasks"))
        key = (job.rule, *named, job.wildcards.get("allocation"), *(_kind(cell, self.plan) if cell else ()))
        if key not in self._costs:
            model = ModelCost.of(self.plan.models[name], shape, lambda entry: self.computed(entry, job.rule))
            self._costs[key] = make(model, job)
        return self._costs[key]

    def mem_mb(self, job: Job) -> int:
        """Megabytes that a job requests."""
        cost = self.cost(job)
        return UNKNOWN_MB if cost is None else math.ceil(cost.memory / 1e6)

    def minutes(self, job: Job, threads: int = 1) -> int:
        """Minutes that a job requests from a cluster, far more than it should take."""
        cost = self.cost(job)
        return min(
            LEAST_MINUTES + math.ceil((cost.work.operations if cost else 0) / (SLOWEST * threads) / 60), MOST_MINUTES
        )

    def jobs(self) -> Iterator[Job]:
        """All jobs of the study that are not cheap."""
        for model in dict.fromkeys(cell.model for cell in self.plan.cells):
            for evaluation in self.plan.evaluations:
                yield Job("dense_states", {"model": model, "evaluation": evaluation})
        for model, calib in dict.fromkeys((cell.model, cell.calib) for cell in self.plan.cells):
            yield Job("check_model", {"model": model, "calib": calib})
        spread = self.plan.allocations
        with_grams = [cell for cell in self.plan.cells if cell.mode == "shared"]
        with_grams += [cell for cell in spread.values() if self._sees_grams(cell)]
        for model, calib in dict.fromkeys((cell.model, cell.calib) for cell in with_grams):
            yield Job("gram", {"model": model, "calib": calib})
        passed_back = [cell for cell in self.plan.cells if needs_fisher(self.plan.catalogue, cell)]
        for model, calib in dict.fromkeys((cell.model, cell.calib) for cell in passed_back):
            yield Job("fisher", {"model": model, "calib": calib})
        for path, cell in spread.items():
            name = path.rpartition("/")[2].removesuffix(".parquet")
            yield Job("allocate", {"model": cell.model, "calib": cell.calib, "allocation": name})
        for cell in self.plan.cells:
            place = {"model": cell.model, "calib": cell.calib, "mode": cell.mode, "cell": cell.cell}
            yield Job("compress", place)
            for evaluation in self.plan.evaluations:
                yield Job("perplexity", {**place, "evaluation": evaluation})
            for tasks in self.plan.tasks:
                yield Job("zero_shot", {**place, "tasks": tasks})
        for cell in self.plan.certificates.values():
            yield Job("certificate", {"model": cell.model, "calib": cell.calib})

    def cell(self, job: Job) -> Cell:
        """The cell that a compress job computes."""
        return self.plan.by_folder["results/cells/{model}/{calib}/{mode}/{cell}".format(**job.wildcards)]

    # ---------------------------------------------------------------------------------------------------- one rule each

    def _check_model(self, model: ModelCost, job: Job) -> JobCost:
        run = model.at("float32")
        tokens = 2 * CHECKED_WINDOW
        minimum = run.evaluating(CHECKED_WINDOW, tokens)
        return JobCost(minimum + run.whole / FITS, work=run.passes(2 * tokens), minimum=minimum)

    def _gram(self, model: ModelCost, job: Job) -> JobCost:
        calib = self.plan.calibrations[job.wildcards["calib"]]
        run = model.at(calib.get("dtype"))
        tokens = calib["samples"] * calib["length"]
        rows = min(SAMPLE, tokens) + min(SAMPLE, calib["samples"]) + 3
        store = 4 * run.shape.total(lambda block: block.gram_entries + sum(rows * inputs for inputs, _ in block.taps))
        work = replace(run.passes(tokens), grams=run.gram_work(tokens))
        return JobCost(run.calibrating(calib["length"]), store, run.states(tokens), work)

    def _fisher(self, model: ModelCost, job: Job) -> JobCost:
        calib = self.plan.calibrations[job.wildcards["calib"]]
        tokens = calib["samples"] * calib["length"]
        disk = 4 * model.shape.total(lambda block: sum(out for out, _, _ in block.layers))
        run = replace(model, size=4)
        parts = (
            2 * math.ceil(calib["samples"] / FISHER_PART) * disk
        )  # float64 sums, saved after each part of the sequences
        work = replace(run.passes(PASSES_BACK * tokens), dtype="float32")
        return JobCost(run.passing_back(calib["length"]), disk, parts, work)

    def _compress(self, model: ModelCost, job: Job) -> JobCost:
        cell = self.cell(job)
        calib, target, sequential = (
            self.plan.calibrations[cell.calib],
            Target(**cell.spec["target"]),
            cell.mode != "shared",
        )
        w, g, products = of_method(self.plan.catalogue, cell.spec["method"]["name"], cell.spec["method"]["params"])
        changed = self.plan.catalogue[cell.spec["method"]["name"]].card["updates_weights"]
        beside = needs_cross(self.plan.catalogue, cell)
        peaks = []
        for block in model.shape.blocks:
            grams = 4 * block.gram_entries * (1 + GRAMS_BESIDE * beside) if sequential else 0
            solving = [4 * (w * out * size + g * size**2) + SCORING * size for out, size, _ in block.layers]
            peaks.append(max(solving, default=0) + grams + model.stored(block, target, changed))
        memory, transient = model.streamed + max(peaks), 0.0
        work = replace(model.passes(0), solving=products * model.products, layers=model.layers)
        tokens = calib["samples"] * calib["length"]
        if sequential:
            run = model.at(calib.get("dtype"))
            another = run.streamed - PROCESS if run.entry["dtype"] != model.entry["dtype"] else 0  # a copy of the model
            memory = max(memory, run.calibrating(calib["length"], beside)) + another
            passes = 2 + beside
            if corrects_drift(self.plan.catalogue, cell):
                # For each tap a dense and a compressed pass that end there, on average half of the block; the first
                # dense pass is whole. The block's dense weights are kept.
                passes = 1 + max(len(block.taps) for block in model.shape.blocks)
                memory += run.size * run.block
            # The cross-Gram is not a symmetric product, so it takes twice as long.
            work += replace(run.passes(passes * tokens), grams=(1 + 3 * beside) * run.gram_work(tokens))
            transient += (1 + beside) * run.states(tokens)
        if "tune" in cell.spec:
            memory = max(memory, model.tuning(calib["length"], tokens, cell.spec["tune"]))
            epochs = sum(stage["epochs"] for stage in cell.spec["tune"].values())
            work += model.passes(4 * epochs * tokens)
        # The job also evaluates the compressed model.
        texts = [self._perplexity(model, Job("", {"evaluation": name})) for name in self.plan.evaluations]
        others = texts + [self._tasks(model, Job("", {"tasks": name})) for name in self.plan.tasks]
        minimum = max([memory, *(cost.minimum for cost in others)])
        memory = max([memory, *(cost.memory for cost in others)])
        stored = model.shape.total(lambda block: model.stored(block, target, changed))
        transient = max([transient + stored, *(cost.transient for cost in others)])
        return JobCost(memory, stored + CELL_FILES, transient, sum((cost.work for cost in others), work), minimum)

    def _windows(self, job: Job) -> tuple[int, int]:
        """(tokens of a window, all tokens) of an evaluation."""
        spec = self.plan.evaluations[job.wildcards["evaluation"]]
        length, windows = spec["length"], spec.get("samples")
        return length, windows * length if windows else TEXT_TOKENS

    def _dense_states(self, model: ModelCost, job: Job) -> JobCost:
        length, tokens = self._windows(job)
        states = model.states(tokens)
        return JobCost(model.evaluating(length, tokens), states / HIDDEN_FILES, states, model.passes(tokens))

    def _perplexity(self, model: ModelCost, job: Job) -> JobCost:
        length, tokens = self._windows(job)
        words = model.shape.vocabulary * tokens
        heads = LOGITS_HELD * 2 * model.shape.hidden * words
        work = replace(model.passes(tokens), passes=model.forward(tokens) + heads, words=words)
        return JobCost(model.evaluating(length, tokens), 0.0, model.states(tokens), work)

    def _tasks(self, model: ModelCost, job: Job) -> JobCost:
        spec = self.plan.tasks[job.wildcards["tasks"]]
        memory, minimum = model.answering(spec.get("batch", BATCH))
        return JobCost(memory, work=model.passes(ASKED_TOKENS * len(spec["tasks"])), minimum=minimum)

    def _certificate(self, model: ModelCost, job: Job) -> JobCost:
        w, g, products = CERTIFICATE
        layers = [layer for block in model.shape.blocks for layer in block.layers]
        most = max((4 * (w * out * size + g * size**2) for out, size, _ in layers), default=0)
        return JobCost(model.at_rest.streamed + most, work=Work(solving=products * model.products))

    def _sees_grams(self, cell: Cell) -> bool:
        """Whether the allocator of a cell's budget needs the dense Grams."""
        spec = cell.spec.get("allocation")
        return spec is not None and "gram" in self.plan.allocators[spec["allocator"]].needs(spec["params"])

    def _allocate(self, model: ModelCost, job: Job) -> JobCost:
        cell = self.plan.allocations["results/allocations/{model}/{calib}/{allocation}.parquet".format(**job.wildcards)]
        spec = cell.spec.get("allocation")
        assert spec is not None
        entry = self.plan.allocators[spec["allocator"]]
        inner = [of_method(self.plan.catalogue, name, params) for _, name, params in entry.inner(spec["params"])]
        w, g, products = (max((cost[i] for cost in inner), default=0.0) for i in range(3))
        peaks = []
        for block in model.shape.blocks:
            # A block's weights in float32 and their scores, its Grams, and the memory to solve a layer.
            held = BLOCK_COPIES * 4 * sum(out * size for out, size, _ in block.layers)
            held += kept(block) if self._sees_grams(cell) else 0.0
            solving = [4 * (w * out * size + g * size**2) + SCORING * size for out, size, _ in block.layers]
            peaks.append(held + max(solving, default=0.0))
        options = options_tried(entry, spec["params"], Target(**spec["target"]))
        work = Work(solving=(options * (products + 1) if inner else SPECTRUM) * model.products)
        memory = model.at_rest.streamed + max(peaks, default=0.0)
        if "trials" in entry.needs(spec["params"]):  # the whole model, and a copy of its layers
            length = self.plan.calibrations[cell.calib]["length"]
            tokens = spec["params"].get("windows", TRIED_WINDOWS) * length
            memory = max(memory, PROCESS + 2 * model.whole + model.evaluating(length, tokens))
            layers = sum(len(block.layers) for block in model.shape.blocks)
            sequences = tried_sequences(entry.card, spec["params"], layers, options)
            work = model.passes(TRIALS * tokens if sequences is None else sequences * length) + work
        return JobCost(memory, CELL_FILES, work=work)

    def _export(self, model: ModelCost, job: Job) -> JobCost:
        model = model.at_rest
        return JobCost(PROCESS + 2 * model.whole, model.whole)


def tried_sequences(card: Mapping[str, Any], params: Mapping[str, Any], layers: int, options: int) -> int | None:
    """Number of sequences that pass through the model in an allocator's search, from its card; None if it does not
    say. options: number of levels at which it tries each layer."""
    terms = card.get("passes")
    for key, values in card.get("passes_where", {}).items():
        terms = values.get(str(params[key]), terms)
    if terms is None:
        return None

    def number(name: str) -> int:
        if name == "layers":
            return layers
        value = params[name]
        if value is None or card["parameters"][name].get("format") == "levels":
            return options
        return len(value) if isinstance(value, list | tuple) else int(value)

    return sum(math.prod(map(number, term)) for term in terms)


def _kind(cell: Cell, study: Plan) -> tuple[Any, ...]:
    """Everything that affects the cost of a cell besides model, calibration and mode."""
    method, tune = cell.spec["method"], cell.spec.get("tune")
    asked = tuple(cell.spec["target"].values())
    cost = of_method(study.catalogue, method["name"], method["params"])
    return (*cost, method["name"], needs_cross(study.catalogue, cell), asked, canonical(tune) if tune else None)
