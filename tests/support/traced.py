"""Coverage follows a part of a test's variants: following all takes twice the time, and most run the same lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

import pytest
from coverage import Coverage

FIRST, EVERY = 3, 6  # of the variants of a test, the first ones and then every so many
RUN: Counter[str] = Counter()  # in this worker: test -> its variants so far


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    test = item.nodeid.partition("[")[0]
    RUN[test] += 1
    following = Coverage.current()
    if following is None or RUN[test] <= FIRST or RUN[test] % EVERY == 0:
        return (yield)
    following.stop()
    try:
        return (yield)
    finally:
        following.start()
