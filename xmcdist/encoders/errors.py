"""What can be wrong with an encoder: a package, a folder, a name, a setting."""

from __future__ import annotations

from xmcdist.config.errors import UserError

__all__ = ["EncoderError"]


class EncoderError(UserError):
    """An encoder or its tokenizer cannot be had as asked; names setting, value and remedy."""
