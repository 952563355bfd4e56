"""The estimate of a study: shapes from headers, what jobs need, and refusals before a job runs."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from layerwise.calibration import fisher
from layerwise.calibration.block_stream import Stream
from layerwise.contract.catalogue import Catalogue
from layerwise.evaluation import perplexity
from layerwise.models import compute_dtype, loading, streaming, structure
from layerwise.runtime import memory
from layerwise.sources import shapes
from layerwise.study import estimate, job_costs, method_costs, model_costs
from layerwise.study.durations import cell_kind, finished_seconds
from layerwise.study.estimate import Limits, computed_wider, estimate_jobs, limit_errors
from layerwise.study.grid import plan
from layerwise.study.job_costs import CostModel, Job
from layerwise.study.model_costs import ModelCost
from layerwise.study.speeds import Speeds, typical
from layerwise.study.work import JobCost
from tests.support.method_files import UNSOLVED
from tests.support.model_families import FAMILIES, VOCABULARY, build, tokens
from tests.support.paths import ROOT
from tests.support.typing_helpers import some
from tests.support.workflow_harness import CONFIG, snakemake, tiny_project, tiny_study

TALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
SPEEDS = Speeds(typical(1e-9))  # a thousand million operations per second
ENOUGH = Limits(1e15, "nobody has", 1e15)


def study_of(folder: Path, **changes: object) -> CostModel:
    """The tiny study on a model folder."""
    return CostModel(plan(tiny_study() | {"models": {"tiny": {"path": str(folder)}}} | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_give_the_layers_of_every_family(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shape = some(shapes.shape_of({"path": str(tmp_path)}))
    linears = Counter(layer.shape for layer in structure.model_linears(model).values())
    found = Counter()
    for block, times in shape.blocks.items():
        for out, inputs, _ in block.layers:
            found[out, inputs] += times
    assert found == linears
    saved = model.state_dict()
    buffers = sum(own.numel() for name, own in model.named_buffers() if name in saved)  # a router's correction
    assert shape.parameters == buffers + sum(parameter.numel() for parameter in model.parameters())
    assert (shape.depth, shape.vocabulary) == (len(structure.find_blocks(model)[1]), VOCABULARY)
    taps = Stream(model, tokens(16)).collect(0)
    (most, *_) = shape.blocks
    counted = Counter((size, share < 1) for size, share in most.taps)
    own = Counter((len(tap.gram.matrix), ".experts." in tap.inside[0]) for tap in taps)
    assert own <= counted and len(most.taps) - len(taps) in (0, 1)  # Phi's MLP and attention share theirs
    assert {share for *_, share in (*most.layers, *most.taps) if share < 1} <= {0.75}  # three of four experts


@pytest.mark.parametrize("family", ["qwen3", "opt", "gpt_neox", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_config_alone_gives_nearly_the_same(family, tmp_path):
    build(family).save_pretrained(tmp_path)
    found = some(shapes.shape_of({"path": str(tmp_path)}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(loading.InputError, match="no weights"):
        shapes.shape_of({"path": str(tmp_path)})
    config = AutoConfig.from_pretrained(tmp_path).to_dict()
    guess = some(shapes.shape_of_config(config))
    assert guess.depth == found.depth and guess.largest_gram == found.largest_gram
    assert guess.parameters == pytest.approx(found.parameters, rel=0.35)  # positions and biases, in models of this size
    assert shapes.shape_of_config({"model_type": "unheard_of"}) is None


def test_memory_does_not_grow_with_the_number_of_blocks():
    config = dict(TALL, intermediate_size=64, vocab_size=VOCABULARY)
    sizes = (some(shapes.shape_of_config(config | {"num_hidden_layers": depth})) for depth in (8, 22))
    few, many = (ModelCost.of({"dtype": "float16", "compute_dtype": "native"}, size) for size in sizes)
    assert few.calibrating(512) == many.calibrating(512) and few.evaluating(512, 4096) == many.evaluating(512, 4096)
    (few_blocks, least), (all_blocks, same) = few.answering(1), many.answering(1)
    assert many.whole > 2 * few.whole and all_blocks > few_blocks > least == same
    assert model_costs.FITS == streaming.SHARE and model_costs.ROWS == perplexity.ROWS
    assert model_costs.LOGITS_AT_ONCE == perplexity.LOGITS_AT_ONCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_passes_in_float32_take_what_float32_takes_and_are_stored_as_they_are(tmp_path, monkeypatch, dtype):
    build("llama").save_pretrained(tmp_path)
    costs: dict[str, dict[str, JobCost]] = {}
    for name, entry, slow in [
        ("wide", {"dtype": "float32"}, True),
        ("fast", {"dtype": dtype}, False),
        ("slow", {"dtype": dtype}, True),
        ("native", {"dtype": dtype, "compute_dtype": "native"}, True),
    ]:
        monkeypatch.setattr(compute_dtype, "slow_apart", lambda dtype, slow=slow: slow and dtype != "float32")
        own = CostModel(plan(tiny_study() | {"models": {"tiny": {"path": str(tmp_path), **entry}}}))
        found = {job.rule: some(own.cost(job)) for job in own.jobs() if job.wildcards.get("mode") != "shared"}
        export = Job("export", {"model": next(iter(own.plan.models))})
        costs[name] = found | {"export": some(own.cost(export))}
        said = computed_wider(own, own.jobs())
        assert len(said) == (name == "slow") and all(
            f"'tiny' are computed in float32, from weights rounded to {dtype}" in line for line in said
        )
    wide, slow, fast = costs["wide"], costs["slow"], costs["fast"]
    assert costs["native"] == fast != slow
    for rule in ("gram", "perplexity"):
        assert (slow[rule].memory, slow[rule].transient) == (wide[rule].memory, wide[rule].transient)
        assert slow[rule].memory > fast[rule].memory
    assert slow["export"] == fast["export"] != wide["export"]
    assert slow["compress"].disk == fast["compress"].disk and slow["compress"].memory > fast["compress"].memory


def test_a_gpu_is_counted_in_the_dtype_of_the_model(tmp_path):
    build("llama").save_pretrained(tmp_path)
    study = plan(tiny_study() | {"models": {"tiny": {"path": str(tmp_path), "dtype": "bfloat16"}}})

    def computed(entry, rule):
        return compute_dtype.compute_dtype(entry, "cuda" if rule == "gram" else "cpu", lambda dtype: True)

    own, fast = CostModel(study, computed), CostModel(study)
    for job in own.jobs():
        alike = job.rule in ("gram", "certificate", "check_model")  # which runs in float32 on every processor
        assert (some(own.cost(job)) == some(fast.cost(job))) is alike


def test_tasks_ask_for_the_whole_model_and_are_not_refused_without(tmp_path, monkeypatch):
    config = dict(TALL, hidden_size=256, intermediate_size=1024, num_hidden_layers=2000, vocab_size=VOCABULARY)
    monkeypatch.setattr(job_costs, "shape_of", lambda spec: shapes.shape_of_config(config))
    build("llama").save_pretrained(tmp_path)
    own = study_of(tmp_path, tasks={"own": {"tasks": ["piqa"]}})
    jobs = [job for job in own.jobs() if job.rule in ("compress", "zero_shot")]
    whole = some(own.shape(own.plan.cells[0].model)).parameters * 4
    assert all(own.mem_mb(job) > whole / 1e6 for job in jobs)
    assert list(limit_errors(own, jobs, estimate_jobs(own, jobs, 2, SPEEDS), Limits(whole / 2, "", 1e15))) == []
    assert list(limit_errors(own, jobs, estimate_jobs(own, jobs, 2, SPEEDS), Limits(1e8, "", 1e15)))


def test_every_shipped_card_gives_a_cost():
    assert all(entry.cost for entry in Catalogue().values())


def test_a_parameter_may_change_what_a_method_costs():
    catalogue = Catalogue()
    products = {}
    for step in ("published", "line_search", "pairwise"):
        params = catalogue.complete("frank_wolfe", {"step": step, "warm_start": "magnitude"}, "test")
        products[step] = method_costs.of_method(catalogue, "frank_wolfe", params)[2]
    assert products["published"] == products["line_search"] > 30 * products["pairwise"]
    inside = some(method_costs.stated(catalogue["magnitude"]))[2]
    assert products["pairwise"] == 60 + inside


def test_iterations_change_what_a_method_costs():
    """By as much for each, down to 0."""
    catalogue = Catalogue()

    def products(name: str, **params) -> float:
        return some(method_costs.stated(catalogue[name], catalogue.complete(name, params, "test")))[2]

    assert products("rocket") == 50
    steps = [products("rocket", adam_steps=steps) for steps in (50, 100, 1000)]
    assert steps == pytest.approx([130, 210, 1650])
    assert products("three_basil", iterations=200) == pytest.approx(700)
    assert products("three_basil", iterations=1) < 10
    assert products("unfolded", updates=300, iterations=10) == pytest.approx(300 + 280 * 10.4 - 2 * 25)


def test_what_is_inside_a_method_counts():
    catalogue = Catalogue()
    costs = {name: some(method_costs.stated(entry)) for name, entry in catalogue.items()}
    inside = catalogue.complete("sparse_swaps", {"warm_start": {"alps": {"iterations": 300}}}, "test")
    w, g, products = method_costs.of_method(catalogue, "sparse_swaps", inside)
    assert (w, g) == tuple(max(costs["sparse_swaps"][i], 1 + costs["alps"][i]) for i in (0, 1))
    assert products == costs["sparse_swaps"][2] + costs["alps"][2]


COST = '    "cost": {"weights": 4, "grams": 2, "products": 1},\n'


def test_a_method_from_elsewhere_counts_as_its_card_says_or_as_the_most_demanding(tmp_path):
    (tmp_path / "first.py").write_text(UNSOLVED)
    (tmp_path / "second.py").write_text(UNSOLVED.replace('    "needs"', f'{COST}    "needs"'))
    catalogue = Catalogue([tmp_path])
    shipped = [method_costs.stated(entry) for entry in Catalogue().values()]
    assert method_costs.of_method(catalogue, "first", {}) == tuple(map(max, zip(*shipped, strict=True)))
    assert method_costs.of_method(catalogue, "second", {}) == (4, 2, 1)
    inside = catalogue.complete("sparse_swaps", {"warm_start": "second"}, "test")
    sparse_swaps = some(method_costs.stated(catalogue["sparse_swaps"]))
    assert method_costs.of_method(catalogue, "sparse_swaps", inside) == (*sparse_swaps[:2], sparse_swaps[2] + 1)


def test_costs_of_a_study(tmp_path):
    build("llama").save_pretrained(tmp_path)
    own = study_of(tmp_path)
    found = {}
    for job in own.jobs():
        cost = some(own.cost(job))
        assert cost.memory > model_costs.PROCESS
        if job.rule == "compress":
            columns = own.cell(job).columns
            found[columns["label"], columns["target"], columns["mode"]] = cost
    counts = Counter(job.rule for job in own.jobs())
    assert counts == {"check_model": 1, "dense_states": 1, "gram": 1, "compress": 7, "perplexity": 7, "certificate": 2}
    assert found["wanda", "2:4", "sequential"].work.operations > found["wanda", "2:4", "shared"].work.operations
    assert found["wanda", "2:4", "sequential"].transient > found["wanda", "2:4", "shared"].transient
    assert found["dense", "dense", "shared"].disk > found["wanda", "50% row", "shared"].disk
    (dense,) = (some(own.cost(job)) for job in own.jobs() if job.rule == "dense_states")
    (spec,) = own.plan.evaluations.values()
    width = some(own.shape(next(iter(own.plan.models)))).hidden
    assert dense.disk == 4 * width * spec["length"] * some(spec.get("samples"))  # float32
    whole = estimate_jobs(own, own.jobs(), 2, SPEEDS)
    assert whole.jobs == 19 and whole.seconds > 0 and not whole.measured and not whole.unknown
    assert list(limit_errors(own, own.jobs(), whole, ENOUGH)) == []


def test_a_dense_stream_counts_where_a_method_needs_the_cross_gram(tmp_path):
    build("llama").save_pretrained(tmp_path)
    quantisers = {
        "gptq": None,
        "foem": {"alpha": 0.25},
        "pruned": {"chain": ["wanda", {"foem": {"alpha": 0.25}}]},
        "pruned_gptq": {"chain": ["wanda", "gptq"]},
    }
    own = study_of(tmp_path, methods=quantisers, targets=[{"bits": 4}, {"pattern": "2:4", "bits": 4}])
    found = {}
    for job in own.jobs():
        if job.rule == "compress":
            columns = own.cell(job).columns
            found[columns["label"], columns["mode"]] = some(own.cost(job))
    shape = some(own.shape(own.plan.cells[0].model))
    (calib,) = own.plan.calibrations.values()
    states = model_costs.HIDDEN_FILES * 4 * shape.hidden * calib["samples"] * calib["length"]
    for one, other in (("gptq", "foem"), ("pruned_gptq", "pruned")):
        without, beside = found[one, "sequential"], found[other, "sequential"]
        assert beside.transient - without.transient == states
        walked, alone = (
            found[name, "sequential"].work.operations - found[name, "shared"].work.operations for name in (other, one)
        )
        assert walked > 1.5 * alone
    (block,) = {block for block in shape.blocks}
    assert model_costs.summed(block, beside=True) - model_costs.summed(block) == 24 * block.gram_entries


def test_tuning_of_blocks_holds_the_states_of_all_sequences():
    """2 copies in float32: the inputs of a block, and the outputs that it should give."""
    config = dict(TALL, intermediate_size=64, vocab_size=VOCABULARY)
    model = ModelCost.of({"dtype": "float32"}, some(shapes.shape_of_config(config)))
    for stages, copies in (({"blocks": {"batch": 4}}, 2), ({"end": {"batch": 4}}, 0)):
        few, many = (model.tuning(512, samples * 512, stages) for samples in (32, 512))
        assert many - few == copies * 480 * 512 * 4 * TALL["hidden_size"]


@pytest.mark.parametrize("mode", ["sequential", "shared"])
def test_methods_that_see_both_models_need_more_than_gptq_in_sequential_mode_alone(mode, monkeypatch):
    """So does GPTQ where the config asks for asymmetric errors."""
    config = dict(TALL, hidden_size=1024, head_dim=256, intermediate_size=4096, vocab_size=VOCABULARY)
    shape = some(shapes.shape_of_config(config))
    monkeypatch.setattr(job_costs, "shape_of", lambda spec: shape)
    study = {"methods": {"gptq": None, "gptaq": None, "qronos": None}, "targets": [{"bits": 4}], "modes": [mode]}
    found = {}
    for asked in (False, True):
        own = CostModel(plan(tiny_study() | study | {"asymmetric": asked}))
        for job in own.jobs():
            if job.rule == "compress":
                found[own.cell(job).columns["label"], asked] = some(own.cost(job))
    (calib,) = own.plan.calibrations.values()
    states = model_costs.HIDDEN_FILES * 4 * shape.hidden * calib["samples"] * calib["length"]
    gptq = found["gptq", False]
    for name, asked in (("gptaq", False), ("qronos", False), ("gptq", True)):
        other = found[name, asked]
        if mode == "shared":
            assert (other.disk, other.transient) == (gptq.disk, gptq.transient)
            assert (other.work.passes, other.work.grams) == (gptq.work.passes, gptq.work.grams)
            assert other == gptq or name != "gptq"
        else:
            assert other.memory - gptq.memory >= 4 * 2 * shape.largest_gram**2
            assert other.transient - gptq.transient == states
            assert other.work.grams == 4 * gptq.work.grams and other.work.passes > gptq.work.passes


def test_passes_back_count_once_for_the_methods_that_need_them(tmp_path):
    build("llama").save_pretrained(tmp_path)
    factors: dict = {"modes": ["shared"], "targets": [{"rank": 0.4}, {"rank": 0.6}]}
    without = study_of(tmp_path, methods={"svd_llm": None}, **factors)
    own = study_of(tmp_path, methods={"svd_llm": None, "fwsvd": None}, **factors)
    assert not [job for job in without.jobs() if job.rule == "fisher"]
    (job,) = [job for job in own.jobs() if job.rule == "fisher"]
    cost, shape = some(own.cost(job)), some(own.shape(job.wildcards["model"]))
    (gram,) = [some(own.cost(job)) for job in own.jobs() if job.rule == "gram"]
    assert cost.disk == 4 * shape.total(lambda block: sum(out for out, _, _ in block.layers))
    assert cost.work.passes == 4 * gram.work.passes
    (calib,) = own.plan.calibrations.values()
    weights, logits = 4 * shape.parameters, 4 * 4 * calib["length"] * shape.vocabulary
    assert weights + logits < cost.memory - model_costs.PROCESS < 2 * (weights + logits) + 8e6
    assert job_costs.FISHER_PART == fisher.PART


def test_memory_to_pass_back_grows_with_the_model_and_the_sequence():
    config = dict(TALL, intermediate_size=64, vocab_size=VOCABULARY)
    few, many = (
        ModelCost.of({"dtype": "float32"}, some(shapes.shape_of_config(config | {"num_hidden_layers": depth})))
        for depth in (8, 22)
    )
    assert many.passing_back(512) - few.passing_back(512) >= many.whole - few.whole
    assert few.passing_back(1024) - few.passing_back(512) >= 4 * 512 * (4 * VOCABULARY + 9 * TALL["hidden_size"])


def test_only_weights_of_another_dtype_exist_twice_before_a_pass_back():
    """Peaks of the job beside one process's own memory: 1.2 times the parameters in float32, 1.5 in bfloat16."""
    config = dict(TALL, hidden_size=1024, intermediate_size=4096, vocab_size=1000, num_hidden_layers=48)
    shape = some(shapes.shape_of_config(config))
    asked = {
        dtype: replace(ModelCost.of({"dtype": dtype}, shape), size=4).passing_back(8) - model_costs.PROCESS
        for dtype in ("float32", "bfloat16")
    }
    whole = 4 * shape.parameters
    assert whole < asked["float32"] < 1.1 * whole and asked["bfloat16"] == 1.5 * whole
    wide = some(shapes.shape_of_config(config | {"num_hidden_layers": 1, "vocab_size": 1_000_000}))
    read = ModelCost.of({"dtype": "float32"}, wide).passing_back(1) - model_costs.PROCESS
    assert read == 4 * (wide.parameters + 2 * wide.outside)  # the embedding, its file and a copy


def test_a_model_that_is_not_here_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_folder", lambda spec: None)
    own = study_of(tmp_path)
    assert {own.mem_mb(job) for job in own.jobs()} == {job_costs.UNKNOWN_MB}
    found = estimate_jobs(own, own.jobs(), 2, SPEEDS)
    assert found.unknown == ("tiny",) and "unknown until fetched: tiny" in estimate.short(own, found, ENOUGH)
    assert list(limit_errors(own, own.jobs(), found, Limits(1, "nobody has", 1e15))) == []


def test_a_figure_of_the_user_takes_the_estimate_s_place(tmp_path):
    build("llama").save_pretrained(tmp_path)
    own = study_of(tmp_path)
    jobs = [job for job in own.jobs() if job.rule == "compress"]
    found = estimate_jobs(own, jobs, 2, SPEEDS)
    (sentence,) = limit_errors(own, jobs, found, Limits(1e8, "this machine has", 1e15))
    assert "this machine has 100 MB" in sentence and "--set-resources compress:mem_mb=N" in sentence
    for given, refused in ((9e7, 0), (2e8, 1), (None, 0)):
        assert len(list(limit_errors(own, jobs, found, Limits(1e8, "", 1e15, given={"compress": given})))) == refused
    (sentence,) = limit_errors(own, jobs, found, Limits(None, "", found.disk - 1))
    assert "of disk" in sentence


def test_gram_stores_count_where_they_are(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path)
    own = study_of(tmp_path)
    found = estimate_jobs(own, own.jobs(), 2, SPEEDS)
    (gram,) = [some(own.cost(job)) for job in own.jobs() if job.rule == "gram"]
    assert found.stores == gram.disk + gram.transient
    for limits, refused in (
        ((found.disk, found.stores), []),
        ((found.disk - 1, found.stores), ["results/ is"]),
        ((found.disk, found.stores - 1), ["Gram stores are"]),
        ((found.disk + found.stores, None), []),
        ((found.disk + found.stores - 1, None), ["results/ is"]),
    ):
        sentences = list(limit_errors(own, [], found, Limits(None, "", *limits)))
        assert len(sentences) == len(refused) and all(part in s for part, s in zip(refused, sentences, strict=True))
    monkeypatch.setenv("LAYERWISE_CACHE", "/proc/grams")
    free, stores = estimate.disks(tmp_path / "results")
    assert free > some(stores) == 0
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "absent" / "grams"))
    assert estimate.disks(tmp_path / "results")[1] is None


@pytest.mark.parametrize(
    ("said", "files", "least"),
    [
        ("0::/a/b\n", {"a/memory.max": "300\n", "a/b/memory.max": "max\n", "memory.max": "900\n"}, 300),
        ("9:cpu:/x\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "500\n", "x/memory.max": "1\n"}, 500),
        ("4:memory:/elsewhere\n", {"memory/memory.limit_in_bytes": "700\n"}, 700),
    ],
)
def test_the_limits_of_control_groups_count(said, files, least, tmp_path, monkeypatch):
    (tmp_path / "own").write_text(said)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = list(memory.limit_files(tmp_path, tmp_path / "own"))
    monkeypatch.setattr(memory, "limit_files", lambda: found)
    assert memory.machine_memory() == least
    for path in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "memory.current").write_text("250\n")
        (path.parent / "memory.usage_in_bytes").write_text("250\n")
        (path.parent / "memory.stat").write_text("anon 190\ninactive_file 60\n")
    assert memory.free_memory() == least - 190


def test_times_of_finished_cells_are_used(tmp_path, monkeypatch):
    build("llama").save_pretrained(tmp_path)
    own = study_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    cell = next(cell for cell in own.plan.cells if cell.spec["columns"]["label"] == "wanda" and cell.mode == "shared")
    Path(cell.folder).mkdir(parents=True)
    (Path(cell.folder) / "cell.json").write_text("{}")
    (Path(cell.folder) / "benchmark.tsv").write_text("s\th:m:s\n12.5\t0:00:12\n")
    jobs = [job for job in own.jobs() if job.rule == "compress" and own.cell(job).spec["columns"]["label"] == "wanda"]
    assert finished_seconds(own.plan) == {cell_kind(cell): 12.5}
    shared = [job for job in jobs if job.wildcards["mode"] == "shared"]
    found = estimate_jobs(own, shared, 1, SPEEDS)
    assert found.seconds == 25.0 + SPEEDS.rates.start and found.measured == 2  # the jobs are forks of one process
    assert estimate_jobs(own, jobs, 1, SPEEDS).measured == 2


def test_words():
    assert [estimate.size(count) for count in (0, 2.5e6, 1.04e9, 1.4e11, 2e12)] == [
        "0 MB",
        "2 MB",
        "1.0 GB",
        "140 GB",
        "2.0 TB",
    ]
    spoken = [estimate.duration(seconds) for seconds in (3, 600, 9000, 1e6)]
    assert spoken == ["a minute or two", "about 10 minutes", "about 2 hours", "about 12 days"]


# ----------------------------------------------------------------------------------------------------------- real runs


def test_the_command_prints_a_table_without_torch_and_refuses(tmp_path):
    code = (
        "import sys; from layerwise.cli.app import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    arguments = ["estimate", "config/config.yaml", "--cores", "2", "--quick"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo: 7 M parameters" in done.stdout and "compress: sparsegpt, sequential" in done.stdout
    command = [sys.executable, "-m", "layerwise", *arguments, "--mem-mb", "300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "--mem-mb gives 300 MB" in done.stderr


SMALL = ["--configfile", CONFIG, "--resources", "mem_mb=100", "--until", "gram"]


def test_a_run_that_cannot_fit_is_refused_before_its_first_job(tmp_path):
    folder = tiny_project(tmp_path / "project")
    refused = snakemake(folder, *SMALL)
    assert refused.status == 1
    assert "gram of the model 'tiny' needs about" in refused.output
    assert "--resources allow 100 MB" in refused.output and "Traceback" not in refused.output
    assert not (folder / "results").exists() and "localrule" not in refused.output


@pytest.mark.long
def test_a_run_whose_user_knows_better_goes_on_and_takes_the_disk_that_was_foreseen(tmp_path):
    folder = tiny_project(tmp_path / "project")
    allowed = snakemake(folder, *SMALL, "--set-resources", "gram:mem_mb=90", "check_model:mem_mb=90")
    assert allowed.status == 0, allowed.output
    assert "of memory, for gram of the model 'tiny'" in allowed.output
    own = CostModel(plan(tiny_study() | {"models": {"tiny": {"path": str(next(folder.glob("a model*")))}}}))
    need = some(own.cost(next(job for job in own.jobs() if job.rule == "gram")))
    written = sum(path.stat().st_size for path in (folder / "results").rglob("block-*.safetensors"))
    assert need.disk == pytest.approx(written, rel=0.1)
