"""A template of a method's file, which keeps the contract without changes."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from layerwise.contract.catalogue import Catalogue
from layerwise.runtime.errors import InputError

NAME = re.compile(r"[a-z][a-z0-9_]*")
IMPORTED = ("Compressed", "Layer", "Method", "Target")  # by the template
TEXT = '''"""TITLE: magnitude times a power of the input's norm. (Describe here what it does, and name its source.)"""

from dataclasses import dataclass

import torch

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

# The method's abilities, read as text: a literal. Every target that it does not list is refused.
CARD = {
    "title": "TITLE",
    # "paper": "Its title", "arxiv": "2306.11695",
    "patterns": ["row", "layer", "n:m", "1xb"],  # "dense" too, if it quantises without pruning
    "bits": [],  # widths of the codes if it quantises, such as [3, 4]
    "updates_weights": False,  # True if weights that it keeps change
    "needs": ["gram"],  # and "mean", "absmean", "sequence_variance", "sample", "first_tokens" of layer.statistics
    "parameters": {  # a JSON Schema of each field below
        "power": {"type": "number", "minimum": 0, "description": "Exponent of the input's norm; 1 is Wanda."},
    },
}


@dataclass(frozen=True)
class CLASS(Method):
    """Keeps the largest |W_ij| sqrt(G_jj)^power of each comparison group. No preconditions."""

    power: float = 1.0

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        # Your code starts here. layer.weight is W [out, in]; layer.gram.matrix is G = X X^T / tokens [in, in]. Do not
        # modify them, draw random numbers only from rng, and expect dead inputs: zeros on the diagonal of G.
        importance = layer.weight.abs() * layer.gram.diagonal.sqrt() ** self.power
        # Prunes the smallest entries of each comparison group of the target, ties by index; keeps the other weights.
        return ops.pruned(layer, importance, target)
'''


def write(name: str, folder: str | Path = ".") -> Path:
    """Write the file of a new method, which passes the contract, into a folder; returns its path.

    name: the name of the method and the file: a Python identifier in lower case that no shipped method has, and no
        package of Python's library or installed, which the file would hide from Python run in its folder.
    Raises InputError if the name is not free, the file exists, or the folder cannot be written.
    """
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise InputError(
            "The name of a method must be a Python identifier: lower-case letters, digits and underscores, a letter "
            f"first. Got {name!r} instead."
        )
    if name in Catalogue():
        raise InputError(f"The name of a new method must be free. Got {name!r} instead, which is a shipped method.")
    if name in sys.stdlib_module_names or name in packages_distributions():
        raise InputError(f"The name of a new method must be free. Got {name!r} instead, which is a Python package.")
    path = Path(folder) / f"{name}.py"
    title = name.replace("_", " ").capitalize()
    class_name = "".join(part.capitalize() for part in name.split("_") if part)
    class_name = f"My{class_name}" if class_name in IMPORTED else class_name
    text = TEXT.replace("TITLE", title).replace("CLASS", class_name).replace("NAME", name)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{path} must not exist yet, so that nothing is overwritten. Got a file instead.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from None
    return path
