"""A model folder behind HTTP: `app` for an own deployment, ``xmcdist serve`` for the usual one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Limits", "app"]

if TYPE_CHECKING:
    from xmcdist.serving.application import app
    from xmcdist.serving.limits import Limits


def __getattr__(name: str) -> Any:
    """FastAPI and numba are imported when the application is asked for, not before."""
    if name == "app":
        from xmcdist.serving.application import app

        return app
    if name == "Limits":
        from xmcdist.serving.limits import Limits

        return Limits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
