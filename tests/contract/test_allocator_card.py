"""Faults of an allocator's card: each is refused in one sentence, before a job."""

import pytest

from layerwise.contract.cards import ALLOCATOR
from layerwise.contract.method_file import CatalogueError, read_entry

FILE = """
from dataclasses import dataclass
from layerwise.contract.allocator import Allocator, Proposal

CARD = {"title": "own", "needs": [], "budgets": ["row"], "parameters": {"slope": {"type": "number"}}}


@dataclass(frozen=True)
class Own(Allocator):
    slope: float = 0.01

    def allocate(self, parts, target):
        return Proposal((target.level,) * len(parts), (None,) * len(parts))
"""
NEEDS, SLOPE = '"needs": []', '"slope": {"type": "number"}'
TRIALS = {NEEDS: '"needs": ["trials"]'}
SEARCH = {"def allocate(self, parts, target)": "candidates = None\n\n    def search(self, parts, target, trials)"}


def with_key(key):
    return {'"parameters"': f'{key}, "parameters"'}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({'["row"]': "[]"}, "CARD['budgets'] must have at least 1 entry. Got [] instead."),
        ({'["row"]': '["row", "row"]'}, "CARD['budgets'] must have no entry twice. Got ['row', 'row'] instead."),
        (
            with_key('"needs_where": {"slop": {"1": ["gram"]}}'),
            "CARD['needs_where'] must name parameters. Got 'slop' instead.",
        ),
        (
            with_key('"needs_where": {"slope": {"1": ["gram"]}}'),
            "CARD['needs_where'] must name parameters with an enum, or booleans. Got 'slope' instead.",
        ),
        (
            with_key('"needs_where": {"slope": {"stepp": ["gram"]}}')
            | {SLOPE: '"slope": {"enum": ["step", "line"]}', "0.01": '"step"'},
            "CARD['needs_where']['slope'] must have keys among step, line. Got 'stepp' instead.",
        ),
        (
            with_key('"passes_where": {"slope": {"yes": []}}') | {'"number"': '"boolean"', "0.01": "True"},
            "CARD['passes_where']['slope'] must have keys among True, False. Got 'yes' instead.",
        ),
        (
            with_key('"at_most": {"slope": "name"}')
            | {SLOPE: f'{SLOPE}, "name": {{"type": "string"}}', "0.01": '0.01\n    name: str = "a"'},
            "CARD['at_most'] must name parameters that are numbers. Got 'name' instead.",
        ),
        (
            with_key('"passes": [["slope"]]') | {'"number"': '"string"', "0.01": '"a"'},
            "CARD['passes'] must name parameters that are numbers or lists. Got 'slope' instead.",
        ),
        (
            TRIALS | SEARCH | {SLOPE: '"windows": {"type": ["integer", "null"]}', "slope: float = 0.01": "windows = 1"},
            "CARD['parameters']['windows'] must be of type integer: it is a number of sequences.",
        ),
        (
            {SLOPE: '"slope": {"type": "number", "format": "levels"}'},
            "CARD['parameters']['slope'] must be of type array: it has the format levels.",
        ),
        (
            {SLOPE: '"slope": {"type": "array", "format": "levels", "items": {"type": "number"}}', "0.01": "()"},
            "CARD['parameters']['slope'] must have items that are numbers from 0 to 0.99.",
        ),
        (
            {SLOPE: '"slope": {"type": "array", "format": "targets"}', "0.01": "()"},
            "CARD['parameters']['slope'] must have items of type object, each a target.",
        ),
        ({NEEDS: '"needs": ["errors"]'}, "Own must define candidates(target): it needs errors or trials."),
        (TRIALS, "Own must define search(parts, target, trials): it needs trials."),
        (
            {"def allocate(self, parts, target)": "def search(self, parts, target, trials)"},
            "Own must define allocate(parts, target): it may be without trials.",
        ),
    ],
)
def test_a_wrong_card_is_one_sentence(tmp_path, changes, sentence):
    text = FILE
    for was, now in changes.items():
        assert was in text
        text = text.replace(was, now, 1)
    path = tmp_path / "own.py"
    path.write_text(text, "utf-8")
    with pytest.raises(CatalogueError) as refused:
        read_entry(path, ALLOCATOR)
    assert str(refused.value) == f"{path}: {sentence}"


def test_needs_are_added_where_a_boolean_is_true(tmp_path):
    text = FILE.replace('"parameters"', '"needs_where": {"slope": {"True": ["gram"]}}, "parameters"')
    (tmp_path / "own.py").write_text(text.replace('"number"', '"boolean"').replace("0.01", "False"), "utf-8")
    entry = read_entry(tmp_path / "own.py", ALLOCATOR)
    assert entry is not None and entry.needs({"slope": True}) == {"gram"} and entry.needs({"slope": False}) == set()
