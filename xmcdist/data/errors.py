"""The error a person can mend by looking at a data file."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xmcdist.config.errors import UserError

__all__ = ["DataError", "full_disk_is_clear"]


class DataError(UserError):
    """A source or prepared file is not what it should be; names file, place, value and remedy."""


@contextmanager
def full_disk_is_clear(place: Path) -> Iterator[None]:
    """Turn "no space left" into a `DataError` that says where."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"no space left while writing {place}: free some space and start the same command again; "
            "nothing unfinished was left behind"
        ) from error
