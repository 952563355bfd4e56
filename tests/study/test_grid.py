"""The grid: equal configs give equal cells, different ones different cells, and a wrong one is one sentence."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from layerwise.runtime.errors import InputError
from layerwise.study import config_file
from layerwise.study.cell import canonical, identity
from layerwise.study.config_validation import validate
from layerwise.study.grid import Plan, plan
from layerwise.study.job_inputs import JobInputs
from layerwise.study.method_entries import MethodEntry
from tests.support.paths import ROOT

PATH_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
DENSE = {"sparsity": 0.0, "pattern": "row", "bits": None, "group": None, "symmetric": False}

WARM = '''"""A method that starts from another."""
from dataclasses import dataclass
from layerwise.contract.layer import Method
from tests.support.paths import ROOT

CARD = {
    "title": "Warm",
    "patterns": ["row", "layer", "n:m"],
    "bits": [4],
    "updates_weights": True,
    "needs": ["gram"],
    "parameters": {
        "warm_start": {"format": "method"},
        "steps": {"type": "array", "items": {"type": "integer"}},
        "rate": {"type": "number"},
    },
}


@dataclass(frozen=True)
class Warm(Method):
    warm_start: str = "sparsegpt"
    steps: tuple = (1, 2)
    rate: float = 1.0

    def solve(self, layer, target, rng):
        return self.warm_start.compress(layer, target, rng)
'''


def study(**changes: Any) -> dict[str, Any]:
    """A small study; the changes replace its sections."""
    return {
        "models": {"tiny": {"path": "tiny"}},
        "texts": {"train": {"path": "train.txt"}, "test": {"path": "test.txt"}},
        "calibration": {"words": {"text": "train", "samples": 4, "length": 16, "seed": 0}},
        "evaluation": {"words": {"text": "test", "length": 16}},
        "targets": [{"sparsity": 0.5}, {"pattern": "2:4"}],
        "methods": {"dense": None, "magnitude": None, "wanda": None},
        **changes,
    }


def edited(path: str, value: Any, **changes: Any) -> dict[str, Any]:
    """The small study with the value at a path such as models/tiny/path."""
    full = copy.deepcopy(study(**changes))
    inner: Any = full
    *parts, last = path.split("/")
    for part in parts:
        inner = inner[int(part) if isinstance(inner, list) else part]
    inner[int(last) if isinstance(inner, list) else last] = value
    return full


def labels(planned: Plan) -> list[tuple[str, str]]:
    """Distinct (label, target) of the cells, in their order."""
    return list(dict.fromkeys((cell.columns["label"], cell.columns["target"]) for cell in planned.cells))


def refused(config: Any, **options: Any) -> str:
    """The one sentence that a config is refused with."""
    with pytest.raises(InputError) as error:
        plan(config, **options)
    sentence = str(error.value)
    assert "\n" not in sentence and sentence.endswith(".") and "Traceback" not in sentence
    return sentence


@pytest.fixture
def warm(tmp_path) -> str:
    """A folder with a method that starts from another."""
    (tmp_path / "warm.py").write_text(WARM, "utf-8")
    return str(tmp_path)


# ----------------------------------------------------------------------------------------------------------- identity


def test_canonical_is_one_spelling():
    assert canonical({"b": [1.0, 2.5], "a": None}) == canonical({"a": None, "b": (1, 2.5)}) == '{"a":null,"b":[1,2.5]}'
    assert canonical({"a": -0.0}) == canonical({"a": 0})
    assert canonical(True) == "true" != canonical(1)
    assert canonical("ü") == r'"\u00fc"'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_canonical_can_be_read_back(value):
    assert json.loads(canonical(value)) == value
    assert canonical(json.loads(canonical(value))) == canonical(value)


@given(st.dictionaries(st.text(max_size=3), VALUES, min_size=2, max_size=4), st.randoms())
def test_the_order_of_keys_is_nothing(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert identity("a", dict(items)) == identity("a", value)


def test_swapped_values_are_another_identity():
    assert identity("m", {"a": 1, "b": 2}) != identity("m", {"a": 2, "b": 1})
    assert identity("m", [1, 2]) != identity("m", [2, 1])
    assert identity("m", {"a": {"b": 1}}) != identity("m", {"b": {"a": 1}})
    assert re.fullmatch("m-[0-9a-f]{8}", identity("m", {}))


def folders(config: dict[str, Any]) -> set[str]:
    return {cell.folder for cell in plan(config).cells}


OTHER_CELLS = {
    "models/tiny/path": "other",
    "models/tiny/dtype": "bfloat16",
    "models/tiny/trust_remote_code": True,
    "texts/train/path": "other.txt",
    "texts/train/join": " ",
    "texts/train/separator": "--",
    "texts/train/field": "content",
    "calibration/words/samples": 5,
    "calibration/words/length": 17,
    "calibration/words/seed": 1,
    "calibration/words/sampling": "documents",
    "calibration/words/dtype": "bfloat16",
    "seed": 1,
}


@pytest.mark.parametrize("path", OTHER_CELLS)
def test_every_value_is_in_the_path_of_a_cell(path):
    assert not folders(edited(path, OTHER_CELLS[path])) & folders(study())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("study", "another"),
        ("keep_weights", True),
        ("evaluation/words/length", 8),
        ("texts/test/path", "other.txt"),
        ("models/tiny/dtype", "float32"),  # the default
        ("texts/train/join", "\n\n"),
        ("targets/0/pattern", "row"),
        ("targets/1/sparsity", 0.5),
        ("methods/magnitude", {"convention": "exact"}),
        ("methods/magnitude", {}),
    ],
)
def test_a_default_written_out_and_what_no_cell_depends_on_keep_its_path(path, value):
    assert folders(edited(path, value)) == folders(study())


def test_an_evaluation_has_an_identity_too():
    first, second = plan(study()), plan(edited("evaluation/words/length", 8))
    (one,), (other,) = first.evaluations, second.evaluations
    assert one != other and one.startswith("words-") and other.startswith("words-")


def test_parameters_and_targets_are_in_the_name_of_a_cell():
    methods = {"sparsegpt": {"damping": [0.01, 0.02], "blocksize": [64, 128]}}
    planned = plan(study(methods=methods, targets=[{"sparsity": 0.5}, {"sparsity": 0.5, "bits": 4}]))
    assert len({cell.cell for cell in planned.cells}) == 2 * 2 * 2
    assert len({cell.params for cell in planned.cells}) == len(planned.cells) == 16  # mode is a column


# ---------------------------------------------------------------------------------------------------------- expansion


def test_cells_are_the_product_and_dense_is_one_per_model():
    models = {"one": {"path": "one"}, "two": {"path": "two"}}
    calibration = {name: {"text": "train", "samples": 4, "length": 16, "seed": i} for i, name in enumerate("ab")}
    planned = plan(study(models=models, calibration=calibration))
    dense = [cell for cell in planned.cells if cell.columns["label"] == "dense"]
    assert [(cell.columns["model"], cell.mode) for cell in dense] == [("one", "shared"), ("two", "shared")]
    assert all({key: cell.columns[key] for key in DENSE} == DENSE for cell in dense)
    assert len(planned.cells) == 2 + 2 * 2 * 2 * 2 * 2  # models, calibrations, modes, targets, methods
    assert len(planned.by_folder) == len(planned.cells)
    assert all(planned.by_folder[cell.folder] is cell for cell in planned.cells)


def test_a_target_with_a_rank_is_for_methods_that_give_factors():
    targets = [{"rank": 0.4}, {"sparsity": 0.5}]
    planned = plan(study(targets=targets, methods={"svd_llm": None, "wanda": None}))
    assert {(cell.columns["label"], cell.columns["target"]) for cell in planned.cells} == {
        *(("svd_llm", "rank 40%"), ("wanda", "50% row"))
    }
    assert {row["reason"] for row in planned.skipped} == {
        "wanda gives no low-rank factors",
        "svd_llm gives low-rank factors and neither prunes nor quantises",
    }
    both = [targets[0], targets[0] | {"factor_bits": 4}]
    rounded = plan(study(targets=both, methods={"svd_llm": None, "lplr": None}))
    assert {(cell.columns["label"], cell.columns["target"]) for cell in rounded.cells} == {
        *(("svd_llm", "rank 40%"), ("lplr", "rank 40% 4b"))
    }
    assert {cell.columns["comparison"] for cell in rounded.cells} == {"low rank"}
    assert {row["reason"] for row in rounded.skipped} == {
        "svd_llm does not quantise low-rank factors",
        "lplr gives quantised low-rank factors, so the target must have factor_bits",
    }
    with pytest.raises(InputError, match=r"tune trains kept weights and grids, not low-rank factors"):
        plan(study(targets=targets[:1], methods={"svd_llm": {"tune": {"blocks": {}}}}))
    spread = study(targets=targets[:1], methods={"svd_llm": None}, allocations={"uniform": None, "owl": None})
    assert "not of low rank" in plan(spread).skipped[0]["reason"]


def test_a_convention_that_the_runner_always_refuses_is_refused_before_a_job():
    reason = "rocket's convention official counts no positions, and exceeds the target's bits"
    asked: dict = {"rocket": {"convention": ["exact", "official"]}, "svd": None}
    told = f"methods.rocket.convention_official: rocket supports none of the targets ({reason})."
    assert refused(study(targets=[{"rank": 0.4}], methods=asked)) == told
    asked["rocket"] = {"convention": "exact"}
    assert {cell.columns["method"] for cell in plan(study(targets=[{"rank": 0.4}], methods=asked)).cells} == {*asked}


FISHER = WARM.replace('"needs": ["gram"]', '"needs": ["gram", "fisher"]').replace("sparsegpt", "wanda")


def test_a_fisher_is_of_the_dense_model_alone(tmp_path):
    targets = [{"rank": 0.4}]
    both = study(targets=targets, methods={"svd": None, "mine": {"method": "fwsvd"}}, modes=["shared", "sequential"])
    told = (
        "methods.mine: fwsvd must run in shared mode: its fisher is of the dense model's loss. Got sequential mode "
        "instead: give the method modes: [shared]."
    )
    assert refused(both) == told
    both["methods"]["mine"]["modes"] = ["shared"]
    planned = plan(both)
    jobs = JobInputs(planned)
    for cell in planned.cells:
        wildcards = {"model": cell.model, "calib": cell.calib, "mode": cell.mode, "cell": cell.cell}
        path = f"results/calibration/{cell.model}/{cell.calib}/fisher.safetensors"
        assert jobs.fisher(wildcards) == ([path] if cell.columns["label"] == "mine" else [])
    (tmp_path / "mine.py").write_text(FISHER)
    spread: dict[str, Any] = {"allocations": {"uniform": None, "neuroal": {"probe": "mine", "windows": 4}}}
    spread |= {"method_paths": [str(tmp_path)], "targets": [{"sparsity": 0.5}], "methods": {"wanda": None}}
    told = "its probe cannot be used: mine needs the fisher of the dense model, which no allocation collects"
    assert plan(study(**spread)).skipped[0]["reason"] == told
    inside = {"warm": {"method": "reconstruct", "mask_from": "mine"}}
    assert "reconstruct must run in shared mode" in refused(
        study(**spread | {"methods": inside, "modes": ["sequential"]})
    )


def test_columns_of_a_cell():
    cell = plan(study()).cells[1]
    assert list(cell.columns) == [
        *("model", "calibration", "mode", "label", "method", "comparison", "target", "allocation"),
        *("allocator", "allocation_params"),
        *("sparsity", "pattern", "bits", "group", "symmetric", "params", "seed", "cell"),
    ]
    assert cell.columns["comparison"] == "mask-only" and cell.columns["target"] == "50% row"
    assert cell.folder == f"results/cells/{cell.model}/{cell.calib}/{cell.mode}/{cell.cell}"
    assert json.loads(cell.params)["columns"] == cell.columns  # what the job is given


def test_a_bound_is_computed_once_for_all_masks_of_a_pattern_in_shared_mode():
    whole = plan(study(methods={"magnitude": None, "wanda": None, "sparsegpt": None}))
    targets = {cell.columns["target"] for cell in whole.cells}
    assert len(whole.certificates) == len(targets) and whole.gives == {"certificates", "pairs"}
    for cell in whole.cells:
        mask = cell.columns["comparison"] == "mask-only" and cell.mode == "shared"
        assert (cell.certificate in whole.certificates) == mask
    ranks = [{"rank": 0.4}, {"rank": 0.6}]
    factors = plan(study(methods={"svd": {"targets": ranks}, "svd_llm": {"targets": ranks}, "awp": None}))
    bounded = {cell.certificate for cell in factors.cells if cell.columns["comparison"] == "low rank"}
    assert len(bounded - {None}) == 2 and {*factors.certificates} == bounded - {None}
    assert not plan(study(methods={"wanda": None}, certificates=False)).certificates
    assert not plan(study(methods={"wanda": None}, modes=["sequential"])).certificates
    assert plan(study(methods={"sparse_swaps": None}, certificates=False)).gives == {"traces"}
    assert not plan(study(methods={"dsnot": None}, certificates=False)).gives  # its trace measures something else


def test_one_mode():
    assert {cell.mode for cell in plan(study(modes=["sequential"])).cells} == {"sequential"}


def test_an_entry_may_be_named_freely():
    planned = plan(study(methods={"mine": {"method": "wanda"}}))
    assert {(cell.columns["label"], cell.columns["method"]) for cell in planned.cells} == {("mine", "wanda")}


def test_sweeps_expand():
    planned = plan(study(methods={"sparsegpt": {"damping": [0.01, 1e-05, 1], "blocksize": [64, 128]}}))
    found = list(dict.fromkeys(label for label, _ in labels(planned)))
    values = itertools.product(("0.01", "1e-05", "1"), ("64", "128"))
    assert found == [f"sparsegpt.damping_{damping}.blocksize_{size}" for damping, size in values]
    one = next(cell for cell in planned.cells if cell.columns["label"] == found[0])
    assert json.loads(one.columns["params"]) == {"blocksize": 64, "damping": 0.01, "convention": "exact"}


def test_labels_of_a_sweep_are_unique_and_safe_in_a_path(warm):
    rates = [-1, 1, 1.5, 1e-05, 1e5, 0.1, -0.1]
    starts = ["wanda", "magnitude", {"sparsegpt": {"damping": 0.1}}, {"sparsegpt": {"damping": 1}}]
    planned = plan(study(methods={"warm": {"rate": rates, "warm_start": starts}}, method_paths=[warm]))
    found = {label for label, _ in labels(planned)}
    assert len(found) == len(rates) * len(starts)
    assert len({cell.folder for cell in planned.cells}) == len(planned.cells) == 2 * 2 * len(found)
    for part in itertools.chain.from_iterable(cell.folder.split("/") for cell in planned.cells):
        assert PATH_SAFE.fullmatch(part)


def test_two_cells_never_share_a_label():
    methods = {"sparsegpt.damping_0.1": {"method": "sparsegpt", "damping": 1}, "sparsegpt": {"damping": [0.1, 0.2]}}
    assert "sparsegpt.damping_0.1" in refused(study(methods=methods))


def test_a_parameter_that_is_a_list_is_no_sweep(warm):
    planned = plan(study(methods={"warm": {"steps": [3, 4]}}, method_paths=[warm]))
    assert {label for label, _ in labels(planned)} == {"warm"}
    assert json.loads(planned.cells[0].columns["params"])["steps"] == [3, 4]


def test_warm_starts_are_complete_with_their_defaults(warm):
    def params(value: Any) -> dict[str, Any]:
        (entry,) = {cell.columns["params"] for cell in plan(study(methods={"warm": value}, method_paths=[warm])).cells}
        return json.loads(entry)["warm_start"]

    sparsegpt = {"blocksize": 128, "convention": "exact", "damping": 0.01}
    assert params(None) == params({"warm_start": {"sparsegpt": None}}) == {"sparsegpt": sparsegpt}
    assert params({"warm_start": "wanda"}) == {"wanda": {}}
    assert params({"warm_start": {"sparsegpt": {"damping": 1}}}) == {"sparsegpt": {**sparsegpt, "damping": 1}}
    nested = {"warm": {"warm_start": "magnitude", "rate": 2}}
    assert params({"warm_start": nested})["warm"] == {
        "warm_start": {"magnitude": {"convention": "exact"}},
        "steps": [1, 2],
        "rate": 2,
    }


def test_tuning_is_part_of_a_cell_with_its_defaults():
    targets = [{"sparsity": 0.5, "pattern": "1x16", "bits": 4, "group": 16}]
    entries = {"gqsa": None, "gqsa-tuned": {"method": "gqsa", "tune": {"blocks": {"epochs": 3}, "end": {}}}}
    plain, tuned = plan(study(targets=targets, methods=entries, modes=["shared"])).cells
    assert plain.columns["comparison"] == "pruned and quantised" and tuned.columns["comparison"] == "tuned"
    stages = tuned.spec.get("tune", {})
    blocks, end = stages["blocks"], stages["end"]
    assert blocks["epochs"] == 3 and set(blocks) == {"epochs", "batch", "weights", "grid"}
    assert set(end) == {"epochs", "batch", "grid"}
    assert json.loads(tuned.columns["params"]) == {"damping": 0.01, "tune": {"blocks": blocks, "end": end}}
    other = {"gqsa-tuned": {"method": "gqsa", "tune": {"blocks": {"epochs": 4}, "end": {}}}}
    assert plan(study(targets=targets, methods=other, modes=["shared"])).cells[0].cell != tuned.cell
    # A cell without stages is what it was before there were any.
    spec = {"label": "gqsa", "method": "gqsa", "params": {"damping": 0.01}, "seed": 0}
    target = {"sparsity": 0.5, "pattern": "1x16", "bits": 4, "group": 16, "symmetric": False}
    assert plain.cell == identity("gqsa", {**spec, "target": target}) and "tune" not in plain.spec


def test_a_control_stays_one_when_it_is_tuned():
    methods = {"random": None, "random-tuned": {"method": "random", "tune": {"blocks": {}}}, "wanda": None}
    groups = {cell.columns["label"]: cell.columns["comparison"] for cell in plan(study(methods=methods)).cells}
    assert groups == {"random": "control", "random-tuned": "control", "wanda": "mask-only"}


def test_a_stage_that_trains_grids_skips_targets_without_one():
    targets = [{"pattern": "2:4"}, {"pattern": "2:4", "bits": 4}]
    entries = {name: {"method": "sparsegpt", "tune": {name: {}}} for name in ("blocks", "end")}
    planned = plan(study(targets=targets, methods=entries))
    assert set(labels(planned)) == {("blocks", "2:4"), ("blocks", "2:4 4b"), ("end", "2:4 4b")}
    reason = "tune.end trains scales and zeros, which do not exist without bits"
    assert planned.skipped == [
        {"label": "end", "method": "sparsegpt", "target": "2:4", "allocation": "uniform", "reason": reason}
    ]


JOINT = [{"sparsity": 0.5, "bits": 4, "group": 8}]


def test_a_method_from_elsewhere_may_be_named_by_its_parameter(tmp_path):
    (tmp_path / "warm.py").write_text(WARM.replace('    "needs"', '    "named_by": "steps",\n    "needs"'))
    planned = plan(study(methods={"two": {"steps": [3, 4]}}, method_paths=[str(tmp_path)]))
    assert {cell.columns["method"] for cell in planned.cells} == {"warm"}
    assert json.loads(planned.cells[0].columns["params"])["steps"] == [3, 4]
    with pytest.raises(InputError, match="methods.two: warm needs its parameter steps, which has no default"):
        plan(study(methods={"two": {"method": "warm"}}, method_paths=[str(tmp_path)]))


def test_both_orders_of_a_chain_are_cells_of_their_own():
    methods = {"wanda-rtn": {"chain": ["wanda", "rtn"]}, "rtn-wanda": {"chain": ["rtn", {"wanda": None}]}}
    planned = plan(study(methods=methods, targets=[*JOINT, {"pattern": "2:4", "bits": 3}]))
    found = {(cell.columns["label"], cell.columns["target"]): cell for cell in planned.cells if cell.mode == "shared"}
    targets = ("50% row 4b g8", "2:4 3b")
    assert list(found) == [(label, target) for label in methods for target in targets]
    assert len({cell.folder for cell in planned.cells}) == len(planned.cells) == 2 * 2 * 2
    for (label, _), cell in found.items():
        assert (cell.columns["method"], cell.columns["comparison"]) == ("chain", "pruned and quantised")
        steps = {
            "wanda-rtn": [{"wanda": {}}, {"rtn": {"mse": False}}],
            "rtn-wanda": [{"rtn": {"mse": False}}, {"wanda": {}}],
        }
        assert json.loads(cell.columns["params"]) == {"chain": steps[label]}


def test_a_chain_takes_parameters_warm_starts_and_targets():
    swaps = {"sparse_swaps": {"swaps": 3.0, "warm_start": {"sparsegpt": {"damping": 0.1}}}}
    planned = plan(study(methods={"wanda": None, "mixed": {"chain": [swaps, "rtn"], "targets": JOINT}}))
    (cell,) = (cell for cell in planned.cells if cell.columns["label"] == "mixed" and cell.mode == "shared")
    (first, _) = json.loads(cell.columns["params"])["chain"]
    sparsegpt = {"blocksize": 128, "convention": "exact", "damping": 0.1}
    assert first == {"sparse_swaps": {"swaps": 3, "warm_start": {"sparsegpt": sparsegpt}}}


def test_a_chain_reaches_targets_with_sparsity_and_bits_alone():
    planned = plan(
        study(methods={"wanda": None, "a": {"chain": ["wanda", "rtn"]}}, targets=[{"sparsity": 0.5}, *JOINT])
    )
    assert labels(planned) == [("wanda", "50% row"), ("a", "50% row 4b g8")]
    reasons = {row["label"]: row["reason"] for row in planned.skipped}
    assert reasons == {
        "wanda": "wanda does not quantise",
        "a": "chain prunes and quantises together and cannot do only one of them",
    }


def test_unsupported_pairs_are_skipped_with_the_reason(warm):
    targets = [{"sparsity": 0.5}, {"bits": 4}, {"pattern": "2:4", "bits": 4}, {"sparsity": 0.5, "pattern": "1x4"}]
    methods = {"dense": None, "magnitude": None, "rtn": None, "warm": {"warm_start": "wanda"}, "sparsegpt": None}
    planned = plan(study(targets=targets, methods=methods, method_paths=[warm]))
    reasons = {(row["label"], row["target"]): row["reason"] for row in planned.skipped}
    assert reasons == {
        ("magnitude", "4b"): "magnitude does not quantise",
        ("magnitude", "2:4 4b"): "magnitude does not quantise",
        ("rtn", "50% row"): "rtn does not prune",
        ("rtn", "2:4 4b"): "rtn does not prune",
        ("rtn", "50% 1x4"): "rtn does not prune",
        ("warm", "4b"): "warm does not quantise without pruning",
        ("warm", "2:4 4b"): "its warm_start cannot be used: wanda does not quantise",
        ("warm", "50% 1x4"): "warm prunes by row, layer, n:m, not by 1xb",
        ("sparsegpt", "4b"): "sparsegpt does not quantise without pruning",
        ("sparsegpt", "50% 1x4"): "sparsegpt prunes by row, layer, n:m, not by 1xb",
    }
    assert not set(reasons) & set(labels(planned))
    assert [list(row) for row in planned.skipped] == [["label", "method", "target", "allocation", "reason"]] * len(
        reasons
    )


def test_targets_of_an_entry_take_the_place_of_the_study_s():
    planned = plan(study(methods={"magnitude": None, "rtn": {"targets": [{"bits": 4}, {"bits": 3, "group": 8}]}}))
    assert labels(planned) == [
        *(("magnitude", target) for target in ("50% row", "2:4")),
        *(("rtn", target) for target in ("4b", "3b g8")),
    ]
    assert planned.skipped == []


def test_modes_of_an_entry_take_the_place_of_the_study_s():
    methods = {"magnitude": None, "wanda": {"modes": ["shared", "sequential"]}, "sparsegpt": {"modes": ["sequential"]}}
    planned = plan(study(methods=methods, modes=["shared"], targets=[{"pattern": "2:4"}]))
    found = [(cell.columns["label"], cell.mode) for cell in planned.cells]
    assert found == [
        *(("magnitude", "shared"), ("wanda", "shared"), ("wanda", "sequential"), ("sparsegpt", "sequential"))
    ]
    alone = plan(study(methods={"wanda": None}, modes=["shared"], targets=[{"pattern": "2:4"}]))
    assert {cell.folder for cell in alone.cells} < {cell.folder for cell in planned.cells}


@pytest.mark.parametrize(
    ("modes", "wanted"),
    [
        ([], "modes must have at least 1 entry"),
        (["shared", "shared"], "modes must have no entry twice"),
        (["both"], "modes.0 must be one of"),
        ("shared", "modes must be a list"),
    ],
)
def test_modes_of_an_entry_must_be_modes(modes: object, wanted: str):
    with pytest.raises(InputError, match=rf"config: methods.wanda.{wanted}"):
        plan(study(methods={"wanda": {"modes": modes}}))


def test_a_target_written_twice_is_one():
    twice = [{"sparsity": 0.5}, {"sparsity": 0.5, "pattern": "row"}, {"pattern": "2:4"}]
    assert folders(study(targets=twice)) == folders(study())


def test_whole_numbers_may_be_written_with_a_point():
    """YAML reads 4.0 as a float, which JSON Schema takes for an integer: it is the same target."""
    methods = {"rtn": None}
    exact = plan(study(methods=methods, targets=[{"bits": 4, "group": 8}]))
    floats = plan(study(methods=methods, targets=[{"bits": 4.0, "group": 8.0}]))
    assert labels(floats) == [("rtn", "4b g8")] and floats.by_folder.keys() == exact.by_folder.keys()


def test_a_grid_of_thousands_of_cells():
    shares = [round(0.1 + 0.01 * i, 2) for i in range(60)]
    methods = {"magnitude": None, "sparsegpt": {"damping": [0.001, 0.01, 0.1], "blocksize": [32, 64, 128, 256, 512]}}
    planned = plan(study(methods=methods, targets=[{"sparsity": share} for share in shares]))
    assert len(planned.cells) == len(planned.by_folder) == 2 * 60 * (1 + 15) == 1920
    more = plan(study(methods={**methods, "wanda": None}, targets=[{"sparsity": share} for share in shares]))
    assert planned.by_folder.keys() < more.by_folder.keys() and len(more.cells) == 2040


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.name)
def test_the_studies_in_the_repository_are_valid(path):
    planned = plan(yaml.safe_load(path.read_text("utf-8")))
    assert planned.cells
    assert all(PATH_SAFE.fullmatch(part) for cell in planned.cells for part in cell.folder.split("/"))


def test_defaults_are_filled_in():
    full = validate(study())
    assert full["study"] == "study" and full["seed"] == 0 and full["modes"] == ["shared", "sequential"]
    assert full["models"]["tiny"] == {"dtype": "float32", "trust_remote_code": False, "path": "tiny"}
    assert full["calibration"]["words"]["sampling"] == "stream" and full["evaluation"]["words"]["samples"] is None
    assert validate(full) == full and study() == study()


# -------------------------------------------------------------------------------------------------------------- seeds

ONE = {"text": "train", "samples": 4, "length": 16}


def test_paths_of_a_study_with_one_seed_stay():
    """Digests that results of earlier versions have on disk."""
    folders = [cell.folder for cell in plan(study()).cells]
    assert (
        folders[0] == "results/cells/tiny-6899708f/words-8841c9ae/shared/dense-d2776660"
        and folders[-1] == "results/cells/tiny-6899708f/words-8841c9ae/sequential/wanda-4fdf658e"
    )


def test_each_seed_is_the_study_of_that_seed_alone():
    together = plan(study(calibration={"words": {**ONE, "seeds": [3, 0, 7]}}))
    repeated = [cell for cell in together.cells if cell.columns["label"] != "dense"]
    for seed in (3, 0, 7):
        alone = plan(study(seed=seed, calibration={"words": {**ONE, "seed": seed}}))
        own = [cell for cell in repeated if cell.columns["seed"] == seed]
        assert own == [cell for cell in alone.cells if cell.columns["label"] != "dense"]
        (calib,) = alone.calibrations
        assert (
            together.calibrations[calib] == alone.calibrations[calib] and together.calibrations[calib]["seed"] == seed
        )
    assert len(repeated) == 3 * 2 * 2 * 2 and len({cell.folder for cell in repeated}) == len(repeated)
    assert sum(cell.columns["label"] == "dense" for cell in together.cells) == 1


def test_seeds_of_one_set_leave_the_seed_of_the_others():
    calibration = {"words": {**ONE, "seeds": [0, 1]}, "others": {**ONE, "seed": 4}}
    planned = plan(study(seed=9, calibration=calibration))
    seeds = {(cell.columns["calibration"], cell.columns["seed"]) for cell in planned.cells}
    assert seeds == {("words", 0), ("words", 1), ("others", 9)}


def test_several_seeds_of_one_data_set_are_warned_about_once():
    texts = {"train": {"path": "train.txt", "dataset": "news"}, "test": {"path": "test.txt", "dataset": "news"}}
    assert len(plan(study(texts=texts, calibration={"words": {**ONE, "seeds": [0, 1, 2]}})).warnings()) == 1


def test_the_plan_says_whether_methods_can_be_compared():
    assert "pairs" in plan(study()).gives
    alone = study(methods={"wanda": None, "sparsegpt": None}, calibration={"words": {**ONE, "seeds": [0, 1]}})
    assert "pairs" not in plan(alone).gives


# ------------------------------------------------------------------------------------------------------ contamination


def test_texts_of_one_data_set_are_warned_about():
    assert plan(study()).warnings() == []
    texts = {"train": {"path": "train.txt", "dataset": "news"}, "test": {"path": "test.txt", "dataset": "news"}}
    (sentence,) = plan(study(texts=texts)).warnings()
    assert sentence.startswith("calibration words-") and "draw from the same data set, news" in sentence
    (sentence,) = plan(edited("evaluation/words/text", "train")).warnings()
    assert "draw from the same file, train.txt" in sentence


def test_a_text_by_another_path_is_warned_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("test.txt").write_text("text")
    texts = {"train": {"path": str(tmp_path / "test.txt")}, "test": {"path": "test.txt"}}
    (sentence,) = plan(study(texts=texts)).warnings()
    assert f"draw from the same file, {tmp_path / 'test.txt'}: data-aware methods may look better" in sentence


# ---------------------------------------------------------------------------------------------------------- bad input

OWN_FILE = "wanda, or a file in a folder of method_paths. Got 'wander' instead (did you mean 'wanda'?)."
WRONG = {
    "config": (["models"], "config: the study must be a mapping. Got ['models'] instead."),
    "nothing": ({}, "config: the study must have the key models. Got nothing instead."),
    "key": (
        study(sead=1),
        "config: the study has no key 'sead'; its keys are study, seed, keep_weights, certificates, sweep,",
    ),
    "seed and seeds": (
        edited("calibration/words/seeds", [0, 1]),
        "config: calibration.words must have either seed or seeds. Got text, samples, length, seed, seeds instead.",
    ),
    "no seed": (
        study(calibration={"words": dict(text="train", samples=4, length=16)}),
        "config: calibration.words must have either seed or seeds. Got text, samples, length instead.",
    ),
    "a seed twice": (
        study(calibration={"words": dict(text="train", samples=4, length=16, seeds=[1, 1])}),
        "config: calibration.words.seeds must have no entry twice. Got [1, 1] instead.",
    ),
    "model key": (edited("models/tiny/dtyp", "float32"), "models.tiny has no key 'dtyp'; its keys are path, gguf"),
    "text key": (edited("texts/test/colum", "a"), "texts.test has no key 'colum'; its keys are path"),
    "calibration key": (
        edited("calibration/words/n", 1),
        "calibration.words has no key 'n'; its keys are text, samples",
    ),
    "evaluation key": (edited("evaluation/words/seed", 1), "evaluation.words has no key 'seed'; its keys are text"),
    "target key": (edited("targets/0/sparsty", 1), "targets.0 has no key 'sparsty'; its keys are sparsity, pattern"),
    "own target key": (
        study(methods={"wanda": {"targets": [{"sparsty": 0.5}]}}),
        "methods.wanda.targets.0 has no key 'sparsty'; its keys are sparsity, pattern",
    ),
    "method": (study(methods={"wander": None}), "methods.wander: the method must be one of admm, "),
    "named method": (study(methods={"a": {"method": "wander"}}), OWN_FILE),
    "methods": (study(methods={"a": {"method": ["wanda", "magnitude"]}}), "methods.a.method must be a text"),
    "parameter": (
        study(methods={"sparsegpt": {"dampening": 1}}),
        "sparsegpt has no parameter 'dampening'; its parameters are: blocksize, damping, convention.",
    ),
    "no parameters": (study(methods={"wanda": {"a": 1}}), "wanda has no parameter 'a'; its parameters are: none."),
    "choice": (
        study(methods={"magnitude": {"convention": "offical"}}),
        "convention must be one of exact, official. Got 'offical' instead",
    ),
    "sweep": (
        study(methods={"sparsegpt": {"damping": []}}),
        "a sweep must have at least one value. Got none for damping instead.",
    ),
    "value of a sweep": (study(methods={"sparsegpt": {"damping": [1, -1]}}), "methods.sparsegpt: sparsegpt's damping"),
    "infinite": (
        study(methods={"sparsegpt": {"damping": math.inf}}),
        "config: methods.sparsegpt.damping is wrong: inf is not finite.",
    ),
    "number as text": (edited("targets/0/sparsity", "5e-1"), "targets.0.sparsity must be a number. Got '5e-1' instead"),
    "advice": (edited("targets/0/sparsity", "5e-1"), "YAML reads 5e-1 as text: write 0.5."),
    "integer as text": (
        edited("seed", "1e3"),
        "seed must be a whole number. Got '1e3' instead; YAML reads 1e3 as text",
    ),
    "parameter as text": (
        study(methods={"sparsegpt": {"damping": "1e-3"}}),
        "methods.sparsegpt: sparsegpt's damping must be a number. Got '1e-3' instead",
    ),
    "boolean": (edited("targets/0/sparsity", True), "targets.0.sparsity must be a number. Got True instead."),
    "not a number": (edited("targets/0/sparsity", math.nan), "config: targets.0.sparsity is wrong: nan is not finite."),
    "all pruned": (edited("targets/0/sparsity", 1.0), "targets.0.sparsity must be below 1. Got 1.0 instead"),
    "pattern": (
        edited("targets/0/pattern", "2-4"),
        "targets.0 is wrong: Target.pattern must be 'row', 'layer', 'n:m' or '1xb'. Got '2-4' instead.",
    ),
    "pattern as number": (edited("targets/1/pattern", yaml.safe_load("2:4")), "reads 2:4 without quotes as a number"),
    "n:m": (edited("targets/1/pattern", "4:2"), "targets.1 is wrong: Target.pattern n:m must keep n of m, n < m."),
    "own pattern": (
        study(methods={"wanda": {"targets": [{"pattern": "4:2"}]}}),
        "methods.wanda.targets.0 is wrong: Target.pattern n:m",
    ),
    "own targets": (
        study(methods={"wanda": {"targets": "2:4"}}),
        "methods.wanda.targets must be a list. Got '2:4' instead",
    ),
    "grid": (
        edited("targets/0/group", 8),
        "targets.0 is wrong: Target.bits must be given with Target.group or Target.symmetric",
    ),
    "bits": (edited("targets/0/bits", 1), "targets.0.bits must be at least 2. Got 1 instead."),
    "more bits": (edited("targets/0/bits", 9), "targets.0.bits must be at most 8. Got 9 instead."),
    "bits in between": (
        edited("targets/0/bits", 3.5),
        "targets.0.bits must be a whole number or a text. Got 3.5 instead.",
    ),
    "group": (
        edited("targets/0", {"bits": 4, "group": 0}),
        "targets.0.group must be at least 1. Got 0 instead.",
    ),
    "chain with a method": (
        study(methods={"a": {"method": "rtn", "chain": ["wanda", "rtn"]}}, targets=JOINT),
        "methods.a: method must be left out, because chain already names it. Got rtn instead.",
    ),
    "chain with a parameter": (
        study(methods={"a": {"chain": ["wanda", "rtn"], "mse": True}}, targets=JOINT),
        "methods.a: chain has no parameter 'mse'; its parameters are: chain.",
    ),
    "chain of one": (
        study(methods={"a": {"chain": ["rtn"]}}),
        "methods.a: chain's chain must have at least 2 entries. Got [{'rtn': {'mse': False}}] instead.",
    ),
    "chain of three": (
        study(methods={"a": {"chain": ["ria", "ria", "rtn"]}}),
        "chain must have at most 2 entries. Got [",
    ),
    "chain that is a name": (
        study(methods={"a": {"chain": "wanda"}}),
        "methods.a: chain's chain must be a list. Got 'wanda' instead.",
    ),
    "unknown method in a chain": (
        study(methods={"a": {"chain": ["wander", "rtn"]}}),
        "methods.a.chain.0: the method must be one of admm, ",
    ),
    "number in a chain": (
        study(methods={"a": {"chain": ["wanda", 4]}}),
        "methods.a.chain.1 must be a method's name or {name: {parameters}}. Got 4 instead.",
    ),
    "sweep in a chain": (
        study(methods={"a": {"chain": [{"sparsegpt": {"damping": [0.1, 1]}}, "rtn"]}}),
        "methods.a.chain.0: sparsegpt's damping must be a number. Got [0.1, 1] instead.",
    ),
    "chain that loses its grid": (
        study(methods={"a": {"chain": ["rtn", "sparsegpt"]}}, targets=JOINT),
        "methods.a: chain supports none of the targets (sparsegpt changes the weights that rtn has quantised).",
    ),
    "chain whose second does both": (
        study(methods={"a": {"chain": ["gptq", "awp"]}}, targets=JOINT),
        "methods.a: chain supports none of the targets (awp changes the weights that gptq has quantised).",
    ),
    "chain without methods": (
        study(methods={"a": {"method": "chain"}}, targets=JOINT),
        "methods.a: chain needs its parameter chain, which has no default in a config.",
    ),
    "chain that does not quantise": (
        study(methods={"a": {"chain": ["wanda", "sparsegpt"]}}, targets=JOINT),
        "methods.a: chain supports none of the targets (none of its methods quantises: wanda does not quantise, ",
    ),
    "empty target": (edited("targets/0", {}), "config: targets.0 must have at least 1 entry. Got {} instead."),
    "no targets": (study(targets=[]), "config: targets must have at least 1 entry. Got [] instead."),
    "mode": (study(modes=["parallel"]), "modes.0 must be one of shared, sequential. Got 'parallel' instead."),
    "unreached": (
        study(methods={"wanda": None}, targets=[{"sparsity": 0.5}, {"bits": 4}]),
        "targets: no method of the study supports 4b (wanda: wanda does not quantise).",
    ),
    "unreaching": (
        study(methods={"magnitude": None, "rtn": None}),
        "methods.rtn: rtn supports none of the targets (rtn does not prune).",
    ),
    "no stage": (study(methods={"wanda": {"tune": {}}}), "wanda.tune must have at least 1 entry. Got {} instead."),
    "stage": (
        study(methods={"wanda": {"tune": {"block": {}}}}),
        "methods.wanda.tune has no key 'block'; its keys are blocks, end.",
    ),
    "setting of a stage": (
        study(methods={"wanda": {"tune": {"blocks": {"lr": 1}}}}),
        "methods.wanda.tune.blocks has no key 'lr'; its keys are epochs, batch, weights, grid.",
    ),
    "weights in the end": (
        study(methods={"wanda": {"tune": {"end": {"weights": 1}}}}),
        "methods.wanda.tune.end has no key 'weights'; its keys are epochs, batch, grid.",
    ),
    "no epoch": (
        study(methods={"wanda": {"tune": {"blocks": {"epochs": 0}}}}),
        "methods.wanda.tune.blocks.epochs must be at least 1. Got 0 instead.",
    ),
    "rate as text": (
        study(methods={"wanda": {"tune": {"blocks": {"weights": "1e-3"}}}}),
        "methods.wanda.tune.blocks.weights must be a number. Got '1e-3' instead; YAML reads 1e-3 as text",
    ),
    "rate that is no number": (
        study(methods={"wanda": {"tune": {"blocks": {"weights": math.nan}}}}),
        "config: methods.wanda.tune.blocks.weights is wrong: nan is not finite.",
    ),
    "end without bits": (
        study(methods={"wanda": {"tune": {"end": {}}}}),
        "methods.wanda: wanda supports none of the targets (tune.end trains scales and zeros, which do not exist",
    ),
    "tuned control": (
        study(methods={"dense": {"tune": {"blocks": {}}}, "wanda": None}),
        "methods.dense: dense changes nothing, so there is nothing to tune.",
    ),
    "text": (edited("calibration/words/text", "a"), "calibration.words.text names 'a'; the texts are train, test."),
    "evaluated text": (edited("evaluation/words/text", "a"), "evaluation.words.text names 'a'; the texts are train"),
    "seed": (
        study(calibration={"words": {"text": "train", "samples": 4, "length": 16}}),
        "calibration.words must have either seed or seeds. Got text, samples, length instead.",
    ),
    "samples": (edited("calibration/words/samples", 0), "samples must be at least 1. Got 0 instead."),
    "two sources": (
        edited("models/tiny/hub", "a/b"),
        "models.tiny must have either path or hub+revision or gguf or gguf+wheel+sha256. Got path, hub instead.",
    ),
    "no source": (
        edited("models/tiny", {}),
        "models.tiny must have either path or hub+revision or gguf or gguf+wheel+sha256. Got nothing instead.",
    ),
    "revision": (
        edited("models/tiny", {"hub": "a/b"}),
        "must have either path or hub+revision or gguf or gguf+wheel+sha256. Got hub instead.",
    ),
    "text revision": (
        edited("texts/test", {"hub": "a/b", "files": ["a.txt"]}),
        "texts.test must have either path or hub+revision+files. Got hub, files instead.",
    ),
    "shell": (
        study(models={"a b; touch x": {"path": "a"}}),
        "config: models: the name 'a b; touch x' is wrong; names are letters",
    ),
    "line": (
        study(models={"a\n": {"path": "a"}}),
        r"config: models: the name 'a\n' is wrong; names are letters",
    ),
    "folder": (study(models={"../a": {"path": "a"}}), "config: models: the name '../a' is wrong; names are"),
    "label": (study(methods={"a/b": {"method": "wanda"}}), "config: methods: the name 'a/b' is wrong; names are"),
    "number as name": (study(models={1: {"path": "a"}}), "config: models: the name 1 is wrong; names are"),
    "method folder": (study(method_paths=["absent"]), "method_paths must be folders. Got 'absent' instead."),
}


@pytest.mark.parametrize("kind", WRONG)
def test_bad_input_is_one_sentence(kind):
    config, sentence = WRONG[kind]
    assert sentence in refused(config)


WARM_STARTS = {
    "unknown": ("wander", "warm.warm_start: the method must be one of admm, "),
    "parameter": ({"sparsegpt": {"a": 1}}, "warm.warm_start: sparsegpt has no parameter 'a'"),
    "two": ({"wanda": None, "magnitude": None}, "must be a method's name or {name: {parameters}}"),
    "itself": ("warm", None),
}


@pytest.mark.parametrize("kind", WARM_STARTS)
def test_bad_warm_start_is_one_sentence(warm, kind):
    value, sentence = WARM_STARTS[kind]
    config = study(methods={"warm": {"warm_start": value}}, method_paths=[warm])
    if sentence:
        assert sentence in refused(config)
    else:  # from itself with its defaults, which start from another method
        assert list(json.loads(plan(config).cells[0].columns["params"])["warm_start"]) == ["warm"]


# ------------------------------------------------------------------------------------------------ what is on the disk


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """The model and texts of the small study, in the working directory, as far as they are looked at."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("words")
    return tmp_path


def no_folder(folder: Path) -> None:
    (folder / "tiny").rename(folder / "moved")


def one_shard(folder: Path) -> None:
    (folder / "tiny/model.safetensors").rename(folder / "tiny/model-00001-of-00002.safetensors")
    shards = {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}
    (folder / "tiny/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def only_pickles(folder: Path) -> None:
    (folder / "tiny/model.safetensors").rename(folder / "tiny/pytorch_model.bin")


def cut_off(folder: Path) -> None:
    path = folder / "tiny/model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


def short_model(folder: Path) -> None:
    (folder / "tiny/config.json").write_text('{"max_position_embeddings": 8}')


def no_text(folder: Path) -> None:
    (folder / "test.txt").unlink()


ABSENT = {
    "folder": (no_folder, "The folder tiny of the model 'tiny' does not exist."),
    "shard": (one_shard, "names files that do not exist: model-00002-of-00002.safetensors."),
    "safetensors": (only_pickles, "only safetensors is read"),
    "bytes": (cut_off, "tiny/model.safetensors is cut off"),
    "length": (
        short_model,
        "calibration.words: its length must be at most 8 tokens for the model 'tiny'. Got 16 instead.",
    ),
    "text": (no_text, "The file test.txt of the text 'test' does not exist."),
}


# What config.json says of a model -> a group that divides the inputs of all its layers, and one that does not of one.
WIDE = {
    "width": ({"hidden_size": 32}, 16, 24, 32),
    "mlp": ({"hidden_size": 32, "intermediate_size": 88}, 8, 16, 88),
    "attention": ({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 24}, 32, 64, 96),
    "text": ({"text_config": {"hidden_size": 48}, "hidden_size": 32}, 16, 32, 48),
    "gpt2": ({"n_embd": 24, "n_inner": None}, 12, 16, 24),
    "larger than a row": ({"hidden_size": 32}, 32, 128, 32),
}


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("own", [False, True])
def test_a_group_that_does_not_divide_is_one_sentence_before_any_job(sources, kind, own):
    config, divides, group, inputs = WIDE[kind]
    (sources / "tiny/config.json").write_text(json.dumps(config))

    def asking(group: int) -> dict:
        asked = [{"bits": 4, "group": group}]
        if own:
            return study(methods={"rtn": None, "a": {"method": "rtn", "targets": asked}}, targets=[{"bits": 4}])
        return study(methods={"rtn": None}, targets=asked)

    plan(asking(divides), check_sources=True)
    with pytest.raises(InputError) as error:
        plan(asking(group), check_sources=True)
    told = (
        f"targets: a group must divide the inputs of every layer. Got groups of {group} instead, and layers "
        f"of {inputs} inputs in the model 'tiny'."
    )
    assert str(error.value) == told


def test_the_cross_gram_of_experts_is_refused_before_a_job(sources):
    header = b'{"model.layers.0.mlp.experts.0.down_proj.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    (sources / "tiny/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    (sources / "tiny/config.json").write_text(json.dumps({"num_experts": 4, "num_experts_per_tok": 2}))

    def asking(**entry: Any) -> dict:
        return study(methods={"rtn": None, "mine": entry}, targets=[{"bits": 4}], modes=["shared", "sequential"])

    told = (
        "methods.mine: gptaq must have a model without experts in sequential mode: it needs the cross-Gram of the same "
        "tokens in the dense and in the compressed model, which may route different tokens to an expert. Got 'tiny' "
        "instead: give the method modes: [shared]."
    )
    assert refused(asking(method="gptaq"), check_sources=True) == told
    plan(asking(method="gptaq"))  # which no source has told
    plan(asking(method="gptaq", modes=["shared"]), check_sources=True)
    plan(asking(method="gptq"), check_sources=True)
    plan(asking(method="foem"), check_sources=True)  # alpha 0
    assert "foem must have a model without experts" in refused(asking(method="foem", alpha=0.25), check_sources=True)
    chained = {"chain": ["wanda", "qronos"], "targets": [{"sparsity": 0.5, "bits": 4}]}
    assert "chain must have a model without experts" in refused(asking(**chained), check_sources=True)
    assert refused(asking(method="gptq") | {"asymmetric": True}, check_sources=True) == (
        "config: asymmetric must be false for a model with experts: the dense and the compressed model may route "
        "different tokens to an expert. Got true for 'tiny' instead."
    )
    (sources / "tiny/config.json").write_text("{}")  # as far as it says, all tokens pass all experts
    plan(asking(method="gptaq"), check_sources=True)


def test_methods_that_compensate_for_drift_are_warned_about_in_shared_mode():
    methods = {
        "gptq": None,
        "gptaq": None,
        "none": {"method": "gptaq", "alpha": 0},
        "turned": {"method": "rotated", "under": "qronos"},
    }
    asked = {"methods": methods, "targets": [{"bits": 4}, {"bits": 3}]}
    sentences = plan(study(**asked, modes=["shared", "sequential"])).warnings()
    assert [text.partition(":")[0] for text in sentences] == ["methods.gptaq", "methods.turned"]
    assert sentences[0] == (
        "methods.gptaq: in shared mode the inputs have not drifted, so what compensates for their drift does nothing: "
        "gptaq and qronos are gptq there."
    )
    assert not plan(study(**asked, modes=["sequential"])).warnings()


def test_parameters_that_act_at_no_target_of_their_entry_are_warned_about():
    targets = [{"bits": 3}, {"sparsity": 0.5}]
    methods = {
        "a": {"method": "awp", "warm_start": "ria", "acceleration": "momentum"},  # both act at 50% row
        "b": {"method": "awp", "warm_start": "ria", "targets": targets[:1]},
        "c": {"method": "awp", "iterate": ["rounded", "accumulated"], "targets": [*targets[1:], {"pattern": "2:4"}]},
        "d": {"method": "code_swaps", "start": {"awp": {"acceleration": "momentum"}}},  # does not reach 50% row
    }
    assert plan(study(methods=methods, targets=targets)).warnings() == [
        "methods.b: awp's warm_start acts only at targets that prune, so it does nothing at 3b.",
        "methods.c.iterate_accumulated: awp's iterate acts only at targets with bits, so it does nothing at 50% row, "
        "2:4.",
        "methods.d: awp's acceleration acts only at targets that prune and have no bits, so it does nothing at 3b.",
    ]


def test_asymmetric_asks_for_the_dense_inputs_where_the_method_does_not():
    methods = {"dense": None, "gptq": None, "gptaq": None}
    asked = {"methods": methods, "targets": [{"bits": 4}], "modes": ["sequential", "shared"]}
    alone, scored = (plan(study(**asked, asymmetric=value)) for value in (False, True))
    changed = [cell.columns | {"cell": None} for cell in scored.cells if cell.folder not in alone.by_folder]
    assert [(own["label"], own["mode"]) for own in changed] == [("gptq", "sequential")]
    assert [cell.spec.get("asymmetric") for cell in scored.cells] == [
        True if (cell.columns["label"], cell.mode) == ("gptq", "sequential") else None for cell in scored.cells
    ]
    assert not any("asymmetric" in cell.spec for cell in alone.cells)


def with_tensors(folder: Path, **shapes: list[int]) -> None:
    """Give the small study's model these tensors in its one block, a __ being a point."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        key = f"model.layers.0.{name.replace('__', '.')}"
        entries[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    (folder / "tiny/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))


@pytest.mark.parametrize("target", [{"rank": 0.15}, {"sparsity": 0.5, "rank": 0.15}])
def test_a_rank_of_zero_is_refused_before_a_job(sources, target):
    """15% of [8, 6] are .51 columns and rows, of [8, 8] .6, of [24, 16] 1.4."""
    method = "oats" if "sparsity" in target else "svd_llm"
    asked = study(methods={method: None}, targets=[target])
    with_tensors(sources, up_proj__weight=[24, 16], down_proj__weight=[16, 24], A_log=[8, 6], norm__weight=[16])
    plan(asked, check_sources=True)
    with_tensors(sources, up_proj__weight=[24, 16], o_proj__weight=[8, 6])
    label = "50% row rank 15%" if "sparsity" in target else "rank 15%"
    told = (
        f"targets: The rank of {label} must be at least 1 in every layer. Got 0 in a layer of the model 'tiny' [8, 6]"
    )
    assert refused(asked, check_sources=True) == f"{told} instead."
    plan(study(methods={method: None}, targets=[target | {"rank": 0.3}]), check_sources=True)  # 1.03
    plan(asked)  # which no source has told


@pytest.mark.parametrize("entry", [{"method": "rotated"}, {"method": "turboquant"}])
def test_a_rotation_of_an_odd_number_of_inputs_is_refused_before_a_job(sources, entry):
    asked = study(methods={"mine": entry}, targets=[{"bits": 4}])
    with_tensors(sources, up_proj__weight=[24, 16], down_proj__weight=[16, 24], odd__weight=[33])
    plan(asked, check_sources=True)
    with_tensors(sources, up_proj__weight=[25, 16], down_proj__weight=[16, 25])
    assert refused(asked, check_sources=True) == (
        f"methods.mine: {entry['method']} must have layers with an even number of inputs: with an odd one it only "
        "changes signs. Got 25 inputs in a layer of the model 'tiny' instead."
    )
    plan(study(methods={"gptq": None}, targets=[{"bits": 4}]), check_sources=True)
    plan(asked)  # which no source has told


def test_sources_are_looked_at_only_when_asked(sources):
    plan(study(), check_sources=True)
    no_folder(sources)
    no_text(sources)
    plan(study())


@pytest.mark.parametrize("kind", ABSENT)
def test_absent_sources_are_one_sentence(sources, kind):
    spoil, sentence = ABSENT[kind]
    spoil(sources)
    with pytest.raises(InputError) as error:
        plan(study(), check_sources=True)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_text_that_nothing_uses_may_be_absent(sources):
    plan(edited("texts/spare", {"path": "absent.txt"}), check_sources=True)


def test_a_hub_name_without_network_is_one_sentence(sources, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(sources / "cache"))
    hub = {"hub": "organisation/name", "revision": "0123abc"}
    sentence = refused(edited("models/tiny", hub), check_sources=True)
    assert "organisation/name at 0123abc" in sentence and "HF_HUB_OFFLINE forbids fetching" in sentence
    sentence = refused(edited("texts/test", {**hub, "files": ["a.txt"]}), check_sources=True)
    assert "(a.txt of organisation/name at 0123abc)" in sentence


def test_cells_of_the_shipped_study_keep_their_paths_and_specs():
    """Results that exist are found by these names: a typed spec serialises to the JSON that an untyped one had."""
    planned = plan(config_file.read(ROOT / "config/baselines.yaml"))
    paths = "\n".join(cell.folder for cell in planned.cells)
    specs = "\n".join(f"{cell.folder} {cell.params} {cell.certificate}" for cell in planned.cells)
    assert len(planned.cells) == 53
    assert planned.cells[0].folder == "results/cells/demo-e0075f4f/docstrings-635aaf1d/shared/dense-d2776660"
    assert hashlib.sha256(paths.encode()).hexdigest()[:16] == "c9de3b05f1b58b21"
    # All that a cell of equal levels has more since budgets can be spread are the columns that say so.
    for column in ('"allocation":"uniform",', '"allocation_params":"{}",', '"allocator":"uniform",'):
        assert specs.count(column) == len(planned.cells)
        specs = specs.replace(column, "")
    assert hashlib.sha256(specs.encode()).hexdigest()[:16] == "2fadce6d2e9fa01b"


def test_a_method_s_entry_says_what_its_cells_are_named_after():
    entry = MethodEntry("mine", "wanda", {"a": 1}, {}, None)
    assert entry.settings() == {"label": "mine", "method": "wanda", "params": {"a": 1}}
    tuned = MethodEntry("mine", "wanda", {}, {"end": {"epochs": 2}}, [])
    assert tuned.settings()["tune"] == {"end": {"epochs": 2}}
