"""Every promise x method x target; methods come from the catalogue, so that a new file adds its rows by existing."""

import pytest

from layerwise.checks.case import Case, NothingToCheck
from layerwise.checks.promises import CHECKS, rows
from layerwise.checks.settings import ONE_OF_EACH, known_failure
from layerwise.contract.catalogue import Catalogue

SLOW = ("6 hard layers",)  # half the time of all promises; at every change without variants


def marked(name: str, case: Case):
    """The pair as a pytest parameter with its id."""
    reason = known_failure(name, case.entry, case.params, case.target)
    marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
    if case.variant:
        rare = name in SLOW or case.target.label not in ONE_OF_EACH
        marks.append(pytest.mark.long if rare else pytest.mark.battery)
    return pytest.param(name, case, id=f"{name}-{case.label}-{case.target.label}", marks=marks)


@pytest.mark.parametrize(("name", "case"), [marked(*row) for row in rows(Catalogue())])
def test_promise(name: str, case: Case):
    try:
        CHECKS[name](case)
    except NothingToCheck as reason:
        pytest.skip(str(reason))


def test_every_known_failure_is_a_row():
    catalogue = Catalogue()
    labels = {(name, case.entry.name, case.target.label) for name, case in rows(catalogue)}
    for name, entry in catalogue.items():
        for check, known in entry.card.get("checks", {}).get("known_failures", {}).items():
            assert {(check, name, target) for target in known["targets"]} <= labels
    assert set(ONE_OF_EACH) <= {target for _, _, target in labels}
