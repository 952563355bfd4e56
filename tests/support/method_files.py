"""Texts of small method files for tests."""

UNSOLVED = """from dataclasses import dataclass
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
        raise NotImplementedError
"""  # a method that is planned and never run
