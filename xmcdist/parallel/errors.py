"""One error for all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from xmcdist.config.errors import UserError
from xmcdist.parallel.collectives import gather_objects

__all__ = ["errors_together"]


@contextmanager
def errors_together() -> Iterator[None]:
    """Around work without collectives: the `UserError` of any rank is raised on all; collective.

    Raises:
        UserError: that of the first rank that has one.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    told = [text for text in gather_objects(None if own is None else str(own)) if text is not None]
    if told:
        raise UserError(told[0]) from own
