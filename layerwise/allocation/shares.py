"""The levels that are tried in a layer if a budget is spread as levels."""

from collections.abc import Sequence

from layerwise.contract.target import Target

WIDTHS = range(2, 9)  # possible bits of a layer
USUAL = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
FEWER = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)  # also for budgets below LOW
MORE = (0.95, 0.99)  # also for budgets above HIGH
LOW, HIGH = 0.45, 0.8


def levels_of(given: Sequence[float] | None, target: Target) -> list[float]:
    """The levels, ascending, with the budget's own: all counts of an n:m pattern, all bits, or these shares of zeros.

    given: shares of zeros. None: USUAL, with FEWER or MORE where the budget is near an end of them.
    """
    if target.budget == "bits":
        return [float(bits) for bits in WIDTHS]
    if target.n_of_m:
        kept, of = target.n_of_m
        return [target.level if count == of - kept else count / of for count in range(of)]
    if given is None:
        given = (*(FEWER if target.level < LOW else ()), *USUAL, *(MORE if target.level > HIGH else ()))
    return sorted({*map(float, given), target.level})
