"""The target that a compressed layer must satisfy. Does not import torch, so that the grid is planned without it."""

import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from typing import Any

PATTERN = re.compile(r"row|layer|[1-9]\d*:[1-9]\d*|1x[1-9]\d*")
# The form of `Target.label`, with a space after each word.
LABEL = re.compile(
    r"(?:(?P<n_of_m>[1-9][0-9]*:[1-9][0-9]*) |"
    r"(?P<percent>[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)% (?P<pattern>row|layer|1x[1-9][0-9]*) )?"
    r"(?:(?:(?P<format>nvfp4|mxfp4)|(?P<bits>[0-9]+)b) (?:g(?P<group>[0-9]+) )?(?P<symmetric>sym )?)?"
    r"(?:rank (?P<rank>[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)% "
    r"(?:(?P<factor_bits>[0-9]+)b (?:g(?P<factor_group>[0-9]+) )?)?)?"
)
WHOLE = ("bits", "group", "factor_bits", "factor_group")  # fields that are whole numbers or None
FORMATS = {"nvfp4": 16, "mxfp4": 32}  # floating-point formats of four bits -> inputs that share a scale
JOINT = "pruned and quantised"  # the budget of a target that does both: stored bits
LOW_RANK = "low rank"  # the structure of a target with two thin factors and nothing else
SUM = "sum of parts"  # comparison group of targets with factors beside a sparse or quantised part
OF_FACTORS = ("rank", "factor_bits", "factor_group")  # fields that describe the factors
PAIRED = (JOINT, LOW_RANK, SUM)  # budgets that give each layer its own target instead of a level
CERTIFIED = ("row", "layer", "n:m")  # patterns for which the error of every mask has a bound


@dataclass(frozen=True)
class Target:
    """Sparsity pattern, quantisation grid and low-rank factors required of every layer.

    sparsity: share of zeros, in [0, 1). An n:m pattern fixes it to 1 - n/m; if given, it must agree.
    pattern:  "layer" floor(sparsity * out * in) zeros in the layer; "row" floor(sparsity * in) zeros in every row;
              "n:m" n KEPT of every m consecutive inputs of a row; "1xb" whole blocks of b consecutive inputs of a row
              kept or dropped, floor(sparsity * blocks) dropped in every row. An incomplete last group or block counts
              as if padded with zeros, which are pruned first.
    bits:     width of the integer codes, 2 to 8, or None for floating point. For a format it is 4; the format's name
              may be given instead.
    group:    consecutive inputs of a row that share a scale and zero, or None for a whole row. A short last group has
              its own scale and zero. A format fixes the length.
    symmetric: grid centred on zero.
    format:   "nvfp4" or "mxfp4", whose codes are floating-point numbers of four bits (e2m1) in groups of 16 or 32; None
              for integer codes.
    rank:     share of the layer's weights that two factors B [out, r] and A [r, in] may have, in [0, 1):
              r = floor(rank * out * in / (out + in)). Alone it means W_hat = B A. With sparsity or bits it means S + B
              A, and the other fields describe S. 0: no factors.
    factor_bits: width of the factors' integer codes, 2 to 8, or None for factors of 16 bits. It does not change r.
    factor_group: consecutive entries of a factor's row that share a scale and zero, or None for a whole row.
    """

    sparsity: float = 0.0
    pattern: str = "row"
    bits: int | None = None
    group: int | None = None
    symmetric: bool = False
    format: str | None = None
    rank: float = 0.0
    factor_bits: int | None = None
    factor_group: int | None = None

    def __post_init__(self) -> None:
        self._fill_in_format()
        for name in ("sparsity", "rank", *WHOLE):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) and not (value is None and name in WHOLE):
                raise ValueError(f"Target.{name} must be a number. Got {value!r} instead.")
        if not isinstance(self.pattern, str) or not PATTERN.fullmatch(self.pattern):
            raise ValueError(f"Target.pattern must be 'row', 'layer', 'n:m' or '1xb'. Got {self.pattern!r} instead.")
        if self.symmetric not in (True, False):
            raise ValueError(f"Target.symmetric must be True or False. Got {self.symmetric!r} instead.")
        if self.n_of_m:
            n, m = self.n_of_m
            if n >= m:
                raise ValueError(f"Target.pattern n:m must keep n of m, n < m. Got {self.pattern!r} instead.")
            if self.sparsity not in (0.0, 1 - n / m):
                raise ValueError(
                    f"Target.sparsity of pattern {self.pattern!r} must be {1 - n / m:g}. Got {self.sparsity:g} instead."
                )
            object.__setattr__(self, "sparsity", 1 - n / m)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"Target.sparsity must be in [0, 1). Got {self.sparsity} instead.")
        if self.sparsity == 0 and self.pattern != "row":  # nothing to prune: use one spelling of this target
            object.__setattr__(self, "pattern", "row")
        for name in WHOLE:
            value = getattr(self, name)
            if value is not None and not float(value).is_integer():
                raise ValueError(f"Target.{name} must be a whole number. Got {value} instead.")
            if value is not None and name.endswith("bits") and not 2 <= value <= 8:
                raise ValueError(f"Target.{name} must be 2 to 8. Got {value} instead.")
            if value is not None:  # 16.0 is the group 16, in a label and a file too
                object.__setattr__(self, name, int(value))
        if self.group is not None and self.group < 1:
            raise ValueError(f"Target.group must be a number of inputs, at least 1. Got {self.group} instead.")
        if not 0 <= self.rank < 1:
            raise ValueError(f"Target.rank must be a share of the weights, in [0, 1). Got {self.rank} instead.")
        if self.bits is None and (self.group is not None or self.symmetric):
            raise ValueError("Target.bits must be given with Target.group or Target.symmetric. Got None instead.")
        if self.factor_group is not None and self.factor_group < 1:
            raise ValueError(
                f"Target.factor_group must be a number of entries, at least 1. Got {self.factor_group} instead."
            )
        if self.factor_bits is None and self.factor_group is not None:
            raise ValueError("Target.factor_bits must be given with Target.factor_group. Got None instead.")
        if self.factor_bits is not None and not self.rank:
            raise ValueError("Target.rank must be above 0 with Target.factor_bits. Got 0 instead.")

    def _fill_in_format(self) -> None:
        """Fill in the fields that a format fixes. Raises ValueError if a contradicting value is given."""
        if isinstance(self.bits, str):  # a config writes bits: nvfp4
            if self.bits not in FORMATS:
                known = ", ".join(FORMATS)
                raise ValueError(f"Target.bits must be 2 to 8, {known}. Got {self.bits!r} instead.")
            object.__setattr__(self, "format", self.bits)
            object.__setattr__(self, "bits", 4)
        if self.format is None:
            return
        if self.format not in FORMATS:
            raise ValueError(f"Target.format must be {' or '.join(FORMATS)}. Got {self.format!r} instead.")
        length = FORMATS[self.format]
        if self.group not in (None, length):
            raise ValueError(f"Target.group of {self.format} must be {length}. Got {self.group} instead.")
        if self.bits not in (None, 4):
            raise ValueError(f"Target.bits of {self.format} must be 4. Got {self.bits} instead.")
        if self.symmetric:
            raise ValueError(
                f"Target.symmetric must be False for {self.format}, whose groups have no zero point. Got True instead."
            )
        object.__setattr__(self, "bits", 4)
        object.__setattr__(self, "group", length)

    @classmethod
    def parse(cls, label: str) -> "Target":
        """The target of a label: "60% row", "50% layer", "2:4", "50% 1x16", "4b g128", "2:4 4b sym", "nvfp4", "dense".
        "rank 40%" and "rank 40% 4b g64", with quantised factors, may be the whole label or its end.

        The inverse of `label`, which shows six digits of the percentage: one third is written as 33.3333%, and 33.3333%
        is read as exactly 0.333333. Raises ValueError for text that is not a label, and for an impossible target.
        """
        words = label.split() if isinstance(label, str) else []
        if words == ["dense"]:
            return cls()
        found = LABEL.fullmatch("".join(f"{word} " for word in words))
        if not words or not found:
            raise ValueError(
                "A target's label must be like '60% row', '50% layer', '2:4', '50% 1x16', '4b g128', '4b sym', "
                f"'2:4 4b g128', 'nvfp4', 'mxfp4', 'rank 40%', 'rank 40% 4b g64' or 'dense'. Got {label!r} instead."
                + _sparsity_advice(" ".join(words))
            )
        percent = found["percent"]
        whole = {name: int(found[name]) if found[name] else None for name in WHOLE}
        return cls(
            sparsity=float(Decimal(percent) / 100) if percent else 0.0,  # as the decimal 0.07, not as 7 times 0.01
            pattern=found["n_of_m"] or found["pattern"] or "row",
            symmetric=bool(found["symmetric"]),
            format=found["format"],
            rank=float(Decimal(found["rank"]) / 100) if found["rank"] else 0.0,
            **whole,
        )

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(n, m) of an n:m pattern, with n kept of m."""
        n, colon, m = self.pattern.partition(":")
        return (int(n), int(m)) if colon else None

    @property
    def block(self) -> int | None:
        """Block length of a 1xb pattern."""
        return int(self.pattern[2:]) if self.pattern.startswith("1x") else None

    @property
    def dense(self) -> bool:
        """Whether the target requires nothing, so that the weight is unchanged."""
        return self.sparsity == 0 and self.bits is None and self.rank == 0

    @property
    def structure(self) -> str:
        """Kind of pattern, as a method's card lists it: dense, row, layer, n:m, 1xb, or low rank for factors alone.

        For a sum it is the kind of the part beside the factors.
        """
        if self.sparsity == 0:
            return LOW_RANK if self.rank and self.bits is None else "dense"
        return "n:m" if self.n_of_m else "1xb" if self.block else self.pattern

    @property
    def pruning(self) -> "Target":
        """The sparsity alone, without a grid or factors."""
        return Target(self.sparsity, self.pattern)

    @property
    def grid(self) -> "Target":
        """The grid alone, without sparsity or factors."""
        return Target(bits=self.bits, group=self.group, symmetric=self.symmetric, format=self.format)

    @property
    def rest(self) -> "Target":
        """The target of the part beside the factors; dense if there is none."""
        return replace(self, rank=0.0, factor_bits=None, factor_group=None)

    @property
    def factors(self) -> "Target":
        """The grid of each factor, as the target of a layer of its own; dense if factors have 16 bits."""
        return Target(bits=self.factor_bits, group=self.factor_group)

    @property
    def unrounded(self) -> "Target":
        """The same target with factors of 16 bits."""
        return replace(self, factor_bits=None, factor_group=None)

    def rank_of(self, out: int, inputs: int) -> int:
        """The rank r of a layer's factors [out, r] and [r, inputs], which take at most the share `rank` of its
        weights."""
        return int(self.rank * out * inputs / (out + inputs))

    def without_factors(self, shape: tuple[int, int], layer: str) -> str:
        """The error sentence for a layer of shape (out, in), named `layer`, whose factors would have rank 0."""
        return (
            f"The rank of {self.label} must be at least 1 in every layer. Got 0 in {layer} [{shape[0]}, {shape[1]}] "
            "instead."
        )

    @property
    def width(self) -> int | str | None:
        """The entry in a card's `bits` list: the width of integer codes, or the format; None without a grid."""
        return self.format or self.bits

    @property
    def has_zeros(self) -> bool:
        """Whether the zeros of the groups are chosen and stored."""
        return self.bits is not None and not self.symmetric and self.format is None

    @property
    def budget(self) -> str:
        """Kind of budget that is spread over the layers, as an allocator's card lists it: as `structure`, or bits.

        For PAIRED targets it is counted in bits. A format has no budget, and its name is returned.
        """
        if self.rank:
            return LOW_RANK if self.rest.dense else SUM
        if self.bits is None:
            return self.structure
        return JOINT if self.sparsity else self.format or "bits"

    @property
    def paired(self) -> bool:
        """Whether the budget is spread as the layers' own targets, counted in bits, instead of levels."""
        return self.budget in PAIRED

    @property
    def level(self) -> float:
        """The level of a layer: its share of zeros or, if nothing is pruned, the bits of a code, or the rank."""
        if self.structure == LOW_RANK:
            return self.rank
        return float(self.bits) if self.bits is not None and not self.sparsity else self.sparsity

    def at(self, level: float) -> "Target":
        """The same target at another level; for an n:m pattern the level is a share (m - n)/m.

        Raises ValueError for a level that the target cannot have.
        """
        if self.n_of_m:
            kept, of = round((1 - level) * self.n_of_m[1]), self.n_of_m[1]
            dense = kept == of
            return replace(self, sparsity=0.0, pattern="row" if dense else f"{kept}:{of}")
        if self.structure == LOW_RANK:
            return replace(self, rank=level)
        if self.budget == "bits":
            return replace(self, bits=level)
        return replace(self, sparsity=level)

    @property
    def label(self) -> str:
        """Short name for tables, figures and reports: 50% row, 2:4, 4b g128, 2:4 4b, nvfp4, rank 10% 4b g64, dense."""
        parts = []
        if self.sparsity:
            parts.append(self.pattern if self.n_of_m else f"{100 * self.sparsity:g}% {self.pattern}")
        if self.format:
            parts.append(self.format)
        elif self.bits is not None:
            parts.append(
                f"{self.bits}b" + (f" g{self.group}" if self.group else "") + (" sym" if self.symmetric else "")
            )
        if self.rank:
            parts.append(f"rank {100 * self.rank:g}%")
        if self.factor_bits is not None:
            parts.append(self.factors.label)
        return " ".join(parts) or "dense"

    def as_dict(self) -> dict[str, Any]:
        """The fields in the form of a config: a format is under `bits`, and those of factors are present only if
        set."""
        fields = asdict(self)
        own = {name: value for name in OF_FACTORS if (value := fields.pop(name))}
        return fields | {"bits": fields.pop("format") or self.bits} | own


def _sparsity_advice(label: str) -> str:
    """Advice on a wrong label that begins with a percentage and lacks its pattern: '60%', '50 % row'."""
    share = re.match(r"([0-9]+(?:\.[0-9]+)?) ?%", label)
    if not share or re.match(r"\S+% (row|layer|1x[1-9][0-9]*)\b", label):
        return ""
    return f" A sparsity needs a pattern, such as '{share[1]}% row' or '{share[1]}% layer'."


def refusal(name: str, card: Mapping[str, Any], target: Target) -> str | None:
    """Why the method `name` with this card cannot reach the target, in one sentence, or None."""
    if not card["patterns"]:
        return f"{name} is a control that changes nothing"
    if (reason := _rank_refusal(name, card, target)) or target.structure == LOW_RANK:
        return reason
    if card.get("joint_only") and not (target.sparsity and target.bits):
        return f"{name} prunes and quantises together and cannot do only one of them"
    if card.get("bits_only") and target.bits is None:
        return f"{name} does not prune without quantising"
    if target.bits is not None and not card["bits"]:
        return f"{name} does not quantise"
    if target.structure not in card["patterns"]:
        if target.structure == "dense":
            return f"{name} does not quantise without pruning"
        if card["patterns"] == ["dense"]:
            return f"{name} does not prune"
        return f"{name} prunes by {', '.join(card['patterns'])}, not by {target.structure}"
    if target.width is not None and target.width not in card["bits"]:
        return f"{name} quantises to {', '.join(map(str, card['bits']))} bits, not to {target.width}"
    return None


def _rank_refusal(name: str, card: Mapping[str, Any], target: Target) -> str | None:
    """Why a card cannot give the low-rank factors of a target (or must give factors that it lacks), or None."""
    alone, sums = LOW_RANK in card["patterns"], card.get("sums")
    if target.rank and not (alone or sums):
        return f"{name} gives no low-rank factors"
    if target.structure == LOW_RANK and not alone:
        return f"{name} gives a sum with low-rank factors, not the factors alone"
    if target.rank and target.structure != LOW_RANK and not sums:
        return f"{name} gives only low-rank factors, not a sum with them"
    if target.rank:
        return _factor_refusal(name, card.get("factor_bits", []), target)
    if sums and alone:
        return f"{name} gives low-rank factors, so the target must have a rank"
    if sums:
        return f"{name} gives only sums with low-rank factors, so the target must have a rank"
    return f"{name} gives low-rank factors and neither prunes nor quantises" if card["patterns"] == [LOW_RANK] else None


def _factor_refusal(name: str, widths: Sequence[int], target: Target) -> str | None:
    """Why a method whose factors have one of these widths cannot give those of a target, or None. No widths: 16
    bits."""
    if target.factor_bits is None:
        return f"{name} gives quantised low-rank factors, so the target must have factor_bits" if widths else None
    if not widths:
        return f"{name} does not quantise low-rank factors"
    if target.factor_bits not in widths:
        return f"{name} quantises low-rank factors to {', '.join(map(str, widths))} bits, not to {target.factor_bits}"
    return None
