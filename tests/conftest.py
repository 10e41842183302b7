"""What all tests share: which of them keep to one worker of pytest-xdist."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None]:
    """A file's tests stay on one worker, as they share what its fixtures trained.

    Files that start processes share few workers, so as not to starve each other: one has those
    that start whole jobs, one those that only fork ranks, one those that mostly wait.

    Raises:
        UsageError: pytest-xdist does not heed the groups.  3.8.0 beside pytest 9.2 says nothing and deals out
            every test by itself, so that fixtures are made on all workers.
    """
    files: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        files[item.nodeid.split("::")[0]].append(item)
    for file, tests in files.items():
        marks = [{mark.name for mark in test.iter_markers()} for test in tests]
        starting = [names for names in marks if "distributed" in names]
        group = file
        if any("waiting" in names for names in marks):
            group = "waiting"
        elif starting:
            group = "ranks" if all("ranks" in names for names in starting) else "jobs"
        for test in tests:
            test.add_marker(pytest.mark.xdist_group(group))
    yield
    if getattr(config.option, "loadgroup", False) and not all("@" in item.nodeid for item in items):
        raise pytest.UsageError("this pytest-xdist does not keep groups of tests together: install constraints.txt")
