"""What can be wrong with a label tree, given or asked for."""

from __future__ import annotations

from xmcdist.config.errors import UserError

__all__ = ["TreeError"]


class TreeError(UserError):
    """A label tree cannot be built, read or looked up as asked; names the cause and the remedy."""
