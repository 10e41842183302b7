"""The error a person can mend: a bad setting, file or environment."""

from __future__ import annotations

__all__ = ["ConfigError", "UserError"]


class UserError(ValueError):
    """Names what is wrong (file, line or field, and the value) and the remedy.

    The command line prints the message alone; anything else that is raised is our own
    fault and keeps its traceback.
    """


class ConfigError(UserError):
    """One or more settings are misspelt or do not fit together; the message lists them all."""
