"""Every promise x method x target; methods come from the catalogue, so that a new file adds its rows by existing."""

import pytest

from layerwise.checks import battery as contract
from layerwise.contract.catalogue import Catalogue


def marked(name: str, case: contract.Case):
    """The pair as a pytest parameter with its id."""
    reason = contract.KNOWN_FAILURES.get((name, case.label, case.target.label))
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    if case.variant and case.target.label not in contract.ONE_OF_EACH:
        marks.append(pytest.mark.long)
    return pytest.param(name, case, id=f"{name}-{case.label}-{case.target.label}", marks=marks)


@pytest.mark.parametrize(("name", "case"), [marked(*row) for row in contract.rows(Catalogue())])
def test_promise(name: str, case: contract.Case):
    try:
        contract.CHECKS[name](case)
    except contract.NothingToCheck as reason:
        pytest.skip(str(reason))


def test_every_known_failure_is_a_row():
    rows = {(name, case.label, case.target.label) for name, case in contract.rows(Catalogue())}
    assert set(contract.KNOWN_FAILURES) <= rows
    assert set(contract.ONE_OF_EACH) <= {target for _, _, target in rows}
