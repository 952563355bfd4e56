"""Every promise x method x target; methods come from the catalogue, so that a new file adds its rows by existing."""

import pytest

from layerwise.checks import battery as contract
from layerwise.contract.catalogue import Catalogue

# (check, method, target's label): why it does not hold. An entry that holds after all fails: the table stays true.
KNOWN_FAILURES: dict[tuple[str, str, str], str] = {
    ("9 brute force", "ria", target): "RIA's score is relative to row and column, no loss, even where G is diagonal"
    for target in ("50% row", "70% row", "2:4", "3:8")
}
# Where variants of a method are tried at every change; at the other targets by `make test-long`.
VARIANTS_AT = ("50% row", "50% layer", "2:4", "4b g16", "2:4 4b", "50% 1x16 4b g16")


def marked(name: str, case: contract.Case):
    """The pair as a pytest parameter with its id."""
    reason = KNOWN_FAILURES.get((name, case.label, case.target.label))
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    if case.variant and case.target.label not in VARIANTS_AT:
        marks.append(pytest.mark.long)
    return pytest.param(name, case, id=f"{name}-{case.label}-{case.target.label}", marks=marks)


@pytest.mark.parametrize(("name", "case"), [marked(*row) for row in contract.rows(Catalogue())])
def test_promise(name: str, case: contract.Case):
    contract.CHECKS[name](case)


def test_every_known_failure_is_a_row():
    rows = {(name, case.label, case.target.label) for name, case in contract.rows(Catalogue())}
    assert set(KNOWN_FAILURES) <= rows
    assert set(VARIANTS_AT) <= {target for _, _, target in rows}
