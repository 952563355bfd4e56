"""The schema of a method's card, and the parameters that cards share. Only literals; torch is not imported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerwise.contract.target import FORMATS, Target

STRUCTURES = ["dense", "row", "layer", "n:m", "1xb", "low rank"]
# The objective in a method's trace: the layer's error, the error of a relaxed mask, or the method's own measure.
CRITERIA = ["error", "relaxed error", "own"]
# "gram" and "cross_gram" are matrices of a Gram, "fisher" is a field of Layer, the others are fields of Statistics.
STATISTICS = ["gram", "cross_gram", "fisher", "mean", "absmean", "sequence_variance", "sample", "first_tokens"]
# Told of a method that needs the cross-Gram, where it is the Gram itself.
NO_DRIFT = (
    "in shared mode the inputs have not drifted, so what compensates for their drift does nothing: gptaq and qronos "
    "are gptq there."
)
# Words of `acts` in a parameter's schema -> the targets at which it, or a value of it, acts, and their test.
ACTS: dict[str, tuple[str, Callable[[Target], bool]]] = {
    "pruning": ("that prune", lambda target: target.sparsity > 0),
    "grid": ("with bits", lambda target: target.bits is not None),
    "pruning alone": ("that prune and have no bits", lambda target: target.sparsity > 0 and target.bits is None),
    "layer": ("of the pattern layer", lambda target: target.structure == "layer"),
}
# matplotlib's markers
MARKERS = ["o", "s", "^", "v", "<", ">", "D", "d", "P", "p", "X", "x", "H", "h", "8", "*", "+", "_"]
CARD_SCHEMA = {
    "type": "object",
    "required": ["title", "patterns", "bits", "updates_weights", "needs", "parameters"],
    "additionalProperties": False,
    "properties": {
        "title": {"type": "string"},
        "paper": {"type": "string"},
        "arxiv": {"type": "string", "pattern": r"^\d{4}\.\d{4,5}$"},
        "code": {"type": "string"},
        "patterns": {"type": "array", "items": {"enum": STRUCTURES}},
        "bits": {
            "type": "array",
            "items": {
                "type": ["integer", "string"],
                "minimum": 2,
                "maximum": 8,
                "pattern": f"^({'|'.join(FORMATS)})$",
            },
        },
        "updates_weights": {"type": "boolean"},
        "needs": {"type": "array", "items": {"enum": STATISTICS}},
        # {statistic: {parameter: value}}: statistics that it does not need if its parameters have these values.
        "unneeded": {
            "type": "object",
            "propertyNames": {"enum": STATISTICS},
            "additionalProperties": {"type": "object"},
        },
        "parameters": {"type": "object", "additionalProperties": {"type": "object"}},
        # {parameter: {value: reason}}: values only for parity tests; the runner refuses their results.
        "refused_where": {
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "control": {"type": "boolean"},
        "random": {"type": "boolean"},
        "criterion": {"enum": CRITERIA},
        "keeps_zeros": {"type": "boolean"},
        "joint_only": {"type": "boolean"},
        "bits_only": {"type": "boolean"},
        "own_grid": {"type": "boolean"},  # its codes represent its own levels, or a rotated weight
        "sums": {"type": "boolean"},  # it always adds low-rank factors to the sparse or quantised part
        "factor_bits": {"type": "array", "items": {"type": "integer", "minimum": 2, "maximum": 8}},  # of its factors
        "sparse_factor": {"type": "boolean"},  # one of its factors is sparse, so the rank may be higher
        "named_by": {"type": "string"},
        "cost": {
            "type": "object",
            "required": ["weights", "grams", "products"],
            "additionalProperties": False,
            "properties": {
                "weights": {"type": "number", "minimum": 1},
                "grams": {"type": "number", "minimum": 0},
                "products": {"type": "number", "minimum": 0},
                # {parameter: {value: products}}: for a parameter with a value other than its default.
                "products_where": {
                    "type": "object",
                    "additionalProperties": {
                        "type": "object",
                        "additionalProperties": {"type": "number", "minimum": 0},
                    },
                },
                # {parameter: products}: of each iteration, sweep or step, by which the number differs from its default.
                "products_per": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}},
            },
        },
        "look": {
            "type": "object",
            "required": ["colour", "marker"],
            "additionalProperties": False,
            "properties": {
                "colour": {"type": "string", "pattern": "^#[0-9A-Fa-f]{6}$"},
                "marker": {"enum": MARKERS},
            },
        },
        "checks": {  # settings of the contract's checks (checks/settings.py)
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "defaults": {"type": "object"},
                "variants": {"type": "array", "items": {"type": "object"}},
                "reference": {"type": "boolean"},
                "no_descent": {"type": "string"},
                "known_failures": {
                    "type": "object",
                    "propertyNames": {"pattern": "^9 "},  # only promise 9, which concerns quality, may fail
                    "additionalProperties": {
                        "type": "object",
                        "required": ["targets", "reason"],
                        "additionalProperties": False,
                        "properties": {
                            "targets": {"type": "array", "items": {"type": "string"}},
                            "reason": {"type": "string"},
                        },
                    },
                },
            },
        },
    },
}

# Kinds of targets over whose layers a budget may be spread.
LEVELLED = ["row", "layer", "n:m", "bits", "pruned and quantised", "low rank", "sum of parts"]
SEEN = ["weight", "gram", "errors", "trials"]  # possible needs of an allocator; trials: the model at trial levels
ALLOCATOR_SCHEMA = {
    "type": "object",
    "$defs": {"passes": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}},
    "required": ["title", "needs", "budgets", "parameters"],
    "additionalProperties": False,
    "properties": {
        "title": {"type": "string"},
        "paper": {"type": "string"},
        "arxiv": {"type": "string", "pattern": r"^\d{4}\.\d{4,5}$"},
        "code": {"type": "string"},
        "needs": {"type": "array", "items": {"enum": SEEN}},
        # {parameter: {value: needs}}: additional needs if a parameter has this value, which is written as text.
        "needs_where": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": {"type": "array", "items": {"enum": SEEN}},
            },
        },
        "budgets": {"type": "array", "items": {"enum": LEVELLED}, "minItems": 1, "uniqueItems": True},
        # The format "levels" marks the parameter whose shares of zeros, with the budget's, are tried in every layer;
        # "targets" the one whose targets are.
        "parameters": {"type": "object", "additionalProperties": {"type": "object"}},
        # Number of sequences that pass through the model in a search: a sum of products of parameters and "layers". A
        # list counts as its length; levels count with the budget. passes_where: {parameter: {value: such a sum}}, for a
        # parameter with this value.
        "passes": {"$ref": "#/$defs/passes"},
        "passes_where": {
            "type": "object",
            "additionalProperties": {"type": "object", "additionalProperties": {"$ref": "#/$defs/passes"}},
        },
        # {parameter: parameter}: the first one's value must be at most the other's.
        "at_most": {"type": "object", "additionalProperties": {"type": "string"}},
        "splits_equals": {"type": "string"},  # why two equal layers may get two levels
        "checks": {  # the parameters with which its promises are checked, besides the defaults
            "type": "object",
            "required": ["variants"],
            "additionalProperties": False,
            "properties": {"variants": {"type": "array", "items": {"type": "object"}}},
        },
    },
}


@dataclass(frozen=True, eq=False)  # compared by identity, and hashable
class Kind:
    """A kind of file with a card. folder: its folder next to the package, and in it. base: base class. signature: the
    class's one call. instead: a call that the class may define instead. of_the_base: names that it must not define.
    paths: the config's key for further folders."""

    word: str
    folder: str
    base: str
    signature: str
    of_the_base: tuple[str, ...]
    paths: str
    schema: Mapping[str, Any] = field(hash=False)
    instead: tuple[str, ...] = ()


METHOD = Kind(
    "method", "methods", "Method", "solve(layer, target, rng)", ("compress", "refusal"), "method_paths", CARD_SCHEMA
)
ALLOCATOR = Kind(
    "allocator",
    "allocators",
    "Allocator",
    "allocate(parts, target)",
    (),
    "allocator_paths",
    ALLOCATOR_SCHEMA,
    instead=("search",),
)

# JSON Schemas of parameters that several methods share. {"$ref": "damping"} in a card means the schema of that name
# here. Other keys next to "$ref" add to the schema or replace its keys.
PARAMETERS: dict[str, dict[str, Any]] = {
    "damping": {
        "type": "number",
        "exclusiveMinimum": 0,
        "description": "Added to the Gram's diagonal, as a share of its mean.",
    },
    "blocksize": {
        "type": "integer",
        "minimum": 1,
        "description": "Number of columns after which the remaining columns are updated.",
    },
    "act_order": {
        "type": "boolean",
        "description": "Process columns in order of decreasing diagonal of the Gram; groups are runs in that order.",
    },
    "static_groups": {
        "type": "boolean",
        "description": "Groups are runs of consecutive inputs, all fitted to the original weight.",
    },
    "mask_warm_start": {"format": "method", "description": "Method whose mask is refined."},
    "quantised_start": {
        "format": "method",
        "gives": ["gram", "mean", "absmean", "sequence_variance", "sample", "first_tokens"],
        "description": "Method whose codes are changed and whose grid is kept.",
    },
    "mse": {
        "type": "boolean",
        "description": "Try 80 shrunken ranges and take the one with the smallest sum of |error|^2.4.",
    },
    "layer_convention": {
        "enum": ["exact", "official"],
        "acts": "layer",
        "description": "exact: floor(n p) zeros. official: the layer-wide threshold of the released code, which prunes "
        "floor(n p) + 1 entries and ties (layer pattern; breaks promise 2).",
    },
    "penalty": {
        "type": "number",
        "exclusiveMinimum": 0,
        "description": "Penalty on the disagreement of ADMM's two iterates.",
    },
}


def needed(card: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """The needs of a method or an allocator with these complete parameters, from its card."""
    spared = card.get("unneeded", {})
    without = {name for name, where in spared.items() if all(params.get(key) == value for key, value in where.items())}
    added = [
        name for key, values in card.get("needs_where", {}).items() for name in values.get(str(params.get(key)), ())
    ]
    return [*(name for name in card["needs"] if name not in without), *added]


def acts(schema: Mapping[str, Any], value: Any) -> str | None:
    """The key of ACTS for the targets at which a parameter with this schema and value acts; None for every target."""
    told = schema.get("acts", schema.get("asked"))
    told = told.get(value) if isinstance(told, Mapping) and isinstance(value, str) else told
    return told if isinstance(told, str) and told in ACTS else None


def merged(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's schema with the shared one that it refers to filled in. Raises KeyError, with a sentence."""
    own = dict(schema)
    name = own.pop("$ref", None)
    if name is None:
        return own
    if name not in PARAMETERS:
        raise KeyError(f"$ref must be one of {', '.join(PARAMETERS)}. Got {name!r} instead")
    return PARAMETERS[name] | own
