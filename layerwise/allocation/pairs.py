"""The targets that a layer may get if a budget is counted in bits: sparsity with bits, a rank, or both."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from layerwise.contract.target import Target

SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
BITS = (2, 3, 4, 6, 8)
RANKS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)  # multiples of the budget's rank


def pairs_of(given: Sequence[Mapping[str, Any]] | None, target: Target) -> list[Target]:
    """The targets that a layer may get, the budget's own first.

    given: as in a config's `targets`. A pair takes pattern, grid and rank from the budget unless it gives its own.
    None: SHARES (or all counts of an n:m pattern), all BITS and RANKS, as far as the budget has them. Raises
    ValueError, in one sentence, for an entry that is not a target.
    """
    if Target.parse(target.label) != target:  # the table stores the label
        raise ValueError(f"the budget's percentages must have at most six digits. Got {target.label} instead.")
    found = [target]
    for number, option in enumerate(_usual(target) if given is None else given):
        try:
            found.append(_pair(option, target))
        except (ValueError, TypeError) as error:
            raise ValueError(f"pairs.{number} is not a target: {error}") from None
    return list(dict.fromkeys(found))


def _usual(target: Target) -> list[dict[str, Any]]:
    of = target.n_of_m[1] if target.n_of_m else 0
    pruned = [{"pattern": f"{kept}:{of}"} for kept in range(1, of)] or [{"sparsity": share} for share in SHARES]
    widths = [{"bits": bits} for bits in BITS]
    ranks = [{"rank": round(factor * target.rank, 6)} for factor in RANKS if factor * target.rank < 1]
    axes = [pruned if target.sparsity else [{}], widths if target.bits else [{}], ranks if target.rank else [{}]]
    return [{**share, **width, **rank} for share, width, rank in product(*axes)]


def _pair(option: Mapping[str, Any], target: Target) -> Target:
    own = dict(option)
    if "sparsity" in own:
        own.setdefault("pattern", target.pattern)
    if "bits" in own:
        own["bits"] = int(own["bits"])
        own.setdefault("group", target.group)
        own.setdefault("symmetric", target.symmetric)
    if target.rank:
        own.setdefault("rank", target.rank)
        for name in ("factor_bits", "factor_group"):
            own.setdefault(name, getattr(target, name))
    found = Target(**own)
    if found.dense:
        raise ValueError("a pair must prune, quantise or have a rank")
    if Target.parse(found.label) != found:  # the table stores the label
        raise ValueError(f"its percentages must have at most six digits. Got {found.label} instead.")
    return found
