"""The catalogue: cards read without torch, one sentence for whatever is wrong, warm starts that compose."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from layerwise.checks import layer_cases as layers
from layerwise.checks import promises
from layerwise.compression.resolve import needs as needed
from layerwise.contract.cards import PARAMETERS, merged
from layerwise.contract.catalogue import Catalogue
from layerwise.contract.import_closure import METHODS
from layerwise.contract.layer import Target
from layerwise.contract.method_file import SHARED_SOURCES, CatalogueError, read_entry
from layerwise.runtime.project import PACKAGE
from tests.support.paths import ROOT

NAMES = list(Catalogue())

GOOD = '''"""A method."""
from dataclasses import dataclass

from layerwise.contract.layer import Compressed, Method

CARD = {
    "title": "Mine",
    "patterns": ["row"],
    "bits": [],
    "updates_weights": False,
    "needs": [],
    "parameters": {"share": {"type": "number", "minimum": 0}},
}


@dataclass(frozen=True)
class Mine(Method):
    share: float = 0.5

    def solve(self, layer, target, rng):
        return Compressed(self.share * layer.weight)
'''
POLISH = '''"""Starts from another method's mask and puts the dense weights back where it kept any."""
from dataclasses import dataclass, replace

import torch

from layerwise.contract.layer import Compressed, Method

CARD = {
    "title": "Polish",
    "patterns": ["row", "n:m"],
    "bits": [],
    "updates_weights": True,
    "needs": [],
    "parameters": {"warm_start": {"format": "method"}, "rounds": {"type": "integer"}},
}


@dataclass(frozen=True)
class Polish(Method):
    warm_start: str = "magnitude"
    rounds: int = 1

    def solve(self, layer, target, rng):
        start = self.warm_start.compress(layer, target, rng)
        if start.mask is None:
            return start
        return replace(start, weight=torch.where(start.mask, layer.weight, 0.0))
'''
FIRST = '''"""Keeps the first inputs."""
from dataclasses import dataclass

import torch

from layerwise.numerics import ops
from layerwise.contract.layer import Method

CARD = {
    "title": "First",
    "patterns": ["row"],
    "bits": [],
    "updates_weights": False,
    "needs": [],
    "parameters": {},
}


@dataclass(frozen=True)
class First(Method):
    def solve(self, layer, target, rng):
        return ops.pruned(layer, -torch.arange(layer.weight.shape[1]).expand_as(layer.weight).float(), target)
'''


def edited(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "polish.py").write_text(POLISH)
    (tmp_path / "first.py").write_text(FIRST)
    return tmp_path


def test_reading_the_cards_imports_no_torch():
    code = (
        "import sys; import layerwise.contract.catalogue, layerwise.contract.target, layerwise.sources.hub\n"
        "assert len(layerwise.contract.catalogue.Catalogue()) >= 6\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_defaults_obey_their_schema(name: str):
    catalogue = Catalogue()
    entry = catalogue[name]
    complete = catalogue.complete(name, {}, "test")
    assert list(complete) == list(entry.card["parameters"])
    for key, schema in entry.card["parameters"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "description" in schema, f"{name}'s {key} has no description"
        if key not in entry.warm_starts + entry.chains:
            jsonschema.validate(entry.defaults[key], schema)
            assert complete[key] == entry.defaults[key]


def test_a_card_takes_a_shared_schema_and_may_change_it():
    damping = merged({"$ref": "damping"})
    assert damping == PARAMETERS["damping"] == Catalogue()["sparsegpt"].card["parameters"]["damping"]
    changed = merged({"$ref": "damping", "minimum": 1, "description": "More."})
    assert changed == damping | {"minimum": 1, "description": "More."}


@pytest.mark.parametrize("name", NAMES)
def test_the_class_is_what_the_card_says(name: str):
    catalogue = Catalogue()
    entry = catalogue[name]
    method = catalogue.build(name, catalogue.complete(name, {}, "test"))
    assert type(method).__name__ == entry.class_name
    for key, value in entry.defaults.items():
        if key not in entry.warm_starts + entry.chains:
            assert getattr(method, key) == value
            with pytest.raises(AttributeError):  # frozen
                setattr(method, key, value)
    own = name in ("reconstruct", "chain", "rotated", "code_swaps", "svd")
    assert entry.control or own or "paper" in entry.card  # RIA has no arXiv id


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_short(name: str):
    """What its checks take apart, which is no part of the method."""
    text = Catalogue()[name].path.read_text("utf-8")
    card = next(node.value for node in ast.parse(text).body if isinstance(node, ast.Assign))
    assert isinstance(card, ast.Dict)
    values = {ast.literal_eval(key): value for key, value in zip(card.keys, card.values, strict=True) if key}
    checks = values.get("checks")
    taken = (checks.end_lineno or 0) - checks.lineno + 1 if checks else 0
    assert len(text.splitlines()) - taken <= 120


def test_the_contract_is_short():
    assert len((PACKAGE / "contract/layer.py").read_text().splitlines()) <= 200


def test_a_file_without_a_card_is_no_method():
    assert read_entry(PACKAGE / "numerics/ops.py") is None
    assert not {"layer", "ops", "verify", "target", "catalogue"} & set(NAMES)


WRONG_FILES = {
    "syntax error": (edited("class Mine(Method):", "class Mine(Method:"), "is not valid Python"),
    "CARD not literal": (edited('"title": "Mine"', '"title": str(1)'), "CARD must be a literal"),
    "CARD unpacks": (edited('"title": "Mine"', "**{}, 'title': 'Mine'"), "CARD must be a literal"),
    "CARD with a list as key": (edited('"title": "Mine"', '[1]: "Mine"'), "CARD must be a literal"),
    "CARD no dict": (GOOD.replace("CARD = {", "CARD = 3\n_ = {"), r"CARD must be a mapping\. Got 3 instead\."),
    "no UTF-8": (b"x = '\xe9'", r"mine\.py is not text in UTF-8: byte 5 cannot be decoded\."),
    "CARD lacks a key": (edited('    "needs": [],\n', ""), r"CARD must have the key needs\. Got title, .* instead\."),
    "CARD with an unknown key": (edited('"needs": []', '"needs": [], "speed": 1'), "CARD has no key 'speed'; its keys"),
    "unknown pattern": (edited('["row"]', '["rows"]'), r"CARD\['patterns'\]\[0\] must be one of dense, .* Got 'rows'"),
    "unknown bits": (edited('"bits": []', '"bits": [1]'), r"CARD\['bits'\]\[0\] must be at least 2\. Got 1 instead"),
    "unknown statistic": (edited('"needs": []', '"needs": ["hessian"]'), r"CARD\['needs'\]\[0\] must be one of gram, "),
    "no arXiv id": (edited('"needs": []', '"needs": [], "arxiv": "23"'), r"CARD\['arxiv'\] is wrong"),
    "a parameter's schema of an unknown type": (edited('"type": "number"', '"type": "numbre"'), "share.* is wrong"),
    "a parameter's schema with a wrong limit": (
        edited('"minimum": 0', '"minimum": "0"'),
        r"'minimum'\] must be a number",
    ),
    "a parameter without a field": (edited("    share: float = 0.5\n\n", ""), "must be the same. Got .*share.* and "),
    "a field without a parameter": (edited("0.5\n", "0.5\n    more: int = 1\n"), "must be the same. Got .* and .*more"),
    "a field without a default": (edited(" = 0.5", ""), "the field share of Mine needs a literal default"),
    "a default that is not literal": (edited("= 0.5", "= 1 / 2"), "the default of Mine.share must be a literal"),
    "a shared schema that is not there": (
        edited('{"type": "number", "minimum": 0}', '{"$ref": "dampening"}'),
        r"CARD\['parameters'\]\['share'\] is wrong: \$ref must be one of damping, .* Got 'dampening' instead",
    ),
    "acts at unknown targets": (
        edited('"minimum": 0', '"minimum": 0, "acts": {"0.5": "bits"}'),
        r"\['share'\]\['acts'\] must be one of pruning, grid, pruning alone, layer. Got 'bits' instead",
    ),
    "a cost without products": (
        edited('"needs": []', '"needs": [], "cost": {"weights": 1, "grams": 1}'),
        r"CARD\['cost'\] must have the key products\. Got weights, grams instead\.",
    ),
    "a colour without a number": (
        edited('"needs": []', '"needs": [], "look": {"colour": "red", "marker": "o"}'),
        r"CARD\['look'\]\['colour'\] is wrong",
    ),
    "named by what it has not": (
        edited('"needs": []', '"needs": [], "named_by": "chain"'),
        r"CARD\['named_by'\] must be a parameter. Got 'chain' instead",
    ),
    "a cost of iterations it has not": (
        edited(
            '"needs": []',
            '"needs": [], "cost": {"weights": 1, "grams": 1, "products": 1, "products_per": {"steps": 1}}',
        ),
        r"CARD\['cost'\]\['products_per'\] must name parameters. Got 'steps' instead",
    ),
    "a cost of a text": (
        edited(
            '"needs": []',
            '"needs": [], "cost": {"weights": 1, "grams": 1, "products": 1, "products_per": {"share": 1}}',
        ).replace("share: float = 0.5", 'share: str = "half"'),
        "must name parameters whose default is a number. Got 'share' instead, whose default is 'half'",
    ),
    "a parameter that names another method": (
        GOOD.replace('"share"', '"chain"').replace("share: float", "chain: float"),
        "the parameter chain must have another name: in a config it names the method chain",
    ),
    "no class": (edited("(Method)", ""), "must define one class derived from Method. Got 0 instead"),
    "compress instead of solve": (
        edited("def solve(", "def compress("),
        r"Mine must define solve\(layer, target, rng\)\. Got compress instead, which belongs to the base class",
    ),
    "a field of the base's name": (
        edited("    share: float = 0.5", "    compress: float = 0.5"),
        "Got compress instead",
    ),
    "neither": (edited("def solve(", "def resolve("), r"Mine must define solve\(layer, target, rng\)\.$"),
    "two classes": (GOOD + "\n\nclass Other(Method):\n    pass\n", "one class derived from Method. Got 2 instead"),
    "the name of another method": (GOOD, "Two files define the method"),
    "not UTF-8": (b'"""\xff"""\n' + GOOD.encode(), "is not"),
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
def test_a_wrong_file_is_one_sentence(wrong: str, tmp_path: Path):
    text, sentence = WRONG_FILES[wrong]
    path = tmp_path / ("wanda.py" if "name of another" in wrong else "mine.py")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CatalogueError, match=sentence) as caught:
        Catalogue([tmp_path])
    assert str(path) in str(caught.value)
    assert_sentence(caught.value)


WRONG_ENTRIES = {
    "unknown method": ("wnada", {}, r"one of .*, wanda\. Got 'wnada' instead \(did you mean 'wanda'\?\)\.$"),
    "a name like no method's": ("zzzz", {}, r"here: the method must be one of .*, wanda\. Got 'zzzz' instead\.$"),
    "an allocator": ("owl", {}, "^here: owl is an allocator, not a method: a study names it under `allocations` "),
    "unknown parameter": ("sparsegpt", {"damp": 1}, "sparsegpt has no parameter 'damp'; its parameters are: .*damping"),
    "no parameters at all": ("wanda", {"alpha": 1}, "wanda has no parameter 'alpha'; its parameters are: none"),
    "out of range": ("sparsegpt", {"damping": 0}, "sparsegpt's damping must be above 0. Got 0 instead"),
    "a string": ("sparsegpt", {"damping": "1e-3"}, "sparsegpt's damping must be a number. Got '1e-3' instead"),
    "a float": ("sparsegpt", {"blocksize": 128.5}, "sparsegpt's blocksize must be a whole number. Got 128.5 instead"),
    "a truth value": ("sparsegpt", {"blocksize": True}, "blocksize must be a whole number. Got True instead"),
    "not a number": ("sparsegpt", {"damping": float("nan")}, "sparsegpt's damping is wrong: nan"),
    "infinite": ("sparsegpt", {"damping": float("inf")}, "sparsegpt's damping is wrong: inf"),
    "not among the choices": (
        "magnitude",
        {"convention": "mine"},
        "convention must be one of exact, official. Got 'mine' instead",
    ),
    "unknown warm start": (
        "polish",
        {"warm_start": "wnada"},
        r"here.warm_start: the method must be one of .* Got 'wnada' instead",
    ),
    "warm start with a wrong parameter": (
        "polish",
        {"warm_start": {"sparsegpt": {"damping": -1}}},
        "here.warm_start: sparsegpt's damping must be above 0",
    ),
    "two warm starts": ("polish", {"warm_start": {"wanda": {}, "magnitude": {}}}, "must be a method's name"),
    "empty warm start": ("polish", {"warm_start": {}}, "here.warm_start must be a method's name"),
    "a method named as in a config": (
        "polish",
        {"warm_start": {"chain": ["wanda", "rtn"]}},
        r"here.warm_start must be .* Got {'chain': \['wanda', 'rtn'\]} instead: write {chain: {chain: \[\.\.\.\]}}\.",
    ),
    "warm start is a number": ("polish", {"warm_start": 3}, "here.warm_start must be a method's name"),
    "unknown method in a chain": (
        "chain",
        {"chain": ["wnada", "rtn"]},
        r"here.chain.0: the method must be one of .* Got 'wnada' instead",
    ),
    "wrong parameter in a chain": (
        "chain",
        {"chain": ["wanda", {"rtn": {"mse": 3}}]},
        "here.chain.1: rtn's mse must be true or false. Got 3 instead",
    ),
    "sweep in a chain": (
        "chain",
        {"chain": [{"sparsegpt": {"damping": [0.01, 0.1]}}, "rtn"]},
        "here.chain.0: sparsegpt's damping must be a number",
    ),
    "number in a chain": ("chain", {"chain": ["wanda", 3]}, "here.chain.1 must be a method's name .* Got 3 instead"),
    "two methods in a step": ("chain", {"chain": ["rtn", {"ria": {}, "rtn": {}}]}, "here.chain.1 must be a method"),
    "chain of one": (
        "chain",
        {"chain": ["wanda"]},
        r"chain's chain must have at least 2 entries\. Got .*wanda.* instead",
    ),
    "chain of three": (
        "chain",
        {"chain": ["wanda", "ria", "rtn"]},
        r"chain's chain must have at most 2 entries\. Got ",
    ),
    "chain that is a name": ("chain", {"chain": "wanda"}, "chain's chain must be a list. Got 'wanda' instead"),
}


@pytest.mark.parametrize("wrong", WRONG_ENTRIES)
def test_a_wrong_entry_is_one_sentence(wrong: str, folder: Path):
    name, params, sentence = WRONG_ENTRIES[wrong]
    with pytest.raises(CatalogueError, match=sentence) as caught:
        Catalogue([folder]).complete(name, params, "here")
    assert_sentence(caught.value)


def test_a_warm_start_that_starts_from_itself_is_one_sentence(tmp_path: Path):
    (tmp_path / "polish.py").write_text(edited('"magnitude"', '"polish"', POLISH))
    with pytest.raises(CatalogueError, match="polish") as caught:
        Catalogue([tmp_path]).complete("polish", {}, "here")
    assert_sentence(caught.value)


def test_a_chain_that_holds_itself_is_one_sentence(tmp_path: Path):
    text = (METHODS / "chain.py").read_text()
    (tmp_path / "loop.py").write_text(edited('("wanda", "rtn")', '("loop", "rtn")', text))
    with pytest.raises(CatalogueError, match="loop") as caught:
        Catalogue([tmp_path]).complete("loop", {}, "here")
    assert_sentence(caught.value)


def test_whole_numbers_are_integers(folder: Path):
    """128.0 is an integer to JSON Schema but no length to range(); it must not reach a method, nor be another cell."""
    complete = Catalogue().complete("sparsegpt", {"blocksize": 128.0}, "here")
    assert isinstance(complete["blocksize"], int)
    awp = Catalogue().complete("awp", {"iterations": 3.0}, "here")  # which may also be null
    assert isinstance(awp["iterations"], int)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path):
    with pytest.raises(CatalogueError, match="method_paths must be folders. Got '.*absent' instead"):
        Catalogue([tmp_path / "absent"])


def assert_sentence(error: Exception) -> None:
    text = str(error)
    assert text.endswith(".") and "\n" not in text and "None" not in text


def test_a_dropped_file_is_a_method_and_adds_its_rows(tmp_path: Path):
    (tmp_path / "mine.py").write_text(GOOD)
    catalogue = Catalogue([tmp_path])
    assert set(catalogue) == {*NAMES, "mine"}
    method = catalogue.build("mine", catalogue.complete("mine", {"share": 0.25}, "test"))
    layer = layers.build("one output")
    torch.testing.assert_close(method.compress(layer, Target(0.5), torch.Generator()).weight, 0.25 * layer.weight)
    rows = {(name, case.target.label) for name, case in promises.rows(catalogue) if case.entry.name == "mine"}
    assert {("2 pattern", "70% row"), ("8 refused", "2:4"), ("8 refused", "4b g128"), ("7 unchanged", "dense")} <= rows


def test_each_folder_has_its_own_methods(tmp_path: Path):
    """Two catalogues in one process whose folders hold different methods of one name."""
    built = []
    for share in ("0.5", "0.75"):
        path = tmp_path / share / "mine.py"
        path.parent.mkdir()
        path.write_text(edited("share * layer", f"share * {share} * layer"))
        catalogue = Catalogue([path.parent])
        built.append(catalogue.build("mine", catalogue.complete("mine", {}, "test")))
    layer = layers.build("one output")
    first, second = (method.compress(layer, Target(0.5), torch.Generator()).weight for method in built)
    torch.testing.assert_close(second, 1.5 * first)


def test_warm_starts_are_completed(folder: Path):
    catalogue = Catalogue([folder])
    magnitude = {"magnitude": {"convention": "exact"}}
    assert catalogue.complete("polish", {}, "test") == {"warm_start": magnitude, "rounds": 1}
    assert catalogue.complete("polish", {"warm_start": {"first": None}}, "test")["warm_start"] == {"first": {}}
    nested = catalogue.complete("polish", {"warm_start": {"polish": {"rounds": 2}}}, "test")
    assert nested == {"warm_start": {"polish": {"warm_start": magnitude, "rounds": 2}}, "rounds": 1}
    assert catalogue.complete("polish", nested, "test") == nested  # complete parameters stay as they are


@pytest.mark.parametrize(
    "start", ["wanda", {"first": {}}, {"polish": {"warm_start": "first"}}, {"sparsegpt": {"damping": 0.1}}]
)
def test_warm_starts_compose(start: object, folder: Path):
    catalogue = Catalogue([folder])
    params = catalogue.complete("polish", {"warm_start": start}, "test")
    inner_name, inner_params = next(iter(params["warm_start"].items()))
    layer, target = layers.build("correlated"), Target(0.5)
    result = catalogue.build("polish", params).compress(layer, target, torch.Generator())
    inner = catalogue.build(inner_name, inner_params).compress(layer, target, torch.Generator())
    assert inner.mask is not None and torch.equal(result.weight, torch.where(inner.mask, layer.weight, 0.0))


def test_a_target_that_the_warm_start_cannot_is_refused(folder: Path):
    catalogue = Catalogue([folder])
    params = catalogue.complete("polish", {"warm_start": "first"}, "test")
    assert catalogue.refusal("polish", params, Target(0.5)) is None
    assert catalogue.refusal("polish", params, Target(pattern="2:4")) == (
        "its warm_start cannot be used: first prunes by row, not by n:m"
    )
    assert catalogue.refusal("polish", params, Target(0.5, "1x16")) == "polish prunes by row, n:m, not by 1xb"


def test_a_warm_start_may_be_asked_to_prune_alone():
    """AWP's prunes where bits are asked too, and is not asked at all where nothing is pruned."""
    catalogue = Catalogue()
    params = catalogue.complete("awp", {"warm_start": "wanda"}, "test")
    for target in (Target(0.5), Target(bits=4), Target(0.5, bits=4, group=16), Target(pattern="2:4", bits=3)):
        assert catalogue.refusal("awp", params, target) is None
    started = catalogue.complete("awp", {"warm_start": "dsnot"}, "test")
    assert catalogue.refusal("awp", started, Target(bits=4)) is None
    sentence = "its warm_start cannot be used: dsnot prunes by row, n:m, not by layer"
    assert catalogue.refusal("awp", started, Target(0.5, "layer", bits=4)) == sentence


def test_chains_are_completed_and_built():
    catalogue = Catalogue()
    swaps = {"sparse_swaps": {"swaps": 3, "warm_start": "magnitude"}}
    complete = catalogue.complete("chain", {"chain": [swaps, "rtn"]}, "test")
    (first, second) = complete["chain"]
    assert first["sparse_swaps"] == {"warm_start": {"magnitude": {"convention": "exact"}}, "swaps": 3}
    assert second == {"rtn": {"mse": False}}
    assert catalogue.complete("chain", complete, "test") == complete
    built: Any = catalogue.build("chain", complete)  # a class of the adapter's file
    pruner, quantiser = built.chain
    assert (type(pruner).__name__, type(quantiser).__name__) == ("SparseSwaps", "RTN")
    assert pruner.swaps == 3 and type(pruner.warm_start).__name__ == "Magnitude"


def test_sources_of_a_chain_are_those_of_all_its_methods():
    catalogue = Catalogue()
    params = catalogue.complete("chain", {"chain": [{"sparse_swaps": {"warm_start": "ria"}}, "rtn"]}, "test")
    kernels = ("swap_search", "simd", "swap_loops", "scans")
    swaps = ("kernels/swap_state", "numerics/swap_search", *(f"kernels/{name}" for name in kernels))
    files = [METHODS / f"{name}.py" for name in ("chain", "sparse_swaps", "ria", "rtn")]
    files[2:2] = [PACKAGE / f"{name}.py" for name in swaps]
    assert catalogue.sources("chain", params) == [*files, *SHARED_SOURCES]


KEEPS_NOTHING = edited('"bits": []', '"bits": [4]', edited('["row"]', '["dense"]'))
CHAINS = {
    ("wanda", "rtn"): None,
    ("rtn", "wanda"): None,
    ("sparsegpt", "rtn"): None,
    ("awp", "awp"): None,
    ("wanda", "awp"): None,
    ("awp", "wanda"): None,
    ("rtn", "rtn"): "rtn quantises, and the other method cannot prune: rtn does not prune",
    ("wanda", "ria"): "none of its methods quantises: wanda does not quantise, ria does not quantise",
    ("wanda", "sparsegpt"): "none of its methods quantises: wanda does not quantise, sparsegpt does not quantise "
    "without pruning",
    ("rtn", "sparsegpt"): "sparsegpt changes the weights that rtn has quantised",
    ("rtn", "reconstruct"): "reconstruct changes the weights that rtn has quantised",
    ("wanda", "mine"): "mine does not keep the zeros of wanda",
    ("mine", "wanda"): "mine does not keep the zeros of wanda",
    ("chain", "rtn"): "rtn quantises, and the other method cannot prune: chain prunes and quantises "
    "together and cannot do only one of them",
}


@pytest.mark.parametrize("pair", CHAINS, ids="-".join)
def test_which_chains_reach_a_target(pair: tuple[str, str], tmp_path: Path):
    (tmp_path / "mine.py").write_text(KEEPS_NOTHING)
    catalogue = Catalogue([tmp_path])
    params = catalogue.complete("chain", {"chain": list(pair)}, "test")
    assert catalogue.refusal("chain", params, Target(0.5, bits=4, group=16)) == CHAINS[pair]


def test_a_chain_is_refused_what_its_methods_cannot():
    catalogue = Catalogue()
    params = catalogue.complete("chain", {"chain": ["rtn", {"sparse_swaps": {"warm_start": "dsnot"}}]}, "test")
    prefix = "rtn quantises, and the other method cannot prune: "
    said = {
        Target(0.5): "chain prunes and quantises together and cannot do only one of them",
        Target(bits=4): "chain prunes and quantises together and cannot do only one of them",
        Target(0.5, "1x16", bits=4): prefix + "sparse_swaps prunes by row, n:m, not by 1xb",
    }
    for target, sentence in said.items():
        assert catalogue.refusal("chain", params, target) == sentence
    assert catalogue.refusal("chain", params, Target(pattern="2:4", bits=4)) is None
    assert catalogue["chain"].comparison(Target(0.5, bits=4)) == "pruned and quantised"


def test_sources_are_the_files_that_decide(folder: Path):
    catalogue = Catalogue([folder])
    params = catalogue.complete("polish", {"warm_start": {"polish": {"warm_start": "wanda"}}}, "test")
    expected = [folder / "polish.py", METHODS / "wanda.py", *SHARED_SOURCES]
    assert catalogue.sources("polish", params) == expected
    assert all(path.is_file() for path in SHARED_SOURCES)
    shared = {path.stem for path in SHARED_SOURCES}
    # With what ops imports.
    assert {"layer", "ops", "verify", "target", "dispatch", "grids", "selection", "rows"} <= shared
    sources = catalogue.sources("sparsegpt", catalogue.complete("sparsegpt", {}, "test"))
    compiled = {f"{path.parent.name}/{path.stem}" for path in sources}
    assert {"numerics/obs", "kernels/obs", "kernels/simd"} <= compiled  # and what that imports


@pytest.mark.parametrize("name", NAMES)
def test_sources_hold_what_a_method_imports(name: str):
    """An edit to another file of methods/ that a method imports would not run its cells again."""
    catalogue = Catalogue()
    tree = ast.parse(catalogue[name].path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layerwise."):
            _, room, *module = (node.module or "").split(".")
            found |= set(module) or {alias.name for alias in node.names}
    assert found <= {path.stem for path in catalogue.sources(name, catalogue.complete(name, {}, name))}


PRUNED, ROUNDED, BOTH = Target(0.5), Target(bits=3, group=16), Target(0.5, bits=3)
IDLE: list[tuple[str, dict[str, Any], dict[Target, set[str]]]] = [
    ("awp", {}, {PRUNED: set(), ROUNDED: set(), BOTH: set()}),
    ("awp", {"warm_start": "wanda"}, {ROUNDED: set()}),  # the default
    ("awp", {"warm_start": "ria"}, {PRUNED: set(), ROUNDED: {"warm_start"}, BOTH: set()}),
    ("awp", {"grid_from": "gptq"}, {PRUNED: {"grid_from"}, ROUNDED: set(), BOTH: set()}),
    ("awp", {"acceleration": "momentum"}, {PRUNED: set(), ROUNDED: {"acceleration"}, BOTH: {"acceleration"}}),
    ("awp", {"tolerance": 0.1}, {PRUNED: set(), ROUNDED: {"tolerance"}, BOTH: {"tolerance"}}),
    ("awp", {"step": "diagonal", "iterate": "accumulated"}, {PRUNED: {"step", "iterate"}, ROUNDED: set(), BOTH: set()}),
    ("awp", {"step": "spectral", "rounding": "gradual"}, {PRUNED: {"rounding"}, ROUNDED: set()}),
    ("magnitude", {"convention": "official"}, {PRUNED: {"convention"}, Target(0.5, "layer"): set()}),
    ("code_swaps", {"start": {"awp": {"acceleration": "momentum"}}}, {ROUNDED: {"start.acceleration"}}),
    ("chain", {"chain": ["wanda", {"awp": {"acceleration": "momentum"}}]}, {BOTH: set()}),  # it can prune too
    ("chain", {"chain": [{"sparse_swaps": {"warm_start": {"magnitude": {"convention": "official"}}}}, "rtn"]}, {
        BOTH: {"chain.warm_start.convention"}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "expected"), IDLE)
def test_which_parameters_do_nothing_at_a_target(name: str, params: dict[str, Any], expected: dict[Target, set[str]]):
    catalogue = Catalogue()
    full = catalogue.complete(name, params, "test")
    for target, places in expected.items():
        assert set(catalogue.idle(name, full, target)) == places, target.label


def test_refusals_and_comparisons():
    catalogue = Catalogue()
    said = {
        ("dense", Target(0.5)): "dense is a control that changes nothing",
        ("rtn", Target(0.5)): "rtn does not prune",
        ("rtn", Target(pattern="2:4", bits=4)): "rtn does not prune",
        ("wanda", Target(bits=4)): "wanda does not quantise",
        ("wanda", Target(0.5, bits=4)): "wanda does not quantise",
        ("sparsegpt", Target(0.5, "1x16")): "sparsegpt prunes by row, layer, n:m, not by 1xb",
    }
    for (name, target), sentence in said.items():
        assert catalogue[name].refusal(target) == sentence
    compared = {
        ("random", Target(0.5)): "control",
        ("wanda", Target(0.5)): "mask-only",
        ("sparsegpt", Target(0.5)): "weight-updating",
        ("sparsegpt", Target(0.5, bits=4)): "pruned and quantised",
        ("rtn", Target(bits=4)): "quantised",
    }
    for (name, target), group in compared.items():
        assert catalogue[name].refusal(target) is None and catalogue[name].comparison(target) == group


def test_a_file_that_a_method_imports_is_a_source_of_that_method_alone():
    catalogue = Catalogue()
    helper = PACKAGE / "numerics/coordinate_descent.py"
    users = [name for name in catalogue if helper in catalogue.sources(name, catalogue.complete(name, {}, name))]
    assert users == ["quantease"]


@pytest.mark.parametrize("name", ["foem", "gptaq"])
def test_the_cross_gram_is_needed_where_drift_is_made_up_for_alone(name: str):
    catalogue = Catalogue()
    for alpha, needs in ((0, {"gram"}), (0.0, {"gram"}), (0.25, {"gram", "cross_gram"})):
        params = catalogue.complete(name, {"alpha": alpha}, "test")
        assert catalogue.needs(name, params) == set(needed(catalogue.build(name, params))) == needs
        chained = catalogue.complete("chain", {"chain": ["wanda", {name: {"alpha": alpha}}]}, "test")
        assert catalogue.needs("chain", chained) == needs
