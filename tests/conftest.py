"""What all tests share: which of them keep to one worker of pytest-xdist."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes run one after the other, so as not to starve each other; others by file.

    Those that mostly wait, for a rank that hangs or dies, have a worker beside them: marked
    ``waiting`` too.  A file's tests stay together because they share what their fixtures trained.
    """
    for item in items:
        group = item.nodeid.split("::")[0]
        if item.get_closest_marker("waiting"):
            group = "waiting"
        elif item.get_closest_marker("distributed"):
            group = "distributed"
        item.add_marker(pytest.mark.xdist_group(group))
