"""Counts and times every request, whatever becomes of it."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xmcdist.serving.metrics import Metrics

__all__ = ["Watch"]

_PATHS = {"/predict", "/health", "/ready", "/info", "/metrics", "/", "/docs", "/openapi.json"}


class Watch:
    """ASGI middleware; addresses that are unknown count as one, or a stranger could make meters without end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, seen)
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - began)
