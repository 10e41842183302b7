"""What all tests share: which of them keep to one worker of pytest-xdist."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """Tests that start processes keep to two workers, so as not to starve each other; others stay together by file.

    One of the two has whole jobs, the other ranks that are forked and tests that mostly wait.
    A file's tests share what their fixtures trained.

    Raises:
        UsageError: pytest-xdist does not heed the groups.  3.8.0 beside pytest 9.2 says nothing and deals out
            every test by itself, so that fixtures are made on all workers.
    """
    for item in items:
        group = item.nodeid.split("::")[0]
        if item.get_closest_marker("ranks") or item.get_closest_marker("waiting"):
            group = "ranks"
        elif item.get_closest_marker("distributed"):
            group = "distributed"
        item.add_marker(pytest.mark.xdist_group(group))
    yield
    if getattr(config.option, "loadgroup", False) and not all("@" in item.nodeid for item in items):
        raise pytest.UsageError("this pytest-xdist does not keep groups of tests together: install constraints.txt")
