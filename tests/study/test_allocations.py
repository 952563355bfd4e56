"""Allocations as an axis of a study: what is planned, what is skipped, what is refused."""

import time

import pytest

from layerwise.allocation.shares import levels_of
from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.method_file import CatalogueError, read_entry
from layerwise.contract.target import Target
from layerwise.runtime.errors import InputError
from layerwise.study.allocation_entries import options_tried
from layerwise.study.grid import plan
from layerwise.study.job_costs import CostModel, Job, tried_sequences
from layerwise.study.job_inputs import JobInputs
from tests.study.test_grid import study
from tests.support.paths import ROOT
from tests.support.typing_helpers import some

SPARSE = [{"sparsity": 0.6}, {"sparsity": 0.5, "pattern": "layer"}]


def spread(allocations, **more):
    given = {"targets": SPARSE, "methods": {"dense": None, "wanda": None}, "modes": ["shared"]}
    return study(**(given | more), allocations=allocations)


def test_a_study_without_the_key_has_equal_levels_alone():
    plain = plan(study())
    assert not plain.allocations and "allocations" not in plain.gives
    assert {cell.columns["allocation"] for cell in plain.cells} == {"uniform"}
    assert all("allocation" not in cell.spec and cell.levels is None for cell in plain.cells)
    assert [cell.folder for cell in plan(study(allocations={"uniform": None})).cells] == [c.folder for c in plain.cells]


def test_allocations_multiply_targets_and_leave_equal_levels_where_they_were():
    before = plan(spread({"uniform": None}))
    planned = plan(spread({"uniform": None, "owl": None, "mild": {"allocator": "owl", "spread": 0.02}}))
    assert {cell.folder for cell in before.cells} < {cell.folder for cell in planned.cells}
    assert len(planned.cells) == 1 + 2 * 3 and len(planned.by_folder) == len(planned.cells)
    named = {cell.columns["target"]: cell for cell in planned.cells}
    assert list(named)[1:4] == ["60% row", "60% row owl", "60% row mild"]
    owl, mild = named["60% row owl"], named["60% row mild"]
    assert (mild.columns["allocation"], mild.columns["sparsity"]) == ("mild", 0.6)
    assert some(mild.spec.get("allocation"))["params"] == {
        "threshold": 5.0,
        "spread": 0.02,
        "counts": 2.0,
        "official": False,
    }
    assert len({owl.folder, mild.folder, owl.levels, mild.levels}) == 4
    assert set(planned.allocations) == {cell.levels for cell in planned.cells if cell.levels}
    assert named["dense"].levels is None  # one cell, whatever is allocated
    assert "allocations" in planned.gives


def test_methods_share_the_levels_of_a_target():
    planned = plan(spread({"owl": None}, methods={"wanda": None, "sparsegpt": None}))
    assert len(planned.cells) == 4 and len(planned.allocations) == 2


def test_a_bound_of_one_target_is_compared_with_no_other_levels():
    planned = plan(spread({"uniform": None, "owl": None}, certificates=True))
    assert all(cell.certificate is None for cell in planned.cells if cell.levels)
    assert len(planned.certificates) == 2


@pytest.mark.parametrize(
    ("allocations", "target", "methods", "reason"),
    [
        ("owl", {"bits": 4}, "rtn", "owl spreads a budget of row, layer, n:m, not of bits"),
        ("pq_index", {"pattern": "2:4"}, "wanda", "pq_index spreads a budget of row, layer, not of n:m"),
        ("owl", {"sparsity": 0.5, "bits": 4}, "awp", "not of pruned and quantised"),
        ("neuroal", {"bits": 4}, "rtn", "neuroal spreads a budget of row, layer, not of bits"),
        ("owl", {"sparsity": 0.995}, "wanda", "a budget of zeros must be at most 99%"),
        ("owl", {"sparsity": 0.5, "pattern": "1x16"}, "wanda", "not of 1xb"),
    ],
)
def test_misfits_are_skipped_with_a_reason(allocations, target, methods, reason):
    given = {"windows": 4} if allocations == "neuroal" else None
    planned = plan(spread({"uniform": None, allocations: given}, targets=[target], methods={methods: None}))
    assert not planned.allocations and len(planned.cells) > 0
    (row,) = planned.skipped
    assert reason in row["reason"] and row["allocation"] == allocations and row["target"].endswith(f" {allocations}")


@pytest.mark.parametrize(
    ("given", "method", "reason"),
    [
        (
            [{"sparsity": 0.5, "pattern": "2:4"}, {"pattern": "5:4"}],
            "awp",
            "pairs.1 is not a target: Target.pattern n:m",
        ),
        (
            [{"sparsity": 1 / 3, "bits": 4}],
            "awp",
            "pairs.0 is not a target: its percentages must have at most six digits",
        ),
        ([{"sparsity": 0}], "awp", "pairs.0 is not a target: a pair must prune, quantise or have a rank"),
        (
            [{"bits": 3}],
            "chain",
            "knapsack may ask for 3b: chain prunes and quantises together and cannot do only one of them",
        ),
        ([{"sparsity": 0.4}], "awp", "its joint cannot reach 40% row: chain prunes and quantises"),
        (None, "rtn", "rtn does not prune"),
    ],
)
def test_pairs_that_cannot_be_given_are_one_sentence(given, method, reason):
    spec = {"uniform": None, "knapsack": {"pairs": given}} if method != "rtn" else {"knapsack": {"pairs": given}}
    entry = {"chain": ["wanda", "rtn"]} if method == "chain" else None
    try:
        planned = plan(spread(spec, targets=[{"sparsity": 0.5, "bits": 4}], methods={method: entry}))
        (row,) = planned.skipped
        told = row["reason"]
    except InputError as error:
        told = str(error)
    assert reason in told and "\n" not in told


@pytest.mark.parametrize(
    ("target", "method", "label", "params"),
    [
        ({"sparsity": 0.5, "bits": 4}, "awp", "50% row 4b", None),
        ({"rank": 0.4}, "rocket", "rank 40%", None),
        ({"rank": 0.4, "factor_bits": 4, "factor_group": 64}, "lplr", "rank 40% 4b g64", {"factors": "lplr"}),
        ({"sparsity": 0.5, "rank": 0.2}, "three_basil", "50% row rank 20%", None),
        ({"bits": 4, "rank": 0.1}, "eora", "4b rank 10%", {"sums": "eora"}),
    ],
)
def test_pairs_are_planned_beside_their_budget(target, method, label, params):
    planned = plan(spread({"uniform": None, "knapsack": params}, targets=[target], methods={method: None}))
    assert [cell.columns["target"] for cell in planned.cells] == [label, f"{label} knapsack"]
    assert not planned.skipped


@pytest.mark.parametrize("budget", [0.02, 0.2, 0.3, 0.44, 0.45, 0.6, 0.8, 0.81, 0.9, 0.95])
def test_the_usual_levels_lie_on_both_sides_of_the_budget(budget):
    levels = levels_of(None, Target(budget))
    assert levels == sorted(levels) and levels[0] < budget < levels[-1] and budget in levels
    assert levels[0] >= 0 and levels[-1] <= 0.99


@pytest.mark.parametrize(
    ("params", "target", "method", "reason"),
    [
        ({"levels": [0.9]}, {"sparsity": 0.6}, "wanda", "levels below and above 60% row, and has none below it"),
        ({"levels": [0.3, 0.9]}, {"sparsity": 0.9}, "wanda", "levels below and above 90% row, and has none above it"),
        (
            {"pairs": [{"sparsity": 0.5, "bits": 6}]},
            {"sparsity": 0.5, "bits": 4},
            "awp",
            "of fewer bits than 50% row 4b and some of more",
        ),
        (None, {"rank": 0.9}, "rocket", "its pairs must have some of fewer bits than rank 90% and some of more"),
    ],
)
def test_a_knapsack_that_could_only_choose_equal_levels_is_refused(params, target, method, reason):
    (row,) = plan(spread({"uniform": None, "knapsack": params}, targets=[target], methods={method: None})).skipped
    assert reason in row["reason"] and row["allocation"] == "knapsack"


@pytest.mark.parametrize(
    ("target", "method", "allocations"),
    [
        ({"sparsity": 0.99}, "wanda", ["owl", "alphapruning", "pq_index", "neuroal", "knapsack", "evopress"]),
        ({"pattern": "1:4"}, "wanda", ["owl", "knapsack", "evopress"]),
        ({"bits": 2}, "rtn", ["knapsack", "evopress"]),
        ({"bits": 8}, "rtn", ["knapsack", "evopress"]),
    ],
)
def test_a_budget_at_the_limit_of_every_layer_is_not_spread(target, method, allocations):
    params = {"neuroal": {"windows": 4}, "evopress": {"windows": 4}}
    given = {"uniform": None} | {name: params.get(name) for name in allocations}
    planned = plan(spread(given, targets=[target], methods={method: None}))
    reason = f"only equal levels meet {planned.cells[0].columns['target']}, the limit of every layer"
    assert [(row["allocation"], row["reason"]) for row in planned.skipped] == [(name, reason) for name in allocations]
    assert not planned.allocations


def test_the_method_that_tries_sums_must_reach_them():
    target = {"bits": 4, "rank": 0.1}
    (row,) = plan(spread({"uniform": None, "knapsack": None}, targets=[target], methods={"eora": None})).skipped
    assert row["reason"] == "its sums cannot be used: oats does not quantise"


def test_what_tries_the_model_is_given_tokens_and_grams():
    few = {"windows": 4}
    kl = {"allocator": "knapsack", "errors": "divergence", **few}
    planned = plan(spread({"neuroal": few, "knapsack": None, "kl": kl, "evopress": few, "owl": None}))
    inputs, found = JobInputs(planned), {}
    model, calib = planned.cells[0].model, planned.cells[0].calib
    for path, cell in planned.allocations.items():
        file = path.rpartition("/")[2]
        job = _Wildcards(model=model, calib=calib, allocation=file.removesuffix(".parquet"))
        found[cell.columns["allocation"]] = (len(inputs.allocation_gram(job)), inputs.allocation_tokens(job))
    tokens = [f"results/tokens/{model}/calibration-{calib}.safetensors"]
    assert found == {
        "neuroal": (1, tokens),
        "knapsack": (1, []),
        "kl": (1, tokens),
        "evopress": (1, tokens),
        "owl": (1, []),
    }


def test_a_method_that_cannot_reach_a_target_is_skipped_once():
    planned = plan(
        spread({"uniform": None, "owl": None}, methods={"wanda": None, "gptq": {"targets": SPARSE[:1] + [{"bits": 4}]}})
    )
    assert [(row["label"], row["target"], row["allocation"]) for row in planned.skipped] == [
        ("gptq", "60% row", "uniform"),
        ("gptq", "4b owl", "owl"),
    ]


def test_tuned_entries_are_not_spread():
    tune = {"blocks": {"epochs": 1}}
    planned = plan(spread({"uniform": None, "owl": None}, methods={"wanda": {"tune": tune}}))
    assert {row["reason"] for row in planned.skipped} == {"tuning needs one target for all layers"}


@pytest.mark.parametrize(
    ("allocations", "sentence"),
    [
        ({"owll": None}, "allocations.owll: the allocator must be one of alphapruning, evopress,"),
        ({"owl": {"treshold": 3}}, "allocations.owl: owl has no parameter 'treshold'; its parameters are: threshold,"),
        ({"owl": {"threshold": "a"}}, "allocations.owl: owl's threshold must be a number. Got 'a' instead."),
        ({"uniform": {"allocator": "owl"}}, "the allocation uniform must use the allocator uniform."),
        ({"flat": {"allocator": "uniform"}}, "the allocation uniform must use the allocator uniform."),
        ({"knapsack": {"levels": [1.2]}}, "knapsack's levels must be at most 0.99. Got 1.2 instead."),
        (
            {"knapsack": {"levels": [number / 300 for number in range(201)]}},
            "knapsack's levels must have at most 200 entries. Got [",
        ),
        (
            {"evopress": {"windows": 4, "offspring": 3}},
            "allocations.evopress.survivors must be at most its offspring, 3. Got 4 instead.",
        ),
        (
            {"owll": None},
            "uniform, or a file in a folder of allocator_paths. Got 'owll' instead (did you mean 'owl'?).",
        ),
        ({"knapsack": {"probe": "nothing"}}, "or a file in a folder of method_paths. Got 'nothing' instead."),
        (
            {"knapsack": {"probe": "gptq"}},
            "wanda supports none of the targets (its probe cannot be used: gptq does not prune).",
        ),
        ({}, "config: allocations must have at least 1 entry. Got {} instead."),
    ],
)
def test_a_wrong_allocation_is_one_sentence(allocations, sentence):
    with pytest.raises(InputError) as refused:
        plan(spread(allocations))
    assert sentence in str(refused.value) and str(refused.value).count("\n") == 0


def test_an_allocator_s_file_is_code_of_its_job_and_of_no_other(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "allocators/uniform.py").read_text("utf-8"), "utf-8")
    planned = plan(spread({"mine": None, "knapsack": None, "pq_index": None}, allocator_paths=[str(tmp_path)]))
    inputs = JobInputs(planned)

    def wildcards(name):
        path = next(path for path, cell in planned.allocations.items() if cell.columns["allocation"] == name)
        *_, model, calib, file = path.split("/")
        return _Wildcards(model=model, calib=calib, allocation=file.removesuffix(".parquet"))

    mine, knapsack, index = map(wildcards, ("mine", "knapsack", "pq_index"))
    assert tmp_path / "mine.py" in inputs.allocator_sources(mine)
    assert inputs.allocator_folders(mine)[0] == "--allocator-path" and inputs.allocator_folders(knapsack) == []
    files = {path.name for path in inputs.allocator_sources(knapsack)}
    assert {"knapsack.py", "wanda.py"} <= files and files.isdisjoint({"owl.py", "rtn.py", "oats.py"})
    assert inputs.allocation_gram(mine) == inputs.allocation_gram(index) == []
    assert inputs.allocation_gram(knapsack) == [f"results/calibration/{knapsack.model}/{knapsack.calib}/gram.json"]
    assert inputs.allocation_columns(mine) == {"model": "tiny", "calibration": "words"}
    with pytest.raises(InputError, match="must be of this study"):
        inputs.spread(_Wildcards(model=mine.model, calib=mine.calib, allocation="owl-1"))


class _Wildcards(dict):
    """Snakemake's: a mapping with attributes."""

    def __getattr__(self, name):
        return self[name]


def test_the_cost_of_a_budget_s_job_has_its_probe_s():
    planned = plan(spread({"owl": None, "knapsack": None, "pq_index": None}, modes=["sequential"]))
    costs = CostModel(planned)
    jobs = list(costs.jobs())
    assert len([job for job in jobs if job.rule == "allocate"]) == len(planned.allocations) == 6
    assert len([job for job in jobs if job.rule == "gram"]) == 1  # sequential cells see none, two allocators do
    assert Job("gram", {}).rule == "gram"


@pytest.mark.parametrize(
    ("name", "params", "sequences"),
    [
        ("evopress", {"generations": 3, "offspring": 5, "survivors": 2, "screen": 1, "windows": 4}, 4 + 15 + 3 * 2 * 4),
        ("neuroal", {"windows": 4, "widths": [0.1, 0.2]}, 3 * 4),
        ("neuroal", {"windows": 4}, 15 * 4),
        ("knapsack", {"errors": "divergence", "windows": 2}, 14 * 2),
        ("knapsack", {"divergences": "levels", "windows": 2, "levels": [0.3, 0.7]}, 14 * 3 * 2),
        ("owl", {}, None),
    ],
)
def test_the_passes_of_a_search_are_counted_by_its_card(name, params, sequences):
    catalogue = Catalogue(kind=ALLOCATOR, methods=Catalogue())
    full = catalogue.complete(name, params, "here")
    options = options_tried(catalogue[name], full, Target(0.5))
    assert tried_sequences(catalogue[name].card, full, 14, options) == sequences


@pytest.mark.parametrize(
    ("params", "target", "options"),
    [
        ({"levels": [0.3, 0.5, 0.7]}, Target(0.5), 3),
        ({"levels": [0.3, 0.7]}, Target(0.5, "layer"), 3),
        ({}, Target(pattern="2:4"), 4),
        ({}, Target(bits=4), 7),
        ({}, Target(0.5, bits=4), 30),
        ({"pairs": [{"bits": 3}, {"bits": 8}]}, Target(0.5, bits=4), 3),
        ({}, Target(0.2), 19),
        ({}, Target(0.95), 15),
        ({}, Target(rank=0.4), 7),
    ],
)
def test_options_are_counted_as_the_allocator_lists_them(params, target, options):
    catalogue = Catalogue(kind=ALLOCATOR, methods=Catalogue())
    full = catalogue.complete("knapsack", params, "here")
    assert options_tried(catalogue["knapsack"], full, target) == options
    assert len(catalogue.allocator("knapsack", full).candidates(target)[1]) == options


@pytest.mark.parametrize(
    ("target", "method", "kept"),
    [
        ({"sparsity": 0.6}, "wanda", {"probe"}),
        ({"pattern": "2:4"}, "wanda", {"probe"}),
        ({"bits": 4}, "rtn", {"quantiser"}),
        ({"sparsity": 0.5, "bits": 4}, "awp", {"joint"}),
        ({"rank": 0.4}, "rocket", {"factors"}),
        ({"sparsity": 0.5, "rank": 0.2}, "oats", {"sums"}),
    ],
)
def test_only_the_method_that_a_target_asks_for_is_part_of_an_allocation(target, method, kept):
    planned = plan(spread({"knapsack": None}, targets=[target], methods={method: None}))
    (path, cell), inputs = next(iter(planned.allocations.items())), JobInputs(planned)
    params = some(cell.spec.get("allocation"))["params"]
    assert params.keys() & {"probe", "quantiser", "joint", "factors", "sums"} == kept
    job = _Wildcards(model=cell.model, calib=cell.calib, allocation=path.rpartition("/")[2].removesuffix(".parquet"))
    files = {file.stem for file in inputs.allocator_sources(job)}
    assert files & {"oats", "svd_llm", "rtn"} == {
        "quantiser": {"rtn"},
        "joint": {"rtn"},
        "factors": {"svd_llm"},
        "sums": {"oats"},
    }.get(next(iter(kept)), set())
    again = plan(
        spread(
            {"knapsack": {"sums": {"oats": {"iterations": 3}}, "factors": {"svd_llm": {}}}},
            targets=[target],
            methods={method: None},
        )
    )
    assert (again.cells[0].folder == cell.folder) == (kept != {"sums"})


def test_a_knapsack_of_zeros_costs_as_its_probe_and_not_as_a_sum_of_parts():
    model = {"demo": {"path": str(ROOT / "resources/demo"), "dtype": "float32"}}
    rows = spread({"uniform": None, "knapsack": None}, models=model, targets=SPARSE[:1], methods={"wanda": None})
    costs = CostModel(plan(rows))
    found = {job.rule: some(costs.cost(job)).work.solving for job in costs.jobs() if job.rule == "allocate"}
    wanda = next(some(costs.cost(job)).work.operations for job in costs.jobs() if job.rule == "compress")
    assert 0 < found["allocate"] < 30 * wanda


@pytest.mark.parametrize("was", ['["widths", "windows"]', '"passes": '])
def test_passes_of_no_parameter_are_one_sentence(tmp_path, was):
    text = (ROOT / "allocators/neuroal.py").read_text("utf-8")
    now = {'"passes": ': '"passes_where": {"width": {"1": []}}, "passes": '}.get(was, '["width"]')
    (tmp_path / "mine.py").write_text(text.replace(was, now), "utf-8")
    with pytest.raises(CatalogueError, match=r"must name parameters.* Got 'width' instead\.$"):
        read_entry(tmp_path / "mine.py", ALLOCATOR)


def test_ten_thousand_spread_cells_are_planned_quickly():
    damping = [1e-3 * (number + 1) for number in range(840)]
    allocations = {"uniform": None, "owl": None, "knapsack": None} | {
        f"owl{number}": {"allocator": "owl", "spread": 0.01 * number} for number in range(3)
    }
    begun = time.process_time()
    planned = plan(spread(allocations, methods={"sparsegpt": {"damping": damping}}))
    assert len(planned.cells) == 840 * 2 * 6 and len(planned.allocations) == 2 * 5
    assert time.process_time() - begun < 60


def test_what_tries_the_model_on_more_text_than_there_is_is_refused():
    with pytest.raises(InputError, match=r"allocations.neuroal.windows must be at most the 4 samples of calibration"):
        plan(spread({"neuroal": {"windows": 5}}))
    assert plan(spread({"neuroal": {"windows": 4}})).allocations
    with pytest.raises(InputError, match=r"allocations.knapsack.windows must be at most the 4 samples"):
        plan(spread({"knapsack": {"errors": "divergence"}}))
    assert plan(spread({"knapsack": None})).allocations  # which tries no model


def test_a_format_is_no_budget_of_pairs():
    joint = {"targets": [{"sparsity": 0.5, "bits": "nvfp4"}], "methods": {"one": {"chain": ["wanda", "rtn"]}}}
    planned = plan(spread({"uniform": None, "knapsack": None}, **joint))
    (skipped,) = planned.skipped
    assert skipped["reason"] == "knapsack spreads pairs of sparsity and bits, not those of nvfp4"
