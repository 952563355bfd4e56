"""Configs made at random from the schema and the methods' cards, valid ones and spoilt ones.

    python -m tests.support.fuzz_configs --examples 10000

A valid one must expand into cells whose promises `holds` lists; a spoilt one must too, or be refused in one sentence.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import yaml
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

import layerwise.contract.catalogue as catalogue_module
from layerwise.contract.allocator_card import TRIED
from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.target import Target
from layerwise.runtime.errors import InputError
from layerwise.study.allocation_entries import UNIFORM
from layerwise.study.config_validation import SCHEMA
from layerwise.study.grid import Plan, plan
from layerwise.study.method_entries import RESERVED
from layerwise.study.plan_checks import SWEPT
from tests.support.typing_helpers import some

LONGEST_SENTENCE = 600
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
EVERY_CHECK = cast(list[HealthCheck], list(HealthCheck))  # whose members have another type in its annotations

CATALOGUE = Catalogue()
ALLOCATORS = Catalogue(kind=ALLOCATOR, methods=CATALOGUE)
PRUNERS = ["magnitude", "wanda", "ria", "sparsegpt"]

# -------------------------------------------------------------------------------------------------------- valid ones

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,11}", fullmatch=True)
WORDS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12
)  # whatever is in a path or a name of a data set
SEEDS = st.integers(0, 2**63 - 1)
HUB = st.sampled_from(["a/b", "meta-llama/Llama-2-7b-hf", "organisation/name"])
DTYPES = st.sampled_from(["float32", "bfloat16", "float16"])
COMPUTED = st.sampled_from(["native", "float32"])
PATTERNS = st.sampled_from(["row", "layer", "2:4", "4:8", "1:2", "3:4", "1x1", "1x16"])
INTEGER_GRIDS = st.fixed_dictionaries(
    {"bits": st.integers(2, 8)}, optional={"group": st.integers(1, 256), "symmetric": st.booleans()}
)
GRIDS = st.one_of(
    INTEGER_GRIDS, st.sampled_from([{"bits": "nvfp4"}, {"bits": "nvfp4", "group": 16}, {"bits": "mxfp4"}])
)


RANKS = st.floats(2**-14, 1, exclude_max=True, width=16)


@st.composite
def targets(draw: st.DrawFn) -> dict[str, Any]:
    pattern = draw(PATTERNS)
    share = {} if ":" in pattern else {"sparsity": draw(st.floats(2**-14, 1, exclude_max=True, width=16))}
    pruning = {"pattern": pattern, **share}
    kind = draw(st.sampled_from(["prune", "quantise", "both", "factors"]))
    grid = draw(GRIDS) if kind in ("quantise", "both") else {}
    factors = {"rank": draw(RANKS)} if kind == "factors" or draw(st.integers(0, 5)) == 0 else {}
    return {**(pruning if kind in ("prune", "both") else {}), **grid, **factors}


def parameter(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a parameter of a card takes, methods apart."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    above, below = "exclusiveMinimum" in schema, "exclusiveMaximum" in schema
    known = {
        "boolean": st.booleans(),
        "null": st.none(),
        "integer": st.integers(low if low is not None else -9, high if high is not None else 9999),
        "number": st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min=above, exclude_max=below),
        "string": WORDS,
    }
    if "array" in kinds:
        known["array"] = st.lists(parameter(schema["items"]), min_size=1, max_size=3, unique_by=json.dumps)
    if "object" in kinds:
        known["object"] = fields_of(schema)
    return st.one_of([known[kind] for kind in kinds])


def fields_of(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of a schema: with its own properties, or with any names."""
    if "properties" not in schema:
        return st.dictionaries(WORDS, parameter(schema["additionalProperties"]), max_size=2)
    own = {key: parameter(inner) for key, inner in schema["properties"].items()}
    needed = {key: own.pop(key) for key in schema.get("required", [])}
    return st.fixed_dictionaries(needed, optional=own)


@st.composite
def method_entries(draw: st.DrawFn) -> dict[str, Any]:
    """An entry of `methods`, without its targets; `method` is always said."""
    name = draw(st.sampled_from(sorted(CATALOGUE)))
    if name == "chain":
        steps = [draw(st.sampled_from(PRUNERS)), draw(st.sampled_from(["rtn", "gptq", "awq"]))]
        return {"chain": steps if draw(st.booleans()) else [steps[0], {steps[1]: None}]}
    entry: dict[str, Any] = {"method": name}
    for key, schema in CATALOGUE[name].card["parameters"].items():
        if not draw(st.booleans()):
            continue
        if schema.get("format") == "method":
            entry[key] = draw(st.sampled_from(["rtn", "gptq"] if "gives" in schema else PRUNERS))
            continue
        values = parameter(schema)
        unique = st.lists(values, min_size=1, max_size=2, unique_by=json.dumps)
        entry[key] = draw(unique if draw(st.integers(0, 5)) == 0 else values)
    if name != "dense" and draw(st.integers(0, 5)) == 0:
        entry["tune"] = draw(st.sampled_from([{"blocks": {}}, {"blocks": {"epochs": 2, "grid": 0.5}, "end": {}}]))
    return entry


@st.composite
def allocation_entries(draw: st.DrawFn) -> dict[str, Any]:
    """An entry of `allocations`; `allocator` is always said."""
    name = draw(st.sampled_from(sorted(set(ALLOCATORS) - {UNIFORM})))
    entry: dict[str, Any] = {"allocator": name}
    for key, schema in ALLOCATORS[name].card["parameters"].items():
        if draw(st.booleans()):
            method = schema.get("format") == "method"
            entry[key] = draw(st.sampled_from([*PRUNERS, "rtn"]) if method else parameter(schema))
    return entry | {key: 1 for key in TRIED if key in ALLOCATORS[name].card["parameters"]}  # which any draw has


@st.composite
def allocations(draw: st.DrawFn) -> dict[str, Any]:
    """Equal levels, which fit every target, and up to two others."""
    others = draw(st.dictionaries(NAMES.filter(lambda name: name != UNIFORM), allocation_entries(), max_size=2))
    return others | {UNIFORM: draw(st.sampled_from([None, {}, {"allocator": UNIFORM}]))}


def optional(draw: st.DrawFn, **choices: st.SearchStrategy[Any]) -> dict[str, Any]:
    return {key: draw(values) for key, values in choices.items() if draw(st.booleans())}


MODES = st.lists(st.sampled_from(["shared", "sequential"]), min_size=1, unique=True)
COMMON = [{"sparsity": 0.5}, {"bits": 4}, {"sparsity": 0.5, "bits": 4}, {"sparsity": 0.5, "pattern": "1x16"}]
COMMON += [{"sparsity": 0.5, "pattern": "1x16", "bits": 4}, {"rank": 0.3}, {"sparsity": 0.5, "rank": 0.1}]
COMMON += [{"bits": 4, "rank": 0.1}]


def reaches(entry: dict[str, Any], target: dict[str, Any]) -> bool:
    """Whether the method of an entry, with the first value of whatever it sweeps, can reach the target."""
    if "end" in entry.get("tune", {}) and "bits" not in target:
        return False
    own_grid = "method" in entry and CATALOGUE[entry["method"]].card.get("own_grid")
    if "tune" in entry and (own_grid or isinstance(target.get("bits"), str) or "rank" in target):
        return False
    name = "chain" if "chain" in entry else entry["method"]
    own = {key: value for key, value in entry.items() if key not in RESERVED}
    kinds = CATALOGUE[name].card["parameters"]
    first = {k: v[0] if isinstance(v, list) and kinds[k].get("type") != "array" else v for k, v in own.items()}
    if not CATALOGUE[name].card["patterns"]:
        return True
    return CATALOGUE.refusal(name, CATALOGUE.complete(name, first, ""), Target(**target)) is None


@st.composite
def studies(draw: st.DrawFn) -> dict[str, Any]:
    """A document that should be accepted, but for entries whose methods reach none of its targets."""
    model = st.one_of(
        st.fixed_dictionaries({"path": WORDS}, optional={"dtype": DTYPES, "trust_remote_code": st.booleans()}),
        st.fixed_dictionaries({"hub": HUB, "revision": WORDS}, optional={"dtype": DTYPES, "compute_dtype": COMPUTED}),
        st.fixed_dictionaries({"path": WORDS, "known_as": WORDS}),
        st.fixed_dictionaries({"gguf": WORDS}, optional={"known_as": WORDS, "dtype": DTYPES}),
        st.fixed_dictionaries({"gguf": WORDS, "wheel": st.just("a-b==1.0"), "sha256": st.just("0" * 64)}),
    )
    more = {"field": WORDS, "separator": WORDS, "join": WORDS, "begins": WORDS, "dataset": WORDS}
    text = st.one_of(
        st.fixed_dictionaries({"path": WORDS}, optional=more),
        st.fixed_dictionaries({"hub": HUB, "revision": WORDS, "files": st.lists(WORDS, min_size=1, max_size=2)}),
    )
    texts = draw(st.dictionaries(NAMES, text, min_size=1, max_size=2))
    asked = draw(st.lists(targets(), min_size=1, max_size=3))
    methods = cast(dict[str, Any], draw(st.dictionaries(NAMES, method_entries(), min_size=1, max_size=3)))
    for entry in methods.values():
        if not any(reaches(entry, target) for target in asked):
            able = [target for target in COMMON if reaches(entry, target)]
            if not able:  # such as one that tunes grids and makes none
                entry.clear()
                entry["method"] = "awp"
            entry["targets"] = able[:1] or COMMON[:1]
        if draw(st.booleans()):
            entry["modes"] = draw(MODES)
    shared = [entry for entry in methods.values() if "targets" not in entry]
    if not all(any(reaches(entry, target) for entry in shared) for target in asked):
        asked = [target for target in asked if "rank" not in target] or COMMON[:1]  # awp gives no factors
        for entry in shared:
            if not any(reaches(entry, target) for target in asked):
                entry["targets"] = [target for target in COMMON if reaches(entry, target)][:1]
        methods["awp"] = {"method": "awp", "targets": asked} if draw(st.booleans()) else None
    length = st.integers(2, 4096)
    drawn = {"text": st.sampled_from(sorted(texts)), "samples": st.integers(1, 256), "length": length}
    calibration = st.one_of(
        st.fixed_dictionaries({**drawn, "seed": SEEDS}, optional={"dtype": DTYPES}),
        st.fixed_dictionaries({**drawn, "seeds": st.lists(SEEDS, min_size=1, max_size=2, unique=True)}),
    )
    evaluation = st.fixed_dictionaries({"text": drawn["text"], "length": length}, optional={"samples": st.none()})
    tasks = st.fixed_dictionaries({"tasks": st.lists(st.sampled_from(["boolq", "wanda-seven"]), min_size=1)})
    return {
        "models": draw(st.dictionaries(NAMES, model, min_size=1, max_size=2)),
        "texts": texts,
        "calibration": draw(st.dictionaries(NAMES, calibration, min_size=1, max_size=2)),
        "evaluation": draw(st.dictionaries(NAMES, evaluation, min_size=1, max_size=2)),
        "targets": asked,
        "methods": methods,
        **optional(
            draw,
            study=WORDS,
            seed=SEEDS,
            keep_weights=st.booleans(),
            certificates=st.booleans(),
            asymmetric=st.booleans(),
            sweep=st.sampled_from(SWEPT),
            modes=MODES,
            tasks=st.dictionaries(NAMES, tasks, max_size=1),
            allocations=allocations(),
        ),
    }


# -------------------------------------------------------------------------------------------------------- spoilt ones

CYCLE: list[Any] = []
CYCLE.append(CYCLE)
TREE: list[Any] = []
for _ in range(30):  # a document of ten lines that represents 2 ** 30 values
    TREE = [TREE, TREE]
ODD = [
    *(None, True, False, 0, 1, -1, 2, 128, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 10**5000),
    *(0.0, -0.0, 0.5, 1.0, 4.0, 1e-320, 1e308, -1e308, 1e400, math.nan, math.inf, -math.inf),
    *("", " ", "a", "0", "nan", "1e-3", "0x10", "١", "row", "2:4", "0:4", "99999999999:999999999999", "1x0", "5:4"),
    *("\0", "a\0b", "\ud800", "line\nline", "\u2028", "\x1b[31m", "é" * 40, "😀", "../../etc/passwd", "/", "~", "."),
    *("a; touch x", "$(touch x)", "`touch x`", "{input}", "{wildcards.model}", "'", '"', "<script>", "%s", "\\"),
    *("a" * 300, "b" * 100_000, "wanda", "sparsegpt", "dense", "chain", "train", "results/text/train.txt"),
    *([], [[]], [None], [0] * 300, {}, {"a": 1}, {"": None}, {None: 1}, {1: 2}, {True: 1}, {(1, 2): 3}, {0.5: 1}),
    *({"wanda": None}, {"sparsegpt": {"damping": [1, 2]}}, {"chain": ["wanda", "rtn"]}, {"blocks": None}, {"end": 1}),
    *({"knapsack": {"levels": [0.5, 0.5]}}, {"owl": {"threshold": 0}}, {"allocator": "knapsack", "weights": {"*": -1}}),
    *(datetime.date(2026, 2, 4), datetime.datetime(2026, 2, 4, 1, 2), b"\xff", {1, 2}, (1, 2), object),
    *(CYCLE, TREE, {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}, functools.reduce(lambda x, _: [x], range(90), 0)),
]
KEYS = [
    *(
        "method",
        "targets",
        "tune",
        "chain",
        "path",
        "hub",
        "gguf",
        "wheel",
        "revision",
        "seed",
        "seeds",
        "sweep",
        "modes",
        "tasks",
        "allocator",
    ),
    *("damping", "warm_start", "iterations", "", "a b", "../x", "a\n", "\0", "\ud800", "é", "__proto__", "x" * 101),
    *("x" * 100_000, None, 1, True, 0.5, math.nan, (1,), datetime.date(2026, 2, 4), "$ref", "-", ".", "..", "CON"),
]


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from nodes(item, (*path, key))


@st.composite
def spoilt(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """A study of which up to three values are taken away, renamed, replaced, added or moved elsewhere."""
    study = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = list(nodes(study))
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        inner: Any = study
        for part in path:
            inner = inner[part]
        kind = draw(st.sampled_from(["remove", "rename", "replace", "replace", "add", "move", "wrap"]))
        value = draw(st.sampled_from(ODD) | VALUES)
        if kind == "remove":
            del inner[last]
        elif kind == "rename" and isinstance(inner, dict):
            inner[draw(st.sampled_from(KEYS))] = inner.pop(last)
        elif kind == "wrap":
            inner[last] = [inner[last]] * draw(st.integers(1, 2))
        elif kind == "move":
            inner[last] = copy.deepcopy(study.get(draw(st.sampled_from(sorted(SCHEMA["properties"])))))
        else:
            if kind != "add":
                inner[last] = value
            elif isinstance(inner, dict):
                inner[draw(st.sampled_from(KEYS))] = value
            else:
                inner.append(value)
            if isinstance(value, (list, dict)):  # CYCLE and TREE are too large to be walked by `nodes`
                break
    return study


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

FAMILY = 4  # Most of the time goes into drawing the whole one.


@st.composite
def families(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A study and others that are made of it, each spoilt in another way."""
    whole = draw(studies())
    return [whole, *(draw(spoilt(whole)) for _ in range(FAMILY - 1))]


# ------------------------------------------------------------------------------------------------------------- checks


def sentence_of(error: InputError) -> str:
    """The message, once it is made sure that it is one sentence for a person, which some file can hold."""
    told = str(error)
    assert told and told == told.strip() and told[-1] in ".!?)\"'", repr(told)
    assert told.isprintable(), repr(told)  # one line, no escape codes, no halves of characters
    assert len(told) <= LONGEST_SENTENCE, f"{len(told)} characters: {told}"
    assert not re.search(r"Traceback|\$defs|'type': |'properties'|<class|object at 0x|additionalProperties", told), told
    return told


def holds(config: Any, planned: Plan) -> None:
    """What every plan promises."""
    folders = [cell.folder for cell in planned.cells]
    assert len(set(folders)) == len(folders) == len(planned.by_folder) > 0
    for cell in planned.cells:
        root, kind, *parts = cell.folder.split("/")
        assert (root, kind) == ("results", "cells") and len(parts) == 4
        assert all(PART.fullmatch(part) and len(part) <= 255 for part in parts), parts
        assert (parts[0] in planned.models) and (parts[1] in planned.calibrations)
        columns, method, target = cell.columns, cell.spec["method"], Target(**cell.spec["target"])
        control = not planned.catalogue[method["name"]].card["patterns"]
        assert control or planned.catalogue.refusal(method["name"], method["params"], target) is None
        spread = cell.spec.get("allocation")
        assert columns["target"] == (f"{target.label} {spread['name']}" if spread else target.label)
        assert columns["allocation"] == (spread["name"] if spread else UNIFORM)
        assert cell.levels in planned.allocations if spread else cell.levels is None
        assert json.loads(cell.params) == json.loads(json.dumps(cell.spec))
        assert cell.certificate is None or cell.certificate.startswith("results/certificates/")
    for row in planned.skipped:
        assert row["reason"] and row["label"] and row["target"]
    # The same study by another road is the same plan, and one whose keys are in another order has the same cells.
    text = yaml.safe_dump(config, sort_keys=False)
    again = plan(yaml.safe_load(text))
    assert [cell.params for cell in again.cells] == [cell.params for cell in planned.cells]
    assert again.skipped == planned.skipped and [cell.folder for cell in again.cells] == folders
    filled = plan(json.loads(json.dumps(planned.config)))  # as scripts are handed it
    assert [cell.folder for cell in filled.cells] == folders
    turned = plan(json.loads(json.dumps(config, sort_keys=True)))
    assert ordered(turned) == ordered(planned)


def ordered(planned: Plan) -> list[str]:
    """Folders of the cells, but for those that go by the order of keys: a control that changes nothing is at the
    first calibration and mode, and a sweep of two parameters is named in their order."""
    controls = {name for name, entry in planned.catalogue.items() if not entry.card["patterns"]}
    return sorted(
        cell.folder
        for cell in planned.cells
        if cell.columns["method"] not in controls and cell.columns["label"] in planned.config["methods"]
    )


def try_config(config: Any) -> str | None:
    """The sentence that a document is refused with; None for one that is accepted and then holds its promises."""
    try:
        planned = plan(config)
        found = None
    except InputError as error:
        planned, found = None, sentence_of(error)
    if planned is not None:
        holds(config, planned)
    return found


class Quicker:
    """Within it files of methods are read once for all plans, which then take milliseconds instead of a tenth."""

    def __enter__(self) -> None:
        self.own = catalogue_module.read_entry
        catalogue_module.read_entry = functools.cache(self.own)

    def __exit__(self, *_: object) -> None:
        catalogue_module.read_entry = self.own


def fuzz(examples: int, start: int = 0) -> Counter[str]:
    """Try so many documents, one of FAMILY of them whole; "whole accepted", "spoilt refused" ... -> how many."""
    found: Counter[str] = Counter()
    quiet = settings(
        max_examples=-(-examples // FAMILY),
        deadline=None,
        database=None,
        suppress_health_check=EVERY_CHECK,
        phases=[Phase.generate, Phase.shrink],
    )

    @seed(start)
    @quiet
    @given(families())
    def one(family: list[Any]) -> None:
        for number, config in enumerate(family):
            note(f"Document {number}:")
            told = try_config(config)
            found[f"{'spoilt' if number else 'whole'} {'refused' if told else 'accepted'}"] += 1

    with Quicker():
        one()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=some(__doc__).splitlines()[0])
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    found = fuzz(args.examples, args.seed)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    print(f"{found.total()} configs without a traceback: {told}; {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
